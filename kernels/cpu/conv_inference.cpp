// Convolutions for inference with a sparse weight, its columns in blocks (formats/column_blocks.py).
//
// Output positions of a sample - of a few samples, where one does not fill its vectors - are numbered through, and a tile
// of them is a panel that fits L2: for every column of the weight the pixels that it reads.  The input's planes have as
// many columns as rows of positions, so that a tap is a shift under a mask; they are read in place, or copied where the
// convolution has a stride (a plane for every phase of it), mixes samples in a tile, or is not in fp32.
#include "blocks.h"
#include "window.h"

namespace {

using namespace fxsparse;

constexpr int64_t kPanelFloats = (512 << 10) / 4;  // half of an L2 cache of today
constexpr int64_t kMostMerged = 8;                 // samples that are numbered through
constexpr double kFilled = 0.9;                    // not where this share of a sample's lanes is used
constexpr int64_t kNearFloats = (40 << 10) / 4;    // of an L1

// Output place o of a dimension reads, through one tap, place o + shift of the pixels phase, phase + stride, ...
struct Reach {
  int64_t phase, shift, places;  // places: pixels that the phase has
};

Reach reach(const Axis& axis, int64_t tap) {
  const int64_t at = tap * axis.dilation - axis.before, phase = (at % axis.stride + axis.stride) % axis.stride;
  return {phase, (at - phase) / axis.stride, std::max<int64_t>(0, (axis.in - phase + axis.stride - 1) / axis.stride)};
}

int64_t most_places(const Axis& axis) { return (axis.in + axis.stride - 1) / axis.stride; }

// How positions are numbered: [samples, rows, pitch], of which out_rows x out_columns are results.
struct Positions {
  int64_t samples, rows, pitch, out_rows, out_columns;
  int64_t count() const { return samples * rows * pitch; }
  bool whole() const { return rows == out_rows && pitch == out_columns; }  // every position is a result
};

Positions positions_of(const Window& w, int64_t samples, int64_t lanes) {
  const int64_t out_rows = w.height.out(), out_columns = w.width.out();
  const int64_t pitch = std::max(out_columns, most_places(w.width));
  Positions p{1, out_rows, pitch, out_rows, out_columns};
  const int64_t whole = (p.count() + lanes - 1) / lanes * lanes;
  if (p.count() >= kFilled * whole) return p;
  for (int64_t n = std::min(samples, kMostMerged); n > 1 && p.samples == 1; n--)
    if (samples % n == 0) p.samples = n, p.rows = std::max(out_rows, most_places(w.height));
  return p;
}

// Bits of positions, a row of words for every tap of one dimension.
struct Masks {
  Masks(int64_t taps, int64_t positions) : words((positions + 127) / 64), bits(taps * words) {}
  uint64_t* of(int64_t tap) { return bits.data() + tap * words; }
  void set(int64_t tap, int64_t begin, int64_t end) {
    for (uint64_t* row = of(tap); begin < end;) {
      const int64_t here = std::min(end, (begin | 63) + 1), count = here - begin;
      row[begin >> 6] |= (count == 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1) << (begin & 63);
      begin = here;
    }
  }
  int64_t words;
  std::vector<uint64_t> bits;
};

struct Interval {
  int64_t begin, end;
};

// The output places whose pixel lies in the input.
Interval inside(const Reach& r, int64_t out) {
  return {std::max<int64_t>(0, -r.shift), std::min(out, r.places - r.shift)};
}

struct Taps {
  Masks rows, columns;
  std::vector<Tap> taps;
};

Taps taps_of(const Window& w, const Positions& p) {
  Taps result{Masks(w.height.kernel, p.count()), Masks(w.width.kernel, p.count()), {}};
  for (int64_t kh = 0; kh < w.height.kernel; kh++) {
    const Interval rows = inside(reach(w.height, kh), p.out_rows);
    for (int64_t n = 0; n < p.samples; n++)
      result.rows.set(kh, (n * p.rows + rows.begin) * p.pitch, (n * p.rows + rows.end) * p.pitch);
  }
  for (int64_t kw = 0; kw < w.width.kernel; kw++) {
    const Interval columns = inside(reach(w.width, kw), p.out_columns);
    for (int64_t row = 0; row < p.samples * p.rows; row++)
      result.columns.set(kw, row * p.pitch + columns.begin, row * p.pitch + columns.end);
  }
  for (int64_t kh = 0; kh < w.height.kernel; kh++)
    for (int64_t kw = 0; kw < w.width.kernel; kw++) {
      const Reach h = reach(w.height, kh), v = reach(w.width, kw);
      result.taps.push_back({h.phase * w.width.stride + v.phase, h.shift * p.pitch + v.shift, result.rows.of(kh),
                             result.columns.of(kw)});
    }
  return result;
}

// The input as planes of positions: x itself, or room for copies of the phases of `wave` units of samples.
struct Source {
  std::vector<Buffer> copies;
  Planes planes;
  int64_t unit, wave;  // floats from one unit to the next, and how many units are there at once
  int64_t phases, sample;
};

void copy_phase(const Tensor& x, const Window& w, const Positions& p, int64_t n, int64_t channel, int64_t row_phase,
                int64_t column_phase, float* to) {
  const Axis &h = w.height, &v = w.width;
  const Scalar scalar = scalar_of(x, "x");
  const int64_t plane = (n * x.size(1) + channel) * h.in * v.in;
  const int64_t height = (h.in - row_phase + h.stride - 1) / h.stride;
  const int64_t width = (v.in - column_phase + v.stride - 1) / v.stride;
  if (h.stride == 1 && v.stride == 1 && p.pitch == v.in)
    return tiles().take(x.const_data_ptr(), scalar, plane, 1, 0, h.in * v.in, 1, 0, to);
  tiles().take(x.const_data_ptr(), scalar, plane + row_phase * v.in + column_phase, height, h.stride * v.in, width,
               v.stride, p.pitch, to);
}

Source source_of(const Tensor& x, const Window& w, const Positions& p, int64_t threads) {
  const int64_t channels = x.size(1), phases = w.height.stride * w.width.stride, units = x.size(0) / p.samples;
  const int64_t pixels = w.height.in * w.width.in;
  if (phases == 1 && p.samples == 1 && p.pitch == w.width.in && scalar_of(x, "x") == Scalar::f32)
    return {{}, {static_cast<const float*>(x.const_data_ptr()), pixels, 0}, channels * pixels, units, phases, 0};
  const int64_t rows = std::max(p.rows, most_places(w.height)), sample = rows * p.pitch;
  const int64_t plane = (p.samples * sample + 15) / 16 * 16, unit = channels * phases * plane;
  Source source{{}, {nullptr, phases * plane, plane}, unit, std::min(threads, units), phases, sample};
  source.copies.emplace_back(source.wave * unit);
  source.planes.data = source.copies[0].data;
  return source;
}

// Copy the units base <= u < base + count.
void copy_units(const Tensor& x, const Window& w, const Positions& p, const std::vector<Tap>& taps, const Source& source,
                int64_t base, int64_t count, int64_t threads) {
  const int64_t work = count * x.size(1);
  std::vector<bool> used(source.phases);
  for (const Tap& tap : taps) used[tap.plane] = true;
  share(std::min(threads, work), [&](int64_t part, int64_t parts) {
    for (int64_t i = work * part / parts; i < work * (part + 1) / parts; i++) {
      const int64_t u = i / x.size(1), c = i % x.size(1);
      for (int64_t f = 0; f < source.phases; f++)
        for (int64_t n = 0; used[f] && n < p.samples; n++)
          copy_phase(x, w, p, (base + u) * p.samples + n, c, f / w.width.stride, f % w.width.stride,
                     source.copies[0].data + u * source.unit + (c * source.phases + f) * source.planes.plane +
                         n * source.sample);
    }
  });
}

// Where the positions first <= p < first + count of a unit that begins with sample `sample` lie in the output.
void runs_of(const Positions& p, int64_t sample, int64_t rows, int64_t first, int64_t count, std::vector<Run>& runs) {
  const int64_t pixels = p.out_rows * p.out_columns, end = std::min(first + count, p.count());
  const int64_t period = p.whole() ? pixels : p.pitch, length = p.whole() ? pixels : p.out_columns;
  const int64_t per_sample = p.whole() ? 1 : p.rows;
  runs.clear();
  for (int64_t k = first / period; k * period < end; k++) {
    const int64_t n = sample + k / per_sample, row = k % per_sample;
    const int64_t from = std::max(first, k * period), to = std::min(end, k * period + length);
    if (from < to && row < p.out_rows)
      runs.push_back({from - first, to - from, n * rows * pixels + row * p.out_columns + from - k * period});
  }
}

// Vectors of a tile: as many as fit L1 with a few of them, else L2 with many.  Of 4 and 14 vectors, 4 took 0.85 of the
// time at 128 and 256 columns, and 1.1 times it at 576.
int64_t most_vectors(int64_t width, int64_t lanes) {
  const int64_t row = std::max<int64_t>(1, width) * lanes, near = std::max<int64_t>(4, kNearFloats / row);
  return std::clamp<int64_t>(4 * row <= 2 * kNearFloats ? near : kPanelFloats / row, 1, kMostTileVectors);
}

// Whether the panel is the input itself: one tap, which reads every pixel where it lies.
bool is_panel(const Source& source, const Window& w, const Positions& p, int64_t lanes) {
  const auto at = reinterpret_cast<uintptr_t>(source.planes.data);
  return source.copies.empty() && w.height.kernel * w.width.kernel == 1 && p.whole() && p.out_rows == w.height.in &&
         w.height.before == 0 && w.width.before == 0 && p.count() % lanes == 0 && at % (lanes * sizeof(float)) == 0;
}

// What a thread needs to run tiles.
struct Scratch {
  Buffer panel, sums;
  std::vector<uint16_t> masks;
  std::vector<Run> runs;
};

Tensor csr_conv_inference(const Tensor& x_any, const Tensor& values, const Tensor& start, const Tensor& columns,
                          std::optional<Tensor> bias, std::optional<Tensor> residual, int64_t activation,
                          std::vector<int64_t> numbers) {
  const Tensor x = in_order(x_any);
  const Window w = window_of(numbers, x, bias ? *bias : x);  // the values of halves are float32
  const int64_t samples = x.size(0), taps_count = w.height.kernel * w.width.kernel;
  Weight weight = weight_of(values, start, columns, x.size(1) / w.groups * taps_count, w.groups);
  check(weight, values.numel());
  const int64_t rows = weight.rows, pixels = w.height.out() * w.width.out();
  Tensor y = empty(x, {samples, rows, w.height.out(), w.width.out()});
  STD_TORCH_CHECK(!bias || bias->numel() == rows, "fxsparse: expected bias [", rows, "]");
  STD_TORCH_CHECK(!residual || (residual->dim() == 4 && residual->scalar_type() == x.scalar_type() &&
                                std::equal(y.sizes().begin(), y.sizes().end(), residual->sizes().begin())),
                  "fxsparse: expected a residual of the output's shape and dtype");
  if (y.numel() == 0) return y;
  const Tensor added = residual ? in_order(*residual) : y;
  const TileTable& table = tiles();
  const int64_t W = table.lanes;
  const Positions p = positions_of(w, samples, W);
  Taps taps = taps_of(w, p);
  const int64_t threads = threads_for(samples * pixels * (values.numel() + rows));
  const Source source = source_of(x, w, p, threads);
  Results results{y.mutable_data_ptr(), residual ? added.const_data_ptr() : nullptr, scalar_of(x, "x"), pixels, nullptr, 0,
                  bias ? as_floats(in_order(*bias), weight.owned) : nullptr, activation};

  const int64_t vectors = (p.count() + W - 1) / W, units = samples / p.samples, group_rows = rows / w.groups;
  const int64_t most = most_vectors(weight.width, W);
  const bool direct = is_panel(source, w, p, W);
  const int64_t tiles_of_unit = (vectors + most - 1) / most;
  const auto run = [&](int64_t base, int64_t here_units) {
    const int64_t items = here_units * tiles_of_unit * w.groups;
    const int64_t splits = std::min(group_rows, (threads + items - 1) / items);
    share(std::min(threads, items * splits), [&](int64_t part, int64_t parts) {
      Scratch scratch{Buffer(direct ? 0 : weight.width * most * W), Buffer(weight.blocks > 1 ? group_rows * most * W : 0),
                      std::vector<uint16_t>(taps_count * most), {}};
      for (int64_t job = items * splits * part / parts; job < items * splits * (part + 1) / parts; job++) {
        const int64_t item = job / splits, split = job % splits, unit = item / (tiles_of_unit * w.groups);
        const int64_t tile = item / w.groups % tiles_of_unit, group = item % w.groups;
        const int64_t from = vectors * tile / tiles_of_unit, count = vectors * (tile + 1) / tiles_of_unit - from;
        const int64_t begin = group * group_rows + group_rows * split / splits;
        const int64_t end = group * group_rows + group_rows * (split + 1) / splits;
        runs_of(p, (base + unit) * p.samples, rows, from * W, count * W, scratch.runs);
        Results here = results;
        here.runs = scratch.runs.data();
        here.count = scratch.runs.size();
        Planes planes = source.planes;
        planes.data += unit * source.unit + group * (x.size(1) / w.groups) * planes.channel;
        for (int64_t b = 0; b < weight.blocks; b++) {
          const int64_t first = b * weight.width, last = std::min(weight.fan_in, first + weight.width);
          const float* panel = direct ? planes.data + first * planes.channel + from * W : scratch.panel.data;
          if (!direct)
            table.fill(planes, taps.taps.data(), taps_count, first, last, from * W, count, scratch.masks.data(),
                       scratch.panel.data);
          table.multiply(panel, direct ? planes.channel : count * W, count, weight.block(b), begin, end, scratch.sums.data,
                         b == 0, b + 1 == weight.blocks ? &here : nullptr);
        }
      }
    });
  };
  for (int64_t base = 0; base < units; base += source.wave) {
    const int64_t count = std::min(source.wave, units - base);
    if (!source.copies.empty()) copy_units(x, w, p, taps.taps, source, base, count, threads);
    run(base, count);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) { m.impl("csr_conv_inference", TORCH_BOX(&csr_conv_inference)); }
