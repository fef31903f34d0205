// Matrices to streams and back: checks jobs, cuts them into streams, groups equal streams, shares groups between
// threads, and puts encoded streams together.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "cachegen_native.h"
#include "coder.h"
#include "lane.h"
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

constexpr int64_t kMaxSide = int64_t{1} << 24;  // tokens, components
constexpr int kMaxThreads = 64;

int64_t stream_width(int64_t tokens) {
  const int64_t blocks = (tokens + cg::kLanes - 1) / cg::kLanes;
  const int64_t width = cg::kStreamSymbols / (cg::kLanes * blocks) / cg::kTile * cg::kTile;
  return width > cg::kTile ? width : cg::kTile;
}

template <class Job>
int check_matrix(const Job &job) {
  if (job.bank == nullptr || job.ids == nullptr) return CG_BAD_ARGUMENT;
  if (job.tokens < 1 || job.tokens > kMaxSide || job.components < 1 || job.components > kMaxSide) return CG_BAD_ARGUMENT;
  if (job.ids_stride != 0 && job.ids_stride != job.components) return CG_BAD_ARGUMENT;
  const int64_t blocks = (job.tokens + cg::kLanes - 1) / cg::kLanes;
  const int64_t ids = job.ids_stride == 0 ? job.components : job.components * blocks;
  uint16_t most = 0;
  for (int64_t i = 0; i < ids; i++) most = job.ids[i] > most ? job.ids[i] : most;
  return most < job.bank->tables ? CG_OK : CG_BAD_TABLE;
}

int check_type(const cg_decode_job &job) {
  if (job.out == nullptr || job.dim < 1 || job.components % job.dim != 0) return CG_BAD_ARGUMENT;
  if (job.scale_stride != 0 && job.scale_stride != job.components) return CG_BAD_ARGUMENT;
  if (job.type < CG_U8 || job.type > CG_F32) return CG_BAD_ARGUMENT;
  return job.type != CG_U8 || job.bank->simple ? CG_OK : CG_BAD_ARGUMENT;
}

int check_type(const cg_encode_job &job) {
  if (job.values == nullptr || job.type < CG_U8 || job.type > CG_I32) return CG_BAD_ARGUMENT;
  return job.type != CG_U8 || job.bank->simple ? CG_OK : CG_BAD_ARGUMENT;
}

int fail(cg_fault *fault, int code, int64_t job, int64_t stream = -1, int64_t token = -1, int64_t component = -1) {
  *fault = {job, stream, token, component};
  return code;
}

template <class Stream>
struct Task {
  Stream stream;
  int64_t job, order;
};

// Streams that can go side by side sort next to each other.
template <class Stream>
bool before(const Task<Stream> &a, const Task<Stream> &b) {
  const auto &x = *a.stream.job, &y = *b.stream.job;
  if (x.bank->alphabet != y.bank->alphabet) return x.bank->alphabet < y.bank->alphabet;
  if (x.bank->simple != y.bank->simple) return x.bank->simple < y.bank->simple;
  if (x.tokens != y.tokens) return x.tokens < y.tokens;
  if (a.stream.width != b.stream.width) return a.stream.width > b.stream.width;
  return a.order < b.order;
}

template <class Stream>
bool alike(const Task<Stream> &a, const Task<Stream> &b) {
  const auto &x = *a.stream.job, &y = *b.stream.job;
  return x.bank->alphabet == y.bank->alphabet && x.bank->simple == y.bank->simple && x.tokens == y.tokens &&
         a.stream.width == b.stream.width;
}

struct Group {
  size_t first;
  int count;
};

template <class Stream>
std::vector<Group> make_groups(std::vector<Task<Stream>> &tasks, int most) {
  std::sort(tasks.begin(), tasks.end(), before<Stream>);
  std::vector<Group> groups;
  for (size_t i = 0; i < tasks.size();) {
    size_t n = 1;
    while (n < static_cast<size_t>(most) && i + n < tasks.size() && alike(tasks[i], tasks[i + n])) n++;
    groups.push_back({i, static_cast<int>(n)});
    i += n;
  }
  return groups;
}

// fp32 arithmetic must not depend on what the caller's thread has set: round to nearest, keep denormals.
class FloatEnvironment {
 public:
#if defined(__x86_64__)
  FloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~FloatEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// Runs work(i) for i < count on up to `threads` threads, the caller's among them.
template <class Work>
void share(size_t count, int threads, const Work &work) {
  std::atomic<size_t> next{0};
  const auto run = [&] {
    const FloatEnvironment environment;
    work(next, count);
  };
  std::vector<std::thread> helpers;
  const size_t wanted = std::min<size_t>(count, static_cast<size_t>(std::max(1, std::min(threads, kMaxThreads))));
  for (size_t i = 1; i < wanted; i++) {
    try {
      helpers.emplace_back(run);
    } catch (const std::exception &) {
      break;  // no more threads to be had: the ones we have do the work
    }
  }
  run();
  for (auto &helper : helpers) helper.join();
}

const cg::Coder *coder_of(int isa) {
  if (isa < 0 || isa > cg_isa_best()) return nullptr;
#if defined(__x86_64__)
  if (isa == CG_ISA_AVX512) return &cg::kAvx512Coder;
  if (isa == CG_ISA_AVX2) return &cg::kAvx2Coder;
#endif
  return &cg::kScalarCoder;
}

// The matrix' bytes: u32 lengths of all streams but the last, then the streams.
int cut_streams(const cg_decode_job &job, int64_t index, std::vector<Task<cg::DecodeStream>> &tasks, cg_fault *fault) {
  const int64_t width = stream_width(job.tokens), streams = (job.components + width - 1) / width;
  if (job.size < 4 * (streams - 1) || (job.data == nullptr && job.size != 0)) return fail(fault, CG_TRUNCATED, index);
  const uint8_t *p = job.data + 4 * (streams - 1), *end = job.data + job.size;
  for (int64_t s = 0; s < streams; s++) {
    const auto left = static_cast<uint64_t>(end - p);
    const uint64_t size = s + 1 < streams ? cg::read_u32(job.data + 4 * s) : left;
    if (size > left) return fail(fault, CG_TRUNCATED, index, s);
    const int64_t first = s * width;
    const auto this_width = static_cast<int32_t>(std::min(width, job.components - first));
    tasks.push_back({{&job, p, static_cast<size_t>(size), first, s, this_width, cg::kUnfinished}, index, static_cast<int64_t>(tasks.size())});
    p += size;
  }
  return CG_OK;
}

int decode_all(const cg_decode_job *jobs, int64_t n, int threads, const cg::Coder &coder, cg_fault *fault) {
  std::vector<Task<cg::DecodeStream>> tasks;
  for (int64_t i = 0; i < n; i++) {
    int code = check_matrix(jobs[i]);
    if (code == CG_OK) code = check_type(jobs[i]);
    if (code != CG_OK) return fail(fault, code, i);
    code = cut_streams(jobs[i], i, tasks, fault);
    if (code != CG_OK) return code;
  }
  const std::vector<Group> groups = make_groups(tasks, coder.decode_group);
  std::atomic<bool> out_of_memory{false};
  share(groups.size(), threads, [&](std::atomic<size_t> &next, size_t count) {
    auto *scratch = static_cast<uint8_t *>(std::aligned_alloc(64, cg::kScratchBytes));
    if (scratch == nullptr) {
      out_of_memory = true;
      return;
    }
    for (size_t g = next++; g < count; g = next++) {
      cg::DecodeStream *streams[cg::kMaxGroup];
      for (int k = 0; k < groups[g].count; k++) streams[k] = &tasks[groups[g].first + k].stream;
      coder.decode(streams, groups[g].count, scratch);
    }
    std::free(scratch);
  });
  if (out_of_memory) return fail(fault, CG_NO_MEMORY, -1);
  const Task<cg::DecodeStream> *worst = nullptr;
  for (const auto &task : tasks)
    if (task.stream.code > CG_OK && (worst == nullptr || task.order < worst->order)) worst = &task;
  return worst == nullptr ? CG_OK : fail(fault, worst->stream.code, worst->job, worst->stream.index);
}

// The most bytes that a stream can take, and room for stores that write a vector below the last word.
size_t stream_bound(const cg_encode_job &job, int32_t width) {
  const size_t blocks = (static_cast<size_t>(job.tokens) + cg::kLanes - 1) / cg::kLanes;
  const size_t words = cg::kLanes + 2 * job.bank->max_low + (job.bank->escape != 0xffffffffu ? cg::kLanes : 0);
  return blocks * static_cast<size_t>(width) * words * 2 + 4 * cg::kLanes + 256;
}

int encode_all(cg_encode_job *jobs, int64_t n, int threads, const cg::Coder &coder, void **blob, cg_fault *fault) {
  std::vector<Task<cg::EncodeStream>> tasks;
  std::vector<size_t> first_task(static_cast<size_t>(n) + 1);
  for (int64_t i = 0; i < n; i++) {
    int code = check_matrix(jobs[i]);
    if (code == CG_OK) code = check_type(jobs[i]);
    if (code != CG_OK) return fail(fault, code, i);
    if (!cg::bank_prepare_encode(jobs[i].bank)) return fail(fault, CG_NO_MEMORY, i);
    first_task[i] = tasks.size();
    const int64_t width = stream_width(jobs[i].tokens);
    for (int64_t first = 0; first < jobs[i].components; first += width) {
      cg::EncodeStream s{};
      s.job = &jobs[i];
      s.first = first;
      s.index = first / width;
      s.code = cg::kUnfinished;
      s.width = static_cast<int32_t>(std::min(width, jobs[i].components - first));
      tasks.push_back({s, i, static_cast<int64_t>(tasks.size())});
    }
  }
  first_task[n] = tasks.size();
  const std::vector<Group> groups = make_groups(tasks, coder.encode_group);
  std::vector<std::vector<uint8_t>> coded(tasks.size());  // by order
  std::atomic<bool> out_of_memory{false};
  share(groups.size(), threads, [&](std::atomic<size_t> &next, size_t count) {
    uint8_t *buffer = nullptr;
    size_t capacity = 0;
    for (size_t g = next++; g < count; g = next++) {
      cg::EncodeStream *streams[cg::kMaxGroup];
      size_t bounds[cg::kMaxGroup], total = 0;
      for (int k = 0; k < groups[g].count; k++) {
        streams[k] = &tasks[groups[g].first + k].stream;
        bounds[k] = stream_bound(*streams[k]->job, streams[k]->width);
        total += bounds[k];
      }
      if (total > capacity) {
        std::free(buffer);
        capacity = total;
        buffer = static_cast<uint8_t *>(std::malloc(capacity));
        if (buffer == nullptr) {
          out_of_memory = true;
          return;
        }
      }
      uint8_t *floor = buffer;
      for (int k = 0; k < groups[g].count; k++) {
        streams[k]->floor = floor;
        floor += bounds[k];
        streams[k]->end = floor;
      }
      coder.encode(streams, groups[g].count);
      for (int k = 0; k < groups[g].count; k++) {
        if (streams[k]->code != CG_OK) continue;
        try {
          coded[tasks[groups[g].first + k].order].assign(streams[k]->begin, streams[k]->end);
        } catch (const std::bad_alloc &) {
          out_of_memory = true;
          break;
        }
      }
    }
    std::free(buffer);
  });
  if (out_of_memory) return fail(fault, CG_NO_MEMORY, -1);
  const Task<cg::EncodeStream> *worst = nullptr;
  for (const auto &task : tasks)
    if (task.stream.code > CG_OK && (worst == nullptr || task.order < worst->order)) worst = &task;
  if (worst != nullptr)
    return fail(fault, worst->stream.code, worst->job, worst->stream.index, worst->stream.bad_token,
                worst->stream.bad_component);
  size_t total = 0;
  for (const auto &bytes : coded) total += bytes.size() + 4;
  auto *p = static_cast<uint8_t *>(std::malloc(std::max<size_t>(total, 1)));
  if (p == nullptr) return fail(fault, CG_NO_MEMORY, -1);
  *blob = p;
  for (int64_t i = 0; i < n; i++) {
    uint8_t *const start = p;
    for (size_t t = first_task[i]; t + 1 < first_task[i + 1]; t++, p += 4) {
      const size_t size = coded[t].size();
      for (int byte = 0; byte < 4; byte++) p[byte] = static_cast<uint8_t>(size >> 8 * byte);
    }
    for (size_t t = first_task[i]; t < first_task[i + 1]; t++) {
      std::memcpy(p, coded[t].data(), coded[t].size());
      p += coded[t].size();
    }
    jobs[i].data = start;
    jobs[i].size = p - start;
  }
  return CG_OK;
}

}  // namespace

extern "C" int cg_isa_best(void) {
#if defined(CACHEGEN_SIMDE)  // tests only: all sources run everywhere
  return CG_ISA_AVX512;
#else
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return CG_ISA_AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c"))
    return CG_ISA_AVX2;
#endif
  return CG_ISA_SCALAR;
#endif
}

extern "C" int cg_decode(const cg_decode_job *jobs, int64_t n, int threads, int isa, cg_fault *fault) {
  *fault = {-1, -1, -1, -1};
  const cg::Coder *coder = coder_of(isa);
  if (coder == nullptr) return CG_NO_ISA;
  if (n < 0 || (n > 0 && jobs == nullptr)) return CG_BAD_ARGUMENT;
  try {
    return decode_all(jobs, n, threads, *coder, fault);
  } catch (const std::bad_alloc &) {
    return CG_NO_MEMORY;
  }
}

extern "C" int cg_encode(cg_encode_job *jobs, int64_t n, int threads, int isa, void **blob, cg_fault *fault) {
  *fault = {-1, -1, -1, -1};
  *blob = nullptr;
  const cg::Coder *coder = coder_of(isa);
  if (coder == nullptr) return CG_NO_ISA;
  if (n < 0 || (n > 0 && jobs == nullptr)) return CG_BAD_ARGUMENT;
  try {
    return encode_all(jobs, n, threads, *coder, blob, fault);
  } catch (const std::bad_alloc &) {
    return CG_NO_MEMORY;
  }
}

extern "C" void cg_blob_free(void *blob) { std::free(blob); }
