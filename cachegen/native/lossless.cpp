// The `lossless` codec's planes: floats split into exponent symbols (entropy coded elsewhere) and the bits beside them.
#include "lossless_layout.h"

#include <cstring>
#include <memory>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using cg::kLayouts;
using cg::Layout;
using cg::packed_bytes;

void pack_row(const uint8_t *values, size_t columns, int bits, uint8_t *packed) {
  if (bits == 8) {
    std::memcpy(packed, values, columns);
    return;
  }
  const size_t q = packed_bytes(columns, bits);
  std::memset(packed, 0, q);
  for (size_t c = 0; c < columns; c++) packed[c % q] |= static_cast<uint8_t>(values[c] << (c / q * bits));
}

namespace scalar {
uint64_t escapes64(const uint8_t *s, uint32_t limit) {
  uint64_t mask = 0;
  for (int i = 0; i < 64; i++) mask |= static_cast<uint64_t>(s[i] >= limit) << i;
  return mask;
}
#include "lossless_kernels.h"
}  // namespace scalar

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
uint64_t escapes64(const uint8_t *s, uint32_t limit) {
  const __m256i least = _mm256_set1_epi8(static_cast<char>(limit));
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(s));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(s + 32));
  const int low = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(a, least), a));
  const int high = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(b, least), b));
  return static_cast<uint32_t>(low) | static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32;
}
#include "lossless_kernels.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace avx512 {
uint64_t escapes64(const uint8_t *s, uint32_t limit) {
  return _mm512_cmpge_epu8_mask(_mm512_loadu_si512(s), _mm512_set1_epi8(static_cast<char>(limit)));
}
#include "lossless_kernels.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

uint32_t load(const uint8_t *p, int size) {
  uint32_t w = 0;
  std::memcpy(&w, p, static_cast<size_t>(size));
  return w;
}

// Calls visit(column, word) for every element of a row, in column order.
template <class Visit>
void for_row(const cg_floats &m, int size, int64_t row, Visit visit) {
  size_t c = 0;
  for (int64_t t = 0; t < m.count; t++) {
    const cg_rows &tensor = m.tensors[t];
    for (int64_t h = 0; h < tensor.heads; h++) {
      const uint8_t *p = tensor.data + row * tensor.row_stride + h * tensor.head_stride;
      for (int64_t d = 0; d < tensor.dim; d++, p += size) visit(c++, load(p, size));
    }
  }
}

}  // namespace

bool cg::lossless_valid(const cg_floats &m) {
  if (m.type < 0 || m.type >= kTypes || m.count < 1 || m.columns < 1 || m.columns > kMaxColumns) return false;
  if (m.alphabet != 16 && m.alphabet != 32 && m.alphabet != 64 && m.alphabet != 256) return false;
  int64_t columns = 0;
  for (int64_t t = 0; t < m.count; t++) {
    const cg_rows &tensor = m.tensors[t];
    if (tensor.heads < 0 || tensor.dim < 0 || tensor.heads > kMaxColumns || tensor.dim > kMaxColumns) return false;
    columns += tensor.heads * tensor.dim;
  }
  return columns == m.columns && m.row0 >= 0 && m.row0 <= m.row1 && m.exception_count >= 0;
}

int cg::lossless_merge(const cg_floats &floats, int isa, uint8_t *scratch) {
  const Layout &layout = kLayouts[floats.type];
#if defined(__x86_64__)
  if (isa == CG_ISA_AVX512) return avx512::merge(floats, layout, scratch);
  if (isa == CG_ISA_AVX2) return avx2::merge(floats, layout, scratch);
#endif
  return scalar::merge(floats, layout, scratch);
}

extern "C" int cg_lossless_count(const cg_floats *floats, uint32_t *counts) {
  const cg_floats &m = *floats;
  if (!cg::lossless_valid(m)) return CG_LOSSLESS_ARGUMENT;
  const Layout &layout = kLayouts[m.type];
  const int top = layout.size * 8 - 1;
  const uint32_t mask = (1u << layout.exponent_bits) - 1;
  for (int64_t row = m.row0; row < m.row1; row++) {
    for_row(m, layout.size, row, [&](size_t c, uint32_t w) {
      const uint32_t e = w >> layout.mantissa_bits & mask;
      counts[((c << layout.exponent_bits | e) << layout.signs) + (w >> top & layout.signs)]++;
    });
  }
  return CG_LOSSLESS_OK;
}

extern "C" int cg_lossless_split(cg_floats *floats) {
  cg_floats &m = *floats;
  if (!cg::lossless_valid(m)) return CG_LOSSLESS_ARGUMENT;
  const Layout &layout = kLayouts[m.type];
  const auto columns = static_cast<size_t>(m.columns);
  const int top = layout.size * 8 - 1;
  const uint32_t mask = (1u << layout.exponent_bits) - 1, escape = layout.escape(m.alphabet) >> layout.signs;
  const std::unique_ptr<uint8_t[]> values(new (std::nothrow) uint8_t[3 * columns]);
  if (values == nullptr) return CG_LOSSLESS_MEMORY;
  uint8_t *const v[3] = {values.get(), values.get() + columns, values.get() + 2 * columns};
  uint8_t *exception = m.exceptions;
  auto *s = static_cast<uint8_t *>(m.symbols);
  for (int64_t row = m.row0; row < m.row1; row++, s += columns) {
    for_row(m, layout.size, row, [&](size_t c, uint32_t w) {
      uint32_t d = (m.base[c] - (w >> layout.mantissa_bits)) & mask;
      if (escape != 0 && d >= escape) {
        *exception++ = static_cast<uint8_t>(d);
        d = escape;
      }
      const uint32_t sign = w >> top;
      s[c] = static_cast<uint8_t>(d << layout.signs | ((sign ^ m.flip[c]) & layout.signs));
      switch (m.type) {
        case CG_LOSSLESS_BF16:
          v[0][c] = static_cast<uint8_t>(sign << 7 | (w & 0x7f));
          break;
        case CG_LOSSLESS_FP16:
          v[0][c] = static_cast<uint8_t>(w);
          v[1][c] = static_cast<uint8_t>(w >> 8 & 3);
          break;
        case CG_LOSSLESS_FP32:
          v[0][c] = static_cast<uint8_t>(sign << 7 | (w >> 16 & 0x7f));
          v[1][c] = static_cast<uint8_t>(w >> 8);
          v[2][c] = static_cast<uint8_t>(w);
          break;
        case CG_LOSSLESS_E4M3:
          v[0][c] = static_cast<uint8_t>(sign << 3 | (w & 7));
          break;
        default:
          v[0][c] = static_cast<uint8_t>(w & 3);
      }
    });
    for (int p = 0; p < layout.planes; p++) {
      const int bits = layout.plane_bits[p];
      pack_row(v[p], columns, bits, m.planes[p] + (row - m.row0) * packed_bytes(columns, bits));
    }
  }
  m.exception_count = exception - m.exceptions;
  return CG_LOSSLESS_OK;
}
