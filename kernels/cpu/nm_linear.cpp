// Linear layers with an N:M weight: checks and threads.
#include "nm.h"
#include "tensors.h"

namespace {

using namespace fxsparse;

MultiplyChunks* multiply_chunks() {
#if defined(FXSPARSE_X86)
  if (chosen_level >= kAvx512) return &multiply_chunks_avx512;
  if (chosen_level == kAvx2) return &multiply_chunks_avx2;
#endif
  return &multiply_chunks_portable;
}

Chunks chunks_of(const Tensor& x, const Tensor& values, const Tensor& places, const Tensor& dense,
                 const std::optional<Tensor>& scales) {
  STD_TORCH_CHECK(values.dim() == 5 && values.size(4) == kChunk16 && dense.dim() == 3,
                  "fxsparse: expected values [groups, runs, run, steps, 16] and dense [0, out, in]");
  check_input(x, values, dense.size(2), scales);
  const int64_t groups = values.size(0), runs = values.size(1), run = values.size(2), steps = values.size(3);
  const int64_t out = dense.size(1), in = dense.size(2);
  STD_TORCH_CHECK(run > 0 && steps > 0 && run <= 8 && steps <= 8 && run * steps <= 8 &&
                      groups == (out + kChunk16 - 1) / kChunk16 && runs == (in + run * kChunk16 - 1) / (run * kChunk16),
                  "fxsparse: expected chunks for ", out, " x ", in, ", and 1 to 8 steps in a run, got ", groups,
                  " groups of ", runs, " x ", run, " x ", steps);
  const auto* found = index32(places, groups * runs * kChunk16, "places");
  return {values.const_data_ptr(), stored_scalar(values, scales), reinterpret_cast<const uint32_t*>(found),
          groups, runs, run, steps, out};
}

Tensor nm_lanes_forward(const Tensor& x_any, const Tensor& values, const Tensor& places, const Tensor& dense,
                        std::optional<Tensor> bias, int64_t activation, std::optional<Tensor> residual,
                        std::optional<Tensor> scales) {
  const Chunks s = chunks_of(x_any, values, places, dense, scales);
  std::vector<Buffer> owned;
  const Tensor x = in_order(x_any);
  Epilogue epilogue;
  Added added{bias, residual, scales};
  Tensor y = output(x, s.rows, {}, added, activation, owned, epilogue);
  if (y.numel() == 0) return y;
  const float* from = as_floats(x, owned);
  const Matrix to = matrix(y, "y");
  MultiplyChunks* multiply = multiply_chunks();
  const int64_t fours = (s.groups + 3) / 4;  // groups whose sums stay in registers
  share(std::min(fours, threads_for(to.tokens * s.groups * s.slots())), [&](int64_t part, int64_t parts) {
    const auto begin = [&](int64_t p) { return std::min(s.groups, fours * p / parts * 4); };
    multiply(from, dense.size(2), s, begin(part), begin(part + 1), epilogue, to);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) { m.impl("nm_lanes_forward", TORCH_BOX(&nm_lanes_forward)); }
