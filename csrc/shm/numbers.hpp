// bf16 and fp16 as bit patterns: exact to fp32, rounded to nearest even from it. Branchless, so that loops vectorise.
#pragma once

#include <cstdint>
#include <cstring>

namespace tpmp {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(bf16 value) { return float_of(uint32_t(value.bits) << 16); }

inline float widen(fp16 value) {
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  const uint32_t normal = magnitude + kRebias;
  const uint32_t special = magnitude | 0x7f800000;
  // Adds the hidden bit and takes it away again: no denormal fp32 appears, which flush-to-zero would lose.
  const uint32_t small = bits_of(float_of(magnitude + kRebias + (1 << 23)) - float_of(kRebias + (1 << 23)));
  const uint32_t exponent = magnitude >> 23;
  const uint32_t bits = exponent == 0 ? small : exponent == 31 ? special : normal;
  return float_of(bits | uint32_t(value.bits & 0x8000) << 16);
}

template <class T>
T narrow(float value);

template <>
inline float narrow<float>(float value) { return value; }

template <>
inline bf16 narrow<bf16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {uint16_t(value != value ? 0x7fc0 : rounded)};
}

template <>
inline fp16 narrow<fp16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  // Rounding may carry into the exponent, up to infinity, which is what round to nearest asks for.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // Adding 0.5 leaves the denormal's digits at the end of the mantissa, rounded to even by the addition itself.
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t rounded = magnitude >= (143u << 23) ? special : magnitude < (113u << 23) ? small : normal;
  return {uint16_t(rounded | (bits >> 16 & 0x8000))};
}

}  // namespace tpmp
