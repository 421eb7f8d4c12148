// Activations times packed weights, for processors with AVX-512. Each number of the outcome is one sum in one order of its
// own row, so what a row says depends neither on how many rows there are nor on where it stands among them.
//
// Weights lie in panels of WIDTH outputs, [panel][inputs / DEEP][WIDTH][DEEP], as the dot-product instructions take them
// (VDPBF16PS of AVX512_BF16 with DEEP 2, VPDPBUSD of AVX512_VNNI with DEEP 4: Intel's manual, volume 2). While a panel is
// multiplied the next one is fetched: at the few rows of a decoding step memory takes as long as arithmetic.
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "pool.h"

namespace {

constexpr int WIDTH = 32;
constexpr int VECTORS = WIDTH / 16;
constexpr int MOST_ROWS = 12; // of one tile: 24 sums, and the registers are 32
constexpr int LINE = 64;

struct Bfloat16 {
  typedef uint16_t Weight;
  static constexpr int DEEP = 2;
  typedef __m512 Sum;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add(Sum sum, __m512i row, __m512i weights) {
    return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)weights);
  }
};

struct Int8 { // activations unsigned, weights signed
  typedef int8_t Weight;
  static constexpr int DEEP = 4;
  typedef __m512i Sum;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum add(Sum sum, __m512i row, __m512i weights) { // by hand: GCC 12 spills the sums of its own intrinsic
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(row), "v"(weights));
    return sum;
  }
};

// What is fetched while a tile is multiplied: so many lines at each of its steps.
struct Ahead {
  const char *at;
  int lines;
};

// ROWS rows times one panel. A step is DEEP inputs: four bytes of a row, two lines of the panel.
template <typename T, int ROWS>
void multiply(const char *rows, int64_t stride, const char *panel, int64_t steps, Ahead ahead,
              typename T::Sum (*sums)[VECTORS]) {
  typename T::Sum sum[ROWS][VECTORS];
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < VECTORS; v++) sum[m][v] = T::zero();
  for (int64_t step = 0; step < steps; step++) {
    if (ahead.lines > 0) _mm_prefetch(ahead.at + step * ahead.lines * LINE, _MM_HINT_T1);
    if (ahead.lines > 1) _mm_prefetch(ahead.at + step * ahead.lines * LINE + LINE, _MM_HINT_T1);
    __m512i weights[VECTORS];
    for (int v = 0; v < VECTORS; v++) weights[v] = _mm512_loadu_si512(panel + (step * VECTORS + v) * LINE);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) {
      int32_t word;
      std::memcpy(&word, rows + m * stride + step * 4, 4);
      __m512i row = _mm512_set1_epi32(word);
      for (int v = 0; v < VECTORS; v++) sum[m][v] = T::add(sum[m][v], row, weights[v]);
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < VECTORS; v++) sums[m][v] = sum[m][v];
}

template <typename T> using Multiply = void (*)(const char *, int64_t, const char *, int64_t, Ahead,
                                                typename T::Sum (*)[VECTORS]);
template <typename T> constexpr Multiply<T> TILES[MOST_ROWS + 1] = {
    nullptr,        multiply<T, 1>, multiply<T, 2>, multiply<T, 3>,  multiply<T, 4>,  multiply<T, 5>, multiply<T, 6>,
    multiply<T, 7>, multiply<T, 8>, multiply<T, 9>, multiply<T, 10>, multiply<T, 11>, multiply<T, 12>};

inline void save(float *at, __m512 values, __mmask16 mask) { _mm512_mask_storeu_ps(at, mask, values); }
inline void save(uint16_t *at, __m512 values, __mmask16 mask) {
  _mm256_mask_storeu_epi16(at, mask, (__m256i)_mm512_cvtneps_pbh(values));
}

// All rows times all panels; finish turns a row's sums into values.
template <typename T, typename Out, typename Finish>
void product(const char *rows, int64_t stride, const char *weights, Out *out, int64_t count, int64_t outputs,
             int64_t inputs, int64_t threads, Finish finish) {
  const int64_t panels = (outputs + WIDTH - 1) / WIDTH, tiles = (count + MOST_ROWS - 1) / MOST_ROWS;
  const int64_t bytes = inputs * WIDTH * int64_t(sizeof(typename T::Weight)), steps = inputs / T::DEEP;
  share(threads, panels, [&](int64_t p) {
    const char *panel = weights + p * bytes;
    int64_t first = 0;
    for (int64_t tile = 0; tile < tiles; tile++) {
      int64_t height = (count - first + tiles - tile - 1) / (tiles - tile);
      typename T::Sum sums[MOST_ROWS][VECTORS];
      int lines = tiles == 1 ? 2 : tile < 2 ? 1 : 0; // the first two tiles, or the only one, fetch the next panel
      Ahead ahead{panel + bytes + tile * steps * LINE, lines};
      TILES<T>[height](rows + first * stride, stride, panel, steps, ahead, sums);
      for (int64_t m = 0; m < height; m++)
        for (int v = 0; v < VECTORS; v++) {
          int64_t at = p * WIDTH + v * 16, left = outputs - at;
          if (left <= 0) continue;
          __mmask16 mask = left >= 16 ? 0xffff : uint16_t((1 << left) - 1);
          save(out + (first + m) * outputs + at, finish(sums[m][v], first + m, at), mask);
        }
      first += height;
    }
  });
}

inline __m512 load_bfloat16(const uint16_t *at, __mmask16 mask) {
  __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

inline __mmask16 upto(int64_t left) { return left >= 16 ? 0xffff : uint16_t((1 << left) - 1); }

// One row in eight bits, its largest at 127, moved up by 128; returns what one of it is worth.
float quantize(const uint16_t *row, int64_t inputs, uint8_t *into) {
  __m512 most = _mm512_setzero_ps();
  for (int64_t k = 0; k < inputs; k += 16)
    most = _mm512_max_ps(most, _mm512_abs_ps(load_bfloat16(row + k, upto(inputs - k))));
  float largest = _mm512_reduce_max_ps(most);
  const __m512 scale = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
  for (int64_t k = 0; k < inputs; k += 16) {
    __mmask16 mask = upto(inputs - k);
    __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load_bfloat16(row + k, mask), scale)); // to the nearest
    _mm_mask_storeu_epi8(into + k, mask, _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(128))));
  }
  return largest / 127.0f;
}

template <typename Out>
void product_bfloat16(const uint16_t *rows, int64_t stride, const uint16_t *weights, const float *bias, Out *out,
                      int64_t count, int64_t outputs, int64_t inputs, int64_t threads) {
  product<Bfloat16>((const char *)rows, stride * 2, (const char *)weights, out, count, outputs, inputs, threads,
                    [=](__m512 sum, int64_t, int64_t at) {
                      return bias ? _mm512_add_ps(sum, _mm512_loadu_ps(bias + at)) : sum;
                    });
}

// quantized: room for count rows of inputs bytes; scales: for count floats; of weights: scale and 128 * sum an output.
template <typename Out>
void product_int8(const uint16_t *rows, int64_t stride, const int8_t *weights, const float *weight_scales,
                  const int32_t *weight_sums, const float *bias, Out *out, uint8_t *quantized, float *scales,
                  int64_t count, int64_t outputs, int64_t inputs, int64_t threads) {
  share(count * inputs > FEW ? threads : 1, count,
        [=](int64_t m) { scales[m] = quantize(rows + m * stride, inputs, quantized + m * inputs); });
  product<Int8>((const char *)quantized, inputs, (const char *)weights, out, count, outputs, inputs, threads,
                [=](__m512i sum, int64_t row, int64_t at) {
                  __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_loadu_si512(weight_sums + at)));
                  value = _mm512_mul_ps(
                      value, _mm512_mul_ps(_mm512_set1_ps(scales[row]), _mm512_loadu_ps(weight_scales + at)));
                  return bias ? _mm512_add_ps(value, _mm512_loadu_ps(bias + at)) : value;
                });
}

} // namespace

// Bias, weight_scales and weight_sums have whole panels of outputs. A row of the outcome has outputs numbers.
extern "C" {

void product_bfloat16_bfloat16(const uint16_t *rows, int64_t stride, const uint16_t *weights, const float *bias,
                               uint16_t *out, int64_t count, int64_t outputs, int64_t inputs, int64_t threads) {
  product_bfloat16(rows, stride, weights, bias, out, count, outputs, inputs, threads);
}

void product_bfloat16_float(const uint16_t *rows, int64_t stride, const uint16_t *weights, const float *bias, float *out,
                            int64_t count, int64_t outputs, int64_t inputs, int64_t threads) {
  product_bfloat16(rows, stride, weights, bias, out, count, outputs, inputs, threads);
}

void product_int8_bfloat16(const uint16_t *rows, int64_t stride, const int8_t *weights, const float *weight_scales,
                           const int32_t *weight_sums, const float *bias, uint16_t *out, uint8_t *quantized,
                           float *scales, int64_t count, int64_t outputs, int64_t inputs, int64_t threads) {
  product_int8(rows, stride, weights, weight_scales, weight_sums, bias, out, quantized, scales, count, outputs, inputs,
               threads);
}

void product_int8_float(const uint16_t *rows, int64_t stride, const int8_t *weights, const float *weight_scales,
                        const int32_t *weight_sums, const float *bias, float *out, uint8_t *quantized, float *scales,
                        int64_t count, int64_t outputs, int64_t inputs, int64_t threads) {
  product_int8(rows, stride, weights, weight_scales, weight_sums, bias, out, quantized, scales, count, outputs, inputs,
               threads);
}

} // extern "C"
#endif
