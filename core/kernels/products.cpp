// Activations times packed weights, for processors with AVX-512, and with AMX where there are tiles. Each number of the
// outcome is one sum in one order of its own row, so what a row says depends neither on how many rows there are nor on
// where it stands among them.
//
// Weights lie in panels of WIDTH outputs, [panel][inputs / DEEP][WIDTH][DEEP], as the dot-product instructions take them:
// with DEEP 2 VDPBF16PS of AVX512_BF16 and TDPBF16PS of AMX, with DEEP 4 VPDPBUSD of AVX512_VNNI and TDPBSSD of AMX (Intel's
// manual, volume 2). While a panel is multiplied the next one is fetched: at the few rows of a decoding step memory takes as
// long as arithmetic.
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <cstring>

#include "calls.h"
#include "pool.h"

namespace {

constexpr int WIDTH = 32;
constexpr int VECTORS = WIDTH / 16;
constexpr int MOST_ROWS = 12; // of one tile: 24 sums, and the registers are 32
constexpr int LINE = 64;

// Rows to be multiplied; those of eight bits have for each group of GROUP_STEPS steps what one of its numbers is worth.
struct Rows {
  const char *at;
  int64_t stride;       // in bytes
  const float *scales;  // [rows][groups]
  const int32_t *moved; // [rows][groups]: what 128 more in each weight comes to, to be taken off
  int64_t groups;
  Rows from(int64_t row) const {
    return {at + row * stride, stride, scales + row * groups, moved + row * groups, groups};
  }
};

constexpr int TILE_STEPS = 16;              // of a tile of weights
constexpr int GROUP_STEPS = 2 * TILE_STEPS; // 128 inputs

struct Bfloat16 {
  typedef uint16_t Weight;
  typedef __m512 Sum;
  static constexpr int DEEP = 2;
  static constexpr bool GROUPED = false;
  static Sum start(const Rows &, int64_t, int64_t) { return _mm512_setzero_ps(); }
  static __m512i weights(const char *at) { return _mm512_loadu_si512(at); }
  static Sum add(Sum sum, __m512i row, __m512i weights) {
    return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)weights);
  }
  static __m512 settle(__m512, Sum sum, const Rows &, int64_t, int64_t) { return sum; }
};

struct Int8 {
  typedef int8_t Weight;
  typedef __m512i Sum;
  static constexpr int DEEP = 4;
  static constexpr bool GROUPED = true;
  static Sum start(const Rows &rows, int64_t m, int64_t group) {
    return _mm512_set1_epi32(rows.moved[m * rows.groups + group]);
  }
  static __m512i weights(const char *at) { // moved up by 128: the instruction takes one side unsigned
    return _mm512_xor_si512(_mm512_loadu_si512(at), _mm512_set1_epi8(-128));
  }
  static Sum add(Sum sum, __m512i row, __m512i weights) { // by hand: GCC 12 spills the sums of its own intrinsic
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(row));
    return sum;
  }
  static __m512 settle(__m512 before, Sum sum, const Rows &rows, int64_t m, int64_t group) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(rows.scales[m * rows.groups + group]), before);
  }
};

// What is fetched while a tile is multiplied: so many lines at each of its steps.
struct Ahead {
  const char *at;
  int lines;
};

// ROWS rows times one panel. A step is DEEP inputs: four bytes of a row, two lines of the panel.
template <typename T, int ROWS>
void multiply(const Rows &rows, const char *panel, int64_t steps, Ahead ahead, __m512 (*sums)[VECTORS]) {
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < VECTORS; v++) sums[m][v] = _mm512_setzero_ps();
  for (int64_t group = 0, step = 0; step < steps; group++) {
    const int64_t end = T::GROUPED && step + GROUP_STEPS < steps ? step + GROUP_STEPS : steps;
    typename T::Sum sum[ROWS][VECTORS];
    for (int m = 0; m < ROWS; m++)
      for (int v = 0; v < VECTORS; v++) sum[m][v] = T::start(rows, m, group);
    for (; step < end; step++) {
      if (ahead.lines > 0) _mm_prefetch(ahead.at + step * ahead.lines * LINE, _MM_HINT_T1);
      if (ahead.lines > 1) _mm_prefetch(ahead.at + step * ahead.lines * LINE + LINE, _MM_HINT_T1);
      __m512i weights[VECTORS];
      for (int v = 0; v < VECTORS; v++) weights[v] = T::weights(panel + (step * VECTORS + v) * LINE);
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; m++) {
        int32_t word;
        std::memcpy(&word, rows.at + m * rows.stride + step * 4, 4);
        __m512i row = _mm512_set1_epi32(word);
        for (int v = 0; v < VECTORS; v++) sum[m][v] = T::add(sum[m][v], row, weights[v]);
      }
    }
    for (int m = 0; m < ROWS; m++)
      for (int v = 0; v < VECTORS; v++) sums[m][v] = T::settle(sums[m][v], sum[m][v], rows, m, group);
  }
}

using Multiply = void (*)(const Rows &, const char *, int64_t, Ahead, __m512 (*)[VECTORS]);
template <typename T> constexpr Multiply TILES[MOST_ROWS + 1] = {
    nullptr,        multiply<T, 1>, multiply<T, 2>, multiply<T, 3>,  multiply<T, 4>,  multiply<T, 5>, multiply<T, 6>,
    multiply<T, 7>, multiply<T, 8>, multiply<T, 9>, multiply<T, 10>, multiply<T, 11>, multiply<T, 12>};

constexpr int MOST_TILE_ROWS = 32; // at once: four tiles of sums, 16 rows times 16 outputs each

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
// Linux wants to be asked once a process: the registers are eight kilobytes a thread.
bool has_tiles() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool allowed = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return allowed;
}

// Tiles 0 to 3: sums, two of each row of tiles; 4 and 5: rows; 6 and 7: weights.
struct alignas(64) Shape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  explicit Shape(int height) {
    const int upper = height < 16 ? height : 16, lower = height - upper;
    const int heights[8] = {upper, upper, lower, lower, upper, lower, TILE_STEPS, TILE_STEPS};
    for (int tile = 0; tile < 8; tile++) bytes[tile] = heights[tile] ? LINE : 0, rows[tile] = uint8_t(heights[tile]);
  }
};

// Tiles of sums to and from memory. The macros of the intrinsics take their tiles as they are written.
template <bool LOWER> void clear() {
  _tile_zero(0);
  _tile_zero(1);
  if (LOWER) _tile_zero(2);
  if (LOWER) _tile_zero(3);
}
template <bool LOWER> void keep(void *sums) {
  char *at = static_cast<char *>(sums);
  _tile_stored(0, at, VECTORS * LINE);
  _tile_stored(1, at + LINE, VECTORS * LINE);
  if (LOWER) _tile_stored(2, at + 16 * VECTORS * LINE, VECTORS * LINE);
  if (LOWER) _tile_stored(3, at + 16 * VECTORS * LINE + LINE, VECTORS * LINE);
}
#define DOT(sum, row, weights)                                                                                         \
  if constexpr (T::GROUPED) _tile_dpbssd(sum, row, weights);                                                           \
  else _tile_dpbf16ps(sum, row, weights);

template <typename T, bool LOWER>
void multiply_tiles(const Rows &rows, const char *panel, int64_t steps, Ahead ahead, __m512 (*sums)[VECTORS],
                    int height) {
  if (T::GROUPED) std::memset(sums, 0, height * VECTORS * LINE);
  clear<LOWER>();
  for (int64_t step = 0; step < steps; step += TILE_STEPS) {
    const char *weights = panel + step * VECTORS * LINE;
    for (int line = 0; line < ahead.lines * TILE_STEPS; line++)
      _mm_prefetch(ahead.at + (step * ahead.lines + line) * LINE, _MM_HINT_T1);
    _tile_loadd(4, rows.at + step * 4, rows.stride);
    _tile_loadd(6, weights, VECTORS * LINE);
    DOT(0, 4, 6)
    _tile_loadd(7, weights + LINE, VECTORS * LINE);
    DOT(1, 4, 7)
    if (LOWER) {
      _tile_loadd(5, rows.at + 16 * rows.stride + step * 4, rows.stride);
      DOT(2, 5, 6)
      DOT(3, 5, 7)
    }
    const int64_t done = step + TILE_STEPS;
    if (T::GROUPED && (done % GROUP_STEPS == 0 || done == steps)) {
      typename T::Sum group[MOST_TILE_ROWS][VECTORS];
      keep<LOWER>(group);
      clear<LOWER>();
      for (int m = 0; m < height; m++)
        for (int v = 0; v < VECTORS; v++) sums[m][v] = T::settle(sums[m][v], group[m][v], rows, m, step / GROUP_STEPS);
    }
  }
  if (!T::GROUPED) keep<LOWER>(sums);
}
#undef DOT

template <typename T>
void multiply_tiles(const Rows &rows, const char *panel, int64_t steps, Ahead ahead, __m512 (*sums)[VECTORS],
                    int height) {
  Shape shape(height);
  _tile_loadconfig(&shape);
  (height > 16 ? multiply_tiles<T, true> : multiply_tiles<T, false>)(rows, panel, steps, ahead, sums, height);
  _tile_release();
}
#else
constexpr bool has_tiles() { return false; }
template <typename T> void multiply_tiles(const Rows &, const char *, int64_t, Ahead, __m512 (*)[VECTORS], int) {}
#endif

inline void save(float *at, __m512 values, __mmask16 mask) { _mm512_mask_storeu_ps(at, mask, values); }
inline void save(uint16_t *at, __m512 values, __mmask16 mask) {
  _mm256_mask_storeu_epi16(at, mask, (__m256i)_mm512_cvtneps_pbh(values));
}

// All rows times all panels; finish turns sums into values.
template <typename T, typename Out, typename Finish>
void product(const Rows &rows, const char *weights, Out *out, int64_t count, int64_t outputs, int64_t inputs,
             int64_t threads, Finish finish) {
  const int64_t bytes = inputs * WIDTH * int64_t(sizeof(typename T::Weight)), steps = inputs / T::DEEP;
  const bool amx = steps % TILE_STEPS == 0 && has_tiles(); // not by the number of rows: they are to be the same for any
  const int64_t most = amx ? MOST_TILE_ROWS : MOST_ROWS;
  const int64_t panels = (outputs + WIDTH - 1) / WIDTH, tiles = (count + most - 1) / most;
  share(threads, panels, [&](int64_t p) {
    const char *panel = weights + p * bytes;
    int64_t first = 0;
    for (int64_t tile = 0; tile < tiles; tile++) {
      int64_t height = amx && tile < tiles - 1 ? most : (count - first + tiles - tile - 1) / (tiles - tile);
      __m512 sums[MOST_TILE_ROWS][VECTORS];
      int lines = tiles == 1 ? 2 : tile < 2 ? 1 : 0; // the first two tiles, or the only one, fetch the next panel
      Ahead ahead{panel + bytes + tile * steps * LINE, lines};
      if (amx) multiply_tiles<T>(rows.from(first), panel, steps, ahead, sums, int(height));
      else TILES<T>[height](rows.from(first), panel, steps, ahead, sums);
      for (int64_t m = 0; m < height; m++)
        for (int v = 0; v < VECTORS; v++) {
          int64_t at = p * WIDTH + v * 16, left = outputs - at;
          if (left <= 0) continue;
          __mmask16 mask = left >= 16 ? 0xffff : uint16_t((1 << left) - 1);
          save(out + (first + m) * outputs + at, finish(sums[m][v], at), mask);
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

// One group of a row in eight bits, its largest at 127: what one of it is worth, and its sum.
float quantize(const uint16_t *row, int64_t inputs, int8_t *into, int32_t &sum) {
  __m512 most = _mm512_setzero_ps();
  for (int64_t k = 0; k < inputs; k += 16)
    most = _mm512_max_ps(most, _mm512_abs_ps(load_bfloat16(row + k, upto(inputs - k))));
  const float largest = _mm512_reduce_max_ps(most);
  const __m512 scale = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
  __m512i sums = _mm512_setzero_si512();
  for (int64_t k = 0; k < inputs; k += 16) {
    const __mmask16 mask = upto(inputs - k);
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load_bfloat16(row + k, mask), scale)); // to the nearest
    sums = _mm512_add_epi32(sums, whole);
    _mm_mask_storeu_epi8(into + k, mask, _mm512_cvtepi32_epi8(whole));
  }
  sum = _mm512_reduce_add_epi32(sums);
  return largest / 127.0f;
}

// rows [count][inputs], stride apart; out [count][outputs]:
// rows, stride, weights, bias, out, count, outputs, inputs, threads
template <typename Out> void product_bfloat16(const Word *w) {
  const float *bias = w[3].at<const float>();
  const Rows rows{w[0].at<const char>(), w[1].number * 2, nullptr, nullptr, 0};
  product<Bfloat16>(rows, w[2].at<const char>(), w[4].at<Out>(), w[5].number, w[6].number, w[7].number, w[8].number,
                    [=](__m512 sum, int64_t at) {
                      return bias ? _mm512_add_ps(sum, _mm512_loadu_ps(bias + at)) : sum;
                    });
}

// The same, with the weights' scales behind them, and behind out room for the rows in eight bits, [count][inputs], and for
// what their groups of 128 inputs are worth and what is to be taken off, [count][groups] each.
template <typename Out> void product_int8(const Word *w) {
  const uint16_t *from = w[0].at<const uint16_t>();
  const int64_t stride = w[1].number, count = w[9].number, outputs = w[10].number, inputs = w[11].number;
  const float *weight_scales = w[3].at<const float>(), *bias = w[4].at<const float>();
  int8_t *quantized = w[6].at<int8_t>();
  float *scales = w[7].at<float>();
  int32_t *moved = w[8].at<int32_t>();
  constexpr int64_t GROUP = GROUP_STEPS * Int8::DEEP;
  const int64_t groups = (inputs + GROUP - 1) / GROUP, threads = w[12].number;
  share(count * inputs > FEW ? threads : 1, count, [=](int64_t m) {
    for (int64_t group = 0; group < groups; group++) {
      const int64_t first = group * GROUP, at = m * groups + group;
      const int64_t size = inputs - first < GROUP ? inputs - first : GROUP;
      scales[at] = quantize(from + m * stride + first, size, quantized + m * inputs + first, moved[at]);
      moved[at] *= -128;
    }
  });
  product<Int8>({(const char *)quantized, inputs, scales, moved, groups}, w[2].at<const char>(), w[5].at<Out>(), count,
                outputs, inputs, threads, [=](__m512 sum, int64_t at) {
                  sum = _mm512_mul_ps(sum, _mm512_loadu_ps(weight_scales + at));
                  return bias ? _mm512_add_ps(sum, _mm512_loadu_ps(bias + at)) : sum;
                });
}

} // namespace

// Bias and the weights' scales have whole panels of outputs.
extern "C" {
void product_bfloat16_bfloat16(const Word *w) { product_bfloat16<uint16_t>(w); }
void product_bfloat16_float(const Word *w) { product_bfloat16<float>(w); }
void product_int8_bfloat16(const Word *w) { product_int8<uint16_t>(w); }
void product_int8_float(const Word *w) { product_int8<float>(w); }
}
#endif
