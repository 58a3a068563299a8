// Spartan's soft top-k: one number for all weights, such that sigmoid(beta * value / cost + shift) costs the budget.
//
// One pass over the values for each evaluation: fp32 sigmoids, sums in fp64 over equal parts, so that the result does not
// depend on the number of threads.
#include "tensors.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define FXSPARSE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FXSPARSE_CLONES
#endif

namespace {

using namespace fxsparse;

constexpr int64_t kPart = 1 << 15;  // values that one thread takes at a time
constexpr int64_t kRun = 64;        // sums in fp32 no longer than this

struct Sums {
  double mass = 0;   // of cost * mask
  double slope = 0;  // of cost * mask * (1 - mask)
};

// exp(-|x|), relative error below 2e-7, without a branch so that loops over it become vectors.
inline float exp_of_negative(float x) {
  x = x < 0 ? x : -x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const float r = x - n * 0.693145752f - n * 1.42860677e-6f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3f800000;
  float power;
  __builtin_memcpy(&power, &bits, 4);
  return p * power;
}

// A mask of 0 < m < 1 and 1 - m, the smaller of which keeps its relative precision.
FXSPARSE_CLONES Sums sum_scaled(const float* values, int64_t count, float scale, float shift) {
  Sums sums;
  for (int64_t base = 0; base < count; base += kRun) {
    float mass = 0, slope = 0;
    const int64_t end = std::min(base + kRun, count);
    for (int64_t i = base; i < end; i++) {
      const float x = scale * values[i] + shift, e = exp_of_negative(x), q = 1.0f / (1.0f + e);
      mass += x < 0 ? e * q : q;
      slope += e * q * q;
    }
    sums.mass += mass;
    sums.slope += slope;
  }
  return sums;
}

FXSPARSE_CLONES Sums sum_costed(const float* values, const float* costs, int64_t count, float beta, float shift) {
  Sums sums;
  for (int64_t base = 0; base < count; base += kRun) {
    float mass = 0, slope = 0;
    const int64_t end = std::min(base + kRun, count);
    for (int64_t i = base; i < end; i++) {
      const float x = beta * values[i] / costs[i] + shift, e = exp_of_negative(x), q = 1.0f / (1.0f + e);
      mass += costs[i] * (x < 0 ? e * q : q);
      slope += costs[i] * e * q * q;
    }
    sums.mass += mass;
    sums.slope += slope;
  }
  return sums;
}

// [mass, slope] in fp64 of values and costs (fp32, contiguous; one cost, or one for each value) at a shift.
Tensor soft_topk_sums(const Tensor& values, const Tensor& costs, double beta, double shift) {
  const int64_t count = values.numel(), parts = (count + kPart - 1) / kPart;
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && costs.scalar_type() == ScalarType::Float &&
                      values.is_contiguous() && costs.is_contiguous() && (costs.numel() == 1 || costs.numel() == count),
                  "fxsparse: expected contiguous float32 values [n] and costs [n] or [1]");
  const auto* value = static_cast<const float*>(values.const_data_ptr());
  const auto* cost = static_cast<const float*>(costs.const_data_ptr());
  const bool one = costs.numel() == 1;
  std::vector<Sums> sums(parts);
  torch::stable::parallel_for(0, parts, std::max<int64_t>(1, parts / 64), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) {
      const int64_t first = p * kPart, here = std::min(kPart, count - first);
      sums[p] = one ? sum_scaled(value + first, here, float(beta / *cost), float(shift))
                    : sum_costed(value + first, cost + first, here, float(beta), float(shift));
    }
  });
  Tensor result = empty(aoti_torch_dtype_float64(), {2});
  auto* to = static_cast<double*>(result.mutable_data_ptr());
  to[0] = to[1] = 0;
  for (const Sums& part : sums) {
    to[0] += part.mass;
    to[1] += part.slope;
  }
  if (one)
    for (int i = 0; i < 2; i++) to[i] *= *cost;
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) { m.impl("soft_topk_sums", TORCH_BOX(&soft_topk_sums)); }
