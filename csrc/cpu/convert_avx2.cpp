// Compiled with -mavx2 -mf16c. Nothing here may run before the CPU has been checked.
#include <immintrin.h>

#include "cpu/convert_loops.h"

namespace learndrop::cpu {
namespace {

struct Avx2 {
  static constexpr int lanes = 8;
  using Float = __m256;
  using Bits = __m256i;

  static __m128i load_16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static __m256 quiet(__m256 v) {
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(kQuietNan)));
    return _mm256_blendv_ps(v, nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }

  static __m256 load(const float* p) { return _mm256_loadu_ps(p); }
  static __m256 load(const Bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16(p)), 16));
  }
  static __m256 load(const Fp16* p) { return quiet(_mm256_cvtph_ps(load_16(p))); }
  static __m256 load(const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
  }

  static __m128i narrow(const Bf16*, __m256 v) {
    const __m256i bits = _mm256_castps_si256(quiet(v));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i high = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  static __m128i narrow(const Fp16*, __m256 v) {
    return _mm256_cvtps_ph(quiet(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  static void store(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
  template <class Half>
  static void store(Half* p, __m256 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(p, v));
  }
  static void store(uint8_t* p, __m256 v) {
    const __m256i words = _mm256_cvtps_epi32(v);
    const __m128i halves =
        _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
  }

  // min and max return their second operand if one is NaN.
  static __m256 saturate(__m256 v) {
    return _mm256_max_ps(_mm256_set1_ps(-kLargestFp16), _mm256_min_ps(_mm256_set1_ps(kLargestFp16), v));
  }
  static __m256 clamp_byte(__m256 v) {
    return _mm256_min_ps(_mm256_max_ps(v, _mm256_setzero_ps()), _mm256_set1_ps(255.0f));
  }
  static __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static __m256 subtract(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
  static __m256 multiply(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  static __m256 minimum(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
  static __m256 maximum(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
  static __m256i magnitude(__m256 v) {
    return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
  }
  static __m256i maximum_bits(__m256i a, __m256i b) { return _mm256_max_epu32(a, b); }
  static __m256i load_bits(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store_bits(uint32_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
};

}  // namespace

const Converter kAvx2 = converter<Avx2>("avx2");

}  // namespace learndrop::cpu
