// One 64-bit digest for each of many tensors: the CPU version of kernels/digests.py, on the same table
// (kernels/digest_table.py). The definition is in `digests` of kernels/reference.py.
//
// n tensors, C chunks. Names that end in _bytes are in bytes.
#pragma once

#include <cstdint>

namespace learndrop {

// Words of a block: their keys are the same in every block, and each block has a key of its own.
constexpr int64_t kBlockWords = 4096;

// One row of the chunk table: a piece of one tensor's memory that begins with a block.
struct DigestChunk {
  int64_t address;
  int64_t length_bytes;
  int64_t block;
  int64_t tensor;
};

struct Digests {
  const DigestChunk* chunks;  // [C]
  int64_t chunk_count;        // C
  const int64_t* seeds;       // [n]
  int64_t* out;               // [n], written
  int64_t tensors;            // n
};

namespace cpu {

// Sums are modulo 2^64, so the result does not depend on the threads.
void digests(const Digests& work, int threads);

}  // namespace cpu
}  // namespace learndrop
