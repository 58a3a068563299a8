// Max pooling without indices, on planes [height, width]: torch's kernel finds the place of every maximum, too.
#include <cmath>
#include <limits>

#include "tensors.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define FXSPARSE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FXSPARSE_CLONES
#endif

namespace {

using namespace fxsparse;

struct Axis {
  int64_t kernel, stride, before, dilation, in, out;
};

// The larger one, NaN where either is NaN, as torch has it.
inline float larger(float a, float b) { return a > b || a != a ? a : b; }

// column[j] = the largest of column[j] and row[j].
FXSPARSE_CLONES void take_larger(const float* row, int64_t count, float* column) {
  for (int64_t j = 0; j < count; j++) column[j] = larger(row[j], column[j]);
}

// to[j] = the largest of the taps of output j; `column` has every pixel's largest over the rows, with padding.
FXSPARSE_CLONES void slide(const float* column, const Axis& width, float* to) {
  for (int64_t j = 0; j < width.out; j++) to[j] = column[j * width.stride];
  for (int64_t k = 1; k < width.kernel; k++) {
    const float* tap = column + k * width.dilation;
    if (width.stride == 1) {
      for (int64_t j = 0; j < width.out; j++) to[j] = larger(tap[j], to[j]);
    } else if (width.stride == 2) {
      for (int64_t j = 0; j < width.out; j++) to[j] = larger(tap[2 * j], to[j]);
    } else {
      for (int64_t j = 0; j < width.out; j++) to[j] = larger(tap[j * width.stride], to[j]);
    }
  }
}

void pool_plane(const float* x, const Axis& height, const Axis& width, float* column, int64_t span, float* y) {
  for (int64_t i = 0; i < height.out; i++) {
    std::fill_n(column, span, -std::numeric_limits<float>::infinity());
    for (int64_t k = 0; k < height.kernel; k++) {
      const int64_t row = i * height.stride + k * height.dilation - height.before;
      if (row >= 0 && row < height.in) take_larger(x + row * width.in, width.in, column + width.before);
    }
    slide(column, width, y + i * width.out);
  }
}

// x [..., height, width] fp32; `window` has kernel, stride, padding, dilation and the output's size, height and width each.
Tensor max_pool(const Tensor& x_any, std::vector<int64_t> window) {
  STD_TORCH_CHECK(window.size() == 10 && x_any.dim() >= 2 && x_any.scalar_type() == ScalarType::Float,
                  "fxsparse: expected x [..., height, width] in float32 and 10 numbers");
  const Tensor x = in_order(x_any);
  const auto axis = [&](int64_t i) {
    return Axis{window[i], window[2 + i], window[4 + i], window[6 + i], x.size(x.dim() - 2 + i), window[8 + i]};
  };
  const Axis height = axis(0), width = axis(1);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[sizes.size() - 2] = height.out;
  sizes.back() = width.out;
  Tensor y = empty(x, sizes);
  const int64_t planes = x.numel() / std::max<int64_t>(1, height.in * width.in);
  const int64_t span = std::max(width.before + width.in,
                                (width.out - 1) * width.stride + (width.kernel - 1) * width.dilation + 1);
  const auto* from = static_cast<const float*>(x.const_data_ptr());
  auto* to = static_cast<float*>(y.mutable_data_ptr());
  share(std::min(planes, threads_for(y.numel() * height.kernel * width.kernel)), [&](int64_t part, int64_t parts) {
    Buffer column(span);
    for (int64_t p = planes * part / parts; p < planes * (part + 1) / parts; p++)
      pool_plane(from + p * height.in * width.in, height, width, column.data, span, to + p * height.out * width.out);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) { m.impl("max_pool", TORCH_BOX(&max_pool)); }
