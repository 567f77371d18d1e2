// The inner loops of the row operations, for each instruction set.
#pragma once

#include <cstdint>

namespace learndrop::cpu {

struct Converter {
  // n values.
  using Move = void (*)(const void* in, void* out, int64_t n);
  // in [pixels, channels]; updates low, high and magnitude [channels] with the smallest and the largest value
  // and the bits of the largest magnitude, which show NaN and infinity.
  using Extent = void (*)(const void* in, int64_t pixels, int64_t channels, float* low, float* high,
                          uint32_t* magnitude);
  // in [pixels, channels], out [pixels, channels]; zero, inverse [channels].
  using Quantise = void (*)(const void* in, uint8_t* out, int64_t pixels, int64_t channels, const float* zero,
                            const float* inverse);
  // in [pixels, channels], out [pixels, channels]; zero, scale [channels].
  using Dequantise = void (*)(const uint8_t* in, void* out, int64_t pixels, int64_t channels,
                              const float* zero, const float* scale);

  const char* name;   // "portable", "avx2" or "avx512"
  Move encode[3][3];  // [codec][dtype]
  Move decode[3][3];  // [codec][dtype]
  Extent extent[3];   // [dtype]
  Quantise quantise[3];
  Dequantise dequantise[3];
};

extern const Converter kPortable;
#if defined(__x86_64__)
extern const Converter kAvx2;
extern const Converter kAvx512;
#endif

}  // namespace learndrop::cpu
