#include <pybind11/pybind11.h>

#include <stdexcept>

#include "host_rows.h"

namespace py = pybind11;

namespace learndrop {
namespace {

#ifdef LEARNDROP_CUDA_ARCHITECTURES
void pin(uintptr_t address, int64_t bytes, int device) {
  const py::gil_scoped_release release;
  cuda::pin(pointer<void>(address), bytes, device);
}

void unpin(uintptr_t address) {
  const py::gil_scoped_release release;
  cuda::unpin(pointer<void>(address));
}

void host_rows_to_device(uintptr_t source, int64_t source_stride_bytes, uintptr_t index, int64_t count,
                         uintptr_t into, int64_t into_stride_bytes, int64_t row_bytes, bool kernel,
                         bool index_on_host, int device, uintptr_t stream) {
  const HostRows rows{.source = pointer<const void>(source),
                      .source_stride_bytes = source_stride_bytes,
                      .index = pointer<const int64_t>(index),
                      .count = count,
                      .into = pointer<void>(into),
                      .into_stride_bytes = into_stride_bytes,
                      .row_bytes = row_bytes,
                      .index_on_host = index_on_host};
  const py::gil_scoped_release release;
  (kernel ? cuda::gather_host_rows : cuda::copy_host_rows)(rows, device, pointer<void>(stream));
}
#else
constexpr auto kRefusal = "learndrop_ext._C was built without CUDA";
void pin(uintptr_t, int64_t, int) { throw std::runtime_error(kRefusal); }
void unpin(uintptr_t) { throw std::runtime_error(kRefusal); }
void host_rows_to_device(uintptr_t, int64_t, uintptr_t, int64_t, uintptr_t, int64_t, int64_t, bool, bool, int,
                         uintptr_t) {
  throw std::runtime_error(kRefusal);
}
#endif

}  // namespace

void bind_host_rows(py::module_& m) {
  m.def("pin", &pin, py::arg("address"), py::arg("bytes"), py::arg("device"));
  m.def("unpin", &unpin, py::arg("address"));
  m.def("host_rows_to_device", &host_rows_to_device, py::arg("source"), py::arg("source_stride_bytes"),
        py::arg("index"), py::arg("count"), py::arg("into"), py::arg("into_stride_bytes"),
        py::arg("row_bytes"), py::arg("kernel"), py::arg("index_on_host"), py::arg("device"),
        py::arg("stream"));
}

}  // namespace learndrop
