// Numbers as they are kept and as they are computed with.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct BFloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void narrow(float x, float& y) { y = x; }
inline void narrow(double x, double& y) { y = x; }
// To the nearest, and to the even one of two that are as near.
inline void narrow(float x, BFloat16& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  y.bits = uint16_t(x != x ? 0x7fc0 : rounded);
}

}  // namespace
