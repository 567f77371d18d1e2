#include <pybind11/pybind11.h>

#include "bindings.h"
#include "delta_norms.h"

namespace py = pybind11;

namespace learndrop {
namespace {

void delta_norms(uintptr_t chunks, int64_t chunk_count, uintptr_t starts, int64_t layers, uintptr_t anchors,
                 int64_t row_bytes, uintptr_t role, uintptr_t partials, uintptr_t out, bool persistence,
                 bool refresh, int threads) {
  const DeltaNorms work{.chunks = pointer<const Chunk>(chunks),
                        .chunk_count = chunk_count,
                        .starts = pointer<const int64_t>(starts),
                        .layers = layers,
                        .anchors = pointer<char>(anchors),
                        .row_bytes = row_bytes,
                        .role = pointer<int32_t>(role),
                        .partials = pointer<double>(partials),
                        .out = pointer<double>(out),
                        .persistence = persistence,
                        .refresh = refresh};
  const py::gil_scoped_release release;
  cpu::delta_norms(work, threads);
}

}  // namespace

void bind_delta_norms(py::module_& m) {
  m.def("delta_norms", &delta_norms, py::arg("chunks"), py::arg("chunk_count"), py::arg("starts"),
        py::arg("layers"), py::arg("anchors"), py::arg("row_bytes"), py::arg("role"), py::arg("partials"),
        py::arg("out"), py::arg("persistence"), py::arg("refresh"), py::arg("threads"));
}

}  // namespace learndrop
