// A weight of sparse convolutions for inference, its columns in blocks (formats/column_blocks.py).
#pragma once
#include "tensors.h"
#include "window.h"

namespace fxsparse {

struct Weight {
  std::vector<Buffer> owned;
  const float* values;
  const uint16_t* columns;
  const int32_t* start;
  int64_t blocks, rows, fan_in, width;  // width: columns of a block
  BlockRows block(int64_t b) const { return {values, columns, start + b * (rows + 1)}; }
};

inline Weight weight_of(const Tensor& values, const Tensor& start, const Tensor& columns, int64_t fan_in, int64_t groups) {
  STD_TORCH_CHECK(start.dim() == 2 && start.size(0) > 0 && start.size(1) > 0 && (start.size(1) - 1) % groups == 0,
                  "fxsparse: expected start [blocks, rows + 1] with rows in ", groups, " groups");
  STD_TORCH_CHECK(columns.scalar_type() == ScalarType::Short && columns.is_contiguous() && values.is_contiguous() &&
                      values.numel() == columns.numel(),
                  "fxsparse: expected int16 columns and as many values");
  Weight w{{}, nullptr, static_cast<const uint16_t*>(columns.const_data_ptr()), index32(start, start.numel(), "start"),
           start.size(0), start.size(1) - 1, fan_in, (fan_in + start.size(0) - 1) / start.size(0)};
  w.values = as_floats(values, w.owned);
  return w;
}

// Entries are within their bounds, block for block.
inline void check(const Weight& w, int64_t count) {
  int64_t from = 0;
  for (int64_t b = 0; b < w.blocks; b++) {
    const int64_t width = std::min(w.width, w.fan_in - b * w.width);
    const int32_t* start = w.start + b * (w.rows + 1);
    STD_TORCH_CHECK(std::is_sorted(start, start + w.rows + 1) && start[0] == from && start[w.rows] <= count,
                    "fxsparse: expected start to ascend to at most ", count);
    from = start[w.rows];
    const uint16_t most = tiles().most(w.columns + start[0], from - start[0]);
    STD_TORCH_CHECK(start[0] == from || most < width, "fxsparse: the weight has an entry in column ", most, " of ", width);
  }
}

}  // namespace fxsparse
