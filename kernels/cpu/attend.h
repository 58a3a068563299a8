// Attention of one head: what each instruction set provides.
#pragma once
#include <cstdint>

namespace fxsparse {

// One head in fp32: the features of a token lie together, and tokens lie q_row, k_row, v_row and y_row floats apart.
struct Head {
  const float *q, *k, *v;
  float* y;
  int64_t q_row, k_row, v_row, y_row;
  int64_t queries, keys, features, value_features;
  // Added to the scores, or (mask_is_bool) bytes that are 0 where a query does not see a key; null for none.
  const void* mask;
  int64_t mask_row, mask_column;  // elements from a query and a key to the next
  bool mask_is_bool, causal;
  float scale;
};

struct AttendTable {
  // Floats of scratch memory for heads of so many keys and features.
  int64_t (*scratch)(int64_t keys, int64_t features, int64_t value_features);
  // Lays keys and values out in `scratch`, where `attend` finds them.
  void (*prepare)(const Head&, float* scratch);
  // y[i] = softmax(q[i] k^T * scale + mask) v for queries begin <= i < end; 0 where a query sees no key.
  void (*attend)(const Head&, int64_t begin, int64_t end, float* scratch);
};

const AttendTable& attend_portable();
const AttendTable& attend_avx2();
const AttendTable& attend_avx512();

}  // namespace fxsparse
