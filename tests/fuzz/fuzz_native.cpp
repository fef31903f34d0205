// Hostile input into every function of the C ABI, for `seconds` from `seed`: fuzz_native SECONDS SEED [RECORDS].
// Built with the address and undefined-behaviour sanitizers: every buffer is its own allocation of the exact size, so
// that a byte read or written outside stops the program. What the sanitizers can't see is checked here: values come
// back, and every ISA ends with the same status and the same output.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cachegen_native.h"
#include "lossless.h"

namespace {

std::mt19937_64 rng;
uint64_t draw(uint64_t below) { return rng() % below; }
bool chance(int percent) { return draw(100) < static_cast<uint64_t>(percent); }

[[noreturn]] void fail(const char *what, uint64_t round) {
  std::fprintf(stderr, "fuzz: %s (round %llu)\n", what, static_cast<unsigned long long>(round));
  std::abort();
}

// Exactly n bytes of heap, `shift` bytes from an aligned address: reads beyond either end are seen.
class Bytes {
 public:
  explicit Bytes(const std::vector<uint8_t> &from, size_t shift = 0) : shift_(shift), size_(from.size()) {
    memory_.reset(new uint8_t[size_ + shift_ + (size_ + shift_ == 0)]);
    std::copy(from.begin(), from.end(), data());
  }
  uint8_t *data() { return memory_.get() + shift_; }
  int64_t size() const { return static_cast<int64_t>(size_); }

 private:
  size_t shift_, size_;
  std::unique_ptr<uint8_t[]> memory_;
};

struct Tables {
  uint32_t alphabet, tables, escape;
  int32_t offset;
  std::vector<uint16_t> freqs;
  std::vector<uint8_t> low_bits;
  std::vector<float> recon;
};

Tables random_tables() {
  const uint32_t alphabets[] = {16, 32, 64, 256};
  Tables t;
  t.alphabet = alphabets[draw(4)];
  t.tables = 1 + static_cast<uint32_t>(draw(6));
  t.escape = chance(50);
  t.offset = static_cast<int32_t>(chance(80) ? t.alphabet / 2 - 1 : draw(t.alphabet));
  for (uint32_t i = 0; i < t.tables; i++) {
    std::vector<uint32_t> f(t.alphabet);
    uint32_t left = 4096;
    const bool sparse = chance(30);
    if (!sparse || t.escape) f[t.alphabet - 1]++, left--;
    while (left > 0) {
      const auto s = draw(sparse ? 3 : t.alphabet) + (sparse ? t.alphabet / 2 - 2 : 0);
      const auto n = std::min<uint32_t>(left, 1 + static_cast<uint32_t>(draw(chance(20) ? 3000 : 60)));
      if (f[s] + n > 4095) continue;
      f[s] += n;
      left -= n;
    }
    t.freqs.insert(t.freqs.end(), f.begin(), f.end());
    t.low_bits.push_back(chance(60) ? 0 : static_cast<uint8_t>(draw(13)));
  }
  for (size_t i = 0; i < t.freqs.size(); i++) t.recon.push_back(static_cast<float>(static_cast<int64_t>(rng() % 2001) - 1000) / 50);
  return t;
}

// Damages one thing; true if the result can't be a bank.
bool damage(Tables &t) {
  switch (draw(5)) {
    case 0:
      t.freqs[draw(t.freqs.size())] ^= static_cast<uint16_t>(1u << draw(16));
      return true;
    case 1:
      t.low_bits[draw(t.tables)] = static_cast<uint8_t>(13 + draw(200));
      return true;
    case 2:
      t.offset = chance(50) ? -1 : static_cast<int32_t>(t.alphabet);
      return true;
    case 3:
      t.escape = 2;
      return true;
    default:
      t.alphabet = t.alphabet == 16 ? 8 : 48;  // smaller than what the arrays hold
      return true;
  }
}

cg_bank *make_bank(const Tables &t, int *status) {
  cg_bank *bank = nullptr;
  *status = cg_bank_create(t.freqs.data(), t.tables, t.alphabet, t.offset, t.low_bits.data(), t.escape, t.recon.data(),
                           0.12f, &bank);
  return bank;
}

struct Matrix {
  int64_t tokens, components, ids_stride;
  std::vector<uint16_t> ids;
  std::vector<int32_t> values;
};

Matrix random_matrix(const Tables &t) {
  Matrix m;
  m.tokens = 1 + static_cast<int64_t>(draw(chance(20) ? 200 : 40));
  m.components = 1 + static_cast<int64_t>(draw(chance(5) ? 2300 : 70));
  if (m.tokens * m.components > 40000) m.tokens = 1;
  const int64_t blocks = (m.tokens + 31) / 32;
  m.ids_stride = chance(50) ? m.components : 0;
  for (int64_t i = 0; i < m.components * (m.ids_stride ? blocks : 1); i++) m.ids.push_back(static_cast<uint16_t>(draw(t.tables)));
  for (int64_t i = 0; i < m.tokens * m.components; i++) {
    const size_t table = m.ids[(i / m.components / 32) * m.ids_stride + i % m.components];
    int64_t slot = static_cast<int64_t>(draw(4096)), s = 0;
    while (slot >= t.freqs[table * t.alphabet + s]) slot -= t.freqs[table * t.alphabet + s++];
    int64_t high = s - t.offset;
    if (t.escape && (s == t.alphabet - 1 || chance(1))) high = static_cast<int16_t>(rng());
    m.values.push_back(static_cast<int32_t>(high * (int64_t{1} << t.low_bits[table]) + static_cast<int64_t>(draw(uint64_t{1} << t.low_bits[table]))));
  }
  return m;
}

int64_t type_bytes(int64_t type) { return type == CG_U8 ? 1 : (type == CG_I32 || type == CG_F32 ? 4 : 2); }

bool simple(const Tables &t) {
  return !t.escape && *std::max_element(t.low_bits.begin(), t.low_bits.end()) == 0;
}

// Decodes on every ISA to every type (or one), into buffers of the exact size; statuses and outputs must agree.
int decode_everywhere(cg_bank *bank, const Tables &t, const Matrix &m, const std::vector<uint8_t> &bytes, int64_t type,
                      std::vector<uint8_t> *result, uint64_t round) {
  Bytes data(bytes, draw(4)), ids(std::vector<uint8_t>(reinterpret_cast<const uint8_t *>(m.ids.data()),
                                                       reinterpret_cast<const uint8_t *>(m.ids.data() + m.ids.size())));
  const int64_t blocks = (m.tokens + 31) / 32;
  const int64_t dims[] = {m.components, 1, m.components % 2 == 0 ? m.components / 2 : m.components};
  const int64_t dim = dims[draw(3)], gap = static_cast<int64_t>(draw(3));
  const int64_t head_stride = dim + gap, token_stride = head_stride * (m.components / dim) + static_cast<int64_t>(draw(3));
  const int64_t extent = (m.tokens - 1) * token_stride + (m.components / dim - 1) * head_stride + dim;
  std::vector<float> scale, token_scale, bias;
  const bool by_block = chance(50);
  if (chance(70))
    for (int64_t i = 0; i < m.components * (by_block ? blocks : 1); i++) scale.push_back(std::ldexp(1.37f, static_cast<int>(draw(60)) - 30));
  if (chance(40))
    for (int64_t i = 0; i < m.tokens; i++) token_scale.push_back(static_cast<float>(draw(1000)) / 250);
  if (chance(40))
    for (int64_t i = 0; i < m.components; i++) bias.push_back(static_cast<float>(draw(1000)) - 500);
  if (!scale.empty() && chance(10)) scale[0] = INFINITY;
  int first_status = -1;
  std::vector<uint8_t> first;
  for (int isa = 0; isa <= cg_isa_best(); isa++) {
    Bytes out(std::vector<uint8_t>(static_cast<size_t>(extent * type_bytes(type)), 0xA5));
    cg_decode_job job{};
    job.bank = bank;
    job.ids = reinterpret_cast<const uint16_t *>(ids.data());
    job.ids_stride = m.ids_stride;
    job.tokens = m.tokens;
    job.components = m.components;
    job.data = data.data();
    job.size = data.size();
    job.out = out.data();
    job.type = type;
    job.token_stride = token_stride;
    job.head_stride = head_stride;
    job.dim = dim;
    job.scale = scale.empty() ? nullptr : scale.data();
    job.scale_stride = by_block ? m.components : 0;
    job.token_scale = token_scale.empty() ? nullptr : token_scale.data();
    job.bias = bias.empty() ? nullptr : bias.data();
    std::vector<cg_decode_job> jobs(1 + draw(3), job);  // several of a kind go side by side; they write the same
    cg_fault fault;
    const int status = cg_decode(jobs.data(), static_cast<int64_t>(jobs.size()), 1, isa, &fault);
    std::vector<uint8_t> got(out.data(), out.data() + out.size());
    if (type == CG_U8 && !simple(t) && status != CG_BAD_ARGUMENT) fail("symbols of a bank with escape or low bits", round);
    if (isa == 0) {
      first_status = status;
      first = got;
    }
    if (status != first_status) fail("ISAs end with different statuses", round);
    if (status == CG_OK && got != first) fail("ISAs decode to different values", round);
  }
  if (result != nullptr) *result = first;
  return first_status;
}

std::vector<uint8_t> mutate(std::vector<uint8_t> bytes) {
  const auto times = 1 + draw(3);
  for (uint64_t i = 0; i < times; i++) {
    switch (draw(5)) {
      case 0:
        bytes.resize(draw(bytes.size() + 1));
        break;
      case 1:
        if (!bytes.empty()) bytes[draw(bytes.size())] ^= static_cast<uint8_t>(1u << draw(8));
        break;
      case 2:
        if (!bytes.empty()) bytes[draw(std::min<size_t>(bytes.size(), 160))] = static_cast<uint8_t>(rng());
        break;
      case 3:
        for (uint64_t n = draw(200); n > 0; n--) bytes.push_back(static_cast<uint8_t>(rng()));
        break;
      default:
        for (uint64_t n = 4, at = draw(bytes.size() + 1); n > 0 && at < bytes.size(); n--, at++) bytes[at] = 0xff;
    }
  }
  return bytes;
}

void one_matrix(uint64_t round) {
  Tables t = random_tables();
  int status = CG_OK;
  if (chance(10)) {
    damage(t);
    cg_bank *bank = make_bank(t, &status);
    if (status == CG_OK || bank != nullptr) fail("a damaged table was taken", round);
    return;
  }
  cg_bank *bank = make_bank(t, &status);
  if (status != CG_OK) fail("a good table was refused", round);
  Matrix m = random_matrix(t);
  if (chance(5)) m.values[draw(m.values.size())] = static_cast<int32_t>(rng());
  // Encode on every ISA.
  std::vector<uint8_t> coded;
  int first_status = -1;
  for (int isa = 0; isa <= cg_isa_best(); isa++) {
    Bytes values(std::vector<uint8_t>(reinterpret_cast<const uint8_t *>(m.values.data()),
                                      reinterpret_cast<const uint8_t *>(m.values.data() + m.values.size())));
    cg_encode_job job{};
    job.bank = bank;
    job.ids = m.ids.data();
    job.ids_stride = m.ids_stride;
    job.tokens = m.tokens;
    job.components = m.components;
    job.values = values.data();
    job.type = CG_I32;
    job.token_stride = m.components;
    std::vector<cg_encode_job> jobs(1 + draw(3), job);
    void *blob = nullptr;
    cg_fault fault;
    status = cg_encode(jobs.data(), static_cast<int64_t>(jobs.size()), 1 + static_cast<int>(draw(2)), isa, &blob, &fault);
    if (isa == 0) first_status = status;
    if (status != first_status) fail("ISAs encode with different statuses", round);
    if (status == CG_OK) {
      std::vector<uint8_t> got(jobs.back().data, jobs.back().data + jobs.back().size);
      if (isa == 0) coded = got;
      if (got != coded) fail("ISAs encode to different bytes", round);
    } else if (status != CG_CAPACITY || blob != nullptr) {
      fail("encode: unexpected status", round);
    }
    cg_blob_free(blob);
  }
  if (first_status == CG_OK) {
    // Values come back.
    std::vector<int32_t> back(m.values.size());
    cg_decode_job job{bank, m.ids.data(), m.ids_stride, m.tokens, m.components, coded.data(), static_cast<int64_t>(coded.size()),
                      back.data(), CG_I32, m.components, 0, m.components, nullptr, 0, nullptr, nullptr};
    cg_fault fault;
    if (cg_decode(&job, 1, 1, static_cast<int>(draw(static_cast<uint64_t>(cg_isa_best()) + 1)), &fault) != CG_OK || back != m.values)
      fail("values don't come back", round);
    for (int i = 0; i < 2; i++) decode_everywhere(bank, t, m, coded, static_cast<int64_t>(draw(6)), nullptr, round);
    for (int i = 0; i < 6; i++) decode_everywhere(bank, t, m, mutate(coded), static_cast<int64_t>(draw(6)), nullptr, round);
    // Jobs that can't be.
    cg_decode_job bad = job;
    const uint16_t beyond = 60000;
    switch (draw(8)) {
      case 0: bad.tokens = chance(50) ? 0 : (int64_t{1} << 60); break;
      case 1: bad.components = chance(50) ? -5 : (int64_t{1} << 62); break;
      case 2: bad.type = 17; break;
      case 3: bad.dim = chance(50) ? 0 : m.components + 1; break;
      case 4: bad.ids_stride = m.components + 1; break;
      case 5: bad.scale_stride = -1; break;
      case 6: bad.bank = nullptr; break;
      default: bad.ids = &beyond; bad.ids_stride = 0; bad.components = bad.dim = 1;
    }
    if (cg_decode(&bad, 1, 1, 0, &fault) == CG_OK) fail("an impossible job was done", round);
    if (cg_decode(&job, 1, 1, 9, &fault) != CG_NO_ISA) fail("an unknown ISA was taken", round);
  }
  std::vector<uint8_t> garbage(draw(600));
  for (uint8_t &b : garbage) b = static_cast<uint8_t>(rng());
  decode_everywhere(bank, t, m, garbage, static_cast<int64_t>(draw(6)), nullptr, round);
  cg_bank_free(bank);
}

void one_checksum(uint64_t round) {
  std::vector<uint8_t> bytes(draw(300));
  for (uint8_t &b : bytes) b = static_cast<uint8_t>(rng());
  Bytes data(bytes, draw(8));
  const size_t cut = draw(bytes.size() + 1);
  const uint32_t whole = cg_crc32c(0, data.data(), bytes.size());
  if (cg_crc32c(cg_crc32c(0, data.data(), cut), data.data() + cut, bytes.size() - cut) != whole) fail("CRC32C of two parts", round);
}

// Records of the lossless codec, as tests/fuzz/run.py wrote them: int64 type, rows, columns, size, then the body.
struct Record {
  int64_t type, rows, columns;
  std::vector<uint8_t> body;
};

std::vector<Record> read_records(const char *path) {
  std::vector<Record> records;
  std::ifstream file(path, std::ios::binary);
  int64_t head[4];
  while (file.read(reinterpret_cast<char *>(head), sizeof head)) {
    Record r{head[0], head[1], head[2], std::vector<uint8_t>(static_cast<size_t>(head[3]))};
    file.read(reinterpret_cast<char *>(r.body.data()), head[3]);
    records.push_back(r);
  }
  return records;
}

int64_t lossless_bytes(int64_t type) { return type == CG_LOSSLESS_FP32 ? 4 : (type <= CG_LOSSLESS_FP16 ? 2 : 1); }

void one_record(const Record &seed, uint64_t round) {
  const bool intact = chance(20);
  const std::vector<uint8_t> body = intact ? seed.body : mutate(seed.body);
  Bytes data(body, draw(8));
  const int64_t bytes = lossless_bytes(seed.type);
  int first_status = -1;
  std::vector<uint8_t> first;
  for (int isa = 0; isa <= cg_isa_best(); isa++) {
    Bytes out(std::vector<uint8_t>(static_cast<size_t>(seed.rows * seed.columns * bytes), 0xA5));
    const int64_t dim = seed.columns / 4;  // two tensors of two heads, side by side
    const cg_rows tensors[] = {{out.data(), seed.columns * bytes, dim * bytes, 2, dim},
                               {out.data() + 2 * dim * bytes, seed.columns * bytes, dim * bytes, 2, dim}};
    const cg_record record{data.data(), data.size(), tensors, 2, seed.rows, seed.columns, seed.type};
    int64_t failed = -1;
    const int status = cg_lossless_decode(&record, 1, 1, isa, &failed);
    std::vector<uint8_t> got(out.data(), out.data() + out.size());
    if (isa == 0) {
      first_status = status;
      first = got;
    }
    if (status != first_status) fail("lossless: ISAs end with different statuses", round);
    if (status == 0 && got != first) fail("lossless: ISAs decode to different values", round);
  }
  if (intact && first_status != 0) fail("lossless: an intact record was refused", round);
}

// The model fitted to counts: tables that are tables, in the room that was given.
void one_fit(const std::vector<uint32_t> &counts, int64_t columns, int64_t type, uint64_t round) {
  std::vector<uint16_t> freqs(8 * 256);
  std::vector<uint8_t> sides[3];
  for (auto &side : sides) side.resize(static_cast<size_t>(columns));
  const int64_t runs[2] = {0, columns / 2};
  cg_exponents model{};
  model.counts = counts.data();
  model.columns = columns;
  model.type = type;
  model.runs = runs;
  model.run_count = columns > 1 ? 1 + static_cast<int64_t>(draw(2)) : 1;
  model.freqs = freqs.data();
  model.base = sides[0].data();
  model.flip = sides[1].data();
  model.table = sides[2].data();
  if (cg_lossless_fit(&model) != 0) fail("lossless: fit refuses", round);
  if (model.tables < 1 || model.tables * model.alphabet > 8 * 256) fail("lossless: more tables than there is room", round);
  for (int64_t t = 0; t < model.tables; t++) {
    int64_t sum = 0;
    for (int64_t s = 0; s < model.alphabet; s++) sum += freqs[static_cast<size_t>(t * model.alphabet + s)];
    if (sum != 4096) fail("lossless: frequencies that don't sum", round);
  }
}

// Random floats through count, fit and split, into buffers of the exact size.
void one_split(uint64_t round) {
  const int64_t type = static_cast<int64_t>(draw(5)), columns = 1 + static_cast<int64_t>(draw(70)), rows = 1 + static_cast<int64_t>(draw(40));
  std::vector<uint8_t> floats(static_cast<size_t>(rows * columns * lossless_bytes(type)));
  for (uint8_t &b : floats) b = static_cast<uint8_t>(rng());
  Bytes data(floats, 0);
  const cg_rows tensor{data.data(), columns * lossless_bytes(type), columns * lossless_bytes(type), 1, columns};
  const auto n = static_cast<size_t>(rows * columns);
  std::vector<uint8_t> base(static_cast<size_t>(columns)), flip(static_cast<size_t>(columns));
  for (uint8_t &b : base) b = static_cast<uint8_t>(rng());
  for (uint8_t &b : flip) b = static_cast<uint8_t>(draw(2));
  std::vector<uint32_t> counts(static_cast<size_t>(columns) * 512);
  std::vector<uint8_t> symbols(n), exceptions(n), planes[3];
  for (auto &plane : planes) plane.resize(4 * n + 64);
  cg_floats job{};
  job.tensors = &tensor;
  job.count = 1;
  job.columns = columns;
  job.type = type;
  const int64_t alphabets[] = {16, 32, 64, 256};
  job.alphabet = alphabets[draw(4)];
  job.row1 = rows;
  job.base = base.data();
  job.flip = flip.data();
  job.symbols = symbols.data();
  for (int i = 0; i < 3; i++) job.planes[i] = planes[i].data();
  job.exceptions = exceptions.data();
  if (cg_lossless_count(&job, counts.data()) != 0) fail("lossless: count refuses", round);
  one_fit(counts, columns, type, round);
  const int status = cg_lossless_split(&job);
  if (status == 0 && (job.exception_count < 0 || job.exception_count > rows * columns)) fail("lossless: exceptions", round);
  job.type = 99;
  if (cg_lossless_split(&job) == 0) fail("lossless: an unknown type was taken", round);
}

}  // namespace

int main(int argc, char **argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const std::vector<Record> records = argc > 3 ? read_records(argv[3]) : std::vector<Record>();
  const auto start = std::chrono::steady_clock::now();
  uint64_t round = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    rng.seed(seed * 1000003 + round);  // any round can be repeated alone
    one_matrix(round);
    one_checksum(round);
    one_split(round);
    for (int i = 0; i < 4 && !records.empty(); i++) one_record(records[draw(records.size())], round);
    round++;
  }
  std::printf("fuzz: %llu rounds from seed %llu, nothing found\n", static_cast<unsigned long long>(round),
              static_cast<unsigned long long>(seed));
  return 0;
}
