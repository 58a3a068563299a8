// Products with N:M and strided weights for one instruction set: 16 inputs lie in a register, and one permutation of it fetches the
// input of an entry for each of 16 rows.  Sums of a few tokens and rows stay in registers; nothing is transposed.
#include "nm.h"
#include "rows.h"
#include "vec.h"

namespace fxsparse {
namespace {

constexpr int kParts = kChunk16 / W;        // vectors of 16 floats
constexpr int64_t kBlockBytes = 256 << 10;  // of values, which stay in L2 while the tokens pass
constexpr int64_t kInputBytes = 24 << 10;   // of a tile of several tokens, which stay in L1 while groups of rows pass
constexpr int64_t kMostGroups = 32;         // whose sums are kept while other inputs take their turn,
constexpr int64_t kMostTiles = 8;           // each for so many tiles

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

// sums[t, g, row] += the products of TOKENS tokens with GROUPS groups of rows in the runs begin <= r < end; those before
// `begin` are there.
template <int TOKENS, int GROUPS, class Value>
inline void sum_runs(const float* x, const Chunks& s, int64_t group, int64_t begin, int64_t end, float* sums) {
  const int64_t stride = s.runs * kChunk16;
  const uint32_t* places = s.places + group * stride;
  const Value* values = (const Value*)s.values + group * s.slots() + begin * s.run * s.steps * kChunk16;
  Entries<GROUPS, Value> entries{values, s.slots(), s.steps, {}};
  V sum[TOKENS][GROUPS][kParts] = {};
  const auto each = [&](const auto& f) {
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
      for (int g = 0; g < GROUPS; g++)
#pragma GCC unroll 4
        for (int k = 0; k < kParts; k++) f(sums + (t * GROUPS + g) * kChunk16 + k * W, sum[t][g][k]);
  };
  if (begin > 0) each([](const float* from, V& v) { v = load<V>(from); });
  for (int64_t chunk = begin * s.run, run = begin; run < end; run++) {
    entries.start_run(places + run * kChunk16, stride);
    for (const int64_t last = least(chunk + s.run, s.chunks); chunk < last; chunk++)
      add_chunk<TOKENS, GROUPS, Value>(x + chunk * kChunk16, s.width(), entries, sum);
  }
  each([](float* to, V& v) { store(to, v); });
}

template <int TOKENS, int GROUPS>
void write_tile(const float* sums, int64_t token, const Chunks& s, int64_t group, const Epilogue& epilogue,
                const Matrix& dst) {
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

// Runs whose inputs of `tokens` tokens stay in L1; one token reads them where they are.
inline int64_t runs_in_l1(int64_t tokens, const Chunks& s) {
  const int64_t fit = kInputBytes / (s.run * kChunk16 * 4 * tokens);
  return tokens == 1 || fit < 1 ? s.runs : least(s.runs, fit);
}

// All tokens with the groups begin <= g < end.  Where the inputs of a tile do not fit L1 at once these are at most
// kMostGroups, and some tiles take turns: so neither values nor inputs leave L2 before all have used them.
template <int TOKENS, int GROUPS, class Value>
void multiply_tiles(const float* x, const Chunks& s, int64_t begin, int64_t end, const Epilogue& epilogue,
                    const Matrix& dst) {
  constexpr int64_t kGroup = TOKENS * kChunk16;
  alignas(64) float sums[kMostTiles * kMostGroups * kGroup];
  const int64_t span = runs_in_l1(TOKENS, s), tiles = (dst.tokens + TOKENS - 1) / TOKENS;
  const bool whole = span >= s.runs;
  for (int64_t batch = 0; batch < tiles; batch += kMostTiles) {
    int64_t first = 0, last;
    do {
      last = least(s.runs, first + span);
      for (int64_t i = batch; i < least(tiles, batch + kMostTiles); i++) {
        const int64_t token = least(i * TOKENS, dst.tokens - TOKENS);  // the last tile overlaps the one before
        const auto add = [&](auto groups, int64_t g) {
          constexpr int kGroups = decltype(groups)::value;
          float* own = sums + (whole ? 0 : ((i - batch) * kMostGroups + g - begin) * kGroup);
          sum_runs<TOKENS, kGroups, Value>(x + token * s.width(), s, g, first, last, own);
          if (last == s.runs) write_tile<TOKENS, kGroups>(own, token, s, g, epilogue, dst);
        };
        int64_t g = begin;
        for (; g + GROUPS <= end; g += GROUPS) add(std::integral_constant<int, GROUPS>{}, g);
        for (; g < end; g++) add(std::integral_constant<int, 1>{}, g);
      }
    } while ((first = last) < s.runs);
  }
}

constexpr bool kMany = W == 16;  // registers

int64_t height_of(int64_t tokens) { return kMany && tokens >= 8 ? 8 : tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1; }

template <class Value>
void multiply_block(const float* x, const Chunks& s, int64_t begin, int64_t end, const Epilogue& epilogue,
                    const Matrix& dst) {
  switch (height_of(dst.tokens)) {
    case 8: return multiply_tiles<kMany ? 8 : 1, kMany ? 2 : 1, Value>(x, s, begin, end, epilogue, dst);
    case 4: return multiply_tiles<4, kMany ? 4 : 1, Value>(x, s, begin, end, epilogue, dst);
    case 2: return multiply_tiles<2, kMany ? 4 : 1, Value>(x, s, begin, end, epilogue, dst);
    default: multiply_tiles<1, kMany ? 4 : 2, Value>(x, s, begin, end, epilogue, dst);
  }
}

void multiply(const float* x, const Chunks& s, int64_t begin, int64_t end, const Epilogue& epilogue, const Matrix& dst) {
  with_values(s.scalar, [&](auto* v) {
    using Value = Stored<decltype(v)>;
    const int64_t span = runs_in_l1(height_of(dst.tokens), s);
    const int64_t fours = kBlockBytes / (4 * span * s.run * s.steps * kChunk16 * int64_t(sizeof(Value)) + 1);
    const int64_t block = least(fours > 0 ? 4 * fours : 4, span < s.runs ? kMostGroups : s.groups);
    for (int64_t g = begin; g < end; g += block)
      multiply_block<Value>(x, s, g, least(end, g + block), epilogue, dst);
  });
}

// Where the inputs of the 16 places of a chunk come from.
struct Places {
  int64_t band[kChunk16], offset[kChunk16];  // which band of groups, and the first of its stride
  int64_t groups, bands;

  Places(int64_t features, int64_t strides) : groups(features / strides), bands(kChunk16 / strides) {
    for (int64_t i = 0; i < kChunk16; i++) band[i] = i / strides, offset[i] = i % strides * groups;
  }
};

// The chunks of a token: the next 16 * bands groups make 16 chunks (the last groups fewer); chunk j has the groups j of
// every band.  So what is read is contiguous, and a transposition of 16 x 16 makes 16 chunks of it.
inline void arrange_token(const float* x, const Places& p, float* to) {
  for (int64_t g = 0, many; g < p.groups; g += many * p.bands, to += many * kChunk16) {
    many = least(kChunk16, (p.groups - g + p.bands - 1) / p.bands);
    for (int64_t place = 0; place < kChunk16; place += W)
      for (int64_t chunk = 0; chunk < many; chunk += W) {
        V v[W];
        for (int k = 0; k < W; k++) {
          const int64_t band = p.band[place + k], group = g + band * many + chunk;
          const int64_t count = band < p.bands ? least(W, p.groups - group) : 0;
          const float* from = x + p.offset[place + k] + group;
          v[k] = V{};
          if (count >= W) v[k] = load<V>(from);
          else if (count > 0) __builtin_memcpy(&v[k], from, count * 4);
        }
        transpose_block(v);
        for (int64_t k = 0; k < least(W, many - chunk); k++) store(to + (chunk + k) * kChunk16 + place, v[k]);
      }
  }
}

void arrange(const float* x, int64_t features, int64_t strides, int64_t begin, int64_t end, int64_t chunks, float* to) {
  const Places places(features, strides);
  for (int64_t t = begin; t < end; t++) arrange_token(x + t * features, places, to + t * chunks * kChunk16);
}

}  // namespace

const NmTable& FXSPARSE_NM() {
  static const NmTable table{&arrange, &multiply};
  return table;
}

}  // namespace fxsparse
