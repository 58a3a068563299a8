// Images whose lanes are samples, for one instruction set; compiled once per set, see build.py.
//
// Every pixel is a cache line, so no vector is cut by the end of a row or by a shift, and a tile holds one copy of each pixel
// whatever number of taps read it: a panel of a few channels is about as large as L1, where one of patches would not fit L2.
#include "lanes.h"

#include "vec.h"

namespace fxsparse {
namespace {

constexpr int kParts = kLine / W;                           // vectors of a line
constexpr int kMostPixels = W == 16 ? 8 : W == 8 ? 6 : 3;  // of a row of a tile
constexpr int kMostRows = W == 16 ? 2 : 1;                 // with one vector for the value and one to spare
constexpr int kAhead = 3;                                  // rows that results are fetched ahead
constexpr int kIntoL2 = 2;                                 // a hint: what is read after a tile finds no room in L1
constexpr int kDenseRows = W == 16 ? 3 : 1;                // of a dense weight that share every pixel

using Pixels = std::make_integer_sequence<int, kMostPixels>;

// f(integral constant of pixels).
template <class F, int... I>
inline void with_pixels(int64_t pixels, const F& f, std::integer_sequence<int, I...>) {
  ((pixels == I + 1 ? f(std::integral_constant<int, I + 1>{}) : void()), ...);
}

inline void copy_line(const float* from, float* to) {
#pragma GCC unroll 4
  for (int k = 0; k < kParts; k++) store(to + k * W, load<V>(from + k * W));
}

inline void permute_line(const float* from, const Permutation& p, float padding, float* to) {
#if defined(__AVX512F__)
  const __m512i index = _mm512_loadu_si512(p.sources);
  const __mmask16 inside = _mm512_cmpge_epi32_mask(index, _mm512_setzero_si512());
  _mm512_storeu_ps(to, _mm512_mask_permutexvar_ps(_mm512_set1_ps(padding), inside, index, _mm512_loadu_ps(from)));
#else
  for (int i = 0; i < kLine; i++) to[i] = p.sources[i] < 0 ? padding : from[p.sources[i]];
#endif
}

void fill(const float* planes, int64_t plane, int64_t channels, const LinePlan& plan, float* panel) {
  for (int64_t c = 0; c < channels; c++, planes += plane)
    for (int64_t l = 0; l < plan.count; l++, panel += kLine) {
      const LineSource& source = plan.lines[l];
      if (source.lanes == 0)
        copy_line(planes + source.at, panel);
      else
        permute_line(planes + source.at, plan.permutations[source.lanes], plan.padding, panel);
    }
}

// What follows the sums of a row.  Relu is a floor of 0, none one of -inf, and relu6 has a ceiling, so that these need no
// branch: of rows with six entries the branches took a fifth of the time.
struct Plain {
  explicit Plain(const LineResults& to)
      : floor(splat(to.activation ? 0.0f : -__builtin_inff())), ceiling(splat(to.activation == 5 ? 6.0f : __builtin_inff())) {}
  static bool suits(const LineResults& to) { return to.activation <= 1 || to.activation == 5; }
  V operator()(V v) const {
    v = select(v < floor, floor, v);
    return select(v > ceiling, ceiling, v);
  }
  V floor, ceiling;
};

struct Any {
  explicit Any(const LineResults& to) : activation(to.activation) {}
  V operator()(V v) const { return activate(v, activation); }
  int64_t activation;
};

template <int ROWS, int RUN>
inline void add_entries(const char* panel, int64_t pitch, const LineRows& w, int64_t row, V* sum) {
  const float* values = w.values;
  const uint32_t* places = w.places;
  const int64_t last = w.start[row + 1];
  for (int64_t e = w.start[row]; e < last; e++) {
    const char* line = panel + places[e];
    const V value = splat(values[e]);
#pragma GCC unroll 2
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
      for (int j = 0; j < RUN; j++) sum[i * RUN + j] += value * load<V>(line + i * pitch + j * sizeof(V));
  }
}

// sums[i] begin as the bias of a row, or 0, where `first`, else as they were left.
template <int COUNT>
inline void begin_sums(const float* kept, bool first, const float* bias, int64_t row, V* sum) {
  if (first) {
    const V start = splat(bias ? bias[row] : 0.0f);
#pragma GCC unroll 16
    for (int j = 0; j < COUNT; j++) sum[j] = start;
  } else {
#pragma GCC unroll 16
    for (int j = 0; j < COUNT; j++) sum[j] = load<V>(kept + j * W);
  }
}

// RUN results at y, with a residual where there is one.
template <int RUN, class Finish>
inline void give(const V* sum, const float* residual, float* y, const Finish& finish) {
#pragma GCC unroll 16
  for (int j = 0; j < RUN; j++) {
    V v = sum[j];
    if (residual) v += load<V>(residual + j * W);
    store(y + j * W, finish(v));
  }
}

// The lines of the next rows' residual and results, which lie planes apart where no prefetcher of the CPU finds them.
template <int RUN>
inline void prefetch_results(const LineResults& to, int64_t row) {
#pragma GCC unroll 16
  for (int j = 0; j < RUN; j += kParts) {
    if (to.residual) __builtin_prefetch(to.residual + row * to.row_stride + j * W);
    __builtin_prefetch(to.y + row * to.row_stride + j * W, 1);
  }
}

// RUN vectors in each of ROWS rows of the output.
template <int ROWS, int RUN, class Finish>
void multiply_tile(const LineTile& tile, const LineRows& w, int64_t begin, int64_t end, float* sums, bool first,
                   const float* bias, const LineResults* to, const Finish& finish) {
  const char* panel = reinterpret_cast<const char*>(tile.panel);
  const int64_t pitch = tile.pitch;
  const LineResults results = to ? *to : LineResults{};
  const int64_t each = tile.ahead ? (tile.channels + end - begin - 1) / (end - begin) : 0;
  int64_t channel = 0;
  for (int64_t r = begin; r < end; r++, sums += ROWS * RUN * W) {
    V sum[ROWS * RUN];
    for (int64_t c = 0; c < each && channel < tile.channels; c++, channel++)
#pragma GCC unroll 16
      for (int j = 0; j < RUN; j += kParts) __builtin_prefetch(tile.ahead + channel * tile.plane + j * W, 0, kIntoL2);
    if (results.y && r + kAhead < end) {
#pragma GCC unroll 2
      for (int i = 0; i < ROWS; i++)
        prefetch_results<RUN>({results.y + i * results.pitch, results.residual ? results.residual + i * results.pitch : nullptr,
                               results.row_stride, 0, 0}, r + kAhead);
    }
    begin_sums<ROWS * RUN>(sums, first, bias, r, sum);
    add_entries<ROWS, RUN>(panel, pitch, w, r, sum);
    if (!results.y) {
#pragma GCC unroll 16
      for (int j = 0; j < ROWS * RUN; j++) store(sums + j * W, sum[j]);
      continue;
    }
#pragma GCC unroll 2
    for (int i = 0; i < ROWS; i++) {
      const int64_t at = r * results.row_stride + i * results.pitch;
      if (results.residual)
        give<RUN>(sum + i * RUN, results.residual + at, results.y + at, finish);
      else
        give<RUN>(sum + i * RUN, nullptr, results.y + at, finish);
    }
  }
}

template <int ROWS>
void multiply_rows(const LineTile& tile, const LineRows& w, int64_t begin, int64_t end, float* sums, bool first,
                   const float* bias, const LineResults* to) {
  with_pixels(
      tile.pixels,
      [&](auto n) {
        constexpr int kRun = n.value * kParts;
        if (!to || Plain::suits(*to))
          multiply_tile<ROWS, kRun>(tile, w, begin, end, sums, first, bias, to, Plain(to ? *to : LineResults{}));
        else
          multiply_tile<ROWS, kRun>(tile, w, begin, end, sums, first, bias, to, Any(*to));
      },
      Pixels{});
}

void multiply(const LineTile& tile, const LineRows& w, int64_t begin, int64_t end, float* sums, bool first,
              const float* bias, const LineResults* to) {
  if constexpr (kMostRows > 1)
    if (tile.rows > 1) return multiply_rows<kMostRows>(tile, w, begin, end, sums, first, bias, to);
  multiply_rows<1>(tile, w, begin, end, sums, first, bias, to);
}

// RUN vectors of ROWS rows of a dense weight, from `begin` on.
template <int ROWS, int RUN, class Finish>
inline void product_rows(const LineTile& tile, const DenseRows& w, int64_t begin, float* sums, bool first,
                         const float* bias, const LineResults* to, const Finish& finish) {
  const char* panel = reinterpret_cast<const char*>(tile.panel);
  V sum[ROWS][RUN];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; i++) begin_sums<RUN>(sums + i * RUN * W, first, bias, begin + i, sum[i]);
  const float* values = w.values + begin * w.stride;
  for (int64_t e = 0; e < w.count; e++) {
    const char* line = panel + w.places[e];
    V value[ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) value[i] = splat(values[i * w.stride + e]);
#pragma GCC unroll 16
    for (int j = 0; j < RUN; j++) {
      const V pixel = load<V>(line + j * sizeof(V));
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; i++) sum[i][j] += value[i] * pixel;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; i++) {
    if (to) {
      const int64_t at = (begin + i) * to->row_stride;
      give<RUN>(sum[i], to->residual ? to->residual + at : nullptr, to->y + at, finish);
    } else {
#pragma GCC unroll 16
      for (int j = 0; j < RUN; j++) store(sums + (i * RUN + j) * W, sum[i][j]);
    }
  }
}

template <int RUN, class Finish>
void product_tile(const LineTile& tile, const DenseRows& w, int64_t begin, int64_t end, float* sums, bool first,
                  const float* bias, const LineResults* to, const Finish& finish) {
  int64_t r = begin;
  for (; r + kDenseRows <= end; r += kDenseRows)
    product_rows<kDenseRows, RUN>(tile, w, r, sums + (r - begin) * RUN * W, first, bias, to, finish);
  for (; r < end; r++) product_rows<1, RUN>(tile, w, r, sums + (r - begin) * RUN * W, first, bias, to, finish);
}

void product(const LineTile& tile, const DenseRows& w, int64_t begin, int64_t end, float* sums, bool first,
             const float* bias, const LineResults* to) {
  with_pixels(
      tile.pixels,
      [&](auto n) {
        constexpr int kRun = n.value * kParts;
        if (!to || Plain::suits(*to))
          product_tile<kRun>(tile, w, begin, end, sums, first, bias, to, Plain(to ? *to : LineResults{}));
        else
          product_tile<kRun>(tile, w, begin, end, sums, first, bias, to, Any(*to));
      },
      Pixels{});
}

template <int RUN, class Finish>
void filter_tile(const LineTile& tile, int64_t lines, const DenseRows& w, int64_t begin, int64_t end, const float* bias,
                 const LineResults& to, const Finish& finish) {
  const float* panel = tile.panel;
  for (int64_t r = begin; r < end; r++, panel += lines * kLine)
    product_rows<1, RUN>({panel, 1, tile.pixels, 0, nullptr, 0, 0}, w, r, nullptr, true, bias, &to, finish);
}

void filter(const LineTile& tile, int64_t lines, const DenseRows& w, int64_t begin, int64_t end, const float* bias,
            const LineResults& to) {
  with_pixels(
      tile.pixels,
      [&](auto n) {
        constexpr int kRun = n.value * kParts;
        if (Plain::suits(to))
          filter_tile<kRun>(tile, lines, w, begin, end, bias, to, Plain(to));
        else
          filter_tile<kRun>(tile, lines, w, begin, end, bias, to, Any(to));
      },
      Pixels{});
}

// The larger one, NaN where either is NaN, as torch has it.
inline V larger(V a, V b) { return select((a > b) | (a != a), a, b); }

void largest(const float* panel, const uint32_t* places, int64_t taps, int64_t pixels, float* y) {
  for (int64_t i = 0; i < pixels * kLine; i += W) {
    const char* at = reinterpret_cast<const char*>(panel + i);
    V most = load<V>(at + places[0]);
    for (int64_t t = 1; t < taps; t++) most = larger(load<V>(at + places[t]), most);
    store(y + i, most);
  }
}

template <int COUNT>
void join_lines(const float* const* units, const Permutation* lanes, int64_t lines, float* to) {
  for (int64_t i = 0; i < lines; i++, to += kLine) {
#if defined(__AVX512F__)
    __m512 line = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int k = 0; k < COUNT; k++) {
      const __m512i index = _mm512_loadu_si512(lanes[k].sources);
      const __mmask16 taken = _mm512_cmpge_epi32_mask(index, _mm512_setzero_si512());
      line = _mm512_mask_permutexvar_ps(line, taken, index, _mm512_loadu_ps(units[k] + i * kLine));
    }
    _mm512_storeu_ps(to, line);
#else
    for (int k = 0; k < COUNT; k++)
      for (int lane = 0; lane < kLine; lane++)
        if (lanes[k].sources[lane] >= 0) to[lane] = units[k][i * kLine + lanes[k].sources[lane]];
#endif
  }
}

void join(const float* const* units, const Permutation* lanes, int64_t count, int64_t lines, float* to) {
  count == 4 ? join_lines<4>(units, lanes, lines, to) : join_lines<16>(units, lanes, lines, to);
}

// count < W floats.
inline V load_some(const float* p, int64_t count) {
#if defined(__AVX512F__)
  return (V)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#else
  V v{};
  __builtin_memcpy(&v, p, count * sizeof(float));
  return v;
#endif
}

inline void store_some(float* p, V v, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#else
  __builtin_memcpy(p, &v, count * sizeof(float));
#endif
}

void gather(const float* const* rows, int64_t count, float* to) {
  for (int64_t lane = 0; lane < kLine; lane += W)
    for (int64_t x = 0; x < count; x += W) {
      const int64_t left = count - x;
      V block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) block[i] = left < W ? load_some(rows[lane + i] + x, left) : load<V>(rows[lane + i] + x);
      transpose_block(block);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++)
        if (i < left) store(to + (x + i) * kLine + lane, block[i]);
    }
}

void scatter(const float* from, int64_t count, float* const* rows) {
  for (int64_t lane = 0; lane < kLine; lane += W)
    for (int64_t x = 0; x < count; x += W) {
      const int64_t left = count - x;
      V block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) block[i] = i < left ? load<V>(from + (x + i) * kLine + lane) : V{};
      transpose_block(block);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++)
        if (left < W)
          store_some(rows[lane + i] + x, block[i], left);
        else
          store(rows[lane + i] + x, block[i]);
    }
}

void places(const uint16_t* columns, int64_t count, const uint32_t* reads, uint32_t* to) {
  int64_t e = 0;
#if defined(__AVX512F__)
  for (; e + W <= count; e += W) {
    const __m512i index = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(columns + e)));
    _mm512_storeu_si512(to + e, _mm512_i32gather_epi32(index, reads, 4));
  }
#endif
  for (; e < count; e++) to[e] = reads[columns[e]];
}

}  // namespace

const LaneTable& FXSPARSE_LANES() {
  static const LaneTable table = {kMostPixels, kMostRows, places,  fill, multiply, product,
                                  filter,      largest,   join,    gather, scatter};
  return table;
}

}  // namespace fxsparse
