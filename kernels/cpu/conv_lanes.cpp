// Convolutions and pooling of images whose lanes are samples, or the parts of a grid that samples are cut into (lanes.h).
//
// A tile is a run of output pixels of one row.  For every block of channels it has a panel with the pixels that the tile
// reads, once each, in L1; what lies beside a part of the grid comes from the lanes of its neighbours.
#include <cmath>
#include <limits>

#include "blocks.h"
#include "lanes.h"

namespace {

using namespace fxsparse;

constexpr int64_t kLineBytes = kLine * sizeof(float);
constexpr int64_t kRowsAtOnce = 512;  // sums of a tile that wait in L2
constexpr int64_t kPanelLines = 450;  // that a block of a dense weight reads: 28 KiB, where L1 has 32 or 48
constexpr int64_t kMostPlaces = int64_t(1) << 30;  // floats that a place can reach
constexpr int64_t kReach = 4;         // parts that a tap may lie beyond its own; further ones are outside of every grid

const LaneTable& table_of() {
#if defined(FXSPARSE_X86)
  if (chosen_level >= kAvx512) return lanes_avx512();
  if (chosen_level == kAvx2) return lanes_avx2();
#endif
  return lanes_portable();
}

// Images [units, channels, height, width, kLine], parts of a grid x grid of each sample; in the axes sizes are of samples.
struct Lanes {
  const float* data;
  int64_t units, channels, grid, height, width;  // of a part
  int64_t plane() const { return height * width * kLine; }
};

Lanes lanes_of(const Tensor& x, int64_t grid) {
  STD_TORCH_CHECK(x.dim() == 5 && x.size(4) == kLine && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
                  "fxsparse: expected images [units, channels, height, width, 16] in float32, got ", described(x));
  STD_TORCH_CHECK(grid == 1 || grid == 2 || grid == 4, "fxsparse: expected a grid of 1, 2 or 4, got ", grid);
  return {static_cast<const float*>(x.const_data_ptr()), x.size(0), x.size(1), grid, x.size(2), x.size(3)};
}

// The part of an output dimension.
int64_t part_of(const Axis& axis, int64_t grid) {
  const int64_t out = axis.out();
  STD_TORCH_CHECK(out > 0 && (grid == 1 || (axis.in == out * axis.stride && out % grid == 0)),
                  "fxsparse: expected an output of a ", axis.stride, "th of ", axis.in, " in ", grid, " parts, got ", out);
  return out / grid;
}

// How the lines of a channel's part of a panel lie: [rows that taps use, phases that they use, run].  Row i of a tile reads
// i * pitch lines further on.
struct Panel {
  Panel(const Window& w, int64_t tile_rows, int64_t pixels) : slots(w.width.stride, -1) {
    int64_t used = 0, most = 0;
    for (int64_t kw = 0; kw < w.width.kernel; kw++) {
      int64_t& slot = slots[w.width.phase(kw)];
      if (slot < 0) slot = used++;
      most = std::max(most, w.width.shift(kw));
    }
    run = pixels + most;
    row = used * run;
    step = tile_rows > 1 ? 1 : w.height.dilation;
    rows = tile_rows > 1 ? (tile_rows - 1) * w.height.stride + (w.height.kernel - 1) * w.height.dilation + 1 : w.height.kernel;
    pitch = w.height.stride * row;
    channel = rows * row;
    for (int64_t kh = 0; kh < w.height.kernel; kh++)
      for (int64_t kw = 0; kw < w.width.kernel; kw++)
        taps.push_back((kh * w.height.dilation / step * row + slots[w.width.phase(kw)] * run + w.width.shift(kw)) * kLineBytes);
  }
  std::vector<int64_t> slots;
  int64_t rows, step;               // of the input, and from one to the next
  int64_t run, row, pitch, channel;  // lines
  std::vector<uint32_t> taps;       // bytes
};

// For every step (dy, dx) to another part, |dy|, |dx| <= kReach, the lane that each lane takes; the first one is none.
struct Permutations {
  explicit Permutations(int64_t grid) {
    for (int64_t dy = -kReach; dy <= kReach; dy++)
      for (int64_t dx = -kReach; dx <= kReach; dx++)
        for (int64_t lane = 0; lane < kLine; lane++) {
          const int64_t y = lane / grid % grid + dy, x = lane % grid + dx;
          const bool inside = y >= 0 && y < grid && x >= 0 && x < grid;
          all[of(dy, dx)].sources[lane] = inside ? lane / (grid * grid) * grid * grid + y * grid + x : -1;
        }
  }
  static int64_t of(int64_t dy, int64_t dx) { return 1 + (dy + kReach) * (2 * kReach + 1) + dx + kReach; }
  Permutation all[(2 * kReach + 1) * (2 * kReach + 1) + 1];
};

const Permutation* permutations_of(int64_t grid) {
  static const Permutations one(1), two(2), four(4);
  return (grid == 1 ? one : grid == 2 ? two : four).all;
}

// The lines of a channel that the tile reads whose first pixel is (y, x).
void plan_of(const Lanes& from, const Window& w, const Panel& panel, int64_t y, int64_t x, std::vector<LineSource>& lines) {
  lines.resize(panel.channel);
  // The part that a place lies in, and where there; one step at a time, as divisions took longer than the copies.
  const auto normal = [](int64_t& at, int64_t size) {
    int64_t part = 0;
    for (; at < 0 && part > -kReach; part--) at += size;
    for (; at >= size && part < kReach; part++) at -= size;
    at = std::clamp<int64_t>(at, 0, size - 1);
    return part;
  };
  for (int64_t k = 0; k < panel.rows; k++) {
    int64_t row = y * w.height.stride - w.height.before + k * panel.step;
    const int64_t dy = normal(row, from.height);
    for (int64_t f = 0; f < w.width.stride; f++)
      for (int64_t i = 0; panel.slots[f] >= 0 && i < panel.run; i++) {
        int64_t column = (x + i) * w.width.stride - w.width.before + f;
        const int64_t dx = normal(column, from.width);
        lines[k * panel.row + panel.slots[f] * panel.run + i] = {
            (row * from.width + column) * kLine, int32_t(dy == 0 && dx == 0 ? 0 : Permutations::of(dy, dx))};
      }
  }
}

// Tiles of up to rows x pixels of a part, none of which covers another's pixels.
struct Tiles {
  Tiles(int64_t height, int64_t width, int64_t most_rows, int64_t most_pixels)
      : height(height), width(width), down((height + most_rows - 1) / most_rows), rows((height + down - 1) / down) {
    across = (width + most_pixels - 1) / most_pixels;
    pixels = (width + across - 1) / across;
  }
  int64_t count() const { return down * across; }
  int64_t y(int64_t tile) const { return tile / across * height / down; }
  int64_t rows_of(int64_t tile) const { return (tile / across + 1) * height / down - y(tile); }
  int64_t x(int64_t tile) const { return tile % across * width / across; }
  int64_t pixels_of(int64_t tile) const { return (tile % across + 1) * width / across - x(tile); }
  int64_t at(int64_t tile) const { return (y(tile) * width + x(tile)) * kLine; }
  int64_t plane() const { return height * width * kLine; }
  int64_t height, width, down, rows, across, pixels;
};

// A convolution whose weight [rows, fan-in] is in blocks of columns; `over_residual`: its results take the residual's place.
struct Conv {
  Conv(const Tensor& x, int64_t rows, std::optional<Tensor> bias, std::optional<Tensor> residual, int64_t activation,
       const std::vector<int64_t>& numbers, int64_t grid, int64_t most_rows, bool over_residual)
      : from(lanes_of(x, grid)), w(window_of(numbers, from.channels, from.height * grid, from.width * grid)), rows(rows),
        group_rows(rows / w.groups), channels(from.channels / w.groups), taps(w.height.kernel * w.width.kernel),
        activation(activation),
        // Rows of a tile share the pixels that both read.
        tiles(part_of(w.height, grid), part_of(w.width, grid),
              w.height.stride == 1 && w.height.kernel > 1 && w.height.dilation == 1 ? most_rows : 1, table.most_pixels),
        panel(w, tiles.rows, tiles.pixels), sizes{from.units, rows, tiles.height, tiles.width, kLine},
        y(over_residual ? *residual : empty(x, sizes)) {
    STD_TORCH_CHECK(!bias || (bias->numel() == rows && bias->scalar_type() == ScalarType::Float && bias->is_contiguous()),
                    "fxsparse: expected bias [", rows, "] in float32");
    STD_TORCH_CHECK(!residual || (residual->dim() == 5 && residual->scalar_type() == ScalarType::Float &&
                                  std::equal(sizes.begin(), sizes.end(), residual->sizes().begin())),
                    "fxsparse: expected a residual of the output's shape and dtype");
    if (over_residual) {
      const auto* to = static_cast<const float*>(y.const_data_ptr());
      const bool apart = to + y.numel() <= from.data || from.data + x.numel() <= to;
      STD_TORCH_CHECK(y.is_contiguous() && apart,
                      "fxsparse: expected a contiguous residual to write over that shares no memory with x");
    }
    if (bias) start = static_cast<const float*>(bias->const_data_ptr());
    if (residual) added = in_order(*residual);
    // The input itself is the panel where one tap reads every pixel where it lies.
    direct = taps == 1 && w.height.before == 0 && w.width.before == 0 && tiles.height == from.height &&
             tiles.width == from.width && channels * from.plane() < kMostPlaces;
  }

  // Where the column at `first` + i of the fan-in reads, from the first channel of a block that begins there, i < count.
  void places(int64_t first, int64_t count, uint32_t* to) const {
    const auto apart = uint32_t(direct ? from.plane() * sizeof(float) : panel.channel * kLineBytes);
    uint32_t channel = 0;
    for (int64_t i = 0, tap = first % taps; i < count; i++) {
      to[i] = channel + (direct ? 0 : panel.taps[tap]);
      if (++tap == taps) tap = 0, channel += apart;
    }
  }

  // multiply(tile, block, begin, end, sums, results or null) for `blocks` of `width` columns and all rows; `work` is the
  // multiply-adds for a pixel.
  template <class F>
  Tensor run(int64_t blocks, int64_t width, int64_t work, const F& multiply) const {
    if (y.numel() == 0) return y;
    const int64_t spans = (width + 2 * taps - 2) / taps, once = std::min(kRowsAtOnce, group_rows);
    // Channels of a panel: those of a block, or all of them where several runs of rows read it.
    const int64_t held = group_rows > once ? channels : std::min(channels, spans), items = from.units * tiles.count();
    const auto* residual = added ? static_cast<const float*>(added->const_data_ptr()) : nullptr;
    auto* to = static_cast<float*>(y.mutable_data_ptr());
    share(std::min(items, threads_for(tiles.plane() * from.units * work)), [&](int64_t part, int64_t parts) {
      Buffer lines(direct ? 0 : held * panel.channel * kLine), sums(once * tiles.rows * tiles.pixels * kLine);
      std::vector<LineSource> sources;
      for (int64_t item = items * part / parts; item < items * (part + 1) / parts; item++) {
        const int64_t unit = item / tiles.count(), tile = item % tiles.count();
        const int64_t at = unit * rows * tiles.plane() + tiles.at(tile);
        const LineResults results{to + at, residual ? residual + at : nullptr, tiles.plane(), tiles.width * kLine, activation};
        if (!direct) plan_of(from, w, panel, tiles.y(tile), tiles.x(tile), sources);
        const LinePlan plan{sources.data(), panel.channel, permutations_of(from.grid), 0.0f};
        for (int64_t r = 0; r < rows;) {
          const int64_t group = r / group_rows, end = std::min(r + once, (group + 1) * group_rows);
          const float* planes = from.data + (unit * from.channels + group * channels) * from.plane();
          if (!direct && held == channels && r % group_rows == 0)
            table.fill(planes, from.plane(), channels, plan, lines.data);
          for (int64_t b = 0; b < blocks; b++) {
            const int64_t first = b * width / taps, last = std::min(channels, first + spans);
            const float* read = direct ? planes + first * from.plane() + tiles.at(tile)
                                       : lines.data + (held == channels ? first * panel.channel * kLine : 0);
            if (!direct && held < channels)
              table.fill(planes + first * from.plane(), from.plane(), last - first, plan, lines.data);
            LineTile here{read, tiles.rows_of(tile), tiles.pixels_of(tile), panel.pitch * kLineBytes, nullptr, spans, from.plane()};
            if (direct && b + 1 < blocks)
              here.ahead = planes + (b + 1) * width * from.plane() + tiles.at(tile);
            else if (direct && tile + 1 < tiles.count() && end == rows)
              here.ahead = from.data + unit * from.channels * from.plane() + tiles.at(tile + 1);
            multiply(here, b, r, end, sums.data, b + 1 == blocks ? &results : nullptr);
          }
          r = end;
        }
      }
    });
    return y;
  }

  // The same for a dense weight with one row for each channel: no panel is for one row alone.
  Tensor run_own(const float* values) const {
    if (y.numel() == 0) return y;
    const int64_t some = std::clamp<int64_t>(kPanelLines / panel.channel, 1, rows), items = from.units * tiles.count();
    const auto* residual = added ? static_cast<const float*>(added->const_data_ptr()) : nullptr;
    auto* to = static_cast<float*>(y.mutable_data_ptr());
    share(std::min(items, threads_for(y.numel() * taps)), [&](int64_t part, int64_t parts) {
      Buffer lines(some * panel.channel * kLine);
      std::vector<LineSource> sources;
      for (int64_t item = items * part / parts; item < items * (part + 1) / parts; item++) {
        const int64_t unit = item / tiles.count(), tile = item % tiles.count();
        const int64_t at = unit * rows * tiles.plane() + tiles.at(tile);
        const LineResults results{to + at, residual ? residual + at : nullptr, tiles.plane(), tiles.width * kLine, activation};
        plan_of(from, w, panel, tiles.y(tile), tiles.x(tile), sources);
        for (int64_t r = 0; r < rows; r += some) {
          const int64_t end = std::min(rows, r + some);
          table.fill(from.data + (unit * rows + r) * from.plane(), from.plane(), end - r,
                     {sources.data(), panel.channel, permutations_of(from.grid), 0.0f}, lines.data);
          table.filter({lines.data, 1, tiles.pixels_of(tile), 0, nullptr, 0, 0}, panel.channel,
                       {values, taps, panel.taps.data(), taps}, r, end, start, results);
        }
      }
    });
    return y;
  }

  const LaneTable& table = table_of();
  Lanes from;
  Window w;
  int64_t rows, group_rows, channels, taps, activation;
  Tiles tiles;
  Panel panel;
  std::vector<int64_t> sizes;
  Tensor y;
  std::optional<Tensor> added;
  const float* start = nullptr;
  bool direct;
};

Tensor sparse_conv(const Tensor& x, const Tensor& values, const Tensor& start, const Tensor& columns,
                   std::optional<Tensor> bias, std::optional<Tensor> residual, int64_t activation,
                   const std::vector<int64_t>& numbers, int64_t grid, bool over_residual) {
  const int64_t rows = start.dim() == 2 ? start.size(1) - 1 : -1;
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && rows >= 0 && numbers.size() == 12 && numbers[10] > 0,
                  "fxsparse: expected values in float32, start [blocks, rows + 1] and a window of 12 numbers");
  const Conv conv(x, rows, bias, residual, activation, numbers, grid, table_of().most_rows, over_residual);
  const Weight weight = weight_of(values, start, columns, conv.channels * conv.taps, conv.w.groups);
  check(weight, values.numel());
  Buffer held(values.numel());
  std::vector<uint32_t> reads(weight.width);
  auto* places = reinterpret_cast<uint32_t*>(held.data);
  for (int64_t b = 0; b < weight.blocks; b++) {
    conv.places(b * weight.width, weight.width, reads.data());
    const int32_t* of_row = weight.start + b * (rows + 1);
    conv.table.places(weight.columns + of_row[0], of_row[rows] - of_row[0], reads.data(), places + of_row[0]);
  }
  return conv.run(weight.blocks, weight.width, values.numel() + rows,
                  [&](const LineTile& tile, int64_t b, int64_t begin, int64_t end, float* sums, const LineResults* results) {
                    const LineRows of_block{weight.values, places, weight.start + b * (rows + 1)};
                    conv.table.multiply(tile, of_block, begin, end, sums, b == 0, conv.start, results);
                  });
}

Tensor csr_conv_lanes(const Tensor& x, const Tensor& values, const Tensor& start, const Tensor& columns,
                      std::optional<Tensor> bias, std::optional<Tensor> residual, int64_t activation,
                      std::vector<int64_t> numbers, int64_t grid) {
  return sparse_conv(x, values, start, columns, bias, residual, activation, numbers, grid, false);
}

void csr_conv_lanes_over(const Tensor& x, const Tensor& values, const Tensor& start, const Tensor& columns,
                         std::optional<Tensor> bias, Tensor residual, int64_t activation, std::vector<int64_t> numbers,
                         int64_t grid) {
  sparse_conv(x, values, start, columns, bias, residual, activation, numbers, grid, true);
}

// weight [rows, channels of a group, kernel height, kernel width].
Tensor conv_lanes(const Tensor& x, const Tensor& weight_any, std::optional<Tensor> bias, std::optional<Tensor> residual,
                  int64_t activation, std::vector<int64_t> numbers, int64_t grid) {
  const Tensor weight = in_order(weight_any);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float && numbers.size() == 12 && numbers[10] > 0 &&
                      weight.size(0) % numbers[10] == 0,
                  "fxsparse: expected a weight [out, in, height, width] in float32 and a window of 12 numbers, got ",
                  described(weight));
  const int64_t rows = weight.size(0);
  const Conv conv(x, rows, bias, residual, activation, numbers, grid, 1, false);
  const int64_t fan_in = conv.channels * conv.taps;
  STD_TORCH_CHECK(weight.numel() == rows * fan_in, "fxsparse: expected a weight of ", fan_in, " columns, got ",
                  described(weight));
  if (conv.channels == 1 && conv.group_rows == 1)
    return conv.run_own(static_cast<const float*>(weight.const_data_ptr()));
  const int64_t lines = conv.direct ? conv.tiles.pixels : conv.panel.channel;
  const int64_t width = std::min(std::max<int64_t>(1, kPanelLines / lines), conv.channels) * conv.taps;
  std::vector<uint32_t> places(width);  // blocks begin with channels, so that all of them read alike
  conv.places(0, width, places.data());
  const auto* values = static_cast<const float*>(weight.const_data_ptr());
  return conv.run((fan_in + width - 1) / width, width, weight.numel(),
                  [&](const LineTile& tile, int64_t b, int64_t begin, int64_t end, float* sums, const LineResults* results) {
                    const DenseRows of_block{values + b * width, fan_in, places.data(), std::min(width, fan_in - b * width)};
                    conv.table.product(tile, of_block, begin, end, sums, b == 0, conv.start, results);
                  });
}

// `numbers` as of max_pool in pool.cpp, the output's size of samples.
Tensor max_pool_lanes(const Tensor& x, std::vector<int64_t> numbers, int64_t grid) {
  STD_TORCH_CHECK(numbers.size() == 10, "fxsparse: expected 10 numbers, got ", numbers.size());
  const Lanes from = lanes_of(x, grid);
  const auto axis = [&](int64_t i, int64_t in) {
    const int64_t reach = (numbers[8 + i] - 1) * numbers[2 + i] + (numbers[i] - 1) * numbers[6 + i] + 1;
    return Axis{numbers[i], numbers[2 + i], numbers[4 + i], reach - numbers[4 + i] - in, numbers[6 + i], in};
  };
  const Window w{axis(0, from.height * grid), axis(1, from.width * grid), 1};
  const LaneTable& table = table_of();
  const Tiles tiles(part_of(w.height, grid), part_of(w.width, grid), 1, table.most_pixels);
  Tensor y = empty(x, {from.units, from.channels, tiles.height, tiles.width, kLine});
  auto* to = static_cast<float*>(y.mutable_data_ptr());
  const Panel panel(w, 1, tiles.pixels);
  const int64_t planes = from.units * from.channels;
  std::vector<std::vector<LineSource>> sources(tiles.count());
  for (int64_t tile = 0; tile < tiles.count(); tile++) plan_of(from, w, panel, tiles.y(tile), tiles.x(tile), sources[tile]);
  share(std::min(planes, threads_for(y.numel() * numbers[0] * numbers[1])), [&](int64_t part, int64_t parts) {
    Buffer lines(panel.channel * kLine);
    for (int64_t i = planes * part / parts; i < planes * (part + 1) / parts; i++)
      for (int64_t tile = 0; tile < tiles.count(); tile++) {  // inside: a plane is read from its begin to its end
        const LinePlan plan{sources[tile].data(), panel.channel, permutations_of(grid), -std::numeric_limits<float>::infinity()};
        table.fill(from.data + i * from.plane(), from.plane(), 1, plan, lines.data);
        table.largest(lines.data, panel.taps.data(), panel.taps.size(), tiles.pixels_of(tile),
                      to + i * tiles.plane() + tiles.at(tile));
      }
  });
  return y;
}

// f(the address of the first pixel in each sample of every lane, floats of them, the first line) for all rows of parts.
template <class T, class F>
void for_rows(T* images, int64_t units, int64_t channels, int64_t height, int64_t width, int64_t grid, const F& f) {
  const int64_t samples = kLine / (grid * grid), h = height / grid, v = width / grid, plane = height * width;
  const int64_t rows = grid == 1 ? 1 : h, run = grid == 1 ? h * v : v, work = units * channels;
  int64_t offsets[kLine];
  for (int64_t lane = 0; lane < kLine; lane++)
    offsets[lane] = lane / (grid * grid) * channels * plane + lane / grid % grid * h * width + lane % grid * v;
  share(std::min(work, threads_for(work * h * v * 4)), [&](int64_t part, int64_t parts) {
    for (int64_t i = work * part / parts; i < work * (part + 1) / parts; i++)
      for (int64_t y = 0; y < rows; y++) {
        T* at[kLine];
        T* first = images + (i / channels * samples * channels + i % channels) * plane + y * width;
        for (int64_t lane = 0; lane < kLine; lane++) at[lane] = first + offsets[lane];
        f(at, run, (i * h + y) * v * kLine);
      }
  });
}

Tensor to_lanes(const Tensor& x_any, int64_t grid) {
  const Tensor x = in_order(x_any);
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float && (grid == 1 || grid == 2 || grid == 4) &&
                      x.size(0) * grid * grid % kLine == 0 && x.size(2) % grid == 0 && x.size(3) % grid == 0,
                  "fxsparse: expected images in float32 that fill 16 lanes with ", grid, " x ", grid, " parts, got ",
                  described(x));
  const int64_t units = x.size(0) * grid * grid / kLine;
  Tensor y = empty(x, {units, x.size(1), x.size(2) / grid, x.size(3) / grid, kLine});
  auto* to = static_cast<float*>(y.mutable_data_ptr());
  const LaneTable& table = table_of();
  for_rows(static_cast<const float*>(x.const_data_ptr()), units, x.size(1), x.size(2), x.size(3), grid,
           [&](const float* const* rows, int64_t count, int64_t at) { table.gather(rows, count, to + at); });
  return y;
}

Tensor from_lanes(const Tensor& x_any, int64_t grid) {
  const Tensor x = in_order(x_any);
  const Lanes from = lanes_of(x, grid);
  Tensor y = empty(x, {from.units * kLine / (grid * grid), from.channels, from.height * grid, from.width * grid});
  const LaneTable& table = table_of();
  for_rows(static_cast<float*>(y.mutable_data_ptr()), from.units, from.channels, y.size(2), y.size(3), grid,
           [&](float* const* rows, int64_t count, int64_t at) { table.scatter(from.data + at, count, rows); });
  return y;
}

// Where the lanes of parts of a coarse grid come from, in the units of a finer one, for one block of pixels of a part: those
// that part (block / ratio, block % ratio) of the finer parts in it holds.
std::vector<Permutation> joined(int64_t fine, int64_t coarse, int64_t block) {
  const int64_t ratio = fine / coarse, samples = kLine / (fine * fine);
  std::vector<Permutation> lanes(ratio * ratio);
  for (int64_t lane = 0; lane < kLine; lane++) {
    const int64_t sample = lane / (coarse * coarse), y = lane / coarse % coarse * ratio + block / ratio;
    const int64_t x = lane % coarse * ratio + block % ratio;
    for (int64_t k = 0; k < ratio * ratio; k++)
      lanes[k].sources[lane] = sample / samples == k ? (sample % samples * fine + y) * fine + x : -1;
  }
  return lanes;
}

Tensor join_lanes(std::vector<Tensor> given, int64_t fine, int64_t coarse) {
  STD_TORCH_CHECK(!given.empty() && fine > coarse, "fxsparse: expected images in lanes, and a grid coarser than ", fine,
                  ", got ", given.size(), " tensors and ", coarse);
  const Lanes first = lanes_of(given[0], fine);
  lanes_of(given[0], coarse);
  std::vector<const float*> units;
  for (const Tensor& x : given) {
    const Lanes from = lanes_of(x, fine);
    STD_TORCH_CHECK(from.channels == first.channels && from.height == first.height && from.width == first.width,
                    "fxsparse: expected images of one size, got ", described(x), " beside ", described(given[0]));
    for (int64_t u = 0; u < from.units; u++) units.push_back(from.data + u * from.channels * from.plane());
  }
  const int64_t ratio = fine / coarse, each = ratio * ratio, count = units.size() / each, channels = first.channels;
  STD_TORCH_CHECK(units.size() % each == 0, "fxsparse: expected a multiple of ", each, " units, got ", units.size());
  Tensor y = empty(given[0], {count, channels, first.height * ratio, first.width * ratio, kLine});
  if (y.numel() == 0) return y;
  std::vector<std::vector<Permutation>> lanes;
  for (int64_t block = 0; block < each; block++) lanes.push_back(joined(fine, coarse, block));
  auto* to = static_cast<float*>(y.mutable_data_ptr());
  const LaneTable& table = table_of();
  const int64_t planes = count * channels, row = first.width * kLine;
  share(std::min(planes, threads_for(y.numel() * 2)), [&](int64_t part, int64_t parts) {
    std::vector<const float*> rows(each);
    for (int64_t i = planes * part / parts; i < planes * (part + 1) / parts; i++)
      for (int64_t r = 0; r < first.height * ratio; r++)
        for (int64_t b = 0; b < ratio; b++) {
          for (int64_t k = 0; k < each; k++)
            rows[k] = units[i / channels * each + k] + i % channels * first.plane() + r % first.height * row;
          table.join(rows.data(), lanes[r / first.height * ratio + b].data(), each, first.width,
                     to + ((i * first.height * ratio + r) * ratio + b) * row);
        }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) {
  m.impl("csr_conv_lanes", TORCH_BOX(&csr_conv_lanes));
  m.impl("csr_conv_lanes_over", TORCH_BOX(&csr_conv_lanes_over));
  m.impl("conv_lanes", TORCH_BOX(&conv_lanes));
  m.impl("max_pool_lanes", TORCH_BOX(&max_pool_lanes));
  m.impl("to_lanes", TORCH_BOX(&to_lanes));
  m.impl("from_lanes", TORCH_BOX(&from_lanes));
  m.impl("join_lanes", TORCH_BOX(&join_lanes));
}
