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

template <int NV>
void fill_tile(const Planes& planes, const Tap* taps, int64_t count, int64_t begin, int64_t end, int64_t first,
               const uint16_t* masks, float* panel) {
  int64_t channel = begin / count, t = begin % count;
  for (int64_t column = begin; column < end; column++, panel += NV * W) {
    const float* from = planes.data + channel * planes.channel + taps[t].plane * planes.plane + taps[t].shift + first;
    const uint16_t* mask = masks + t * NV;
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) store(panel + j * W, load_where(from + j * W, mask[j]));
    if (++t == count) t = 0, channel++;
  }
}

// f(integral constant of vectors).
template <class F, int... I>
inline void with_vectors(int64_t vectors, const F& f, std::integer_sequence<int, I...>) {
  ((vectors == I + 1 ? f(std::integral_constant<int, I + 1>{}) : void()), ...);
}

using TileSizes = std::make_integer_sequence<int, kMostTileVectors>;

void fill(const Planes& planes, const Tap* taps, int64_t count, int64_t begin, int64_t end, int64_t first,
          int64_t vectors, uint16_t* masks, float* panel) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t j = 0; j < vectors; j++)
      masks[t * vectors + j] = bits_at(taps[t].rows, first + j * W) & bits_at(taps[t].columns, first + j * W);
  with_vectors(
      vectors, [&](auto nv) { fill_tile<nv.value>(planes, taps, count, begin, end, first, masks, panel); }, TileSizes{});
}

inline V get(const Matrix& m, int64_t at, int64_t count) {
  if (m.scalar == Scalar::f32 && count < W) return load_where((const float*)m.data + at, (1u << count) - 1);
  return read_some(m, at, count);
}

inline void put(const Matrix& m, int64_t at, V v, int64_t count) {
#if defined(__AVX512F__)
  if (m.scalar == Scalar::f32 && count < W)
    return _mm512_mask_storeu_ps((float*)m.data + at, (__mmask16)((1u << count) - 1), (__m512)v);
#endif
  write(m, at, v, count);
}

// Everything that follows a product, for `count` positions of it at `at` of y.
inline void finish(V sums, const Results& to, int64_t at, int64_t count, V bias) {
  V v = sums + bias;
  if (to.residual) v += get({const_cast<void*>(to.residual), to.scalar, 0, 0}, at, count);
  put({to.y, to.scalar, 0, 0}, at, to.activation ? activate(v, to.activation) : v, count);
}

// The same for a row of fp32 whose NV vectors lie together in y, `last` lanes of the last one; relu is a floor of 0, none
// one of -inf, and relu6 has a ceiling.  Without the branches of `finish`, which took a third of the time of rows with 26 entries.
template <int NV>
inline void finish_plain(const V* sums, float* y, const float* residual, int64_t last, V bias, V floor,
                         V ceiling) {
#pragma GCC unroll 16
  for (int j = 0; j < NV; j++) {
    const int64_t count = j + 1 < NV ? W : last;
    V v = sums[j] + bias;
    if (residual) v += count < W ? load_where(residual + j * W, (1u << count) - 1) : load<V>(residual + j * W);
    v = select(v < floor, floor, v);
    put({y, Scalar::f32, 0, 0}, j * W, select(v > ceiling, ceiling, v), count);
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
  const int64_t last = to && to->count == 1 && to->runs[0].position == 0 ? to->runs[0].length - (NV - 1) * W : 0;
  const bool plain = last > 0 && to->scalar == Scalar::f32 && (to->activation <= kRelu || to->activation == kRelu6);
  const V floor = splat(to && to->activation ? 0.0f : -__builtin_inff());
  const V ceiling = splat(to && to->activation == kRelu6 ? 6.0f : __builtin_inff());
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
    const V bias = splat(to && to->bias ? to->bias[r] : 0.0f);
    if (plain) {
      const int64_t at = to->runs[0].at + r * to->row_stride;
      const float* residual = to->residual ? (const float*)to->residual + at : nullptr;
      finish_plain<NV>(sum, (float*)to->y + at, residual, last, bias, floor, ceiling);
      continue;
    }
    alignas(64) float block[(NV + 1) * W];  // a run is read in whole vectors
    float* out = to ? block : kept;
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) store(out + j * W, sum[j]);
    for (int64_t i = 0; to && i < to->count; i++) {
      const Run& run = to->runs[i];
      for (int64_t done = 0; done < run.length; done += W)
        finish(load<V>(block + run.position + done), *to, run.at + r * to->row_stride + done,
               least(W, run.length - done), bias);
    }
  }
}

void multiply(const float* panel, int64_t stride, int64_t vectors, const BlockRows& w, int64_t begin, int64_t end,
              float* sums, bool from_zero, const Results* to) {
  with_vectors(
      vectors, [&](auto nv) { multiply_tile<nv.value>(panel, stride, w, begin, end, sums, from_zero, to); }, TileSizes{});
}

inline float widened(float value) { return value; }
inline float widened(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Every second one of fp32 elements; the compiler alone leaves the last few of a row to single moves.
inline void take_second(const float* src, int64_t count, float* to) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  for (int64_t i = 0; i < count; i += W) {
    const int64_t left = least(W, count - i);
    const uint32_t bits = (uint32_t)((uint64_t(1) << (2 * left - 1)) - 1);
    const __m512 low = _mm512_maskz_loadu_ps((__mmask16)bits, src + 2 * i);
    const __m512 high = _mm512_maskz_loadu_ps((__mmask16)(bits >> 16), src + 2 * i + W);
    _mm512_mask_storeu_ps(to + i, (__mmask16)((1u << left) - 1), _mm512_permutex2var_ps(low, even, high));
  }
#else
  for (int64_t i = 0; i < count; i++) to[i] = src[2 * i];
#endif
}

// Rows of a few pixels, which the compiler's own copy would move one by one.
inline void copy_row(const float* src, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += W) {
    const int64_t left = least(W, count - i);
    put({to, Scalar::f32, 0, 0}, i, left < W ? load_where(src + i, (1u << left) - 1) : load<V>(src + i), left);
  }
}

template <class T>
void take_row(const T* src, int64_t count, int64_t step, float* __restrict to) {
  if constexpr (sizeof(T) == sizeof(float))
    if (step == 1) return copy_row(src, count, to);
  if (step == 1) {
    for (int64_t i = 0; i < count; i++) to[i] = widened(src[i]);
    return;
  }
  if constexpr (sizeof(T) == sizeof(float))
    if (step == 2) return take_second(src, count, to);
  for (int64_t i = 0; i < count; i++) to[i] = widened(src[i * step]);
}

template <class T>
void take_from(const T* src, int64_t rows, int64_t row_step, int64_t count, int64_t step, int64_t pitch, float* to) {
  for (int64_t r = 0; r < rows; r++) take_row(src + r * row_step, count, step, to + r * pitch);
}

void take(const void* src, Scalar scalar, int64_t at, int64_t rows, int64_t row_step, int64_t count, int64_t step,
          int64_t pitch, float* to) {
  if (scalar == Scalar::f32)
    return take_from(static_cast<const float*>(src) + at, rows, row_step, count, step, pitch, to);
  take_from(static_cast<const uint16_t*>(src) + at, rows, row_step, count, step, pitch, to);
}

template <int NV>
inline void add_taps(const float* pixels, const OwnTaps& taps, float* y) {
  V sum[NV];
#pragma GCC unroll 16
  for (int j = 0; j < NV; j++) sum[j] = splat(taps.bias);
  for (int64_t t = 0; t < taps.count; t++) {
    const float* from = pixels + taps.offsets[t];
    const V value = splat(taps.values[t]);
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) sum[j] += value * load<V>(from + j * W);
  }
#pragma GCC unroll 16
  for (int j = 0; j < NV; j++) store(y + j * W, taps.activation ? activate(sum[j], taps.activation) : sum[j]);
}

void filter(const float* pixels, const OwnTaps& taps, int64_t count, float* y) {
  constexpr int kSome = 8;
  int64_t p = 0;
  for (; p + (kSome - 1) * W < count; p += kSome * W) add_taps<kSome>(pixels + p, taps, y + p);
  with_vectors(
      (count - p + W - 1) / W, [&](auto nv) { add_taps<nv.value>(pixels + p, taps, y + p); },
      std::make_integer_sequence<int, kSome>{});
}

void give(const float* from, int64_t pitch, int64_t rows, int64_t count, void* y, Scalar scalar, int64_t at) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < count; i += W) {
      const float* run = from + r * pitch + i;
      put({y, scalar, 0, 0}, at + r * count + i, load<V>(run), least(W, count - i));
    }
}

uint16_t most(const uint16_t* columns, int64_t count) {
  uint16_t largest = 0;
  for (int64_t i = 0; i < count; i++) largest = columns[i] > largest ? columns[i] : largest;
  return largest;
}

}  // namespace

const TileTable& FXSPARSE_TILES() {
  static const TileTable table = {W, fill, multiply, take, filter, give, most};
  return table;
}

}  // namespace fxsparse
