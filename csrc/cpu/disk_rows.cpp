#include "disk_rows.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/threads.h"

namespace learndrop::cpu {
namespace {

// Waking a thread costs about 20 us, in which a read from the page cache moves 100 KB.
constexpr int64_t kSerialBytes = 256 << 10;
// Eight threads waiting for rows of 64 KB have 512 KB in flight, five times what a disk of 1 GB/s and 100 us
// needs. Announcing such rows in advance would only fill the disk's queue and block threads that could copy
// and verify.
constexpr int64_t kLargeRow = 64 << 10;

// Calls body(i) for i in [0, count), started in this order.
template <class Body>
void for_each(int64_t count, int threads, const Body& body) {
  const auto each = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i);
  };
  parallel_for(count, 1, threads, each, Threads::files);
}

// One thread for each kSerialBytes, at least one and at most `threads`.
int threads_for(int64_t bytes, int threads) {
  return static_cast<int>(std::clamp<int64_t>(bytes / kSerialBytes, 1, threads));
}

int cores() {
  static const int count = std::max(1u, std::thread::hardware_concurrency());
  return count;
}

// Returns the bytes moved, fewer than requested only at the end of the file. Throws std::system_error.
template <class Move, class Pointer>
int64_t move_all(const Move& move, int descriptor, Pointer at, int64_t bytes, int64_t offset) {
  int64_t done = 0;
  while (done < bytes) {
    const ssize_t moved = move(descriptor, at + done, bytes - done, offset + done);
    if (moved == 0) break;
    if (moved < 0 && errno != EINTR) throw std::system_error(errno, std::generic_category());
    if (moved > 0) done += moved;
  }
  return done;
}

}  // namespace

int64_t read_rows(const RowFile& file, const int64_t* slots, int64_t count, void* into,
                  int64_t into_stride_bytes, const uint32_t* checksums, int64_t block_bytes, int threads) {
  std::atomic<int64_t> first_bad{count};
  const int working = threads_for(count * file.row_bytes, threads);
  const auto row = [&](int64_t i) { return static_cast<char*>(into) + i * into_stride_bytes; };
  const auto check = [&](int64_t i, int64_t got) {
    if (got == file.row_bytes && crc32c(row(i), got) == checksums[slots[i]]) return;
    for (int64_t known = first_bad; i < known && !first_bad.compare_exchange_weak(known, i);) {
    }
  };
  const auto read = [&](int64_t i) {
    check(i, move_all(pread, file.descriptor, row(i), file.row_bytes, file.offset(slots[i])));
  };
  if (file.row_bytes >= kLargeRow) {
    for_each(count, working, read);
    return first_bad < count ? first_bad.load() : -1;
  }
  // Copy the rows that are in the page cache, and announce all others before reading the first of them: the
  // disk then has a request for each missing row, not for each thread.
  std::atomic<int64_t> waiting{0};
  std::vector<int64_t> missing(count);
  for_each(count, std::min(working, cores()), [&](int64_t i) {
    const int64_t offset = file.offset(slots[i]);
    iovec part{.iov_base = row(i), .iov_len = static_cast<std::size_t>(file.row_bytes)};
    if (preadv2(file.descriptor, &part, 1, offset, RWF_NOWAIT) == file.row_bytes) {
      return check(i, file.row_bytes);
    }
    const int64_t begin = offset / block_bytes * block_bytes;
    const int64_t end = (offset + file.row_bytes + block_bytes - 1) / block_bytes * block_bytes;
    // Only advice: an error will appear when the row is read.
    posix_fadvise(file.descriptor, begin, end - begin, POSIX_FADV_WILLNEED);
    missing[waiting++] = i;
  });
  for_each(waiting, working, [&](int64_t k) { read(missing[k]); });
  return first_bad < count ? first_bad.load() : -1;
}

void write_rows(const RowFile& file, const int64_t* slots, int64_t count, const void* rows,
                int64_t rows_stride_bytes, uint32_t* checksums, int threads) {
  for_each(count, threads_for(count * file.row_bytes, threads), [&](int64_t i) {
    const char* const row = static_cast<const char*>(rows) + i * rows_stride_bytes;
    checksums[slots[i]] = crc32c(row, file.row_bytes);
    const int64_t put = move_all(pwrite, file.descriptor, row, file.row_bytes, file.offset(slots[i]));
    if (put < file.row_bytes) throw std::system_error(EIO, std::generic_category());
  });
}

}  // namespace learndrop::cpu
