// The coder on AVX2: a block's 32 lanes are four vectors of states. Alias tables of 16 and 32 symbols are looked up as
// byte planes (vpshufb over all 32 lanes at once), larger ones by gathers.
#include <array>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)

#pragma GCC target("avx2,bmi,bmi2,popcnt,lzcnt,f16c")
#include <immintrin.h>

#include "drive.h"

#define ALWAYS static inline __attribute__((always_inline))

namespace cg {
namespace {

using V = __m256i;

ALWAYS V load(const void *p) { return _mm256_loadu_si256(static_cast<const V *>(p)); }
ALWAYS void store(void *p, V v) { _mm256_storeu_si256(static_cast<V *>(p), v); }
ALWAYS __m128i load16(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
ALWAYS V twice(const void *p) { return _mm256_broadcastsi128_si256(load16(p)); }
ALWAYS V at_least(V a, V b) { return _mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a); }  // unsigned a >= b
ALWAYS unsigned dword_mask(V v) { return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(v))); }

// Byte shuffles by an 8-bit lane mask: words spread to the mask's lanes, and lanes' words moved to the end.
struct WordShuffles {
  alignas(64) uint8_t spread[256][16];
  alignas(64) uint8_t gather_up[256][16];
};

constexpr WordShuffles make_word_shuffles() {
  WordShuffles s{};
  for (int m = 0; m < 256; m++) {
    int count = 0;
    for (int l = 0; l < 8; l++) count += m >> l & 1;
    int n = 0;
    for (int l = 0; l < 8; l++) {
      s.spread[m][2 * l] = s.spread[m][2 * l + 1] = 0x80;
      if (!(m >> l & 1)) continue;
      s.spread[m][2 * l] = static_cast<uint8_t>(2 * n);
      s.spread[m][2 * l + 1] = static_cast<uint8_t>(2 * n + 1);
      const int to = 8 - count + n;
      s.gather_up[m][2 * to] = static_cast<uint8_t>(2 * l);
      s.gather_up[m][2 * to + 1] = static_cast<uint8_t>(2 * l + 1);
      n++;
    }
  }
  return s;
}
constexpr WordShuffles kShuffles = make_word_shuffles();

// Lanes of group g (8 g .. 8 g + 7) among the active ones, as a vector mask.
ALWAYS V active_lanes(int active, int group) {
  const V lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(active - 8 * group), lane);
}

ALWAYS V refill8(V x, const uint8_t *&p, V allowed, bool part) {
  V low = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256());
  if (part) low = _mm256_and_si256(low, allowed);
  const unsigned m = dword_mask(low);
  const __m128i words = _mm_shuffle_epi8(load16(p), load16(kShuffles.spread[m]));
  p += 2 * __builtin_popcount(m);
  return _mm256_or_si256(_mm256_blendv_epi8(x, _mm256_slli_epi32(x, 16), low), _mm256_cvtepu16_epi32(words));
}

// Four vectors of 8 small dwords to 32 bytes whose dwords are lanes 0-3, 8-11, 16-19, 24-27, 4-7, ...
ALWAYS V pack_bytes(V a, V b, V c, V d) {
  return _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
}
ALWAYS V natural_order(V packed) {
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// One step of all lanes up to the refill; returns the symbols, a byte a lane, in natural order.
template <int A>
ALWAYS V advance(V *x, const cg_bank *bank, size_t table, V *next) {
  const V slot_mask = _mm256_set1_epi32(kProbSum - 1);
  V slot[4], e[4], symbols;
#pragma GCC unroll 4
  for (int g = 0; g < 4; g++) slot[g] = _mm256_and_si256(x[g], slot_mask);
  if constexpr (A <= 32) {
    constexpr int kBucketShift = A == 16 ? 8 : 7;
    const V w0 = _mm256_packus_epi32(slot[0], slot[1]), w1 = _mm256_packus_epi32(slot[2], slot[3]);
    const V inside = _mm256_set1_epi16((1 << kBucketShift) - 1);
    const V low = _mm256_packus_epi16(_mm256_and_si256(w0, inside), _mm256_and_si256(w1, inside));
    const V bucket = _mm256_packus_epi16(_mm256_srli_epi16(w0, kBucketShift), _mm256_srli_epi16(w1, kBucketShift));
    const uint8_t *t = bank->planes + table * 11 * A;
    const V clear = _mm256_set1_epi8(static_cast<char>(0x80));
    V plane[5];
    if constexpr (A == 16) {
      const V divider = _mm256_shuffle_epi8(twice(t), bucket);
      const V other = _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_max_epu8(low, divider), low), clear);
      const V own_index = _mm256_or_si256(bucket, other), other_index = _mm256_xor_si256(own_index, clear);
#pragma GCC unroll 5
      for (int k = 0; k < 5; k++)
        plane[k] = _mm256_or_si256(_mm256_shuffle_epi8(twice(t + 16 * (1 + k)), own_index),
                                   _mm256_shuffle_epi8(twice(t + 16 * (6 + k)), other_index));
    } else {
      // Buckets 0-15 and 16-31 have a table each; an index with its top bit set gives 0.
      const V first = _mm256_adds_epu8(bucket, _mm256_set1_epi8(0x70));  // 0x80 and up for buckets 16-31
      const V second = _mm256_sub_epi8(bucket, _mm256_set1_epi8(16));    // negative for buckets 0-15
      const V divider =
          _mm256_or_si256(_mm256_shuffle_epi8(twice(t), first), _mm256_shuffle_epi8(twice(t + 16), second));
      const V other = _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_max_epu8(low, divider), low), clear);
      const V mine = _mm256_xor_si256(other, clear);
      const V i0 = _mm256_or_si256(first, other), i1 = _mm256_or_si256(second, other);
      const V j0 = _mm256_or_si256(first, mine), j1 = _mm256_or_si256(second, mine);
#pragma GCC unroll 5
      for (int k = 0; k < 5; k++) {
        const uint8_t *own = t + 32 * (1 + k), *alias = t + 32 * (6 + k);
        plane[k] = _mm256_or_si256(
            _mm256_or_si256(_mm256_shuffle_epi8(twice(own), i0), _mm256_shuffle_epi8(twice(own + 16), i1)),
            _mm256_or_si256(_mm256_shuffle_epi8(twice(alias), j0), _mm256_shuffle_epi8(twice(alias + 16), j1)));
      }
    }
    const V a0 = _mm256_unpacklo_epi8(plane[0], plane[1]), a1 = _mm256_unpackhi_epi8(plane[0], plane[1]);
    const V a2 = _mm256_unpacklo_epi8(plane[2], plane[3]), a3 = _mm256_unpackhi_epi8(plane[2], plane[3]);
    e[0] = _mm256_unpacklo_epi16(a0, a2);
    e[1] = _mm256_unpackhi_epi16(a0, a2);
    e[2] = _mm256_unpacklo_epi16(a1, a3);
    e[3] = _mm256_unpackhi_epi16(a1, a3);
    symbols = natural_order(plane[4]);
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
      const V product = _mm256_mullo_epi32(_mm256_and_si256(e[g], slot_mask), _mm256_srli_epi32(x[g], kProbBits));
      next[g] = _mm256_add_epi32(product, _mm256_add_epi32(slot[g], _mm256_srai_epi32(e[g], 13)));
    }
  } else {
    constexpr int kBucketShift = A == 64 ? 6 : 4;
    const auto *dividers = reinterpret_cast<const int *>(bank->divider + table * A);
    const auto *entries = reinterpret_cast<const int *>(bank->entries + table * 2 * A);
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
      const V bucket = _mm256_srli_epi32(slot[g], kBucketShift);
      const V other = at_least(slot[g], _mm256_i32gather_epi32(dividers, bucket, 4));
      e[g] = _mm256_i32gather_epi32(
          entries, _mm256_add_epi32(bucket, _mm256_and_si256(other, _mm256_set1_epi32(A))), 4);
      const V rank = _mm256_and_si256(_mm256_add_epi32(slot[g], _mm256_srli_epi32(e[g], 12)), slot_mask);
      const V product = _mm256_mullo_epi32(_mm256_and_si256(e[g], slot_mask), _mm256_srli_epi32(x[g], kProbBits));
      next[g] = _mm256_add_epi32(product, rank);
    }
    symbols = natural_order(pack_bytes(_mm256_srli_epi32(e[0], 24), _mm256_srli_epi32(e[1], 24),
                                       _mm256_srli_epi32(e[2], 24), _mm256_srli_epi32(e[3], 24)));
  }
  return symbols;
}

// Symbols of a tile are bytes here: row c is the first 32 bytes of tile.symbol[c].
ALWAYS V tile_symbols(const Tile &tile, int c) { return load(tile.symbol[c]); }
ALWAYS V symbol_dwords(const Tile &tile, int c, int g) {
  const uint8_t *row = reinterpret_cast<const uint8_t *>(tile.symbol[c]);
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(row + 8 * g)));
}

// Bits 8 g .. 8 g + 7 of a mask as a vector mask.
ALWAYS V spread_bits(uint32_t bits, int g) {
  const V one = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits >> 8 * g)), one), one);
}

ALWAYS int read_extras(V symbols, const uint8_t *p, Tile &tile, int c, const cg_bank *bank, size_t table, int active) {
  const uint8_t *const start = p;
  const int low_bits = bank->low_bits[table];
  uint32_t escaped = 0;
  if (bank->escape != 0xffffffffu) {
    const V escape = _mm256_set1_epi8(static_cast<char>(bank->escape));
    escaped = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(symbols, escape)));
    if (active < kLanes) escaped &= (1u << active) - 1;
  }
  if (low_bits == 0 && __builtin_expect(escaped == 0, 1)) return 0;
  V low[4];
  for (V &v : low) v = _mm256_setzero_si256();
  for (int i = 0; i < low_bits; i++) {
    const uint32_t plane = active > 16 ? read_u32(p) : read_word(p);
    p += active > 16 ? 4 : 2;
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++)
      low[g] = _mm256_or_si256(low[g], _mm256_and_si256(spread_bits(plane, g), _mm256_set1_epi32(1 << i)));
  }
  const __m128i count = _mm_cvtsi32_si128(low_bits);
  const V offset = _mm256_set1_epi32(bank->offset);
  for (int g = 0; g < 4; g++) {
    const V high = _mm256_sub_epi32(symbol_dwords(tile, c, g), offset);
    store(&tile.q[c][8 * g], _mm256_or_si256(_mm256_sll_epi32(high, count), low[g]));
  }
  tile.raw |= static_cast<uint32_t>(low_bits > 0) << c;
  if (__builtin_expect(escaped != 0, 0)) {
    tile.any_escape |= 1u << c;
    tile.escaped[c] = escaped;
    alignas(32) int32_t lows[kLanes];
    for (int g = 0; g < 4; g++) store(lows + 8 * g, low[g]);
    for (uint32_t rest = escaped; rest != 0; rest &= rest - 1, p += 2) {
      const int l = __builtin_ctz(rest);
      tile.q[c][l] = shift_left(static_cast<int16_t>(read_word(p)), low_bits) | lows[l];
    }
  }
  return static_cast<int>(p - start);
}

// ------------------------------------------------------------------------------------------------ output
ALWAYS V quiet(V bits, __m256 v, uint32_t nan) {
  const V unordered = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(bits, _mm256_set1_epi32(static_cast<int>(nan)), unordered);
}

ALWAYS V narrow(__m256 v, bool bf16) {
  if (bf16) {
    const V u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return quiet(_mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16), v, 0x7fc0);
  }
  return quiet(_mm256_cvtepu16_epi32(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)), v, 0x7e00);
}

struct RowContext {
  const cg_bank *bank;
  const uint16_t *ids;
  const float *scale, *bias;
  bool by_token;
  alignas(32) float token[kLanes];
  int64_t type;
};

ALWAYS __m256 scaled(__m256 v, const RowContext &r, int c, int g) {
  if (r.scale != nullptr) v = _mm256_mul_ps(v, _mm256_set1_ps(r.scale[c]));
  if (r.by_token) v = _mm256_mul_ps(v, _mm256_load_ps(r.token + 8 * g));
  if (r.bias != nullptr) v = _mm256_add_ps(v, _mm256_set1_ps(r.bias[c]));
  return v;
}

ALWAYS __m256 raw_points(V q, float bias) {
  const __m256 v = _mm256_cvtepi32_ps(q), b = _mm256_set1_ps(bias);
  const V zero = _mm256_setzero_si256();
  const __m256 up = _mm256_blendv_ps(v, _mm256_add_ps(v, b), _mm256_castsi256_ps(_mm256_cmpgt_epi32(q, zero)));
  return _mm256_blendv_ps(up, _mm256_sub_ps(v, b), _mm256_castsi256_ps(_mm256_cmpgt_epi32(zero, q)));
}

// Which lanes of group g of row c are in tile.q.
template <bool kExtra>
ALWAYS uint32_t lanes_in_q(const Tile &tile, int c) {
  if (!kExtra) return 0;
  uint32_t lanes = (tile.raw >> c & 1) ? ~0u : 0u;
  if (tile.any_escape >> c & 1) lanes |= tile.escaped[c];
  return lanes;
}

template <int A, bool kExtra>
ALWAYS __m256 float_group(const Tile &tile, int c, int g, const RowContext &r) {
  const uint32_t in_q = lanes_in_q<kExtra>(tile, c);
  __m256 v;
  if (in_q == ~0u) {
    v = raw_points(load(&tile.q[c][8 * g]), r.bank->escape_bias);
  } else {
    v = _mm256_i32gather_ps(r.bank->recon + static_cast<size_t>(r.ids[c]) * A, symbol_dwords(tile, c, g), 4);
    if (in_q != 0)
      v = _mm256_blendv_ps(v, raw_points(load(&tile.q[c][8 * g]), r.bank->escape_bias),
                           _mm256_castsi256_ps(spread_bits(in_q, g)));
  }
  return scaled(v, r, c, g);
}

template <bool kExtra>
ALWAYS V int_group(const Tile &tile, int c, int g, const cg_bank *bank) {
  const uint32_t in_q = lanes_in_q<kExtra>(tile, c);
  const V q = _mm256_sub_epi32(symbol_dwords(tile, c, g), _mm256_set1_epi32(bank->offset));
  return in_q == 0 ? q : _mm256_blendv_epi8(q, load(&tile.q[c][8 * g]), spread_bits(in_q, g));
}

// Rows of words are two vectors: lanes 0-7 and 16-23, lanes 8-15 and 24-31.
struct WordRow {
  V even, odd;
};

ALWAYS V join_words(V low, V high) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8); }

template <int A, bool kExtra>
ALWAYS WordRow float_row(const Tile &tile, int c, const RowContext &r, bool bf16) {
  V g[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) g[i] = narrow(float_group<A, kExtra>(tile, c, i, r), bf16);
  return {join_words(g[0], g[2]), join_words(g[1], g[3])};
}

// A row of output lookups: low bytes of every symbol's number, then high bytes.
template <int A>
ALWAYS void make_lookup(const RowContext &r, int c, uint8_t *lookup) {
  const float *recon = r.bank->recon + static_cast<size_t>(r.ids[c]) * A;
  for (int j = 0; j < A; j += 16) {
    const V a = narrow(scaled(_mm256_loadu_ps(recon + j), r, c, 0), r.type == CG_BF16);
    const V b = narrow(scaled(_mm256_loadu_ps(recon + j + 8), r, c, 0), r.type == CG_BF16);
    const V words = join_words(a, b);
    const V bytes = _mm256_permute4x64_epi64(
        _mm256_packus_epi16(_mm256_and_si256(words, _mm256_set1_epi16(255)), _mm256_srli_epi16(words, 8)), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(lookup + j), _mm256_castsi256_si128(bytes));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(lookup + A + j), _mm256_extracti128_si256(bytes, 1));
  }
}

template <int A>
ALWAYS WordRow look_up_row(V symbols, const uint8_t *lookup) {
  V low, high;
  if constexpr (A == 16) {
    low = _mm256_shuffle_epi8(twice(lookup), symbols);
    high = _mm256_shuffle_epi8(twice(lookup + 16), symbols);
  } else {
    const V first = _mm256_adds_epu8(symbols, _mm256_set1_epi8(0x70)), second = _mm256_sub_epi8(symbols, _mm256_set1_epi8(16));
    low = _mm256_or_si256(_mm256_shuffle_epi8(twice(lookup), first), _mm256_shuffle_epi8(twice(lookup + 16), second));
    high = _mm256_or_si256(_mm256_shuffle_epi8(twice(lookup + 32), first), _mm256_shuffle_epi8(twice(lookup + 48), second));
  }
  return {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
}

// 8 rows of words, transposed within 128-bit lanes: v[k] = column k of each lane.
ALWAYS void transpose_lanes(V *v) {
  V a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi16(v[i], v[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi16(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi32(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi32(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi32(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi32(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    v[2 * j] = _mm256_unpacklo_epi64(a[j], a[4 + j]);
    v[2 * j + 1] = _mm256_unpackhi_epi64(a[j], a[4 + j]);
  }
}

// rows[component] -> out[token * stride bytes], 64 bytes each.
ALWAYS void transpose_words(const WordRow *rows, uint8_t *out, int64_t stride) {
  for (int odd = 0; odd < 2; odd++) {
    for (int c = 0; c < kTile; c += 16) {
      V left[8], right[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        left[i] = odd ? rows[c + i].odd : rows[c + i].even;
        right[i] = odd ? rows[c + 8 + i].odd : rows[c + 8 + i].even;
      }
      transpose_lanes(left);
      transpose_lanes(right);
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++) {
        store(out + (8 * odd + k) * stride + 2 * c, _mm256_permute2x128_si256(left[k], right[k], 0x20));
        store(out + (16 + 8 * odd + k) * stride + 2 * c, _mm256_permute2x128_si256(left[k], right[k], 0x31));
      }
    }
  }
}

// Rows of 32 bytes -> out[token * stride], 32 bytes each.
ALWAYS void transpose_bytes(const Tile &tile, uint8_t *out, int64_t stride) {
  // Two components a word, 16 rows of words in two halves of lanes; then as above with bytes for words.
  alignas(32) V low[16], high[16];
  for (int i = 0; i < 16; i++) {
    const V a = tile_symbols(tile, 2 * i), b = tile_symbols(tile, 2 * i + 1);
    low[i] = _mm256_unpacklo_epi8(a, b);    // lanes 0-7, 16-23
    high[i] = _mm256_unpackhi_epi8(a, b);   // lanes 8-15, 24-31
  }
  for (int odd = 0; odd < 2; odd++) {
    V *v = odd ? high : low;
    transpose_lanes(v);
    transpose_lanes(v + 8);
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
      store(out + (8 * odd + k) * stride, _mm256_permute2x128_si256(v[k], v[8 + k], 0x20));
      store(out + (16 + 8 * odd + k) * stride, _mm256_permute2x128_si256(v[k], v[8 + k], 0x31));
    }
  }
}

// rows[component][lane] of dwords -> out[token * stride bytes], 128 bytes each.
ALWAYS void transpose_dwords(const uint32_t (*rows)[kLanes], uint8_t *out, int64_t stride) {
  for (int c = 0; c < kTile; c += 8) {
    for (int l = 0; l < kLanes; l += 8) {
      V v[8], a[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) v[i] = load(&rows[c + i][l]);
#pragma GCC unroll 2
      for (int i = 0; i < 8; i += 4) {
        const V b0 = _mm256_unpacklo_epi32(v[i], v[i + 1]), b1 = _mm256_unpackhi_epi32(v[i], v[i + 1]);
        const V b2 = _mm256_unpacklo_epi32(v[i + 2], v[i + 3]), b3 = _mm256_unpackhi_epi32(v[i + 2], v[i + 3]);
        a[i] = _mm256_unpacklo_epi64(b0, b2);
        a[i + 1] = _mm256_unpackhi_epi64(b0, b2);
        a[i + 2] = _mm256_unpacklo_epi64(b1, b3);
        a[i + 3] = _mm256_unpackhi_epi64(b1, b3);
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        store(out + (l + k) * stride + 4 * c, _mm256_permute2x128_si256(a[k], a[4 + k], 0x20));
        store(out + (l + 4 + k) * stride + 4 * c, _mm256_permute2x128_si256(a[k], a[4 + k], 0x31));
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ encoding
// Exact x / freq: floor(2^32 / freq) makes the estimate the quotient or one less.
ALWAYS V divide(V x, V freq, V reciprocal, V &rest) {
  const V even = _mm256_mul_epu32(x, reciprocal);
  const V odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), _mm256_srli_epi64(reciprocal, 32));
  const V quotient = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  rest = _mm256_sub_epi32(x, _mm256_mullo_epi32(quotient, freq));
  const V short_by_one = at_least(rest, freq);
  rest = _mm256_sub_epi32(rest, _mm256_and_si256(short_by_one, freq));
  return _mm256_sub_epi32(quotient, short_by_one);
}

// slots[index] of 8 lanes: plain loads, quicker than a gather on Zen and no slower elsewhere.
ALWAYS V look_up_slots(const uint16_t *slots, V index) {
  alignas(32) uint32_t at[8];
  store(at, index);
  __m128i v = _mm_cvtsi32_si128(slots[at[0]]);
  v = _mm_insert_epi16(v, slots[at[1]], 1);
  v = _mm_insert_epi16(v, slots[at[2]], 2);
  v = _mm_insert_epi16(v, slots[at[3]], 3);
  v = _mm_insert_epi16(v, slots[at[4]], 4);
  v = _mm_insert_epi16(v, slots[at[5]], 5);
  v = _mm_insert_epi16(v, slots[at[6]], 6);
  return _mm256_cvtepu16_epi32(_mm_insert_epi16(v, slots[at[7]], 7));
}

template <int A>
ALWAYS V look_up(V index, const uint32_t *table) {
  if constexpr (A == 16) {
    const V low = _mm256_permutevar8x32_epi32(load(table), index), high = _mm256_permutevar8x32_epi32(load(table + 8), index);
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high),
                                                _mm256_castsi256_ps(_mm256_slli_epi32(index, 28))));
  } else {
    return _mm256_i32gather_epi32(reinterpret_cast<const int *>(table), index, 4);
  }
}

struct Avx2 {
  static constexpr int kDecodeGroup = 2;

  template <int A, bool kExtra, bool kPart, int K>
  static void decode_tile(Cursor *cursor, Tile *tile, const cg_bank *const *bank, const uint16_t *const *ids, int n,
                          int active) {
    V x[K][4], allowed[4];
    const uint8_t *p[K];
    for (int g = 0; g < 4; g++) allowed[g] = active_lanes(active, g);
    for (int i = 0; i < K; i++) {
      for (int g = 0; g < 4; g++) x[i][g] = load(cursor[i].x + 8 * g);
      p[i] = cursor[i].p;
      tile[i].raw = tile[i].any_escape = 0;
    }
    for (int c = 0; c < n; c++) {
#pragma GCC unroll 4
      for (int i = 0; i < K; i++) {
        const size_t table = ids[i][c];
        V next[4];
        const V symbols = advance<A>(x[i], bank[i], table, next);
        store(tile[i].symbol[c], symbols);
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++) {
          if (kPart) next[g] = _mm256_blendv_epi8(x[i][g], next[g], allowed[g]);
          x[i][g] = refill8(next[g], p[i], allowed[g], kPart);
        }
        if (kExtra) p[i] += read_extras(symbols, p[i], tile[i], c, bank[i], table, active);
      }
    }
    for (int i = 0; i < K; i++) {
      for (int g = 0; g < 4; g++) store(cursor[i].x + 8 * g, x[i][g]);
      cursor[i].p = p[i];
    }
  }

  template <int A, bool kExtra>
  static bool emit(const Tile &tile, const Sink &sink, int64_t block, int c0, int n, int active) {
    const cg_decode_job &job = *sink.job;
    const int64_t component = sink.first + c0, d = component % job.dim;
    const bool whole = n == kTile && active == kLanes && d + kTile <= job.dim;
    const int bytes = type_bytes(job.type);
    alignas(64) uint8_t spare[kLanes * kTile * 4];
    const int64_t at = block * kLanes * job.token_stride + component / job.dim * job.head_stride + d;
    uint8_t *out = whole ? static_cast<uint8_t *>(job.out) + at * bytes : spare;
    const int64_t stride = whole ? job.token_stride * bytes : kTile * bytes;
    bool ok = true;
    if (job.type == CG_U8) {
      transpose_bytes(tile, out, stride);
    } else if (bytes == 2) {
      ok = emit_words<A, kExtra>(tile, sink, block, c0, n, active, out, stride);
    } else {
      emit_dwords<A, kExtra>(tile, sink, block, c0, n, active, out, stride);
    }
    if (!whole) store_rows(spare, kTile, bytes, active, n, sink, block, c0);
    return ok;
  }

  static void fill_context(RowContext &r, const Sink &sink, int64_t block, int c0, int active) {
    const cg_decode_job &job = *sink.job;
    r.bank = job.bank;
    r.ids = sink.ids(block, c0);
    r.scale = sink.scales(block, c0);
    r.bias = sink.biases(c0);
    r.by_token = job.token_scale != nullptr;
    r.type = job.type;
    if (r.by_token)
      for (int l = 0; l < kLanes; l++) r.token[l] = l < active ? job.token_scale[block * kLanes + l] : 0.0f;
  }

  template <int A, bool kExtra>
  static bool emit_words(const Tile &tile, const Sink &sink, int64_t block, int c0, int n, int active, uint8_t *out,
                         int64_t stride) {
    const cg_decode_job &job = *sink.job;
    alignas(32) WordRow rows[kTile];
    for (int c = n; c < kTile; c++) rows[c] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    if (job.type == CG_I16) {
      const V zero = _mm256_setzero_si256(), offset = _mm256_set1_epi16(static_cast<int16_t>(job.bank->offset));
      V beyond = zero;
      for (int c = 0; c < n; c++) {
        if (lanes_in_q<kExtra>(tile, c) == 0) {
          const V s = tile_symbols(tile, c);
          rows[c].even = _mm256_sub_epi16(_mm256_unpacklo_epi8(s, zero), offset);
          rows[c].odd = _mm256_sub_epi16(_mm256_unpackhi_epi8(s, zero), offset);
          continue;
        }
        V g[4];
        for (int i = 0; i < 4; i++) {
          const V q = _mm256_and_si256(int_group<kExtra>(tile, c, i, job.bank), active_lanes(active, i));
          beyond = _mm256_or_si256(beyond, _mm256_xor_si256(_mm256_srai_epi32(_mm256_slli_epi32(q, 16), 16), q));
          g[i] = _mm256_and_si256(q, _mm256_set1_epi32(0xffff));
        }
        rows[c] = {join_words(g[0], g[2]), join_words(g[1], g[3])};
      }
      if (!_mm256_testz_si256(beyond, beyond)) return false;
      transpose_words(rows, out, stride);
      return true;
    }
    RowContext r;
    fill_context(r, sink, block, c0, active);
    const bool bf16 = job.type == CG_BF16;
    if (A > 32 || r.by_token) {
      for (int c = 0; c < n; c++) rows[c] = float_row<A, kExtra>(tile, c, r, bf16);
    } else if constexpr (A <= 32) {
      alignas(32) uint8_t fresh[kTile * A * 2];
      uint8_t *lookup = sink.lookup_cached ? sink.lookup + static_cast<size_t>(c0) * A * 2 : fresh;
      if (!sink.lookup_cached || block == 0)
        for (int c = 0; c < n; c++) make_lookup<A>(r, c, lookup + c * A * 2);
      for (int c = 0; c < n; c++) {
        if (lanes_in_q<kExtra>(tile, c) != 0) {
          rows[c] = float_row<A, kExtra>(tile, c, r, bf16);
        } else {
          rows[c] = look_up_row<A>(tile_symbols(tile, c), lookup + c * A * 2);
        }
      }
    }
    transpose_words(rows, out, stride);
    return true;
  }

  template <int A, bool kExtra>
  static void emit_dwords(const Tile &tile, const Sink &sink, int64_t block, int c0, int n, int active, uint8_t *out,
                          int64_t stride) {
    const cg_decode_job &job = *sink.job;
    RowContext r;
    fill_context(r, sink, block, c0, active);
    alignas(32) uint32_t rows[kTile][kLanes];
    std::memset(rows[n == kTile ? 0 : n], 0, sizeof rows[0] * static_cast<size_t>(kTile - n));
    for (int c = 0; c < n; c++) {
      for (int g = 0; g < 4; g++) {
        if (job.type == CG_I32) {
          store(&rows[c][8 * g], int_group<kExtra>(tile, c, g, job.bank));
        } else {
          const __m256 v = float_group<A, kExtra>(tile, c, g, r);
          store(&rows[c][8 * g], quiet(_mm256_castps_si256(v), v, 0x7fc00000u));
        }
      }
    }
    transpose_dwords(rows, out, stride);
  }

  // Rows of 32 values as words (two vectors: 0-15, 16-31); false if a dword doesn't fit.
  static bool load_words(const EncodeStream &s, int64_t block, int c0, V (*rows)[2]) {
    const cg_encode_job &job = *s.job;
    const int64_t at = block * kLanes * job.token_stride + s.first + c0;
    V beyond = _mm256_setzero_si256();
    for (int l = 0; l < kLanes; l++) {
      const int64_t row = at + l * job.token_stride;
      for (int h = 0; h < 2; h++) {
        if (job.type == CG_I16) {
          rows[l][h] = load(static_cast<const int16_t *>(job.values) + row + 16 * h);
        } else if (job.type == CG_U8) {
          rows[l][h] = _mm256_cvtepu8_epi16(load16(static_cast<const uint8_t *>(job.values) + row + 16 * h));
        } else {
          const int32_t *v = static_cast<const int32_t *>(job.values) + row + 16 * h;
          const V a = load(v), b = load(v + 8);
          rows[l][h] = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
          beyond = _mm256_or_si256(beyond, _mm256_xor_si256(_mm256_srai_epi32(_mm256_slli_epi32(a, 16), 16), a));
          beyond = _mm256_or_si256(beyond, _mm256_xor_si256(_mm256_srai_epi32(_mm256_slli_epi32(b, 16), 16), b));
        }
      }
    }
    return _mm256_testz_si256(beyond, beyond);
  }

  template <int A, bool kExtra>
  static bool fill(EncodeTile &tile, EncodeStream &s, int64_t block, int c0, int n, int active) {
    alignas(32) V rows[kLanes][2];
    if (n < kTile || active < kLanes || !load_words(s, block, c0, rows)) return fill_plain(tile, s, block, c0, n, active);
    // Transposed: tokens are rows here, components columns.
    alignas(32) WordRow paired[kLanes];
    for (int l = 0; l < kLanes; l++) {
      paired[l].even = _mm256_permute2x128_si256(rows[l][0], rows[l][1], 0x20);
      paired[l].odd = _mm256_permute2x128_si256(rows[l][0], rows[l][1], 0x31);
    }
    alignas(32) uint16_t values[kTile][kLanes];
    transpose_words(paired, reinterpret_cast<uint8_t *>(values), kLanes * 2);
    const cg_bank *bank = s.job->bank;
    const uint16_t *ids = s.job->ids + block * s.job->ids_stride + s.first + c0;
    const V offset = _mm256_set1_epi16(static_cast<int16_t>(s.job->type == CG_U8 ? 0 : bank->offset));
    const V last = _mm256_set1_epi16(static_cast<int16_t>((kExtra && bank->escape != 0xffffffffu ? A - 1 : A) - 1));
    V bad = _mm256_setzero_si256();
    for (int c = 0; c < kTile; c++) {
      const int low_bits = kExtra ? bank->low_bits[ids[c]] : 0;
      for (int h = 0; h < 2; h++) {
        const V q = load(&values[c][16 * h]), high = _mm256_sra_epi16(q, _mm_cvtsi32_si128(low_bits));
        const V symbol = _mm256_adds_epi16(high, offset);
        const V direct = _mm256_cmpeq_epi16(_mm256_min_epu16(symbol, last), symbol);
        if (!kExtra || bank->escape == 0xffffffffu) bad = _mm256_or_si256(bad, _mm256_cmpeq_epi16(direct, _mm256_setzero_si256()));
        store(&tile.symbol[c][16 * h], kExtra ? _mm256_blendv_epi8(_mm256_set1_epi16(A - 1), symbol, direct) : symbol);
        if (kExtra) {
          store(&tile.high[c][16 * h], high);
          store(&tile.low[c][16 * h], q);
        }
      }
    }
    return _mm256_testz_si256(bad, bad) || fill_plain(tile, s, block, c0, n, active);
  }

  template <int A, bool kExtra, bool kPart, int K>
  static void encode_tile(uint32_t (*state)[kLanes], uint8_t **end, EncodeTile *tile, const cg_bank *const *bank,
                          const uint16_t *const *ids, int n, int active, bool *ok) {
    V x[K][4], bad[K];
    uint8_t *p[K];
    const V zero = _mm256_setzero_si256(), low_word = _mm256_set1_epi32(0xffff);
    for (int i = 0; i < K; i++) {
      for (int g = 0; g < 4; g++) x[i][g] = load(state[i] + 8 * g);
      p[i] = end[i];
      bad[i] = zero;
    }
    for (int c = n - 1; c >= 0; c--) {
#pragma GCC unroll 2
      for (int i = 0; i < K; i++) {
        const size_t table = ids[i][c];
        const uint32_t *freq_start = bank[i]->freq_start + table * A;
        if (kExtra) {
          // Values whose symbol has no frequency go by the escape: rare, so they are looked for in plain code.
          const uint16_t *freqs = bank[i]->freqs + table * A;
          uint32_t escaped = 0;
          if (bank[i]->escape != 0xffffffffu) escaped = find_escapes(tile[i], c, freqs, A - 1, active);
          const int low_bits = bank[i]->low_bits[table];
          if (low_bits > 0 || escaped != 0) p[i] = put_extras(tile[i], c, low_bits, bank[i]->escape, active, p[i]);
        }
#pragma GCC unroll 4
        for (int g = 3; g >= 0; g--) {
          const V allowed = kPart ? active_lanes(active, g) : zero;
          V s = _mm256_cvtepu16_epi32(load16(&tile[i].symbol[c][8 * g]));
          if (kPart) s = _mm256_and_si256(s, allowed);
          const V e = look_up<A>(s, freq_start), f = _mm256_and_si256(e, low_word);
          V none = _mm256_cmpeq_epi32(f, zero);
          if (kPart) none = _mm256_and_si256(none, allowed);
          bad[i] = _mm256_or_si256(bad[i], none);
          V gives = at_least(x[i][g], _mm256_slli_epi32(f, 20));
          if (kPart) gives = _mm256_and_si256(gives, allowed);
          const unsigned m = dword_mask(gives);
          const V low = _mm256_and_si256(x[i][g], low_word);
          const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
          _mm_storeu_si128(reinterpret_cast<__m128i *>(p[i] - 16), _mm_shuffle_epi8(words, load16(kShuffles.gather_up[m])));
          p[i] -= 2 * __builtin_popcount(m);
          const V shifted = _mm256_blendv_epi8(x[i][g], _mm256_srli_epi32(x[i][g], 16), gives);
          V rest;
          const V quotient = divide(shifted, f, look_up<A>(s, bank[i]->reciprocal + table * A), rest);
          // A lane whose symbol has no frequency must not look outside the table, either.
          rest = _mm256_and_si256(_mm256_add_epi32(rest, _mm256_srli_epi32(e, 16)), _mm256_set1_epi32(kProbSum - 1));
          const V slot = look_up_slots(bank[i]->slots + table * kProbSum, rest);
          const V next = _mm256_add_epi32(_mm256_slli_epi32(quotient, kProbBits), slot);
          x[i][g] = kPart ? _mm256_blendv_epi8(x[i][g], next, allowed) : next;
        }
      }
    }
    for (int i = 0; i < K; i++) {
      for (int g = 0; g < 4; g++) store(state[i] + 8 * g, x[i][g]);
      end[i] = p[i];
      ok[i] = _mm256_testz_si256(bad[i], bad[i]);
    }
  }

  // Turns symbols without frequency into the escape; returns the escaped lanes.
  static uint32_t find_escapes(EncodeTile &tile, int c, const uint16_t *freqs, uint16_t escape, int active) {
    uint32_t escaped = 0;
    for (int l = 0; l < active; l++) {
      if (freqs[tile.symbol[c][l]] == 0) tile.symbol[c][l] = escape;
      escaped |= static_cast<uint32_t>(tile.symbol[c][l] == escape) << l;
    }
    return escaped;
  }
};

}  // namespace

const Coder kAvx2Coder{Avx2::kDecodeGroup, 2, decode_group<Avx2>, encode_group<Avx2>};

}  // namespace cg
#endif
