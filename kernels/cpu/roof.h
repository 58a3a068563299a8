// How fast a core can go at all: a loop that only multiplies and adds, and one that only reads.
#pragma once
#include "vec.h"

namespace fxsparse {
namespace {

// FLOP of so many steps.  `numbers` [2] are read and the first is written, so that the work has to be done.
int64_t multiply_adds(int64_t steps, float* numbers) {
  constexpr int kSums = W == 16 ? 16 : 12;  // none waits for another; AVX-512 has 32 registers, others 16
  const V factor = splat(numbers[0]), term = splat(numbers[1]);
  V sum[kSums];
  for (int i = 0; i < kSums; i++) sum[i] = splat(float(i));  // a compiler computes equal sums but once
  for (int64_t step = 0; step < steps; step++)
#pragma GCC unroll 16
    for (int i = 0; i < kSums; i++) sum[i] = sum[i] * factor + term;
  for (int i = 1; i < kSums; i++) sum[0] += sum[i];
  numbers[0] = sum[0][0];
  return 2 * steps * kSums * W;
}

// The sum of `count` floats, but for the last that do not fill 8 vectors.
float read_all(const float* data, int64_t count) {
  V sum[8] = {};
  for (int64_t at = 0; at + 8 * W <= count; at += 8 * W)
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) sum[i] += load<V>(data + at + i * W);
  for (int i = 1; i < 8; i++) sum[0] += sum[i];
  float total = 0;
  for (int i = 0; i < W; i++) total += sum[0][i];
  return total;
}

}  // namespace
}  // namespace fxsparse
