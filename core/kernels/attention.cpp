// Attention over paged keys and values, for processors. Each query row is computed by itself, over its own context and
// block by block in one fixed order, so what it says does not depend on who shares the step nor on how it was sliced.
// Online softmax after Milakov and Gimelshein (arXiv:1805.02867), blocks after vLLM's PagedAttention (arXiv:2309.06180).
//
// A block holds BLOCK tokens: keys [kv_heads][head_size][BLOCK], so that BLOCK scores are one vector, and values
// [kv_heads][BLOCK][head_size].
#include "calls.h"
#include "pool.h"
#include "vectors.h"

namespace {

constexpr int BLOCK = 16;
constexpr int MOST_HEAD = 256;    // head_size
constexpr int MOST_QUERIES = 48;  // of one piece of work
constexpr int CHUNK = 16 * BLOCK; // positions whose scores are softened together
constexpr int TILE = 6;           // queries whose sums fit the registers

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

// Scores of M queries against one block, one vector each. Even and odd dimensions are summed apart: their chains overlap.
template <int M, typename K> void score(const float *query, const K *keys, int64_t size, float *scores) {
  Vec even[M], odd[M];
  for (int m = 0; m < M; m++) even[m] = odd[m] = splat(0.0f);
  for (int64_t d = 0; d < size; d += 2) {
    Vec first = load(keys + d * BLOCK), second = load(keys + (d + 1) * BLOCK);
    for (int m = 0; m < M; m++) {
      even[m] += query[m * MOST_HEAD + d] * first;
      odd[m] += query[m * MOST_HEAD + d + 1] * second;
    }
  }
  for (int m = 0; m < M; m++) save(scores + m * CHUNK, even[m] + odd[m]);
}

// What M queries gather from the first count values of one block.
template <int M, typename V> void gather(const float *weights, const V *values, int64_t size, int count, float *sums) {
  for (int64_t d = 0; d < size; d += LANES) {
    Vec sum[M];
    for (int m = 0; m < M; m++) sum[m] = load(sums + m * MOST_HEAD + d);
    for (int j = 0; j < count; j++) {
      Vec value = load(values + j * size + d);
      for (int m = 0; m < M; m++) sum[m] += weights[m * CHUNK + j] * value;
    }
    for (int m = 0; m < M; m++) save(sums + m * MOST_HEAD + d, sum[m]);
  }
}

template <typename K> void score_all(int count, const float *query, const K *keys, int64_t size, float *scores) {
  constexpr decltype(&score<1, K>) tiles[] = {nullptr,     score<1, K>, score<2, K>, score<3, K>,
                                              score<4, K>, score<5, K>, score<6, K>};
  for (int m = 0; m < count; m += TILE)
    tiles[count - m < TILE ? count - m : TILE](query + m * MOST_HEAD, keys, size, scores + m * CHUNK);
}

template <typename V>
void gather_all(int count, const float *weights, const V *values, int64_t size, int seen, float *sums) {
  constexpr decltype(&gather<1, V>) tiles[] = {nullptr,      gather<1, V>, gather<2, V>, gather<3, V>,
                                               gather<4, V>, gather<5, V>, gather<6, V>};
  for (int m = 0; m < count; m += TILE)
    tiles[count - m < TILE ? count - m : TILE](weights + m * CHUNK, values, size, seen, sums + m * MOST_HEAD);
}

// One block's keys or values in float32, which pays where many queries read them.
template <typename T> const float *widen(const T *from, int64_t count, float *into) {
  for (int64_t i = 0; i < count; i += LANES) save(into + i, load(from + i));
  return into;
}
inline const float *widen(const float *from, int64_t, float *) { return from; }

inline void fetch(const void *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i);
}

// Of one query: its scores of a chunk → weights, of which only [low, high) are any; how much its sums fade, by what its
// highest score rose.
float soften(float *scores, int32_t begin, int32_t end, int32_t low, int32_t high, float softcap, float &highest,
             float &total) {
  const Ints places = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec nothing = splat(-__builtin_inff());
  Vec tops = nothing, sums = splat(0.0f);
  for (int32_t at = begin; at < end; at += BLOCK) {
    Vec s = load(scores + at);
    if (softcap != 0.0f) s = tanh_of(s / softcap) * softcap;
    s = (places + at >= high) | (places + at < low) ? nothing : s;
    tops = s > tops ? s : tops;
    save(scores + at, s);
  }
  float top = highest;
  for (int j = 0; j < LANES; j++) top = tops[j] > top ? tops[j] : top;
  for (int32_t at = begin; at < end; at += BLOCK) {
    Vec s = load(scores + at), weight = s == nothing ? splat(0.0f) : exp_of(s - top);
    sums += weight;
    save(scores + at, weight);
  }
  float sum = 0.0f;
  for (int j = 0; j < LANES; j++) sum += sums[j];
  const float fade = total == 0.0f ? 0.0f : exp_of(splat(highest - top))[0];
  total = total * fade + sum;
  highest = top;
  return fade;
}

template <typename T> void work(const Job<T> &job, const Span &span, const int32_t *table, const Piece &piece) {
  alignas(64) static thread_local float query[MOST_QUERIES * MOST_HEAD], sums[MOST_QUERIES * MOST_HEAD];
  alignas(64) static thread_local float scores[MOST_QUERIES * CHUNK], wide[MOST_HEAD * BLOCK];
  float highest[MOST_QUERIES], total[MOST_QUERIES];
  const int64_t size = job.head_size, group = job.heads / job.kv_heads;
  const int count = int(piece.rows * group);
  const int64_t before = span.context - span.rows + piece.row; // position of the piece's first row
  for (int m = 0; m < count; m++) { // row by row, and of a row head by head
    int64_t row = span.first + piece.row + m / group, head = piece.kv_head * group + m % group;
    const T *from = job.query + head * job.query_head + row * job.query_row;
    for (int64_t d = 0; d < size; d += LANES) save(query + m * MOST_HEAD + d, load(from + d) * job.scale);
    std::memset(sums + m * MOST_HEAD, 0, size * sizeof(float));
    highest[m] = -__builtin_inff();
    total[m] = 0.0f;
  }
  const int64_t end = before + piece.rows; // one past the last position that any row of the piece sees
  const int64_t begin = job.window && before + 1 > job.window ? (before + 1 - job.window) / BLOCK * BLOCK : 0;
  const bool few = count <= TILE;
  auto place = [&](int64_t at) { return (int64_t(table[at / BLOCK]) * job.kv_heads + piece.kv_head) * size * BLOCK; };
  for (int64_t chunk = begin / CHUNK * CHUNK; chunk < end; chunk += CHUNK) { // of all pieces at the same positions
    const int64_t first = begin > chunk ? begin : chunk, last = end < chunk + CHUNK ? end : chunk + CHUNK;
    for (int64_t at = first; at < last; at += BLOCK) {
      const T *keys = job.key_pool + place(at);
      if (few) {
        fetch(job.value_pool + place(at), size * BLOCK * sizeof(T));
        if (at + BLOCK < end) fetch(job.key_pool + place(at + BLOCK), size * BLOCK * sizeof(T));
        score_all(count, query, keys, size, scores + (at - chunk));
      } else {
        score_all(count, query, widen(keys, size * BLOCK, wide), size, scores + (at - chunk));
      }
    }
    for (int m = 0; m < count; m++) {
      const int64_t position = before + m / group, low = job.window ? position + 1 - job.window : 0;
      if (position < first || low >= last) { // nothing of this chunk is for this row
        std::memset(scores + m * CHUNK, 0, CHUNK * sizeof(float));
        continue;
      }
      const float fade =
          soften(scores + m * CHUNK, int32_t(first - chunk), int32_t(last - chunk), int32_t(low - chunk),
                 int32_t(position + 1 - chunk), job.softcap, highest[m], total[m]);
      for (int64_t d = 0; d < size; d += LANES)
        save(sums + m * MOST_HEAD + d, load(sums + m * MOST_HEAD + d) * fade);
    }
    for (int64_t at = first; at < last; at += BLOCK) {
      const T *values = job.value_pool + place(at);
      const int seen = int(last - at < BLOCK ? last - at : BLOCK);
      if (few)
        gather_all(count, scores + (at - chunk), values, size, seen, sums);
      else
        gather_all(count, scores + (at - chunk), widen(values, size * BLOCK, wide), size, seen, sums);
    }
  }
  for (int m = 0; m < count; m++) {
    int64_t row = span.first + piece.row + m / group, head = piece.kv_head * group + m % group;
    T *into = job.out + (row * job.heads + head) * size;
    float share = 1.0f / total[m];
    for (int64_t d = 0; d < size; d += LANES) save(into + d, load(sums + m * MOST_HEAD + d) * share);
  }
}

// What is the same in all layers of a pass, as core.attention.Pass has it.
struct Layout {
  int64_t tokens, pieces;
  const int64_t *slots; // [tokens]
  const Span *spans;
  const int32_t *tables;
  const Piece *work; // [pieces]
};

// query, keys, values, key pool, value pool, out, strides (query's of a head and of a row, keys', values'), heads, kv_heads,
// head_size, window, scale, softcap, layout, threads
template <typename T> void attend(const Word *w) {
  const Job<T> job{w[0].at<const T>(),   w[1].at<const T>(), w[2].at<const T>(), w[3].at<T>(),  w[4].at<T>(),
                   w[5].at<T>(),         w[6].number,        w[7].number,        w[8].number,   w[9].number,
                   w[10].number,         w[11].number,       w[12].number,       w[13].number,  w[14].number,
                   float(w[16].real),    float(w[17].real),  w[15].number};
  const Layout &layout = *w[18].at<const Layout>();
  const int64_t numbers = layout.tokens * job.kv_heads * job.head_size, threads = w[19].number;
  share(numbers > FEW ? threads : 1, layout.tokens, [&](int64_t row) { store(job, row, layout.slots[row]); });
  share(threads, layout.pieces, [&](int64_t i) {
    const Span &span = layout.spans[layout.work[i].span];
    work(job, span, layout.tables + span.table, layout.work[i]);
  });
}

} // namespace

extern "C" {
void attend_float(const Word *w) { attend<float>(w); }
void attend_bfloat16(const Word *w) { attend<Bf16>(w); }
}
