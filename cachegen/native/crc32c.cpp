// CRC32C: the SSE4.2 instruction where there is one, a table elsewhere.
#include "cachegen_native.h"

#include <array>
#include <cstring>
#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace {

constexpr std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; bit++) c = (c >> 1) ^ (c & 1 ? 0x82F63B78u : 0u);
    table[i] = c;
  }
  return table;
}
constexpr auto kTable = make_table();

uint32_t crc_table(uint32_t c, const uint8_t *p, size_t n) {
  for (size_t i = 0; i < n; i++) c = kTable[(c ^ p[i]) & 255] ^ (c >> 8);
  return c;
}

#if defined(__x86_64__)

// What `bytes` zero bytes do to a checksum's state, a byte of the state at a time: a linear map over GF(2).
struct Zeros {
  uint32_t of[4][256];

  explicit Zeros(size_t bytes) {
    for (uint32_t bit = 0; bit < 32; bit++) {
      uint32_t c = 1u << bit;
      for (size_t i = 0; i < bytes; i++) c = kTable[c & 255] ^ (c >> 8);
      for (uint32_t v = 0; v < 256; v++) {
        const uint32_t low = bit & 7;
        if ((v >> low) == 1) {  // its highest bit: the rest is known
          const uint32_t rest = v ^ (1u << low);
          of[bit >> 3][v] = c ^ (rest ? of[bit >> 3][rest] : 0u);
        }
      }
    }
    for (auto &row : of) row[0] = 0;
  }

  uint32_t operator()(uint32_t c) const {
    return of[0][c & 255] ^ of[1][(c >> 8) & 255] ^ of[2][(c >> 16) & 255] ^ of[3][c >> 24];
  }
};

// The instruction takes three cycles and starts every cycle: three neighbouring runs of bytes are summed at once, and
// joined by moving the first over the zeros that the others would be.
template <size_t kRun>
__attribute__((target("sse4.2"))) uint32_t crc_triples(uint32_t c, const uint8_t *&p, size_t &n) {
  static const Zeros zeros(kRun);
  while (n >= 3 * kRun) {
    uint64_t a = c, b = 0, d = 0;
    for (size_t i = 0; i < kRun; i += 8) {
      uint64_t v[3];
      std::memcpy(&v[0], p + i, 8);
      std::memcpy(&v[1], p + kRun + i, 8);
      std::memcpy(&v[2], p + 2 * kRun + i, 8);
      a = _mm_crc32_u64(a, v[0]);
      b = _mm_crc32_u64(b, v[1]);
      d = _mm_crc32_u64(d, v[2]);
    }
    c = zeros(zeros(static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b)) ^ static_cast<uint32_t>(d);
    p += 3 * kRun;
    n -= 3 * kRun;
  }
  return c;
}

__attribute__((target("sse4.2"))) uint32_t crc_sse42(uint32_t c, const uint8_t *p, size_t n) {
  c = crc_triples<4096>(c, p, n);
  c = crc_triples<256>(c, p, n);
  uint64_t wide = c;
  for (; n >= 8; n -= 8, p += 8) {
    uint64_t v;
    std::memcpy(&v, p, 8);
    wide = _mm_crc32_u64(wide, v);
  }
  c = static_cast<uint32_t>(wide);
  for (; n > 0; n--) c = _mm_crc32_u8(c, *p++);
  return c;
}
#endif

}  // namespace

extern "C" uint32_t cg_crc32c(uint32_t crc, const void *data, size_t n) {
  const auto *p = static_cast<const uint8_t *>(data);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) return ~crc_sse42(~crc, p, n);
#endif
  return ~crc_table(~crc, p, n);
}
