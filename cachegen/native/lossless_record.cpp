// Records of the `lossless` codec: parsed, entropy decoded and merged, a cache's worth at a time.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "lane.h"
#include "lossless_layout.h"

namespace {

using cg::kLayouts;
using cg::Layout;
using cg::packed_bytes;

constexpr int64_t kBlock = int64_t{1} << 19;  // symbols of a block, and of what a thread keeps beside the output
constexpr uint32_t kMaxTables = 16;
constexpr int kPerRun = 1, kWideBase = 2, kOmit = 4;
constexpr int kMaxThreads = 64;

// Reads a record front to back; every read is checked against what is left.
struct Reader {
  const uint8_t *p, *end;

  const uint8_t *take(uint64_t n) {
    if (n > static_cast<uint64_t>(end - p)) return nullptr;
    const uint8_t *at = p;
    p += n;
    return at;
  }
};

struct FreeBank {
  void operator()(cg_bank *bank) const { cg_bank_free(bank); }
};

// A record in hand: what its blocks' jobs point to.
struct Open {
  std::unique_ptr<cg_bank, FreeBank> bank;
  std::vector<uint8_t> base, flip;
  std::vector<uint16_t> ids;
};

// What is decoded at once.
struct Batch {
  std::vector<std::unique_ptr<Open>> open;
  std::vector<cg_floats> floats;
  std::vector<cg_decode_job> jobs;
  std::vector<int64_t> record;  // of each job
  int64_t symbols = 0;
};

int64_t block_rows(int64_t columns) { return std::max(int64_t{32}, kBlock / columns / 32 * 32); }

// Tables, then base, flip and table of every column.
int open_model(Reader &in, const cg_record &r, const Layout &layout, int flags, uint32_t alphabet, uint32_t tables,
               uint8_t low, Open &open) {
  std::vector<uint16_t> freqs(size_t{tables} * alphabet);
  for (uint32_t t = 0; t < tables; t++) {
    const uint8_t *used = in.take(1);
    if (used == nullptr) return CG_TRUNCATED;
    const uint32_t n = *used + 1u;
    if (n > alphabet) return CG_BAD_TABLE;
    const uint8_t *words = in.take(2 * n);
    if (words == nullptr) return CG_TRUNCATED;
    for (uint32_t s = 0; s < n; s++) freqs[size_t{t} * alphabet + s] = static_cast<uint16_t>(cg::read_word(words + 2 * s));
  }
  static const float kNoPoints[kMaxTables * 256] = {};
  static const uint8_t kNoLowBits[kMaxTables] = {};
  cg_bank *bank = nullptr;
  const int code = cg_bank_create(freqs.data(), tables, alphabet, 0, kNoLowBits, 0, kNoPoints, 0.0f, &bank);
  if (code != CG_OK) return code;
  open.bank.reset(bank);

  const auto columns = static_cast<size_t>(r.columns);
  open.base.resize(columns);
  open.flip.resize(columns);
  open.ids.resize(columns);
  uint64_t sides = columns;
  if (flags & kPerRun) {
    sides = 0;
    for (int64_t t = 0; t < r.count; t++) sides += static_cast<uint64_t>(r.tensors[t].heads);
  }
  const bool wide = (flags & kWideBase) != 0;
  const uint8_t *offsets = wide ? in.take(sides) : nullptr, *side = in.take(sides);
  if (side == nullptr || (wide && offsets == nullptr)) return CG_TRUNCATED;
  const auto set = [&](size_t column, size_t s) {
    const auto offset = static_cast<uint8_t>(wide ? offsets[s] : side[s] >> 4 & 15 >> layout.signs);
    open.base[column] = static_cast<uint8_t>(low + offset);
    open.ids[column] = side[s] & (wide ? 0x7f : 15);
    open.flip[column] = static_cast<uint8_t>(layout.signs & side[s] >> 7);
  };
  if (!(flags & kPerRun)) {
    for (size_t c = 0; c < columns; c++) set(c, c);
    return CG_OK;
  }
  size_t c = 0, s = 0;
  for (int64_t t = 0; t < r.count; t++) {
    for (int64_t h = 0; h < r.tensors[t].heads; h++, s++) {
      for (int64_t d = 0; d < r.tensors[t].dim; d++) set(c++, s);
    }
  }
  return CG_OK;
}

int open_record(const cg_record &r, int64_t index, Batch &batch) {
  const Layout &layout = kLayouts[r.type];
  Reader in{r.data, r.data + r.size};
  const uint8_t *head = in.take(4);
  if (head == nullptr) return CG_TRUNCATED;
  const int flags = head[0], log_alphabet = head[1];
  const uint32_t tables = head[2] + 1u;
  const int omittable = layout.size == 4 ? kOmit | kOmit << 1 : 0;
  if (flags & ~(kPerRun | kWideBase | omittable) || tables > kMaxTables || log_alphabet < 4 || log_alphabet == 7 ||
      log_alphabet > 8 || log_alphabet > layout.exponent_bits + static_cast<int>(layout.signs))
    return CG_LOSSLESS_RECORD;
  const uint32_t alphabet = 1u << log_alphabet;
  auto open = std::make_unique<Open>();
  const int code = open_model(in, r, layout, flags, alphabet, tables, head[3], *open);
  if (code != CG_OK) return code;

  const int64_t step = block_rows(r.columns), blocks = (r.rows + step - 1) / step;
  const uint8_t *sizes = in.take(8 * static_cast<uint64_t>(blocks));
  if (sizes == nullptr) return CG_TRUNCATED;
  std::vector<const uint8_t *> exceptions(static_cast<size_t>(blocks));
  for (int64_t b = 0; b < blocks; b++) {
    exceptions[b] = in.take(cg::read_u32(sizes + 8 * b + 4));
    if (exceptions[b] == nullptr) return CG_TRUNCATED;
  }
  const uint8_t *planes[3] = {};
  for (int p = 0; p < layout.planes; p++) {
    if (p > 0 && flags & kOmit << (p - 1)) continue;
    planes[p] = in.take(static_cast<uint64_t>(r.rows) * packed_bytes(static_cast<size_t>(r.columns), layout.plane_bits[p]));
    if (planes[p] == nullptr) return CG_TRUNCATED;
  }
  for (int64_t b = 0; b < blocks; b++) {
    const uint32_t size = cg::read_u32(sizes + 8 * b);
    const uint8_t *stream = in.take(size);
    if (stream == nullptr) return CG_TRUNCATED;
    cg_floats f{};
    f.tensors = r.tensors;
    f.count = r.count;
    f.columns = r.columns;
    f.type = r.type;
    f.alphabet = alphabet;
    f.row0 = b * step;
    f.row1 = std::min(r.rows, f.row0 + step);
    f.base = open->base.data();
    f.flip = open->flip.data();
    // Read only, though a job's pointers aren't const (split writes through them).
    f.exceptions = const_cast<uint8_t *>(exceptions[b]);
    f.exception_count = cg::read_u32(sizes + 8 * b + 4);
    for (int p = 0; p < layout.planes; p++) {
      const size_t row = packed_bytes(static_cast<size_t>(r.columns), layout.plane_bits[p]);
      f.planes[p] = planes[p] == nullptr ? nullptr : const_cast<uint8_t *>(planes[p]) + static_cast<size_t>(f.row0) * row;
    }
    cg_decode_job job{};
    job.bank = open->bank.get();
    job.ids = open->ids.data();
    job.tokens = f.row1 - f.row0;
    job.components = r.columns;
    job.data = stream;
    job.size = size;
    job.type = CG_U8;
    job.token_stride = job.dim = r.columns;
    batch.symbols += job.tokens * job.components;
    batch.floats.push_back(f);
    batch.jobs.push_back(job);
    batch.record.push_back(index);
  }
  if (in.p != in.end) return CG_LOSSLESS_RECORD;
  batch.open.push_back(std::move(open));
  return CG_OK;
}

// Decode jobs first..last of a batch, whose symbols fit the scratch memory.
int run(Batch &batch, size_t first, size_t last, int isa, std::vector<uint8_t> &scratch, int64_t *failed) {
  size_t symbols = 0, columns = 0;
  for (size_t i = first; i < last; i++) {
    symbols += static_cast<size_t>(batch.jobs[i].tokens * batch.jobs[i].components);
    columns = std::max(columns, static_cast<size_t>(batch.jobs[i].components));
  }
  if (scratch.size() < symbols + 4 * columns) scratch.resize(symbols + 4 * columns);
  uint8_t *at = scratch.data() + 4 * columns;
  for (size_t i = first; i < last; i++) {
    batch.jobs[i].out = batch.floats[i].symbols = at;
    at += batch.jobs[i].tokens * batch.jobs[i].components;
  }
  cg_fault fault;
  const int code = cg_decode(batch.jobs.data() + first, static_cast<int64_t>(last - first), 1, isa, &fault);
  if (code != CG_OK) {
    *failed = fault.job < 0 ? -1 : batch.record[first + static_cast<size_t>(fault.job)];
    return code;
  }
  for (size_t i = first; i < last; i++) {
    const int merged = cg::lossless_merge(batch.floats[i], isa, scratch.data());
    if (merged != CG_OK) {
      *failed = batch.record[i];
      return merged;
    }
  }
  return CG_OK;
}

// Records first..last.
int decode_range(const cg_record *records, int64_t first, int64_t last, int isa, std::vector<uint8_t> &scratch,
                 int64_t *failed) {
  Batch batch;
  for (int64_t i = first; i < last; i++) {
    const int code = open_record(records[i], i, batch);
    if (code != CG_OK) {
      *failed = i;
      return code;
    }
  }
  for (size_t from = 0; from < batch.jobs.size();) {
    size_t to = from;
    for (int64_t room = kBlock; to < batch.jobs.size(); to++) {
      room -= batch.jobs[to].tokens * batch.jobs[to].components;
      if (room < 0 && to > from) break;
    }
    const int code = run(batch, from, to, isa, scratch, failed);
    if (code != CG_OK) return code;
    from = to;
  }
  return CG_OK;
}

bool valid(const cg_record &r) {
  cg_floats f{};
  f.tensors = r.tensors;
  f.count = r.count;
  f.columns = r.columns;
  f.type = r.type;
  f.alphabet = 16;
  return cg::lossless_valid(f) && r.rows >= 1 && r.rows <= INT32_MAX && r.size >= 0 && (r.data != nullptr || r.size == 0);
}

int decode_all(const cg_record *records, int64_t n, int threads, int isa, int64_t *failed) {
  std::vector<int64_t> starts;  // of ranges that are about a block large
  int64_t room = 0;
  for (int64_t i = 0; i < n; i++) {
    if (!valid(records[i])) {
      *failed = i;
      return CG_BAD_ARGUMENT;
    }
    const int64_t symbols = records[i].rows * records[i].columns;
    if (i == 0 || symbols > room) {
      starts.push_back(i);
      room = kBlock;
    }
    room -= symbols;
  }
  starts.push_back(n);
  const size_t ranges = starts.size() - 1;
  std::atomic<size_t> next{0};
  std::vector<int> codes(ranges, CG_OK);
  std::vector<int64_t> where(ranges, -1);
  const auto work = [&] {
    std::vector<uint8_t> scratch;
    for (size_t i = next++; i < ranges; i = next++) {
      try {
        codes[i] = decode_range(records, starts[i], starts[i + 1], isa, scratch, &where[i]);
      } catch (const std::bad_alloc &) {
        codes[i] = CG_NO_MEMORY;
      }
    }
  };
  std::vector<std::thread> helpers;
  const size_t wanted = std::min(ranges, static_cast<size_t>(std::max(1, std::min(threads, kMaxThreads))));
  for (size_t i = 1; i < wanted; i++) {
    try {
      helpers.emplace_back(work);
    } catch (const std::exception &) {
      break;  // no more threads to be had: the ones we have do the work
    }
  }
  work();
  for (auto &helper : helpers) helper.join();
  for (size_t i = 0; i < ranges; i++) {
    if (codes[i] != CG_OK) {
      *failed = where[i];
      return codes[i];
    }
  }
  return CG_OK;
}

}  // namespace

extern "C" int cg_lossless_decode(const cg_record *records, int64_t n, int threads, int isa, int64_t *failed) {
  *failed = -1;
  if (isa < 0 || isa > cg_isa_best()) return CG_NO_ISA;
  if (n < 0 || (n > 0 && records == nullptr)) return CG_BAD_ARGUMENT;
  if (n == 0) return CG_OK;
  try {
    return decode_all(records, n, threads, isa, failed);
  } catch (const std::bad_alloc &) {
    return CG_NO_MEMORY;
  }
}
