// How csrc/cuda divides rows among blocks, for test_rows_split.py. It needs nvcc and no GPU.
#include <cstdio>

#include "cuda/row_ops.cuh"

using namespace learndrop::cuda;

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

}  // namespace

int main() {
  // 128 rows of 100,352 fp32 values on an H200, 132 SMs with 8 blocks each.
  const Split long_rows(128, 100352, 4, 132 * 8);
  expect(long_rows.slice == 768 && long_rows.slices == 33, "33 slices fill four waves");
  expect(long_rows.blocks() == 4 * 132 * 8, "the last wave is full");
  const Split short_rows(128, 1024, 8, 132 * 8);
  expect(short_rows.slices == 1 && short_rows.log_group == 5 && short_rows.blocks() == 16,
         "128 vectors of a row go to a warp, eight rows to a block");
  for (int64_t values = 1; values < 3000000; values = values * 5 / 4 + 1) {
    for (const int64_t batch : {1, 7, 128, 5000}) {
      const Split split(batch, values, 1, 132 * 6);
      const int64_t covered = int64_t{split.slice} * split.slices;
      expect(covered >= values && covered - split.slice < values, "slices cover a row, none in vain");
    }
  }
  return failures;
}
