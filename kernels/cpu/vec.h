// One vector of floats for the instruction set that this file is compiled for, by the compiler's vector extension.
// Everything is in an unnamed namespace: the same names are compiled with other flags elsewhere in the library.
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t VI __attribute__((vector_size(4 * W)));
typedef uint32_t VU __attribute__((vector_size(4 * W)));
typedef uint16_t VH __attribute__((vector_size(2 * W)));
typedef int8_t VB __attribute__((vector_size(W)));

template <class T>
inline T load(const void* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof(T));
  return v;
}

template <class T>
inline void store(void* p, T v) {
  __builtin_memcpy(p, &v, sizeof(T));
}

// A whole cache line goes to memory without being read first; p is aligned to it.  Ends with stream_end, before
// another thread reads.
#if defined(__AVX512F__)
constexpr bool kStreams = true;
inline void stream(float* p, V v) { _mm512_stream_ps(p, (__m512)v); }
inline void stream_end() { _mm_sfence(); }
#else
constexpr bool kStreams = false;
inline void stream(float* p, V v) { store(p, v); }
inline void stream_end() {}
#endif

// x - 0 is x for every x, so the compiler makes one broadcast of it; 0 + x would be computed.
inline V splat(float x) { return x - V{}; }

// All lanes the value at p, fp32 or bfloat16.
inline V splat_at(const float* p) { return splat(*p); }
inline V splat_at(const uint16_t* p) {
#if defined(__AVX512BW__)  // one load and one operation, without a way through a scalar register
  return (V)((VU)_mm512_set1_epi16((short)*p) & 0xffff0000u);
#elif defined(__AVX2__)
  return (V)((VU)_mm256_set1_epi16((short)*p) & 0xffff0000u);
#else
  return (V)((VU{} + *p) << 16);
#endif
}

// The float of every byte: a load in the place of a conversion and a broadcast.
struct Floats {
  float of[256];
  constexpr Floats() : of() {
    for (int i = 0; i < 256; i++) of[i] = i < 128 ? i : i - 256;
  }
};
alignas(64) constexpr Floats kFloats;
inline V splat_at(const int8_t* p) { return splat(kFloats.of[(uint8_t)*p]); }

inline V from_int8(VB bytes) {
#if defined(__AVX512F__)  // GCC makes four parts of the conversion below
  return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)bytes));
#else
  return __builtin_convertvector(__builtin_convertvector(bytes, VI), V);
#endif
}

// Four values, or one, as floats.
typedef float F4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef uint16_t H4 __attribute__((vector_size(8)));
typedef int8_t B4 __attribute__((vector_size(4)));
inline F4 four_at(const float* p) { return load<F4>(p); }
inline F4 four_at(const uint16_t* p) { return (F4)(__builtin_convertvector(load<H4>(p), U4) << 16); }
inline F4 four_at(const int8_t* p) {
  return __builtin_convertvector(__builtin_convertvector(load<B4>(p), I4), F4);
}
inline float float_at(const float* p) { return *p; }
inline float float_at(const uint16_t* p) {
  const uint32_t bits = uint32_t(*p) << 16;
  return load<float>(&bits);
}
inline float float_at(const int8_t* p) { return *p; }

inline V from_bf16(VH half) { return (V)(__builtin_convertvector(half, VU) << 16); }

// Rounds to nearest even; NaN stays NaN.
inline VH to_bf16(V v) {
  VU bits = (VU)v;
  VU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector((VU)((v == v) ? (VI)rounded : (VI{} + 0x7fc0)), VH);
}

inline V gather(const float* x, VI index) {
#if defined(__AVX512F__)
  return (V)_mm512_i32gather_ps((__m512i)index, x, 4);
#elif defined(__AVX2__)
  return (V)_mm256_i32gather_ps(x, (__m256i)index, 4);
#else
  V v;
  for (int i = 0; i < W; i++) v[i] = x[index[i]];
  return v;
#endif
}

// Lanes of the 2 x 2 block transposition at distance D: lo takes the even blocks of a and b, hi the odd ones.
constexpr int lo_lane(int lane, int D) { return (lane & D) == 0 ? lane : W + lane - D; }
constexpr int hi_lane(int lane, int D) { return (lane & D) == 0 ? lane + D : W + lane; }

template <int D, int... I>
inline V lo(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lo_lane(I, D)...);
#else
  return __builtin_shuffle(a, b, (VI){lo_lane(I, D)...});
#endif
}

template <int D, int... I>
inline V hi(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, hi_lane(I, D)...);
#else
  return __builtin_shuffle(a, b, (VI){hi_lane(I, D)...});
#endif
}

using Lanes = std::make_integer_sequence<int, W>;

// m[i][j] <-> m[j][i] for W vectors.
template <int D = W / 2>
inline void transpose_block(V* m) {
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    if ((i & D) == 0) {
      V a = m[i], b = m[i + D];
      m[i] = lo<D>(a, b, Lanes{});
      m[i + D] = hi<D>(a, b, Lanes{});
    }
  }
  if constexpr (D > 1) transpose_block<D / 2>(m);
}

// Lane i of the result is the sum of the lanes of m[i], for W vectors; m is overwritten.
template <int D = 1>
inline V sum_each(V* m) {
#pragma GCC unroll 16
  for (int i = 0; i < W; i += 2 * D) {
    V a = m[i], b = m[i + D];
    m[i] = lo<D>(a, b, Lanes{}) + hi<D>(a, b, Lanes{});
  }
  if constexpr (2 * D < W) return sum_each<2 * D>(m);
  return m[0];
}

inline V select(VI condition, V yes, V no) { return condition ? yes : no; }

// NaN passes, as in torch.
inline V clamp(V x, float least, float most) {
  x = select(x < splat(least), splat(least), x);
  return select(x > splat(most), splat(most), x);
}

// Relative error below 2e-7; clamped to the finite range.
inline V exponential(V x) {
  x = select(x < splat(-87.0f), splat(-87.0f), x);
  x = select(x > splat(88.0f), splat(88.0f), x);
  V shifted = x * 1.44269504f + 12582912.0f;  // the low bits of 1.5 * 2^23 + n are n
  V n = shifted - 12582912.0f;
  V r = x - n * 0.693145752f - n * 1.42860677e-6f;
  V p = splat(1.0f / 5040);
  const float coefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
#pragma GCC unroll 8
  for (float c : coefficients) p = p * r + c;
  return p * (V)(((VI)shifted << 23) + 0x3f800000);
}

inline V sigmoid(V x) { return 1.0f / (1.0f + exponential(-x)); }

// x * Phi(x); Phi by Abramowitz and Stegun 7.1.26, absolute error below 1e-7.
inline V gelu(V x) {
  V z = select(x < V{}, -x, x) * 0.70710678f;
  V t = 1.0f / (1.0f + 0.3275911f * z);
  V p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  V tail = 0.5f * p * exponential(-z * z);
  return x * select(x < V{}, tail, 1.0f - tail);
}

// The position in kernels.library.ACTIVATIONS.
inline V activate(V x, int64_t activation) {
  switch (activation) {
    case 1: return select(x < V{}, V{}, x);  // NaN passes, as in torch
    case 2: return gelu(x);
    case 3: return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));  // (1 + tanh u) / 2 = sigmoid(2 u)
    case 4: return x * sigmoid(x);
    case 5: return clamp(x, 0.0f, 6.0f);
    case 6: return x * clamp(x + 3.0f, 0.0f, 6.0f) * (1.0f / 6);
    default: return x;
  }
}

}  // namespace
