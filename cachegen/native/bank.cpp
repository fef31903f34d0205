// Tables from frequencies: validation, the alias construction of docs/format-entropy.md, and each ISA's own form.
#include "bank.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "cachegen_native.h"
#include "lane.h"

namespace {

constexpr uint32_t kMaxTables = 65536;  // table ids are 16 bits
constexpr int kPlanes = 11;

// Hands out aligned pieces of one allocation; first without memory, to count.
struct Arena {
  uint8_t *base = nullptr;
  size_t used = 0;
  template <class T>
  T *take(size_t count) {
    used = (used + 63) & ~size_t{63};
    T *p = base == nullptr ? nullptr : reinterpret_cast<T *>(base + used);
    used += count * sizeof(T);
    return p;
  }
};

struct Alias {
  uint32_t own[256], alias[256], base[256];  // slots of a bucket's own symbol; who has the rest; its first rank there
};

// Vose's method in integers. Buckets of width 4096 / A; `small` and `large` are stacks.
void build_alias(const uint16_t *freq, int alphabet, Alias &out) {
  const uint32_t width = cg::kProbSum / alphabet;
  uint32_t rest[256];
  int small[256], large[256], smalls = 0, larges = 0;
  for (int s = 0; s < alphabet; s++) {
    rest[s] = freq[s];
    out.own[s] = width;
    out.alias[s] = s;
    if (rest[s] < width) {
      small[smalls++] = s;
    } else {
      large[larges++] = s;
    }
  }
  while (smalls > 0) {
    const int s = small[--smalls], g = large[larges - 1];
    out.own[s] = rest[s];
    out.alias[s] = g;
    rest[g] -= width - rest[s];
    if (rest[g] < width) {
      larges--;
      small[smalls++] = g;
    }
  }
  // A symbol's ranks: first its own bucket's slots, then its parts of other buckets in ascending order.
  uint32_t next[256];
  for (int s = 0; s < alphabet; s++) next[s] = out.own[s];
  for (int b = 0; b < alphabet; b++) {
    out.base[b] = next[out.alias[b]];
    next[out.alias[b]] += width - out.own[b];
  }
}

int log2_exact(uint32_t v) {
  int n = 0;
  while ((1u << n) < v) n++;
  return n;
}

bool needs_planes(uint32_t alphabet) { return alphabet <= 32; }
bool needs_wide(uint32_t alphabet) { return alphabet <= 64; }

struct DecodePieces {
  uint8_t *low_bits, *planes;
  float *recon;
  uint16_t *freqs;
  uint32_t *divider, *entries, *wide;
};

DecodePieces lay_out_decode(Arena &arena, size_t tables, size_t alphabet) {
  DecodePieces p;
  p.wide = arena.take<uint32_t>(needs_wide(alphabet) ? tables * alphabet * 3 : 0);
  p.planes = arena.take<uint8_t>(needs_planes(alphabet) ? tables * alphabet * kPlanes + 64 : 0);
  p.divider = arena.take<uint32_t>(tables * alphabet);
  p.entries = arena.take<uint32_t>(tables * alphabet * 2);
  p.recon = arena.take<float>(tables * alphabet);
  p.freqs = arena.take<uint16_t>(tables * alphabet);
  p.low_bits = arena.take<uint8_t>(tables);
  arena.take<uint8_t>(64);
  return p;
}

void fill_table(const DecodePieces &p, size_t table, int alphabet) {
  const uint16_t *freq = p.freqs + table * alphabet;
  const int32_t width = cg::kProbSum / alphabet;
  Alias alias;
  build_alias(freq, alphabet, alias);
  for (int b = 0; b < alphabet; b++) {
    const int32_t first = b * width, divider = first + alias.own[b];
    const uint32_t other = alias.alias[b];
    const int32_t own_adjust = -first, alias_adjust = static_cast<int32_t>(alias.base[b]) - divider;
    p.divider[table * alphabet + b] = divider;
    p.entries[table * 2 * alphabet + b] = cg::pack_entry(freq[b], own_adjust, b);
    p.entries[(table * 2 + 1) * alphabet + b] = cg::pack_entry(freq[other], alias_adjust, other);
    if (needs_wide(alphabet)) {
      uint32_t *w = p.wide + table * 3 * alphabet;
      w[b] = divider;
      w[alphabet + b] = freq[b] | b << 12 | static_cast<uint32_t>(own_adjust) << 18;
      w[2 * alphabet + b] = freq[other] | other << 12 | static_cast<uint32_t>(alias_adjust) << 18;
    }
    if (needs_planes(alphabet)) {
      uint8_t *q = p.planes + table * kPlanes * alphabet;
      // A bucket of 256 has no byte for "all mine": divider 255, and its last slot's entry is its own symbol's.
      const bool full = alias.own[b] == static_cast<uint32_t>(width);
      const uint32_t own = freq[b] | static_cast<uint32_t>(own_adjust) << 13;
      const uint32_t rest = full ? own : freq[other] | static_cast<uint32_t>(alias_adjust) << 13;
      q[b] = static_cast<uint8_t>(full ? width - 1 : alias.own[b]);
      for (int byte = 0; byte < 4; byte++) {
        q[(1 + byte) * alphabet + b] = static_cast<uint8_t>(own >> 8 * byte);
        q[(6 + byte) * alphabet + b] = static_cast<uint8_t>(rest >> 8 * byte);
      }
      q[5 * alphabet + b] = static_cast<uint8_t>(b);
      q[10 * alphabet + b] = static_cast<uint8_t>(full ? b : other);
    }
  }
}

// Runs of the slot map: at most one for each bucket's own symbol and one for its alias.
void fill_parts(const uint16_t *slots, int alphabet, uint16_t *parts) {
  int n = 0;
  for (uint32_t u = 0; u < cg::kProbSum; u++) {
    if (u > 0 && slots[u] == slots[u - 1] + 1 && n > 0 && slots[u] % (cg::kProbSum / alphabet) != 0) continue;
    if (n < 2 * alphabet) {
      parts[n] = static_cast<uint16_t>(u);
      parts[2 * alphabet + n] = static_cast<uint16_t>((slots[u] - u) & (cg::kProbSum - 1));
    }
    n++;
  }
  for (; n < 2 * alphabet; n++) parts[n] = cg::kProbSum;
}

}  // namespace

extern "C" int cg_bank_create(const uint16_t *freqs, uint32_t tables, uint32_t alphabet, int32_t offset,
                              const uint8_t *low_bits, uint32_t escape, const float *recon, float escape_bias,
                              cg_bank **out) {
  *out = nullptr;
  if (alphabet != 16 && alphabet != 32 && alphabet != 64 && alphabet != 256) return CG_BAD_TABLE;
  if (tables < 1 || tables > kMaxTables || escape > 1) return CG_BAD_TABLE;
  if (offset < 0 || offset >= static_cast<int32_t>(alphabet)) return CG_BAD_TABLE;
  uint32_t max_low = 0;
  for (size_t t = 0; t < tables; t++) {
    uint32_t sum = 0;
    for (size_t s = 0; s < alphabet; s++) {
      const uint32_t f = freqs[t * alphabet + s];
      if (f >= cg::kProbSum) return CG_BAD_TABLE;
      sum += f;
    }
    if (sum != cg::kProbSum || low_bits[t] > cg::kMaxLowBits) return CG_BAD_TABLE;
    max_low = low_bits[t] > max_low ? low_bits[t] : max_low;
  }
  auto *bank = new (std::nothrow) cg_bank();
  if (bank == nullptr) return CG_NO_MEMORY;
  Arena arena;
  lay_out_decode(arena, tables, alphabet);
  const size_t bytes = (arena.used + 63) & ~size_t{63};
  arena = Arena();
  arena.base = static_cast<uint8_t *>(std::aligned_alloc(64, bytes));
  bank->decode_memory = arena.base;
  bank->encode_lock = new (std::nothrow) std::mutex();
  if (arena.base == nullptr || bank->encode_lock == nullptr) {
    cg_bank_free(bank);
    return CG_NO_MEMORY;
  }
  std::memset(arena.base, 0, bytes);
  const DecodePieces p = lay_out_decode(arena, tables, alphabet);
  std::memcpy(p.freqs, freqs, tables * alphabet * sizeof(uint16_t));
  std::memcpy(p.low_bits, low_bits, tables);
  std::memcpy(p.recon, recon, tables * alphabet * sizeof(float));
  for (size_t t = 0; t < tables; t++) fill_table(p, t, static_cast<int>(alphabet));
  bank->tables = tables;
  bank->alphabet = alphabet;
  bank->offset = offset;
  bank->escape = escape ? alphabet - 1 : 0xffffffffu;
  bank->max_low = max_low;
  bank->simple = !escape && max_low == 0;
  bank->escape_bias = escape_bias;
  bank->low_bits = p.low_bits;
  bank->recon = p.recon;
  bank->freqs = p.freqs;
  bank->divider = p.divider;
  bank->entries = p.entries;
  bank->wide = p.wide;
  bank->planes = p.planes;
  *out = bank;
  return CG_OK;
}

extern "C" void cg_bank_free(cg_bank *bank) {
  if (bank == nullptr) return;
  std::free(bank->decode_memory);
  std::free(bank->encode_memory);
  delete static_cast<std::mutex *>(bank->encode_lock);
  delete bank;
}

bool cg::bank_prepare_encode(cg_bank *bank) {
  const std::lock_guard<std::mutex> hold(*static_cast<std::mutex *>(bank->encode_lock));
  if (bank->encode_memory != nullptr) return true;
  const size_t tables = bank->tables, alphabet = bank->alphabet;
  Arena arena;
  uint32_t *freq_start = nullptr, *reciprocal = nullptr;
  float *inverse = nullptr;
  uint16_t *slots = nullptr, *parts = nullptr;
  const auto lay_out = [&] {
    freq_start = arena.take<uint32_t>(tables * alphabet);
    reciprocal = arena.take<uint32_t>(tables * alphabet);
    inverse = arena.take<float>(tables * alphabet);
    slots = arena.take<uint16_t>(tables * kProbSum + 2);
    parts = arena.take<uint16_t>(needs_planes(alphabet) ? tables * 4 * alphabet : 0);
  };
  lay_out();
  const size_t bytes = (arena.used + 63) & ~size_t{63};
  arena = Arena();
  arena.base = static_cast<uint8_t *>(std::aligned_alloc(64, bytes));
  if (arena.base == nullptr) return false;
  std::memset(arena.base, 0, bytes);
  lay_out();
  const int shift = kProbBits - log2_exact(static_cast<uint32_t>(alphabet));
  for (size_t t = 0; t < tables; t++) {
    uint32_t start = 0;
    for (size_t s = 0; s < alphabet; s++) {
      const uint32_t f = bank->freqs[t * alphabet + s];
      freq_start[t * alphabet + s] = f | start << 16;
      start += f;
      if (f == 0) continue;
      reciprocal[t * alphabet + s] = f == 1 ? 0xffffffffu : static_cast<uint32_t>((uint64_t{1} << 32) / f);
      const float nearest = 1.0f / static_cast<float>(f);
      // The exact product f * nearest fits a double, which tells whether the quotient was rounded up.
      const bool above = static_cast<double>(nearest) * f > 1.0;
      inverse[t * alphabet + s] = above ? std::nextafterf(nearest, 0.0f) : nearest;
    }
    const AliasView view{bank->divider + t * alphabet, bank->entries + t * 2 * alphabet, static_cast<int>(alphabet), shift};
    for (uint32_t slot = 0; slot < kProbSum; slot++) {
      const uint32_t e = lane_lookup(view, slot);
      const uint32_t rank = (slot + (e >> 12)) & (kProbSum - 1);
      slots[t * kProbSum + (freq_start[t * alphabet + entry_symbol(e)] >> 16) + rank] = static_cast<uint16_t>(slot);
    }
    if (needs_planes(alphabet)) fill_parts(slots + t * kProbSum, static_cast<int>(alphabet), parts + t * 4 * alphabet);
  }
  bank->freq_start = freq_start;
  bank->reciprocal = reciprocal;
  bank->inverse = inverse;
  bank->slots = slots;
  bank->parts = parts;
  bank->encode_memory = arena.base;
  return true;
}
