// Products with N:M and strided 1:M weights: what each instruction set provides.
#pragma once
#include "table.h"

namespace fxsparse {

constexpr int64_t kChunk16 = 16;  // inputs that a register holds, and rows that lie side by side

// formats/nm_lanes.py says how: a chunk of 16 inputs has `steps` entries of every row, and `run` chunks make a run, whose
// places are together: four bits for every step, 16 rows side by side.
struct Chunks {
  const void* values;  // [groups of rows, runs, run, steps, 16]
  Scalar scalar;
  const uint32_t* places;  // [groups, runs, 16]
  int64_t groups, runs, run, steps;
  int64_t rows, chunks;

  int64_t slots() const { return runs * run * steps * kChunk16; }  // of a group
  int64_t width() const { return chunks * kChunk16; }              // inputs of a token, filled up with zeros
};

struct NmTable {
  // The inputs of a strided weight, as formats/strided.py sorts them: to [tokens, chunks * 16] of the tokens begin <= t < end
  // of x [tokens, features].
  void (*arrange)(const float* x, int64_t features, int64_t strides, int64_t begin, int64_t end, int64_t chunks, float* to);
  // dst[t, r] = activation(sum of values * x[t, ...] + bias) for all tokens of x [tokens, chunks * 16] and the rows of the
  // groups begin <= g < end.
  void (*multiply)(const float* x, const Chunks&, int64_t begin, int64_t end, const Epilogue&, const Matrix& dst);
};

const NmTable &nm_portable(), &nm_avx2(), &nm_avx512();

}  // namespace fxsparse
