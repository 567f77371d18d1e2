// The loops of Converter, written once over an instruction set V (Scalar, Avx2, Avx512).
//
// Avx2 and Avx512 are intrinsics, not the compiler's vectors as in delta_norms_loops.h: with those GCC 12
// finds neither the narrowing instructions (uint8 rows are appended 2 to 3 times as slowly, bf16 rows 1.4
// times) nor vminps for a < b ? a : b.
#pragma once

#include <cstring>

#include "cpu/convert.h"
#include "cpu/scalar.h"

namespace learndrop::cpu {
namespace {

template <class V, bool saturate, class In, class Out>
inline void convert_block(const In* in, Out* out) {
  const auto value = V::load(in);
  V::store(out, saturate ? V::saturate(value) : value);
}

template <class V, bool saturate, class In, class Out>
void convert(const void* in_pointer, void* out_pointer, int64_t n) {
  const In* in = static_cast<const In*>(in_pointer);
  Out* out = static_cast<Out*>(out_pointer);
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) convert_block<V, saturate>(in + i, out + i);
  for (; i < n; ++i) convert_block<Scalar, saturate>(in + i, out + i);
}

template <int bytes>
void copy(const void* in, void* out, int64_t n) {
  std::memcpy(out, in, static_cast<size_t>(n * bytes));
}

template <class V, class In>
inline void extent_column(const In* in, int64_t pixels, int64_t channels, float* low, float* high,
                          uint32_t* magnitude) {
  auto least = V::load(low), greatest = V::load(high);
  auto widest = V::load_bits(magnitude);
  for (int64_t p = 0; p < pixels; ++p) {
    const auto value = V::load(in + p * channels);
    least = V::minimum(value, least);
    greatest = V::maximum(value, greatest);
    widest = V::maximum_bits(widest, V::magnitude(value));
  }
  V::store(low, least);
  V::store(high, greatest);
  V::store_bits(magnitude, widest);
}

template <class V, class In>
void extent(const void* in_pointer, int64_t pixels, int64_t channels, float* low, float* high,
            uint32_t* magnitude) {
  const In* in = static_cast<const In*>(in_pointer);
  int64_t c = 0;
  for (; c + V::lanes <= channels; c += V::lanes) {
    extent_column<V>(in + c, pixels, channels, low + c, high + c, magnitude + c);
  }
  for (; c < channels; ++c) {
    extent_column<Scalar>(in + c, pixels, channels, low + c, high + c, magnitude + c);
  }
}

template <class V, class In>
inline void quantise_block(const In* in, uint8_t* out, const float* zero, const float* inverse) {
  const auto steps = V::multiply(V::subtract(V::load(in), V::load(zero)), V::load(inverse));
  V::store(out, V::clamp_byte(steps));
}

template <class V, class In>
void quantise(const void* in_pointer, uint8_t* out, int64_t pixels, int64_t channels, const float* zero,
              const float* inverse) {
  const In* in = static_cast<const In*>(in_pointer);
  for (int64_t p = 0; p < pixels; ++p, in += channels, out += channels) {
    int64_t c = 0;
    for (; c + V::lanes <= channels; c += V::lanes) quantise_block<V>(in + c, out + c, zero + c, inverse + c);
    for (; c < channels; ++c) quantise_block<Scalar>(in + c, out + c, zero + c, inverse + c);
  }
}

template <class V>
inline typename V::Float dequantised(const uint8_t* in, const float* zero, const float* scale) {
  return V::add(V::load(zero), V::multiply(V::load(scale), V::load(in)));
}

template <class V, class Out>
void dequantise(const uint8_t* in, void* out_pointer, int64_t pixels, int64_t channels, const float* zero,
                const float* scale) {
  Out* out = static_cast<Out*>(out_pointer);
  for (int64_t p = 0; p < pixels; ++p, in += channels, out += channels) {
    int64_t c = 0;
    for (; c + V::lanes <= channels; c += V::lanes)
      V::store(out + c, dequantised<V>(in + c, zero + c, scale + c));
    for (; c < channels; ++c) Scalar::store(out + c, dequantised<Scalar>(in + c, zero + c, scale + c));
  }
}

template <class V>
constexpr Converter converter(const char* name) {
  return {
      name,
      {{copy<4>, convert<V, false, Bf16, float>, convert<V, false, Fp16, float>},
       {convert<V, false, float, Bf16>, copy<2>, convert<V, false, Fp16, Bf16>},
       {convert<V, true, float, Fp16>, convert<V, true, Bf16, Fp16>, convert<V, true, Fp16, Fp16>}},
      {{copy<4>, convert<V, false, float, Bf16>, convert<V, false, float, Fp16>},
       {convert<V, false, Bf16, float>, copy<2>, convert<V, false, Bf16, Fp16>},
       {convert<V, false, Fp16, float>, convert<V, false, Fp16, Bf16>, copy<2>}},
      {extent<V, float>, extent<V, Bf16>, extent<V, Fp16>},
      {quantise<V, float>, quantise<V, Bf16>, quantise<V, Fp16>},
      {dequantise<V, float>, dequantise<V, Bf16>, dequantise<V, Fp16>},
  };
}

}  // namespace
}  // namespace learndrop::cpu
