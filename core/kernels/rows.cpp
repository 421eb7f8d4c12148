// What stands between the products of a layer, row by row and each in one pass: normalisation, rotary positions, the gate.
// A row is computed by itself, in float32; sizes are multiples of LANES.
#include <cmath>

#include "pool.h"
#include "vectors.h"

extern "C" {

// RMSNorm (arXiv:1910.07467): x / sqrt(mean(x^2) + eps), rounded, times weight. x and out [rows][size].
void rms_norm(const Bf16 *x, const Bf16 *weight, Bf16 *out, int64_t rows, int64_t size, double eps,
              int64_t threads) {
  share(rows * size > FEW ? threads : 1, rows, [=](int64_t row) {
    const Bf16 *from = x + row * size;
    Bf16 *into = out + row * size;
    Vec squares = splat(0.0f);
    for (int64_t i = 0; i < size; i += LANES) squares += load(from + i) * load(from + i);
    float sum = 0.0f;
    for (int j = 0; j < LANES; j++) sum += squares[j];
    const float share = 1.0f / std::sqrt(sum / float(size) + float(eps));
    for (int64_t i = 0; i < size; i += LANES) {
      save(into + i, load(from + i) * share);
      save(into + i, load(into + i) * load(weight + i));
    }
  });
}

// Rotary positions (arXiv:2104.09864): x * cos + (minus its second half, its first half) * sin; half a size is a multiple
// of LANES. x [heads][rows][size] by its strides, cos and sin [rows][size], out [heads][rows][size].
void rotate(const Bf16 *x, int64_t head_stride, int64_t row_stride, const Bf16 *cos, const Bf16 *sin, Bf16 *out,
            int64_t heads, int64_t rows, int64_t size, int64_t threads) {
  const int64_t half = size / 2;
  share(heads * rows * size > FEW ? threads : 1, heads * rows, [=](int64_t at) {
    const int64_t head = at / rows, row = at % rows;
    const Bf16 *from = x + head * head_stride + row * row_stride, *c = cos + row * size, *s = sin + row * size;
    Bf16 *into = out + at * size;
    for (int64_t i = 0; i < half; i += LANES) {
      Vec first = load(from + i), second = load(from + half + i);
      save(into + i, first * load(c + i) - second * load(s + i));
      save(into + half + i, second * load(c + half + i) + first * load(s + half + i));
    }
  });
}

// SwiGLU (arXiv:2002.05202): gate / (1 + e^-gate), rounded, times up. pairs [rows][gate: size, up: size], out [rows][size].
void silu_times(const Bf16 *pairs, Bf16 *out, int64_t rows, int64_t size, int64_t threads) {
  share(rows * size > FEW ? threads : 1, rows, [=](int64_t row) {
    const Bf16 *gates = pairs + row * 2 * size;
    Bf16 *into = out + row * size;
    for (int64_t i = 0; i < size; i += LANES) {
      Vec gate = load(gates + i);
      Vec e = exp_of(gate < 0.0f ? gate : -gate); // of minus its size
      Vec sigmoid = (gate < 0.0f ? e : splat(1.0f)) / (1.0f + e);
      save(into + i, gate * sigmoid);
      save(into + i, load(into + i) * load(gates + size + i));
    }
  });
}

} // extern "C"
