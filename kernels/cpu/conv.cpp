// Convolutions with a sparse weight [out, in / groups * kernel], on planes of pixels instead of patches.
//
// A block of rows of one sample lies in a panel: every input channel (with a stride, every phase of it) is a plane whose
// rows are padded, so that the tap (kh, kw) of a channel reads the output's pixels from one offset on.  Positions past
// the end of an output row are computed and dropped.  The input gradient is the same product of the output gradient.
//
// Scratch memory: per thread one panel of kPanelBytes (or one output row's, if that is more) and kRows rows of results;
// per call 8 bytes an entry.
#include "tensors.h"
#include "window.h"

namespace {

using namespace fxsparse;

constexpr int64_t kPanelBytes = 512 << 10;  // half of an L2 cache of today
constexpr int64_t kRows = 32;               // results that are copied out together
constexpr int64_t kSlack = 16;             // at least a vector: runs read past the last plane

// [channels, height, width] of one sample.
struct Image {
  const void* data;
  Scalar scalar;
  int64_t channels, height, width;
  Image sample(int64_t n) const {
    const int64_t offset = n * channels * height * width * (scalar == Scalar::f32 ? 4 : 2);
    return {static_cast<const char*>(data) + offset, scalar, channels, height, width};
  }
};

Image image(const Tensor& t) { return {t.mutable_data_ptr(), scalar_of(t, "x"), t.size(1), t.size(2), t.size(3)}; }

inline float read(const Image& src, int64_t at) {
  if (src.scalar == Scalar::f32) return static_cast<const float*>(src.data)[at];
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(src.data)[at]) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline void write(void* data, Scalar scalar, int64_t at, float value) {
  if (scalar == Scalar::f32) {
    static_cast<float*>(data)[at] = value;
    return;
  }
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  static_cast<uint16_t*>(data)[at] = value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

// Which pixels a dimension of a plane holds: place q of phase p is pixel q * stride + p - before, or 0 outside.
struct Side {
  std::vector<int64_t> phases;
  int64_t stride, before;
  int64_t results;  // places of the output that are read from a plane at once
  int64_t extent;   // places in a plane
};

Side taps_of(const Axis& axis, int64_t places) {
  Side side{{}, axis.stride, axis.before, places, places + axis.most_shift()};
  for (int64_t p = 0; p < axis.stride; p++)
    for (int64_t tap = 0; tap < axis.kernel; tap++)
      if (axis.phase(tap) == p) {
        side.phases.push_back(p);
        break;
      }
  return side;
}

int64_t phase_place(const Side& side, int64_t phase) {
  return std::find(side.phases.begin(), side.phases.end(), phase) - side.phases.begin();
}

struct Layout {
  Side rows, columns;
  int64_t block;  // rows of results in a panel
  int64_t plane;  // floats from one plane to the next
  // Positions from the first result to the last, for so many rows of them.
  int64_t positions(int64_t height) const { return (height - 1) * columns.extent + columns.results; }
  int64_t planes_per_channel() const { return rows.phases.size() * columns.phases.size(); }
};

// Whole cache lines and an odd number of them, so that the planes spread over the sets of a cache.
int64_t plane_floats(int64_t pixels) { return ((pixels + 15) / 16 | 1) * 16; }

// `rows` has the places of one row of results; as many more are taken as fit the budget for `channels` channels.
Layout layout_of(Side rows, Side columns, int64_t channels, int64_t results) {
  Layout layout{std::move(rows), std::move(columns), 1, 0};
  const int64_t planes = std::max<int64_t>(1, channels * layout.planes_per_channel());
  const int64_t halo = layout.rows.extent - 1;
  const int64_t affordable = kPanelBytes / 4 / planes / layout.columns.extent - halo;
  const int64_t most = std::max<int64_t>(1, std::min(results, affordable)), blocks = (results + most - 1) / most;
  layout.block = (results + blocks - 1) / blocks;
  layout.rows.extent = layout.block + halo;
  layout.plane = plane_floats(layout.rows.extent * layout.columns.extent);
  STD_TORCH_CHECK(planes * layout.plane < (int64_t(1) << 31), "fxsparse: expected a panel with int32 offsets");
  return layout;
}

int64_t panel_floats(const Layout& layout, int64_t channels) {
  return channels * layout.planes_per_channel() * layout.plane + kSlack;
}

// One row of a plane: places 0 <= q < extent of the pixels from `at` on.
void fill_row(const Image& src, int64_t at, const Side& side, int64_t phase, float* to) {
  const int64_t first = phase - side.before;  // pixel of place 0
  const int64_t begin = std::min(side.extent, first >= 0 ? 0 : (-first + side.stride - 1) / side.stride);
  const int64_t end = std::max(begin, std::min(side.extent, first < src.width ? (src.width - 1 - first) / side.stride + 1 : 0));
  std::fill(to, to + begin, 0.0f);
  if (side.stride == 1 && src.scalar == Scalar::f32) {
    const float* from = static_cast<const float*>(src.data) + at + first;
    std::copy(from + begin, from + end, to + begin);
  } else {
    for (int64_t q = begin; q < end; q++) to[q] = read(src, at + first + q * side.stride);
  }
  std::fill(to + end, to + side.extent, 0.0f);
}

// The panel of an image whose planes begin at place `base` of the rows.
void fill_panel(const Image& src, const Layout& layout, int64_t base, float* panel) {
  float* plane = panel;
  const int64_t width = layout.columns.extent;
  for (int64_t c = 0; c < src.channels; c++)
    for (const int64_t row_phase : layout.rows.phases)
      for (const int64_t column_phase : layout.columns.phases) {
        for (int64_t r = 0; r < layout.rows.extent; r++) {
          const int64_t row = (base + r) * layout.rows.stride + row_phase - layout.rows.before;
          if (row >= 0 && row < src.height)
            fill_row(src, (c * src.height + row) * src.width, layout.columns, column_phase, plane + r * width);
          else
            std::fill_n(plane + r * width, width, 0.0f);
        }
        std::fill(plane + layout.rows.extent * width, plane + layout.plane, 0.0f);
        plane += layout.plane;
      }
  std::fill_n(plane, kSlack, 0.0f);
}

// Where the entries of every row read their pixels.
std::vector<int32_t> offsets_of(const Window& w, const Layout& layout, const int32_t* start, const int32_t* cols,
                                int64_t rows, int64_t channels) {
  const int64_t taps = w.height.kernel * w.width.kernel, fan_in = channels / w.groups * taps;
  std::vector<int32_t> tap_offsets(fan_in), offsets(start[rows]);
  for (int64_t column = 0; column < fan_in; column++) {
    const int64_t channel = column / taps, kh = column % taps / w.width.kernel, kw = column % w.width.kernel;
    const int64_t phase = phase_place(layout.rows, w.height.phase(kh)) * layout.columns.phases.size() +
                          phase_place(layout.columns, w.width.phase(kw));
    tap_offsets[column] = (channel * layout.planes_per_channel() + phase) * layout.plane +
                          w.height.shift(kh) * layout.columns.extent + w.width.shift(kw);
  }
  const int64_t group_floats = channels / w.groups * layout.planes_per_channel() * layout.plane;
  for (int64_t r = 0; r < rows; r++) {
    const int32_t base = r / (rows / w.groups) * group_floats;
    for (int64_t e = start[r]; e < start[r + 1]; e++) {
      STD_TORCH_CHECK(cols[e] >= 0 && cols[e] < fan_in, "fxsparse: the weight has an entry in column ", cols[e], " of ", fan_in);
      offsets[e] = base + tap_offsets[cols[e]];
    }
  }
  return offsets;
}

int64_t share_begin(const Shifted& s, int64_t rows, int64_t part, int64_t parts) {
  if (part <= 0 || part >= parts) return part <= 0 ? 0 : rows;
  const int64_t target = int64_t(s.start[rows]) * part / parts;
  return std::lower_bound(s.start, s.start + rows, target) - s.start;
}

// work(unit, panel) for every unit = sample * blocks + block, after fill(unit, panel), a wave of units at a time;
// work is also given its share of the rows.
template <class Fill, class Work>
void in_waves(int64_t units, int64_t threads, int64_t floats, const Fill& fill, const Work& work) {
  const int64_t wave = std::max<int64_t>(1, std::min(threads, units));
  Buffer panels(wave * floats);
  for (int64_t base = 0; base < units; base += wave) {
    const int64_t here = std::min(wave, units - base), splits = (threads + here - 1) / here;
    share(here, [&](int64_t i, int64_t) { fill(base + i, panels.data + i * floats); });
    share(here * splits, [&](int64_t part, int64_t) {
      const int64_t i = part / splits;
      work(base + i, panels.data + i * floats, part % splits, splits);
    });
  }
}

// The product of every row with every panel.  put(sample, row, first result row, results in rows, y) copies one out.
template <class Put>
void multiply_planes(const Image& src, int64_t samples, const Layout& layout, int64_t results,
                     const Shifted& s, int64_t rows, const float* bias, const Put& put) {
  const int64_t blocks = (results + layout.block - 1) / layout.block;
  const int64_t work = samples * results * layout.columns.extent * (s.start[rows] + src.channels + rows);
  in_waves(
      samples * blocks, threads_for(work), panel_floats(layout, src.channels),
      [&](int64_t unit, float* panel) {
        fill_panel(src.sample(unit / blocks), layout, unit % blocks * layout.block, panel);
      },
      [&](int64_t unit, const float* panel, int64_t part, int64_t parts) {
        const int64_t first = unit % blocks * layout.block, height = std::min(layout.block, results - first);
        const int64_t count = layout.positions(height), stride = plane_floats(count), end = share_begin(s, rows, part + 1, parts);
        Buffer y(kRows * stride);
        for (int64_t r = share_begin(s, rows, part, parts); r < end; r += kRows) {
          const int64_t stop = std::min(r + kRows, end);
          table().add_shifted(panel, s, r, stop, bias, count, y.data, stride);
          for (int64_t i = r; i < stop; i++) put(unit / blocks, i, first, height, y.data + (i - r) * stride);
        }
      });
}

struct Entries {
  std::vector<Buffer> owned;
  const float* values;
  const int32_t *start, *cols;
  int64_t rows, count;
};

Entries entries_of(const Tensor* values, const Tensor& crow, const Tensor& cols, int64_t groups) {
  Entries entries{{}, nullptr, index32(crow, crow.numel(), "crow"), index32(cols, cols.numel(), "cols"), 0, 0};
  entries.rows = crow.numel() - 1;
  entries.count = entries.start[entries.rows];
  STD_TORCH_CHECK(entries.count >= 0 && entries.count <= cols.numel() && entries.rows % groups == 0,
                  "fxsparse: expected crow to end with at most ", cols.numel(), " and rows in ", groups, " groups");
  if (values) {
    STD_TORCH_CHECK(values->is_contiguous() && values->numel() == cols.numel(), "fxsparse: expected values [capacity]");
    entries.values = as_floats(*values, entries.owned);
  }
  return entries;
}

Tensor csr_conv_forward(const Tensor& x_any, const Tensor& values, const Tensor& crow, const Tensor& cols,
                        std::optional<Tensor> bias, std::vector<int64_t> numbers) {
  const Tensor x = in_order(x_any);
  const Window w = window_of(numbers, x, values);
  Entries entries = entries_of(&values, crow, cols, w.groups);
  const int64_t height = w.height.out(), width = w.width.out(), rows = entries.rows;
  STD_TORCH_CHECK(!bias || bias->numel() == rows, "fxsparse: expected bias [", rows, "]");
  Tensor y = empty(x, {x.size(0), rows, height, width});
  if (y.numel() == 0) return y;
  const Image src = image(x);
  const Layout layout = layout_of(taps_of(w.height, 1), taps_of(w.width, width), src.channels, height);
  const auto offsets = offsets_of(w, layout, entries.start, entries.cols, rows, src.channels);
  const float* bias_floats = bias ? as_floats(in_order(*bias), entries.owned) : nullptr;
  void* out = y.mutable_data_ptr();
  multiply_planes(src, x.size(0), layout, height, {entries.values, entries.start, offsets.data()}, rows, bias_floats,
                  [&](int64_t n, int64_t row, int64_t first, int64_t count, const float* from) {
                    for (int64_t h = 0; h < count; h++, from += layout.columns.extent) {
                      const int64_t at = ((n * rows + row) * height + first + h) * width;
                      if (src.scalar == Scalar::f32)
                        std::copy(from, from + width, static_cast<float*>(out) + at);
                      else
                        for (int64_t i = 0; i < width; i++) write(out, src.scalar, at + i, from[i]);
                    }
                  });
  return y;
}

// The entries in the order of the input's planes: row channel * phases + phase gathers from the output gradient.
struct Turned {
  std::vector<int32_t> start, offsets;
  Buffer values;
};

Turned turned(const Window& w, const Layout& layout, const Entries& entries, int64_t channels) {
  const int64_t taps = w.height.kernel * w.width.kernel, phases = w.height.stride * w.width.stride;
  const int64_t fan_in = channels / w.groups * taps, rows_of_group = entries.rows / w.groups;
  std::vector<int32_t> plane(fan_in), shift(fan_in);
  for (int64_t column = 0; column < fan_in; column++) {
    const int64_t kh = column % taps / w.width.kernel, kw = column % w.width.kernel;
    plane[column] = column / taps * phases + w.height.phase(kh) * w.width.stride + w.width.phase(kw);
    shift[column] = (w.height.most_shift() - w.height.shift(kh)) * layout.columns.extent + w.width.most_shift() -
                    w.width.shift(kw);
  }
  const int64_t planes = channels * phases, group_planes = planes / w.groups;
  Turned result{std::vector<int32_t>(planes + 2), std::vector<int32_t>(entries.count), Buffer(entries.count)};
  const auto each = [&](const auto& f) {
    for (int64_t r = 0; r < entries.rows; r++)
      for (int64_t e = entries.start[r]; e < entries.start[r + 1]; e++) f(r, e, entries.cols[e]);
  };
  // First counts, two places on; then where the next entry of a row goes, one place on; in the end where rows begin.
  each([&](int64_t r, int64_t, int32_t column) {
    STD_TORCH_CHECK(column >= 0 && column < fan_in, "fxsparse: the weight has an entry in column ", column, " of ", fan_in);
    result.start[r / rows_of_group * group_planes + plane[column] + 2]++;
  });
  for (int64_t p = 2; p <= planes + 1; p++) result.start[p] += result.start[p - 1];
  each([&](int64_t r, int64_t e, int32_t column) {
    const int32_t to = result.start[r / rows_of_group * group_planes + plane[column] + 1]++;
    result.values.data[to] = entries.values[e];
    result.offsets[to] = r * layout.plane + shift[column];
  });
  return result;
}

void input_gradient(const Image& grad, int64_t samples, const Window& w, const Entries& entries, int64_t channels,
                    Scalar scalar, void* out) {
  const Axis &h = w.height, &v = w.width;
  const auto side = [](const Axis& axis, int64_t places) {
    return Side{{0}, 1, axis.most_shift() - axis.first(), places, places + axis.most_shift()};
  };
  const Layout layout = layout_of(side(h, 1), side(v, v.places()), grad.channels, h.places());
  const Turned t = turned(w, layout, entries, channels);
  const int64_t phases = h.stride * v.stride;
  multiply_planes(grad, samples, layout, h.places(), {t.values.data, t.start.data(), t.offsets.data()},
                  channels * phases, nullptr,
                  [&](int64_t n, int64_t row, int64_t first, int64_t count, const float* from) {
                    const int64_t channel = row / phases, row_phase = row % phases / v.stride;
                    const int64_t left = v.first() * v.stride + row % v.stride - v.before;  // pixel of place 0
                    for (int64_t i = 0; i < count; i++, from += layout.columns.extent) {
                      const int64_t y = (h.first() + first + i) * h.stride + row_phase - h.before;
                      if (y < 0 || y >= h.in) continue;
                      const int64_t at = ((n * channels + channel) * h.in + y) * v.in;
                      if (v.stride == 1 && scalar == Scalar::f32) {
                        std::copy(from, from + v.in, static_cast<float*>(out) + at);
                        continue;
                      }
                      int64_t place = left < 0 ? 1 : 0;
                      for (int64_t px = left + place * v.stride; px < v.in; px += v.stride)
                        write(out, scalar, at + px, from[place++]);
                    }
                  });
}

// sums[e] = grad_y^T patches at every entry.
void entry_gradients(const Image& x, const Image& grad, int64_t samples, const Window& w, const Entries& entries,
                     float* sums) {
  const int64_t height = grad.height, rows = entries.rows;
  const Layout layout = layout_of(taps_of(w.height, 1), taps_of(w.width, grad.width), x.channels, height);
  const auto offsets = offsets_of(w, layout, entries.start, entries.cols, rows, x.channels);
  const Shifted s{nullptr, entries.start, offsets.data()};
  const int64_t width = layout.columns.extent, stride = plane_floats(layout.block * width);
  const Layout flat{{{0}, 1, 0, layout.block, layout.block}, {{0}, 1, 0, width, width}, layout.block, stride};
  const int64_t blocks = (height + layout.block - 1) / layout.block, units = samples * blocks;
  const int64_t threads = threads_for(samples * height * width * (entries.count + rows + x.channels));
  const int64_t wave = std::max<int64_t>(1, std::min(threads, units));
  const int64_t x_floats = panel_floats(layout, x.channels), grad_floats = panel_floats(flat, rows);
  Buffer x_panels(wave * x_floats), grad_panels(wave * grad_floats);
  for (int64_t base = 0; base < units; base += wave) {
    const int64_t here = std::min(wave, units - base);
    share(here, [&](int64_t i, int64_t) {
      const int64_t sample = (base + i) / blocks, first = (base + i) % blocks * layout.block;
      fill_panel(x.sample(sample), layout, first, x_panels.data + i * x_floats);
      fill_panel(grad.sample(sample), flat, first, grad_panels.data + i * grad_floats);
    });
    share(threads, [&](int64_t part, int64_t parts) {
      for (int64_t i = 0; i < here; i++)
        table().dot_shifted(grad_panels.data + i * grad_floats, stride, x_panels.data + i * x_floats, s,
                            share_begin(s, rows, part, parts), share_begin(s, rows, part + 1, parts),
                            layout.positions(layout.block), sums);
    });
  }
}

void check_gradient(const Tensor& grad, const Tensor& x, const Window& w, int64_t rows) {
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == rows && grad.size(2) == w.height.out() &&
                      grad.size(3) == w.width.out() && grad.scalar_type() == x.scalar_type(),
                  "fxsparse: expected grad [samples, ", rows, ", ", w.height.out(), ", ", w.width.out(), "] as x is");
}

std::tuple<Tensor, Tensor> csr_conv_backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& values,
                                             const Tensor& crow, const Tensor& cols, std::vector<int64_t> numbers,
                                             bool need_x, bool need_values) {
  const Tensor grad = in_order(grad_any), x = in_order(x_any);
  const Window w = window_of(numbers, x, values);
  const Entries entries = entries_of(&values, crow, cols, w.groups);
  check_gradient(grad, x, w, entries.rows);
  Tensor grad_x = empty(x, {0}), grad_values = empty(values, {need_values ? values.numel() : 0});
  if (need_x) {
    grad_x = empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
    if (grad_x.numel())
      input_gradient(image(grad), x.size(0), w, entries, x.size(1), scalar_of(x, "x"), grad_x.mutable_data_ptr());
  }
  if (need_values) {
    Buffer sums(values.numel());
    std::fill_n(sums.data, values.numel(), 0.0f);
    if (entries.count) entry_gradients(image(x), image(grad), x.size(0), w, entries, sums.data);
    put_floats(sums.data, grad_values);
  }
  return {grad_x, grad_values};
}

Tensor csr_conv_sample(const Tensor& grad_any, const Tensor& x_any, const Tensor& crow, const Tensor& cols,
                       std::vector<int64_t> numbers) {
  const Tensor grad = in_order(grad_any), x = in_order(x_any);
  const Window w = window_of(numbers, x, grad);
  const Entries entries = entries_of(nullptr, crow, cols, w.groups);
  check_gradient(grad, x, w, entries.rows);
  Tensor result = empty(aoti_torch_dtype_float32(), {cols.numel()});
  auto* sums = static_cast<float*>(result.mutable_data_ptr());
  std::fill_n(sums, cols.numel(), 0.0f);
  if (entries.count) entry_gradients(image(x), image(grad), x.size(0), w, entries, sums);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) {
  m.impl("csr_conv_forward", TORCH_BOX(&csr_conv_forward));
  m.impl("csr_conv_backward", TORCH_BOX(&csr_conv_backward));
  m.impl("csr_conv_sample", TORCH_BOX(&csr_conv_sample));
}
