// What every op needs of its tensors: checks, views, fp32 copies and new tensors; the instruction set, scratch memory and
// threads.  On torch's stable ABI.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "memory.h"
#include "table.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has the older name only
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace fxsparse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Level : int64_t { kPortable, kAvx2, kAvx512, kVbmi, kBf16 };

inline int64_t best_level() {
#if defined(FXSPARSE_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return !__builtin_cpu_supports("avx512vbmi") ? kAvx512 : __builtin_cpu_supports("avx512bf16") ? kBf16 : kVbmi;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPortable;
}

inline std::atomic<int64_t> chosen_level{best_level()};

inline const Table& table() {
#if defined(FXSPARSE_X86)
  if (chosen_level >= kAvx512) return table_avx512();
  if (chosen_level == kAvx2) return table_avx2();
#endif
  return table_portable();
}

// Uninitialised floats.
struct Buffer {
  explicit Buffer(int64_t count) : large(count * sizeof(float) >= kLarge) {
    const size_t bytes = std::max<int64_t>(count, 1) * sizeof(float);
    data = static_cast<float*>(large ? KeptMemory::all().take(bytes) : ::operator new(bytes, kAlign));
  }
  Buffer(Buffer&& other) noexcept : large(other.large), data(std::exchange(other.data, nullptr)) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    if (!large) ::operator delete(data, kAlign);
    else if (data) KeptMemory::all().give(data);
  }

  static constexpr std::align_val_t kAlign{64};
  const bool large;
  float* data;
};

// ---- checks and views

inline Scalar scalar_of(const Tensor& t, const char* name) {
  const auto type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "fxsparse: expected ", name,
                  " in float32 or bfloat16");
  return type == ScalarType::Float ? Scalar::f32 : Scalar::bf16;
}

inline std::string type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    default: return torch::headeronly::toString(type);
  }
}

// "[2, 40] in float32"
inline std::string described(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); d++) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "] in " + type_name(t.scalar_type());
}

// Of the values of a weight, which are in int8 or bfloat16 where they have scales, whatever the weight is in.
inline Scalar stored_scalar(const Tensor& values, const std::optional<Tensor>& scales) {
  return scales && values.scalar_type() == ScalarType::Char ? Scalar::i8 : scalar_of(values, "values");
}

// An x [..., features] of the weight's dtype, which the scales have, too; `check_input` of library.py says the same.
inline void check_input(const Tensor& x, const Tensor& values, int64_t features,
                        const std::optional<Tensor>& scales = {}) {
  const auto type = scales ? scales->scalar_type() : values.scalar_type();
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) == features && x.scalar_type() == type, "fxsparse: expected x [..., ",
                  features, "] in ", type_name(type), " as the weight is, got ", described(x));
  STD_TORCH_CHECK(values.is_contiguous(), "fxsparse: expected contiguous values");
}

inline Matrix matrix(const Tensor& t, const char* name) {
  const int64_t features = t.size(-1);
  return {t.mutable_data_ptr(), scalar_of(t, name), features ? t.numel() / features : 0, features};
}

inline int64_t tokens_of(const Tensor& x) {
  int64_t tokens = 1;
  for (int64_t d = 0; d + 1 < x.dim(); d++) tokens *= x.size(d);
  return tokens;
}

inline const int32_t* index32(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.numel() == count, "fxsparse: expected ",
                  name, " int32, contiguous, with ", count, " elements, got ", t.numel());
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// fp32 copies of `t`, or its own memory where that is fp32.
inline const float* as_floats(const Tensor& t, std::vector<Buffer>& owned) {
  if (scalar_of(t, "values and bias") == Scalar::f32) return static_cast<const float*>(t.const_data_ptr());
  owned.emplace_back(t.numel());
  float* to = owned.back().data;
  const auto* from = static_cast<const uint16_t*>(t.const_data_ptr());
  for (int64_t i = 0; i < t.numel(); i++) {
    const uint32_t bits = uint32_t(from[i]) << 16;
    __builtin_memcpy(to + i, &bits, 4);
  }
  return to;
}

inline void put_floats(const float* from, const Tensor& t) {
  if (scalar_of(t, "a gradient") == Scalar::f32) {
    std::copy(from, from + t.numel(), static_cast<float*>(t.mutable_data_ptr()));
    return;
  }
  auto* to = static_cast<uint16_t*>(t.mutable_data_ptr());
  for (int64_t i = 0; i < t.numel(); i++) {
    uint32_t bits;
    __builtin_memcpy(&bits, from + i, 4);
    to[i] = from[i] == from[i] ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
  }
}

// The next three avoid torch's lookup of operators by name, 1 to 2 us each.
inline Tensor empty(int32_t dtype, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  const size_t bytes = std::accumulate(sizes.begin(), sizes.end(), size_t(1), std::multiplies<>()) *
                       (dtype == aoti_torch_dtype_float32() ? 4 : dtype == aoti_torch_dtype_bfloat16() ? 2 : 0);
  const int32_t cpu = aoti_torch_device_type_cpu();
  AtenTensorHandle handle;
  if (bytes < kLarge) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, cpu, 0, &handle));
  } else {
    const auto give = [](void* data, void*) { KeptMemory::all().give(data); };
    STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(KeptMemory::all().take(bytes), sizes.size(), sizes.data(), strides.data(), 0,
                                                  dtype, cpu, -1, &handle, aoti_torch_layout_strided(), nullptr, 0, give,
                                                  nullptr));
  }
  return Tensor(handle);
}

inline Tensor empty(const Tensor& type, const std::vector<int64_t>& sizes) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(type.get(), &dtype));
  return empty(dtype, sizes);
}

inline Tensor in_order(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor like(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = last;
  return empty(x, sizes);
}

// ---- outputs

// Output rows that the product does not write: activation(bias).  `rows` are those that it writes.
struct Scatter {
  const int32_t* rows = nullptr;
  const int32_t* empty_rows = nullptr;
  int64_t empty = 0;
};

inline Scatter scatter_of(const Tensor& active_rows, int64_t active, const Tensor& empty_rows) {
  const int64_t empty = empty_rows.numel();
  return {index32(active_rows, active, "active_rows"), index32(empty_rows, empty, "empty_rows"), empty};
}

// What is added to a product before its activation.
struct Added {
  std::optional<Tensor> bias;
  std::optional<Tensor> residual;
  std::optional<Tensor> scales;  // what the sums are multiplied by before
};

// An empty y [..., out] and the epilogue that goes into it.
inline Tensor output(const Tensor& x, int64_t rows, const Scatter& scatter, Added& added, int64_t activation,
              std::vector<Buffer>& owned, Epilogue& epilogue) {
  const int64_t out = rows + scatter.empty;
  Tensor y = like(x, out);
  auto& [bias, residual, scales] = added;
  STD_TORCH_CHECK(!bias || bias->numel() == out, "fxsparse: expected bias [", out, "]");
  STD_TORCH_CHECK(!residual || (residual->scalar_type() == x.scalar_type() && residual->dim() == y.dim() &&
                                std::equal(y.sizes().begin(), y.sizes().end(), residual->sizes().begin())),
                  "fxsparse: expected a residual of the output's shape, with ", out, " features, and of x's dtype");
  STD_TORCH_CHECK(!scales || scales->numel() == rows, "fxsparse: expected scales [", rows, "]");
  for (auto* kept : {&bias, &residual, &scales})  // by the caller while the product runs
    if (*kept) *kept = in_order(**kept);
  epilogue = {bias ? as_floats(*bias, owned) : nullptr, activation, scatter.rows,
              residual ? residual->const_data_ptr() : nullptr, scales ? as_floats(*scales, owned) : nullptr};
  return y;
}

// ---- threads

// f(part, parts) for every part; a part is a thread's share.
template <class F>
void share(int64_t parts, const F& f) {
  if (parts <= 1) return f(int64_t(0), int64_t(1));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) f(part, parts);
  });
}

// Threads worth waking for `work` multiply-adds.
inline int64_t threads_for(int64_t work) {
  return std::min<int64_t>(torch::stable::get_num_threads(), 1 + work / 200000);
}

}  // namespace fxsparse
