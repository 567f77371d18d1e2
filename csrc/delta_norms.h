// How far each layer's parameters are from their anchors: the CPU version of kernels/delta_norms.py, on the
// same table (kernels/chunks.py).
//
// L layers, C chunks, S bytes of an anchor row, K columns: 6, or 8 with persistence. Lengths are in elements;
// names that end in _bytes are in bytes.
#pragma once

#include <cstdint>

namespace learndrop {

// The order of DTYPE_CODES in kernels/chunks.py.
enum class Element : int64_t { fp32 = 0, bf16 = 1, fp16 = 2, fp64 = 3 };

// One row of the chunk table.
struct Chunk {
  int64_t address;
  int64_t anchor_bytes;
  int64_t length;
  int64_t layer;
  int64_t flags;

  Element element() const { return static_cast<Element>(flags & 3); }
};

// l1(delta), l2(delta)^2, max |delta|, l1(w), l2(w)^2, non-finite count, dot(delta, previous delta),
// l2(previous delta)^2.
constexpr int kSums = 8;

struct DeltaNorms {
  const Chunk* chunks;    // [C], sorted by layer
  int64_t chunk_count;    // C
  const int64_t* starts;  // [L + 1, 2]: first chunk and first group of each layer; groups are not used here
  int64_t layers;         // L
  char* anchors;          // [1 or 2, S]; row `*role` is the newer one
  int64_t row_bytes;      // S
  int32_t* role;          // set to the other row with persistence and refresh
  double* partials;       // [C, 8], written
  double* out;            // [L, K]
  bool persistence;
  bool refresh;
};

namespace cpu {

// delta = w - newer anchor and previous delta = newer - older anchor are rounded once, to float, or to double
// for fp64. The sums are double. The bits of the result depend neither on the threads nor on the instruction
// set. With refresh, w is written to the older anchor, or to the only one without persistence.
void delta_norms(const DeltaNorms& work, int threads);

}  // namespace cpu
}  // namespace learndrop
