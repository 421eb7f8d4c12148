// Attention over paged keys and values, for processors. Each query row is computed by itself, over its own context and
// block by block in one fixed order, so what it says does not depend on who shares the step nor on how it was sliced.
// Online softmax after Milakov and Gimelshein (arXiv:1805.02867), blocks after vLLM's PagedAttention (arXiv:2309.06180).
//
// A block holds BLOCK tokens: keys [kv_heads][head_size][BLOCK], so that BLOCK scores are one vector, and values
// [kv_heads][BLOCK][head_size]. Vectors are the compiler's own: GCC and Clang split them to fit the processor.
#include <cstdint>
#include <cstring>

namespace {

constexpr int BLOCK = 16;
constexpr int MOST_HEAD = 256;   // head_size
constexpr int MOST_QUERIES = 48; // of one piece of work

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct Bf16 { uint16_t bits; };

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) {
  uint32_t word = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &word, 4);
  return out;
}
inline void from_float(float x, float *out) { *out = x; }
inline void from_float(float x, Bf16 *out) { // to nearest, ties to even
  uint32_t word;
  std::memcpy(&word, &x, 4);
  if (x != x) { out->bits = 0x7fc0; return; }
  out->bits = uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

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

inline Vec tanh_of(Vec x) {
  Vec size = x < 0.0f ? -x : x;
  Vec e = exp_of(size * -2.0f);
  Vec t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

template <typename T> struct Job {
  const T *query;      // [heads][tokens][head_size], by its strides
  const T *keys;       // of this step: [kv_heads][tokens][head_size], by their strides
  const T *values;
  T *key_pool;         // [blocks][kv_heads][head_size][BLOCK]
  T *value_pool;       // [blocks][kv_heads][BLOCK][head_size]
  T *out;              // [tokens][heads][head_size]
  int64_t query_head, query_row, key_head, key_row, value_head, value_row; // strides in elements
  int64_t heads, kv_heads, head_size;
  float scale, softcap; // softcap 0: none
  int64_t window;       // 0: none
};

struct Span { int32_t first, rows, context, table; };   // as core.batch lays them out
struct Piece { int32_t span, row, rows, kv_head; };      // one thread's piece of work

template <typename T> void store(const Job<T> &job, int64_t row, int64_t slot) {
  int64_t block = slot / BLOCK, place = slot % BLOCK, size = job.head_size;
  for (int64_t head = 0; head < job.kv_heads; head++) {
    const T *key = job.keys + head * job.key_head + row * job.key_row;
    T *into = job.key_pool + (block * job.kv_heads + head) * size * BLOCK + place;
    for (int64_t d = 0; d < size; d++) into[d * BLOCK] = key[d];
    const T *value = job.values + head * job.value_head + row * job.value_row;
    std::memcpy(job.value_pool + ((block * job.kv_heads + head) * BLOCK + place) * size, value, size * sizeof(T));
  }
}

// Scores of M queries against one block: one vector each.
template <int M> void score(const float *query, const float *keys, int64_t size, Vec *scores) {
  Vec sum[M];
  for (int m = 0; m < M; m++) sum[m] = splat(0.0f);
  for (int64_t d = 0; d < size; d++) {
    Vec key = load(keys + d * BLOCK);
    for (int m = 0; m < M; m++) sum[m] += query[m * MOST_HEAD + d] * key;
  }
  for (int m = 0; m < M; m++) scores[m] = sum[m];
}

// What M queries gather from one block's values: scaled down by what the maximum rose, plus the new share.
template <int M>
void gather(const float *weights, const float *fade, const float *values, int64_t size, int count, float *sums) {
  for (int64_t d = 0; d < size; d += BLOCK) {
    Vec sum[M];
    for (int m = 0; m < M; m++) sum[m] = load(sums + m * MOST_HEAD + d) * fade[m];
    for (int j = 0; j < count; j++) {
      Vec value = load(values + j * size + d);
      for (int m = 0; m < M; m++) sum[m] += weights[m * BLOCK + j] * value;
    }
    for (int m = 0; m < M; m++) save(sums + m * MOST_HEAD + d, sum[m]);
  }
}

template <template <int> class F, typename... A> void tiled(int count, A... arguments) {
  int done = 0;
  for (; count - done >= 6; done += 6) F<6>::run(done, arguments...);
  for (; count - done >= 3; done += 3) F<3>::run(done, arguments...);
  for (; done < count; done++) F<1>::run(done, arguments...);
}
template <int M> struct Score {
  static void run(int at, const float *query, const float *keys, int64_t size, Vec *scores) {
    score<M>(query + at * MOST_HEAD, keys, size, scores + at);
  }
};
template <int M> struct Gather {
  static void run(int at, const float *weights, const float *fade, const float *values, int64_t size, int count,
                  float *sums) {
    gather<M>(weights + at * BLOCK, fade + at, values, size, count, sums + at * MOST_HEAD);
  }
};

template <typename T> void work(const Job<T> &job, const Span &span, const int32_t *table, const Piece &piece) {
  alignas(64) static thread_local float query[MOST_QUERIES * MOST_HEAD], sums[MOST_QUERIES * MOST_HEAD];
  alignas(64) static thread_local float keys[MOST_HEAD * BLOCK], values[MOST_HEAD * BLOCK];
  alignas(64) static thread_local float weights[MOST_QUERIES * BLOCK];
  alignas(64) static thread_local Vec scores[MOST_QUERIES];
  float highest[MOST_QUERIES], total[MOST_QUERIES], fade[MOST_QUERIES];
  const int64_t size = job.head_size, group = job.heads / job.kv_heads;
  const int count = int(piece.rows * group);
  const int64_t before = span.context - span.rows + piece.row; // position of the piece's first row
  for (int m = 0; m < count; m++) { // row by row, and of a row head by head
    int64_t row = span.first + piece.row + m / group, head = piece.kv_head * group + m % group;
    const T *from = job.query + head * job.query_head + row * job.query_row;
    for (int64_t d = 0; d < size; d++) query[m * MOST_HEAD + d] = to_float(from[d]) * job.scale;
    std::memset(sums + m * MOST_HEAD, 0, size * sizeof(float));
    highest[m] = -__builtin_inff();
    total[m] = 0.0f;
  }
  const int64_t end = before + piece.rows; // one past the last position that any row of the piece sees
  int64_t begin = job.window && before + 1 > job.window ? before + 1 - job.window : 0;
  const Ints places = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t first = begin / BLOCK * BLOCK; first < end; first += BLOCK) {
    int64_t base = (int64_t(table[first / BLOCK]) * job.kv_heads + piece.kv_head) * size * BLOCK;
    for (int64_t i = 0; i < size * BLOCK; i += BLOCK) {
      save(keys + i, load(job.key_pool + base + i));
      save(values + i, load(job.value_pool + base + i));
    }
    tiled<Score>(count, (const float *)query, (const float *)keys, size, (Vec *)scores);
    for (int m = 0; m < count; m++) {
      int64_t position = before + m / group;
      int32_t high = int32_t(position + 1 - first < BLOCK ? position + 1 - first : BLOCK);
      int64_t low_at = job.window ? position + 1 - job.window - first : 0;
      int32_t low = int32_t(low_at > 0 ? (low_at < BLOCK ? low_at : BLOCK) : 0);
      if (high <= low) { // nothing of this block is for this row
        std::memset(weights + m * BLOCK, 0, BLOCK * sizeof(float));
        fade[m] = 1.0f;
        continue;
      }
      Vec s = scores[m];
      if (job.softcap != 0.0f) s = tanh_of(s / job.softcap) * job.softcap;
      s = (places >= high) | (places < low) ? splat(-__builtin_inff()) : s;
      float top = highest[m];
      for (int j = 0; j < BLOCK; j++) top = s[j] > top ? s[j] : top;
      Vec weight = exp_of(s - top);
      weight = (places >= high) | (places < low) ? splat(0.0f) : weight;
      float sum = 0.0f;
      for (int j = 0; j < BLOCK; j++) sum += weight[j];
      fade[m] = total[m] == 0.0f ? 0.0f : exp_of(splat(highest[m] - top))[0];
      total[m] = total[m] * fade[m] + sum;
      highest[m] = top;
      save(weights + m * BLOCK, weight);
    }
    int seen = int(end - first < BLOCK ? end - first : BLOCK);
    tiled<Gather>(count, (const float *)weights, (const float *)fade, (const float *)values, size, seen, (float *)sums);
  }
  for (int m = 0; m < count; m++) {
    int64_t row = span.first + piece.row + m / group, head = piece.kv_head * group + m % group;
    T *into = job.out + (row * job.heads + head) * size;
    float share = 1.0f / total[m];
    for (int64_t d = 0; d < size; d++) from_float(sums[m * MOST_HEAD + d] * share, into + d);
  }
}

template <typename T>
void attend(const Job<T> &job, int64_t tokens, const int64_t *slots, const Span *spans, const int32_t *tables,
            int64_t count, const Piece *pieces) {
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < tokens; row++) store(job, row, slots[row]);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) {
      const Span &span = spans[pieces[i].span];
      work(job, span, tables + span.table, pieces[i]);
    }
  }
}

} // namespace

extern "C" {

struct Arguments {
  void *query, *keys, *values, *key_pool, *value_pool, *out;
  int64_t query_head, query_row, key_head, key_row, value_head, value_row;
  int64_t heads, kv_heads, head_size, window;
  double scale, softcap;
  int64_t tokens, pieces;
  const int64_t *slots;
  const Span *spans;
  const int32_t *tables;
  const Piece *work;
};

void attend_float(const Arguments *a) {
  Job<float> job{(const float *)a->query, (const float *)a->keys, (const float *)a->values, (float *)a->key_pool,
                 (float *)a->value_pool, (float *)a->out, a->query_head, a->query_row, a->key_head, a->key_row,
                 a->value_head, a->value_row, a->heads, a->kv_heads, a->head_size, float(a->scale), float(a->softcap),
                 a->window};
  attend(job, a->tokens, a->slots, a->spans, a->tables, a->pieces, a->work);
}

void attend_bfloat16(const Arguments *a) {
  Job<Bf16> job{(const Bf16 *)a->query, (const Bf16 *)a->keys, (const Bf16 *)a->values, (Bf16 *)a->key_pool,
                (Bf16 *)a->value_pool, (Bf16 *)a->out, a->query_head, a->query_row, a->key_head, a->key_row,
                a->value_head, a->value_row, a->heads, a->kv_heads, a->head_size, float(a->scale), float(a->softcap),
                a->window};
  attend(job, a->tokens, a->slots, a->spans, a->tables, a->pieces, a->work);
}

} // extern "C"
