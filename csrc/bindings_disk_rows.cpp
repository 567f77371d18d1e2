#include <pybind11/pybind11.h>

#include <cerrno>
#include <system_error>

#include "bindings.h"
#include "disk_rows.h"

namespace py = pybind11;

namespace learndrop {
namespace {

// Calls `body` without the GIL. A file error becomes the OSError that Python would raise.
template <class Call>
auto released(const Call& call) {
  try {
    const py::gil_scoped_release release;
    return call();
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
}

int64_t read_rows(const RowFile& file, uintptr_t slots, int64_t count, uintptr_t into,
                  int64_t into_stride_bytes, uintptr_t checksums, int64_t block_bytes, int threads) {
  return released([&] {
    return cpu::read_rows(file, pointer<const int64_t>(slots), count, pointer<void>(into), into_stride_bytes,
                          pointer<const uint32_t>(checksums), block_bytes, threads);
  });
}

void write_rows(const RowFile& file, uintptr_t slots, int64_t count, uintptr_t rows,
                int64_t rows_stride_bytes, uintptr_t checksums, int threads) {
  released([&] {
    cpu::write_rows(file, pointer<const int64_t>(slots), count, pointer<const void>(rows), rows_stride_bytes,
                    pointer<uint32_t>(checksums), threads);
  });
}

uint32_t crc32c(const py::buffer& data, bool portable) {
  const py::buffer_info info = data.request();
  const auto bytes = static_cast<std::size_t>(info.size * info.itemsize);
  return portable ? cpu::crc32c_portable(info.ptr, bytes) : cpu::crc32c(info.ptr, bytes);
}

}  // namespace

void bind_disk_rows(py::module_& m) {
  py::class_<RowFile>(m, "RowFile")
      .def(py::init([](int descriptor, int64_t rows_offset, int64_t rows_per_group, int64_t group_bytes,
                       int64_t place_bytes, int64_t row_bytes) {
             return RowFile{.descriptor = descriptor,
                            .rows_offset = rows_offset,
                            .rows_per_group = rows_per_group,
                            .group_bytes = group_bytes,
                            .place_bytes = place_bytes,
                            .row_bytes = row_bytes};
           }),
           py::arg("descriptor"), py::arg("rows_offset"), py::arg("rows_per_group"), py::arg("group_bytes"),
           py::arg("place_bytes"), py::arg("row_bytes"));
  m.def("crc32c", &crc32c, py::arg("data"), py::arg("portable") = false);
  m.def("read_rows", &read_rows, py::arg("file"), py::arg("slots"), py::arg("count"), py::arg("into"),
        py::arg("into_stride_bytes"), py::arg("checksums"), py::arg("block_bytes"), py::arg("threads"));
  m.def("write_rows", &write_rows, py::arg("file"), py::arg("slots"), py::arg("count"), py::arg("rows"),
        py::arg("rows_stride_bytes"), py::arg("checksums"), py::arg("threads"));
}

}  // namespace learndrop
