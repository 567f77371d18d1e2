#include "cuda/device.h"

#include <cuda_runtime_api.h>

namespace learndrop::cuda {
namespace {

// CUDA's 13020 is version 13.2.
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

Device describe_device() {
  Device found{.runtime = version_text(CUDART_VERSION), .driver = "", .gpus = {}};
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return found;
  found.driver = version_text(version);
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) == cudaSuccess) found.gpus.emplace_back(properties.name);
  }
  cudaGetLastError();
  return found;
}

}  // namespace learndrop::cuda
