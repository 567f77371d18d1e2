#include "host_rows.h"

#include "cuda/row_ops.cuh"

namespace learndrop::cuda {
namespace {

// PCIe 5 x16 at 55 GB/s and about 1.5 us needs 83 KB in flight; 16 blocks of 256 threads with four loads of
// 16 bytes have 262 KB, and leave the other SMs to the training step. An H100 reads 42 GB/s this way, and 50
// in a single copy; 32 blocks are no faster.
constexpr int kHostBlocks = 16;
constexpr int kHostVectors = kThreads * kUnroll;

struct HostGather {
  const unsigned char* source;
  int64_t source_stride_bytes;
  RowIndex index;
  int64_t count;
  unsigned char* into;
  int64_t into_stride_bytes;
  Divider vectors;  // vectors of 16 bytes in a row
  uint32_t rows;    // rows that a block reads at once
};
static_assert(sizeof(HostGather) <= kMostParameters);

// A block reads a few rows at a time, with neighbouring threads reading whole vectors. A row of 1 KB has 64
// vectors: 16 blocks with one row each would have 16 KB in flight, with 16 rows each they have 262 KB.
//
// Moves row_bytes per row over the bus, at 74 to 84 % of the rate of a pinned copy on an H100.
__global__ void __launch_bounds__(kThreads) gather_host_kernel(const __grid_constant__ HostGather g) {
  for (int64_t first = int64_t{blockIdx.x} * g.rows; first < g.count; first += int64_t{gridDim.x} * g.rows) {
    const auto rows = static_cast<uint32_t>(g.count - first < g.rows ? g.count - first : g.rows);
    const Share share{.b = first, .first = threadIdx.x, .last = rows * g.vectors.divisor, .step = kThreads};
    for_each_vector(
        share,
        [&](uint32_t at) {
          const uint32_t row = g.vectors.divide(at), vector = at - row * g.vectors.divisor;
          const unsigned char* from = g.source + g.index[first + row] * g.source_stride_bytes;
          return reinterpret_cast<const uint4*>(from)[vector];
        },
        [&](uint32_t at, const uint4& pack) {
          const uint32_t row = g.vectors.divide(at), vector = at - row * g.vectors.divisor;
          reinterpret_cast<uint4*>(g.into + (first + row) * g.into_stride_bytes)[vector] = pack;
        });
  }
}

const void* source_of(const HostRows& rows, int64_t i) {
  return static_cast<const char*>(rows.source) + rows.index[i] * rows.source_stride_bytes;
}

void* target_of(const HostRows& rows, int64_t i) {
  return static_cast<char*>(rows.into) + i * rows.into_stride_bytes;
}

// A call that copies several rows takes the host about 0.5 us per row and 4 us, and its copies begin when it
// returns. On an H200, 128 rows of 196 KB reach 89 % of the rate of one copy in one call, 95 % in calls of 32
// rows, 94 % of 16, 91 % of 8, and 57 % with a call of their own for each.
constexpr int64_t kRowsOfCall = 32;

// Copies the rows with calls for several of them. Returns false if the driver has no such call, and for the
// default stream, which does not support it. (CUDA 12.8 and 12.9 have it with other arguments; rows are
// copied one by one there.)
bool copy_batch(const HostRows& rows, cudaStream_t stream, const DeviceGuard& guard) {
#if CUDART_VERSION >= 13000
  if (stream == nullptr) return false;
  const void* sources[kRowsOfCall];
  void* targets[kRowsOfCall];
  std::size_t sizes[kRowsOfCall];
  std::fill_n(sizes, kRowsOfCall, static_cast<std::size_t>(rows.row_bytes));
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  std::size_t first_attribute = 0;
  for (int64_t begin = 0; begin < rows.count; begin += kRowsOfCall) {
    const int64_t count = std::min(kRowsOfCall, rows.count - begin);
    for (int64_t i = 0; i < count; ++i) {
      sources[i] = source_of(rows, begin + i);
      targets[i] = target_of(rows, begin + i);
    }
    const cudaError_t error =
        cudaMemcpyBatchAsync(targets, sources, sizes, count, &attributes, &first_attribute, 1, stream);
    if (error == cudaErrorNotSupported || error == cudaErrorCallRequiresNewerDriver) {
      cudaGetLastError();
      return false;
    }
    guard.check(error);
  }
  return true;
#else
  static_cast<void>(rows), static_cast<void>(stream), static_cast<void>(guard);
  return false;
#endif
}

}  // namespace

void pin(void* address, int64_t bytes, int device) {
  const DeviceGuard guard("pin", device);
  guard.check(cudaHostRegister(address, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped));
}

void unpin(void* address) {
  if (cudaHostUnregister(address) != cudaSuccess) cudaGetLastError();
}

void copy_host_rows(const HostRows& rows, int device, void* stream) {
  if (rows.count == 0) return;
  const DeviceGuard guard("copy_host_rows", device);
  const auto to = static_cast<cudaStream_t>(stream);
  if (copy_batch(rows, to, guard)) return;
  for (int64_t i = 0; i < rows.count; ++i) {
    guard.check(
        cudaMemcpyAsync(target_of(rows, i), source_of(rows, i), rows.row_bytes, cudaMemcpyHostToDevice, to));
  }
}

void gather_host_rows(const HostRows& rows, int device, void* stream) {
  if (rows.count == 0) return;
  const DeviceGuard guard("gather_host_rows", device);
  void* source = nullptr;
  guard.check(cudaHostGetDevicePointer(&source, const_cast<void*>(rows.source), 0));
  const int64_t vectors = rows.row_bytes / 16;
  const int64_t fitting = std::max<int64_t>(1, kHostVectors / vectors);
  const int64_t together = std::min(fitting, ceil_div<int64_t>(rows.count, kHostBlocks));
  const HostGather gather{.source = static_cast<const unsigned char*>(source),
                          .source_stride_bytes = rows.source_stride_bytes,
                          .index = RowIndex(rows.index, rows.count, rows.index_on_host),
                          .count = rows.count,
                          .into = static_cast<unsigned char*>(rows.into),
                          .into_stride_bytes = rows.into_stride_bytes,
                          .vectors = Divider(vectors),
                          .rows = static_cast<uint32_t>(together)};
  const int64_t pieces = ceil_div(rows.count, together);
  const auto blocks = static_cast<unsigned int>(std::min<int64_t>(pieces, kHostBlocks));
  gather_host_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(gather);
  guard.check(cudaGetLastError());
}

}  // namespace learndrop::cuda
