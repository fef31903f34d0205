// A bank of probability tables in the forms that the coders read. Built once, then shared between threads.
#ifndef CACHEGEN_BANK_H
#define CACHEGEN_BANK_H
#include <cstddef>
#include <cstdint>

// Members are plain pointers into one allocation, so that sources built for one ISA instantiate no templates here.
struct cg_bank {
  uint32_t tables, alphabet;
  int32_t offset;
  uint32_t escape;  // the escape symbol, or 0xffffffff
  uint32_t max_low;
  uint32_t simple;  // no escape, no low bits
  float escape_bias;

  const uint8_t *low_bits;  // [tables]
  const float *recon;       // [tables][alphabet]
  const uint16_t *freqs;    // [tables][alphabet]

  // Decoding. divider: [tables][A]; entries: [tables][2A] (lane.h).
  const uint32_t *divider, *entries;
  // AVX-512, A <= 64: per table divider[A], own[A], alias[A], where an entry is
  // freq | symbol << 12 | (rank - slot) << 18, signed.
  const uint32_t *wide;  // [tables][3A]
  // AVX2, A = 16 or 32: per table 11 planes of A bytes: divider (slot within the bucket), then own and alias entries'
  // bytes 0..3 (freq | (rank - slot) << 13, signed) and symbol.
  const uint8_t *planes;  // [tables][11][A]

  // Encoding, built on first use: freq | start << 16, reciprocal, slot of start + rank.
  const uint32_t *freq_start;   // [tables][A]
  const uint32_t *reciprocal;   // [tables][A] floor(2^32 / freq), at most 2^32 - 1
  const float *inverse;         // [tables][A] 1 / freq, rounded down
  const uint16_t *slots;        // [tables][4096], two spare at the end
  // A <= 32: the alias table as runs of start + rank that lie in one bucket: per table their 2 A starts (4096: none),
  // then their (slot - start - rank) mod 4096.
  const uint16_t *parts;
  void *decode_memory, *encode_memory;
  void *encode_lock;
};

namespace cg {
// Build `encode` forms of a bank if they aren't there. False: no memory.
bool bank_prepare_encode(cg_bank *bank);
}  // namespace cg
#endif
