// learndrop_ext._C: raw pointers and sizes in, exceptions out. learndrop_ext/ops.py checks the arguments.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

// The architectures that the CUDA code was compiled for, comma-separated; empty in a build without CUDA.
const char* cuda_architectures() {
#ifdef LEARNDROP_CUDA_ARCHITECTURES
  return LEARNDROP_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) { m.def("cuda_architectures", &cuda_architectures); }
