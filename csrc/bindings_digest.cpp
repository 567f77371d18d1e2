#include <pybind11/pybind11.h>

#include "bindings.h"
#include "digest.h"

namespace py = pybind11;

namespace learndrop {
namespace {

void digests(uintptr_t chunks, int64_t chunk_count, uintptr_t seeds, uintptr_t out, int64_t tensors,
             int threads) {
  const Digests work{.chunks = pointer<const DigestChunk>(chunks),
                     .chunk_count = chunk_count,
                     .seeds = pointer<const int64_t>(seeds),
                     .out = pointer<int64_t>(out),
                     .tensors = tensors};
  const py::gil_scoped_release release;
  cpu::digests(work, threads);
}

}  // namespace

void bind_digest(py::module_& m) {
  m.def("digests", &digests, py::arg("chunks"), py::arg("chunk_count"), py::arg("seeds"), py::arg("out"),
        py::arg("tensors"), py::arg("threads"));
}

}  // namespace learndrop
