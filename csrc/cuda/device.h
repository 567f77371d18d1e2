// The CUDA versions of this build and this machine, and its GPUs.
#pragma once

#include <string>
#include <vector>

namespace learndrop::cuda {

struct Device {
  std::string runtime;            // version the module was built with, "13.0"
  std::string driver;             // newest version that the driver supports, empty without a driver
  std::vector<std::string> gpus;  // their names, empty without a driver
};

Device describe_device();

}  // namespace learndrop::cuda
