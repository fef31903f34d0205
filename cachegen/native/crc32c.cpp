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
__attribute__((target("sse4.2"))) uint32_t crc_sse42(uint32_t c, const uint8_t *p, size_t n) {
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
