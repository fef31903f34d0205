// Tiles: 32 components x one block of up to 32 tokens. The parts of the coder that are the same on every ISA and not
// worth intrinsics: opening and closing streams, their padded tails, rare values, output in plain code.
#ifndef CACHEGEN_TILE_H
#define CACHEGEN_TILE_H
#include <cstdint>
#include <cstring>

#include "coder.h"
#include "lane.h"

namespace cg {
namespace {

// Words that one step may take: one a lane, two a bit plane, one an escape.
constexpr int kStepWords = kLanes + 2 * kMaxLowBits + kLanes;
constexpr int kTileBytes = kTile * kStepWords * 2 + 64;  // and what a vector load reads too far
constexpr int kTailBytes = 2 * kTileBytes;

// What a decoded tile holds: symbols (16 bits each, higher bits than the alphabet's may be set where `dirty`), and
// whole values q of rows with low bits (`raw`) and of escaped lanes (`escaped`).
struct Tile {
  alignas(64) uint16_t symbol[kTile][kLanes];
  alignas(64) int32_t q[kTile][kLanes];
  uint32_t raw;             // bit c: all of row c is in q
  uint32_t any_escape;      // bit c: some of row c is in q
  uint32_t escaped[kTile];  // bit l of entry c: lane l is in q (if any_escape has c)
};

// Where a stream is being read. While at least a tile's worst case of bytes is left, p walks the caller's bytes; the
// rest is copied to `tail`, followed by zeros, so that no step needs a check: p > end after a tile is corruption.
struct Cursor {
  alignas(64) uint32_t x[kLanes];
  const uint8_t *p, *end;
  bool in_tail;
  alignas(64) uint8_t tail[kTailBytes];
};

inline int open_stream(Cursor &cursor, const DecodeStream &s) {
  const int64_t tokens = s.job->tokens;
  const int lanes = tokens < kLanes ? static_cast<int>(tokens) : kLanes;
  if (s.size < static_cast<size_t>(4 * lanes)) return CG_TRUNCATED;
  if (s.size % 2 != 0) return CG_CORRUPT;
  for (int l = 0; l < kLanes; l++) {
    cursor.x[l] = l < lanes ? read_u32(s.data + 4 * l) : kStateMin;
    if (cursor.x[l] < kStateMin) return CG_CORRUPT;
  }
  cursor.p = s.data + 4 * lanes;
  cursor.end = s.data + s.size;
  cursor.in_tail = false;
  return CG_OK;
}

inline void keep_readable(Cursor &cursor) {
  const auto left = cursor.end - cursor.p;
  if (cursor.in_tail || left >= kTileBytes) return;
  std::memcpy(cursor.tail, cursor.p, static_cast<size_t>(left));
  std::memset(cursor.tail + left, 0, sizeof cursor.tail - static_cast<size_t>(left));
  cursor.p = cursor.tail;
  cursor.end = cursor.tail + left;
  cursor.in_tail = true;
}

inline bool ended_well(const Cursor &cursor) {
  bool ok = cursor.p == cursor.end;
  for (int l = 0; l < kLanes; l++) ok = ok && cursor.x[l] == kStateMin;
  return ok;
}

// Bit planes of one step, plain: adds lane l's low bits to q[l]. Returns the bytes taken.
inline int read_planes(const uint8_t *p, int low_bits, int active, int32_t *q) {
  const int words = active > 16 ? 2 : 1;
  for (int i = 0; i < low_bits; i++) {
    const uint32_t plane = words == 2 ? read_u32(p + 4 * i) : read_word(p + 2 * i);
    for (int l = 0; l < active; l++) q[l] |= static_cast<int32_t>(plane >> l & 1) << i;
  }
  return 2 * words * low_bits;
}

// Shift towards higher bits, of negative numbers too.
inline int32_t shift_left(int32_t v, int bits) { return static_cast<int32_t>(static_cast<uint32_t>(v) << bits); }

// Where a stream's values go and by what they are multiplied.
struct Sink {
  const cg_decode_job *job;
  int64_t first;
  bool lookup_cached;  // one row of lookups a component, for all blocks
  uint8_t *lookup;     // kLookupBytes

  const uint16_t *ids(int64_t block, int c0) const { return job->ids + block * job->ids_stride + first + c0; }
  const float *scales(int64_t block, int c0) const {
    return job->scale == nullptr ? nullptr : job->scale + block * job->scale_stride + first + c0;
  }
  const float *biases(int c0) const { return job->bias == nullptr ? nullptr : job->bias + first + c0; }
};

constexpr int type_bytes(int64_t type) { return type == CG_U8 ? 1 : (type == CG_I32 || type == CG_F32 ? 4 : 2); }

// The bits of one dequantised value. `recon` is the symbol's point or raw_recon.
inline uint32_t float_value(float recon, const float *scale, const float *token_scale, const float *bias, int64_t type) {
  float v = recon;
  if (scale != nullptr) v = v * *scale;
  if (token_scale != nullptr) v = v * *token_scale;
  if (bias != nullptr) v = v + *bias;
  return type == CG_F32 ? to_f32_bits(v) : (type == CG_BF16 ? to_bf16(v) : to_fp16(v));
}

inline bool lane_in_q(const Tile &tile, int c, int l) {
  return (tile.raw >> c & 1) || ((tile.any_escape >> c & 1) && (tile.escaped[c] >> l & 1));
}

// One value of a tile in its output type; false: it doesn't fit.
inline bool tile_value(const Tile &tile, int c, int l, const Sink &sink, int64_t block, int c0, uint32_t *out) {
  const cg_bank *bank = sink.job->bank;
  const int64_t type = sink.job->type;
  const uint32_t symbol = tile.symbol[c][l] & (bank->alphabet - 1);
  const bool from_q = lane_in_q(tile, c, l);
  const int32_t q = from_q ? tile.q[c][l] : static_cast<int32_t>(symbol) - bank->offset;
  switch (type) {
    case CG_U8:
      *out = symbol;
      return true;
    case CG_I16:
    case CG_I32:
      *out = static_cast<uint32_t>(q);
      return type == CG_I32 || q == static_cast<int16_t>(q);
    default: {
      const size_t table = sink.ids(block, c0)[c];
      const float recon = from_q ? raw_recon(q, bank->escape_bias) : bank->recon[table * bank->alphabet + symbol];
      const float *scale = sink.scales(block, c0), *bias = sink.biases(c0), *token_scale = sink.job->token_scale;
      *out = float_value(recon, scale == nullptr ? nullptr : scale + c,
                         token_scale == nullptr ? nullptr : token_scale + block * kLanes + l,
                         bias == nullptr ? nullptr : bias + c, type);
      return true;
    }
  }
}

// Copies rows of `n` elements (rows[l * row_elements ...], `bytes` each) to the output, head by head.
inline void store_rows(const uint8_t *rows, int row_elements, int bytes, int active, int n, const Sink &sink, int64_t block,
                       int c0) {
  const cg_decode_job &job = *sink.job;
  auto *out = static_cast<uint8_t *>(job.out);
  for (int l = 0; l < active; l++) {
    for (int done = 0; done < n;) {
      const int64_t component = sink.first + c0 + done, d = component % job.dim;
      const int64_t room = job.dim - d;
      const int run = room < n - done ? static_cast<int>(room) : n - done;
      const int64_t at = (block * kLanes + l) * job.token_stride + component / job.dim * job.head_stride + d;
      std::memcpy(out + at * bytes, rows + (static_cast<size_t>(l) * row_elements + done) * bytes,
                  static_cast<size_t>(run) * bytes);
      done += run;
    }
  }
}

// A whole tile to the output, in plain code. Symbols in natural lane order.
inline bool emit_plain(const Tile &tile, const Sink &sink, int64_t block, int c0, int n, int active) {
  alignas(64) uint8_t rows[kLanes * kTile * 4];
  const int bytes = type_bytes(sink.job->type);
  bool ok = true;
  for (int c = 0; c < n; c++) {
    for (int l = 0; l < active; l++) {
      uint32_t v = 0;
      ok = tile_value(tile, c, l, sink, block, c0, &v) && ok;
      std::memcpy(rows + (l * kTile + c) * bytes, &v, static_cast<size_t>(bytes));  // little-endian
    }
  }
  store_rows(rows, kTile, bytes, active, n, sink, block, c0);
  return ok;
}

// Tiles of the encoder: symbols, and for tables with low bits or escape the rest of the values.
struct EncodeTile {
  alignas(64) uint16_t symbol[kTile][kLanes];
  alignas(64) uint16_t low[kTile][kLanes];
  alignas(64) int16_t high[kTile][kLanes];
};

inline int32_t load_value(const cg_encode_job &job, int64_t token, int64_t component) {
  const int64_t at = token * job.token_stride + component;
  if (job.type == CG_U8) return static_cast<const uint8_t *>(job.values)[at] - job.bank->offset;
  if (job.type == CG_I16) return static_cast<const int16_t *>(job.values)[at];
  return static_cast<const int32_t *>(job.values)[at];
}

// Values to symbols. False: a value can't be coded (its place is noted).
inline bool fill_plain(EncodeTile &tile, EncodeStream &s, int64_t block, int c0, int n, int active) {
  const cg_encode_job &job = *s.job;
  const cg_bank *bank = job.bank;
  const int32_t limit = static_cast<int32_t>(bank->escape != 0xffffffffu ? bank->alphabet - 1 : bank->alphabet);
  const uint16_t *ids = job.ids + block * job.ids_stride + s.first + c0;
  for (int c = 0; c < n; c++) {
    const int low_bits = bank->low_bits[ids[c]];
    const uint16_t *freqs = bank->freqs + static_cast<size_t>(ids[c]) * bank->alphabet;
    for (int l = 0; l < active; l++) {
      const int64_t token = block * kLanes + l, component = s.first + c0 + c;
      const int32_t q = load_value(job, token, component), high = q >> low_bits;
      const int64_t symbol = int64_t{high} + bank->offset;
      const bool direct = symbol >= 0 && symbol < limit && freqs[symbol] != 0;
      if (!direct && (bank->escape == 0xffffffffu || high != static_cast<int16_t>(high))) {
        s.bad_token = token;
        s.bad_component = component;
        return false;
      }
      tile.symbol[c][l] = static_cast<uint16_t>(direct ? static_cast<uint32_t>(symbol) : bank->escape);
      tile.low[c][l] = static_cast<uint16_t>(q & ((1 << low_bits) - 1));
      tile.high[c][l] = static_cast<int16_t>(high);
    }
  }
  return true;
}

inline uint8_t *put_word(uint8_t *p, uint32_t word) {
  p -= 2;
  p[0] = static_cast<uint8_t>(word);
  p[1] = static_cast<uint8_t>(word >> 8);
  return p;
}

// What follows a step's renormalisation words, written backwards: escapes, then bit planes.
inline uint8_t *put_extras(const EncodeTile &tile, int c, int low_bits, uint32_t escape, int active, uint8_t *p) {
  for (int l = active - 1; l >= 0; l--)
    if (tile.symbol[c][l] == escape) p = put_word(p, static_cast<uint16_t>(tile.high[c][l]));
  for (int i = low_bits - 1; i >= 0; i--) {
    uint32_t plane = 0;
    for (int l = 0; l < active; l++) plane |= static_cast<uint32_t>(tile.low[c][l] >> i & 1) << l;
    if (active > 16) p = put_word(p, plane >> 16);
    p = put_word(p, plane & 0xffff);
  }
  return p;
}

inline void close_stream(EncodeStream &s, const uint32_t *x, uint8_t *p) {
  const int64_t tokens = s.job->tokens;
  const int lanes = tokens < kLanes ? static_cast<int>(tokens) : kLanes;
  for (int l = lanes - 1; l >= 0; l--) {
    p = put_word(p, x[l] >> 16);
    p = put_word(p, x[l] & 0xffff);
  }
  s.begin = p;
}

}  // namespace
}  // namespace cg
#endif
