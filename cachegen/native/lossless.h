/* C ABI of the `lossless` codec's planes: floats <-> exponent symbols and bit planes (docs/format-lossless.md). */
#ifndef CACHEGEN_LOSSLESS_H
#define CACHEGEN_LOSSLESS_H
#include <stddef.h>
#include <stdint.h>

#include "cachegen_native.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Element types; the numbers are those of the bitstream. */
enum { CG_LOSSLESS_BF16 = 0, CG_LOSSLESS_FP16 = 1, CG_LOSSLESS_FP32 = 2, CG_LOSSLESS_E4M3 = 3, CG_LOSSLESS_E5M2 = 4 };

/* Status: 0, a status of the coder (CG_BAD_TABLE, CG_CORRUPT, CG_TRUNCATED, ...), or one of these. */
enum {
  CG_LOSSLESS_OK = 0,
  CG_LOSSLESS_ARGUMENT = CG_BAD_ARGUMENT,
  CG_LOSSLESS_MEMORY = CG_NO_MEMORY,
  CG_LOSSLESS_EXCEPTIONS = 32, /* exceptions and escape symbols don't match */
  CG_LOSSLESS_RECORD = 33      /* a record that contradicts itself */
};

/* Members of the structures are 8 bytes each, so that a table of int64 can be one. */

/* One strided tensor [rows, heads, dim]; strides in bytes, dim contiguous. */
typedef struct {
  uint8_t *data;
  int64_t row_stride, head_stride, heads, dim;
} cg_rows;

/* Rows row0..row1 of a matrix: tensors side by side; column c runs over tensors, heads, dims. */
typedef struct {
  const cg_rows *tensors;
  int64_t count;       /* of tensors */
  int64_t columns;     /* sum of heads * dim */
  int64_t type, alphabet;
  int64_t row0, row1;
  const uint8_t *base; /* [columns] exponent of symbol 0 */
  const uint8_t *flip; /* [columns] 0 or 1: the sign that symbol bit 0 = 0 stands for */
  void *symbols;       /* [row1 - row0, columns]: uint8 */
  uint8_t *planes[3];  /* at row row0 */
  uint8_t *exceptions; /* split: room for one byte per element */
  int64_t exception_count;
} cg_floats;

/* counts[column][exponent][sign] += 1 over the rows; types whose symbols hold no sign have no such axis. */
CG_API int cg_lossless_count(const cg_floats *floats, uint32_t *counts);

/* Tensors to symbols, planes and exceptions; sets exception_count. */
CG_API int cg_lossless_split(cg_floats *floats);

/* Occurrences, and the model of them that codes cheapest. A side is a column, or a run of columns (a head). */
typedef struct {
  const uint32_t *counts; /* [columns], as cg_lossless_count makes them */
  int64_t columns, type;
  const int64_t *runs; /* [run_count] first column of each run, rising */
  int64_t run_count;
  uint16_t *freqs;     /* out: [tables, alphabet], each row sums to 4096; room for 8 x 256 */
  uint8_t *base, *flip, *table; /* out: [sides]; room for `columns` each */
  int64_t per_run, alphabet, tables; /* out; per_run: sides are runs */
  int64_t bits;        /* out: of symbols, escapes, tables and sides */
} cg_exponents;

/* Choose bases, flips, alphabet and tables. */
CG_API int cg_lossless_fit(cg_exponents *model);

/* A record as docs/format-lossless.md, *Planes and rANS*, describes it, and the tensors that it decodes to. */
typedef struct {
  const uint8_t *data; /* the record's body; nothing outside is read */
  int64_t size;
  const cg_rows *tensors;
  int64_t count, rows, columns, type;
} cg_record;

/* Decode n records with up to `threads` threads. *failed is the index of one that can't be decoded; tensors may then
   be half written (but nothing outside them ever is). */
CG_API int cg_lossless_decode(const cg_record *records, int64_t n, int threads, int isa, int64_t *failed);

#ifdef __cplusplus
}
#endif
#endif
