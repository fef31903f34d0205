/* The C ABI of CacheGen's native library. Every function is thread-safe and returns a status (0 = ok). */
#ifndef CACHEGEN_NATIVE_H
#define CACHEGEN_NATIVE_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CG_API __attribute__((visibility("default")))

/* Status of the coder's functions. */
enum {
  CG_OK = 0,
  CG_BAD_ARGUMENT = 1, /* a size, type or stride that can't be */
  CG_BAD_TABLE = 2,    /* frequencies that don't sum to 4096, an alphabet, table id or low_bits out of range */
  CG_CAPACITY = 3,     /* encode: a value that its table can't code */
  CG_CORRUPT = 4,      /* decode: a stream that doesn't end as it must */
  CG_TRUNCATED = 5,    /* decode: fewer bytes than the stream lengths state */
  CG_NO_MEMORY = 6,
  CG_NO_ISA = 7 /* this processor lacks the instructions asked for */
};

/* Instruction sets. Each gives the same bytes. */
enum { CG_ISA_SCALAR = 0, CG_ISA_AVX2 = 1, CG_ISA_AVX512 = 2 };

/* The best that this processor runs. */
CG_API int cg_isa_best(void);

/* Types of values. */
enum { CG_U8 = 0, CG_I16 = 1, CG_I32 = 2, CG_BF16 = 3, CG_F16 = 4, CG_F32 = 5 };

/* A bank of probability tables (docs/format-entropy.md). Immutable once made; any number of threads may use it.
   freqs [tables][alphabet] sum to 4096 a row, each at most 4095; alphabet is 16, 32, 64 or 256; 0 <= offset < alphabet;
   low_bits [tables] at most 12; escape 0 or 1: the last symbol is the escape; recon [tables][alphabet]. All copied. */
typedef struct cg_bank cg_bank;
CG_API int cg_bank_create(const uint16_t *freqs, uint32_t tables, uint32_t alphabet, int32_t offset,
                          const uint8_t *low_bits, uint32_t escape, const float *recon, float escape_bias,
                          cg_bank **out);
CG_API void cg_bank_free(cg_bank *bank);

/* What went wrong, and where: indices of job, stream, token and component, or -1. */
typedef struct {
  int64_t job, stream, token, component;
} cg_fault;

/* Jobs. Every member is 8 bytes, so that a table of int64 can be one. Table ids: ids[block * ids_stride + component],
   ids_stride 0 or `components`. */
typedef struct {
  cg_bank *bank;
  const uint16_t *ids;
  int64_t ids_stride;
  int64_t tokens, components;
  const uint8_t *data; /* size bytes; nothing outside is read */
  int64_t size;
  /* Where value (t, c) goes: out + t * token_stride + c / dim * head_stride + c % dim, in elements of `type`.
     CG_U8 takes the symbols of banks without escape and low bits. */
  void *out;
  int64_t type, token_stride, head_stride, dim;
  /* Float types: ((recon * scale[block * scale_stride + c]) * token_scale[t]) + bias[c], each step in fp32, the last
     rounded to nearest even; a null pointer skips its step; scale_stride 0 or `components`. */
  const float *scale;
  int64_t scale_stride;
  const float *token_scale;
  const float *bias;
} cg_decode_job;

typedef struct {
  cg_bank *bank;
  const uint16_t *ids;
  int64_t ids_stride;
  int64_t tokens, components;
  const void *values; /* CG_U8 (symbols), CG_I16 or CG_I32; value (t, c) at t * token_stride + c elements */
  int64_t type, token_stride;
  uint8_t *data; /* set by cg_encode: inside `*blob` */
  int64_t size;  /* set by cg_encode */
} cg_encode_job;

/* Decode n matrices with up to `threads` threads. The first fault found is told in *fault; other matrices may then be
   half written (but nothing outside `out` ever is). */
CG_API int cg_decode(const cg_decode_job *jobs, int64_t n, int threads, int isa, cg_fault *fault);

/* Encode n matrices. *blob holds all of them and is given back with cg_blob_free. */
CG_API int cg_encode(cg_encode_job *jobs, int64_t n, int threads, int isa, void **blob, cg_fault *fault);
CG_API void cg_blob_free(void *blob);

/* CRC32C (Castagnoli) of n bytes, continuing from crc (0 to start). */
CG_API uint32_t cg_crc32c(uint32_t crc, const void *data, size_t n);

#ifdef __cplusplus
}
#endif
#endif
