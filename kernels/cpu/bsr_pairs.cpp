// The product with blocks in bfloat16 by AVX-512 BF16: an instruction adds the products of two columns in fp32.
//
// A panel's element is a token's inputs of two columns, next to each other as they are in x; so are a row's values.
#include "block_rows.h"

namespace fxsparse {
namespace {

struct MultiplyPairs {
  static constexpr int64_t kColumns = 2;
  template <int NV, int ROWS>
  static inline void add(const float* panel, const Blocks& s, int64_t e, int64_t row, V (*sum)[NV]) {
    const uint16_t* values = (const uint16_t*)s.values + e * s.height * s.width + 2 * row;
    const float* inputs = panel + s.columns[e] * (s.width / 2) * (NV * W);
    for (int64_t c = 0; c < s.width; c += 2, values += 2 * s.height, inputs += NV * W) {
      __m512bh x[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) x[j] = load<__m512bh>(inputs + j * W);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const __m512bh value = (__m512bh)_mm512_set1_epi32(load<int32_t>(values + 2 * r));
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) sum[r][j] = (V)_mm512_dpbf16_ps((__m512)sum[r][j], x[j], value);
      }
    }
  }
};

}  // namespace

void multiply_block_pairs(const float* panel, int64_t vectors, const Blocks& s, int64_t begin, int64_t end,
                          const Epilogue& epilogue, const Matrix& dst, int64_t first) {
  multiply_block_rows<MultiplyPairs>(panel, vectors, s, begin, end, epilogue, dst, first);
}

}  // namespace fxsparse
