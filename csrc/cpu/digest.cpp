#include "digest.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "cpu/threads.h"

namespace learndrop::cpu {
namespace {

// 8 chunks of 32 KiB: with less work, waking a thread costs more than it saves.
constexpr int64_t kGrain = 8;

constexpr int64_t kWordBytes = 4, kBlockBytes = kBlockWords * kWordBytes;

using WordKeys = std::array<uint32_t, kBlockWords>;

// The finaliser of MurmurHash3, made odd. 16 KiB, which stay in the first-level cache.
constexpr WordKeys make_word_keys() {
  WordKeys keys{};
  for (uint32_t j = 0; j < kBlockWords; ++j) {
    uint32_t x = j + 1;
    x = (x ^ x >> 16) * 0x85ebca6b;
    x = (x ^ x >> 13) * 0xc2b2ae35;
    keys[j] = (x ^ x >> 16) | 1;
  }
  return keys;
}

constexpr WordKeys kWordKeys = make_word_keys();

// The finaliser of SplitMix64, made odd.
uint64_t block_key(int64_t block) {
  uint64_t x = static_cast<uint64_t>(block) + 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return (x ^ x >> 31) | 1;
}

// The compiler vectorises this loop. SSE2 already multiplies words as fast as memory brings them: with AVX2
// no digest of memory was faster.
uint64_t block_sum(const char* at, int64_t bytes) {
  const int64_t words = bytes / kWordBytes;
  uint64_t sum = 0;
  for (int64_t j = 0; j < words; ++j) {
    uint32_t word;
    std::memcpy(&word, at + j * kWordBytes, kWordBytes);
    sum += static_cast<uint64_t>(word) * kWordKeys[j];
  }
  if (const int64_t rest_bytes = bytes % kWordBytes; rest_bytes != 0) {
    uint32_t word = 0;
    std::memcpy(&word, at + words * kWordBytes, rest_bytes);
    sum += static_cast<uint64_t>(word) * kWordKeys[words];
  }
  return sum;
}

uint64_t chunk_sum(const DigestChunk& chunk) {
  const char* const memory = reinterpret_cast<const char*>(chunk.address);
  uint64_t sum = 0;
  int64_t block = chunk.block;
  for (int64_t at = 0; at < chunk.length_bytes; at += kBlockBytes) {
    sum += block_sum(memory + at, std::min(kBlockBytes, chunk.length_bytes - at)) * block_key(block++);
  }
  return sum;
}

}  // namespace

void digests(const Digests& work, int threads) {
  std::copy_n(work.seeds, work.tensors, work.out);
  parallel_for(work.chunk_count, kGrain, threads, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const DigestChunk& chunk = work.chunks[c];
      // An atomic addition wraps around.
      std::atomic_ref<int64_t>(work.out[chunk.tensor])
          .fetch_add(static_cast<int64_t>(chunk_sum(chunk)), std::memory_order_relaxed);
    }
  });
}

}  // namespace learndrop::cpu
