// From sums of rows [rows, NV * W] to rows of activations: transposed, with the epilogue.
#pragma once
#include "rows.h"
#include "table.h"
#include "vec.h"

namespace fxsparse {
namespace {

// A result of this many bytes leaves the caches before anything reads it: streamed, a training step of 768 -> 3,072 at
// 99 % zeros took 0.8 of the time, 0.9 with the reading of its results after it.
constexpr int64_t kStreamedBytes = 1 << 20;

inline bool is_streamed(const Matrix& dst, const int32_t* rows) {
  return kStreams && !rows && dst.scalar == Scalar::f32 && dst.features % W == 0 && (uintptr_t)dst.data % sizeof(V) == 0 &&
         dst.tokens * dst.features * 4 >= kStreamedBytes;
}

// dst[token + i, column of row r + j] = m[i][j] for i < height, j < count.
inline void write_block(const V* m, const Matrix& dst, int64_t token, int64_t r, int64_t height, int64_t count,
                        const int32_t* rows, bool streamed) {
  const int64_t at = token * dst.features + r;
  if (rows || height < W || count < W || dst.scalar != Scalar::f32) {
    for (int i = 0; i < height; i++) write_rows(dst, token + i, r, m[i], count, rows);
  } else if (streamed) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) stream((float*)dst.data + at + i * dst.features, m[i]);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) store((float*)dst.data + at + i * dst.features, m[i]);
  }
}

// Rows base <= r < stop of the product from `block` [rows, NV * W] to dst, transposed, with the epilogue.
template <int NV>
inline void finish_rows(const float* block, int64_t base, int64_t stop, const Epilogue& epilogue, const Matrix& dst,
                        int64_t first, bool streamed) {
  const int64_t tokens = least(NV * W, dst.tokens - first);
  for (int64_t t = 0; t < tokens; t += W) {
    for (int64_t r = base; r < stop; r += W) {
      const int64_t count = least(W, stop - r);
      const V bias = bias_of(epilogue, r, count), scale = scale_of(epilogue, r, count);
      V m[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) m[i] = load<V>(block + (r - base + i) * NV * W + t);
      transpose_block(m);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) m[i] = m[i] * scale + bias;
      const int64_t height = least(W, tokens - t);
      if (epilogue.activation || epilogue.residual)
        for (int i = 0; i < height; i++) m[i] = finish(m[i], epilogue, dst, first + t + i, r, count);
      write_block(m, dst, first + t, r, height, count, epilogue.rows, streamed);
    }
  }
}

}  // namespace
}  // namespace fxsparse
