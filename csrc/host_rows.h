// Rows in pinned host memory, copied to a GPU by its copy engines or by a kernel that reads host memory.
#pragma once

#include <cstdint>

namespace learndrop {

// Row index[i] is copied to into + i * into_stride_bytes. All sizes are multiples of 16 bytes.
struct HostRows {
  const void* source;  // [R, source_stride_bytes], pinned by `pin`
  int64_t source_stride_bytes;
  const int64_t* index;  // [count], checked; in host memory for copy_host_rows
  int64_t count;
  void* into;  // [count, into_stride_bytes] on the device
  int64_t into_stride_bytes;
  int64_t row_bytes;
  // gather_host_rows: the index is in host memory, and count <= kHeldRows (row_ops.h) and R <= 2^31.
  bool index_on_host = false;
};

namespace cuda {

// Pins host memory for all GPUs, and unpins it. pin throws std::runtime_error.
void pin(void* address, int64_t bytes, int device);
void unpin(void* address);

// Both enqueue on `stream` (a cudaStream_t) and throw std::runtime_error if that fails. copy_host_rows has
// read the index when it returns.
void copy_host_rows(const HostRows& rows, int device, void* stream);
void gather_host_rows(const HostRows& rows, int device, void* stream);

}  // namespace cuda
}  // namespace learndrop
