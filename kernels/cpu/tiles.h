// Sparse convolutions for inference, as products of sparse rows with tiles of pixels: what each instruction set provides.
#pragma once
#include "table.h"

namespace fxsparse {

constexpr int64_t kMostTileVectors = 14;  // whose sums stay in registers, with one for the value and one to spare

// One tap of a kernel: the pixel that output position p reads lies at p + shift of plane `plane` of its channel, where
// bit p of both masks is set; elsewhere it is padding.
struct Tap {
  int64_t plane, shift;
  const uint64_t *rows, *columns;
};

// Planes of pixels in fp32, `planes` of them a channel.
struct Planes {
  const float* data;
  int64_t channel, plane;  // floats from one to the next
};

// Rows of the weight in one block of columns; row r has the entries start[r] .. start[r + 1].
struct BlockRows {
  const float* values;
  const uint16_t* columns;
  const int32_t* start;
};

// Positions of a tile that lie in one run of the output: length of them from `position` on, to `at` of a row's own place.
struct Run {
  int64_t position, length, at;
};

// Where the results of a tile go: y[at + row * row_stride], in its dtype.
struct Results {
  void* y;
  const void* residual;  // where y lies in y; null for none
  Scalar scalar;
  int64_t row_stride;
  const Run* runs;
  int64_t count;
  const float* bias;  // or null
  int64_t activation;
};

// A channel's own filter: position p reads pixel p + offsets[t] through tap t, of a plane that has its padding.
struct OwnTaps {
  const int64_t* offsets;
  const float* values;
  int64_t count;
  float bias;
  int64_t activation;
};

// Positions in kernels.library.ACTIVATIONS.
constexpr int64_t kRelu = 1, kRelu6 = 5;

struct TileTable {
  int64_t lanes;
  // panel[column - begin, i] = what column = channel * taps + tap reads at position first + i, for i < vectors * lanes;
  // `masks` is scratch of taps * vectors.
  void (*fill)(const Planes&, const Tap* taps, int64_t count, int64_t begin, int64_t end, int64_t first, int64_t vectors,
               uint16_t* masks, float* panel);
  // sums[r - begin] (+)= values * panel rows for rows begin <= r < end, which lie `stride` floats apart; from zero where
  // `from_zero`.  Results take them where `results` is not null, with bias, residual and activation; else they stay.
  void (*multiply)(const float* panel, int64_t stride, int64_t vectors, const BlockRows&, int64_t begin, int64_t end,
                   float* sums, bool from_zero, const Results* results);
  // to[r * pitch + i] = element at + r * row_step + i * step of src, in fp32, for r < rows and i < count.
  void (*take)(const void* src, Scalar scalar, int64_t at, int64_t rows, int64_t row_step, int64_t count, int64_t step,
               int64_t pitch, float* to);
  // y[p] = activation(bias + sum of the taps at p) for p < count, and up to the next whole vector.
  void (*filter)(const float* pixels, const OwnTaps& taps, int64_t count, float* y);
  // Element at + r * count + i of y = from[r * pitch + i], in y's dtype; `from` is read in whole vectors.
  void (*give)(const float* from, int64_t pitch, int64_t rows, int64_t count, void* y, Scalar scalar, int64_t at);
  // The largest of so many columns, 0 of none.
  uint16_t (*most)(const uint16_t* columns, int64_t count);
};

const TileTable& tiles_portable();
const TileTable& tiles_avx2();
const TileTable& tiles_avx512();

}  // namespace fxsparse
