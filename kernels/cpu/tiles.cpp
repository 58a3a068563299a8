// Products of sparse rows with tiles of pixels, for one instruction set; compiled once per set, see build.py.
//
// A tile is a panel [columns of the weight, positions of the output]: every nonzero is one broadcast against a row of it.
// Its rows are whole vectors at addresses that vectors divide: an AVX-512 load that is not aligned crosses a cache line
// and costs two (from L2, 2.3 instead of 3.1 products of a vector per ns on Zen 5), so a tile holds a copy for every tap.
#include "tiles.h"

#include "rows.h"
#include "vec.h"

namespace fxsparse {
namespace {

inline uint32_t bits_at(const uint64_t* words, int64_t position) {
  return (words[position >> 6] >> (position & 63)) & ((1u << W) - 1);
}

// Lanes with a bit from memory, 0 in the others, whose memory is not touched.
inline V load_where(const float* p, uint32_t bits) {
#if defined(__AVX512F__)
  return (V)_mm512_maskz_loadu_ps((__mmask16)bits, p);
#else
  if (bits == (1u << W) - 1) return load<V>(p);
#if defined(__AVX2__)
  const VI bit = {1, 2, 4, 8, 16, 32, 64, 128};
  const VI mask = ((VI{} + (int32_t)bits) & bit) == bit;
  return (V)_mm256_maskload_ps(p, (__m256i)mask);
#else
  V v{};
  for (int i = 0; i < W; i++)
    if (bits >> i & 1) v[i] = p[i];
  return v;
#endif
#endif
}

void fill(const Planes& planes, const Tap* taps, int64_t count, int64_t begin, int64_t end, int64_t first,
          int64_t vectors, uint16_t* masks, float* panel) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t j = 0; j < vectors; j++)
      masks[t * vectors + j] = bits_at(taps[t].rows, first + j * W) & bits_at(taps[t].columns, first + j * W);
  int64_t channel = begin / count, t = begin % count;
  for (int64_t column = begin; column < end; column++) {
    const float* from = planes.data + channel * planes.channel + taps[t].plane * planes.plane + taps[t].shift + first;
    const uint16_t* mask = masks + t * vectors;
    for (int64_t j = 0; j < vectors; j++, panel += W) store(panel, load_where(from + j * W, mask[j]));
    if (++t == count) t = 0, channel++;
  }
}

// Positions begin <= i < end of sums to y + at + i, with everything that follows a product.
inline void finish(const float* sums, int64_t begin, int64_t end, const Results& to, int64_t at, float bias) {
  const Matrix y{to.y, to.scalar, 0, 0}, residual{const_cast<void*>(to.residual), to.scalar, 0, 0};
  for (int64_t i = begin; i < end; i += W) {
    V v = load<V>(sums + i) + splat(bias);
    if (to.residual) v += read_some(residual, at + i, end - i);
    write(y, at + i, activate(v, to.activation), end - i);
  }
}

template <int NV>
inline void finish_whole(const V* sums, const Results& to, int64_t at, float bias) {
  const Matrix y{to.y, to.scalar, 0, 0}, residual{const_cast<void*>(to.residual), to.scalar, 0, 0};
#pragma GCC unroll 16
  for (int j = 0; j < NV; j++) {
    V v = sums[j] + splat(bias);
    if (to.residual) v += read(residual, at + j * W);
    write(y, at + j * W, to.activation ? activate(v, to.activation) : v, W);
  }
}

template <int NV>
inline void add_entries(const float* panel, int64_t stride, const BlockRows& w, int64_t e, int64_t end, V* sum) {
  constexpr int kSets = NV >= 8 ? 1 : NV >= 4 ? 2 : NV >= 2 ? 4 : 8;  // hide the latency of the additions
  V more[kSets][NV] = {};
  for (; e + kSets <= end; e += kSets) {
#pragma GCC unroll 8
    for (int k = 0; k < kSets; k++) {
      const float* row = panel + w.columns[e + k] * stride;
      const V value = splat(w.values[e + k]);
      V* into = k ? more[k] : sum;
#pragma GCC unroll 16
      for (int j = 0; j < NV; j++) into[j] += value * load<V>(row + j * W);
    }
  }
  for (; e < end; e++) {
    const float* row = panel + w.columns[e] * stride;
    const V value = splat(w.values[e]);
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) sum[j] += value * load<V>(row + j * W);
  }
#pragma GCC unroll 8
  for (int k = 1; k < kSets; k++)
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) sum[j] += more[k][j];
}

template <int NV>
void multiply_tile(const float* panel, int64_t stride, const BlockRows& w, int64_t begin, int64_t end, float* sums,
                   bool from_zero, const Results* to) {
  const bool whole = to && to->count == 1 && to->runs[0].length == NV * W;
  for (int64_t r = begin; r < end; r++) {
    float* kept = sums + (r - begin) * NV * W;
    V sum[NV];
    if (from_zero) {
#pragma GCC unroll 16
      for (int j = 0; j < NV; j++) sum[j] = V{};
    } else {
#pragma GCC unroll 16
      for (int j = 0; j < NV; j++) sum[j] = load<V>(kept + j * W);
    }
    add_entries<NV>(panel, stride, w, w.start[r], w.start[r + 1], sum);
    const float bias = to && to->bias ? to->bias[r] : 0.0f;
    if (whole) {
      finish_whole<NV>(sum, *to, to->runs[0].at + r * to->row_stride, bias);
      continue;
    }
    alignas(64) float block[(NV + 1) * W];  // a run is read in whole vectors
    float* out = to ? block : kept;
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) store(out + j * W, sum[j]);
    for (int64_t i = 0; to && i < to->count; i++) {
      const Run& run = to->runs[i];
      finish(block, run.position, run.position + run.length, *to, run.at - run.position + r * to->row_stride, bias);
    }
  }
}

template <int... I>
void dispatch(std::integer_sequence<int, I...>, const float* panel, int64_t stride, int64_t vectors, const BlockRows& w,
              int64_t begin, int64_t end, float* sums, bool from_zero, const Results* to) {
  ((vectors == I + 1 ? multiply_tile<I + 1>(panel, stride, w, begin, end, sums, from_zero, to) : void()), ...);
}

void multiply(const float* panel, int64_t stride, int64_t vectors, const BlockRows& w, int64_t begin, int64_t end,
              float* sums, bool from_zero, const Results* to) {
  dispatch(std::make_integer_sequence<int, kMostTileVectors>{}, panel, stride, vectors, w, begin, end, sums, from_zero, to);
}

inline float widened(float value) { return value; }
inline float widened(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

template <class T>
void take_from(const T* src, int64_t step, int64_t count, float* __restrict to) {
  if (step == 1) {
    for (int64_t i = 0; i < count; i++) to[i] = widened(src[i]);
  } else if (step == 2) {  // a constant, so that the compiler can use shuffles
    for (int64_t i = 0; i < count; i++) to[i] = widened(src[2 * i]);
  } else {
    for (int64_t i = 0; i < count; i++) to[i] = widened(src[i * step]);
  }
}

void take(const void* src, Scalar scalar, int64_t at, int64_t step, int64_t count, float* to) {
  if (scalar == Scalar::f32) return take_from(static_cast<const float*>(src) + at, step, count, to);
  take_from(static_cast<const uint16_t*>(src) + at, step, count, to);
}

}  // namespace

const TileTable& FXSPARSE_TILES() {
  static const TileTable table = {W, fill, multiply, take};
  return table;
}

}  // namespace fxsparse
