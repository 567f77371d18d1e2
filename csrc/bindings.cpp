// learndrop_ext._C takes raw pointers and sizes and throws exceptions. The arguments have been checked in
// learndrop_ext/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/simd.h"
#include "row_ops.h"
#ifdef LEARNDROP_CUDA_ARCHITECTURES
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace learndrop;

namespace learndrop {
void bind_delta_norms(py::module_& m);
void bind_digest(py::module_& m);
void bind_disk_rows(py::module_& m);
void bind_host_rows(py::module_& m);
}  // namespace learndrop

namespace {

#ifndef LEARNDROP_CUDA_ARCHITECTURES
[[noreturn]] void refuse_cuda() { throw std::runtime_error("learndrop_ext._C was built without CUDA"); }
#endif

// Device -1 is the CPU.
void append_rows(uintptr_t cache, int64_t cache_rows, int64_t cache_stride_bytes, int codec, uintptr_t rows,
                 int dtype, int64_t batch, const RowShape& shape, int64_t stride_b, int64_t stride_h,
                 int64_t stride_w, int64_t stride_c, uintptr_t index, int threads, int device,
                 [[maybe_unused]] uintptr_t stream) {
  const Append append{.cache = pointer<void>(cache),
                      .cache_rows = cache_rows,
                      .cache_stride_bytes = cache_stride_bytes,
                      .codec = static_cast<Codec>(codec),
                      .rows = pointer<const void>(rows),
                      .dtype = static_cast<Dtype>(dtype),
                      .batch = batch,
                      .shape = shape,
                      .stride_b = stride_b,
                      .stride_h = stride_h,
                      .stride_w = stride_w,
                      .stride_c = stride_c,
                      .index = pointer<const int64_t>(index)};
  const py::gil_scoped_release release;
  if (device < 0) return cpu::append_rows(append, threads);
#ifdef LEARNDROP_CUDA_ARCHITECTURES
  cuda::append_rows(append, device, pointer<void>(stream));
#else
  refuse_cuda();
#endif
}

void gather_rows(uintptr_t cache, int64_t cache_rows, int64_t cache_stride_bytes, int codec, uintptr_t out,
                 int dtype, int64_t batch, const RowShape& shape, uintptr_t index, bool index_on_host,
                 int threads, int device, [[maybe_unused]] uintptr_t stream) {
  const Gather gather{.cache = pointer<const void>(cache),
                      .cache_rows = cache_rows,
                      .cache_stride_bytes = cache_stride_bytes,
                      .codec = static_cast<Codec>(codec),
                      .out = pointer<void>(out),
                      .dtype = static_cast<Dtype>(dtype),
                      .batch = batch,
                      .shape = shape,
                      .index = pointer<const int64_t>(index),
                      .index_on_host = index_on_host};
  const py::gil_scoped_release release;
  if (device < 0) return cpu::gather_rows(gather, threads);
#ifdef LEARNDROP_CUDA_ARCHITECTURES
  cuda::gather_rows(gather, device, pointer<void>(stream));
#else
  refuse_cuda();
#endif
}

// Returns the position of the first index outside [0, rows), or -1.
int64_t first_outside(uintptr_t index, int64_t batch, int64_t rows) {
  const int64_t* first = pointer<const int64_t>(index);
  const int64_t* last = first + batch;
  const int64_t* found = std::find_if(first, last, [rows](int64_t row) { return row < 0 || row >= rows; });
  return found == last ? -1 : found - first;
}

// Returns a row that occurs twice in the index, or -1.
int64_t first_repeated(uintptr_t index, int64_t batch) {
  const int64_t* first = pointer<const int64_t>(index);
  if (std::is_sorted(first, first + batch)) {
    const int64_t* found = std::adjacent_find(first, first + batch);
    return found == first + batch ? -1 : *found;
  }
  std::vector<int64_t> sorted(first, first + batch);
  std::sort(sorted.begin(), sorted.end());
  const auto found = std::adjacent_find(sorted.begin(), sorted.end());
  return found == sorted.end() ? -1 : *found;
}

py::dict build_info() {
  py::dict info;
#ifdef LEARNDROP_CUDA_ARCHITECTURES
  const cuda::Device device = cuda::describe_device();
  info["cuda_architectures"] = LEARNDROP_CUDA_ARCHITECTURES;
  info["cuda_runtime"] = device.runtime;
  info["driver"] = device.driver;
  info["gpus"] = device.gpus;
#else
  info["cuda_architectures"] = "";
  info["cuda_runtime"] = "";
  info["driver"] = "";
  info["gpus"] = std::vector<std::string>();
#endif
  info["cpu_simd"] = cpu::converter().name;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  if (const char* simd = std::getenv("LEARNDROP_SIMD")) cpu::select_simd(simd);
  m.def("build_info", &build_info);
  m.def("select_simd", &cpu::select_simd, py::arg("name"));
  py::class_<RowShape>(m, "RowShape")
      .def(py::init([](int64_t height, int64_t width, int64_t channels) {
             return RowShape{.height = height, .width = width, .channels = channels};
           }),
           py::arg("height"), py::arg("width"), py::arg("channels"))
      .def_readonly("height", &RowShape::height)
      .def_readonly("width", &RowShape::width)
      .def_readonly("channels", &RowShape::channels);
  m.def(
      "row_bytes",
      [](int codec, const RowShape& shape) { return row_bytes(static_cast<Codec>(codec), shape); },
      py::arg("codec"), py::arg("shape"));
  m.attr("HELD_ROWS") = kHeldRows;
  m.def("first_outside", &first_outside, py::arg("index"), py::arg("batch"), py::arg("rows"));
  m.def("first_repeated", &first_repeated, py::arg("index"), py::arg("batch"));
  m.def("append_rows", &append_rows, py::arg("cache"), py::arg("cache_rows"), py::arg("cache_stride_bytes"),
        py::arg("codec"), py::arg("rows"), py::arg("dtype"), py::arg("batch"), py::arg("shape"),
        py::arg("stride_b"), py::arg("stride_h"), py::arg("stride_w"), py::arg("stride_c"), py::arg("index"),
        py::arg("threads"), py::arg("device"), py::arg("stream"));
  m.def("gather_rows", &gather_rows, py::arg("cache"), py::arg("cache_rows"), py::arg("cache_stride_bytes"),
        py::arg("codec"), py::arg("out"), py::arg("dtype"), py::arg("batch"), py::arg("shape"),
        py::arg("index"), py::arg("index_on_host"), py::arg("threads"), py::arg("device"), py::arg("stream"));
  bind_delta_norms(m);
  bind_digest(m);
  bind_disk_rows(m);
  bind_host_rows(m);
}
