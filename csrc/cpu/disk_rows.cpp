// Threads of one call take rows in turn. They sleep in the kernel while the disk works, so that more of them
// than there are cores keep its queue filled; they are not those of cpu/threads.h, which a read ahead would
// take away from the training step.
#include "disk_rows.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <system_error>
#include <thread>
#include <vector>

namespace learndrop::cpu {
namespace {

// A thread costs about 20 us to start, in which a page-cached read moves 100 KB.
constexpr int64_t kSerialBytes = 256 << 10;

// Calls body(i) for i in [0, count) until one of them gives a nonzero error number, and gives that.
template <class Body>
int for_each_row(int64_t count, int64_t row_bytes, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  std::atomic<int> error{0};
  const auto work = [&] {
    for (int64_t i = next++; i < count && error == 0; i = next++) {
      if (const int failed = body(i)) error = failed;
    }
  };
  std::vector<std::thread> others;
  const int64_t wanted = count * row_bytes < kSerialBytes ? 1 : std::min<int64_t>(threads, count);
  try {
    for (int64_t i = 1; i < wanted; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {
    // The threads that there are do the work.
  }
  work();
  for (std::thread& other : others) other.join();
  return error;
}

// The bytes moved, fewer than asked for only at the end of the file; or -1 with errno.
template <class Move, class Pointer>
int64_t move_all(const Move& move, int descriptor, Pointer at, int64_t bytes, int64_t offset) {
  int64_t done = 0;
  while (done < bytes) {
    const ssize_t moved = move(descriptor, at + done, bytes - done, offset + done);
    if (moved == 0) break;
    if (moved < 0 && errno != EINTR) return -1;
    if (moved > 0) done += moved;
  }
  return done;
}

}  // namespace

int64_t read_rows(const RowFile& file, const int64_t* slots, int64_t count, void* into,
                  int64_t into_stride_bytes, const uint32_t* checksums, int threads) {
  std::atomic<int64_t> first_bad{count};
  const int error = for_each_row(count, file.row_bytes, threads, [&](int64_t i) {
    char* const row = static_cast<char*>(into) + i * into_stride_bytes;
    const int64_t got = move_all(pread, file.descriptor, row, file.row_bytes, file.offset(slots[i]));
    if (got < 0) return errno;
    if (got < file.row_bytes || crc32c(row, file.row_bytes) != checksums[slots[i]]) {
      for (int64_t known = first_bad; i < known && !first_bad.compare_exchange_weak(known, i);) {
      }
    }
    return 0;
  });
  if (error != 0) throw std::system_error(error, std::generic_category());
  return first_bad < count ? first_bad.load() : -1;
}

void write_rows(const RowFile& file, const int64_t* slots, int64_t count, const void* rows,
                int64_t rows_stride_bytes, uint32_t* checksums, int threads) {
  const int error = for_each_row(count, file.row_bytes, threads, [&](int64_t i) {
    const char* const row = static_cast<const char*>(rows) + i * rows_stride_bytes;
    checksums[slots[i]] = crc32c(row, file.row_bytes);
    const int64_t put = move_all(pwrite, file.descriptor, row, file.row_bytes, file.offset(slots[i]));
    return put < 0 ? errno : put < file.row_bytes ? EIO : 0;
  });
  if (error != 0) throw std::system_error(error, std::generic_category());
}

}  // namespace learndrop::cpu
