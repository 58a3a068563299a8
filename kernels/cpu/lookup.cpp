// The product of a few tokens by table lookups, for AVX-512 VBMI.
//
// vpermi2b reads 64 bytes of a table of 128 at once: with x split into the four bytes of its floats, four of them fetch
// x for 64 entries of a window of 128 columns, and two rounds of interleaving put the bytes together.  A window moves by
// 64 columns: a column's byte in the table is column % 128, so half the table stays.
#include "rows.h"
#include "table.h"
#include "vec.h"

namespace fxsparse {
namespace {

// Four vectors of x for the 64 rows of a bundle; 0 for an empty slot, whatever x holds.
struct Found {
  V rows[4];
};

// The bytes of a bundle are in the order in which interleaving within 128-bit lanes puts them back.
template <bool kHalf>
inline Found find(const __m512i* even, const __m512i* odd, const uint8_t* columns) {
  const __m512i index = _mm512_loadu_si512(columns);
  const __mmask64 used = _mm512_movepi8_mask(index);
  const __m512i b2 = _mm512_maskz_permutex2var_epi8(used, even[2], index, odd[2]);
  const __m512i b3 = _mm512_maskz_permutex2var_epi8(used, even[3], index, odd[3]);
  __m512i low_a = _mm512_setzero_si512(), low_b = low_a;
  if constexpr (!kHalf) {  // the lower half of a widened bfloat16 is 0
    const __m512i b0 = _mm512_maskz_permutex2var_epi8(used, even[0], index, odd[0]);
    const __m512i b1 = _mm512_maskz_permutex2var_epi8(used, even[1], index, odd[1]);
    low_a = _mm512_unpacklo_epi8(b0, b1);
    low_b = _mm512_unpackhi_epi8(b0, b1);
  }
  const __m512i high_a = _mm512_unpacklo_epi8(b2, b3), high_b = _mm512_unpackhi_epi8(b2, b3);
  return {{(V)_mm512_unpacklo_epi16(low_a, high_a), (V)_mm512_unpackhi_epi16(low_a, high_a),
           (V)_mm512_unpacklo_epi16(low_b, high_b), (V)_mm512_unpackhi_epi16(low_b, high_b)}};
}

template <bool kHalf>
inline void load_half(const uint8_t* planes, int64_t stride, int64_t window, __m512i* half) {
#pragma GCC unroll 4
  for (int j = kHalf ? 2 : 0; j < 4; j++) half[j] = _mm512_loadu_si512(planes + j * stride + window * kWindow);
}

// Bundles to fetch ahead: 10 MB of them (4,096 x 4,096, 90 % zeros) came from L3 in 114 us instead of 125 to 143.
constexpr int64_t kAhead = 8;

template <bool kHalf, class Value>
inline Found sum_group(const uint8_t* planes, const Lookup& s, int64_t group) {
  const int64_t stride = plane_bytes(s.windows);
  const Value* values = (const Value*)s.values + s.starts[group] * int64_t(64);
  const uint8_t* columns = s.columns + s.starts[group] * int64_t(64);
  Found sum{};
  __m512i even[4], odd[4];
  const auto bundles = [&](int count) {
    for (; count > 0; count--, columns += 64, values += 64) {
      __builtin_prefetch(columns + kAhead * 64);
#pragma GCC unroll 4
      for (int j = 0; j < int(4 * sizeof(Value)); j += 4) __builtin_prefetch((const char*)(values + kAhead * 64) + 16 * j);
      const Found x = find<kHalf>(even, odd, columns);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sum.rows[j] += values_at(values + j * W) * x.rows[j];
    }
  };
  const uint8_t* counts = s.counts + group * s.windows;
  load_half<kHalf>(planes, stride, 0, even);
  for (int64_t window = 0; window < s.windows; window += 2) {
    load_half<kHalf>(planes, stride, window + 1, odd);
    bundles(counts[window]);
    if (window + 1 == s.windows) break;
    load_half<kHalf>(planes, stride, window + 2, even);
    bundles(counts[window + 1]);
  }
  return sum;
}

// kHalf: x is bfloat16.
template <bool kHalf, class Value>
void look_up_groups(const uint8_t* planes, const Lookup& s, int64_t begin, int64_t end, const Epilogue& epilogue,
                    const Matrix& dst) {
  const int64_t token_bytes = 4 * plane_bytes(s.windows);
  for (int64_t g = begin; g < end; g++) {
    for (int64_t token = 0; token < dst.tokens; token++) {  // inside: the group comes from L3 or memory once for all
      const Found sum = sum_group<kHalf, Value>(planes + token * token_bytes, s, g);
      for (int j = 0; j < 4; j++) {
        const int64_t r = g * kGroup + j * W, count = s.rows - r;
        if (count <= 0) break;
        const V total = sum.rows[j] * scale_of(epilogue, r, count) + bias_of(epilogue, r, count);
        write_rows(dst, token, r, finish(total, epilogue, dst, token, r, count), count, epilogue.rows);
      }
    }
  }
}

struct Bytes {
  alignas(64) uint8_t at[64];
};

// Position i + 16 j holds that of byte j of float i.
constexpr Bytes byte_order() {
  Bytes order{};
  for (int i = 0; i < 64; i++) order.at[i] = uint8_t(i % 16 * 4 + i / 16);
  return order;
}

}  // namespace

void split(const Matrix& x, int64_t token, int64_t windows, uint8_t* planes) {
  static constexpr Bytes kOrder = byte_order();
  const __m512i order = _mm512_load_si512(kOrder.at);
  const int64_t stride = plane_bytes(windows);
  for (int64_t f = 0; f < stride; f += W) {
    const int64_t count = x.features - f;
    const V v = count > 0 ? read_some(x, token * x.features + f, count) : V{};
    const __m512i bytes = _mm512_permutexvar_epi8(order, (__m512i)v);
    alignas(64) uint8_t parts[64];
    _mm512_store_si512(parts, bytes);
    for (int j = 0; j < 4; j++) __builtin_memcpy(planes + j * stride + f, parts + 16 * j, 16);
  }
}

void look_up(const uint8_t* planes, const Lookup& s, int64_t begin, int64_t end, const Epilogue& epilogue,
             const Matrix& dst) {
  with_values(s.scalar, [&](auto* v) {
    using Value = Stored<decltype(v)>;
    if (dst.scalar == Scalar::bf16) return look_up_groups<true, Value>(planes, s, begin, end, epilogue, dst);
    look_up_groups<false, Value>(planes, s, begin, end, epilogue, dst);
  });
}

}  // namespace fxsparse
