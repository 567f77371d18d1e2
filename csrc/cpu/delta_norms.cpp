#include "delta_norms.h"

#include <algorithm>
#include <string>

#include "cpu/delta_norms_loops.h"
#include "cpu/simd.h"
#include "cpu/threads.h"

namespace learndrop::cpu {
namespace {

// 8 chunks of 32 KiB: with less work, waking a thread costs more than it saves.
constexpr int64_t kGrain = 8;

const DeltaLoops& loops() {
#if defined(__x86_64__)
  const std::string name = converter().name;
  if (name == "avx512") return kDeltaAvx512;
  if (name == "avx2") return kDeltaAvx2;
#endif
  return kDeltaPortable;
}

// Adds one chunk's sums, or one column of them, to those of its layer; a NaN maximum stays.
void add_sums(const double* partial, double* sums, int columns) {
  for (int k = 0; k < columns; ++k) {
    const bool maximum = k == 2;
    if (!maximum) sums[k] += partial[k];
    if (maximum && !(partial[k] <= sums[k])) sums[k] = sums[k] == sums[k] ? partial[k] : sums[k];
  }
}

}  // namespace

void delta_norms(const DeltaNorms& work, int threads) {
  const DeltaLoops& loop = loops();
  const int64_t role = work.persistence ? *work.role : 0;
  char* const newer = work.anchors + role * work.row_bytes;
  char* const older = work.persistence ? work.anchors + (1 - role) * work.row_bytes : newer;
  parallel_for(work.chunk_count, kGrain, threads, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const Chunk& chunk = work.chunks[c];
      const ChunkSums sums = loop.sums[static_cast<int>(chunk.element())][work.persistence];
      char* const target = work.refresh ? older + chunk.anchor_bytes : nullptr;
      sums(reinterpret_cast<const void*>(chunk.address), newer + chunk.anchor_bytes,
           older + chunk.anchor_bytes, target, chunk.length, work.partials + c * kSums);
    }
  });
  const int columns = work.persistence ? 8 : 6;
  std::fill_n(work.out, work.layers * columns, 0.0);
  for (int64_t layer = 0; layer < work.layers; ++layer) {
    for (int64_t c = work.starts[2 * layer]; c < work.starts[2 * layer + 2]; ++c) {
      add_sums(work.partials + c * kSums, work.out + layer * columns, columns);
    }
  }
  if (work.persistence && work.refresh) *work.role = static_cast<int32_t>(1 - role);
}

}  // namespace learndrop::cpu
