// The coder on AVX-512 with VBMI2 (Ice Lake, Zen 4 and later): a block's 32 lanes are two vectors of states, alias
// tables of up to 64 symbols live in registers (vpermd), and one expand hands the words to all 32 lanes.
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)

#if defined(CACHEGEN_SIMDE)  // tests only: the same source on any processor
#include "simde_avx512.h"
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,bmi,bmi2,popcnt,lzcnt,f16c")
#include <immintrin.h>
// GCC's own header takes undefined vectors as don't-care operands, and then warns of them.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "drive.h"

#define ALWAYS static inline __attribute__((always_inline))

namespace cg {
namespace {

using V = __m512i;

ALWAYS V load(const void *p) { return _mm512_loadu_si512(p); }
ALWAYS void store(void *p, V v) { _mm512_storeu_si512(p, v); }
ALWAYS V low_half_words(V v) { return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)); }
ALWAYS V high_half_words(V v) { return _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1)); }
ALWAYS __mmask32 first_lanes(int count) { return static_cast<__mmask32>((uint64_t{1} << count) - 1); }
ALWAYS V join_halves(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }

// t[index] of a table of A dwords in registers; index bits above the alphabet's are ignored.
template <int A>
ALWAYS V look_up(V index, const void *table) {
  const auto *t = static_cast<const uint32_t *>(table);
  if constexpr (A == 16) {
    return _mm512_permutexvar_epi32(index, load(t));
  } else if constexpr (A == 32) {
    return _mm512_permutex2var_epi32(load(t), index, load(t + 16));
  } else {
    const V low = _mm512_permutex2var_epi32(load(t), index, load(t + 16));
    const V high = _mm512_permutex2var_epi32(load(t + 32), index, load(t + 48));
    return _mm512_mask_blend_epi32(_mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), low, high);
  }
}

// ------------------------------------------------------------------------------------------------ decoding
// One step of 16 lanes up to the refill: returns the entry and sets x. `symbol_shift` is where the entry has its symbol.
template <int A>
constexpr int kSymbolShift = A == 256 ? 24 : 12;

template <int A>
ALWAYS V advance(V &x, const cg_bank *bank, size_t table) {
  const V slot_mask = _mm512_set1_epi32(kProbSum - 1);
  const V slot = _mm512_and_si512(x, slot_mask), high = _mm512_srli_epi32(x, kProbBits);
  if constexpr (A == 256) {
    const V bucket = _mm512_srli_epi32(slot, 4);
    const V divider = _mm512_i32gather_epi32(bucket, bank->divider + table * A, 4);
    const __mmask16 other = _mm512_cmpge_epu32_mask(slot, divider);
    const V at = _mm512_mask_add_epi32(bucket, other, bucket, _mm512_set1_epi32(A));
    const V e = _mm512_i32gather_epi32(at, bank->entries + table * 2 * A, 4);
    const V rank = _mm512_and_si512(_mm512_add_epi32(slot, _mm512_srli_epi32(e, 12)), slot_mask);
    x = _mm512_add_epi32(_mm512_mullo_epi32(_mm512_and_si512(e, slot_mask), high), rank);
    return e;
  } else {
    constexpr int kBucketShift = A == 16 ? 8 : (A == 32 ? 7 : 6);
    const uint32_t *t = bank->wide + table * 3 * A;
    const V bucket = _mm512_srli_epi32(x, kBucketShift);
    const __mmask16 other = _mm512_cmpge_epu32_mask(slot, look_up<A>(bucket, t));
    V e = look_up<A>(bucket, t + A);
    if constexpr (A == 16) {
      e = _mm512_mask_permutexvar_epi32(e, other, bucket, load(t + 2 * A));
    } else {
      e = _mm512_mask_mov_epi32(e, other, look_up<A>(bucket, t + 2 * A));
    }
    const V product = _mm512_mullo_epi32(_mm512_and_si512(e, slot_mask), high);
    x = _mm512_add_epi32(product, _mm512_add_epi32(slot, _mm512_srai_epi32(e, 18)));
    return e;
  }
}

// Lanes below 2^16 take a word each, in lane order. Returns the bytes taken.
ALWAYS int refill(V &a, V &b, const uint8_t *p, __mmask32 active, bool part) {
  const V least = _mm512_set1_epi32(kStateMin);
  __mmask16 ma = _mm512_cmplt_epu32_mask(a, least), mb = _mm512_cmplt_epu32_mask(b, least);
  if (part) {
    ma &= static_cast<__mmask16>(active);
    mb &= static_cast<__mmask16>(active >> 16);
  }
  const __mmask32 m = _mm512_kunpackw(mb, ma);
  const V words = _mm512_maskz_expand_epi16(m, load(p));
  a = _mm512_or_si512(_mm512_mask_slli_epi32(a, ma, a, 16), low_half_words(words));
  b = _mm512_or_si512(_mm512_mask_slli_epi32(b, mb, b, 16), high_half_words(words));
  return 2 * __builtin_popcount(m);
}

// Symbols of a row lie as lanes 0, 16, 1, 17, ...: as dwords, lane l below and lane l + 16 above.
template <int A>
ALWAYS V pair_symbols(V ea, V eb) {
  constexpr int shift = kSymbolShift<A>;
  V upper;
  if constexpr (shift > 16) {
    upper = _mm512_srli_epi32(eb, shift - 16);
  } else {
    upper = _mm512_slli_epi32(eb, 16 - shift);
  }
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(ea, shift), upper);
}

// What follows the words in banks with low bits or escape. Fills q where the row needs it; returns the bytes taken.
template <int A>
ALWAYS int read_extras(V ea, V eb, const uint8_t *p, Tile &tile, int c, const cg_bank *bank, size_t table, int active) {
  const uint8_t *const start = p;
  const int low_bits = bank->low_bits[table];
  const V symbol_mask = _mm512_set1_epi32(A - 1), escape = _mm512_set1_epi32(static_cast<int>(bank->escape));
  const V sa = _mm512_and_si512(_mm512_srli_epi32(ea, kSymbolShift<A>), symbol_mask);
  const V sb = _mm512_and_si512(_mm512_srli_epi32(eb, kSymbolShift<A>), symbol_mask);
  uint32_t escaped = static_cast<uint32_t>(_mm512_cmpeq_epi32_mask(sa, escape)) |
                     static_cast<uint32_t>(_mm512_cmpeq_epi32_mask(sb, escape)) << 16;
  if (active < kLanes) escaped &= (1u << active) - 1;
  if (low_bits == 0 && __builtin_expect(escaped == 0, 1)) return 0;
  const V offset = _mm512_set1_epi32(bank->offset);
  V low_a = _mm512_setzero_si512(), low_b = low_a, bit = _mm512_set1_epi32(1);
  const int plane_bytes = active > 16 ? 4 : 2;
  for (int i = 0; i < low_bits; i++, p += plane_bytes) {
    const uint32_t plane = active > 16 ? read_u32(p) : read_word(p);
    low_a = _mm512_mask_or_epi32(low_a, static_cast<__mmask16>(plane), low_a, bit);
    low_b = _mm512_mask_or_epi32(low_b, static_cast<__mmask16>(plane >> 16), low_b, bit);
    bit = _mm512_add_epi32(bit, bit);
  }
  const __m128i count = _mm_cvtsi32_si128(low_bits);
  store(&tile.q[c][0], _mm512_or_si512(_mm512_sll_epi32(_mm512_sub_epi32(sa, offset), count), low_a));
  store(&tile.q[c][16], _mm512_or_si512(_mm512_sll_epi32(_mm512_sub_epi32(sb, offset), count), low_b));
  tile.raw |= static_cast<uint32_t>(low_bits > 0) << c;
  if (__builtin_expect(escaped != 0, 0)) {
    tile.any_escape |= 1u << c;
    tile.escaped[c] = escaped;
    alignas(64) int32_t low[kLanes];
    store(low, low_a);
    store(low + 16, low_b);
    for (uint32_t rest = escaped; rest != 0; rest &= rest - 1, p += 2) {
      const int l = __builtin_ctz(rest);
      tile.q[c][l] = shift_left(static_cast<int16_t>(read_word(p)), low_bits) | low[l];
    }
  }
  return static_cast<int>(p - start);
}

// ------------------------------------------------------------------------------------------------ output
ALWAYS V quiet(V bits, __m512 v, uint32_t nan) {
  return _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(static_cast<int>(nan)));
}

// 16 floats to the bits of a 16-bit type, in dwords.
ALWAYS V narrow(__m512 v, bool bf16) {
  if (bf16) {
    const V u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const V rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    return quiet(_mm512_srli_epi32(rounded, 16), v, 0x7fc0);
  }
  return quiet(_mm512_cvtepu16_epi32(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)), v, 0x7e00);
}

template <int A>
ALWAYS __m512 look_up_float(V index, const float *table) {
  return _mm512_castsi512_ps(look_up<A>(index, table));
}

// Everything a row of a tile needs to become numbers.
struct RowContext {
  const cg_bank *bank;
  const uint16_t *ids;
  const float *scale, *bias;
  bool by_token;
  __m512 token_a, token_b;
  int64_t type;
};

ALWAYS __m512 scaled(__m512 v, const RowContext &r, int c, __m512 token) {
  if (r.scale != nullptr) v = _mm512_mul_ps(v, _mm512_set1_ps(r.scale[c]));
  if (r.by_token) v = _mm512_mul_ps(v, token);
  if (r.bias != nullptr) v = _mm512_add_ps(v, _mm512_set1_ps(r.bias[c]));
  return v;
}

ALWAYS __m512 raw_points(V q, float bias) {
  const __m512 v = _mm512_cvtepi32_ps(q), b = _mm512_set1_ps(bias);
  const V zero = _mm512_setzero_si512();
  const __m512 up = _mm512_mask_add_ps(v, _mm512_cmpgt_epi32_mask(q, zero), v, b);
  return _mm512_mask_sub_ps(up, _mm512_cmpgt_epi32_mask(zero, q), v, b);
}

// The two halves of row c as fp32 numbers, all steps applied; `symbols` as in pair_symbols.
template <int A, bool kExtra>
ALWAYS void float_halves(const Tile &tile, int c, const RowContext &r, __m512 &a, __m512 &b) {
  if (kExtra && (tile.raw >> c & 1)) {
    a = raw_points(load(&tile.q[c][0]), r.bank->escape_bias);
    b = raw_points(load(&tile.q[c][16]), r.bank->escape_bias);
  } else {
    const float *recon = r.bank->recon + static_cast<size_t>(r.ids[c]) * A;
    const V pairs = load(tile.symbol[c]);
    if constexpr (A == 256) {
      const V mask = _mm512_set1_epi32(A - 1);
      a = _mm512_i32gather_ps(_mm512_and_si512(pairs, mask), recon, 4);
      b = _mm512_i32gather_ps(_mm512_and_si512(_mm512_srli_epi32(pairs, 16), mask), recon, 4);
    } else {
      a = look_up_float<A>(pairs, recon);
      b = look_up_float<A>(_mm512_srli_epi32(pairs, 16), recon);
    }
    if (kExtra && (tile.any_escape >> c & 1)) {
      const auto escaped = tile.escaped[c];
      a = _mm512_mask_mov_ps(a, static_cast<__mmask16>(escaped), raw_points(load(&tile.q[c][0]), r.bank->escape_bias));
      b = _mm512_mask_mov_ps(b, static_cast<__mmask16>(escaped >> 16),
                             raw_points(load(&tile.q[c][16]), r.bank->escape_bias));
    }
  }
  a = scaled(a, r, c, r.token_a);
  b = scaled(b, r, c, r.token_b);
}

template <int A, bool kExtra>
ALWAYS void int_halves(const Tile &tile, int c, const cg_bank *bank, V &a, V &b) {
  const V mask = _mm512_set1_epi32(A - 1), offset = _mm512_set1_epi32(bank->offset), pairs = load(tile.symbol[c]);
  a = _mm512_sub_epi32(_mm512_and_si512(pairs, mask), offset);
  b = _mm512_sub_epi32(_mm512_and_si512(_mm512_srli_epi32(pairs, 16), mask), offset);
  if (!kExtra) return;
  uint32_t from_q = (tile.raw >> c & 1) ? ~0u : 0u;
  if (tile.any_escape >> c & 1) from_q |= tile.escaped[c];
  if (from_q == 0) return;
  a = _mm512_mask_mov_epi32(a, static_cast<__mmask16>(from_q), load(&tile.q[c][0]));
  b = _mm512_mask_mov_epi32(b, static_cast<__mmask16>(from_q >> 16), load(&tile.q[c][16]));
}

// A row of 16-bit output lookups: every symbol's finished number.
template <int A>
ALWAYS void make_lookup(const RowContext &r, int c, uint16_t *lookup) {
  const float *recon = r.bank->recon + static_cast<size_t>(r.ids[c]) * A;
  for (int j = 0; j < A; j += 16) {
    const V v = narrow(scaled(_mm512_loadu_ps(recon + j), r, c, r.token_a), r.type == CG_BF16);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(lookup + j), _mm512_cvtepi32_epi16(v));
  }
}

template <int A>
ALWAYS V look_up_words(V index, const uint16_t *lookup) {
  if constexpr (A == 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(lookup));
    return _mm512_permutexvar_epi16(index, _mm512_broadcast_i64x4(half));
  } else if constexpr (A == 32) {
    return _mm512_permutexvar_epi16(index, load(lookup));
  } else {
    return _mm512_permutex2var_epi16(load(lookup), index, load(lookup + 32));
  }
}

// Columns of decoded rows are in the order of pair_symbols.
ALWAYS int token_of_column(int column) { return (column >> 1) + (column & 1) * 16; }

// 32 rows of 32 words -> out[column * stride bytes], 64 bytes each; kPaired: columns of decoded rows.
template <bool kPaired>
ALWAYS void transpose_words(const V *rows, uint8_t *out, int64_t stride) {
  const auto place = [](int column) { return kPaired ? token_of_column(column) : column; };
  V a[32], b[32];
#pragma GCC unroll 16
  for (int i = 0; i < 32; i += 2) {
    b[i] = _mm512_unpacklo_epi16(rows[i], rows[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi16(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 32; i += 4) {
    a[i] = _mm512_unpacklo_epi32(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi32(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi32(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi32(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 32; i += 8) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 4 + j]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 4 + j]);
    }
  }
  // b[8 g + k]: its 128-bit lane q holds column 8 q + k of rows 8 g .. 8 g + 7.
#pragma GCC unroll 8
  for (int k = 0; k < 8; k++) {
    const V t0 = _mm512_shuffle_i32x4(b[k], b[8 + k], 0x44), t1 = _mm512_shuffle_i32x4(b[k], b[8 + k], 0xee);
    const V t2 = _mm512_shuffle_i32x4(b[16 + k], b[24 + k], 0x44), t3 = _mm512_shuffle_i32x4(b[16 + k], b[24 + k], 0xee);
    store(out + place(k) * stride, _mm512_shuffle_i32x4(t0, t2, 0x88));
    store(out + place(8 + k) * stride, _mm512_shuffle_i32x4(t0, t2, 0xdd));
    store(out + place(16 + k) * stride, _mm512_shuffle_i32x4(t1, t3, 0x88));
    store(out + place(24 + k) * stride, _mm512_shuffle_i32x4(t1, t3, 0xdd));
  }
}

// pairs[component / 2]: bytes of two components in each word, columns in pair order -> 32 bytes a token.
ALWAYS void transpose_bytes(const V *pairs, uint8_t *out, int64_t stride) {
  V a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi16(pairs[i], pairs[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi16(pairs[i], pairs[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi32(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi32(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi32(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi32(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 16; i += 8) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 4 + j]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 4 + j]);
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < 8; k++) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const V t = half == 0 ? _mm512_shuffle_i32x4(b[k], b[8 + k], 0x44) : _mm512_shuffle_i32x4(b[k], b[8 + k], 0xee);
      const V two = _mm512_shuffle_i32x4(t, t, 0xd8);
      const int column = 16 * half + k;
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + token_of_column(column) * stride),
                          _mm512_castsi512_si256(two));
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + token_of_column(column + 8) * stride),
                          _mm512_extracti64x4_epi64(two, 1));
    }
  }
}

// rows[i], i < 16: 16 dwords -> out[column * stride bytes], 64 bytes each.
ALWAYS void transpose_dwords(const V *rows, uint8_t *out, int64_t stride) {
  V a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  // b[4 g + k]: its 128-bit lane q holds column 4 q + k of rows 4 g .. 4 g + 3.
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {
    const V t0 = _mm512_shuffle_i32x4(b[k], b[4 + k], 0x44), t1 = _mm512_shuffle_i32x4(b[k], b[4 + k], 0xee);
    const V t2 = _mm512_shuffle_i32x4(b[8 + k], b[12 + k], 0x44), t3 = _mm512_shuffle_i32x4(b[8 + k], b[12 + k], 0xee);
    store(out + k * stride, _mm512_shuffle_i32x4(t0, t2, 0x88));
    store(out + (4 + k) * stride, _mm512_shuffle_i32x4(t0, t2, 0xdd));
    store(out + (8 + k) * stride, _mm512_shuffle_i32x4(t1, t3, 0x88));
    store(out + (12 + k) * stride, _mm512_shuffle_i32x4(t1, t3, 0xdd));
  }
}

// ------------------------------------------------------------------------------------------------ encoding
// Exact x / f for x < f * 2^20: every rounding is down, so the estimate is the quotient or one less.
ALWAYS V divide(V x, V freq, __m512 inverse, V &rest) {
  constexpr int kDown = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
  const __m512 product = _mm512_mul_round_ps(_mm512_cvt_roundepu32_ps(x, kDown), inverse, kDown);
  const V quotient = _mm512_cvttps_epi32(product);
  rest = _mm512_sub_epi32(x, _mm512_mullo_epi32(quotient, freq));
  const __mmask16 short_by_one = _mm512_cmpge_epu32_mask(rest, freq);
  rest = _mm512_mask_sub_epi32(rest, short_by_one, rest, freq);
  return _mm512_mask_sub_epi32(quotient, short_by_one, quotient, _mm512_set1_epi32(-1));
}

// The slots of u = start + rank, as words. Small alphabets: a binary search among the 2 A parts of the alias table (5
// or 6 vpermw), since 32 loads from 8 KB a table would mostly miss the first cache.
template <int A>
ALWAYS V look_up_slots(const cg_bank *bank, size_t table, V ua, V ub) {
  const V u = join_halves(_mm512_cvtepi32_epi16(ua), _mm512_cvtepi32_epi16(ub));
  if constexpr (A <= 32) {
    const uint16_t *starts = bank->parts + table * 4 * A, *shifts = starts + 2 * A;
    V at = _mm512_setzero_si512();
#pragma GCC unroll 6
    for (int step = A; step > 0; step /= 2) {
      const V next = _mm512_or_si512(at, _mm512_set1_epi16(static_cast<int16_t>(step)));
      at = _mm512_mask_mov_epi16(at, _mm512_cmpge_epu16_mask(u, look_up_words<2 * A>(next, starts)), next);
    }
    return _mm512_and_si512(_mm512_add_epi16(u, look_up_words<2 * A>(at, shifts)), _mm512_set1_epi16(kProbSum - 1));
  } else {
    const uint16_t *slots = bank->slots + table * kProbSum;
    alignas(64) uint16_t index[kLanes];
    store(index, u);
    __m128i part[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const uint16_t *at = index + 8 * i;
      __m128i v = _mm_cvtsi32_si128(slots[at[0]]);
      v = _mm_insert_epi16(v, slots[at[1]], 1);
      v = _mm_insert_epi16(v, slots[at[2]], 2);
      v = _mm_insert_epi16(v, slots[at[3]], 3);
      v = _mm_insert_epi16(v, slots[at[4]], 4);
      v = _mm_insert_epi16(v, slots[at[5]], 5);
      v = _mm_insert_epi16(v, slots[at[6]], 6);
      part[i] = _mm_insert_epi16(v, slots[at[7]], 7);
    }
    return join_halves(_mm256_inserti128_si256(_mm256_castsi128_si256(part[0]), part[1], 1),
                       _mm256_inserti128_si256(_mm256_castsi128_si256(part[2]), part[3], 1));
  }
}

template <int A>
ALWAYS V look_up_wide(V index, const void *table) {
  if constexpr (A == 256) {
    return _mm512_i32gather_epi32(index, table, 4);
  } else {
    return look_up<A>(index, table);
  }
}

struct Avx512 {
  static constexpr int kDecodeGroup = 4;

  template <int A, bool kExtra, bool kPart, int K>
  static void decode_tile(Cursor *cursor, Tile *tile, const cg_bank *const *bank, const uint16_t *const *ids, int n,
                          int active) {
    V a[K], b[K];
    const uint8_t *p[K];
    const __mmask32 lanes = first_lanes(active);
    for (int i = 0; i < K; i++) {
      a[i] = load(cursor[i].x);
      b[i] = load(cursor[i].x + 16);
      p[i] = cursor[i].p;
      tile[i].raw = tile[i].any_escape = 0;
    }
    for (int c = 0; c < n; c++) {
#pragma GCC unroll 4
      for (int i = 0; i < K; i++) {
        const size_t table = ids[i][c];
        const V old_a = a[i], old_b = b[i];
        const V ea = advance<A>(a[i], bank[i], table), eb = advance<A>(b[i], bank[i], table);
        if (kPart) {
          a[i] = _mm512_mask_mov_epi32(old_a, static_cast<__mmask16>(lanes), a[i]);
          b[i] = _mm512_mask_mov_epi32(old_b, static_cast<__mmask16>(lanes >> 16), b[i]);
        }
        p[i] += refill(a[i], b[i], p[i], lanes, kPart);
        store(tile[i].symbol[c], pair_symbols<A>(ea, eb));
        if (kExtra) p[i] += read_extras<A>(ea, eb, p[i], tile[i], c, bank[i], table, active);
      }
    }
    for (int i = 0; i < K; i++) {
      store(cursor[i].x, a[i]);
      store(cursor[i].x + 16, b[i]);
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
      V pairs[16];
      const V mask = _mm512_set1_epi16(static_cast<int16_t>((A - 1) | (A - 1) << 8));
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        pairs[i] = _mm512_and_si512(_mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaaull, load(tile.symbol[2 * i]),
                                                           _mm512_slli_epi16(load(tile.symbol[2 * i + 1]), 8)),
                                    mask);
      transpose_bytes(pairs, out, stride);
    } else if (bytes == 2) {
      ok = emit_words<A, kExtra>(tile, sink, block, c0, n, active, out, stride);
    } else {
      emit_dwords<A, kExtra>(tile, sink, block, c0, n, active, out, stride);
    }
    if (!whole) store_rows(spare, kTile, bytes, active, n, sink, block, c0);
    return ok;
  }

  static RowContext context(const Sink &sink, int64_t block, int c0, int active) {
    const cg_decode_job &job = *sink.job;
    RowContext r{job.bank,
                 sink.ids(block, c0),
                 sink.scales(block, c0),
                 sink.biases(c0),
                 job.token_scale != nullptr,
                 _mm512_setzero_ps(),
                 _mm512_setzero_ps(),
                 job.type};
    if (r.by_token) {
      const uint32_t lanes = first_lanes(active);
      r.token_a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), job.token_scale + block * kLanes);
      if (active > 16) r.token_b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> 16), job.token_scale + block * kLanes + 16);
    }
    return r;
  }

  template <int A, bool kExtra>
  static bool emit_words(const Tile &tile, const Sink &sink, int64_t block, int c0, int n, int active, uint8_t *out,
                         int64_t stride) {
    const cg_decode_job &job = *sink.job;
    alignas(64) V rows[kTile];
    for (int c = n; c < kTile; c++) rows[c] = _mm512_setzero_si512();
    if (job.type == CG_I16) {
      if (!kExtra) {
        const V mask = _mm512_set1_epi16(A - 1), offset = _mm512_set1_epi16(static_cast<int16_t>(job.bank->offset));
        for (int c = 0; c < n; c++) rows[c] = _mm512_sub_epi16(_mm512_and_si512(load(tile.symbol[c]), mask), offset);
      } else {
        V beyond = _mm512_setzero_si512();
        const uint32_t lanes = first_lanes(active);
        for (int c = 0; c < n; c++) {
          V a, b;
          int_halves<A, kExtra>(tile, c, job.bank, a, b);
          a = _mm512_maskz_mov_epi32(static_cast<__mmask16>(lanes), a);
          b = _mm512_maskz_mov_epi32(static_cast<__mmask16>(lanes >> 16), b);
          const V upper = _mm512_slli_epi32(b, 16);
          beyond = _mm512_or_si512(beyond, _mm512_xor_si512(_mm512_srai_epi32(_mm512_slli_epi32(a, 16), 16), a));
          beyond = _mm512_or_si512(beyond, _mm512_xor_si512(_mm512_srai_epi32(upper, 16), b));
          rows[c] = _mm512_mask_blend_epi16(0xaaaaaaaau, a, upper);
        }
        if (_mm512_test_epi32_mask(beyond, beyond) != 0) return false;
      }
      transpose_words<true>(rows, out, stride);
      return true;
    }
    const RowContext r = context(sink, block, c0, active);
    const bool bf16 = job.type == CG_BF16;
    if (A == 256 || r.by_token) {
      for (int c = 0; c < n; c++) {
        __m512 a, b;
        float_halves<A, kExtra>(tile, c, r, a, b);
        rows[c] = _mm512_mask_blend_epi16(0xaaaaaaaau, narrow(a, bf16), _mm512_slli_epi32(narrow(b, bf16), 16));
      }
    } else {
      constexpr int kRow = A == 256 ? 1 : A;  // 256 symbols never come here
      alignas(64) uint16_t fresh[kTile * kRow];
      uint16_t *lookup = sink.lookup_cached ? reinterpret_cast<uint16_t *>(sink.lookup) + static_cast<size_t>(c0) * kRow : fresh;
      if constexpr (A != 256) {
        if (!sink.lookup_cached || block == 0)
          for (int c = 0; c < n; c++) make_lookup<A>(r, c, lookup + c * A);
        for (int c = 0; c < n; c++) {
          if (kExtra && ((tile.raw | tile.any_escape) >> c & 1)) {
            __m512 a, b;
            float_halves<A, kExtra>(tile, c, r, a, b);
            rows[c] = _mm512_mask_blend_epi16(0xaaaaaaaau, narrow(a, bf16), _mm512_slli_epi32(narrow(b, bf16), 16));
          } else {
            rows[c] = look_up_words<A>(load(tile.symbol[c]), lookup + c * A);
          }
        }
      }
    }
    transpose_words<true>(rows, out, stride);
    return true;
  }

  template <int A, bool kExtra>
  static void emit_dwords(const Tile &tile, const Sink &sink, int64_t block, int c0, int n, int active, uint8_t *out,
                          int64_t stride) {
    const cg_decode_job &job = *sink.job;
    const RowContext r = context(sink, block, c0, active);
    alignas(64) V rows_a[kTile], rows_b[kTile];
    for (int c = n; c < kTile; c++) rows_a[c] = rows_b[c] = _mm512_setzero_si512();
    for (int c = 0; c < n; c++) {
      if (job.type == CG_I32) {
        int_halves<A, kExtra>(tile, c, job.bank, rows_a[c], rows_b[c]);
      } else {
        __m512 a, b;
        float_halves<A, kExtra>(tile, c, r, a, b);
        rows_a[c] = quiet(_mm512_castps_si512(a), a, 0x7fc00000u);
        rows_b[c] = quiet(_mm512_castps_si512(b), b, 0x7fc00000u);
      }
    }
    for (int c = 0; c < kTile; c += 16) {
      transpose_dwords(rows_a + c, out + 4 * c, stride);
      transpose_dwords(rows_b + c, out + 4 * c + 16 * stride, stride);
    }
  }

  // Rows of 32 values as words; false if a dword doesn't fit.
  static bool load_words(const EncodeStream &s, int64_t block, int c0, V *rows) {
    const cg_encode_job &job = *s.job;
    const int64_t at = block * kLanes * job.token_stride + s.first + c0;
    if (job.type == CG_I16) {
      const auto *v = static_cast<const int16_t *>(job.values) + at;
      for (int l = 0; l < kLanes; l++) rows[l] = load(v + l * job.token_stride);
      return true;
    }
    if (job.type == CG_U8) {
      const auto *v = static_cast<const uint8_t *>(job.values) + at;
      for (int l = 0; l < kLanes; l++)
        rows[l] = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(v + l * job.token_stride)));
      return true;
    }
    const auto *v = static_cast<const int32_t *>(job.values) + at;
    V beyond = _mm512_setzero_si512();
    for (int l = 0; l < kLanes; l++) {
      const V a = load(v + l * job.token_stride), b = load(v + l * job.token_stride + 16);
      rows[l] = join_halves(_mm512_cvtepi32_epi16(a), _mm512_cvtepi32_epi16(b));
      beyond = _mm512_or_si512(beyond, _mm512_xor_si512(_mm512_srai_epi32(_mm512_slli_epi32(a, 16), 16), a));
      beyond = _mm512_or_si512(beyond, _mm512_xor_si512(_mm512_srai_epi32(_mm512_slli_epi32(b, 16), 16), b));
    }
    return _mm512_test_epi32_mask(beyond, beyond) == 0;
  }

  template <int A, bool kExtra>
  static bool fill(EncodeTile &tile, EncodeStream &s, int64_t block, int c0, int n, int active) {
    alignas(64) V rows[kLanes];
    if (n < kTile || active < kLanes || !load_words(s, block, c0, rows)) return fill_plain(tile, s, block, c0, n, active);
    alignas(64) uint16_t values[kTile][kLanes];
    transpose_words<false>(rows, reinterpret_cast<uint8_t *>(values), kLanes * 2);
    const cg_bank *bank = s.job->bank;
    const uint16_t *ids = s.job->ids + block * s.job->ids_stride + s.first + c0;
    const V offset = _mm512_set1_epi16(static_cast<int16_t>(s.job->type == CG_U8 ? 0 : bank->offset));
    const V limit = _mm512_set1_epi16(static_cast<int16_t>(kExtra && bank->escape != 0xffffffffu ? A - 1 : A));
    __mmask32 bad = 0;
    for (int c = 0; c < kTile; c++) {
      const V q = load(values[c]);
      if (!kExtra) {
        const V symbol = _mm512_adds_epi16(q, offset);
        bad |= _mm512_cmpge_epu16_mask(symbol, limit);
        store(tile.symbol[c], symbol);
        continue;
      }
      const int low_bits = bank->low_bits[ids[c]];
      const V high = _mm512_sra_epi16(q, _mm_cvtsi32_si128(low_bits));
      const V symbol = _mm512_adds_epi16(high, offset);
      const __mmask32 other = _mm512_cmpge_epu16_mask(symbol, limit);
      store(tile.symbol[c], _mm512_mask_mov_epi16(symbol, other, _mm512_set1_epi16(A - 1)));
      store(tile.high[c], high);
      store(tile.low[c], q);  // bits above low_bits are never looked at
      if (bank->escape == 0xffffffffu) bad |= other;
    }
    return bad == 0 || fill_plain(tile, s, block, c0, n, active);
  }

  // Planes and escapes of one step, backwards.
  ALWAYS uint8_t *put_step_extras(EncodeTile &tile, int c, int low_bits, __mmask32 escaped, int active, uint8_t *p) {
    if (__builtin_expect(escaped != 0, 0)) {
      const V words = _mm512_maskz_compress_epi16(escaped, load(tile.high[c]));
      const int count = __builtin_popcount(escaped);
      p -= 2 * count;
      _mm512_mask_storeu_epi16(p, first_lanes(count), words);
    }
    V low = load(tile.low[c]);
    if (active < kLanes) low = _mm512_maskz_mov_epi16((1u << active) - 1, low);
    for (int i = low_bits - 1; i >= 0; i--) {
      const uint32_t plane = _mm512_test_epi16_mask(low, _mm512_set1_epi16(static_cast<int16_t>(1 << i)));
      if (active > 16) {
        p -= 4;
        std::memcpy(p, &plane, 4);
      } else {
        p = put_word(p, plane & 0xffff);
      }
    }
    return p;
  }

  template <int A, bool kExtra, bool kPart, int K>
  static void encode_tile(uint32_t (*x)[kLanes], uint8_t **end, EncodeTile *tile, const cg_bank *const *bank,
                          const uint16_t *const *ids, int n, int active, bool *ok) {
    V a[K], b[K];
    uint8_t *p[K];
    __mmask32 bad[K];
    const __mmask32 lanes = first_lanes(active);
    const V low_word = _mm512_set1_epi32(0xffff), zero = _mm512_setzero_si512();
    for (int i = 0; i < K; i++) {
      a[i] = load(x[i]);
      b[i] = load(x[i] + 16);
      p[i] = end[i];
      bad[i] = 0;
    }
    for (int c = n - 1; c >= 0; c--) {
#pragma GCC unroll 2
      for (int i = 0; i < K; i++) {
        const size_t table = ids[i][c];
        V symbols = load(tile[i].symbol[c]);
        if (kPart) symbols = _mm512_maskz_mov_epi16(lanes, symbols);
        V sa = low_half_words(symbols), sb = high_half_words(symbols);
        V ea = look_up_wide<A>(sa, bank[i]->freq_start + table * A), eb = look_up_wide<A>(sb, bank[i]->freq_start + table * A);
        V fa = _mm512_and_si512(ea, low_word), fb = _mm512_and_si512(eb, low_word);
        __mmask32 none = _mm512_kunpackw(_mm512_cmpeq_epi32_mask(fb, zero), _mm512_cmpeq_epi32_mask(fa, zero));
        if (kPart) none &= lanes;
        if (kExtra) {
          if (__builtin_expect(none != 0 && bank[i]->escape != 0xffffffffu, 0)) {  // those go by the escape
            symbols = _mm512_mask_mov_epi16(symbols, none, _mm512_set1_epi16(A - 1));
            sa = low_half_words(symbols);
            sb = high_half_words(symbols);
            ea = look_up_wide<A>(sa, bank[i]->freq_start + table * A);
            eb = look_up_wide<A>(sb, bank[i]->freq_start + table * A);
            fa = _mm512_and_si512(ea, low_word);
            fb = _mm512_and_si512(eb, low_word);
            none = _mm512_kunpackw(_mm512_cmpeq_epi32_mask(fb, zero), _mm512_cmpeq_epi32_mask(fa, zero));
            if (kPart) none &= lanes;
          }
          __mmask32 escaped = 0;
          if (bank[i]->escape != 0xffffffffu) escaped = _mm512_cmpeq_epi16_mask(symbols, _mm512_set1_epi16(A - 1));
          if (kPart) escaped &= lanes;
          const int low_bits = bank[i]->low_bits[table];
          if (low_bits > 0 || escaped != 0) p[i] = put_step_extras(tile[i], c, low_bits, escaped, active, p[i]);
        }
        bad[i] |= none;
        __mmask16 ma = _mm512_cmpge_epu32_mask(a[i], _mm512_slli_epi32(fa, 20));
        __mmask16 mb = _mm512_cmpge_epu32_mask(b[i], _mm512_slli_epi32(fb, 20));
        if (kPart) {
          ma &= static_cast<__mmask16>(lanes);
          mb &= static_cast<__mmask16>(lanes >> 16);
        }
        const __mmask32 m = _mm512_kunpackw(mb, ma);
        const int count = __builtin_popcount(m);
        const V words = join_halves(_mm512_cvtepi32_epi16(a[i]), _mm512_cvtepi32_epi16(b[i]));
        p[i] -= 2 * count;
        _mm512_mask_storeu_epi16(p[i], first_lanes(count), _mm512_maskz_compress_epi16(m, words));
        const V xa = _mm512_mask_srli_epi32(a[i], ma, a[i], 16), xb = _mm512_mask_srli_epi32(b[i], mb, b[i], 16);
        const float *inverse = bank[i]->inverse + table * A;
        V ra, rb;
        const V qa = divide(xa, fa, _mm512_castsi512_ps(look_up_wide<A>(sa, inverse)), ra);
        const V qb = divide(xb, fb, _mm512_castsi512_ps(look_up_wide<A>(sb, inverse)), rb);
        ra = _mm512_add_epi32(ra, _mm512_srli_epi32(ea, 16));
        rb = _mm512_add_epi32(rb, _mm512_srli_epi32(eb, 16));
        // A lane whose symbol has no frequency must not look outside the table, either.
        ra = _mm512_and_si512(ra, _mm512_set1_epi32(kProbSum - 1));
        rb = _mm512_and_si512(rb, _mm512_set1_epi32(kProbSum - 1));
        const V slot = look_up_slots<A>(bank[i], table, ra, rb);
        const V next_a = _mm512_add_epi32(_mm512_slli_epi32(qa, kProbBits), low_half_words(slot));
        const V next_b = _mm512_add_epi32(_mm512_slli_epi32(qb, kProbBits), high_half_words(slot));
        a[i] = kPart ? _mm512_mask_mov_epi32(a[i], static_cast<__mmask16>(lanes), next_a) : next_a;
        b[i] = kPart ? _mm512_mask_mov_epi32(b[i], static_cast<__mmask16>(lanes >> 16), next_b) : next_b;
      }
    }
    for (int i = 0; i < K; i++) {
      store(x[i], a[i]);
      store(x[i] + 16, b[i]);
      end[i] = p[i];
      ok[i] = bad[i] == 0;
    }
  }
};

}  // namespace

const Coder kAvx512Coder{Avx512::kDecodeGroup, 2, decode_group<Avx512>, encode_group<Avx512>};

}  // namespace cg
#endif
