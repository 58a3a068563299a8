// What each instruction set provides: the same functions, compiled once per set of flags.
#pragma once
#include <cstdint>

namespace fxsparse {

enum class Scalar { f32, bf16 };

// Rows of a sparse matrix: row r has entries start[r] .. start[r + 1], or fan_in of them where start is null.
// values is fp32; index holds int16 or int32 positions in the gathered dimension.
struct Sparse {
  const float* values;
  const int32_t* start;
  const void* index;
  bool index16;
  int64_t fan_in;
};

// Row-major [tokens, features] in memory.
struct Matrix {
  void* data;
  Scalar scalar;
  int64_t tokens;
  int64_t features;
};

// Added to and applied to the rows of a product; bias may be null.
struct Epilogue {
  const float* bias;
  int64_t activation;
};

struct Table {
  int64_t lanes;         // floats in a vector
  int64_t most_vectors;  // of a panel: 1, 2, 4 or 8
  // dst [features, vectors * lanes] = the tokens `first` onwards of src, transposed, in fp32, zeros past the last.
  void (*transpose)(const Matrix& src, int64_t first, int64_t vectors, float* dst);
  // dst[first + t, r] = activation(sum of values * panel rows + bias) for rows begin <= r < end.
  void (*multiply)(const float* panel, int64_t vectors, const Sparse&, int64_t begin, int64_t end, const Epilogue&,
                   const Matrix& dst, int64_t first);
  // out[e] += dot(rows_panel[r], gathered_panel[index[e]]) for every entry e of rows begin <= r < end.
  void (*sample)(const float* rows_panel, const float* gathered_panel, int64_t vectors, const Sparse&, int64_t begin,
                 int64_t end, float* out);
  // The product for 1 or 2 tokens, x fp32 [dst.tokens, width] as it lies in memory; false at a
  // row with an entry past the width (its x is not read).
  bool (*multiply_few)(const float* x, int64_t width, const Sparse&, int64_t begin, int64_t end, const Epilogue&,
                       const Matrix& dst);
  // sums[r] += the sum of panel row r, for rows begin <= r < end.
  void (*add_rows)(const float* panel, int64_t vectors, int64_t begin, int64_t end, float* sums);
};

constexpr int64_t kFewTokens = 2;  // from 3 on, a panel of one vector is faster than gathering for each

const Table& table_portable();
const Table& table_avx2();
const Table& table_avx512();

}  // namespace fxsparse
