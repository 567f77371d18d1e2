// append_rows and gather_rows on the CPU. A piece of work is a few rows, or a slice of one row.
#include "row_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/simd.h"
#include "cpu/threads.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace learndrop::cpu {
namespace {

// Waking a thread costs 10 to 40 us, in which one core moves 0.2 to 0.6 MB at 16 GB/s. Calls that move fewer
// bytes stay on the calling thread.
constexpr int64_t kSerialBytes = 1 << 20;
// Bytes of a piece of work. At 16 GB/s it takes 2 us, twenty times the 0.1 us of claiming it.
constexpr int64_t kPieceBytes = 32 << 10;
// A strided image is gathered in blocks of 64 pixels and 64 channels: 16 KB of fp32, half of an L1 cache,
// read in whole cache lines if pixels are dense (NCHW).
constexpr int64_t kBlock = 64;
// Bytes of the next row that are asked for while a row is decoded. Rows are at random places, where the
// CPU's own prefetch starts anew: without it each row waits for its first lines, 0.1 us of the 0.2 us that
// decoding 2 KB takes.
constexpr int64_t kPrefetchBytes = 2 << 10;
// Channels that do not fill a vector are repeated 16 times, to fill the 16 lanes of AVX-512.
constexpr int64_t kLanes = 16;
constexpr int64_t kRepeatBelow = 64;

// Rounds to nearest and keeps subnormals, whatever the settings of the calling thread
// (torch.set_flush_denormal).
class DefaultRounding {
#if defined(__x86_64__)
 public:
  DefaultRounding() { _mm_setcsr(0x1f80); }
  ~DefaultRounding() { _mm_setcsr(saved_); }
  DefaultRounding(const DefaultRounding&) = delete;
  DefaultRounding& operator=(const DefaultRounding&) = delete;

 private:
  unsigned int saved_ = _mm_getcsr();
#endif
};

// How a call is divided: each row into `slices` of `length` pixels.
struct Plan {
  int64_t slices, length, grain;
  int threads;
};

Plan plan(int64_t batch, int64_t units, int64_t unit_bytes, int threads, bool divisible) {
  const int64_t row_work = units * unit_bytes;
  Plan p{.slices = 1, .length = units, .grain = 1, .threads = batch * row_work < kSerialBytes ? 1 : threads};
  if (divisible && p.threads > 1 && batch < 4 * p.threads) {
    const int64_t wanted = (4 * p.threads + batch - 1) / batch;
    const int64_t useful = std::max<int64_t>(1, row_work / kPieceBytes);
    p.length = std::max<int64_t>(1, (units + std::min(wanted, useful) - 1) / std::min(wanted, useful));
    p.slices = (units + p.length - 1) / p.length;
  }
  p.grain = std::max<int64_t>(1, kPieceBytes / std::max<int64_t>(1, p.length * unit_bytes));
  return p;
}

// Calls slice(b, first, last), with first and last in units, for each slice of each row.
template <class Slice>
void for_each_slice(int64_t batch, int64_t units, const Plan& p, const Slice& slice) {
  parallel_for(batch * p.slices, p.grain, p.threads, [&](int64_t first, int64_t last) {
    [[maybe_unused]] const DefaultRounding rounding;
    for (int64_t item = first; item < last; ++item) {
      const int64_t start = item % p.slices * p.length;
      slice(item / p.slices, start, std::min(start + p.length, units));
    }
  });
}

// How often the channels are repeated to fill vectors.
int64_t repeats(int64_t channels) { return channels % kLanes != 0 && channels < kRepeatBelow ? kLanes : 1; }

// The per-channel arrays of a uint8 row, repeated.
class ChannelTable {
 public:
  explicit ChannelTable(int64_t channels)
      : channels_(channels), width_(channels * repeats(channels)), first_(width_), second_(width_) {}

  float* first() { return first_.data(); }
  float* second() { return second_.data(); }
  int64_t width() const { return width_; }

  void repeat() {
    for (int64_t c = channels_; c < width_; ++c) {
      first_[c] = first_[c - channels_];
      second_[c] = second_[c - channels_];
    }
  }

  // Calls part(first pixel, pixels, channels) for the part that fills vectors and for the remaining pixels.
  template <class Part>
  void for_each_part(int64_t pixels, const Part& part) const {
    const int64_t times = width_ / channels_;
    const int64_t whole = pixels / times;
    if (whole > 0) part(0, whole, width_);
    if (whole * times < pixels) part(whole * times, pixels - whole * times, channels_);
  }

 private:
  int64_t channels_, width_;
  std::vector<float> first_, second_;
};

// The dense values [pixels, channels] of a part of a row.
struct Block {
  int64_t pixel, pixels, channel, channels;
  const void* values;
};

// Gathers a block of a strided row: out [pixels, channels] values of T.
template <class T>
void collect(const Append& a, const T* row, const Block& block, T* out) {
  // A plane without gaps is a single line.
  const bool plane = a.stride_h == a.shape.width * a.stride_w || a.shape.height == 1;
  const int64_t width = plane ? a.shape.pixels() : a.shape.width;
  const int64_t last = block.pixel + block.pixels;
  for (int64_t first = block.pixel; first < last;) {
    const int64_t y = first / width, x = first % width;
    const int64_t count = std::min(width - x, last - first);
    const T* line = row + y * a.stride_h + x * a.stride_w + block.channel * a.stride_c;
    for (int64_t c = 0; c < block.channels; ++c) {
      for (int64_t i = 0; i < count; ++i) out[i * block.channels + c] = line[i * a.stride_w + c * a.stride_c];
    }
    first += count;
    out += count * block.channels;
  }
}

// Calls encode(block) for blocks that cover pixels [first, last) of row b; a single block of all channels if
// they are dense.
template <class Encode>
void for_each_block(const Append& a, int64_t b, int64_t first, int64_t last, const Encode& encode) {
  const int64_t size = value_bytes(a.dtype), channels = a.shape.channels;
  const auto* row = static_cast<const unsigned char*>(a.rows) + b * a.stride_b * size;
  if (is_dense(a)) {
    encode(Block{.pixel = first,
                 .pixels = last - first,
                 .channel = 0,
                 .channels = channels,
                 .values = row + first * channels * size});
    return;
  }
  uint32_t scratch[kBlock * kBlock];
  for (int64_t pixel = first; pixel < last; pixel += kBlock) {
    for (int64_t channel = 0; channel < channels; channel += kBlock) {
      const Block block{.pixel = pixel,
                        .pixels = std::min(kBlock, last - pixel),
                        .channel = channel,
                        .channels = std::min(kBlock, channels - channel),
                        .values = scratch};
      if (size == 4) {
        collect(a, reinterpret_cast<const uint32_t*>(row), block, scratch);
      } else {
        collect(a, reinterpret_cast<const uint16_t*>(row), block, reinterpret_cast<uint16_t*>(scratch));
      }
      encode(block);
    }
  }
}

// Calls write(values, pixel, pixels, channel, channels) for the parts of a block that are contiguous in a
// row.
template <class Write>
void for_each_run(const Append& a, const Block& block, const Write& write) {
  if (block.channels == a.shape.channels) {
    write(block.values, block.pixel, block.pixels, block.channel, block.channels);
    return;
  }
  const auto* values = static_cast<const unsigned char*>(block.values);
  for (int64_t i = 0; i < block.pixels; ++i) {
    write(values + i * block.channels * value_bytes(a.dtype), block.pixel + i, int64_t{1}, block.channel,
          block.channels);
  }
}

// Computes from the extent of each channel zero and scale (for the header) and inverse (for the encoder).
void fit(const float* low, const float* high, const uint32_t* magnitude, int64_t channels, float* zero,
         float* scale, float* inverse) {
  constexpr uint32_t infinity = 0x7f800000;
  for (int64_t c = 0; c < channels; ++c) {
    const float range = high[c] - low[c];
    const bool finite = magnitude[c] < infinity && range <= std::numeric_limits<float>::max();
    const bool constant = finite && range < kSmallestRange;
    // The addition turns -0 into 0, because which of the two is the minimum depends on the order of search.
    zero[c] = finite ? low[c] + 0.0f : 0.0f;
    scale[c] = !finite ? std::numeric_limits<float>::quiet_NaN() : constant ? 0.0f : range / 255.0f;
    inverse[c] = !finite || constant ? 0.0f : 255.0f / range;
  }
}

void append_uint8(const Append& a, int64_t b, unsigned char* row) {
  const Converter& convert = converter();
  const int dtype = static_cast<int>(a.dtype);
  const int64_t channels = a.shape.channels, size = value_bytes(a.dtype);
  ChannelTable extent(channels);
  const int64_t width = extent.width();
  std::vector<uint32_t> magnitude(width, 0);
  std::fill_n(extent.first(), width, std::numeric_limits<float>::infinity());
  std::fill_n(extent.second(), width, -std::numeric_limits<float>::infinity());
  for_each_block(a, b, 0, a.shape.pixels(), [&](const Block& block) {
    const auto* values = static_cast<const unsigned char*>(block.values);
    const int64_t c = block.channel;
    if (block.channels != channels) {
      convert.extent[dtype](values, block.pixels, block.channels, extent.first() + c, extent.second() + c,
                            &magnitude[c]);
      return;
    }
    extent.for_each_part(block.pixels, [&](int64_t first, int64_t count, int64_t across) {
      convert.extent[dtype](values + first * channels * size, count, across, extent.first(), extent.second(),
                            magnitude.data());
    });
  });
  for (int64_t c = channels; c < width; ++c) {
    const int64_t own = c % channels;
    extent.first()[own] = std::min(extent.first()[own], extent.first()[c]);
    extent.second()[own] = std::max(extent.second()[own], extent.second()[c]);
    magnitude[own] = std::max(magnitude[own], magnitude[c]);
  }
  float* const scale = reinterpret_cast<float*>(row);
  float* const zero = scale + channels;
  ChannelTable steps(channels);
  fit(extent.first(), extent.second(), magnitude.data(), channels, zero, scale, steps.second());
  std::copy_n(zero, channels, steps.first());
  steps.repeat();
  uint8_t* const payload = row + header_bytes(a.codec, a.shape);
  std::memset(zero + channels, 0, payload - reinterpret_cast<unsigned char*>(zero + channels));
  for_each_block(a, b, 0, a.shape.pixels(), [&](const Block& block) {
    for_each_run(a, block, [&](const void* run, int64_t pixel, int64_t pixels, int64_t c, int64_t across) {
      const auto* values = static_cast<const unsigned char*>(run);
      if (across != channels) {
        convert.quantise[dtype](values, payload + pixel * channels + c, 1, across, steps.first() + c,
                                steps.second() + c);
        return;
      }
      steps.for_each_part(pixels, [&](int64_t first, int64_t count, int64_t repeated) {
        convert.quantise[dtype](values + first * channels * size, payload + (pixel + first) * channels, count,
                                repeated, steps.first(), steps.second());
      });
    });
  });
}

const unsigned char* row_of(const Gather& g, int64_t b) {
  return static_cast<const unsigned char*>(g.cache) + g.index[b] * g.cache_stride_bytes;
}

// Decodes pixels [first, first + pixels) of row b to `out`.
void decode_pixels(const Gather& g, int64_t b, int64_t first, int64_t pixels, unsigned char* out) {
  const unsigned char* const row = row_of(g, b);
  const int64_t channels = g.shape.channels;
  const unsigned char* const in =
      row + header_bytes(g.codec, g.shape) + first * channels * value_bytes(g.codec);
  const Converter& convert = converter();
  const int dtype = static_cast<int>(g.dtype);
  if (g.codec != Codec::uint8) {
    convert.decode[static_cast<int>(g.codec)][dtype](in, out, pixels * channels);
    return;
  }
  const float* const scale = reinterpret_cast<const float*>(row);
  ChannelTable table(channels);
  std::copy_n(scale + channels, channels, table.first());
  std::copy_n(scale, channels, table.second());
  table.repeat();
  table.for_each_part(pixels, [&](int64_t start, int64_t count, int64_t across) {
    convert.dequantise[dtype](in + start * channels, out + start * channels * value_bytes(g.dtype), count,
                              across, table.first(), table.second());
  });
}

}  // namespace

void append_rows(const Append& a, int threads) {
  if (a.batch == 0 || a.shape.values() == 0) return;
  const int64_t pixels = a.shape.pixels(), size = value_bytes(a.codec);
  const int64_t unit_bytes = a.shape.channels * (value_bytes(a.dtype) + size);
  const Plan p = plan(a.batch, pixels, unit_bytes, threads, a.codec != Codec::uint8);
  auto* const cache = static_cast<unsigned char*>(a.cache);
  for_each_slice(a.batch, pixels, p, [&](int64_t b, int64_t first, int64_t last) {
    unsigned char* const row = cache + a.index[b] * a.cache_stride_bytes;
    if (a.codec == Codec::uint8) {
      append_uint8(a, b, row);
      return;
    }
    const auto encode = converter().encode[static_cast<int>(a.codec)][static_cast<int>(a.dtype)];
    for_each_block(a, b, first, last, [&](const Block& block) {
      for_each_run(a, block,
                   [&](const void* values, int64_t pixel, int64_t count, int64_t c, int64_t across) {
                     encode(values, row + (pixel * a.shape.channels + c) * size, count * across);
                   });
    });
  });
}

void gather_rows(const Gather& g, int threads) {
  if (g.batch == 0 || g.shape.values() == 0) return;
  const int64_t pixels = g.shape.pixels();
  const int64_t pixel_bytes = g.shape.channels * value_bytes(g.dtype);
  const int64_t unit_bytes = pixel_bytes + g.shape.channels * value_bytes(g.codec);
  const Plan p = plan(g.batch, pixels, unit_bytes, threads, true);
  auto* const out = static_cast<unsigned char*>(g.out);
  const int64_t ahead = std::min(kPrefetchBytes, row_bytes(g.codec, g.shape));
  for_each_slice(g.batch, pixels, p, [&](int64_t b, int64_t first, int64_t last) {
    if (last == pixels && b + 1 < g.batch) {
      for (int64_t at = 0; at < ahead; at += 64) __builtin_prefetch(row_of(g, b + 1) + at);
    }
    decode_pixels(g, b, first, last - first, out + (b * pixels + first) * pixel_bytes);
  });
}

}  // namespace learndrop::cpu
