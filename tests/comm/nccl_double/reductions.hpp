// Reductions as NCCL defines them: the parts of all ranks, in order of rank, into the first; halves rounded once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using Buffer = std::vector<char>;

float widened(uint16_t bits, bool bf16) {
  if (!bf16) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return float(half);
  }
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

uint16_t narrowed(float value, bool bf16) {
  uint16_t bits;
  if (!bf16) {
    const _Float16 half = _Float16(value);
    std::memcpy(&bits, &half, 2);
    return bits;
  }
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (value != value) return 0x7fc0;
  return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

template <class T>
T combined(T a, T b, int op) {
  switch (op) {
    case 1: return T(a * b);
    case 2: return std::max(a, b);
    case 3: return std::min(a, b);
    default: return T(a + b);
  }
}

template <class T>
void reduce_as(std::vector<Buffer>& parts, int op) {
  T* total = reinterpret_cast<T*>(parts[0].data());
  for (size_t i = 0; i < parts[0].size() / sizeof(T); ++i) {
    for (size_t r = 1; r < parts.size(); ++r)
      total[i] = combined(total[i], reinterpret_cast<T*>(parts[r].data())[i], op);
    if (op == 4) total[i] = T(total[i] / T(parts.size()));
  }
}

void reduce_halves(std::vector<Buffer>& parts, int op, bool bf16) {
  uint16_t* out = reinterpret_cast<uint16_t*>(parts[0].data());
  for (size_t i = 0; i < parts[0].size() / 2; ++i) {
    float total = widened(out[i], bf16);
    for (size_t r = 1; r < parts.size(); ++r)
      total = combined(total, widened(reinterpret_cast<uint16_t*>(parts[r].data())[i], bf16), op);
    out[i] = narrowed(op == 4 ? total / float(parts.size()) : total, bf16);
  }
}

// Into the first part.
void reduce(std::vector<Buffer>& parts, int dtype, int op) {
  switch (dtype) {
    case 0: return reduce_as<int8_t>(parts, op);
    case 1: return reduce_as<uint8_t>(parts, op);
    case 2: return reduce_as<int32_t>(parts, op);
    case 3: return reduce_as<uint32_t>(parts, op);
    case 4: return reduce_as<int64_t>(parts, op);
    case 5: return reduce_as<uint64_t>(parts, op);
    case 7: return reduce_as<float>(parts, op);
    case 8: return reduce_as<double>(parts, op);
    default: return reduce_halves(parts, op, dtype == 9);
  }
}

}  // namespace
