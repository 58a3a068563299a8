// Images whose lanes are samples, or parts of samples: [units, channels, height, width, 16], a vector of 16 for every pixel.
// What each instruction set provides for them.
#pragma once
#include <cstdint>

namespace fxsparse {

constexpr int64_t kLine = 16;        // floats of a pixel

// Where a pixel that a tile reads lies in a plane of its channel, and which lane of it each lane takes.
struct LineSource {
  int64_t at;      // floats from the plane's begin
  int32_t lanes;  // permutation: 0 takes every lane as it is
};

// Lane i takes lane sources[i], or the padding where that is negative.
struct Permutation {
  int32_t sources[kLine];
};

// The lines that each channel's part of a panel has.
struct LinePlan {
  const LineSource* lines;
  int64_t count;
  const Permutation* permutations;
  float padding;
};

// Output pixels in up to most_rows rows, and where they read: pixel j of row i takes what an entry reads from panel +
// its place + i * pitch + j * a line, in bytes.  What is read after this tile comes into the caches meanwhile: `pixels`
// lines of each of some channels `plane` floats apart.
struct LineTile {
  const float* panel;
  int64_t rows, pixels, pitch;
  const float* ahead;  // null for nothing
  int64_t channels, plane;
};

// Rows of the weight in one block of columns; row r has the entries start[r] .. start[r + 1].
struct LineRows {
  const float* values;
  const uint32_t* places;
  const int32_t* start;
};

// Rows of a dense weight, `stride` floats apart; entry e of each reads its place.
struct DenseRows {
  const float* values;
  int64_t stride;
  const uint32_t* places;
  int64_t count;
};

// Where the results of a tile go: pixel (i, j) of row r at y + r * row_stride + i * pitch + j * kLine.
struct LineResults {
  float* y;
  const float* residual;  // where y lies in y; null for none
  int64_t row_stride, pitch;
  int64_t activation;
};

struct LaneTable {
  int64_t most_pixels, most_rows;  // of a tile: their sums stay in registers
  // to[e] = reads[columns[e]] for e < count.
  void (*places)(const uint16_t* columns, int64_t count, const uint32_t* reads, uint32_t* to);
  // panel[c, line] for c < channels of planes `plane` floats apart.
  void (*fill)(const float* planes, int64_t plane, int64_t channels, const LinePlan&, float* panel);
  // sums[r - begin, pixel] += the entries of rows begin <= r < end; they begin as the bias, or 0, where `first`.  Results
  // take them where `results` is not null; else they stay.
  void (*multiply)(const LineTile&, const LineRows&, int64_t begin, int64_t end, float* sums, bool first, const float* bias,
                   const LineResults* results);
  // The same for a dense weight and a tile of one row.
  void (*product)(const LineTile&, const DenseRows&, int64_t begin, int64_t end, float* sums, bool first, const float* bias,
                  const LineResults* results);
  // The same for a dense weight with one row for each channel, whose part of the panel is `lines` long: rows begin <= r < end.
  void (*filter)(const LineTile&, int64_t lines, const DenseRows&, int64_t begin, int64_t end, const float* bias,
                 const LineResults& results);
  // y[pixel] = the largest of the lines that `taps` places read, in one row.
  void (*largest)(const float* panel, const uint32_t* places, int64_t taps, int64_t pixels, float* y);
  // to[i, lane] = units[k][i, lanes[k].sources[lane]] for i < lines, of the one k < count where that source is not negative.
  void (*join)(const float* const* units, const Permutation* lanes, int64_t count, int64_t lines, float* to);
  // to[x, lane] = rows[lane][x] for x < count, and the other way round.
  void (*gather)(const float* const* rows, int64_t count, float* to);
  void (*scatter)(const float* from, int64_t count, float* const* rows);
};

const LaneTable& lanes_portable();
const LaneTable& lanes_avx2();
const LaneTable& lanes_avx512();

}  // namespace fxsparse
