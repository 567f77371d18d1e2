// append_rows and gather_rows: the contract of both backends. cpu/row_ops.cpp and cuda/row_ops_*.cu give the
// same bits.
//
// B rows in the batch, R rows in the cache, S bytes from one cache row to the next, [H, W, C] the values of
// one row, channels last. A row that is not an image is [1, D, 1]. Offsets and strides are in values; names
// that end in _bytes are in bytes.
//
// A cache row is a header, then H*W*C values of the codec. Only uint8 has a header: scale [C] fp32, zero
// [C] fp32, padded to 16 bytes.
//
//   fp32, bf16   the value, rounded to nearest even
//   fp16         the same, after clamping to +-65504 (infinities too)
//   uint8        for each row and channel: zero = min, scale = (max - min) / 255,
//                q = round((x - zero) * (255 / (max - min))), decoded as zero + scale * q. A range below
//                2^-100 is stored as the constant min. A channel with a NaN or an infinity, or whose range
//                overflows fp32, decodes to NaN throughout, so that bad values do not go unnoticed.
//
// gather_rows rounds to nearest even in the requested dtype, without clamping. NaN stays NaN: a copy (the
// same type in and out, or bf16 to fp32) keeps its bits, any other conversion gives the quiet NaN 0x7fc00000,
// 0x7fc0 or 0x7e00.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LEARNDROP_HOST_DEVICE __host__ __device__
#else
#define LEARNDROP_HOST_DEVICE
#endif

namespace learndrop {

// The first three codecs are the dtypes, in the same order.
enum class Dtype : int { fp32 = 0, bf16 = 1, fp16 = 2 };
enum class Codec : int { fp32 = 0, bf16 = 1, fp16 = 2, uint8 = 3 };

LEARNDROP_HOST_DEVICE constexpr int64_t value_bytes(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }
LEARNDROP_HOST_DEVICE constexpr int64_t value_bytes(Codec codec) {
  return codec == Codec::fp32 ? 4 : codec == Codec::uint8 ? 1 : 2;
}

struct RowShape {
  int64_t height, width, channels;
  LEARNDROP_HOST_DEVICE constexpr int64_t pixels() const { return height * width; }
  LEARNDROP_HOST_DEVICE constexpr int64_t values() const { return height * width * channels; }
};

LEARNDROP_HOST_DEVICE constexpr int64_t header_bytes(Codec codec, RowShape shape) {
  return codec == Codec::uint8 ? (8 * shape.channels + 15) / 16 * 16 : 0;
}
LEARNDROP_HOST_DEVICE constexpr int64_t row_bytes(Codec codec, RowShape shape) {
  return header_bytes(codec, shape) + shape.values() * value_bytes(codec);
}

// The most rows whose numbers travel with a launch instead of being copied to the device before it.
constexpr int64_t kHeldRows = 896;

constexpr float kSmallestRange = 0x1p-100f;
constexpr float kLargestFp16 = 65504.0f;

struct Append {
  void* cache;                 // [R, S] bytes
  int64_t cache_rows;          // R
  int64_t cache_stride_bytes;  // S
  Codec codec;
  const void* rows;  // [B, H, W, C] of dtype, through the strides
  Dtype dtype;
  int64_t batch;  // B
  RowShape shape;
  int64_t stride_b, stride_h, stride_w, stride_c;
  const int64_t* index;  // [B] cache rows without repeats
};

struct Gather {
  const void* cache;           // [R, S] bytes
  int64_t cache_rows;          // R
  int64_t cache_stride_bytes;  // S
  Codec codec;
  void* out;  // [B, H, W, C] of dtype, dense
  Dtype dtype;
  int64_t batch;  // B
  RowShape shape;
  const int64_t* index;  // [B] cache rows
  // CUDA: the index is in host memory, and B <= kHeldRows and R <= 2^31.
  bool index_on_host = false;
};

// Whether [H, W, C] is contiguous in memory, in this order.
constexpr bool is_dense(const Append& a) {
  return (a.shape.channels == 1 || a.stride_c == 1) &&
         (a.shape.width == 1 || a.stride_w == a.shape.channels) &&
         (a.shape.height == 1 || a.stride_h == a.shape.width * a.shape.channels);
}

namespace cpu {

// The index must have been checked: a bad one reads or writes memory outside the cache. Throws
// std::bad_alloc.
void append_rows(const Append& append, int threads);
void gather_rows(const Gather& gather, int threads);

}  // namespace cpu

namespace cuda {

// All pointers are to device memory. Enqueues one kernel on `stream` (a cudaStream_t) and allocates nothing,
// so it can be captured in a CUDA graph. An index outside [0, R) traps. Throws std::runtime_error if the
// launch fails.
void append_rows(const Append& append, int device, void* stream);
void gather_rows(const Gather& gather, int device, void* stream);

}  // namespace cuda
}  // namespace learndrop
