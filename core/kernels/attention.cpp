// Attention over paged keys and values, for processors. Each query row is computed by itself, over its own context and
// block by block in one fixed order, so what it says does not depend on who shares the step nor on how it was sliced.
// Online softmax after Milakov and Gimelshein (arXiv:1805.02867), blocks after vLLM's PagedAttention (arXiv:2309.06180).
//
// A block holds BLOCK tokens, a part for each key-value head. How numbers lie in it is the business of a Kind:
//
//   Plain   keys [head_size][BLOCK], so that BLOCK scores are one vector; values [BLOCK][head_size]
//   Eight   int8 as VPDPBUSD takes it: keys [head_size / 4][BLOCK][4], moved up by 128, values [BLOCK / 4][head_size][4];
//           behind each what one of it is worth, float32 [BLOCK]. What they meet has sixteen bits: two products of eight.
#include "calls.h"
#include "pool.h"
#include "vectors.h"

#include <type_traits>
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace {

constexpr int BLOCK = 16;
constexpr int MOST_HEAD = 256;    // head_size
constexpr int MOST_QUERIES = 48;  // of one piece of work
constexpr int CHUNK = 16 * BLOCK; // positions whose scores are softened together
constexpr int TILE = 6;           // queries whose sums fit the registers

inline void fetch(const void *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i);
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
  char *key_pool;      // [blocks][kv_heads], a part of a block each
  char *value_pool;
  T *out;              // [tokens][heads][head_size]
  int64_t query_head, query_row, key_head, key_row, value_head, value_row; // strides in elements
  int64_t heads, kv_heads, head_size;
  float scale, softcap; // softcap 0: none
  int64_t window;       // 0: none
};

struct Span { int32_t first, rows, context, table; };   // as core.batch lays them out
struct Piece { int32_t span, row, rows, kv_head; };      // one thread's piece of work

// Calls f(std::integral_constant<int, M>, first query) for all queries, M of them at a time.
template <typename F> void tiles(int count, F f) {
  for (int m = 0; m < count; m += TILE) switch (count - m) {
    case 1: f(std::integral_constant<int, 1>(), m); break;
    case 2: f(std::integral_constant<int, 2>(), m); break;
    case 3: f(std::integral_constant<int, 3>(), m); break;
    case 4: f(std::integral_constant<int, 4>(), m); break;
    case 5: f(std::integral_constant<int, 5>(), m); break;
    default: f(std::integral_constant<int, TILE>(), m);
  }
}

template <typename T> struct Plain {
  typedef T Number;
  alignas(64) float query[MOST_QUERIES * MOST_HEAD], wide[MOST_HEAD * BLOCK];
  static int64_t bytes(int64_t size) { return size * BLOCK * sizeof(T); }

  static void store(const T *key, const T *value, int64_t size, int64_t place, char *keys, char *values) {
    for (int64_t d = 0; d < size; d++) ((T *)keys)[d * BLOCK + place] = key[d];
    std::memcpy((T *)values + place * size, value, size * sizeof(T));
  }

  void ask(int m, const T *from, int64_t size, float scale) {
    for (int64_t d = 0; d < size; d += LANES) save(query + m * MOST_HEAD + d, load(from + d) * scale);
  }

  // Scores of all queries against one block. Even and odd dimensions are summed apart: their chains overlap.
  void score(int count, const char *block, int64_t size, float *scores) {
    auto one = [&](auto *keys) {
      tiles(count, [&](auto M, int first) {
        Vec even[M], odd[M];
        for (int m = 0; m < M; m++) even[m] = odd[m] = splat(0.0f);
        for (int64_t d = 0; d < size; d += 2) {
          Vec here = load(keys + d * BLOCK), next = load(keys + (d + 1) * BLOCK);
          for (int m = 0; m < M; m++) {
            even[m] += query[(first + m) * MOST_HEAD + d] * here;
            odd[m] += query[(first + m) * MOST_HEAD + d + 1] * next;
          }
        }
        for (int m = 0; m < M; m++) save(scores + (first + m) * CHUNK, even[m] + odd[m]);
      });
    };
    count > TILE ? one(widen((const T *)block, size * BLOCK)) : one((const T *)block);
  }

  // What all queries gather from a chunk's blocks, of which [first, last) is seen.
  template <typename At>
  void gather(int count, const float *weights, int64_t first, int64_t last, At block, int64_t size, float *sums) {
    for (int64_t at = first; at < last; at += BLOCK) {
      const int seen = int(last - at < BLOCK ? last - at : BLOCK);
      auto one = [&](auto *values) {
        tiles(count, [&](auto M, int start) {
          for (int64_t d = 0; d < size; d += LANES) {
            Vec sum[M];
            for (int m = 0; m < M; m++) sum[m] = load(sums + (start + m) * MOST_HEAD + d);
            for (int j = 0; j < seen; j++) {
              Vec value = load(values + j * size + d);
              for (int m = 0; m < M; m++) sum[m] += weights[(start + m) * CHUNK + at + j] * value;
            }
            for (int m = 0; m < M; m++) save(sums + (start + m) * MOST_HEAD + d, sum[m]);
          }
        });
      };
      count > TILE ? one(widen((const T *)block(at), size * BLOCK)) : one((const T *)block(at));
    }
  }

private:
  // In float32, which pays where many queries read them.
  const float *widen(const Bf16 *from, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) save(wide + i, load(from + i));
    return wide;
  }
  const float *widen(const float *from, int64_t) { return from; }
};

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
inline __m512i splat_word(const void *from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return _mm512_set1_epi32(word);
}

template <typename T> struct Eight {
  typedef T Number;
  static constexpr float WHOLE = 127.0f, MOST = 127.0f * 256.0f, ALL = 65535.0f;
  alignas(64) int8_t upper[MOST_QUERIES * MOST_HEAD], lower[MOST_QUERIES * MOST_HEAD]; // of queries
  alignas(64) uint8_t high[MOST_QUERIES * CHUNK], low[MOST_QUERIES * CHUNK];           // of weights
  int32_t from_upper[MOST_QUERIES], from_lower[MOST_QUERIES]; // less what 128 more in each key comes to
  float worth[MOST_QUERIES], share[MOST_QUERIES];
  static int64_t bytes(int64_t size) { return size * BLOCK + BLOCK * int64_t(sizeof(float)); }

  static float largest(const T *from, int64_t size) {
    Vec most = splat(0.0f);
    for (int64_t d = 0; d < size; d += LANES) {
      Vec x = load(from + d), distance = x < 0.0f ? -x : x;
      most = distance > most ? distance : most;
    }
    float top = 0.0f;
    for (int j = 0; j < LANES; j++) top = most[j] > top ? most[j] : top;
    return top;
  }
  static void round(const T *from, int64_t size, float by, int32_t *into) {
    for (int64_t d = 0; d < size; d += LANES)
      _mm512_storeu_si512(into + d, _mm512_cvtps_epi32((__m512)(load(from + d) * by))); // to the nearest
  }

  static void store(const T *key, const T *value, int64_t size, int64_t place, char *keys, char *values) {
    alignas(64) int32_t whole[MOST_HEAD];
    float top = largest(key, size);
    round(key, size, top > 0 ? WHOLE / top : 0.0f, whole);
    for (int64_t d = 0; d < size; d++) keys[d / 4 * 4 * BLOCK + place * 4 + d % 4] = char(whole[d] + 128);
    ((float *)(keys + size * BLOCK))[place] = top / WHOLE;
    top = largest(value, size);
    round(value, size, top > 0 ? WHOLE / top : 0.0f, whole);
    for (int64_t d = 0; d < size; d++) values[place / 4 * 4 * size + d * 4 + place % 4] = char(whole[d]);
    ((float *)(values + size * BLOCK))[place] = top / WHOLE;
  }

  void ask(int m, const T *from, int64_t size, float scale) {
    alignas(64) int32_t whole[MOST_HEAD];
    const float top = largest(from, size);
    round(from, size, top > 0 ? MOST / top : 0.0f, whole);
    int32_t uppers = 0, lowers = 0;
    for (int64_t d = 0; d < size; d++) {
      const int32_t rough = (whole[d] + 128) >> 8, rest = whole[d] - rough * 256;
      upper[m * MOST_HEAD + d] = int8_t(rough);
      lower[m * MOST_HEAD + d] = int8_t(rest);
      uppers += rough;
      lowers += rest;
    }
    from_upper[m] = -128 * uppers;
    from_lower[m] = -128 * lowers;
    worth[m] = scale * top / MOST;
  }

  static __m512i dot(__m512i sum, __m512i unsigned_, __m512i signed_) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_), "v"(signed_));
    return sum;
  }
  static __m512 both(__m512i upper, __m512i lower) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(upper), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(lower));
  }

  void score(int count, const char *keys, int64_t size, float *scores) {
    const __m512 of_keys = _mm512_loadu_ps(keys + size * BLOCK);
    tiles(count, [&](auto M, int first) {
      __m512i uppers[M], lowers[M];
      for (int m = 0; m < M; m++) {
        uppers[m] = _mm512_set1_epi32(from_upper[first + m]);
        lowers[m] = _mm512_set1_epi32(from_lower[first + m]);
      }
      for (int64_t d = 0; d < size; d += 4) {
        const __m512i line = _mm512_loadu_si512(keys + d * BLOCK);
        for (int m = 0; m < M; m++) {
          uppers[m] = dot(uppers[m], line, splat_word(upper + (first + m) * MOST_HEAD + d));
          lowers[m] = dot(lowers[m], line, splat_word(lower + (first + m) * MOST_HEAD + d));
        }
      }
      for (int m = 0; m < M; m++)
        _mm512_storeu_ps(scores + (first + m) * CHUNK, _mm512_mul_ps(_mm512_mul_ps(both(uppers[m], lowers[m]), of_keys),
                                                                     _mm512_set1_ps(worth[first + m])));
    });
  }

  template <typename At>
  void gather(int count, float *weights, int64_t first, int64_t last, At block, int64_t size, float *sums) {
    for (int m = 0; m < count; m++) { // a weight times what one of its value is worth, in sixteen bits
      float *of = weights + m * CHUNK;
      __m512 most = _mm512_setzero_ps();
      for (int64_t at = first; at < last; at += BLOCK) {
        const __m512 weight = _mm512_loadu_ps(of + at);
        // what has no weight may never have been written
        const __mmask16 any = _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_GT_OQ);
        const __m512 product = _mm512_maskz_mul_ps(any, weight, _mm512_loadu_ps(block(at) + size * BLOCK));
        most = _mm512_max_ps(most, product);
        _mm512_storeu_ps(of + at, product);
      }
      const float top = _mm512_reduce_max_ps(most);
      share[m] = top / ALL;
      const __m512 by = _mm512_set1_ps(top > 0 ? ALL / top : 0.0f);
      for (int64_t at = first; at < last; at += BLOCK) {
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(of + at), by));
        const __m512i whole = _mm512_min_epi32(rounded, _mm512_set1_epi32(int32_t(ALL)));
        const __m512i rest = _mm512_and_si512(whole, _mm512_set1_epi32(255));
        _mm_storeu_si128((__m128i *)(high + m * CHUNK + at), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
        _mm_storeu_si128((__m128i *)(low + m * CHUNK + at), _mm512_cvtepi32_epi8(rest));
      }
    }
    tiles(count, [&](auto M, int start) {
      for (int64_t d = 0; d < size; d += LANES) {
        __m512i highs[M], lows[M];
        for (int m = 0; m < M; m++) highs[m] = lows[m] = _mm512_setzero_si512();
        for (int64_t at = first; at < last; at += BLOCK) {
          const char *values = block(at) + d * 4;
          for (int64_t j = at; j < (last < at + BLOCK ? last : at + BLOCK); j += 4) {
            const __m512i four = _mm512_loadu_si512(values + (j - at) * size);
            for (int m = 0; m < M; m++) {
              highs[m] = dot(highs[m], splat_word(high + (start + m) * CHUNK + j), four);
              lows[m] = dot(lows[m], splat_word(low + (start + m) * CHUNK + j), four);
            }
          }
        }
        for (int m = 0; m < M; m++) {
          float *sum = sums + (start + m) * MOST_HEAD + d;
          const __m512 worth = _mm512_set1_ps(share[start + m]);
          _mm512_storeu_ps(sum, _mm512_fmadd_ps(both(highs[m], lows[m]), worth, _mm512_loadu_ps(sum)));
        }
      }
    });
  }
};
#endif

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

template <typename Kind> void store(const Job<typename Kind::Number> &job, int64_t row, int64_t slot) {
  const int64_t block = slot / BLOCK, place = slot % BLOCK, bytes = Kind::bytes(job.head_size);
  for (int64_t head = 0; head < job.kv_heads; head++) {
    const int64_t part = (block * job.kv_heads + head) * bytes;
    Kind::store(job.keys + head * job.key_head + row * job.key_row,
                job.values + head * job.value_head + row * job.value_row, job.head_size, place, job.key_pool + part,
                job.value_pool + part);
  }
}

template <typename Kind>
void work(const Job<typename Kind::Number> &job, const Span &span, const int32_t *table, const Piece &piece) {
  static thread_local Kind kind;
  alignas(64) static thread_local float sums[MOST_QUERIES * MOST_HEAD], scores[MOST_QUERIES * CHUNK];
  float highest[MOST_QUERIES], total[MOST_QUERIES];
  const int64_t size = job.head_size, group = job.heads / job.kv_heads, bytes = Kind::bytes(size);
  const int count = int(piece.rows * group);
  const int64_t before = span.context - span.rows + piece.row; // position of the piece's first row
  for (int m = 0; m < count; m++) { // row by row, and of a row head by head
    const int64_t row = span.first + piece.row + m / group, head = piece.kv_head * group + m % group;
    kind.ask(m, job.query + head * job.query_head + row * job.query_row, size, job.scale);
    std::memset(sums + m * MOST_HEAD, 0, size * sizeof(float));
    highest[m] = -__builtin_inff();
    total[m] = 0.0f;
  }
  const int64_t end = before + piece.rows; // one past the last position that any row of the piece sees
  const int64_t begin = job.window && before + 1 > job.window ? (before + 1 - job.window) / BLOCK * BLOCK : 0;
  auto part = [&](int64_t at) { return (int64_t(table[at / BLOCK]) * job.kv_heads + piece.kv_head) * bytes; };
  for (int64_t chunk = begin / CHUNK * CHUNK; chunk < end; chunk += CHUNK) { // of all pieces at the same positions
    const int64_t first = begin > chunk ? begin : chunk, last = end < chunk + CHUNK ? end : chunk + CHUNK;
    for (int64_t at = first; at < last; at += BLOCK) {
      fetch(job.value_pool + part(at), bytes);
      if (at + BLOCK < end) fetch(job.key_pool + part(at + BLOCK), bytes);
      kind.score(count, job.key_pool + part(at), size, scores + (at - chunk));
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
    kind.gather(count, scores, first - chunk, last - chunk,
                [&](int64_t at) { return (const char *)job.value_pool + part(chunk + at); }, size, sums);
  }
  for (int m = 0; m < count; m++) {
    const int64_t row = span.first + piece.row + m / group, head = piece.kv_head * group + m % group;
    typename Kind::Number *into = job.out + (row * job.heads + head) * size;
    const float share = 1.0f / total[m];
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
template <typename Kind> void attend(const Word *w) {
  typedef typename Kind::Number T;
  const Job<T> job{w[0].at<const T>(), w[1].at<const T>(), w[2].at<const T>(), w[3].at<char>(),    w[4].at<char>(),
                   w[5].at<T>(),       w[6].number,        w[7].number,        w[8].number,        w[9].number,
                   w[10].number,       w[11].number,       w[12].number,       w[13].number,       w[14].number,
                   float(w[16].real),  float(w[17].real),  w[15].number};
  const Layout &layout = *w[18].at<const Layout>();
  const int64_t numbers = layout.tokens * job.kv_heads * job.head_size, threads = w[19].number;
  share(numbers > FEW ? threads : 1, layout.tokens, [&](int64_t row) { store<Kind>(job, row, layout.slots[row]); });
  share(threads, layout.pieces, [&](int64_t i) {
    const Span &span = layout.spans[layout.work[i].span];
    work<Kind>(job, span, layout.tables + span.table, layout.work[i]);
  });
}

} // namespace

extern "C" {
void attend_float(const Word *w) { attend<Plain<float>>(w); }
void attend_bfloat16(const Word *w) { attend<Plain<Bf16>>(w); }
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
void attend_float_int8(const Word *w) { attend<Eight<float>>(w); }
void attend_bfloat16_int8(const Word *w) { attend<Eight<Bf16>>(w); }
#endif
}
