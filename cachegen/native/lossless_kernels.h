// The `lossless` codec's inner loops, written without intrinsics: lossless.cpp includes this file once per ISA, in a
// namespace of its own and under that ISA's target, and the compiler makes vectors of them. Before each inclusion it
// defines escapes64(symbols, limit): the mask of the 64 symbols that are >= limit.
// No include guard, and no templates of the standard library in here: their code would be shared between targets.

// A row of `columns` values of `bits` bits: with q = packed_bytes, value c sits in byte c mod q, part c / q.
void unpack_row(const uint8_t *__restrict packed, size_t columns, int bits, uint8_t *__restrict values) {
  const size_t q = packed_bytes(columns, bits);
  const uint8_t mask = static_cast<uint8_t>((1 << bits) - 1);
  for (size_t start = 0, shift = 0; start < columns; start += q, shift += bits) {
    const size_t n = columns - start < q ? columns - start : q;
    for (size_t i = 0; i < n; i++) values[start + i] = static_cast<uint8_t>(packed[i] >> shift) & mask;
  }
}

void merge_bf16(uint16_t *__restrict out, const uint8_t *__restrict s, const uint8_t *__restrict base,
                const uint8_t *__restrict p, size_t n) {
  for (size_t i = 0; i < n; i++) {
    const auto e = static_cast<uint8_t>(base[i] - s[i]);
    out[i] = static_cast<uint16_t>((p[i] & 0x80) << 8 | e << 7 | (p[i] & 0x7f));
  }
}

void merge_fp16(uint16_t *__restrict out, const uint8_t *__restrict s, const uint8_t *__restrict base,
                const uint8_t *__restrict flip, const uint8_t *__restrict low, const uint8_t *__restrict high, size_t n) {
  for (size_t i = 0; i < n; i++) {
    const auto e = static_cast<uint8_t>((base[i] - (s[i] >> 1)) & 31);
    const auto sign = static_cast<uint8_t>((s[i] ^ flip[i]) & 1);
    out[i] = static_cast<uint16_t>(sign << 15 | e << 10 | high[i] << 8 | low[i]);
  }
}

void merge_fp32(uint32_t *__restrict out, const uint8_t *__restrict s, const uint8_t *__restrict base,
                const uint8_t *__restrict p0, const uint8_t *__restrict p1, const uint8_t *__restrict p2, size_t n) {
  for (size_t i = 0; i < n; i++) {
    const auto e = static_cast<uint8_t>(base[i] - s[i]);
    out[i] = static_cast<uint32_t>(p0[i] & 0x80) << 24 | static_cast<uint32_t>(e) << 23 |
             static_cast<uint32_t>(p0[i] & 0x7f) << 16 | static_cast<uint32_t>(p1[i]) << 8 | p2[i];
  }
}

void merge_e4m3(uint8_t *__restrict out, const uint8_t *__restrict s, const uint8_t *__restrict base,
                const uint8_t *__restrict p, size_t n) {
  for (size_t i = 0; i < n; i++) {
    out[i] = static_cast<uint8_t>((p[i] & 8) << 4 | ((base[i] - s[i]) & 15) << 3 | (p[i] & 7));
  }
}

void merge_e5m2(uint8_t *__restrict out, const uint8_t *__restrict s, const uint8_t *__restrict base,
                const uint8_t *__restrict flip, const uint8_t *__restrict p, size_t n) {
  for (size_t i = 0; i < n; i++) {
    const auto e = static_cast<uint8_t>((base[i] - (s[i] >> 1)) & 31);
    out[i] = static_cast<uint8_t>(((s[i] ^ flip[i]) & 1) << 7 | e << 2 | p[i]);
  }
}

void merge_run(int64_t type, uint8_t *out, const uint8_t *s, const uint8_t *base, const uint8_t *flip,
               const uint8_t *const *planes, size_t n) {
  switch (type) {
    case CG_LOSSLESS_BF16:
      return merge_bf16(reinterpret_cast<uint16_t *>(out), s, base, planes[0], n);
    case CG_LOSSLESS_FP16:
      return merge_fp16(reinterpret_cast<uint16_t *>(out), s, base, flip, planes[0], planes[1], n);
    case CG_LOSSLESS_FP32:
      return merge_fp32(reinterpret_cast<uint32_t *>(out), s, base, planes[0], planes[1], planes[2], n);
    case CG_LOSSLESS_E4M3:
      return merge_e4m3(out, s, base, planes[0], n);
    default:
      return merge_e5m2(out, s, base, flip, planes[0], n);
  }
}

// Give escaped symbols of a row their value from `exceptions`. False: too few, or one that doesn't fit the type.
bool patch_row(uint8_t *s, size_t columns, const Layout &layout, uint32_t limit, const uint8_t *&exception,
               const uint8_t *end) {
  const auto patch = [&](uint8_t &symbol) {
    if (exception == end || *exception >> layout.exponent_bits != 0) return false;
    const unsigned sign = symbol & layout.signs;
    symbol = static_cast<uint8_t>(*exception++ << layout.signs | sign);
    return true;
  };
  size_t i = 0;
  for (; i + 64 <= columns; i += 64) {
    for (uint64_t mask = escapes64(s + i, limit); mask != 0; mask &= mask - 1) {
      if (!patch(s[i + __builtin_ctzll(mask)])) return false;
    }
  }
  for (; i < columns; i++) {
    if (s[i] >= limit && !patch(s[i])) return false;
  }
  return true;
}

int merge(const cg_floats &m, const Layout &layout, uint8_t *scratch) {
  const auto columns = static_cast<size_t>(m.columns);
  auto *s = static_cast<uint8_t *>(m.symbols);
  const uint8_t *exceptions = m.exceptions, *const end = exceptions + m.exception_count;
  const uint32_t limit = layout.escape(m.alphabet);
  uint8_t *const zeros = scratch + 3 * columns;
  memset(zeros, 0, columns);
  for (int64_t row = m.row0; row < m.row1; row++, s += columns) {
    if (limit != 0 && !patch_row(s, columns, layout, limit, exceptions, end)) return CG_LOSSLESS_EXCEPTIONS;
    const uint8_t *values[3] = {zeros, zeros, zeros};
    for (int p = 0; p < layout.planes; p++) {
      if (m.planes[p] == nullptr) continue;
      const int bits = layout.plane_bits[p];
      const uint8_t *packed = m.planes[p] + (row - m.row0) * packed_bytes(columns, bits);
      values[p] = bits == 8 ? packed : scratch + p * columns;
      if (bits != 8) unpack_row(packed, columns, bits, scratch + p * columns);
    }
    size_t c = 0;
    for (int64_t t = 0; t < m.count; t++) {
      const cg_rows &tensor = m.tensors[t];
      const bool joined = tensor.head_stride == tensor.dim * layout.size;
      const int64_t runs = joined ? 1 : tensor.heads;
      const auto n = static_cast<size_t>(joined ? tensor.heads * tensor.dim : tensor.dim);
      for (int64_t h = 0; h < runs; h++, c += n) {
        const uint8_t *at[3] = {values[0] + c, values[1] + c, values[2] + c};
        uint8_t *out = tensor.data + row * tensor.row_stride + h * tensor.head_stride;
        merge_run(m.type, out, s + c, m.base + c, m.flip + c, at, n);
      }
    }
  }
  return exceptions == end ? CG_LOSSLESS_OK : CG_LOSSLESS_EXCEPTIONS;
}
