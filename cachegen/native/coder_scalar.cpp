// The coder in plain C++: the definition that the vector coders must match, and the one for other processors.
#include "tile.h"

namespace cg {
namespace {

void decode_tile(Cursor &cursor, Tile &tile, const cg_bank *bank, const uint16_t *ids, int n, int active) {
  const int alphabet = static_cast<int>(bank->alphabet);
  int shift = kProbBits;
  for (int a = alphabet; a > 1; a >>= 1) shift--;
  const uint8_t *p = cursor.p;
  tile.raw = tile.any_escape = 0;
  for (int c = 0; c < n; c++) {
    const size_t table = ids[c];
    const AliasView view{bank->divider + table * alphabet, bank->entries + table * 2 * alphabet, alphabet, shift};
    for (int l = 0; l < active; l++) {
      const uint32_t e = lane_lookup(view, cursor.x[l]), x = lane_advance(cursor.x[l], e);
      tile.symbol[c][l] = static_cast<uint16_t>(entry_symbol(e));
      const uint32_t refilled = lane_refill(x, read_word(p));  // read in any case: no branch to mispredict
      const bool takes = lane_needs_word(x);
      cursor.x[l] = takes ? refilled : x;
      p += takes ? 2 : 0;
    }
    if (bank->simple) continue;
    const int low_bits = bank->low_bits[table];
    int32_t low[kLanes] = {0};
    p += read_planes(p, low_bits, active, low);
    uint32_t escaped = 0;
    for (int l = 0; l < active; l++) {
      int32_t high = tile.symbol[c][l] - bank->offset;
      if (tile.symbol[c][l] == bank->escape) {
        high = static_cast<int16_t>(read_word(p));
        p += 2;
        escaped |= 1u << l;
      }
      tile.q[c][l] = shift_left(high, low_bits) | low[l];
    }
    tile.raw |= static_cast<uint32_t>(low_bits > 0) << c;
    tile.any_escape |= static_cast<uint32_t>(escaped != 0) << c;
    tile.escaped[c] = escaped;
  }
  cursor.p = p;
}

void decode_stream(DecodeStream &s) {
  Cursor cursor;
  Tile tile;
  s.code = open_stream(cursor, s);
  if (s.code != CG_OK) return;
  const Sink sink{s.job, s.first, false, nullptr};
  const int64_t tokens = s.job->tokens;
  for (int64_t block = 0; block * kLanes < tokens; block++) {
    const int64_t left = tokens - block * kLanes;
    const int active = left < kLanes ? static_cast<int>(left) : kLanes;
    for (int c0 = 0; c0 < s.width; c0 += kTile) {
      const int n = s.width - c0 < kTile ? s.width - c0 : kTile;
      keep_readable(cursor);
      decode_tile(cursor, tile, s.job->bank, sink.ids(block, c0), n, active);
      if (cursor.p > cursor.end || !emit_plain(tile, sink, block, c0, n, active)) {
        s.code = CG_CORRUPT;
        return;
      }
    }
  }
  if (!ended_well(cursor)) s.code = CG_CORRUPT;
}

void encode_stream(EncodeStream &s) {
  const cg_bank *bank = s.job->bank;
  const size_t alphabet = bank->alphabet;
  const int64_t tokens = s.job->tokens;
  EncodeTile tile;
  uint32_t x[kLanes];
  for (uint32_t &v : x) v = kStateMin;
  uint8_t *p = s.end;
  s.code = CG_CAPACITY;
  for (int64_t block = (tokens - 1) / kLanes; block >= 0; block--) {
    const int64_t left = tokens - block * kLanes;
    const int active = left < kLanes ? static_cast<int>(left) : kLanes;
    for (int c0 = (s.width - 1) / kTile * kTile; c0 >= 0; c0 -= kTile) {
      const int n = s.width - c0 < kTile ? s.width - c0 : kTile;
      if (!fill_plain(tile, s, block, c0, n, active)) return;
      const uint16_t *ids = s.job->ids + block * s.job->ids_stride + s.first + c0;
      for (int c = n - 1; c >= 0; c--) {
        const size_t table = ids[c];
        if (!bank->simple) p = put_extras(tile, c, bank->low_bits[table], bank->escape, active, p);
        const uint32_t *freq_start = bank->freq_start + table * alphabet;
        for (int l = active - 1; l >= 0; l--) {
          const uint32_t fs = freq_start[tile.symbol[c][l]], freq = fs & 0xffff;
          if (freq == 0) {
            s.bad_token = block * kLanes + l;
            s.bad_component = s.first + c0 + c;
            return;
          }
          if (lane_gives_word(x[l], freq)) {
            p = put_word(p, x[l] & 0xffff);
            x[l] >>= 16;
          }
          x[l] = lane_push(x[l], freq, fs >> 16, bank->slots + table * kProbSum);
        }
      }
    }
  }
  close_stream(s, x, p);
  s.code = CG_OK;
}

void decode(DecodeStream *const *streams, int n, uint8_t *) {
  for (int i = 0; i < n; i++) decode_stream(*streams[i]);
}

void encode(EncodeStream *const *streams, int n) {
  for (int i = 0; i < n; i++) encode_stream(*streams[i]);
}

}  // namespace

const Coder kScalarCoder{1, 1, decode, encode};

}  // namespace cg
