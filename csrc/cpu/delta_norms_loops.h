// The inner loop of the delta norms, for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/scalar.h"
#include "delta_norms.h"

namespace learndrop::cpu {

// Writes the 8 sums of n elements. `target` is the anchor to overwrite with w, or null; older is read only
// with persistence.
using ChunkSums = void (*)(const void* w, const void* newer, const void* older, void* target, int64_t n,
                           double* sums);

struct DeltaLoops {
  ChunkSums sums[4][2];  // [element][persistence]
};

extern const DeltaLoops kDeltaPortable;
#if defined(__x86_64__)
extern const DeltaLoops kDeltaAvx2;
extern const DeltaLoops kDeltaAvx512;
#endif

// Internal linkage: each file is compiled for its own instruction set, and the linker must not merge their
// copies.
namespace {

// 8 running sums per column in every instruction set, so that all give the same bits; products of two floats
// are exact in double. They are kGroups of the compiler's own vectors, kWidth doubles in a register.
constexpr int kLanes = 8;
#if defined(__AVX512F__)
constexpr int kWidth = 8;
#elif defined(__AVX2__)
constexpr int kWidth = 4;
#else
constexpr int kWidth = 2;
#endif
constexpr int kGroups = kLanes / kWidth;

using Floats = float __attribute__((vector_size(4 * kWidth)));
using Ints = int32_t __attribute__((vector_size(4 * kWidth)));
using Doubles = double __attribute__((vector_size(8 * kWidth)));
using Longs = int64_t __attribute__((vector_size(8 * kWidth)));
using Shorts = uint16_t __attribute__((vector_size(2 * kWidth)));

#define LEARNDROP_INLINE inline __attribute__((always_inline))

template <class To, class From>
LEARNDROP_INLINE void reinterpret(const From& from, To& to) {
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof to);
}

// The vectors in which an element type is computed, and its magnitude as an integer, which is ordered like
// |x|, with infinity above every number and NaN above infinity.
struct Single {
  using Real = Floats;
  using Bits = Ints;
  static constexpr int32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;
};
struct Double {
  using Real = Doubles;
  using Bits = Longs;
  static constexpr int64_t kMagnitude = 0x7fffffffffffffff, kInfinity = 0x7ff0000000000000;
};

// load reads kWidth elements.
struct Fp32 : Single {
  using Stored = float;
  static LEARNDROP_INLINE void load(const char* p, Floats& out) { std::memcpy(&out, p, sizeof out); }
};
struct Fp64 : Double {
  using Stored = double;
  static LEARNDROP_INLINE void load(const char* p, Doubles& out) { std::memcpy(&out, p, sizeof out); }
};
struct Bfloat16 : Single {
  using Stored = uint16_t;
  static LEARNDROP_INLINE void load(const char* p, Floats& out) {
    Shorts bits;
    std::memcpy(&bits, p, sizeof bits);
    reinterpret(__builtin_convertvector(bits, Ints) << 16, out);
  }
};
struct Float16 : Single {
  using Stored = uint16_t;
  // As Scalar::load in scalar.h, except that a NaN keeps its payload.
  static LEARNDROP_INLINE void load(const char* p, Floats& out) {
    Shorts half;
    std::memcpy(&half, p, sizeof half);
    const Ints bits = __builtin_convertvector(half, Ints);
    const Ints magnitude = (bits & 0x7fff) << 13;
    Floats scaled;
    reinterpret(magnitude, scaled);
    scaled *= 0x1p112f;
    Ints finite;
    reinterpret(scaled, finite);
    const Ints special = magnitude | Single::kInfinity;
    const Ints value = magnitude >= 0x7c00 << 13 ? special : finite;
    reinterpret(value | (bits & 0x8000) << 16, out);
  }
};

template <class E, bool kPersistence>
struct Running {
  using Real = typename E::Real;
  using Bits = typename E::Bits;
  Doubles l1{}, l2{}, w1{}, w2{}, dot{}, previous2{};
  Bits top{}, bad{};

  LEARNDROP_INLINE void add(const char* p_w, const char* p_newer, const char* p_older) {
    Real w, newer;
    E::load(p_w, w);
    E::load(p_newer, newer);
    const Real delta = w - newer;
    Bits size, w_size;
    reinterpret(delta, size);
    reinterpret(w, w_size);
    size &= E::kMagnitude;
    w_size &= E::kMagnitude;
    top = size > top ? size : top;
    bad -= size >= E::kInfinity;
    Real absolute, w_absolute;
    reinterpret(size, absolute);
    reinterpret(w_size, w_absolute);
    const Doubles wide = __builtin_convertvector(absolute, Doubles);
    const Doubles w_wide = __builtin_convertvector(w_absolute, Doubles);
    l1 += wide;
    l2 += wide * wide;
    w1 += w_wide;
    w2 += w_wide * w_wide;
    if constexpr (kPersistence) {
      Real older;
      E::load(p_older, older);
      const Doubles signed_delta = __builtin_convertvector(delta, Doubles);
      const Doubles previous = __builtin_convertvector(newer - older, Doubles);
      dot += signed_delta * previous;
      previous2 += previous * previous;
    }
  }
};

// The sum of one column over all lanes, in an order that does not depend on the register width.
template <class E, bool kPersistence>
double add_lanes(const Running<E, kPersistence>* running, Doubles Running<E, kPersistence>::* column) {
  double x[kLanes];
  for (int g = 0; g < kGroups; ++g) std::memcpy(x + g * kWidth, &(running[g].*column), sizeof(Doubles));
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

template <class E, bool kPersistence>
void write_sums(const Running<E, kPersistence>* running, double* sums) {
  using R = Running<E, kPersistence>;
  auto top = running[0].top[0];
  int64_t bad = 0;
  for (int g = 0; g < kGroups; ++g) {
    for (int lane = 0; lane < kWidth; ++lane) {
      top = running[g].top[lane] > top ? running[g].top[lane] : top;
      bad += running[g].bad[lane];
    }
  }
  decltype(+typename E::Real{}[0]) maximum;
  reinterpret(top, maximum);
  sums[0] = add_lanes(running, &R::l1);
  sums[1] = add_lanes(running, &R::l2);
  sums[2] = maximum;
  sums[3] = add_lanes(running, &R::w1);
  sums[4] = add_lanes(running, &R::w2);
  sums[5] = static_cast<double>(bad);
  sums[6] = add_lanes(running, &R::dot);
  sums[7] = add_lanes(running, &R::previous2);
}

template <class E, bool kPersistence>
void chunk_sums(const void* w, const void* newer, const void* older, void* target, int64_t n, double* sums) {
  constexpr int64_t step_bytes = kLanes * sizeof(typename E::Stored);
  const char *p_w = static_cast<const char*>(w), *p_newer = static_cast<const char*>(newer);
  const char* p_older = kPersistence ? static_cast<const char*>(older) : p_newer;
  Running<E, kPersistence> running[kGroups];
  const auto add = [&running](const char* at_w, const char* at_newer, const char* at_older) {
    constexpr int64_t group_bytes = kWidth * sizeof(typename E::Stored);
    for (int g = 0; g < kGroups; ++g) {
      running[g].add(at_w + g * group_bytes, at_newer + g * group_bytes, at_older + g * group_bytes);
    }
  };
  const int64_t whole_bytes = n / kLanes * step_bytes;
  for (int64_t at = 0; at < whole_bytes; at += step_bytes) add(p_w + at, p_newer + at, p_older + at);
  const int64_t rest_bytes = n % kLanes * sizeof(typename E::Stored);
  if (rest_bytes != 0) {
    char padded[3][step_bytes] = {};
    std::memcpy(padded[0], p_w + whole_bytes, rest_bytes);
    std::memcpy(padded[1], p_newer + whole_bytes, rest_bytes);
    std::memcpy(padded[2], p_older + whole_bytes, rest_bytes);
    add(padded[0], padded[1], padded[2]);
  }
  // After the loop, while the small chunk is in the cache.
  if (target != nullptr && n > 0) std::memcpy(target, p_w, whole_bytes + rest_bytes);
  write_sums(running, sums);
}

constexpr DeltaLoops delta_loops() {
  return {{{chunk_sums<Fp32, false>, chunk_sums<Fp32, true>},
           {chunk_sums<Bfloat16, false>, chunk_sums<Bfloat16, true>},
           {chunk_sums<Float16, false>, chunk_sums<Float16, true>},
           {chunk_sums<Fp64, false>, chunk_sums<Fp64, true>}}};
}

#undef LEARNDROP_INLINE

}  // namespace
}  // namespace learndrop::cpu
