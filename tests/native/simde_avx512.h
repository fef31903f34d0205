// AVX-512 for processors without it: SIMDe's portable intrinsics, and plain versions of the few that it lacks. Tests
// only. Every function here is written from the instruction's definition, lane by lane.
#ifndef CACHEGEN_SIMDE_AVX512_H
#define CACHEGEN_SIMDE_AVX512_H
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "lane.h"

#ifndef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#endif

namespace simde_shim {

template <class T, size_t n, class V>
std::array<T, n> lanes(V v) {
  static_assert(sizeof v == n * sizeof(T));
  std::array<T, n> a;
  std::memcpy(a.data(), &v, sizeof v);
  return a;
}
template <class V, class T, size_t n>
V vector(const std::array<T, n> &a) {
  static_assert(sizeof(V) == n * sizeof(T));
  V v;
  std::memcpy(&v, a.data(), sizeof v);
  return v;
}
inline std::array<uint32_t, 16> dwords(simde__m512i v) { return lanes<uint32_t, 16>(v); }
inline std::array<uint16_t, 32> words(simde__m512i v) { return lanes<uint16_t, 32>(v); }

template <class Lanes, class Test>
inline uint32_t mask_of(const Lanes &a, const Lanes &b, Test test) {
  uint32_t mask = 0;
  for (size_t i = 0; i < a.size(); i++) mask |= static_cast<uint32_t>(test(a[i], b[i])) << i;
  return mask;
}

inline simde__mmask16 cmplt_epu32_mask(simde__m512i a, simde__m512i b) {
  return static_cast<simde__mmask16>(mask_of(dwords(a), dwords(b), [](uint32_t x, uint32_t y) { return x < y; }));
}
inline simde__mmask32 cmpeq_epi16_mask(simde__m512i a, simde__m512i b) {
  return mask_of(words(a), words(b), [](uint16_t x, uint16_t y) { return x == y; });
}
inline simde__mmask32 kunpackw(simde__mmask32 a, simde__mmask32 b) { return a << 16 | (b & 0xffff); }
inline simde__m256i cvtepi32_epi16(simde__m512i v) {
  const auto a = dwords(v);
  std::array<uint16_t, 16> out;
  for (size_t i = 0; i < 16; i++) out[i] = static_cast<uint16_t>(a[i]);
  return vector<simde__m256i>(out);
}
inline simde__m512i cvtepu8_epi16(simde__m256i v) {
  const auto a = lanes<uint8_t, 32>(v);
  std::array<uint16_t, 32> out;
  for (size_t i = 0; i < 32; i++) out[i] = a[i];
  return vector<simde__m512i>(out);
}
inline simde__m512i i32gather_epi32(simde__m512i index, const void *base, int scale) {
  const auto at = dwords(index);
  std::array<uint32_t, 16> out;
  for (size_t i = 0; i < 16; i++)
    std::memcpy(&out[i], static_cast<const char *>(base) + static_cast<int64_t>(static_cast<int32_t>(at[i])) * scale, 4);
  return vector<simde__m512i>(out);
}
inline simde__m512i mask_slli_epi32(simde__m512i from, simde__mmask16 mask, simde__m512i v, unsigned count) {
  auto out = dwords(from);
  const auto a = dwords(v);
  for (size_t i = 0; i < 16; i++)
    if (mask >> i & 1) out[i] = a[i] << count;
  return vector<simde__m512i>(out);
}
inline simde__m512i mask_srli_epi32(simde__m512i from, simde__mmask16 mask, simde__m512i v, unsigned count) {
  auto out = dwords(from);
  const auto a = dwords(v);
  for (size_t i = 0; i < 16; i++)
    if (mask >> i & 1) out[i] = a[i] >> count;
  return vector<simde__m512i>(out);
}
inline simde__m512i maskz_compress_epi16(simde__mmask32 mask, simde__m512i v) {
  const auto a = words(v);
  std::array<uint16_t, 32> out{};
  size_t n = 0;
  for (size_t i = 0; i < 32; i++)
    if (mask >> i & 1) out[n++] = a[i];
  return vector<simde__m512i>(out);
}
inline simde__m512i maskz_expand_epi16(simde__mmask32 mask, simde__m512i v) {
  const auto a = words(v);
  std::array<uint16_t, 32> out{};
  size_t n = 0;
  for (size_t i = 0; i < 32; i++)
    if (mask >> i & 1) out[i] = a[n++];
  return vector<simde__m512i>(out);
}

inline float towards_zero(double exact) {
  const auto nearest = static_cast<float>(exact);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(exact) ? std::nextafterf(nearest, 0.0f) : nearest;
}
inline simde__m512 cvt_epu32_ps_down(simde__m512i v) {
  const auto a = dwords(v);
  std::array<float, 16> out;
  for (size_t i = 0; i < 16; i++) out[i] = towards_zero(a[i]);
  return vector<simde__m512>(out);
}
inline simde__m512 mul_ps_down(simde__m512 x, simde__m512 y) {  // two 24-bit factors: exact in a double
  const auto a = lanes<float, 16>(x), b = lanes<float, 16>(y);
  std::array<float, 16> out;
  for (size_t i = 0; i < 16; i++) out[i] = towards_zero(static_cast<double>(a[i]) * b[i]);
  return vector<simde__m512>(out);
}
inline simde__m256i cvtps_ph(simde__m512 v) {  // to nearest even
  const auto a = lanes<float, 16>(v);
  std::array<uint16_t, 16> out;
  for (size_t i = 0; i < 16; i++) out[i] = cg::to_fp16(a[i]);
  return vector<simde__m256i>(out);
}

}  // namespace simde_shim

// clang-format off
#define _mm512_cmplt_epu32_mask simde_shim::cmplt_epu32_mask
#define _mm512_cmpeq_epi16_mask simde_shim::cmpeq_epi16_mask
#define _mm512_kunpackw simde_shim::kunpackw
#define _mm512_cvtepi32_epi16 simde_shim::cvtepi32_epi16
#define _mm512_cvtepu8_epi16 simde_shim::cvtepu8_epi16
#define _mm512_i32gather_epi32 simde_shim::i32gather_epi32
#define _mm512_i32gather_ps(index, base, scale) _mm512_castsi512_ps(simde_shim::i32gather_epi32(index, base, scale))
#define _mm512_mask_slli_epi32 simde_shim::mask_slli_epi32
#define _mm512_mask_srli_epi32 simde_shim::mask_srli_epi32
#define _mm512_maskz_compress_epi16 simde_shim::maskz_compress_epi16
#define _mm512_maskz_expand_epi16 simde_shim::maskz_expand_epi16
#define _mm512_cvt_roundepu32_ps(v, rounding) simde_shim::cvt_epu32_ps_down(v)
#define _mm512_mul_round_ps(a, b, rounding) simde_shim::mul_ps_down(a, b)
#define _mm512_cvtps_ph(v, rounding) simde_shim::cvtps_ph(v)
// clang-format on
#endif
