// What lossless.cpp (planes) and lossless_record.cpp (records) agree on.
#ifndef CACHEGEN_LOSSLESS_LAYOUT_H
#define CACHEGEN_LOSSLESS_LAYOUT_H
#include <cstddef>
#include <cstdint>

#include "lossless.h"

namespace cg {
namespace {  // internal linkage: see lane.h

// How a type's bits are shared out: see docs/format-lossless.md, *Types*.
struct Layout {
  int size;           // bytes an element
  int exponent_bits;
  int mantissa_bits;
  unsigned signs;     // 1 if symbols hold the sign in bit 0
  int planes;
  int plane_bits[3];

  // Symbols from here on are escapes; 0 if the alphabet holds every exponent.
  uint32_t escape(int64_t alphabet) const {
    const auto exponents = static_cast<uint32_t>(alphabet) >> signs;
    return exponents < 1u << exponent_bits ? (exponents - 1) << signs : 0;
  }
};

constexpr Layout kLayouts[] = {
    {2, 8, 7, 0, 1, {8, 0, 0}},   // bf16: sign and mantissa
    {2, 5, 10, 1, 2, {8, 2, 0}},  // fp16: low 8 bits, then the mantissa's top 2
    {4, 8, 23, 0, 3, {8, 8, 8}},  // fp32: sign and top 7, then 8, then 8
    {1, 4, 3, 0, 1, {4, 0, 0}},   // e4m3: sign and mantissa
    {1, 5, 2, 1, 1, {2, 0, 0}},   // e5m2: mantissa
};
constexpr int64_t kTypes = sizeof kLayouts / sizeof kLayouts[0];
constexpr int64_t kMaxColumns = int64_t{1} << 24;

size_t packed_bytes(size_t columns, int bits) { return (columns + 8 / bits - 1) / (8 / bits); }

}  // namespace

// One job's merge by the code of an ISA; `scratch` has 4 bytes a column. The job has been checked.
int lossless_merge(const cg_floats &floats, int isa, uint8_t *scratch);
bool lossless_valid(const cg_floats &floats);

}  // namespace cg
#endif
