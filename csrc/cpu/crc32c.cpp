// CRC-32C: eight bytes per instruction with SSE4.2, three instructions in flight; else eight table look-ups
// per eight bytes.
#include <array>
#include <cstring>

#include "disk_rows.h"
#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace learndrop::cpu {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;  // Castagnoli, bit-reversed

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b]: the checksum of byte b followed by k zero bytes.
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (uint32_t byte = 0; byte < 256; ++byte) {
    for (std::size_t k = 1; k < 8; ++k) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = before >> 8 ^ tables[0][before & 0xff];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

// Little-endian on every machine.
uint64_t load(const unsigned char* bytes) {
  uint64_t word = 0;
  for (int i = 7; i >= 0; --i) word = word << 8 | bytes[i];
  return word;
}

#if defined(__x86_64__)
// Bytes of each of three stretches whose checksums are computed side by side: the instruction has a latency
// of three cycles, and one can start in each.
constexpr std::size_t kStretch = 256;

// The effect of kStretch zero bytes on a checksum, for each byte of the checksum, since the steps are linear.
using Shift = std::array<std::array<uint32_t, 256>, 4>;

constexpr Shift make_shift() {
  Shift shift{};
  for (std::size_t k = 0; k < 4; ++k) {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t crc = byte << 8 * k;
      for (std::size_t i = 0; i < kStretch; ++i) crc = crc >> 8 ^ kTables[0][crc & 0xff];
      shift[k][byte] = crc;
    }
  }
  return shift;
}

const Shift kShift = make_shift();

uint32_t shifted(uint32_t crc) {
  return kShift[0][crc & 0xff] ^ kShift[1][crc >> 8 & 0xff] ^ kShift[2][crc >> 16 & 0xff] ^
         kShift[3][crc >> 24];
}

__attribute__((target("sse4.2"))) uint64_t crc_word(uint64_t crc, const unsigned char* at) {
  uint64_t word;
  std::memcpy(&word, at, 8);
  return _mm_crc32_u64(crc, word);
}

__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(const void* data, std::size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(data);
  uint64_t crc = 0xffffffff;
  for (; bytes >= 3 * kStretch; bytes -= 3 * kStretch, at += 3 * kStretch) {
    uint64_t second = 0, third = 0;
    for (std::size_t i = 0; i < kStretch; i += 8) {
      crc = crc_word(crc, at + i);
      second = crc_word(second, at + kStretch + i);
      third = crc_word(third, at + 2 * kStretch + i);
    }
    crc = shifted(shifted(static_cast<uint32_t>(crc)) ^ static_cast<uint32_t>(second)) ^ third;
  }
  for (; bytes >= 8; bytes -= 8, at += 8) crc = crc_word(crc, at);
  auto rest = static_cast<uint32_t>(crc);
  for (; bytes > 0; --bytes, ++at) rest = _mm_crc32_u8(rest, *at);
  return ~rest;
}
#endif

}  // namespace

uint32_t crc32c_portable(const void* data, std::size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(data);
  uint32_t crc = 0xffffffff;
  for (; bytes >= 8; bytes -= 8, at += 8) {
    const uint64_t word = load(at) ^ crc;
    crc = 0;
    for (std::size_t k = 0; k < 8; ++k) crc ^= kTables[7 - k][word >> 8 * k & 0xff];
  }
  for (; bytes > 0; --bytes, ++at) crc = crc >> 8 ^ kTables[0][(crc ^ *at) & 0xff];
  return ~crc;
}

uint32_t crc32c(const void* data, std::size_t bytes) {
#if defined(__x86_64__)
  static const bool sse42 = __builtin_cpu_supports("sse4.2");
  if (sse42) return crc32c_sse42(data, bytes);
#endif
  return crc32c_portable(data, bytes);
}

}  // namespace learndrop::cpu
