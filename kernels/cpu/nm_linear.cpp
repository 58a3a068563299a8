// Linear layers with an N:M or a strided 1:M weight: checks and threads.
#include "nm.h"
#include "tensors.h"

namespace {

using namespace fxsparse;

const NmTable& nm_table() {
#if defined(FXSPARSE_X86)
  if (chosen_level >= kAvx512) return nm_avx512();
  if (chosen_level == kAvx2) return nm_avx2();
#endif
  return nm_portable();
}

// How many chunks `in` inputs take: 16 each, or `bands` groups of `strides`.
int64_t chunks_for(int64_t in, int64_t strides) {
  const int64_t bands = kChunk16 / strides, groups = in / strides;
  return (groups + bands - 1) / bands;
}

// A weight [out, in] by its values and places; `strides` is 1 for N:M.
Chunks chunks_of(const Tensor& x, const Tensor& values, const Tensor& places, int64_t out, int64_t in, int64_t strides,
                 const std::optional<Tensor>& scales) {
  STD_TORCH_CHECK(values.dim() == 5 && values.size(4) == kChunk16,
                  "fxsparse: expected values [groups, runs, run, steps, 16]");
  check_input(x, values, in, scales);
  const int64_t groups = values.size(0), runs = values.size(1), run = values.size(2), steps = values.size(3);
  const int64_t chunks = chunks_for(in, strides);
  STD_TORCH_CHECK(run > 0 && steps > 0 && run <= 8 && steps <= 8 && run * steps <= 8 &&
                      groups == (out + kChunk16 - 1) / kChunk16 && runs == (chunks + run - 1) / run,
                  "fxsparse: expected chunks for ", out, " x ", in, ", and 1 to 8 steps in a run, got ", groups,
                  " groups of ", runs, " x ", run, " x ", steps);
  const auto* found = index32(places, groups * runs * kChunk16, "places");
  return {values.const_data_ptr(), stored_scalar(values, scales), reinterpret_cast<const uint32_t*>(found),
          groups, runs, run, steps, out, chunks};
}

Tensor product(const Tensor& x_any, const Chunks& s, int64_t in, int64_t strides, Added added, int64_t activation) {
  std::vector<Buffer> owned;
  const Tensor x = in_order(x_any);
  Epilogue epilogue;
  Tensor y = output(x, s.rows, {}, added, activation, owned, epilogue);
  if (y.numel() == 0) return y;
  const float* inputs = as_floats(x, owned);
  const Matrix to = matrix(y, "y");
  const NmTable& table = nm_table();
  if (strides > 1 || in != s.width()) {
    owned.emplace_back(to.tokens * s.width());
    float* arranged = owned.back().data;
    share(threads_for(to.tokens * in), [&](int64_t part, int64_t parts) {
      const int64_t begin = to.tokens * part / parts, end = to.tokens * (part + 1) / parts;
      if (strides > 1) return table.arrange(inputs, in, strides, begin, end, s.chunks, arranged);
      for (int64_t t = begin; t < end; t++) {
        float* after = std::copy(inputs + t * in, inputs + (t + 1) * in, arranged + t * s.width());
        std::fill(after, arranged + (t + 1) * s.width(), 0.0f);
      }
    });
    inputs = arranged;
  }
  const int64_t fours = (s.groups + 3) / 4;  // groups whose sums stay in registers
  share(std::min(fours, threads_for(to.tokens * s.groups * s.slots())), [&](int64_t part, int64_t parts) {
    const auto begin = [&](int64_t p) { return std::min(s.groups, fours * p / parts * 4); };
    table.multiply(inputs, s, begin(part), begin(part + 1), epilogue, to);
  });
  return y;
}

Tensor nm_lanes_forward(const Tensor& x, const Tensor& values, const Tensor& places, const Tensor& dense,
                        std::optional<Tensor> bias, int64_t activation, std::optional<Tensor> residual,
                        std::optional<Tensor> scales) {
  STD_TORCH_CHECK(dense.dim() == 3, "fxsparse: expected dense [0, out, in]");
  const Chunks s = chunks_of(x, values, places, dense.size(1), dense.size(2), 1, scales);
  return product(x, s, dense.size(2), 1, {bias, residual, scales}, activation);
}

// `dense` [0, out, in, m] of a strided 1:m weight.
Tensor strided_forward(const Tensor& x, const Tensor& values, const Tensor& places, const Tensor& dense,
                       std::optional<Tensor> bias, int64_t activation, std::optional<Tensor> residual,
                       std::optional<Tensor> scales) {
  STD_TORCH_CHECK(dense.dim() == 4, "fxsparse: expected dense [0, out, in, m]");
  const int64_t in = dense.size(2), m = dense.size(3);
  STD_TORCH_CHECK(m > 1 && m <= kChunk16 && in % m == 0, "fxsparse: expected 2 to 16 strides of ", in, " inputs, got ", m);
  const Chunks s = chunks_of(x, values, places, dense.size(1), in, m, scales);
  return product(x, s, in, m, {bias, residual, scales}, activation);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) {
  m.impl("nm_lanes_forward", TORCH_BOX(&nm_lanes_forward));
  m.impl("strided_forward", TORCH_BOX(&strided_forward));
}
