// Products of sparse rows with planes of an image, for one instruction set: every entry reads a run of pixels at its own
// offset, so that the taps of a convolution need no patches (Park et al. 2017, arXiv:1608.01409).
#pragma once
#include "table.h"
#include "vec.h"

namespace fxsparse {
namespace {

constexpr int kMostRun = W == 16 ? 14 : 6;  // vectors whose sums stay in registers

// y[t] = bias + sum of value * panel[offset + t] for NV vectors of positions t.
template <int NV>
inline void add_run(const float* panel, const Shifted& s, int64_t row, float bias, float* y) {
  constexpr int kSets = NV >= 8 ? 1 : 8 / NV;  // several sets of sums hide the latency of the additions
  V sum[kSets][NV] = {};
#pragma GCC unroll 16
  for (int j = 0; j < NV; j++) sum[0][j] = splat(bias);
  const int64_t end = s.start[row + 1];
  int64_t e = s.start[row];
  for (; e + kSets <= end; e += kSets) {
#pragma GCC unroll 8
    for (int k = 0; k < kSets; k++) {
      const float* run = panel + s.offsets[e + k];
      const V value = splat(s.values[e + k]);
#pragma GCC unroll 16
      for (int j = 0; j < NV; j++) sum[k][j] += value * load<V>(run + j * W);
    }
  }
  for (; e < end; e++) {
    const float* run = panel + s.offsets[e];
    const V value = splat(s.values[e]);
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) sum[0][j] += value * load<V>(run + j * W);
  }
#pragma GCC unroll 8
  for (int k = 1; k < kSets; k++)
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) sum[0][j] += sum[k][j];
#pragma GCC unroll 16
  for (int j = 0; j < NV; j++) store(y + j * W, sum[0][j]);
}

// sums[e] += dot(grads, panel[offset ...]) over NV vectors, for every entry e of the row.
template <int NV>
inline void dot_run(const float* grads, const float* panel, const Shifted& s, int64_t row, float* sums) {
  V fixed[NV];
#pragma GCC unroll 16
  for (int j = 0; j < NV; j++) fixed[j] = load<V>(grads + j * W);
  const int64_t end = s.start[row + 1];
  for (int64_t e = s.start[row]; e < end; e += W) {
    const int64_t count = end - e < W ? end - e : W;
    V sum[W] = {};
    for (int64_t i = 0; i < count; i++) {
      const float* run = panel + s.offsets[e + i];
      V even = fixed[0] * load<V>(run), odd{};
#pragma GCC unroll 16
      for (int j = 1; j < NV; j++) (j % 2 ? odd : even) += fixed[j] * load<V>(run + j * W);
      sum[i] = even + odd;
    }
    const V each = sum_each(sum);
    if (count == W) {
      store(sums + e, load<V>(sums + e) + each);
    } else {
      for (int64_t i = 0; i < count; i++) sums[e + i] += each[i];
    }
  }
}

template <int NV>
void add_rows_of(const float* panel, const Shifted& s, int64_t begin, int64_t end, const float* bias, float* y,
                 int64_t stride) {
  for (int64_t r = begin; r < end; r++) add_run<NV>(panel, s, r, bias ? bias[r] : 0.0f, y + (r - begin) * stride);
}

template <int NV>
void dot_rows_of(const float* grads, int64_t stride, const float* panel, const Shifted& s, int64_t begin, int64_t end,
                 float* sums) {
  for (int64_t r = begin; r < end; r++) dot_run<NV>(grads + r * stride, panel, s, r, sums);
}

// f(integral constant of vectors, first position) for runs that cover `count` positions, as equal as they can be.
template <class F, int... I>
inline void for_runs(int64_t count, const F& f, std::integer_sequence<int, I...>) {
  const int64_t vectors = (count + W - 1) / W, runs = (vectors + kMostRun - 1) / kMostRun;
  for (int64_t run = 0; run < runs; run++) {
    const int64_t first = vectors * run / runs, taken = vectors * (run + 1) / runs - first;
    ((taken == I + 1 ? f(std::integral_constant<int, I + 1>{}, first * W) : void()), ...);
  }
}

void add_shifted(const float* panel, const Shifted& s, int64_t begin, int64_t end, const float* bias, int64_t count,
                 float* y, int64_t stride) {
  for_runs(
      count,
      [&](auto vectors, int64_t first) {
        add_rows_of<vectors.value>(panel + first, s, begin, end, bias, y + first, stride);
      },
      std::make_integer_sequence<int, kMostRun>{});
}

void dot_shifted(const float* grads, int64_t stride, const float* panel, const Shifted& s, int64_t begin, int64_t end,
                 int64_t count, float* sums) {
  for_runs(
      count,
      [&](auto vectors, int64_t first) {
        dot_rows_of<vectors.value>(grads + first, stride, panel + first, s, begin, end, sums);
      },
      std::make_integer_sequence<int, kMostRun>{});
}

}  // namespace
}  // namespace fxsparse
