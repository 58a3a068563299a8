// The sparse products for one instruction set; compiled once per set, see build.py.
//
// Tokens are the vector dimension: activations are transposed into panels [features, vectors * W] that fit the L2
// cache, every nonzero is one broadcast against a panel row, and results are transposed back W rows at a time.
#include "table.h"
#include "vec.h"

namespace fxsparse {
namespace {

// 64 tokens: 768 features of them are 192 KiB, 3,072 are 768 KiB.
constexpr int64_t kMostVectors = W == 16 ? 4 : 8;

inline V read(const Matrix& m, int64_t offset) {
  if (m.scalar == Scalar::f32) return load<V>((const float*)m.data + offset);
  return from_bf16(load<VH>((const uint16_t*)m.data + offset));
}

inline void write(const Matrix& m, int64_t offset, V v, int64_t count) {
  if (count >= W) {
    if (m.scalar == Scalar::f32) return store((float*)m.data + offset, v);
    return store((uint16_t*)m.data + offset, to_bf16(v));
  }
  if (m.scalar == Scalar::f32) {
    __builtin_memcpy((float*)m.data + offset, &v, count * 4);
  } else {
    VH half = to_bf16(v);
    __builtin_memcpy((uint16_t*)m.data + offset, &half, count * 2);
  }
}

inline V read_some(const Matrix& m, int64_t offset, int64_t count) {
  if (count >= W) return read(m, offset);
  V v{};
  if (m.scalar == Scalar::f32) {
    __builtin_memcpy(&v, (const float*)m.data + offset, count * 4);
    return v;
  }
  VH half{};
  __builtin_memcpy(&half, (const uint16_t*)m.data + offset, count * 2);
  return from_bf16(half);
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void transpose(const Matrix& src, int64_t first, int64_t vectors, float* dst) {
  const int64_t stride = vectors * W;
  for (int64_t j = 0; j < vectors; j++) {  // outside, so that only W tokens are streamed at a time
    const int64_t token = first + j * W, height = least(W, src.tokens - token);
    for (int64_t f = 0; f < src.features; f += W) {
      const int64_t width = least(W, src.features - f);
      V m[W];
      if (height >= W && width >= W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) m[i] = read(src, (token + i) * src.features + f);
      } else {
        for (int i = 0; i < W; i++) m[i] = i < height ? read_some(src, (token + i) * src.features + f, width) : V{};
      }
      transpose_block(m);
      float* to = dst + f * stride + j * W;
      if (width >= W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) store(to + i * stride, m[i]);
      } else {
        for (int i = 0; i < width; i++) store(to + i * stride, m[i]);
      }
    }
  }
}

inline int64_t row_begin(const Sparse& s, int64_t r) { return s.start ? s.start[r] : r * s.fan_in; }

// sums [NV * W] = sum of value * panel row over the entries begin <= e < end.
template <int NV, class Index>
inline void accumulate(const float* panel, const float* values, const Index* index, int64_t begin, int64_t end,
                       float* sums) {
  constexpr int kSets = NV >= 8 ? 1 : 8 / NV;  // several sets of sums hide the latency of the additions
  V sum[kSets][NV] = {};
  int64_t e = begin;
  for (; e + kSets <= end; e += kSets) {
#pragma GCC unroll 8
    for (int s = 0; s < kSets; s++) {
      const float* row = panel + (int64_t)index[e + s] * (NV * W);
      const V value = splat(values[e + s]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) sum[s][j] += value * load<V>(row + j * W);
    }
  }
  for (; e < end; e++) {
    const float* row = panel + (int64_t)index[e] * (NV * W);
    const V value = splat(values[e]);
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) sum[0][j] += value * load<V>(row + j * W);
  }
#pragma GCC unroll 8
  for (int s = 1; s < kSets; s++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) sum[0][j] += sum[s][j];
#pragma GCC unroll 8
  for (int j = 0; j < NV; j++) store(sums + j * W, sum[0][j]);
}

inline V bias_of(const Epilogue& epilogue, int64_t r, int64_t count) {
  if (!epilogue.bias) return V{};
  if (count >= W) return load<V>(epilogue.bias + r);
  V bias{};
  for (int64_t i = 0; i < count; i++) bias[i] = epilogue.bias[r + i];
  return bias;
}

// A result of this many bytes leaves the caches before anything reads it: streamed, a training step of 768 -> 3,072 at
// 99 % zeros took 0.8 of the time, 0.9 with the reading of its results after it.
constexpr int64_t kStreamedBytes = 1 << 20;

inline bool is_streamed(const Matrix& dst) {
  return kStreams && dst.scalar == Scalar::f32 && dst.features % W == 0 && (uintptr_t)dst.data % sizeof(V) == 0 &&
         dst.tokens * dst.features * 4 >= kStreamedBytes;
}

// dst[token + i, r + j] = m[i][j] for i < height, j < count.
inline void write_block(const V* m, const Matrix& dst, int64_t token, int64_t r, int64_t height, int64_t count,
                        bool streamed) {
  const int64_t at = token * dst.features + r;
  if (height < W || count < W || dst.scalar != Scalar::f32) {
    for (int i = 0; i < height; i++) write(dst, at + i * dst.features, m[i], count);
  } else if (streamed) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) stream((float*)dst.data + at + i * dst.features, m[i]);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) store((float*)dst.data + at + i * dst.features, m[i]);
  }
}

template <int NV, class Index>
void multiply_rows(const float* panel, const Sparse& s, int64_t begin, int64_t end, const Epilogue& epilogue,
                   const Matrix& dst, int64_t first) {
  constexpr int64_t kRows = 4 * W;  // so that a token gets four vectors in a row: fewer changes of page
  alignas(64) float block[kRows * NV * W];
  const int64_t tokens = least(NV * W, dst.tokens - first);
  const bool streamed = is_streamed(dst);
  for (int64_t base = begin; base < end; base += kRows) {
    const int64_t stop = least(base + kRows, end);
    for (int64_t r = base; r < stop; r++)
      accumulate<NV>(panel, s.values, (const Index*)s.index, row_begin(s, r), row_begin(s, r + 1),
                     block + (r - base) * NV * W);
    for (int64_t t = 0; t < tokens; t += W) {
      for (int64_t r = base; r < stop; r += W) {
        const int64_t count = least(W, stop - r);
        const V bias = bias_of(epilogue, r, count);
        V m[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) m[i] = load<V>(block + (r - base + i) * NV * W + t);
        transpose_block(m);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) m[i] += bias;
        if (epilogue.activation)
          for (int i = 0; i < W; i++) m[i] = activate(m[i], epilogue.activation);
        write_block(m, dst, first + t, r, least(W, tokens - t), count, streamed);
      }
    }
  }
  if (streamed) stream_end();
}

template <int NV>
void multiply_panel(const float* panel, const Sparse& s, int64_t begin, int64_t end, const Epilogue& epilogue,
                    const Matrix& dst, int64_t first) {
  if (s.index16) return multiply_rows<NV, int16_t>(panel, s, begin, end, epilogue, dst, first);
  multiply_rows<NV, int32_t>(panel, s, begin, end, epilogue, dst, first);
}

void multiply(const float* panel, int64_t vectors, const Sparse& s, int64_t begin, int64_t end,
              const Epilogue& epilogue, const Matrix& dst, int64_t first) {
  switch (vectors) {
    case 1: return multiply_panel<1>(panel, s, begin, end, epilogue, dst, first);
    case 2: return multiply_panel<2>(panel, s, begin, end, epilogue, dst, first);
    case 4: return multiply_panel<4>(panel, s, begin, end, epilogue, dst, first);
    default: return multiply_panel<8>(panel, s, begin, end, epilogue, dst, first);
  }
}

template <int NV>
inline V sample_entry(const V* row, const float* gathered, int32_t index) {
  const float* other = gathered + (int64_t)index * (NV * W);
  V sum = row[0] * load<V>(other);
#pragma GCC unroll 8
  for (int j = 1; j < NV; j++) sum += row[j] * load<V>(other + j * W);
  return sum;
}

template <int NV>
void sample_rows(const float* rows_panel, const float* gathered, const Sparse& s, int64_t begin, int64_t end,
                 float* out) {
  const int32_t* index = (const int32_t*)s.index;
  for (int64_t r = begin; r < end; r++) {
    V row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) row[j] = load<V>(rows_panel + (r * NV + j) * W);
    const int64_t last = row_begin(s, r + 1);
    int64_t e = row_begin(s, r);
    for (; e + W <= last; e += W) {  // W entries at once, so that their sums of lanes are one tree of additions
      V sum[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) sum[i] = sample_entry<NV>(row, gathered, index[e + i]);
      store(out + e, load<V>(out + e) + sum_each(sum));
    }
    if (e < last) {
      V sum[W] = {};
      for (int64_t i = 0; e + i < last; i++) sum[i] = sample_entry<NV>(row, gathered, index[e + i]);
      const V sums = sum_each(sum);
      for (int64_t i = 0; e + i < last; i++) out[e + i] += sums[i];
    }
  }
}

void sample(const float* rows_panel, const float* gathered, int64_t vectors, const Sparse& s, int64_t begin,
            int64_t end, float* out) {
  switch (vectors) {
    case 1: return sample_rows<1>(rows_panel, gathered, s, begin, end, out);
    case 2: return sample_rows<2>(rows_panel, gathered, s, begin, end, out);
    case 4: return sample_rows<4>(rows_panel, gathered, s, begin, end, out);
    default: return sample_rows<8>(rows_panel, gathered, s, begin, end, out);
  }
}

inline VI load_index(const int32_t* p) { return load<VI>(p); }
inline VI load_index(const int16_t* p) {
#if defined(__AVX512F__)  // GCC makes two halves of the conversion below
  return (VI)_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p));
#else
  typedef int16_t VS __attribute__((vector_size(2 * W)));
  return __builtin_convertvector(load<VS>(p), VI);
#endif
}

inline V gather(const float* x, VI index) {
#if defined(__AVX512F__)
  return (V)_mm512_i32gather_ps((__m512i)index, x, 4);
#elif defined(__AVX2__)
  return (V)_mm256_i32gather_ps(x, (__m256i)index, 4);
#else
  V v;
  for (int i = 0; i < W; i++) v[i] = x[index[i]];
  return v;
#endif
}

inline VI lanes_below(int64_t count) {
  VI lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  return lane < (VI{} + (int32_t)count);
}

// The last count < W entries of a row, zeros and position 0 past them.
template <class Index>
inline void load_tail(const float* values, const Index* index, int64_t count, V& value, VI& position) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask16 mask = (1u << count) - 1;
  value = (V)_mm512_maskz_loadu_ps(mask, values);
  if constexpr (sizeof(Index) == 2)
    position = (VI)_mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(mask, index));
  else
    position = (VI)_mm512_maskz_loadu_epi32(mask, index);
#else
  value = V{};
  position = VI{};
  for (int64_t i = 0; i < count; i++) {
    value[i] = values[i];
    position[i] = index[i];
  }
#endif
}

// Entries to fetch ahead: without it, weights that come from L3 took 75 us instead of 66 (768 -> 3,072, 90 % zeros).
constexpr int64_t kAhead = 256;

template <int T, class Index>
bool few_rows(const float* x, int64_t width, const Sparse& s, int64_t begin, int64_t end, const Epilogue& epilogue,
              const Matrix& dst) {
  const Index* index = (const Index*)s.index;
  for (int64_t r = begin; r < end; r += W) {
    const int64_t count = least(W, end - r);
    V sum[T][W];
    if (count < W)
      for (int t = 0; t < T; t++)
        for (int i = 0; i < W; i++) sum[t][i] = V{};
    for (int i = 0; i < count; i++) {
      const int64_t last = row_begin(s, r + i + 1);
      int64_t e = row_begin(s, r + i);
      if (last > e && index[last - 1] >= width) return false;  // columns ascend: the last one bounds all
      V total[T] = {};
      for (; e + W <= last; e += W) {
        const V value = load<V>(s.values + e);
        const VI position = load_index(index + e);
        __builtin_prefetch(s.values + e + kAhead);
        __builtin_prefetch(index + e + kAhead);
#pragma GCC unroll 2
        for (int t = 0; t < T; t++) total[t] += value * gather(x + t * width, position);
      }
      if (e < last) {
        V value;
        VI position;
        load_tail(s.values + e, index + e, last - e, value, position);
        const VI used = lanes_below(last - e);  // a lane past the end would turn an infinite x[0] into NaN
#pragma GCC unroll 2
        for (int t = 0; t < T; t++) total[t] += select(used, value * gather(x + t * width, position), V{});
      }
#pragma GCC unroll 2
      for (int t = 0; t < T; t++) sum[t][i] = total[t];
    }
    const V bias = bias_of(epilogue, r, count);
#pragma GCC unroll 2
    for (int t = 0; t < T; t++)
      write(dst, t * dst.features + r, activate(sum_each(sum[t]) + bias, epilogue.activation), count);
  }
  return true;
}

template <class Index>
bool few(const float* x, int64_t width, const Sparse& s, int64_t begin, int64_t end, const Epilogue& epilogue,
         const Matrix& dst) {
  if (dst.tokens == 1) return few_rows<1, Index>(x, width, s, begin, end, epilogue, dst);
  return few_rows<2, Index>(x, width, s, begin, end, epilogue, dst);
}

bool multiply_few(const float* x, int64_t width, const Sparse& s, int64_t begin, int64_t end,
                  const Epilogue& epilogue, const Matrix& dst) {
  if (s.index16) return few<int16_t>(x, width, s, begin, end, epilogue, dst);
  return few<int32_t>(x, width, s, begin, end, epilogue, dst);
}

void add_rows(const float* panel, int64_t vectors, int64_t begin, int64_t end, float* sums) {
  for (int64_t r = begin; r < end; r += W) {
    const int64_t count = least(W, end - r);
    V m[W] = {};
    for (int i = 0; i < count; i++)
      for (int64_t j = 0; j < vectors; j++) m[i] += load<V>(panel + ((r + i) * vectors + j) * W);
    V sum = sum_each(m);
    for (int64_t i = 0; i < count; i++) sums[r + i] += sum[i];
  }
}

}  // namespace

const Table& FXSPARSE_TABLE() {
  static const Table table = {W, kMostVectors, transpose, multiply, sample, multiply_few, add_rows};
  return table;
}

}  // namespace fxsparse
