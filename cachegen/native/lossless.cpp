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

// A row of `columns` values of fewer than 8 bits: with q = packed_bytes, value c sits in byte c mod q, part c / q.
void pack_row(const uint8_t *__restrict values, size_t columns, int bits, uint8_t *__restrict packed) {
  const size_t q = packed_bytes(columns, bits);
  std::memset(packed, 0, q);
  for (size_t start = 0, shift = 0; start < columns; start += q, shift += static_cast<size_t>(bits)) {
    const size_t n = columns - start < q ? columns - start : q;
    for (size_t i = 0; i < n; i++) packed[i] |= static_cast<uint8_t>(values[start + i] << shift);
  }
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

// The runs of elements that lie side by side in a row: visit(first column, address, elements).
template <class Visit>
void for_runs(const cg_floats &m, int64_t row, int size, Visit visit) {
  size_t c = 0;
  for (int64_t t = 0; t < m.count; t++) {
    const cg_rows &tensor = m.tensors[t];
    const bool joined = tensor.head_stride == tensor.dim * size;
    const int64_t runs = joined ? 1 : tensor.heads;
    const auto n = static_cast<size_t>(joined ? tensor.heads * tensor.dim : tensor.dim);
    for (int64_t h = 0; h < runs; h++, c += n) {
      visit(c, static_cast<const uint8_t *>(tensor.data) + row * tensor.row_stride + h * tensor.head_stride, n);
    }
  }
}

// The types are compiled apart: shifts and sizes are constants in their inner loops.
template <int64_t kType>
struct Type {
  static constexpr Layout kLayout = kLayouts[kType];
  static constexpr uint32_t kMask = (1u << kLayout.exponent_bits) - 1;
  static constexpr int kTop = kLayout.size * 8 - 1;

  static uint32_t load(const uint8_t *p) {
    uint32_t w = 0;
    std::memcpy(&w, p, static_cast<size_t>(kLayout.size));
    return w;
  }

  static void count(const cg_floats &m, uint32_t *counts) {
    constexpr int kBins = kLayout.exponent_bits + static_cast<int>(kLayout.signs);
    for (int64_t row = m.row0; row < m.row1; row++) {
      for_runs(m, row, kLayout.size, [&](size_t c, const uint8_t *p, size_t n) {
        uint32_t *column = counts + (c << kBins);
        for (size_t i = 0; i < n; i++, column += size_t{1} << kBins) {
          const uint32_t w = load(p + i * kLayout.size), e = w >> kLayout.mantissa_bits & kMask;
          column[(e << kLayout.signs) + (w >> kTop & kLayout.signs)]++;
        }
      });
    }
  }

  // Symbols, escapes aside, and the planes' values.
  static void split_run(const uint8_t *__restrict p, const uint8_t *__restrict base, const uint8_t *__restrict flip,
                        uint8_t *__restrict s, uint8_t *__restrict v0, uint8_t *__restrict v1, uint8_t *__restrict v2,
                        size_t n) {
    for (size_t i = 0; i < n; i++) {
      const uint32_t w = load(p + i * kLayout.size), sign = w >> kTop;
      const uint32_t d = (base[i] - (w >> kLayout.mantissa_bits)) & kMask;
      s[i] = static_cast<uint8_t>(d << kLayout.signs | ((sign ^ flip[i]) & kLayout.signs));
      if constexpr (kType == CG_LOSSLESS_BF16) {
        v0[i] = static_cast<uint8_t>(sign << 7 | (w & 0x7f));
      } else if constexpr (kType == CG_LOSSLESS_FP16) {
        v0[i] = static_cast<uint8_t>(w);
        v1[i] = static_cast<uint8_t>(w >> 8 & 3);
      } else if constexpr (kType == CG_LOSSLESS_FP32) {
        v0[i] = static_cast<uint8_t>(sign << 7 | (w >> 16 & 0x7f));
        v1[i] = static_cast<uint8_t>(w >> 8);
        v2[i] = static_cast<uint8_t>(w);
      } else if constexpr (kType == CG_LOSSLESS_E4M3) {
        v0[i] = static_cast<uint8_t>(sign << 3 | (w & 7));
      } else {
        v0[i] = static_cast<uint8_t>(w & 3);
      }
    }
  }

  // Escapes of a row: their distances go to `exception`. Without a branch, as escapes come at random.
  static uint8_t *escape_row(uint8_t *s, size_t columns, uint32_t limit, uint8_t *exception) {
    for (size_t c = 0; c < columns; c++) {
      const uint8_t symbol = s[c];
      const bool escapes = symbol >= limit;
      s[c] = escapes ? static_cast<uint8_t>(limit | (symbol & kLayout.signs)) : symbol;
      *exception = static_cast<uint8_t>(symbol >> kLayout.signs);
      exception += escapes;
    }
    return exception;
  }

  static void split(cg_floats &m, uint8_t *values) {
    const auto columns = static_cast<size_t>(m.columns);
    const uint32_t limit = kLayout.escape(m.alphabet);
    uint8_t *exception = m.exceptions;
    auto *s = static_cast<uint8_t *>(m.symbols);
    for (int64_t row = m.row0; row < m.row1; row++, s += columns) {
      uint8_t *v[3] = {values, values + columns, values + 2 * columns};
      for (int p = 0; p < kLayout.planes; p++) {
        if (kLayout.plane_bits[p] == 8) v[p] = m.planes[p] + static_cast<size_t>(row - m.row0) * columns;
      }
      for_runs(m, row, kLayout.size, [&](size_t c, const uint8_t *p, size_t n) {
        split_run(p, m.base + c, m.flip + c, s + c, v[0] + c, v[1] + c, v[2] + c, n);
      });
      if (limit != 0) exception = escape_row(s, columns, limit, exception);
      for (int p = 0; p < kLayout.planes; p++) {
        const int bits = kLayout.plane_bits[p];
        if (bits != 8) pack_row(v[p], columns, bits, m.planes[p] + static_cast<size_t>(row - m.row0) * packed_bytes(columns, bits));
      }
    }
    m.exception_count = exception - m.exceptions;
  }
};

// Calls visit with the type of a matrix' elements.
template <class Visit>
void with_type(int64_t type, Visit visit) {
  switch (type) {
    case CG_LOSSLESS_BF16:
      return visit(Type<CG_LOSSLESS_BF16>{});
    case CG_LOSSLESS_FP16:
      return visit(Type<CG_LOSSLESS_FP16>{});
    case CG_LOSSLESS_FP32:
      return visit(Type<CG_LOSSLESS_FP32>{});
    case CG_LOSSLESS_E4M3:
      return visit(Type<CG_LOSSLESS_E4M3>{});
    default:
      return visit(Type<CG_LOSSLESS_E5M2>{});
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
  if (!cg::lossless_valid(*floats)) return CG_LOSSLESS_ARGUMENT;
  with_type(floats->type, [&](auto type) { type.count(*floats, counts); });
  return CG_LOSSLESS_OK;
}

extern "C" int cg_lossless_split(cg_floats *floats) {
  if (!cg::lossless_valid(*floats)) return CG_LOSSLESS_ARGUMENT;
  const std::unique_ptr<uint8_t[]> values(new (std::nothrow) uint8_t[3 * static_cast<size_t>(floats->columns)]);
  if (values == nullptr) return CG_LOSSLESS_MEMORY;
  with_type(floats->type, [&](auto type) { type.split(*floats, values.get()); });
  return CG_LOSSLESS_OK;
}
