// The loop over blocks and tiles that the vector coders share: several streams in step, their tails, their outcome.
// Included after the ISA's target pragma; `Isa` supplies the kernels.
#ifndef CACHEGEN_DRIVE_H
#define CACHEGEN_DRIVE_H
#include "tile.h"

namespace cg {
namespace {

// Rows of output lookups can be kept for all blocks where neither table nor scale changes with the block.
inline bool can_cache_lookup(const DecodeStream &s) {
  const cg_decode_job &job = *s.job;
  return job.ids_stride == 0 && job.scale_stride == 0 && job.token_scale == nullptr && job.tokens > 2 * kLanes &&
         static_cast<size_t>(s.width) * job.bank->alphabet * 2 <= kLookupBytes;
}

template <class Isa, int A, bool kExtra, int K>
void decode_together(DecodeStream *const *streams, uint8_t *scratch) {
  Cursor cursor[K];
  Tile tile[K];
  Sink sink[K];
  const cg_bank *bank[K];
  for (int i = 0; i < K; i++) {
    DecodeStream &s = *streams[i];
    const int code = open_stream(cursor[i], s);
    if (code != CG_OK) {
      s.code = code;
      return;
    }
    sink[i] = {s.job, s.first, can_cache_lookup(s), scratch + i * kLookupBytes};
    bank[i] = s.job->bank;
  }
  const int64_t tokens = streams[0]->job->tokens;
  const int width = streams[0]->width;
  for (int64_t block = 0; block * kLanes < tokens; block++) {
    const int64_t left = tokens - block * kLanes;
    const int active = left < kLanes ? static_cast<int>(left) : kLanes;
    for (int c0 = 0; c0 < width; c0 += kTile) {
      const int n = width - c0 < kTile ? width - c0 : kTile;
      const uint16_t *ids[K];
      for (int i = 0; i < K; i++) {
        keep_readable(cursor[i]);
        ids[i] = sink[i].ids(block, c0);
      }
      if (active == kLanes) {
        Isa::template decode_tile<A, kExtra, false, K>(cursor, tile, bank, ids, n, active);
      } else {
        Isa::template decode_tile<A, kExtra, true, K>(cursor, tile, bank, ids, n, active);
      }
      for (int i = 0; i < K; i++) {
        if (cursor[i].p > cursor[i].end || !Isa::template emit<A, kExtra>(tile[i], sink[i], block, c0, n, active)) {
          streams[i]->code = CG_CORRUPT;
          return;
        }
      }
    }
  }
  for (int i = 0; i < K; i++)
    streams[i]->code = ended_well(cursor[i]) ? CG_OK : CG_CORRUPT;
}

template <class Isa, int A, bool kExtra>
void decode_count(DecodeStream *const *streams, int n, uint8_t *scratch) {
  while (n >= Isa::kDecodeGroup) {
    decode_together<Isa, A, kExtra, Isa::kDecodeGroup>(streams, scratch);
    streams += Isa::kDecodeGroup;
    n -= Isa::kDecodeGroup;
  }
  for (; n >= 2; n -= 2, streams += 2) decode_together<Isa, A, kExtra, 2>(streams, scratch);
  if (n > 0) decode_together<Isa, A, kExtra, 1>(streams, scratch);
}

template <class Isa>
void decode_group(DecodeStream *const *streams, int n, uint8_t *scratch) {
  const cg_bank *bank = streams[0]->job->bank;
  switch (bank->alphabet) {
    case 16:
      return bank->simple ? decode_count<Isa, 16, false>(streams, n, scratch) : decode_count<Isa, 16, true>(streams, n, scratch);
    case 32:
      return bank->simple ? decode_count<Isa, 32, false>(streams, n, scratch) : decode_count<Isa, 32, true>(streams, n, scratch);
    case 64:
      return bank->simple ? decode_count<Isa, 64, false>(streams, n, scratch) : decode_count<Isa, 64, true>(streams, n, scratch);
    default:
      return bank->simple ? decode_count<Isa, 256, false>(streams, n, scratch) : decode_count<Isa, 256, true>(streams, n, scratch);
  }
}

template <class Isa, int A, bool kExtra, int K>
void encode_together(EncodeStream *const *streams) {
  alignas(64) uint32_t x[K][kLanes];
  EncodeTile tile[K];
  const cg_bank *bank[K];
  uint8_t *p[K];
  for (int i = 0; i < K; i++) {
    for (uint32_t &v : x[i]) v = kStateMin;
    bank[i] = streams[i]->job->bank;
    p[i] = streams[i]->end;
  }
  const int64_t tokens = streams[0]->job->tokens;
  const int width = streams[0]->width;
  for (int64_t block = (tokens - 1) / kLanes; block >= 0; block--) {
    const int64_t left = tokens - block * kLanes;
    const int active = left < kLanes ? static_cast<int>(left) : kLanes;
    for (int c0 = (width - 1) / kTile * kTile; c0 >= 0; c0 -= kTile) {
      const int n = width - c0 < kTile ? width - c0 : kTile;
      const uint16_t *ids[K];
      for (int i = 0; i < K; i++) {
        const cg_encode_job &job = *streams[i]->job;
        ids[i] = job.ids + block * job.ids_stride + streams[i]->first + c0;
        if (!Isa::template fill<A, kExtra>(tile[i], *streams[i], block, c0, n, active)) {
          streams[i]->code = CG_CAPACITY;
          return;
        }
      }
      bool ok[K];
      if (active == kLanes) {
        Isa::template encode_tile<A, kExtra, false, K>(x, p, tile, bank, ids, n, active, ok);
      } else {
        Isa::template encode_tile<A, kExtra, true, K>(x, p, tile, bank, ids, n, active, ok);
      }
      for (int i = 0; i < K; i++) {
        if (ok[i]) continue;
        streams[i]->code = CG_CAPACITY;
        fill_plain(tile[i], *streams[i], block, c0, n, active);  // finds the place for the message
        return;
      }
    }
  }
  for (int i = 0; i < K; i++) {
    close_stream(*streams[i], x[i], p[i]);
    streams[i]->code = CG_OK;
  }
}

template <class Isa, int A, bool kExtra>
void encode_count(EncodeStream *const *streams, int n) {
  for (; n >= 2; n -= 2, streams += 2) encode_together<Isa, A, kExtra, 2>(streams);
  if (n > 0) encode_together<Isa, A, kExtra, 1>(streams);
}

template <class Isa>
void encode_group(EncodeStream *const *streams, int n) {
  const cg_bank *bank = streams[0]->job->bank;
  switch (bank->alphabet) {
    case 16:
      return bank->simple ? encode_count<Isa, 16, false>(streams, n) : encode_count<Isa, 16, true>(streams, n);
    case 32:
      return bank->simple ? encode_count<Isa, 32, false>(streams, n) : encode_count<Isa, 32, true>(streams, n);
    case 64:
      return bank->simple ? encode_count<Isa, 64, false>(streams, n) : encode_count<Isa, 64, true>(streams, n);
    default:
      return bank->simple ? encode_count<Isa, 256, false>(streams, n) : encode_count<Isa, 256, true>(streams, n);
  }
}

}  // namespace
}  // namespace cg
#endif
