/* The C ABI of CacheGen's native library. Every function is thread-safe and returns a status (0 = ok). */
#ifndef CACHEGEN_NATIVE_H
#define CACHEGEN_NATIVE_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CG_API __attribute__((visibility("default")))

/* CRC32C (Castagnoli) of n bytes, continuing from crc (0 to start). */
CG_API uint32_t cg_crc32c(uint32_t crc, const void *data, size_t n);

#ifdef __cplusplus
}
#endif
#endif
