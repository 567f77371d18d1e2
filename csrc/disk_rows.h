// Rows of a cache in a file: positioned reads and writes, with a CRC-32C for each row.
//
// Slots number the places of the rows. A group has `rows_per_group` places of `place_bytes`, and groups are
// `group_bytes` apart, so that no small row crosses a page and every large row begins one. A row takes
// `row_bytes` of its place.
#pragma once

#include <cstddef>
#include <cstdint>

namespace learndrop {

struct RowFile {
  int descriptor;
  int64_t rows_offset;     // offset of the first group in the file, bytes
  int64_t rows_per_group;  // places
  int64_t group_bytes;
  int64_t place_bytes;
  int64_t row_bytes;

  constexpr int64_t offset(int64_t slot) const {
    return rows_offset + slot / rows_per_group * group_bytes + slot % rows_per_group * place_bytes;
  }
};

namespace cpu {

// CRC-32C (Castagnoli) of `bytes` bytes, as in RFC 3720. crc32c_portable gives the same without SSE4.2.
uint32_t crc32c(const void* data, std::size_t bytes);
uint32_t crc32c_portable(const void* data, std::size_t bytes);

// Reads the rows at slots [count] to into + i * into_stride_bytes and compares each with checksums[slot].
// Rows below 64 KB that are not in the page cache are read from the disk in whole blocks of `block_bytes` (1:
// only the rows). Returns the first position i whose row differs or is beyond the end of the file, or -1.
// Throws std::system_error.
int64_t read_rows(const RowFile& file, const int64_t* slots, int64_t count, void* into,
                  int64_t into_stride_bytes, const uint32_t* checksums, int64_t block_bytes, int threads);

// Writes the rows at rows + i * rows_stride_bytes to slots [count], none of them twice, and sets
// checksums[slot]. Throws std::system_error; the contents of these slots are then undefined.
void write_rows(const RowFile& file, const int64_t* slots, int64_t count, const void* rows,
                int64_t rows_stride_bytes, uint32_t* checksums, int threads);

}  // namespace cpu
}  // namespace learndrop
