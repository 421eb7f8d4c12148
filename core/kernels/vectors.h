// Sixteen floats at once, in the compiler's own vectors: GCC and Clang split them to fit the processor.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct Bf16 { uint16_t bits; };

inline Vec load(const float *at) {
  Vec out;
  std::memcpy(&out, at, sizeof out);
  return out;
}
inline Vec load(const Bf16 *at) {
  Halves halves;
  std::memcpy(&halves, at, sizeof halves);
  Words words = __builtin_convertvector(halves, Words) << 16;
  return (Vec)words;
}
inline void save(float *at, Vec x) { std::memcpy(at, &x, sizeof x); }
inline void save(Bf16 *at, Vec x) { // to nearest, ties to even
  Words words = (Words)x;
  Words rounded = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
  Halves halves = __builtin_convertvector((Words)(x == x ? (Ints)rounded : Ints{} + 0x7fc0), Halves);
  std::memcpy(at, &halves, sizeof halves);
}

inline Vec splat(float x) { return x - Vec{}; }

// e^x for x <= 0: Cody and Waite's reduction, a polynomial of degree 6; relative error below 2e-7.
inline Vec exp_of(Vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  Vec scaled = x * 1.44269504088896341f - 0.5f; // x <= 0: cutting off rounds to the nearest
  Ints whole = __builtin_convertvector(scaled, Ints);
  Vec n = __builtin_convertvector(whole, Vec);
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Ints power = (whole + 127) << 23;
  return p * (Vec)power;
}

} // namespace
