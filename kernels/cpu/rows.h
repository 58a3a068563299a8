// Reading and writing rows of activations in their dtype, one vector at a time.
#pragma once
#include "table.h"
#include "vec.h"

namespace fxsparse {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline V values_at(const float* values) { return load<V>(values); }
inline V values_at(const uint16_t* values) { return from_bf16(load<VH>(values)); }
inline V values_at(const int8_t* values) { return from_int8(load<VB>(values)); }

template <class Pointer>
using Stored = std::remove_const_t<std::remove_pointer_t<Pointer>>;

// f of a pointer to what the values are stored in.
template <class F>
inline auto with_values(Scalar scalar, const F& f) {
  if (scalar == Scalar::f32) return f((const float*)nullptr);
  if (scalar == Scalar::bf16) return f((const uint16_t*)nullptr);
  return f((const int8_t*)nullptr);
}

inline V read(const Matrix& m, int64_t offset) {
  if (m.scalar == Scalar::f32) return load<V>((const float*)m.data + offset);
  return from_bf16(load<VH>((const uint16_t*)m.data + offset));
}

inline void write(const Matrix& m, int64_t offset, V v, int64_t count) {
  if (count >= W) {
    if (m.scalar == Scalar::f32) return store((float*)m.data + offset, v);
    return store((uint16_t*)m.data + offset, to_bf16(v));
  }
  if (m.scalar == Scalar::f32) {
    __builtin_memcpy((float*)m.data + offset, &v, count * 4);
  } else {
    VH half = to_bf16(v);
    __builtin_memcpy((uint16_t*)m.data + offset, &half, count * 2);
  }
}

inline V read_some(const Matrix& m, int64_t offset, int64_t count) {
  if (count >= W) return read(m, offset);
  V v{};
  if (m.scalar == Scalar::f32) {
    __builtin_memcpy(&v, (const float*)m.data + offset, count * 4);
    return v;
  }
  VH half{};
  __builtin_memcpy(&half, (const uint16_t*)m.data + offset, count * 2);
  return from_bf16(half);
}

inline V bias_of(const Epilogue& epilogue, int64_t r, int64_t count) {
  V bias{};
  if (!epilogue.bias) return bias;
  if (count >= W) return epilogue.rows ? gather(epilogue.bias, load<VI>(epilogue.rows + r)) : load<V>(epilogue.bias + r);
  for (int64_t i = 0; i < least(W, count); i++) bias[i] = epilogue.bias[epilogue.rows ? epilogue.rows[r + i] : r + i];
  return bias;
}

inline V scale_of(const Epilogue& epilogue, int64_t r, int64_t count) {
  V scale = splat(1.0f);
  if (!epilogue.scales) return scale;
  if (count >= W) return load<V>(epilogue.scales + r);
  for (int64_t i = 0; i < count; i++) scale[i] = epilogue.scales[r + i];
  return scale;
}

// activation(v + residual) of the rows from r on of a token, count of them used.
inline V finish(V v, const Epilogue& epilogue, const Matrix& dst, int64_t token, int64_t r, int64_t count) {
  if (epilogue.residual) {
    const Matrix residual{const_cast<void*>(epilogue.residual), dst.scalar, dst.tokens, dst.features};
    const int64_t at = token * dst.features;
    if (!epilogue.rows) {
      v += read_some(residual, at + r, count);
    } else {
      for (int64_t j = 0; j < least(W, count); j++) v[j] += read_some(residual, at + epilogue.rows[r + j], 1)[0];
    }
  }
  return activate(v, epilogue.activation);
}

// dst[token, column of row r + j] = v[j] for j < count.
inline void write_rows(const Matrix& dst, int64_t token, int64_t r, V v, int64_t count, const int32_t* rows) {
  const int64_t at = token * dst.features;
  if (!rows) return write(dst, at + r, v, count);
  const int64_t lanes = least(W, count);
  if (dst.scalar == Scalar::f32) {
    for (int64_t j = 0; j < lanes; j++) ((float*)dst.data)[at + rows[r + j]] = v[j];
  } else {
    const VH half = to_bf16(v);
    for (int64_t j = 0; j < lanes; j++) ((uint16_t*)dst.data)[at + rows[r + j]] = half[j];
  }
}

}  // namespace
}  // namespace fxsparse
