// Each conversion, one value at a time. All instruction sets give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "row_ops.h"

namespace learndrop::cpu {
// Internal linkage: each file is compiled for its own instruction set, and the linker must not merge their
// copies.
namespace {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr uint32_t kInfinityBits = 0x7f800000;
constexpr uint32_t kQuietNan = 0x7fc00000;

struct Scalar {
  static constexpr int lanes = 1;
  using Float = float;
  using Bits = uint32_t;

  static float load(const float* p) { return *p; }
  static float load(const Bf16* p) { return from_bits(uint32_t{p->bits} << 16); }
  // Without branches, so that the compiler can vectorise it, and without subnormal floats, which take 150
  // cycles each.
  static float load(const Fp16* p) {
    const uint32_t sign = (p->bits & 0x8000u) << 16;
    const uint32_t magnitude = (p->bits & 0x7fffu) << 13;
    const uint32_t normal = magnitude + (112u << 23);
    // 2^-14 (1 + m / 1024) - 2^-14 is m 2^-24.
    const uint32_t subnormal = to_bits(from_bits(magnitude + (113u << 23)) - 0x1p-14f);
    const uint32_t finite = magnitude < 0x0400u << 13 ? subnormal : normal;
    const uint32_t bits = sign | (magnitude >= 0x7c00u << 13 ? kInfinityBits : finite);
    return from_bits(magnitude > 0x7c00u << 13 ? kQuietNan : bits);
  }
  static float load(const uint8_t* p) { return static_cast<float>(*p); }

  static void store(float* p, float v) { *p = v; }
  static void store(Bf16* p, float v) {
    const uint32_t bits = to_bits(v);
    const bool nan = (bits & 0x7fffffff) > kInfinityBits;
    p->bits = static_cast<uint16_t>((nan ? kQuietNan : bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  static void store(Fp16* p, float v) {
    const uint32_t bits = to_bits(v);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // The last bit of a float near 0.5 is 2^-24, that of a subnormal half: the addition rounds.
    const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
    const uint32_t finite = magnitude < to_bits(0x1p-14f) ? subnormal : normal;
    const uint32_t half = sign | (magnitude >= to_bits(65520.0f) ? 0x7c00 : finite);
    p->bits = static_cast<uint16_t>(magnitude > kInfinityBits ? 0x7e00 : half);
  }
  static void store(uint8_t* p, float v) { *p = static_cast<uint8_t>(to_bits(v + 0x1.8p23f)); }

  static float saturate(float v) {
    const float low = v > kLargestFp16 ? kLargestFp16 : v;
    return low < -kLargestFp16 ? -kLargestFp16 : low;
  }
  // Into [0, 255], NaN to 0.
  static float clamp_byte(float v) {
    const float positive = v > 0.0f ? v : 0.0f;
    return positive < 255.0f ? positive : 255.0f;
  }
  static float add(float a, float b) { return a + b; }
  static float subtract(float a, float b) { return a - b; }
  static float multiply(float a, float b) { return a * b; }
  static float minimum(float a, float b) { return a < b ? a : b; }
  static float maximum(float a, float b) { return a > b ? a : b; }
  static uint32_t magnitude(float v) { return to_bits(v) & 0x7fffffff; }
  static uint32_t maximum_bits(uint32_t a, uint32_t b) { return a > b ? a : b; }
  static uint32_t load_bits(const uint32_t* p) { return *p; }
  static void store_bits(uint32_t* p, uint32_t v) { *p = v; }
};

}  // namespace
}  // namespace learndrop::cpu
