// Products with N:M weights: what each instruction set provides.
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
  int64_t rows;

  int64_t slots() const { return runs * run * steps * kChunk16; }  // of a group
};

// dst[t, r] = activation(sum of values * x[t, ...] + bias) for all tokens of x [tokens, features] and the rows of the
// groups begin <= g < end.
using MultiplyChunks = void(const float* x, int64_t features, const Chunks&, int64_t begin, int64_t end, const Epilogue&,
                            const Matrix& dst);

MultiplyChunks multiply_chunks_portable, multiply_chunks_avx2, multiply_chunks_avx512;

}  // namespace fxsparse
