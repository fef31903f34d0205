// What the job runner (matrix.cpp) and each ISA's coder agree on.
#ifndef CACHEGEN_CODER_H
#define CACHEGEN_CODER_H
#include <cstddef>
#include <cstdint>

#include "bank.h"
#include "cachegen_native.h"

namespace cg {

constexpr int kUnfinished = -1;  // code of a stream that was given up because of another of its group

// One stream of a decode job: `width` components from `first`, over all blocks.
struct DecodeStream {
  const cg_decode_job *job;
  const uint8_t *data;
  size_t size;
  int64_t first, index;
  int32_t width;
  int code;
};

// One stream of an encode job. Words are written downwards from `end`; the stream is [begin, end).
struct EncodeStream {
  const cg_encode_job *job;
  uint8_t *floor, *end, *begin;
  int64_t first, index;
  int32_t width;
  int code;
  int64_t bad_token, bad_component;
};

constexpr int kMaxGroup = 4;  // streams in flight, at most

// Streams of one group have equal tokens, width and alphabet, and their banks are all simple or all not.
struct Coder {
  int decode_group, encode_group;  // how many streams go best together
  void (*decode)(DecodeStream *const *streams, int n, uint8_t *scratch);
  void (*encode)(EncodeStream *const *streams, int n);
};

// Bytes of scratch memory that a group's decode needs (64-byte aligned).
constexpr size_t kLookupBytes = size_t{64} << 10;  // of one stream: cached lookup rows
constexpr size_t kScratchBytes = kMaxGroup * kLookupBytes;

extern const Coder kScalarCoder;
#if defined(__x86_64__)
extern const Coder kAvx2Coder, kAvx512Coder;
#endif

}  // namespace cg
#endif
