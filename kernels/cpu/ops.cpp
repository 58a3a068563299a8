// The CPU implementations of the fxsparse ops, on torch's stable ABI: checks, panels, threads.
//
// Scratch memory, per thread: one panel of 64 tokens (32 of wide layers) of x and (backward) of grad_y in fp32;
// per call (backward): two fp32 arrays of capacity.  Nothing has the size of the dense weight.
#include "tensors.h"

namespace {

using namespace fxsparse;

// Sets the instruction set where `level` >= 0, never beyond what the CPU has; returns the one in use.
int64_t cpu_level(int64_t level) {
  if (level >= 0) chosen_level = std::min(level, best_level());
  return chosen_level;
}

// Gives memory that nobody uses back to the system; returns its bytes.
int64_t cpu_release() { return KeptMemory::all().release(); }

// FLOP that every thread together did in `steps` of the loop in roof.h.
int64_t cpu_multiply_adds(int64_t steps) {
  const int64_t threads = torch::stable::get_num_threads();
  std::atomic<int64_t> flops{0};
  share(threads, [&](int64_t, int64_t) {
    float numbers[] = {0.5f, 1.0f};
    flops += table().multiply_adds(steps, numbers);
  });
  return flops;
}

// The sum of fp32 `data`, read `times` by all threads, each its part.
double cpu_read(const Tensor& data, int64_t times) {
  STD_TORCH_CHECK(data.is_contiguous(), "fxsparse: expected contiguous data");
  const float* floats = static_cast<const float*>(data.const_data_ptr());
  const int64_t count = data.numel(), threads = torch::stable::get_num_threads();
  std::vector<double> sums(threads);
  share(threads, [&](int64_t part, int64_t parts) {
    const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
    for (int64_t i = 0; i < times; i++) sums[part] += table().read_all(floats + begin, end - begin);
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// Where the share `part` of `parts` of the rows begins: equal numbers of entries, whole blocks of rows.
int64_t share_begin(const Sparse& s, int64_t rows, int64_t part, int64_t parts) {
  constexpr int64_t kBlock = 16;
  if (part >= parts) return rows;
  if (!s.start) return std::min(rows, rows * part / parts / kBlock * kBlock);
  const int64_t target = int64_t(s.start[rows]) * part / parts;
  const int64_t row = std::lower_bound(s.start, s.start + rows, target) - s.start;
  return std::min(rows, (part ? row : 0) / kBlock * kBlock);
}

// ---- panels

struct Panel {
  int64_t first;    // token
  int64_t vectors;  // 1, 2, 4 or 8
};

// Vectors of a panel.  From 4 MiB on half of them are faster: 65,536 wide, 41 entries a row, 32 tokens at once took 0.6 of
// the time of 64 on a busy machine, while 16 were no faster.
int64_t most_vectors(int64_t features, const Table& table) {
  const bool half = features * table.most_vectors * table.lanes * 4 >= (1 << 22);
  return half ? std::max<int64_t>(1, table.most_vectors / 2) : table.most_vectors;
}

// Whether panels of so many features are past the L2 of one core.
bool is_far(int64_t features, const Table& table) {
  return features * most_vectors(features, table) * table.lanes * 4 >= (1 << 20);
}

std::vector<Panel> panels_of(int64_t tokens, int64_t most, const Table& table) {
  std::vector<Panel> panels;
  for (int64_t first = 0; first < tokens;) {
    int64_t vectors = most;
    while (vectors > 1 && (vectors / 2) * table.lanes >= tokens - first) vectors /= 2;
    panels.push_back({first, vectors});
    first += vectors * table.lanes;
  }
  return panels;
}

// Panels of 2 to 4 vectors, or one panel of 1: a panel of 1 adds in another order, and results must not depend on threads.
// With one thread most have 4, which is fastest; with more every thread gets as many panels, of nearly as many tokens.
std::vector<Panel> shared_panels(int64_t tokens, int64_t threads, const Table& table) {
  const int64_t vectors = (tokens + table.lanes - 1) / table.lanes, fewest = (vectors + 3) / 4;
  const int64_t count = fewest < threads ? fewest : (fewest + threads - 1) / threads * threads;
  std::vector<Panel> panels;
  for (int64_t begin = 0, p = 0; begin < vectors; p++) {
    const int64_t left = vectors - begin, most = left == 5 ? 3 : std::min<int64_t>(4, left);
    const int64_t here = threads > 1 ? vectors * (p + 1) / count - begin : most;
    panels.push_back({begin * table.lanes, here});
    begin += here;
  }
  return panels;
}

// multiply(panel, vectors, begin, end, first token) for all panels of x, with begin = share_begin(part, parts) of the rows;
// the panels are the units, or parts of them where there are few.  Each ends with a row of zeros, and has 1, 2, 4 or 8
// vectors, or 3, too, where `threes`.
template <class Multiply, class ShareBegin>
void multiply_all(const Matrix& x, int64_t work, const Multiply& multiply, const ShareBegin& share_begin,
                  bool threes = false) {
  const Table& t = table();
  const int64_t most = most_vectors(x.features, t), threads = threads_for(work);
  const auto panels = threes && most == 4 ? shared_panels(x.tokens, threads, t) : panels_of(x.tokens, most, t);
  const int64_t count = panels.size();
  const int64_t panel_floats = (x.features + 1) * most * t.lanes;
  const auto fill = [&](const Panel& p, float* panel) {
    t.transpose(x, p.first, p.vectors, panel);
    const int64_t width = p.vectors * t.lanes;
    std::fill_n(panel + x.features * width, width, 0.0f);
  };
  if (count >= threads) {
    return share(threads, [&](int64_t part, int64_t parts) {
      Buffer panel(panel_floats);
      for (int64_t p = count * part / parts; p < count * (part + 1) / parts; p++) {
        fill(panels[p], panel.data);
        multiply(panel.data, panels[p].vectors, share_begin(0, 1), share_begin(1, 1), panels[p].first);
      }
    });
  }
  Buffer transposed(count * panel_floats);
  share(count, [&](int64_t p, int64_t) { fill(panels[p], transposed.data + p * panel_floats); });
  const int64_t splits = (threads + count - 1) / count;
  share(count * splits, [&](int64_t part, int64_t) {
    const int64_t p = part / splits, split = part % splits;
    multiply(transposed.data + p * panel_floats, panels[p].vectors, share_begin(split, splits),
             share_begin(split + 1, splits), panels[p].first);
  });
}

constexpr const char* kTooNarrow = "fxsparse: the weight has entries in columns past those of x, which has ";

// Columns ascend within a row, so the last entry of each row bounds all of them.
void check_columns(const Sparse& s, int64_t rows, int64_t features) {
  for (int64_t r = 0; r < rows; r++) {
    const int64_t begin = s.start ? s.start[r] : r * s.fan_in, end = s.start ? s.start[r + 1] : (r + 1) * s.fan_in;
    if (end <= begin) continue;
    const int64_t last = s.index16 ? static_cast<const int16_t*>(s.index)[end - 1]
                                   : static_cast<const int32_t*>(s.index)[end - 1];
    STD_TORCH_CHECK(last < features, kTooNarrow, features, " features");
  }
}

Tensor forward(const Tensor& x_any, Sparse s, int64_t rows, int64_t nnz, const Scatter& scatter,
               Added added, int64_t activation) {
  std::vector<Buffer> owned;
  const Tensor x = in_order(x_any);
  Epilogue epilogue;
  Tensor y = output(x, rows, scatter, added, activation, owned, epilogue);
  if (y.numel() == 0) return y;
  Matrix from = matrix(x, "x");
  const Matrix to = matrix(y, "y");
  from.tokens = to.tokens;  // also where there are no input features
  if (scatter.empty) table().fill(epilogue, scatter.empty_rows, scatter.empty, to);
  if (to.tokens > kFewTokens) {
    check_columns(s, rows, from.features);
    s.far = is_far(from.features, table());
    multiply_all(
        from, to.tokens * (nnz + from.features + to.features),
        [&](const float* panel, int64_t vectors, int64_t begin, int64_t end, int64_t first) {
          table().multiply(panel, vectors, s, begin, end, epilogue, to, first);
        },
        [&](int64_t part, int64_t parts) { return share_begin(s, rows, part, parts); });
    return y;
  }
  const float* floats = as_floats(x, owned);
  std::atomic<bool> inside{true};
  share(threads_for(nnz * 8), [&](int64_t part, int64_t parts) {
    if (!table().multiply_few(floats, from.features, s, share_begin(s, rows, part, parts),
                              share_begin(s, rows, part + 1, parts), epilogue, to))
      inside = false;
  });
  STD_TORCH_CHECK(inside, kTooNarrow, from.features, " features");
  return y;
}

// ---- ops

// The entries end where crow does; what `values` and `cols` hold after them is never read.
Sparse csr(const Tensor& values, const Tensor& crow, const Tensor& cols, const std::optional<Tensor>& scales = {}) {
  const int64_t capacity = values.numel();
  const int32_t* start = index32(crow, crow.numel(), "crow");
  STD_TORCH_CHECK(crow.numel() > 0 && start[crow.numel() - 1] >= 0 && start[crow.numel() - 1] <= capacity,
                  "fxsparse: expected crow to end with at most ", capacity);
  const bool index16 = cols.scalar_type() == ScalarType::Short && cols.is_contiguous() && cols.numel() == capacity;
  const void* index = index16 ? cols.const_data_ptr() : index32(cols, capacity, "cols");
  return {values.const_data_ptr(), stored_scalar(values, scales), start, index, index16, 0};
}

Tensor csr_forward(const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& cols,
                   int64_t in_features, std::optional<Tensor> bias, int64_t activation,
                   std::optional<Tensor> residual, std::optional<Tensor> scales) {
  check_input(x, values, in_features, scales);
  const Sparse s = csr(values, crow, cols, scales);
  const int64_t rows = crow.numel() - 1;
  return forward(x, s, rows, s.start[rows], {}, {bias, residual, scales}, activation);
}

Tensor condensed_forward(const Tensor& x, const Tensor& values, const Tensor& indices,
                         std::optional<Tensor> active_rows, std::optional<Tensor> empty_rows,
                         int64_t in_features, std::optional<Tensor> bias, int64_t activation,
                         std::optional<Tensor> residual) {
  check_input(x, values, in_features);
  const bool index16 = indices.scalar_type() == ScalarType::Short;
  STD_TORCH_CHECK(values.dim() == 2 && indices.numel() == values.numel() && indices.is_contiguous() &&
                      (index16 || indices.scalar_type() == ScalarType::Int),
                  "fxsparse: expected values [out, k] and contiguous indices [out, k] in int16 or int32");
  const Sparse s{values.const_data_ptr(),      scalar_of(values, "values"), nullptr,
                 indices.const_data_ptr(), index16,                      values.size(1)};
  STD_TORCH_CHECK(active_rows.has_value() == empty_rows.has_value(),
                  "fxsparse: expected both active_rows and empty_rows, or neither");
  const int64_t active = values.size(0);
  const Scatter scatter = active_rows ? scatter_of(*active_rows, active, *empty_rows) : Scatter{};
  return forward(x, s, active, values.numel(), scatter, {bias, residual, {}}, activation);
}

const uint8_t* bytes(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte && t.is_contiguous() && t.numel() == count,
                  "fxsparse: expected ", name, " uint8, contiguous, with ", count, " elements, got ", t.numel());
  return static_cast<const uint8_t*>(t.const_data_ptr());
}

// Where x is narrower than its windows, the entries of the last one may lie outside.
void check_lookup_columns(const Lookup& s, int64_t groups, int64_t features) {
  STD_TORCH_CHECK((features + kWindow - 1) / kWindow == s.windows, "fxsparse: the weight has ", s.windows,
                  " windows of ", kWindow, " columns, but x has ", features, " features");
  if (features % kWindow == 0) return;
  bool inside = true;
  for (int64_t g = 0; g < groups; g++) {
    const uint8_t* last = s.columns + s.starts[g + 1] * int64_t(64);
    int64_t bundles = s.counts[(g + 1) * s.windows - 1] + (s.windows > 1 ? s.counts[(g + 1) * s.windows - 2] : 0);
    for (const uint8_t* column = last - 64 * bundles; column < last; column++) {
      const bool in_last_block = *column / kWindow % 2 == (s.windows - 1) % 2;
      inside &= *column < 128 || !in_last_block || *column % kWindow < features % kWindow;
    }
  }
  STD_TORCH_CHECK(inside, kTooNarrow, features, " features");
}

void multiply_lookup(const Matrix& x, const Lookup& s, int64_t groups, const Epilogue& epilogue, const Matrix& y) {
  const int64_t slots = s.starts[groups] * int64_t(64);
  const auto share_begin = [&](int64_t part, int64_t parts) {
    const int64_t target = s.starts[groups] * part / parts;
    return part >= parts ? groups : std::lower_bound(s.starts, s.starts + groups, target) - s.starts;
  };
#if defined(FXSPARSE_X86)
  if (y.tokens <= kLookupTokens && chosen_level >= kVbmi) {
    const int64_t size = plane_bytes(s.windows);
    Buffer planes(y.tokens * size);
    auto* bytes = reinterpret_cast<uint8_t*>(planes.data);
    for (int64_t token = 0; token < y.tokens; token++) split(x, token, s.windows, bytes + token * size * 4);
    return share(threads_for(y.tokens * slots * 2), [&](int64_t part, int64_t parts) {
      look_up(bytes, s, share_begin(part, parts), share_begin(part + 1, parts), epilogue, y);
    });
  }
#endif
  multiply_all(
      x, y.tokens * (slots + x.features + y.features),
      [&](const float* panel, int64_t vectors, int64_t begin, int64_t end, int64_t first) {
        table().multiply_lookup(panel, x.features, vectors, s, begin, end, epilogue, y, first);
      },
      share_begin);
}

Tensor lookup_forward(const Tensor& x_any, const Tensor& values, const Tensor& columns, const Tensor& counts,
                      const Tensor& starts, const Tensor& active_rows, const Tensor& empty_rows,
                      int64_t in_features, std::optional<Tensor> bias, int64_t activation,
                      std::optional<Tensor> residual, std::optional<Tensor> scales) {
  check_input(x_any, values, in_features, scales);
  STD_TORCH_CHECK(counts.dim() == 2, "fxsparse: expected counts [groups, windows]");
  const int64_t groups = counts.size(0), active = active_rows.numel();
  STD_TORCH_CHECK((active + kGroup - 1) / kGroup == groups, "fxsparse: expected a group for every ", kGroup, " rows");
  const Lookup s{values.const_data_ptr(),
                 stored_scalar(values, scales),
                 bytes(columns, values.numel(), "columns"),
                 bytes(counts, counts.numel(), "counts"),
                 index32(starts, groups + 1, "starts"),
                 counts.size(1),
                 active};
  STD_TORCH_CHECK(s.starts[groups] * int64_t(64) == values.numel(), "fxsparse: expected starts to end with ",
                  values.numel() / 64);
  std::vector<Buffer> owned;
  const Tensor x = in_order(x_any);
  const Scatter scatter = scatter_of(active_rows, active, empty_rows);
  Epilogue epilogue;
  Added added{bias, residual, scales};
  Tensor y = output(x, active, scatter, added, activation, owned, epilogue);
  if (y.numel() == 0) return y;
  Matrix from = matrix(x, "x");
  const Matrix to = matrix(y, "y");
  from.tokens = to.tokens;
  check_lookup_columns(s, groups, from.features);
  if (scatter.empty) table().fill(epilogue, scatter.empty_rows, scatter.empty, to);
  if (groups) multiply_lookup(from, s, groups, epilogue, to);
  return y;
}

template <class T>
const T* narrow(const Tensor& t, ScalarType type, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == count, "fxsparse: expected ", name,
                  " of ", int64_t(sizeof(T)), " bytes, contiguous, with ", count, " elements, got ", t.numel());
  return static_cast<const T*>(t.const_data_ptr());
}

// y [..., out] of a product that goes by panels alone; `work` is what one token costs, in multiply-adds.
template <class Multiply, class ShareBegin>
Tensor in_panels(const Tensor& x_any, int64_t out, int64_t work, Added added, int64_t activation, const Multiply& multiply,
                 const ShareBegin& share_begin, bool paired, bool threes) {
  std::vector<Buffer> owned;
  const Tensor x = in_order(x_any);
  Epilogue epilogue;
  Tensor y = output(x, out, {}, added, activation, owned, epilogue);
  if (y.numel() == 0) return y;
  Matrix from = matrix(x, "x");
  const Matrix to = matrix(y, "y");
  from.tokens = to.tokens;
  if (paired) from = {from.data, Scalar::f32, from.tokens, from.features / 2};  // as many bits as a float
  multiply_all(
      from, to.tokens * (work + from.features + to.features),
      [&](const float* panel, int64_t vectors, int64_t begin, int64_t stop, int64_t first) {
        multiply(panel, vectors, begin, stop, epilogue, to, first);
      },
      share_begin, threes);
  return y;
}

Tensor striped_forward(const Tensor& x_any, const Tensor& values, const Tensor& columns, const Tensor& rows,
                       const Tensor& lengths, const Tensor& starts, const Tensor& dense, std::optional<Tensor> bias,
                       int64_t activation, std::optional<Tensor> residual, std::optional<Tensor> scales) {
  const int64_t segments = rows.numel(), nnz = values.numel(), out = dense.size(1), in = dense.size(2);
  check_input(x_any, values, in, scales);
  const int64_t chunks = (out + kChunk - 1) / kChunk, stripes = (in + kStripe - 1) / kStripe;
  const Striped s{values.const_data_ptr(),
                  stored_scalar(values, scales),
                  bytes(columns, nnz, "columns"),
                  narrow<int16_t>(rows, ScalarType::Short, segments, "rows"),
                  bytes(lengths, segments, "lengths"),
                  index32(starts, 2 * (chunks * stripes + 1), "starts"),
                  stripes,
                  out};
  const int32_t* end = s.starts + 2 * chunks * stripes;
  STD_TORCH_CHECK(end[0] == segments && end[1] == nnz, "fxsparse: expected starts to end with ", segments, " and ", nnz);
  return in_panels(
      x_any, out, nnz, {bias, residual, scales}, activation,
      [&](const float* panel, int64_t vectors, int64_t begin, int64_t stop, const Epilogue& epilogue, const Matrix& to,
          int64_t first) { table().multiply_striped(panel, vectors, s, begin, stop, epilogue, to, first); },
      [&](int64_t part, int64_t parts) { return chunks * part / parts; }, false, true);
}

// The product of blocks for a panel: by pairs of columns where the blocks have them and the CPU an instruction for them.
auto multiply_blocks_by(bool by_pairs) {
#if defined(FXSPARSE_X86)
  if (by_pairs) return &multiply_block_pairs;
#endif
  return table().multiply_blocks;
}

Tensor bsr_forward(const Tensor& x_any, const Tensor& values, const Tensor& crow, const Tensor& columns,
                   const Tensor& dense, std::optional<Tensor> bias, int64_t activation, std::optional<Tensor> residual) {
  const bool paired = values.dim() == 4;
  STD_TORCH_CHECK((values.dim() == 3 || (paired && values.size(3) == 2)) && crow.numel() > 0 && dense.dim() == 3,
                  "fxsparse: expected values [blocks, width, height] or [blocks, width / 2, height, 2], crow and dense [0, out, in]");
  const int64_t blocks = values.size(0), width = values.size(1) * (paired ? 2 : 1), height = values.size(2);
  const int64_t count = crow.numel() - 1, out = dense.size(1), in = dense.size(2);
  check_input(x_any, values, in);
  STD_TORCH_CHECK(count * height == out && width > 0 && in % width == 0, "fxsparse: expected blocks that divide ", out,
                  " x ", in, ", got ", height, " x ", width);
  const Blocks s{values.const_data_ptr(),
                 scalar_of(values, "values"),
                 index32(crow, count + 1, "crow"),
                 index32(columns, blocks, "columns"),
                 height,
                 width,
                 paired};
  STD_TORCH_CHECK(s.start[count] == blocks, "fxsparse: expected crow to end with ", blocks);
  STD_TORCH_CHECK(!paired || s.scalar == Scalar::bf16, "fxsparse: expected pairs of columns in bfloat16 alone");
  const bool by_pairs = paired && chosen_level >= kBf16;
  const auto multiply = multiply_blocks_by(by_pairs);
  return in_panels(
      x_any, out, values.numel() / 2, {bias, residual, {}}, activation,
      [&](const float* panel, int64_t vectors, int64_t begin, int64_t stop, const Epilogue& epilogue, const Matrix& to,
          int64_t first) { multiply(panel, vectors, s, begin, stop, epilogue, to, first); },
      [&](int64_t part, int64_t parts) {
        const int64_t target = blocks * part / parts;
        return part >= parts ? count : part ? std::lower_bound(s.start, s.start + count, target) - s.start : int64_t(0);
      },
      by_pairs, false);
}

struct Needs {
  bool x, values, bias;
};

// A wave of panels at a time, one per thread: with one thread the transposed grad_y stays in L2 for all three uses.
void backward(const Matrix& grad, const Matrix& x, const Sparse& by_row, const Sparse& by_column, int64_t nnz, Needs needs,
              const Matrix& grad_x, float* grad_values, float* grad_values_t, float* grad_bias) {
  const Table& t = table();
  const int64_t most = most_vectors(std::max(grad.features, x.features), t);
  const auto panels = panels_of(grad.tokens, most, t);
  const int64_t rows = grad.features, columns = x.features, count = panels.size();
  const int64_t threads = threads_for(grad.tokens * (2 * nnz + rows + columns)), wave = std::min(threads, count);
  const int64_t width = most * t.lanes;
  Buffer grad_panels(wave * rows * width), x_panels(needs.values ? wave * columns * width : 0);
  for (int64_t base = 0; base < count; base += wave) {
    const int64_t here = std::min(wave, count - base);
    share(here, [&](int64_t i, int64_t) {
      const Panel p = panels[base + i];
      t.transpose(grad, p.first, p.vectors, grad_panels.data + i * rows * width);
      if (needs.values) t.transpose(x, p.first, p.vectors, x_panels.data + i * columns * width);
    });
    if (needs.x) {
      const int64_t splits = (threads + here - 1) / here;
      share(here * splits, [&](int64_t part, int64_t) {
        const int64_t i = part / splits, split = part % splits;
        t.multiply(grad_panels.data + i * rows * width, panels[base + i].vectors, by_column,
                   share_begin(by_column, columns, split, splits), share_begin(by_column, columns, split + 1, splits),
                   {nullptr, 0, nullptr}, grad_x, panels[base + i].first);
      });
    }
    share(threads, [&](int64_t part, int64_t parts) {
      for (int64_t i = 0; i < here; i++) {
        const float* grad_panel = grad_panels.data + i * rows * width;
        const float* x_panel = x_panels.data + i * columns * width;
        const int64_t vectors = panels[base + i].vectors;
        if (needs.values && grad_values)
          t.sample(grad_panel, x_panel, vectors, by_row, share_begin(by_row, rows, part, parts),
                   share_begin(by_row, rows, part + 1, parts), grad_values);
        if (needs.values && grad_values_t)
          t.sample(x_panel, grad_panel, vectors, by_column, share_begin(by_column, columns, part, parts),
                   share_begin(by_column, columns, part + 1, parts), grad_values_t);
        if (needs.bias) t.add_rows(grad_panel, vectors, rows * part / parts, rows * (part + 1) / parts, grad_bias);
      }
    });
  }
}

std::tuple<Tensor, Tensor, Tensor> csr_backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& values,
                                                const Tensor& crow, const Tensor& cols, const Tensor& ccol,
                                                const Tensor& rows_t, const Tensor& perm, bool need_x,
                                                bool need_values, bool need_bias) {
  const Tensor grad = in_order(grad_any), x = in_order(x_any);
  const int64_t capacity = values.numel(), rows = crow.numel() - 1, columns = ccol.numel() - 1;
  check_input(x, values, columns);
  STD_TORCH_CHECK(grad.dim() > 0 && grad.size(-1) == rows && tokens_of(x) == tokens_of(grad) &&
                      grad.scalar_type() == x.scalar_type(),
                  "fxsparse: expected grad [..., ", rows, "] for x ", described(x), ", got ", described(grad));
  std::vector<Buffer> owned;
  Sparse by_row = csr(values, crow, cols);
  by_row.far = is_far(columns, table());
  STD_TORCH_CHECK(!by_row.index16, "fxsparse: expected cols int32 in training");
  const int64_t nnz = by_row.start[rows];
  const int32_t* place = index32(perm, capacity, "perm");
  Sparse by_column{nullptr, Scalar::f32, index32(ccol, columns + 1, "ccol"), index32(rows_t, capacity, "rows_t"), false, 0,
                   is_far(rows, table())};
  STD_TORCH_CHECK(by_column.start[columns] == nnz, "fxsparse: expected ccol to end with ", nnz, " as crow does");
  Buffer values_t(need_x ? nnz : 0);
  if (need_x) {
    const float* floats = as_floats(values, owned);
    share(threads_for(nnz), [&](int64_t part, int64_t parts) {
      for (int64_t e = nnz * part / parts; e < nnz * (part + 1) / parts; e++) values_t.data[e] = floats[place[e]];
    });
    by_column.values = values_t.data;
  }
  // Gather from the smaller panel, which fits nearer caches; but rows of few entries cost more than that saves.
  const bool short_rows = nnz < 64 * std::max(rows, columns);
  const bool transposed = short_rows ? columns < rows : rows < columns;
  Buffer sums(need_values ? capacity : 0), bias_sums(need_bias ? rows : 0);
  if (need_values) std::fill_n(sums.data, capacity, 0.0f);
  if (need_bias) std::fill_n(bias_sums.data, rows, 0.0f);

  Tensor grad_x = need_x ? like(x, columns) : empty(x, {0});
  Tensor grad_values = empty(values, {need_values ? capacity : 0}), grad_bias = empty(grad, {need_bias ? rows : 0});
  Matrix grad_matrix{grad.mutable_data_ptr(), scalar_of(grad, "grad"), tokens_of(grad), rows};
  Matrix x_matrix{x.mutable_data_ptr(), grad_matrix.scalar, grad_matrix.tokens, columns};
  backward(grad_matrix, x_matrix, by_row, by_column, nnz, {need_x, need_values, need_bias},
           {need_x ? grad_x.mutable_data_ptr() : nullptr, grad_matrix.scalar, grad_matrix.tokens, columns},
           need_values && !transposed ? sums.data : nullptr, need_values && transposed ? sums.data : nullptr,
           bias_sums.data);

  if (need_values && transposed) {
    Buffer ordered(capacity);
    std::fill(ordered.data + nnz, ordered.data + capacity, 0.0f);
    for (int64_t e = 0; e < nnz; e++) ordered.data[place[e]] = sums.data[e];
    put_floats(ordered.data, grad_values);
  } else if (need_values) {
    put_floats(sums.data, grad_values);
  }
  if (need_bias) put_floats(bias_sums.data, grad_bias);
  return {grad_x, grad_values, grad_bias};
}

// grad^T x at the entries of an index with rows in `crow`, fp32: the weight gradient where nothing is stored yet.
Tensor csr_sample(const Tensor& grad_any, const Tensor& x_any, const Tensor& crow, const Tensor& cols) {
  const Tensor grad = in_order(grad_any), x = in_order(x_any);
  const int64_t rows = crow.numel() - 1, count = cols.numel();
  STD_TORCH_CHECK(grad.dim() == 2 && x.dim() == 2 && grad.size(0) == x.size(0) && grad.size(1) == rows &&
                      grad.scalar_type() == x.scalar_type(),
                  "fxsparse: expected grad [tokens, ", rows, "] and x [tokens, in] of one dtype");
  const int32_t* start = index32(crow, rows + 1, "crow");
  STD_TORCH_CHECK(start[rows] == count, "fxsparse: expected crow to end with ", count);
  const Sparse index{nullptr, Scalar::f32, start, index32(cols, count, "cols"), false, 0, is_far(x.size(1), table())};
  check_columns(index, rows, x.size(1));
  Tensor result = empty(aoti_torch_dtype_float32(), {count});
  auto* sums = static_cast<float*>(result.mutable_data_ptr());
  std::fill_n(sums, count, 0.0f);
  const Matrix grad_matrix = matrix(grad, "grad");
  const Matrix x_matrix{x.mutable_data_ptr(), grad_matrix.scalar, grad_matrix.tokens, x.size(1)};
  backward(grad_matrix, x_matrix, index, {}, count, {false, true, false}, {}, sums, nullptr, nullptr);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fxsparse, m) {
  m.def("cpu_level(int level) -> int");
  m.def("cpu_release() -> int");
  m.def("cpu_multiply_adds(int steps) -> int");
  m.def("cpu_read(Tensor data, int times) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&cpu_level));
  m.impl("cpu_release", TORCH_BOX(&cpu_release));
  m.impl("cpu_multiply_adds", TORCH_BOX(&cpu_multiply_adds));
}

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) {
  m.impl("csr_forward", TORCH_BOX(&csr_forward));
  m.impl("csr_backward", TORCH_BOX(&csr_backward));
  m.impl("csr_sample", TORCH_BOX(&csr_sample));
  m.impl("condensed_forward", TORCH_BOX(&condensed_forward));
  m.impl("lookup_forward", TORCH_BOX(&lookup_forward));
  m.impl("striped_forward", TORCH_BOX(&striped_forward));
  m.impl("bsr_forward", TORCH_BOX(&bsr_forward));
  m.impl("cpu_read", TORCH_BOX(&cpu_read));
}
