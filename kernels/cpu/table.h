// What each instruction set provides: the same functions, compiled once per set of flags.
#pragma once
#include <cstdint>

namespace fxsparse {

enum class Scalar { f32, bf16, i8 };  // i8: of values alone, which then have scales

// Rows of a sparse matrix: row r has entries start[r] .. start[r + 1], or fan_in of them where start is null.
// index holds int16 or int32 positions in the gathered dimension.
struct Sparse {
  const void* values;
  Scalar scalar;  // of the values
  const int32_t* start;
  const void* index;
  bool index16;
  int64_t fan_in;
  bool far = false;  // the panels that it gathers from do not fit L2
};

// The same rows over planes of pixels: entry e reads the pixels from offsets[e] on.
struct Shifted {
  const float* values;
  const int32_t* start;
  const int32_t* offsets;
};

// Row-major [tokens, features] in memory.
struct Matrix {
  void* data;
  Scalar scalar;
  int64_t tokens;
  int64_t features;
};

// The same weight for table lookups (formats/lookup.py says how): 64 rows are a group, and a group has bundles of 64
// entries, counts[group, window] of them for each window of columns, from bundle starts[group] on.
struct Lookup {
  const void* values;  // [bundles, 64]: one for each row
  Scalar scalar;
  const uint8_t* columns;  // [bundles, 64]
  const uint8_t* counts;
  const int32_t* starts;
  int64_t windows;
  int64_t rows;
};

// The same rows by stripes of kStripe columns (formats/striped.py says how): a tile is kChunk rows in a stripe, tile
// chunk * stripes + stripe has segments starts[2 * tile] .. starts[2 * tile + 2] of a row each, and entries from
// starts[2 * tile + 1] on.
struct Striped {
  const void* values;
  Scalar scalar;
  const uint8_t* columns;
  const int16_t* rows;
  const uint8_t* lengths;
  const int32_t* starts;
  int64_t stripes;
  int64_t out;
};

// Blocks of height x width entries: block row b has the blocks start[b] .. start[b + 1], each from column
// columns[block] * width on; the entries of a block lie column by column, or pair of columns by pair where paired: then
// those of a row and pair are next to each other.
struct Blocks {
  const void* values;
  Scalar scalar;
  const int32_t* start;
  const int32_t* columns;
  int64_t height, width;
  bool paired;
};

// Added to and applied to the rows of a product; bias may be null.  Row r of the product goes to column rows[r] of the
// output (and takes its bias), or r where rows is null.  residual has the output's layout and dtype, and may be null.
// scales[r] is what the sum of row r is multiplied by before all else; null where that is 1.
struct Epilogue {
  const float* bias;
  int64_t activation;
  const int32_t* rows;
  const void* residual = nullptr;
  const float* scales = nullptr;
};

struct Table {
  int64_t lanes;         // floats in a vector
  int64_t most_vectors;  // of a panel: 1, 2, 4 or 8, or 3 of multiply_striped
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
  // multiply for groups begin <= g < end; the panel has a row of zeros at position `features`.
  void (*multiply_lookup)(const float* panel, int64_t features, int64_t vectors, const Lookup&, int64_t begin,
                          int64_t end, const Epilogue&, const Matrix& dst, int64_t first);
  // multiply for chunks begin <= c < end.
  void (*multiply_striped)(const float* panel, int64_t vectors, const Striped&, int64_t begin, int64_t end,
                           const Epilogue&, const Matrix& dst, int64_t first);
  // multiply for block rows begin <= b < end.
  void (*multiply_blocks)(const float* panel, int64_t vectors, const Blocks&, int64_t begin, int64_t end,
                          const Epilogue&, const Matrix& dst, int64_t first);
  // dst[:, rows[i]] = activation(bias + residual) for i < count.
  void (*fill)(const Epilogue&, const int32_t* rows, int64_t count, const Matrix& dst);
  // y[r - begin, t] = bias[r] + sum of values * panel[offset + t] for rows begin <= r < end and positions t < count, and
  // up to the next whole vector; rows of y lie `stride` apart, and bias may be null.
  void (*add_shifted)(const float* panel, const Shifted&, int64_t begin, int64_t end, const float* bias, int64_t count,
                      float* y, int64_t stride);
  // sums[e] += dot(grads[r], panel[offset ...]) over the same positions, for every entry e of rows begin <= r < end.
  void (*dot_shifted)(const float* grads, int64_t stride, const float* panel, const Shifted&, int64_t begin,
                      int64_t end, int64_t count, float* sums);
  // What a core can do at most; see roof.h.
  int64_t (*multiply_adds)(int64_t steps, float* numbers);
  float (*read_all)(const float* data, int64_t count);
};

constexpr int64_t kFewTokens = 2;  // from 3 on, a panel of one vector is faster than gathering for each

constexpr int64_t kStripe = 128;  // columns: 32 KiB of a panel of 64 tokens
constexpr int64_t kChunk = 512;   // rows whose sums for 64 tokens take 128 KiB

constexpr int64_t kGroup = 64;        // rows of a group in Lookup
constexpr int64_t kWindow = 64;       // columns from one window to the next
constexpr int64_t kLookupTokens = 12;  // up to here looking up for each token is faster than a panel

// Bytes between the four planes that `split` writes for an x of `windows` windows.
constexpr int64_t plane_bytes(int64_t windows) { return (windows + 2) * kWindow; }

// Lookups with AVX-512 VBMI.  planes[j] = byte j of every fp32 element of the token of x, zeros past the last.
void split(const Matrix& x, int64_t token, int64_t windows, uint8_t* planes);
// dst = activation(product + bias) for groups begin <= g < end; `planes` are those of every token of dst in turn.
void look_up(const uint8_t* planes, const Lookup&, int64_t begin, int64_t end, const Epilogue&, const Matrix& dst);

// Table::multiply_blocks with AVX-512 BF16, for blocks that are paired; an element of the panel is two columns of x.
void multiply_block_pairs(const float* panel, int64_t vectors, const Blocks&, int64_t begin, int64_t end,
                          const Epilogue&, const Matrix& dst, int64_t first);

const Table& table_portable();
const Table& table_avx2();
const Table& table_avx512();

}  // namespace fxsparse
