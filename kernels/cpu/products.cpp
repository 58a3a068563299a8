// The sparse products for one instruction set; compiled once per set, see build.py.
//
// Tokens are the vector dimension: activations are transposed into panels [features, vectors * W] that fit the L2
// cache, every nonzero is one broadcast against a panel row, and results are transposed back W rows at a time.
#include "block_rows.h"
#include "panels.h"
#include "planes.h"
#include "roof.h"
#include "rows.h"
#include "table.h"
#include "vec.h"

namespace fxsparse {
namespace {

// 64 tokens: 768 features of them are 192 KiB, 3,072 are 768 KiB.
constexpr int64_t kMostVectors = W == 16 ? 4 : 8;

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

// Where a panel is past L2: rows this many entries ahead are fetched, 0.5 to 0.7 of the time at 65,536 features.
constexpr int64_t kRowsAhead = 24;

template <int NV>
inline void fetch_row(const float* panel, int64_t index) {
#pragma GCC unroll 8
  for (int j = 0; j < NV; j++) __builtin_prefetch(panel + index * (NV * W) + j * W);
}

// Entries that lie kRowsAhead before the end of the rows < `end` or more; none where the panel is near.
inline int64_t fetched_entries(const Sparse& s, int64_t end) { return s.far ? row_begin(s, end) - kRowsAhead : 0; }

// sums [NV * W] = sum of value * panel row over the entries begin <= e < end; where kFar, kRowsAhead more have an index.
template <int NV, bool kFar, class Index, class Value>
inline void accumulate(const float* panel, const Value* values, const Index* index, int64_t begin, int64_t end,
                       float* sums) {
  constexpr int kSets = NV >= 8 ? 1 : 8 / NV;  // several sets of sums hide the latency of the additions
  V sum[kSets][NV] = {};
  int64_t e = begin;
  for (; e + kSets <= end; e += kSets) {
#pragma GCC unroll 8
    for (int s = 0; s < kSets; s++) {
      if constexpr (kFar) fetch_row<NV>(panel, index[e + s + kRowsAhead]);
      const float* row = panel + (int64_t)index[e + s] * (NV * W);
      const V value = splat_at(values + e + s);
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) sum[s][j] += value * load<V>(row + j * W);
    }
  }
  for (; e < end; e++) {
    if constexpr (kFar) fetch_row<NV>(panel, index[e + kRowsAhead]);
    const float* row = panel + (int64_t)index[e] * (NV * W);
    const V value = splat_at(values + e);
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

template <int NV, class Index, class Value>
void multiply_rows(const float* panel, const Sparse& s, int64_t begin, int64_t end, const Epilogue& epilogue,
                   const Matrix& dst, int64_t first) {
  constexpr int64_t kRows = 4 * W;  // so that a token gets four vectors in a row: fewer changes of page
  alignas(64) float block[kRows * NV * W];
  const bool streamed = is_streamed(dst, epilogue.rows);
  const int64_t fetched = fetched_entries(s, end);
  for (int64_t base = begin; base < end; base += kRows) {
    const int64_t stop = least(base + kRows, end);
    for (int64_t r = base; r < stop; r++) {
      const int64_t first_entry = row_begin(s, r), last = row_begin(s, r + 1);
      const auto* index = (const Index*)s.index;
      const auto* values = (const Value*)s.values;
      float* sums = block + (r - base) * NV * W;
      if (last <= fetched)
        accumulate<NV, true>(panel, values, index, first_entry, last, sums);
      else
        accumulate<NV, false>(panel, values, index, first_entry, last, sums);
    }
    finish_rows<NV>(block, base, stop, epilogue, dst, first, streamed);
  }
  if (streamed) stream_end();
}

template <int NV, class Value>
void multiply_values(const float* panel, const Sparse& s, int64_t begin, int64_t end, const Epilogue& epilogue,
                     const Matrix& dst, int64_t first) {
  if (s.index16) return multiply_rows<NV, int16_t, Value>(panel, s, begin, end, epilogue, dst, first);
  multiply_rows<NV, int32_t, Value>(panel, s, begin, end, epilogue, dst, first);
}

template <int NV>
void multiply_panel(const float* panel, const Sparse& s, int64_t begin, int64_t end, const Epilogue& epilogue,
                    const Matrix& dst, int64_t first) {
  with_values(s.scalar, [&](auto* v) {
    multiply_values<NV, Stored<decltype(v)>>(panel, s, begin, end, epilogue, dst, first);
  });
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
inline V sample_entry(const V* row, const float* gathered, const int32_t* index, bool far) {
  if (far) fetch_row<NV>(gathered, index[kRowsAhead]);
  const float* other = gathered + (int64_t)*index * (NV * W);
  V sum = row[0] * load<V>(other);
#pragma GCC unroll 8
  for (int j = 1; j < NV; j++) sum += row[j] * load<V>(other + j * W);
  return sum;
}

template <int NV>
void sample_rows(const float* rows_panel, const float* gathered, const Sparse& s, int64_t begin, int64_t end,
                 float* out) {
  const int32_t* index = (const int32_t*)s.index;
  const int64_t fetched = fetched_entries(s, end);
  for (int64_t r = begin; r < end; r++) {
    V row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) row[j] = load<V>(rows_panel + (r * NV + j) * W);
    const int64_t last = row_begin(s, r + 1);
    const bool far = last <= fetched;
    int64_t e = row_begin(s, r);
    for (; e + W <= last; e += W) {  // W entries at once, so that their sums of lanes are one tree of additions
      V sum[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) sum[i] = sample_entry<NV>(row, gathered, index + e + i, far);
      store(out + e, load<V>(out + e) + sum_each(sum));
    }
    if (e < last) {
      V sum[W] = {};
      for (int64_t i = 0; e + i < last; i++) sum[i] = sample_entry<NV>(row, gathered, index + e + i, far);
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

// x at four positions; one instruction that gathers W of them takes twice the time, also on the newest processors.
inline F4 four_of(const float* x, const int32_t* at) { return F4{x[at[0]], x[at[1]], x[at[2]], x[at[3]]}; }
inline F4 four_of(const float* x, const int16_t* at) {
  const uint64_t all = load<uint64_t>(at);  // one read for four positions, none of which is negative
  return F4{x[all & 0xffff], x[all >> 16 & 0xffff], x[all >> 32 & 0xffff], x[all >> 48]};
}

// sums[t] = sum of values * x over the entries begin <= e < end.
template <int T, class Index, class Value>
inline void add_row(const float* x, int64_t width, const Value* values, const Index* index, int64_t begin, int64_t end,
                    float* sums) {
  F4 sum[T][2] = {};
  int64_t e = begin;
  const auto add = [&](int64_t at, int set) {
    const F4 value = four_at(values + at);
#pragma GCC unroll 2
    for (int t = 0; t < T; t++) sum[t][set] += value * four_of(x + t * width, index + at);
  };
  for (; e + 16 <= end; e += 16)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) add(e + 4 * i, i % 2);
  for (; e + 4 <= end; e += 4) add(e, 0);
#pragma GCC unroll 2
  for (int t = 0; t < T; t++) {
    const F4 both = sum[t][0] + sum[t][1];
    sums[t] = (both[0] + both[1]) + (both[2] + both[3]);
  }
  for (; e < end; e++)
#pragma GCC unroll 2
    for (int t = 0; t < T; t++) sums[t] += float_at(values + e) * x[t * width + index[e]];
}

template <int T, class Index, class Value>
bool few_rows(const float* x, int64_t width, const Sparse& s, int64_t begin, int64_t end, const Epilogue& epilogue,
              const Matrix& dst) {
  constexpr int64_t kRows = 4 * W;
  const Index* index = (const Index*)s.index;
  for (int64_t base = begin; base < end; base += kRows) {
    const int64_t stop = least(base + kRows, end);
    alignas(64) float block[T][kRows];
    for (int64_t r = base; r < stop; r++) {
      const int64_t first = row_begin(s, r), last = row_begin(s, r + 1);
      if (last > first && index[last - 1] >= width) return false;  // columns ascend: the last one bounds all
      float sums[T];
      add_row<T>(x, width, (const Value*)s.values, index, first, last, sums);
      for (int t = 0; t < T; t++) block[t][r - base] = sums[t];
    }
    for (int64_t r = base; r < stop; r += W) {
      const int64_t count = least(W, stop - r);
      const V bias = bias_of(epilogue, r, count), scale = scale_of(epilogue, r, count);
      for (int t = 0; t < T; t++) {
        const V sum = load<V>(block[t] + r - base) * scale + bias;  // past the last row whatever is there
        write_rows(dst, t, r, finish(sum, epilogue, dst, t, r, count), count, epilogue.rows);
      }
    }
  }
  return true;
}

template <class Index, class Value>
bool few(const float* x, int64_t width, const Sparse& s, int64_t begin, int64_t end, const Epilogue& epilogue,
         const Matrix& dst) {
  if (dst.tokens == 1) return few_rows<1, Index, Value>(x, width, s, begin, end, epilogue, dst);
  return few_rows<2, Index, Value>(x, width, s, begin, end, epilogue, dst);
}

template <class Value>
bool few_values(const float* x, int64_t width, const Sparse& s, int64_t begin, int64_t end, const Epilogue& epilogue,
                const Matrix& dst) {
  if (s.index16) return few<int16_t, Value>(x, width, s, begin, end, epilogue, dst);
  return few<int32_t, Value>(x, width, s, begin, end, epilogue, dst);
}

bool multiply_few(const float* x, int64_t width, const Sparse& s, int64_t begin, int64_t end,
                  const Epilogue& epilogue, const Matrix& dst) {
  return with_values(s.scalar,
                     [&](auto* v) { return few_values<Stored<decltype(v)>>(x, width, s, begin, end, epilogue, dst); });
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

// sums [LANES, NV * W] of the rows `lane` onwards (of a group; LANES of them in one four) over all its bundles.
template <int NV, int LANES, class Value>
inline void accumulate_lanes(const float* panel, int64_t features, const Lookup& s, int64_t group, int lane,
                             float* sums) {
  V sum[LANES][NV] = {};
  // Within a bundle the bytes of four rows lie together, those of rows 16 apart next to them.
  const uint8_t* column = s.columns + s.starts[group] * int64_t(64) + lane % 16 / 4 * 16 + lane / 16 * 4 + lane % 4;
  const Value* values = (const Value*)s.values + s.starts[group] * int64_t(64) + lane;
  for (int64_t window = 0; window < s.windows; window++) {
    const int64_t base = window * kWindow, flip = window % 2 * kWindow;
    for (int n = s.counts[group * s.windows + window]; n > 0; n--, column += 64, values += 64) {
#pragma GCC unroll 4
      for (int l = 0; l < LANES; l++) {
        const int64_t used = column[l] >> 7;  // an empty slot reads the row of zeros after the features
        const int64_t at = used ? ((column[l] ^ flip) & 127) + base : features;
        const V value = splat_at(values + l);
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) sum[l][j] += value * load<V>(panel + at * (NV * W) + j * W);
      }
    }
  }
#pragma GCC unroll 4
  for (int l = 0; l < LANES; l++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) store(sums + (l * NV + j) * W, sum[l][j]);
}

template <int NV, class Value>
void multiply_groups(const float* panel, int64_t features, const Lookup& s, int64_t begin, int64_t end,
                     const Epilogue& epilogue, const Matrix& dst, int64_t first) {
  constexpr int kLanes = NV * 4 <= W ? 4 : 1;  // their sums stay in registers, of which there are 2 W
  alignas(64) float block[kGroup * NV * W];
  for (int64_t g = begin; g < end; g++) {
    for (int lane = 0; lane < kGroup; lane += kLanes)
      accumulate_lanes<NV, kLanes, Value>(panel, features, s, g, lane, block + lane * NV * W);
    finish_rows<NV>(block, g * kGroup, least((g + 1) * kGroup, s.rows), epilogue, dst, first, false);
  }
}

template <int NV>
void multiply_lookup_panel(const float* panel, int64_t features, const Lookup& s, int64_t begin, int64_t end,
                           const Epilogue& epilogue, const Matrix& dst, int64_t first) {
  with_values(s.scalar, [&](auto* v) {
    multiply_groups<NV, Stored<decltype(v)>>(panel, features, s, begin, end, epilogue, dst, first);
  });
}

void multiply_lookup(const float* panel, int64_t features, int64_t vectors, const Lookup& s, int64_t begin,
                     int64_t end, const Epilogue& epilogue, const Matrix& dst, int64_t first) {
  switch (vectors) {
    case 1: return multiply_lookup_panel<1>(panel, features, s, begin, end, epilogue, dst, first);
    case 2: return multiply_lookup_panel<2>(panel, features, s, begin, end, epilogue, dst, first);
    case 4: return multiply_lookup_panel<4>(panel, features, s, begin, end, epilogue, dst, first);
    default: return multiply_lookup_panel<8>(panel, features, s, begin, end, epilogue, dst, first);
  }
}

// sums [NV * W] += the entries of one row in one stripe.
template <int NV, class Value>
inline void add_segment(const float* panel, const Value* values, const uint8_t* columns, int64_t count, float* sums) {
  constexpr int kSets = NV == 1 ? 4 : NV == 8 ? 1 : 2;  // hide the latency of the additions: 0.95 of the time at NV = 4
  V sum[kSets][NV] = {};
#pragma GCC unroll 8
  for (int j = 0; j < NV; j++) sum[0][j] = load<V>(sums + j * W);
  int64_t e = 0;
  const auto add = [&](int s, int64_t column) {
    const float* row = panel + column * (NV * W);
    const V value = splat_at(values + e);
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) sum[s][j] += value * load<V>(row + j * W);
    e++;
  };
  while (e + 4 <= count) {
    uint32_t four;  // columns in one load: with a load for each it took 1.1 of the time
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first column is the lowest byte");
    __builtin_memcpy(&four, columns + e, sizeof four);
#pragma GCC unroll 4
    for (int s = 0; s < 4; s++, four >>= 8) add(s % kSets, four & 255);
  }
  while (e < count) add(0, columns[e]);
#pragma GCC unroll 8
  for (int j = 0; j < NV; j++) {
#pragma GCC unroll 4
    for (int s = 1; s < kSets; s++) sum[0][j] += sum[s][j];
    store(sums + j * W, sum[0][j]);
  }
}

template <int NV, class Value>
void multiply_chunks(const float* panel, const Striped& s, int64_t begin, int64_t end, const Epilogue& epilogue,
                     const Matrix& dst, int64_t first) {
  alignas(64) float sums[kChunk * NV * W];
  const bool streamed = is_streamed(dst, epilogue.rows);
  for (int64_t chunk = begin; chunk < end; chunk++) {
    const int64_t base = chunk * kChunk, stop = least(base + kChunk, s.out);
    __builtin_memset(sums, 0, (stop - base + W - 1) / W * W * NV * W * sizeof(float));
    for (int64_t stripe = 0; stripe < s.stripes; stripe++) {
      const int32_t* tile = s.starts + 2 * (chunk * s.stripes + stripe);
      const float* rows = panel + stripe * kStripe * NV * W;
      int64_t e = tile[1];
      for (int64_t i = tile[0]; i < tile[2]; e += s.lengths[i], i++)
        add_segment<NV>(rows, (const Value*)s.values + e, s.columns + e, s.lengths[i], sums + s.rows[i] * (NV * W));
    }
    finish_rows<NV>(sums, base, stop, epilogue, dst, first, streamed);
  }
  if (streamed) stream_end();
}

template <int NV>
void multiply_striped_panel(const float* panel, const Striped& s, int64_t begin, int64_t end, const Epilogue& epilogue,
                            const Matrix& dst, int64_t first) {
  with_values(s.scalar, [&](auto* v) {
    multiply_chunks<NV, Stored<decltype(v)>>(panel, s, begin, end, epilogue, dst, first);
  });
}

void multiply_striped(const float* panel, int64_t vectors, const Striped& s, int64_t begin, int64_t end,
                      const Epilogue& epilogue, const Matrix& dst, int64_t first) {
  switch (vectors) {
    case 1: return multiply_striped_panel<1>(panel, s, begin, end, epilogue, dst, first);
    case 2: return multiply_striped_panel<2>(panel, s, begin, end, epilogue, dst, first);
    case 3: return multiply_striped_panel<3>(panel, s, begin, end, epilogue, dst, first);
    case 4: return multiply_striped_panel<4>(panel, s, begin, end, epilogue, dst, first);
    default: return multiply_striped_panel<8>(panel, s, begin, end, epilogue, dst, first);
  }
}

// Values of fp32 or bfloat16, and inputs of fp32.
template <class Value>
struct Multiply {
  static constexpr int64_t kColumns = 1;  // of a row of the panel
  // sum [ROWS, NV] += the rows `row` onwards of block e.
  template <int NV, int ROWS>
  static inline void add(const float* panel, const Blocks& s, int64_t e, int64_t row, V (*sum)[NV]) {
    const int64_t paired = s.paired ? 2 : 1;
    const Value* values = (const Value*)s.values + e * s.height * s.width + row * paired;
    const float* inputs = panel + s.columns[e] * s.width * (NV * W);
    for (int64_t c = 0; c < s.width; c += paired, values += paired * s.height) {
      for (int64_t p = 0; p < paired; p++, inputs += NV * W) {
        V x[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) x[j] = load<V>(inputs + j * W);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
          const V value = splat_at(values + r * paired + p);
#pragma GCC unroll 8
          for (int j = 0; j < NV; j++) sum[r][j] += value * x[j];
        }
      }
    }
  }
};

void multiply_blocks(const float* panel, int64_t vectors, const Blocks& s, int64_t begin, int64_t end,
                     const Epilogue& epilogue, const Matrix& dst, int64_t first) {
  if (s.scalar == Scalar::f32)
    return multiply_block_rows<Multiply<float>>(panel, vectors, s, begin, end, epilogue, dst, first);
  multiply_block_rows<Multiply<uint16_t>>(panel, vectors, s, begin, end, epilogue, dst, first);
}

void fill(const Epilogue& epilogue, const int32_t* rows, int64_t count, const Matrix& dst) {
  for (int64_t r = 0; r < count; r += W) {
    const int64_t lanes = least(W, count - r);
    const Epilogue here{epilogue.bias, epilogue.activation, rows, epilogue.residual};
    const V bias = bias_of(here, r, lanes);
    for (int64_t t = 0; t < dst.tokens; t++) write_rows(dst, t, r, finish(bias, here, dst, t, r, lanes), lanes, rows);
  }
}

}  // namespace

const Table& FXSPARSE_TABLE() {
  static const Table table = {W,            kMostVectors, transpose,       multiply, sample,
                              multiply_few, add_rows,     multiply_lookup, multiply_striped,
                              multiply_blocks, fill,      add_shifted,     dot_shifted,
                              multiply_adds, read_all};
  return table;
}

}  // namespace fxsparse
