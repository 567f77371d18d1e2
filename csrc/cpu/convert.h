// The inner loops of the row ops, once for each instruction set.
#pragma once

#include <cstdint>

namespace learndrop::cpu {

struct Converter {
  const char* name;  // "portable", "avx2" or "avx512"
  // [codec][dtype]: n values. `stream` writes past the caches, for an output that will not fit them.
  void (*encode[3][3])(const void* in, void* out, int64_t n, bool stream);
  void (*decode[3][3])(const void* in, void* out, int64_t n, bool stream);
  // [dtype]: in [pixels, channels]; low, high and magnitude [channels] are updated with the least and the
  // greatest value and the greatest magnitude as bits, which tells NaN and infinity.
  void (*extent[3])(const void* in, int64_t pixels, int64_t channels, float* low, float* high,
                    uint32_t* magnitude);
  // [dtype]: in [pixels, channels], out [pixels, channels]; zero, inverse [channels].
  void (*quantise[3])(const void* in, uint8_t* out, int64_t pixels, int64_t channels, const float* zero,
                      const float* inverse);
  // [dtype]: in [pixels, channels], out [pixels, channels]; zero, scale [channels].
  void (*dequantise[3])(const uint8_t* in, void* out, int64_t pixels, int64_t channels, const float* zero,
                        const float* scale, bool stream);
};

extern const Converter kPortable;
#if defined(__x86_64__)
extern const Converter kAvx2;
extern const Converter kAvx512;
#endif

}  // namespace learndrop::cpu
