// Attention for inference: checks, heads, threads.
#include "attend.h"
#include "tensors.h"

namespace {

using namespace fxsparse;

constexpr int64_t kQueries = 192;  // of a head that one thread takes at once

const AttendTable& functions() {
#if defined(FXSPARSE_X86)
  if (chosen_level >= kAvx512) return attend_avx512();
  if (chosen_level == kAvx2) return attend_avx2();
#endif
  return attend_portable();
}

// A tensor [batch, heads, tokens, features] and its strides, with the features of a token together.
struct Heads {
  explicit Heads(const Tensor& any)
      : tensor(any.size(3) == 1 || any.stride(3) == 1 ? any : torch::stable::contiguous(any)),
        data(static_cast<const float*>(tensor.const_data_ptr())),
        batch(tensor.stride(0)), head(tensor.stride(1)), row(tensor.stride(2)) {}
  const float* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }

  Tensor tensor;
  const float* data;
  int64_t batch, head, row;
};

// A mask that broadcasts to the scores: strides are 0 along what it repeats.
struct Mask {
  Mask(const std::optional<Tensor>& mask, const std::vector<int64_t>& scores) {
    if (!mask) return;
    const int64_t dims = mask->dim();
    STD_TORCH_CHECK(dims <= 4, "fxsparse: expected a mask of at most 4 dimensions, got ", dims);
    is_bool = mask->scalar_type() == ScalarType::Bool;
    STD_TORCH_CHECK(is_bool || mask->scalar_type() == ScalarType::Float, "fxsparse: expected a mask in float32 or bool");
    for (int64_t d = 0; d < dims; d++) {
      const int64_t size = mask->size(d), at = 4 - dims + d;
      STD_TORCH_CHECK(size == scores[at] || size == 1, "fxsparse: expected a mask that broadcasts to the scores, got ",
                      size, " for ", scores[at]);
      strides[at] = size == 1 ? 0 : mask->stride(d);
    }
    data = static_cast<const char*>(mask->const_data_ptr());
  }
  const void* at(int64_t b, int64_t h) const {
    return data ? data + (b * strides[0] + h * strides[1]) * (is_bool ? 1 : 4) : nullptr;
  }

  const char* data = nullptr;
  int64_t strides[4] = {0, 0, 0, 0};
  bool is_bool = false;
};

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  for (const Tensor* t : {&q, &k, &v})
    STD_TORCH_CHECK(t->dim() == 4 && t->scalar_type() == ScalarType::Float && t->is_cpu() && t->size(0) == q.size(0) &&
                        t->size(1) == q.size(1),
                    "fxsparse: expected q, k and v [batch, heads, tokens, features] in float32 on the CPU");
  STD_TORCH_CHECK(k.size(3) == q.size(3) && v.size(2) == k.size(2),
                  "fxsparse: expected keys as wide as queries and as many values as keys");
}

// q [batch, heads, queries, features], k and v [batch, heads, keys, ...] fp32 -> [batch, queries, heads, features of v]
// where `tokens_first`, else [batch, heads, queries, features of v].
Tensor attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, std::optional<Tensor> mask_any, bool causal,
                 double scale, bool tokens_first) {
  check(q_any, k_any, v_any);
  const Heads q(q_any), k(k_any), v(v_any);
  const int64_t batch = q_any.size(0), heads = q_any.size(1), queries = q_any.size(2), keys = k_any.size(2);
  const int64_t features = q_any.size(3), value_features = v_any.size(3);
  const Mask mask(mask_any, {batch, heads, queries, keys});
  Tensor y = empty(q_any, {batch, tokens_first ? queries : heads, tokens_first ? heads : queries, value_features});
  const int64_t y_row = tokens_first ? heads : 1, y_head = tokens_first ? 1 : queries;
  if (y.numel() == 0) return y;
  auto* to = static_cast<float*>(y.mutable_data_ptr());
  const auto head = [&](int64_t unit) {
    const int64_t b = unit / heads, h = unit % heads;
    return Head{q.at(b, h), k.at(b, h), v.at(b, h), to + (b * queries * heads + h * y_head) * value_features,
                q.row, k.row, v.row, y_row * value_features,
                queries, keys, features, value_features,
                mask.at(b, h), mask.strides[2], mask.strides[3],
                mask.is_bool, causal, static_cast<float>(scale)};
  };
  const AttendTable& table = functions();
  const int64_t blocks = (queries + kQueries - 1) / kQueries, items = batch * heads * blocks;
  const int64_t work = batch * heads * queries * keys * (features + value_features);
  share(std::min(items, threads_for(work)), [&](int64_t part, int64_t parts) {
    Buffer scratch(table.scratch(keys, features, value_features));
    int64_t prepared = -1;
    for (int64_t item = items * part / parts; item < items * (part + 1) / parts; item++) {
      const int64_t unit = item / blocks, first = item % blocks * kQueries;
      const Head here = head(unit);
      if (unit != prepared) table.prepare(here, scratch.data);
      prepared = unit;
      table.attend(here, first, std::min(queries, first + kQueries), scratch.data);
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) { m.impl("attention", TORCH_BOX(&attention)); }
