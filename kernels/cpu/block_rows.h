// The product with blocks for a panel of tokens; how a block is added is the instruction set's.
#pragma once
#include "panels.h"

namespace fxsparse {
namespace {

constexpr int64_t kNear = 1 << 14;  // bytes of a panel that stay in L1 while all rows of a block row read them

// sums [ROWS, NV * W] += the rows `row` onwards of the blocks begin <= e < end of one block row.
template <class Add, int NV, int ROWS>
inline void add_blocks(const float* panel, const Blocks& s, int64_t begin, int64_t end, int64_t row, float* sums) {
  V sum[ROWS][NV];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) sum[r][j] = load<V>(sums + (r * NV + j) * W);
  for (int64_t e = begin; e < end; e++) Add::template add<NV, ROWS>(panel, s, e, row, sum);
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) store(sums + (r * NV + j) * W, sum[r][j]);
}

// sums [rows, NV * W] += `rows` rows of a block row from its row `row` on.
template <class Add, int NV>
inline void add_block_row(const float* panel, const Blocks& s, int64_t block_row, int64_t row, int64_t rows, float* sums) {
  constexpr int kTogether = NV * 4 <= W ? 4 : 1;  // rows whose sums stay in registers, of which there are 2 W
  const int64_t near = kNear / (s.width / Add::kColumns * NV * W * 4), step = near > 0 ? near : 1;
  const int64_t end = s.start[block_row + 1];
  for (int64_t e = s.start[block_row]; e < end; e += step) {
    const int64_t last = least(e + step, end);
    int64_t r = 0;
    for (; r + kTogether <= rows; r += kTogether)
      add_blocks<Add, NV, kTogether>(panel, s, e, last, row + r, sums + r * NV * W);
    for (; r < rows; r++) add_blocks<Add, NV, 1>(panel, s, e, last, row + r, sums + r * NV * W);
  }
}

template <class Add, int NV>
void multiply_block_rows(const float* panel, const Blocks& s, int64_t begin, int64_t end, const Epilogue& epilogue,
                         const Matrix& dst, int64_t first) {
  constexpr int64_t kRows = 4 * W;
  alignas(64) float sums[kRows * NV * W];
  const bool streamed = is_streamed(dst, epilogue.rows);
  for (int64_t base = begin * s.height, stop = end * s.height; base < stop; base += kRows) {
    const int64_t last = least(base + kRows, stop);
    __builtin_memset(sums, 0, sizeof(sums));
    for (int64_t r = base, rows; r < last; r += rows) {
      rows = least(last - r, s.height - r % s.height);
      add_block_row<Add, NV>(panel, s, r / s.height, r % s.height, rows, sums + (r - base) * NV * W);
    }
    finish_rows<NV>(sums, base, last, epilogue, dst, first, streamed);
  }
  if (streamed) stream_end();
}

// For block rows begin <= b < end; see `Table::multiply_blocks`.
template <class Add>
void multiply_block_rows(const float* panel, int64_t vectors, const Blocks& s, int64_t begin, int64_t end,
                         const Epilogue& epilogue, const Matrix& dst, int64_t first) {
  switch (vectors) {
    case 1: return multiply_block_rows<Add, 1>(panel, s, begin, end, epilogue, dst, first);
    case 2: return multiply_block_rows<Add, 2>(panel, s, begin, end, epilogue, dst, first);
    case 4: return multiply_block_rows<Add, 4>(panel, s, begin, end, epilogue, dst, first);
    default: return multiply_block_rows<Add, 8>(panel, s, begin, end, epilogue, dst, first);
  }
}

}  // namespace
}  // namespace fxsparse
