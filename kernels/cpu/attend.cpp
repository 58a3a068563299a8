// Attention of one head for one instruction set; compiled once per set, see build.py.
//
// Both products are of a few rows with panels [depth, kVectors * W]: kRows * kVectors sums stay in registers, and every
// panel row that is loaded serves kRows of them.  Keys are copied transposed, values as they are, once a head; scores of
// kRows queries with all keys stay in L1 between the products.
#include "attend.h"

#include <cmath>
#include <limits>

#include "rows.h"
#include "vec.h"

namespace fxsparse {
namespace {

constexpr int kRows = 6;
constexpr int kVectors = W == 16 ? 4 : 2;
constexpr int64_t kWidth = kVectors * W;
constexpr float kNone = -std::numeric_limits<float>::infinity();

inline int64_t whole(int64_t count) { return (count + W - 1) / W * W; }

// Where things lie in scratch memory, all of them whole vectors.
struct Places {
  float *keys, *values, *scores, *sums;
};

Places places(const Head& h, float* scratch) {
  float* values = scratch + whole(h.keys) * h.features;
  float* scores = values + whole(h.value_features) * h.keys;
  return {scratch, values, scores, scores + kRows * whole(h.keys)};
}

int64_t scratch_floats(int64_t keys, int64_t features, int64_t value_features) {
  return whole(keys) * (features + kRows) + whole(value_features) * (keys + kRows);
}

// ---- panels

// Transposed keys: panel p holds keys p * kWidth onwards, [features, its keys], zeros past the last.
void pack_keys(const Head& h, float* to) {
  for (int64_t first = 0; first < h.keys; first += kWidth) {
    const int64_t width = whole(least(kWidth, h.keys - first));
    for (int64_t j = 0; j < width; j += W) {
      const float* from = h.k + (first + j) * h.k_row;
      const int64_t count = least(W, h.keys - first - j);
      for (int64_t d = 0; d < h.features; d += W) {
        V block[W];
        const int64_t lanes = least(W, h.features - d);
        for (int64_t i = 0; i < W; i++) {
          block[i] = V{};
          if (i >= count) continue;
          if (lanes == W) block[i] = load<V>(from + i * h.k_row + d);
          else __builtin_memcpy(&block[i], from + i * h.k_row + d, lanes * 4);
        }
        transpose_block(block);
        for (int64_t i = 0; i < lanes; i++) store(to + (d + i) * width + j, block[i]);
      }
    }
    to += width * h.features;
  }
}

// Values: panel p holds features p * kWidth onwards, [keys, its features], zeros past the last.
void pack_values(const Head& h, float* to) {
  for (int64_t first = 0; first < h.value_features; first += kWidth) {
    const int64_t count = least(kWidth, h.value_features - first), width = whole(count);
    for (int64_t j = 0; j < h.keys; j++, to += width) {
      const float* from = h.v + j * h.v_row + first;
      for (int64_t d = 0; d < count; d++) to[d] = from[d];
      for (int64_t d = count; d < width; d++) to[d] = 0.0f;
    }
  }
}

void prepare(const Head& h, float* scratch) {
  const Places at = places(h, scratch);
  pack_keys(h, at.keys);
  pack_values(h, at.values);
}

// ---- products

// c[r, 0 .. NV * W] = sum of a[r, d] * panel[d] over d < depth.
template <int R, int NV>
void product_of(const float* a, int64_t a_row, const float* panel, int64_t depth, float* c, int64_t c_row) {
  V sums[R][NV] = {};
  for (int64_t d = 0; d < depth; d++, panel += NV * W) {
    V row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) row[j] = load<V>(panel + j * W);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      const V factor = splat(a[r * a_row + d]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) sums[r][j] += factor * row[j];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) store(c + r * c_row + j * W, sums[r][j]);
}

using Product = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t);

template <int R, int... I>
Product with_vectors(int64_t vectors, std::integer_sequence<int, I...>) {
  static constexpr Product known[] = {product_of<R, I + 1>...};
  return known[vectors - 1];
}

template <int... I>
Product with_rows(int64_t rows, int64_t vectors, std::integer_sequence<int, I...>) {
  using Find = Product (*)(int64_t, std::make_integer_sequence<int, kVectors>);
  static constexpr Find known[] = {with_vectors<I + 1>...};
  return known[rows - 1](vectors, {});
}

// c [rows, whole(columns)] = a [rows, depth] times panels of `stored` rows, of which the first `depth` count.
void product(const float* a, int64_t a_row, int64_t rows, const float* panels, int64_t stored, int64_t depth,
             int64_t columns, float* c, int64_t c_row, int64_t all_columns) {
  for (int64_t first = 0; first < columns; first += kWidth) {
    const int64_t width = whole(least(kWidth, all_columns - first));
    with_rows(rows, width / W, std::make_integer_sequence<int, kRows>{})(a, a_row, panels, depth, c + first, c_row);
    panels += width * stored;
  }
}

// ---- softmax

inline V larger(V a, V b) { return select(a > b, a, b); }

// Every lane the largest, or the sum, of all lanes.
template <int D = 1>
inline V largest(V v) {
  v = larger(lo<D>(v, v, Lanes{}), hi<D>(v, v, Lanes{}));
  if constexpr (2 * D < W) return largest<2 * D>(v);
  return v;
}

template <int D = 1>
inline V total(V v) {
  v = lo<D>(v, v, Lanes{}) + hi<D>(v, v, Lanes{});
  if constexpr (2 * D < W) return total<2 * D>(v);
  return v;
}

// s[j] = s[j] * scale with the mask, for j < count.
void scale_row(const Head& h, int64_t query, float* s, int64_t count) {
  const float scale = h.scale;
  const int64_t step = h.mask_column;
  if (!h.mask) {
    for (int64_t j = 0; j < count; j++) s[j] *= scale;
  } else if (h.mask_is_bool) {
    const auto* seen = static_cast<const uint8_t*>(h.mask) + query * h.mask_row;
    for (int64_t j = 0; j < count; j++) s[j] = seen[j * step] ? s[j] * scale : kNone;
  } else {
    const auto* added = static_cast<const float*>(h.mask) + query * h.mask_row;
    if (step == 1)
      for (int64_t j = 0; j < count; j++) s[j] = s[j] * scale + added[j];
    else
      for (int64_t j = 0; j < count; j++) s[j] = s[j] * scale + added[j * step];
  }
}

// What a row without a finite score is multiplied by: NaN where it has one, or an infinite one, else 0.
float unseen(float* s, int64_t end) {
  float sum = 0.0f;
  for (int64_t j = 0; j < end; j++) {
    sum += s[j] == kNone ? 0.0f : s[j] - s[j];
    s[j] = 0.0f;
  }
  return sum;
}

// s[j] = exp(s[j] - largest) for j < count, 0 up to `end`; returns what the row's sums are to be multiplied by.
float soften(float* s, int64_t count, int64_t end) {
  for (int64_t j = count; j < whole(end); j++) s[j] = kNone;
  V most = splat(kNone);
  for (int64_t j = 0; j < end; j += W) most = larger(load<V>(s + j), most);  // passes NaN over: they come through below
  const V top = largest(most);
  if (top[0] == kNone) return unseen(s, end);
  V sum{};
  for (int64_t j = 0; j < end; j += W) {
    const V v = load<V>(s + j) - top;
    const V e = select(v < splat(-87.0f), V{}, exponential(v));
    store(s + j, e);
    sum += e;
  }
  return 1.0f / total(sum)[0];
}

void attend(const Head& h, int64_t begin, int64_t end, float* scratch) {
  const Places at = places(h, scratch);
  const int64_t stride = whole(h.keys), wide = whole(h.value_features);
  for (int64_t i = begin; i < end; i += kRows) {
    const int64_t rows = least(kRows, end - i), seen = h.causal ? least(h.keys, i + rows) : h.keys;
    product(h.q + i * h.q_row, h.q_row, rows, at.keys, h.features, h.features, seen, at.scores, stride, h.keys);
    float factors[kRows];
    for (int64_t r = 0; r < rows; r++) {
      const int64_t count = h.causal ? least(h.keys, i + r + 1) : h.keys;
      scale_row(h, i + r, at.scores + r * stride, count);
      factors[r] = soften(at.scores + r * stride, count, seen);
    }
    product(at.scores, stride, rows, at.values, h.keys, seen, h.value_features, at.sums, wide, h.value_features);
    for (int64_t r = 0; r < rows; r++) {
      float* y = h.y + (i + r) * h.y_row;
      for (int64_t d = 0; d < h.value_features; d++) y[d] = at.sums[r * wide + d] * factors[r];
    }
  }
}

}  // namespace

const AttendTable& FXSPARSE_ATTEND() {
  static const AttendTable table = {scratch_floats, prepare, attend};
  return table;
}

}  // namespace fxsparse
