// Products with N:M weights for one instruction set: 16 inputs lie in a register, and one permutation of it fetches the
// input of an entry for each of 16 rows.  Sums of a few tokens and rows stay in registers; nothing is transposed.
#include "nm.h"
#include "rows.h"
#include "vec.h"

namespace fxsparse {
namespace {

constexpr int kParts = kChunk16 / W;        // vectors of 16 floats
constexpr int64_t kBlockBytes = 256 << 10;  // of values, which stay in L2 while the tokens pass

// Lane i: number place[i] % 16 of `numbers`.
inline V pick(const V* numbers, VU place) {
#if defined(__AVX512F__)
  return (V)_mm512_permutexvar_ps((__m512i)place, (__m512)numbers[0]);
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps((__m256)numbers[0], (__m256i)place);
  const __m256 high = _mm256_permutevar8x32_ps((__m256)numbers[1], (__m256i)place);
  return (V)_mm256_blendv_ps(low, high, (__m256)(place << 28));
#else
  V v;
  for (int i = 0; i < W; i++) v[i] = numbers[place[i] % kChunk16 / W][place[i] % W];
  return v;
#endif
}

// Where the entries of a tile's groups are: those of one chunk after another.
template <int GROUPS, class Value>
struct Entries {
  const Value* values;
  int64_t slots, steps;  // from one group to the next, and of a chunk
  VU place[GROUPS][kParts];

  void start_run(const uint32_t* places, int64_t stride) {
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++)
#pragma GCC unroll 4
      for (int k = 0; k < kParts; k++) place[g][k] = load<VU>(places + g * stride + k * W);
  }
};

// The products of the 16 inputs x[t * stride ...] of TOKENS tokens.
template <int TOKENS, int GROUPS, class Value>
inline void add_chunk(const float* x, int64_t stride, Entries<GROUPS, Value>& e, V (*sum)[GROUPS][kParts]) {
  V inputs[TOKENS][kParts];
#pragma GCC unroll 16
  for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
    for (int k = 0; k < kParts; k++) inputs[t][k] = load<V>(x + t * stride + k * W);
  for (int64_t step = 0; step < e.steps; step++, e.values += kChunk16) {
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) {
#pragma GCC unroll 4
      for (int k = 0; k < kParts; k++) {
        const V value = values_at(e.values + g * e.slots + k * W);
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; t++) sum[t][g][k] += value * pick(inputs[t], e.place[g][k]);
        e.place[g][k] >>= 4;
      }
    }
  }
}

// sums[t, g, row] = the products of TOKENS tokens with GROUPS groups of rows.
template <int TOKENS, int GROUPS, class Value>
inline void sum_chunks(const float* x, int64_t features, const Chunks& s, int64_t group, float* sums) {
  const int64_t stride = s.runs * kChunk16, whole = features / kChunk16, rest = features % kChunk16;
  const uint32_t* places = s.places + group * stride;
  Entries<GROUPS, Value> entries{(const Value*)s.values + group * s.slots(), s.slots(), s.steps, {}};
  float padded[TOKENS][kChunk16] = {};  // the last inputs, where they fill no chunk
  for (int t = 0; t < TOKENS && rest; t++) __builtin_memcpy(padded[t], x + t * features + whole * kChunk16, rest * 4);
  V sum[TOKENS][GROUPS][kParts] = {};
  for (int64_t chunk = 0, run = 0; run < s.runs; run++) {
    entries.start_run(places + run * kChunk16, stride);
    for (const int64_t last = least(chunk + s.run, whole + (rest > 0)); chunk < last; chunk++) {
      const bool is_whole = chunk < whole;
      add_chunk<TOKENS, GROUPS, Value>(is_whole ? x + chunk * kChunk16 : padded[0], is_whole ? features : kChunk16, entries,
                                       sum);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++)
#pragma GCC unroll 4
      for (int k = 0; k < kParts; k++) store(sums + (t * GROUPS + g) * kChunk16 + k * W, sum[t][g][k]);
}

template <int TOKENS, int GROUPS, class Value>
void multiply_tile(const float* x, int64_t features, int64_t token, const Chunks& s, int64_t group,
                   const Epilogue& epilogue, const Matrix& dst) {
  alignas(64) float sums[TOKENS * GROUPS * kChunk16];
  sum_chunks<TOKENS, GROUPS, Value>(x + token * features, features, s, group, sums);
  for (int64_t r = group * kChunk16, i = 0; i < GROUPS * kChunk16 && r < s.rows; r += W, i += W) {
    const int64_t count = s.rows - r;
    const V scale = scale_of(epilogue, r, count), bias = bias_of(epilogue, r, count);
    V total[TOKENS];
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++) total[t] = load<V>(sums + t * GROUPS * kChunk16 + i) * scale + bias;
    if (epilogue.activation || epilogue.residual)
      for (int t = 0; t < TOKENS; t++) total[t] = finish(total[t], epilogue, dst, token + t, r, count);
    if (dst.scalar == Scalar::f32 && count >= W) {
      float* y = (float*)dst.data + token * dst.features + r;
#pragma GCC unroll 16
      for (int t = 0; t < TOKENS; t++) store(y + t * dst.features, total[t]);
    } else {
      for (int t = 0; t < TOKENS; t++) write_rows(dst, token + t, r, total[t], count, nullptr);
    }
  }
}

// All tokens with the groups begin <= g < end, TOKENS at a time; the last tile overlaps the one before.
template <int TOKENS, int GROUPS, class Value>
void multiply_tiles(const float* x, int64_t features, const Chunks& s, int64_t begin, int64_t end,
                    const Epilogue& epilogue, const Matrix& dst) {
  for (int64_t first = 0; first < dst.tokens; first += TOKENS) {
    const int64_t token = least(first, dst.tokens - TOKENS);
    int64_t g = begin;
    for (; g + GROUPS <= end; g += GROUPS) multiply_tile<TOKENS, GROUPS, Value>(x, features, token, s, g, epilogue, dst);
    for (; g < end; g++) multiply_tile<TOKENS, 1, Value>(x, features, token, s, g, epilogue, dst);
  }
}

template <class Value>
void multiply_block(const float* x, int64_t features, const Chunks& s, int64_t begin, int64_t end,
                    const Epilogue& epilogue, const Matrix& dst) {
  constexpr bool kMany = W == 16;  // registers
  if (kMany && dst.tokens >= 8)
    return multiply_tiles<kMany ? 8 : 1, kMany ? 2 : 1, Value>(x, features, s, begin, end, epilogue, dst);
  if (dst.tokens >= 4) return multiply_tiles<4, kMany ? 4 : 1, Value>(x, features, s, begin, end, epilogue, dst);
  if (dst.tokens >= 2) return multiply_tiles<2, kMany ? 4 : 1, Value>(x, features, s, begin, end, epilogue, dst);
  multiply_tiles<1, kMany ? 4 : 2, Value>(x, features, s, begin, end, epilogue, dst);
}

}  // namespace

void FXSPARSE_NM(const float* x, int64_t features, const Chunks& s, int64_t begin, int64_t end, const Epilogue& epilogue,
                 const Matrix& dst) {
  with_values(s.scalar, [&](auto* v) {
    using Value = Stored<decltype(v)>;
    const int64_t fours = kBlockBytes / (4 * s.slots() * int64_t(sizeof(Value)) + 1), block = fours > 0 ? 4 * fours : 4;
    for (int64_t g = begin; g < end; g += block)
      multiply_block<Value>(x, features, s, g, least(end, g + block), epilogue, dst);
  });
}

}  // namespace fxsparse
