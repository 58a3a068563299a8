// Convolutions with one filter a channel, for inference: dense, whatever zeros the filters have.
//
// A plane is copied with its padding, one copy for every phase of the stride, all of one pitch: position p of the output,
// row * pitch + column, then reads pixel p + offset through every tap, and rows need not be a multiple of a vector.
#include "tensors.h"
#include "window.h"

namespace {

using namespace fxsparse;

constexpr int64_t kBandFloats = (16 << 10) / 4;  // results that wait in L1

// How a plane is copied; rows and columns count places of the padded input in units of the stride.
struct Layout {
  int64_t rows, pitch, phases, plane;  // plane: floats from one phase to the next
  std::vector<int64_t> offsets;        // of the taps
};

int64_t places(const Axis& a) {
  const int64_t reach = (a.out() - 1) * a.stride + (a.kernel - 1) * a.dilation + 1;
  return (std::max(reach, a.in + a.before) + a.stride - 1) / a.stride;
}

Layout layout_of(const Window& w, int64_t lanes) {
  Layout l{places(w.height), places(w.width), w.height.stride * w.width.stride, 0, {}};
  // Vectors begin at results and end past them.
  l.plane = l.rows * l.pitch + lanes;
  for (int64_t kh = 0; kh < w.height.kernel; kh++)
    for (int64_t kw = 0; kw < w.width.kernel; kw++)
      l.offsets.push_back((w.height.phase(kh) * w.width.stride + w.width.phase(kw)) * l.plane +
                          w.height.shift(kh) * l.pitch + w.width.shift(kw));
  return l;
}

// The pixels of one phase: the first of them, how many there are, and the place of the first.
struct Part {
  int64_t first, count, place;
};

Part part_of(const Axis& a, int64_t phase) {
  const int64_t place = std::max<int64_t>(0, (a.before - phase + a.stride - 1) / a.stride);
  const int64_t first = phase + place * a.stride - a.before;
  return {first, std::max<int64_t>(0, (a.in - first + a.stride - 1) / a.stride), place};
}

// Copy the plane that begins at element `plane` of x; what is padding stays as it is.
void copy_plane(const Tensor& x, Scalar scalar, int64_t plane, const Window& w, const Layout& l, float* to) {
  for (int64_t f = 0; f < l.phases; f++) {
    const Part h = part_of(w.height, f / w.width.stride), v = part_of(w.width, f % w.width.stride);
    tiles().take(x.const_data_ptr(), scalar, plane + h.first * w.width.in + v.first, h.count, w.height.stride * w.width.in,
                 v.count, w.width.stride, l.pitch, to + f * l.plane + h.place * l.pitch + v.place);
  }
}

// x [samples, channels, height, width], weight [channels, 1, kernel]; `numbers` as in window_of.
Tensor depthwise_conv(const Tensor& x_any, const Tensor& weight, std::optional<Tensor> bias, int64_t activation,
                      std::vector<int64_t> numbers) {
  const Tensor x = in_order(x_any);
  const Window w = window_of(numbers, x, weight);
  const int64_t channels = x.size(1), taps = w.height.kernel * w.width.kernel;
  const int64_t out_height = w.height.out(), out_width = w.width.out();
  STD_TORCH_CHECK(w.groups == channels && weight.numel() == channels * taps,
                  "fxsparse: expected a weight [channels, 1, kernel] and as many groups as channels, got ", weight.numel(),
                  " values for ", channels, " channels in ", w.groups, " groups");
  STD_TORCH_CHECK(!bias || bias->numel() == channels, "fxsparse: expected bias [", channels, "]");
  const int64_t out_plane = out_height * out_width, planes = x.size(0) * channels;
  Tensor y = empty(x, {x.size(0), channels, out_height, out_width});
  std::vector<Buffer> owned;
  const float* values = as_floats(in_order(weight), owned);
  const float* added = bias ? as_floats(in_order(*bias), owned) : nullptr;
  const TileTable& table = tiles();
  const Layout l = layout_of(w, 2 * table.lanes);
  const int64_t band = std::clamp<int64_t>(kBandFloats / l.pitch, 1, out_height);
  const Scalar scalar = scalar_of(x, "x");
  share(std::min(planes, threads_for(planes * out_plane * (taps + 4))), [&](int64_t part, int64_t parts) {
    Buffer pixels(l.phases * l.plane), sums(band * l.pitch + 2 * table.lanes);
    std::fill_n(pixels.data, l.phases * l.plane, 0.0f);
    for (int64_t i = planes * part / parts; i < planes * (part + 1) / parts; i++) {
      const int64_t c = i % channels;
      copy_plane(x, scalar, i * w.height.in * w.width.in, w, l, pixels.data);
      for (int64_t row = 0; row < out_height; row += band) {
        const int64_t rows = std::min(band, out_height - row);
        table.filter(pixels.data + row * l.pitch,
                     {l.offsets.data(), values + c * taps, taps, added ? added[c] : 0.0f, activation},
                     (rows - 1) * l.pitch + out_width, sums.data);
        table.give(sums.data, l.pitch, rows, out_width, y.mutable_data_ptr(), scalar, i * out_plane + row * out_width);
      }
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) { m.impl("depthwise_conv", TORCH_BOX(&depthwise_conv)); }
