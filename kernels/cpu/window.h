// The geometry of a convolution, and the instruction set that computes it.
#pragma once
#include "tensors.h"
#include "tiles.h"

namespace fxsparse {

inline const TileTable& tiles() {
#if defined(FXSPARSE_X86)
  if (chosen_level >= kAvx512) return tiles_avx512();
  if (chosen_level == kAvx2) return tiles_avx2();
#endif
  return tiles_portable();
}

// One dimension of a convolution.
struct Axis {
  int64_t kernel, stride, before, after, dilation, in;
  int64_t out() const { return (in + before + after - dilation * (kernel - 1) - 1) / stride + 1; }
  int64_t phase(int64_t tap) const { return tap * dilation % stride; }
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
  int64_t most_shift() const { return shift(kernel - 1); }
  // The first place in units of `stride` that has a pixel of the input, and how many there are.
  int64_t first() const { return before / stride; }
  int64_t places() const { return (in - 1 + before) / stride - first() + 1; }
};

struct Window {
  Axis height, width;
  int64_t groups;
};

// Images of these channels, of the weight's dtype; `check_images` of library.py says the same.
inline void check_images(const Tensor& x, const Tensor& typed, int64_t channels) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == channels && x.scalar_type() == typed.scalar_type(),
                  "fxsparse: expected images of ", channels, " channels in ", type_name(typed.scalar_type()),
                  " as the weight is, got ", described(x));
}

// Of images of these channels and this size.
inline Window window_of(const std::vector<int64_t>& w, int64_t channels, int64_t height, int64_t width) {
  STD_TORCH_CHECK(w.size() == 12 && w[11] == channels, "fxsparse: expected a window of 12 numbers for ", channels,
                  " channels, got ", w.size());
  const Window window{{w[0], w[2], w[4], w[6], w[8], height}, {w[1], w[3], w[5], w[7], w[9], width}, w[10]};
  STD_TORCH_CHECK(window.height.out() > 0 && window.width.out() > 0 && w[10] > 0 && channels % w[10] == 0,
                  "fxsparse: expected an input that the kernel fits into, its channels in ", w[10], " groups");
  return window;
}

// `typed` has the dtype of the weight.
inline Window window_of(const std::vector<int64_t>& w, const Tensor& x, const Tensor& typed) {
  STD_TORCH_CHECK(w.size() == 12, "fxsparse: expected a window of 12 numbers, got ", w.size());
  check_images(x, typed, w[11]);
  return window_of(w, w[11], x.size(2), x.size(3));
}

}  // namespace fxsparse
