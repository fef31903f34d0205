// One lane of the coder, and the numbers around it. Everything here is plain integer (or IEEE fp32) code without
// intrinsics, so that the scalar coder, the vector coders' rare cases and CUDA kernels share one definition.
// The bitstream is described in docs/format-entropy.md.
#ifndef CACHEGEN_LANE_H
#define CACHEGEN_LANE_H
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CG_HD __host__ __device__ __forceinline__
#else
#define CG_HD inline __attribute__((always_inline))
#endif

namespace cg {
namespace {  // internal linkage: each ISA's source keeps its own copy, compiled for its own target

constexpr int kLanes = 32;
constexpr int kProbBits = 12;
constexpr uint32_t kProbSum = 1u << kProbBits;
constexpr uint32_t kStateMin = 1u << 16;  // L: a state lies in [2^16, 2^32) between steps
constexpr int kMaxLowBits = 12;
constexpr int kTile = 32;  // components per tile: the decoder works tile by tile
constexpr int kStreamSymbols = 65536;

// An alias table entry packs what a slot says of its symbol: frequency, symbol, and how slot becomes rank.
//   bits 0-11 frequency, bits 12-23 (rank - slot) mod 4096, bits 24-31 symbol
CG_HD uint32_t pack_entry(uint32_t freq, uint32_t adjust, uint32_t symbol) {
  return freq | (adjust & (kProbSum - 1)) << 12 | symbol << 24;
}
CG_HD uint32_t entry_freq(uint32_t e) { return e & (kProbSum - 1); }
CG_HD uint32_t entry_symbol(uint32_t e) { return e >> 24; }

// A table's alias form: bucket = slot / width; slots below `divider[bucket]` are the bucket's own symbol's
// (entries[bucket]), the others its alias' (entries[alphabet + bucket]).
struct AliasView {
  const uint32_t *divider;
  const uint32_t *entries;
  int alphabet;
  int bucket_shift;  // 12 - log2(alphabet)
};

CG_HD uint32_t lane_lookup(const AliasView &t, uint32_t x) {
  const uint32_t slot = x & (kProbSum - 1), bucket = slot >> t.bucket_shift;
  return t.entries[bucket + (slot >= t.divider[bucket] ? t.alphabet : 0)];
}

// The state after a symbol: x = f * (x >> 12) + rank. It may be below 2^16 and then takes a word.
CG_HD uint32_t lane_advance(uint32_t x, uint32_t e) {
  return entry_freq(e) * (x >> kProbBits) + ((x + (e >> 12)) & (kProbSum - 1));
}
CG_HD bool lane_needs_word(uint32_t x) { return x < kStateMin; }
CG_HD uint32_t lane_refill(uint32_t x, uint32_t word) { return x << 16 | word; }

// Encoding is the inverse: a state at or above f * 2^20 first gives off its low word.
CG_HD bool lane_gives_word(uint32_t x, uint32_t freq) { return x >= freq << (32 - kProbBits); }
CG_HD uint32_t lane_push(uint32_t x, uint32_t freq, uint32_t start, const uint16_t *slots) {
  const uint32_t quotient = x / freq;
  return (quotient << kProbBits) + slots[start + (x - quotient * freq)];
}

CG_HD uint32_t read_word(const uint8_t *p) { return p[0] | uint32_t(p[1]) << 8; }
CG_HD uint32_t read_u32(const uint8_t *p) { return read_word(p) | read_word(p + 2) << 16; }

CG_HD uint32_t float_bits(float v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  return u;
}
CG_HD float bits_float(uint32_t u) {
  float v;
  memcpy(&v, &u, 4);
  return v;
}

// Reconstruction of a value that has no point of its own: |q| + bias with q's sign, 0 for q = 0.
CG_HD float raw_recon(int32_t q, float bias) {
  const float v = static_cast<float>(q);
  return q > 0 ? v + bias : (q < 0 ? v - bias : v);
}

// Roundings to nearest even; any NaN becomes the one quiet NaN, so that no hardware's payload rules show.
CG_HD uint32_t to_f32_bits(float v) { return v != v ? 0x7fc00000u : float_bits(v); }
CG_HD uint16_t to_bf16(float v) {
  const uint32_t u = float_bits(v);
  if (v != v) return 0x7fc0;
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
CG_HD uint16_t to_fp16(float v) {
  if (v != v) return 0x7e00;
  const uint32_t u = float_bits(v), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // 65536 and above
  if (a < 0x38800000) {                                              // below 2^-14: a multiple of 2^-24
    if (a < 0x33000000) return static_cast<uint16_t>(sign);          // below 2^-25
    const uint32_t shift = 126 - (a >> 23), m = (a & 0x7fffff) | 0x800000;
    const uint32_t half = 1u << (shift - 1), kept = m >> shift, rest = m & ((1u << shift) - 1);
    return static_cast<uint16_t>(sign | (kept + (rest > half || (rest == half && (kept & 1)))));
  }
  const uint32_t r = a - 0x38000000;  // rebias 127 -> 15; a carry runs into the exponent, up to infinity
  return static_cast<uint16_t>(sign | (r + 0xfff + (r >> 13 & 1)) >> 13);
}

}  // namespace
}  // namespace cg
#endif
