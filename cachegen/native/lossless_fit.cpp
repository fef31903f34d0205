// Models of exponents for the `lossless` codec: a base per side, and a few tables for sides of like statistics.
// A writer's choice: readers take any model that docs/format-lossless.md allows.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>
#include <vector>

#include "lossless_layout.h"

namespace {

using cg::kLayouts;
using cg::Layout;

constexpr int kRounds = 3, kMaxTables = 8;
constexpr double kProbSum = 4096;
constexpr uint64_t kMany = uint64_t{1} << 15;  // numbers; from here on eight tables pay
constexpr uint64_t kLong = 128;                // rows; from here on a side for each column pays

// Occurrences by side, exponent and sign, and what the model says of each side.
struct Sides {
  const uint32_t *counts;
  size_t n;
  std::vector<uint64_t> totals;  // [n, signs]
  std::vector<uint8_t> base, flip;
  uint64_t total = 0;
};

// Occurrences by side and symbol.
struct Symbols {
  size_t alphabet;
  std::vector<float> counts;  // exact below 2^24, and close enough above
  double escapes = 0;
};

struct Clusters {
  size_t tables = 0;
  std::vector<uint16_t> freqs;
  std::vector<uint8_t> table;
  double bits = 0;
};

bool empty(const uint32_t *counts, size_t n) {
  uint32_t any = 0;
  for (size_t i = 0; i < n; i++) any |= counts[i];
  return any == 0;
}

// Bases: the largest exponents but for one number in 64; flips: negative numbers are the rule.
void set_sides(Sides &sides, const Layout &layout) {
  constexpr size_t kStride = 16;  // bins looked at at once; every type's number of bins is a multiple
  const size_t signs = layout.signs + 1, bins = signs << layout.exponent_bits;
  sides.totals.assign(sides.n * signs, 0);
  sides.base.assign(sides.n, 0);
  sides.flip.assign(sides.n, 0);
  for (size_t i = 0; i < sides.n; i++) {
    const uint32_t *counts = sides.counts + i * bins;
    uint64_t *sums = sides.totals.data() + i * signs, total = 0;
    size_t top = 0;  // bins up to the last one in use
    for (size_t start = 0; start < bins; start += kStride) {
      if (empty(counts + start, kStride)) continue;
      top = start + kStride;
      for (size_t j = start; j < top; j += signs) {
        for (size_t sign = 0; sign < signs; sign++) sums[sign] += counts[j + sign];
      }
    }
    for (size_t sign = 0; sign < signs; sign++) total += sums[sign];
    size_t e = top == 0 ? 0 : top / signs - 1;
    for (uint64_t above = 0; e > 0; e--) {
      for (size_t sign = 0; sign < signs; sign++) above += counts[e * signs + sign];
      if (64 * above > total) break;
    }
    sides.base[i] = static_cast<uint8_t>(e);
    sides.flip[i] = signs == 2 && sums[1] > sums[0];
    sides.total += total;
  }
}

Symbols to_symbols(const Sides &sides, size_t alphabet, const Layout &layout) {
  const size_t exponents = size_t{1} << layout.exponent_bits, signs = layout.signs + 1, held = alphabet / signs;
  const size_t direct = held >= exponents ? exponents : held - 1;
  Symbols symbols{alphabet, std::vector<float>(sides.n * alphabet), 0.0};
  for (size_t i = 0; i < sides.n; i++) {
    const uint32_t *counts = sides.counts + i * exponents * signs;
    float *out = symbols.counts.data() + i * alphabet;
    for (size_t sign = 0; sign < signs; sign++) {
      const size_t from = sign ^ sides.flip[i];
      uint64_t coded = 0;
      for (size_t d = 0; d < direct; d++) {
        const uint32_t n = counts[((sides.base[i] - d) & (exponents - 1)) * signs + from];
        out[d * signs + sign] = static_cast<float>(n);
        coded += n;
      }
      if (direct == exponents) continue;
      const uint64_t total = sides.totals[i * signs + from];
      out[direct * signs + sign] = static_cast<float>(total - coded);
      symbols.escapes += static_cast<double>(total - coded);
    }
  }
  return symbols;
}

std::vector<double> sums_of(const Symbols &symbols, const std::vector<uint8_t> &table, size_t tables) {
  std::vector<double> sums(tables * symbols.alphabet);
  for (size_t i = 0; i < table.size(); i++) {
    double *sum = sums.data() + table[i] * symbols.alphabet;
    const float *counts = symbols.counts.data() + i * symbols.alphabet;
    for (size_t a = 0; a < symbols.alphabet; a++) sum[a] += static_cast<double>(counts[a]);
  }
  return sums;
}

// Frequencies that sum to 4096, at least 1 where counts are positive, at most 4095.
void normalise(double *counts, size_t alphabet, uint16_t *freqs) {
  size_t present = 0;
  for (size_t a = 0; a < alphabet; a++) present += counts[a] > 0;
  if (present < 2) {  // two symbols at least: none may have 4096
    counts[0] += 1e-9;
    counts[1] += 1e-9;
    present = 0;
    for (size_t a = 0; a < alphabet; a++) present += counts[a] > 0;
  }
  const double total = std::accumulate(counts, counts + alphabet, 0.0), room = kProbSum - static_cast<double>(present);
  uint32_t sum = 0;
  for (size_t a = 0; a < alphabet; a++) {
    freqs[a] = static_cast<uint16_t>(std::floor(counts[a] / total * room) + (counts[a] > 0));
    sum += freqs[a];
  }
  uint16_t *largest = std::max_element(freqs, freqs + alphabet);
  *largest = static_cast<uint16_t>(*largest + 4096 - static_cast<int>(sum));
}

// The side's cheapest table, tables' code lengths standing in rows of kMaxTables for each symbol.
uint8_t cheapest(const float *counts, size_t alphabet, const float *lengths, size_t tables) {
  float costs[kMaxTables] = {};
  for (size_t a = 0; a < alphabet; a++, lengths += kMaxTables) {
    if (counts[a] == 0) continue;
    for (int t = 0; t < kMaxTables; t++) costs[t] += counts[a] * lengths[t];
  }
  return static_cast<uint8_t>(std::min_element(costs, costs + tables) - costs);
}

// k-means in code length.
Clusters cluster(const Symbols &symbols, size_t n, size_t tables) {
  const size_t alphabet = symbols.alphabet;
  Clusters made;
  made.table.assign(n, 0);
  if (tables > 1) {
    std::vector<float> spread(n);  // mean symbol of each side
    for (size_t i = 0; i < n; i++) {
      const float *counts = symbols.counts.data() + i * alphabet;
      float total = 0, moment = 0;
      for (size_t a = 0; a < alphabet; a++) {
        total += counts[a];
        moment += counts[a] * static_cast<float>(a);
      }
      spread[i] = moment / std::max(total, 1.0f);
    }
    std::vector<uint32_t> order(n);
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return spread[a] < spread[b]; });
    for (size_t i = 0; i < n; i++) made.table[order[i]] = static_cast<uint8_t>(i * tables / n);
    std::vector<float> lengths(alphabet * kMaxTables);
    for (int round = 0; round < kRounds; round++) {
      const std::vector<double> sums = sums_of(symbols, made.table, tables);
      for (size_t t = 0; t < tables; t++) {
        const double *sum = sums.data() + t * alphabet;
        const double total = std::accumulate(sum, sum + alphabet, 0.02 * static_cast<double>(alphabet));
        for (size_t a = 0; a < alphabet; a++)
          lengths[a * kMaxTables + t] = static_cast<float>(std::log2(total / (sum[a] + 0.02)));
      }
      for (size_t i = 0; i < n; i++)
        made.table[i] = cheapest(symbols.counts.data() + i * alphabet, alphabet, lengths.data(), tables);
    }
  }
  uint8_t number[kMaxTables] = {};  // of the tables in use
  bool used[kMaxTables] = {};
  for (const uint8_t t : made.table) used[t] = true;
  for (size_t t = 0; t < tables; t++) {
    number[t] = static_cast<uint8_t>(made.tables);
    made.tables += used[t];
  }
  for (uint8_t &t : made.table) t = number[t];
  std::vector<double> sums = sums_of(symbols, made.table, made.tables);
  made.freqs.resize(made.tables * alphabet);
  for (size_t t = 0; t < made.tables; t++) {
    const std::vector<double> counts(sums.begin() + static_cast<std::ptrdiff_t>(t * alphabet),
                                     sums.begin() + static_cast<std::ptrdiff_t>((t + 1) * alphabet));
    uint16_t *freqs = made.freqs.data() + t * alphabet;
    normalise(sums.data() + t * alphabet, alphabet, freqs);
    for (size_t a = 0; a < alphabet; a++) {
      if (counts[a] > 0) made.bits += counts[a] * (12 - std::log2(static_cast<double>(freqs[a])));
      made.bits += freqs[a] != 0 ? 16 : 0;
    }
  }
  return made;
}

void take(const Sides &sides, const Symbols &symbols, const Clusters &made, double bits, bool per_run,
          cg_exponents &out) {
  out.per_run = per_run;
  out.alphabet = static_cast<int64_t>(symbols.alphabet);
  out.tables = static_cast<int64_t>(made.tables);
  out.bits = static_cast<int64_t>(std::ceil(bits));
  std::copy(made.freqs.begin(), made.freqs.end(), out.freqs);
  std::copy(sides.base.begin(), sides.base.end(), out.base);
  std::copy(sides.flip.begin(), sides.flip.end(), out.flip);
  std::copy(made.table.begin(), made.table.end(), out.table);
}

void fit(cg_exponents &out) {
  const Layout &layout = kLayouts[out.type];
  const auto columns = static_cast<size_t>(out.columns);
  const size_t bins = size_t{1} << (layout.exponent_bits + static_cast<int>(layout.signs));
  std::vector<uint32_t> run_counts;
  std::vector<Sides> shares{{out.counts, columns, {}, {}, {}}};
  set_sides(shares[0], layout);
  const uint64_t total = shares[0].total;
  if (total < kLong * columns) {
    const auto runs = static_cast<size_t>(out.run_count);
    run_counts.resize(runs * bins);
    for (size_t r = 0; r < runs; r++) {
      const auto first = static_cast<size_t>(out.runs[r]);
      const size_t last = r + 1 < runs ? static_cast<size_t>(out.runs[r + 1]) : columns;
      uint32_t *sum = run_counts.data() + r * bins;
      for (size_t c = first; c < last; c++) {
        const uint32_t *counts = out.counts + c * bins;
        for (size_t i = 0; i < bins; i++) sum[i] += counts[i];
      }
    }
    shares.push_back({run_counts.data(), runs, {}, {}, {}});
    set_sides(shares[1], layout);
  }
  const bool many = total >= kMany && columns >= 64;  // fewer columns can't fill eight tables
  bool found = false;
  double best = 0;
  for (const Sides &sides : shares) {
    const bool per_run = sides.counts != out.counts;
    for (const size_t alphabet : {16, 32, 64, 256}) {
      if (alphabet > bins) break;
      const Symbols symbols = to_symbols(sides, alphabet, layout);
      for (const size_t tables : {1, 4, 8}) {
        if (tables > 1 && tables > sides.n / 8) continue;
        if (tables > 1 && per_run) continue;
        if (!per_run && many != (tables == 8)) continue;
        const Clusters made = cluster(symbols, sides.n, tables);
        const double bits = made.bits + 8 * symbols.escapes + 8 * static_cast<double>(sides.n);
        if (found && bits >= best) continue;
        take(sides, symbols, made, bits, per_run, out);
        found = true;
        best = bits;
      }
      if (symbols.escapes < 0.02 * static_cast<double>(total)) break;  // larger alphabets save escapes only
    }
  }
}

bool valid(const cg_exponents &m) {
  if (m.type < 0 || m.type >= cg::kTypes || m.columns < 1 || m.columns > cg::kMaxColumns || m.run_count < 1) return false;
  if (m.run_count > m.columns) return false;
  for (int64_t r = 0; r < m.run_count; r++) {
    if (m.runs[r] < (r > 0 ? m.runs[r - 1] : 0) || m.runs[r] >= m.columns) return false;
  }
  return true;
}

}  // namespace

extern "C" int cg_lossless_fit(cg_exponents *model) {
  if (!valid(*model)) return CG_LOSSLESS_ARGUMENT;
  try {
    fit(*model);
  } catch (const std::bad_alloc &) {
    return CG_LOSSLESS_MEMORY;
  }
  return CG_LOSSLESS_OK;
}
