// What stands between the products of a layer, row by row and each in one pass: normalisation, rotary positions, the gate.
// A row is computed by itself, in float32; sizes are multiples of LANES.
#include <cmath>

#include "calls.h"
#include "pool.h"
#include "vectors.h"

extern "C" {

// RMSNorm (arXiv:1910.07467): x / sqrt(mean(x^2) + eps), rounded, times weight.
// x [rows][parts][size] by its strides, out [rows][parts][size]:
// x, its row's stride, its part's stride, weight, out, rows, parts, size, eps, threads
void rms_norm(const Word *w) {
  const Bf16 *x = w[0].at<const Bf16>(), *weight = w[3].at<const Bf16>();
  const int64_t row_stride = w[1].number, part_stride = w[2].number;
  Bf16 *out = w[4].at<Bf16>();
  const int64_t rows = w[5].number, parts = w[6].number, size = w[7].number;
  const float eps = float(w[8].real);
  share(rows * parts * size > FEW ? w[9].number : 1, rows * parts, [=](int64_t at) {
    const Bf16 *from = x + at / parts * row_stride + at % parts * part_stride;
    Bf16 *into = out + at * size;
    Vec squares = splat(0.0f);
    for (int64_t i = 0; i < size; i += LANES) squares += load(from + i) * load(from + i);
    float sum = 0.0f;
    for (int j = 0; j < LANES; j++) sum += squares[j];
    const float share = 1.0f / std::sqrt(sum / float(size) + eps);
    for (int64_t i = 0; i < size; i += LANES) {
      save(into + i, load(from + i) * share);
      save(into + i, load(into + i) * load(weight + i));
    }
  });
}

// Rotary positions (arXiv:2104.09864): x * cos + (minus its second half, its first half) * sin; half a size is a multiple
// of LANES. x [heads][rows][size] by its strides, cos and sin [rows][size], out [heads][rows][size]:
// x, its head's stride, its row's stride, cos, sin, out, heads, rows, size, threads
void rotate(const Word *w) {
  const Bf16 *x = w[0].at<const Bf16>(), *cos = w[3].at<const Bf16>(), *sin = w[4].at<const Bf16>();
  const int64_t head_stride = w[1].number, row_stride = w[2].number;
  Bf16 *out = w[5].at<Bf16>();
  const int64_t heads = w[6].number, rows = w[7].number, size = w[8].number, half = size / 2;
  share(heads * rows * size > FEW ? w[9].number : 1, heads * rows, [=](int64_t at) {
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

// SwiGLU (arXiv:2002.05202): gate / (1 + e^-gate), rounded, times up.
// pairs [rows][gate: size, up: size], out [rows][size]: pairs, out, rows, size, threads
void silu_times(const Word *w) {
  const Bf16 *pairs = w[0].at<const Bf16>();
  Bf16 *out = w[1].at<Bf16>();
  const int64_t rows = w[2].number, size = w[3].number;
  share(rows * size > FEW ? w[4].number : 1, rows, [=](int64_t row) {
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

// Each sum of two: x, y, out, rows, size, threads
void add(const Word *w) {
  const Bf16 *x = w[0].at<const Bf16>(), *y = w[1].at<const Bf16>();
  Bf16 *out = w[2].at<Bf16>();
  const int64_t rows = w[3].number, size = w[4].number;
  share(rows * size > FEW ? w[5].number : 1, rows, [=](int64_t row) {
    for (int64_t i = row * size; i < (row + 1) * size; i += LANES) save(out + i, load(x + i) + load(y + i));
  });
}

// Where the largest of each row is, of equal ones the first.
// x float32 [rows][size], out [rows]: x, out, rows, size, threads
void argmax(const Word *w) {
  const float *x = w[0].at<const float>();
  int64_t *out = w[1].at<int64_t>();
  const int64_t rows = w[2].number, size = w[3].number;
  share(rows * size > FEW ? w[4].number : 1, rows, [=](int64_t row) {
    const float *from = x + row * size;
    const Ints step = Ints{} + LANES;
    Ints at = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, where = at;
    Vec most = load(from);
    for (int64_t i = LANES; i < size; i += LANES) {
      at += step;
      const Vec here = load(from + i);
      where = here > most ? at : where;
      most = here > most ? here : most;
    }
    int best = 0;
    for (int j = 1; j < LANES; j++)
      if (most[j] > most[best] || (most[j] == most[best] && where[j] < where[best])) best = j;
    out[row] = where[best];
  });
}

} // extern "C"
