// What the cases are made of: random numbers, memory of an exact size, values, memory layouts and indices.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cuda/row_ops.cuh"

using namespace learndrop;

const Codec kAllCodecs[] = {Codec::fp32, Codec::bf16, Codec::fp16, Codec::uint8};
const Dtype kAllDtypes[] = {Dtype::fp32, Dtype::bf16, Dtype::fp16};

struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  template <class T>
  T of(const std::vector<T>& list) {
    return list[below(list.size())];
  }
};

// Memory of just this size, `offset` bytes behind what malloc aligns.
class Exact {
 public:
  Exact(int64_t bytes, int64_t offset, int fill) : bytes_(bytes), offset_(offset), memory_(std::malloc(bytes + offset)) {
    std::memset(data(), fill, bytes);
  }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  ~Exact() { std::free(memory_); }
  unsigned char* data() const { return static_cast<unsigned char*>(memory_) + offset_; }
  int64_t size() const { return bytes_; }

 private:
  int64_t bytes_, offset_;
  void* memory_;
};

inline std::string name(RowShape s) {
  return "[" + std::to_string(s.height) + "," + std::to_string(s.width) + "," + std::to_string(s.channels) + "]";
}
const char* const kCodecs[] = {"fp32", "bf16", "fp16", "uint8"};
template <class T>
const char* name(T codec) {
  return kCodecs[static_cast<int>(codec)];
}

const uint32_t kSpecial[] = {0x00000000, 0x80000000, 0x00000001, 0x807fffff, 0x00800000, 0x7f800000, 0xff800000, 0x7fc00000,
                             0xffc00001, 0x7f800001, 0x7f7fffff, 0xff7fffff, 0x477fe000, 0x477fefff, 0x477ff000, 0xc77ff001,
                             0x47800000, 0x33000000, 0x33000001, 0x33800000, 0x38800000, 0x387fe000, 0x387ff000, 0x3f800000,
                             0x3f801000, 0x3f803000, 0x3f808000, 0x3f818000, 0x7f7f8000, 0x0d800000, 0x0d000000, 0x00008000};

enum class Values { normal, any_bits, special, small_range, constant };

inline float value_of(Random& random, Values values) {
  const uint32_t any = static_cast<uint32_t>(random.next());
  const float normal = (static_cast<int32_t>(any) * 0x1p-31f) * std::ldexp(1.0f, static_cast<int>(random.below(9)) - 4);
  switch (values) {
    case Values::any_bits:
      return cudashim::bits<float>(any);
    case Values::special:
      return random.below(8) ? normal : cudashim::bits<float>(kSpecial[random.below(std::size(kSpecial))]);
    case Values::small_range:
      return std::ldexp(normal, -104 - static_cast<int>(random.below(2)));
    case Values::constant:
      return -0.37f;
    default:
      return normal;
  }
}

// `count` values of a dtype. With any_bits, 16-bit values are any too: all NaNs, all subnormals.
inline void fill(void* memory, int64_t count, Dtype dtype, Values values, Random& random) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = value_of(random, values);
    uint16_t half = values == Values::any_bits      ? static_cast<uint16_t>(random.next())
                    : dtype == Dtype::fp16 ? __half_as_ushort(__float2half_rn(value))
                                           : __bfloat16_as_ushort(__float2bfloat16_rn(value));
    if (dtype == Dtype::fp32)
      static_cast<float*>(memory)[i] = value;
    else
      static_cast<uint16_t*>(memory)[i] = half;
  }
}

enum class Layout { dense, gaps, planes, padded_planes, sliced_channels, transposed, every_second, same_row, same_channel };
constexpr int kLayouts = 9;

struct Strides {
  int64_t b, h, w, c;
};
inline Strides strides_of(Layout layout, RowShape s) {
  const int64_t H = s.height, W = s.width, C = s.channels;
  switch (layout) {
    case Layout::gaps:
      return {H * W * C + 3, W * C, C, 1};
    case Layout::planes:
      return {H * W * C, W, 1, H * W};
    case Layout::padded_planes:
      return {C * (H * (W + 3) + 1) + 5, W + 3, 1, H * (W + 3) + 1};
    case Layout::sliced_channels:
      return {H * W * (C + 1), W * (C + 1), C + 1, 1};
    case Layout::transposed:
      return {H * W * C, C, H * C, 1};
    case Layout::every_second:
      return {4 * H * W * C, 4 * W * C, 2 * C, 2};
    case Layout::same_row:
      return {0, W * C, C, 1};
    case Layout::same_channel:
      return {H * W, W, 1, 0};
    default:
      return {H * W * C, W * C, C, 1};
  }
}

inline std::vector<int64_t> shuffled(int64_t rows, int64_t take, Random& random) {
  std::vector<int64_t> index(rows);
  std::iota(index.begin(), index.end(), 0);
  for (int64_t i = 0; i < take; ++i) std::swap(index[i], index[i + random.below(rows - i)]);
  index.resize(take);
  return index;
}
