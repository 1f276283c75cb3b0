// Attention of one query row in bfloat16, with the order of additions of torch's kernel for one row (flash attention on
// a CPU with AVX512-BF16): keys in blocks of 512, a running maximum, weights rounded to bfloat16, sums in an `Order`. Query
// heads that share keys, and rows, go through the keys together. Each row sees its own keys, and reads no others; where it has
// a window, its blocks begin with the first key of that.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "keys.h"
#include "numbers.h"

namespace {

constexpr int BLOCK = 512;        // keys that are weighed together
constexpr int HEADS = 4;          // query heads that go through the keys together,
constexpr int ROWS_TOGETHER = 4;  // and rows
constexpr int MAX_SIZE = 256;     // of a head

// Scores of H queries with 16 keys side by side, as 16 sums of every 16th pair: these are added eight apart, then neighbours.
template <int H>
void spread(const Attention& a, const float (*query)[MAX_SIZE], const float (*keys)[LANES], __m512 (*sum)[4]) {
  const int64_t pairs = a.size / 2;
  for (int i = 0; i < 8; i++) {
    __m512 low[H], high[H];
    for (int h = 0; h < H; h++) low[h] = high[h] = _mm512_setzero_ps();
    auto add = [&](int64_t first, __m512* into) {
      for (int64_t pair = first; pair < pairs; pair += LANES) {
        const __m512bh words = (__m512bh)_mm512_load_ps(keys[pair]);
        for (int h = 0; h < H; h++) into[h] = _mm512_dpbf16_ps(into[h], words, (__m512bh)_mm512_set1_ps(query[h][pair]));
      }
    };
    add(i, low);
    add(i + 8, high);
    for (int h = 0; h < H; h++) {
      __m512 x = _mm512_add_ps(low[h], high[h]);
      if (i % 2) x = _mm512_add_ps(sum[h][1], x);
      if (i % 4 == 3) x = _mm512_add_ps(sum[h][2], x);
      if (i == 7) x = _mm512_add_ps(sum[h][3], x);
      sum[h][i == 7 ? 0 : i % 2 == 0 ? 1 : i % 4 == 1 ? 2 : 3] = x;
    }
  }
}

// A word's even number alone, or its odd one.
inline __m512bh half_of(float word, bool odd) {
  int bits;
  std::memcpy(&bits, &word, sizeof bits);
  return (__m512bh)_mm512_set1_epi32(odd ? bits & (int)0xffff0000 : bits & 0xffff);
}

// Scores of H queries with 16 keys side by side: pairs along the head in order, or four sums of every fourth number, or
// sixteen, or even and odd numbers of 32 apart.
template <int H, Order O>
void scores(const Attention& a, const float (*query)[MAX_SIZE], const float (*keys)[LANES], float (*into)[BLOCK]) {
  __m512 sum[H][4];
  for (int h = 0; h < H; h++)
    for (int i = 0; i < 4; i++) sum[h][i] = _mm512_setzero_ps();
  if (O == PAIRS) {
    for (int64_t pair = 0; pair < a.size / 2; pair++) {
      const __m512bh words = (__m512bh)_mm512_load_ps(keys[pair]);
      for (int h = 0; h < H; h++) sum[h][0] = _mm512_dpbf16_ps(sum[h][0], words, (__m512bh)_mm512_set1_ps(query[h][pair]));
    }
  } else if (O == EIGHTS) {
    spread<H>(a, query, keys, sum);
  } else if (O == TILES) {
    for (int64_t tile = 0; tile < a.size / 2; tile += LANES) {
      for (int h = 0; h < H; h++) sum[h][1] = sum[h][2] = _mm512_setzero_ps();
      for (int64_t pair = tile; pair < std::min(tile + LANES, a.size / 2); pair++) {
        const __m512bh words = (__m512bh)_mm512_load_ps(keys[pair]);
        for (int h = 0; h < H; h++)
          for (int odd = 0; odd < 2; odd++)
            sum[h][1 + odd] = _mm512_dpbf16_ps(sum[h][1 + odd], words, half_of(query[h][pair], odd));
      }
      for (int h = 0; h < H; h++) sum[h][0] = _mm512_add_ps(sum[h][0], _mm512_add_ps(sum[h][1], sum[h][2]));
    }
  } else {
    for (int64_t e = 0; e < a.size; e += 4)
      for (int i = 0; i < 4; i++) {
        const __m512 numbers = _mm512_load_ps(keys[e + i]);
        for (int h = 0; h < H; h++) sum[h][i] = _mm512_fmadd_ps(numbers, _mm512_set1_ps(query[h][e + i]), sum[h][i]);
      }
  }
  for (int h = 0; h < H; h++) {
    __m512* part = sum[h];
    if (O == FOURS) part[0] = _mm512_add_ps(_mm512_add_ps(part[0], part[2]), _mm512_add_ps(part[1], part[3]));
    _mm512_storeu_ps(into[h], _mm512_mul_ps(part[0], _mm512_set1_ps(a.scale)));
  }
}

// Scores to weights, in place: numbers rounded to bfloat16, or words of two; returns the sum of those that are not
// rounded. NaN among the scores makes `highest` NaN.
template <Order O>
float weigh(float* scores, int64_t count, float* highest) {
  const __m512 lowest = _mm512_set1_ps(-INFINITY);
  __m512 tops = lowest;
  __mmask16 nan = 0;
  for (int64_t i = 0; i < count; i += LANES) {
    const __m512 x = _mm512_mask_loadu_ps(lowest, first_of(count - i), scores + i);
    nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    tops = _mm512_max_ps(tops, x);
  }
  const float top = std::max(*highest, _mm512_reduce_max_ps(tops));
  *highest = nan ? NAN : top;
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const __m512 x = power(_mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(top)));
    sums[i / LANES % 2] = _mm512_add_ps(sums[i / LANES % 2], x);
    _mm512_storeu_ps(scores + i, x);
  }
  float sum = total(_mm512_add_ps(sums[0], sums[1]));
  for (; i < count; i++) sum += scores[i] = (float)std::exp((double)(scores[i] - top));  // as torch has it, in double
  for (int64_t j = 0; j < count; j += LANES) {
    const __m256i bits = convert(_mm512_maskz_loadu_ps(first_of(count - j), scores + j));
    if (O != FOURS)
      _mm256_storeu_si256((__m256i*)(scores + j / 2), bits);
    else
      _mm512_storeu_ps(scores + j, widen(bits));
  }
  return sum;
}

// Values of `count` keys by their weights, added to `result`: pairs of keys in order, or fours and the rest backwards, or
// pairs in order within eights, or even and odd keys of 32 apart.
// E vectors of the head at a time, so that sums do not wait for one another. Places as in `turn`.
template <int H, int E, Order O, bool APART>
void add_values(const Attention& a, const uint16_t* values, const int32_t* places, int64_t count,
                const float (*weights)[BLOCK], const float* fade, bool first, int64_t from, float (*result)[MAX_SIZE]) {
  __mmask16 mask[E];
  __m512 sum[H][E];
  for (int v = 0; v < E; v++) mask[v] = first_of(a.size - from - v * LANES);
  auto words = [&](int64_t i, int v) {
    const uint16_t* at = values + (APART ? places[i] : i) * a.value_row + from + v * LANES;
    if (v % 2 == 0 && !APART) fetch(at + AHEAD * a.value_row);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask[v], at));
  };
  for (int h = 0; h < H; h++)
    for (int v = 0; v < E; v++)
      sum[h][v] = first ? _mm512_setzero_ps()
                        : _mm512_mul_ps(_mm512_loadu_ps(result[h] + from + v * LANES), _mm512_set1_ps(fade[h]));
  auto two_of = [&](int64_t i, int64_t stop, int v) {
    const __m512i pair = words(i, v);
    return (__m512bh)(i + 1 < stop ? _mm512_or_si512(pair, _mm512_slli_epi32(words(i + 1, v), 16)) : pair);
  };
  auto add_pairs = [&](int64_t i, int64_t stop, __m512 (*into)[E]) {
    for (; i < stop; i += 2)
      for (int v = 0; v < E; v++) {
        const __m512bh pair = two_of(i, stop, v);
        for (int h = 0; h < H; h++)
          into[h][v] = _mm512_dpbf16_ps(into[h][v], pair, (__m512bh)_mm512_set1_ps(weights[h][i / 2]));
      }
  };
  if (O == PAIRS) {
    add_pairs(0, count, sum);
  } else if (O == EIGHTS) {
    for (int64_t eight = 0; eight < count; eight += 8) {
      __m512 part[H][E];
      for (int h = 0; h < H; h++)
        for (int v = 0; v < E; v++) part[h][v] = _mm512_setzero_ps();
      add_pairs(eight, std::min(eight + 8, count), part);
      for (int h = 0; h < H; h++)
        for (int v = 0; v < E; v++) sum[h][v] = _mm512_add_ps(sum[h][v], part[h][v]);
    }
  } else if (O == TILES) {
    for (int64_t tile = 0; tile < count; tile += 2 * LANES) {
      __m512 part[H][E][2];
      for (int h = 0; h < H; h++)
        for (int v = 0; v < E; v++) part[h][v][0] = part[h][v][1] = _mm512_setzero_ps();
      for (int64_t i = tile, stop = std::min(tile + 2 * LANES, count); i < stop; i += 2)
        for (int v = 0; v < E; v++) {
          const __m512bh pair = two_of(i, stop, v);
          for (int h = 0; h < H; h++)
            for (int odd = 0; odd < 2; odd++)
              part[h][v][odd] = _mm512_dpbf16_ps(part[h][v][odd], pair, half_of(weights[h][i / 2], odd));
        }
      for (int h = 0; h < H; h++)
        for (int v = 0; v < E; v++) sum[h][v] = _mm512_add_ps(sum[h][v], _mm512_add_ps(part[h][v][0], part[h][v][1]));
    }
  } else {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
      for (int v = 0; v < E; v++) {
        const __m512 one = low(words(i, v)), two = low(words(i + 1, v)), three = low(words(i + 2, v)), four = low(words(i + 3, v));
        for (int h = 0; h < H; h++) {
          const float* own = weights[h] + i;
          const __m512 even = _mm512_fmadd_ps(three, _mm512_set1_ps(own[2]), _mm512_mul_ps(one, _mm512_set1_ps(own[0])));
          const __m512 odd = _mm512_fmadd_ps(four, _mm512_set1_ps(own[3]), _mm512_mul_ps(two, _mm512_set1_ps(own[1])));
          sum[h][v] = _mm512_add_ps(sum[h][v], _mm512_add_ps(even, odd));
        }
      }
    for (int64_t rest = count - 1; rest >= i; rest--)
      for (int v = 0; v < E; v++)
        for (int h = 0; h < H; h++)
          sum[h][v] = _mm512_fmadd_ps(low(words(rest, v)), _mm512_set1_ps(weights[h][rest]), sum[h][v]);
  }
  for (int h = 0; h < H; h++)
    for (int v = 0; v < E; v++) _mm512_storeu_ps(result[h] + from + v * LANES, sum[h][v]);
}

// The whole head.
template <int H, Order O, bool APART>
void add_values_of(const Attention& a, const uint16_t* values, const int32_t* places, int64_t count,
                   const float (*weights)[BLOCK], const float* fade, bool first, float (*result)[MAX_SIZE]) {
  int64_t e = 0;
  for (; e + 2 * LANES <= a.size; e += 2 * LANES)
    add_values<H, 2, O, APART>(a, values, places, count, weights, fade, first, e, result);
  for (; e < a.size; e += LANES) add_values<H, 1, O, APART>(a, values, places, count, weights, fade, first, e, result);
}

// H query heads that share keys, from `head` on, of `rows` rows; whether all of it are numbers. The rows go through the
// keys together, each as far as it sees.
template <int H, Order O>
bool heads(const Attention& a, int64_t row, int64_t rows, int64_t head) {
  const uint16_t* keys = a.keys + head / a.shared * a.key_head;
  const uint16_t* values = a.values + head / a.shared * a.value_head;
  alignas(64) float query[ROWS_TOGETHER][H][MAX_SIZE], part[ROWS_TOGETHER][H][BLOCK], turned[MAX_SIZE][LANES];
  alignas(64) float result[ROWS_TOGETHER][H][MAX_SIZE];
  float highest[ROWS_TOGETHER][H], sum[ROWS_TOGETHER][H] = {};
  int32_t places[ROWS_TOGETHER][BLOCK];
  int64_t own[ROWS_TOGETHER], most = 0;  // keys that each of the rows sees
  for (int64_t r = 0; r < rows; r++) {
    own[r] = seen(a, row + r);
    most = std::max(most, own[r]);
    for (int h = 0; h < H; h++) {
      const uint16_t* from = a.query + (head + h) * a.query_head + (row + r) * a.query_row;
      highest[r][h] = -INFINITY;
      if (O != FOURS)
        std::memcpy(query[r][h], from, a.size * sizeof *from);
      else
        for (int64_t e = 0; e < a.size; e += LANES)
          _mm512_storeu_ps(query[r][h] + e, widen(_mm256_maskz_loadu_epi16(first_of(a.size - e), from + e)));
    }
  }
  for (int64_t first = 0; first < most; first += BLOCK) {
    const int64_t all = std::min<int64_t>(BLOCK, most - first);
    const bool apart = a.paths && first + all > a.settled;  // some keys of this block are not those of all rows
    for (int64_t r = 0; apart && r < rows; r++) find(a, row + r, first, std::min(all, own[r] - first), places[r]);
    for (int64_t key = 0; key < all; key += LANES) {
      const bool shared = !apart || first + key + LANES <= a.settled;
      if (shared) turn<O, false>(a, keys + (first + key) * a.key_row, nullptr, all - key, turned);
      for (int64_t r = 0; r < rows; r++) {
        const int64_t left = std::min(all, own[r] - first) - key;
        if (!shared && left <= 0) continue;
        if (!shared) turn<O, true>(a, keys, places[r] + key, left, turned);
        scores<H, O>(a, query[r], turned, (float(*)[BLOCK])(part[r][0] + key));
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      const int64_t count = std::min<int64_t>(BLOCK, own[r] - first);
      if (count <= 0) continue;
      float fade[H];
      for (int h = 0; h < H; h++) {
        const float earlier = highest[r][h];
        const float added = weigh<O>(part[r][h], count, &highest[r][h]);
        fade[h] = std::exp(earlier - highest[r][h]);
        sum[r][h] = std::fma(fade[h], sum[r][h], added);
        if (!std::isfinite(highest[r][h])) return false;
      }
      if (apart)
        add_values_of<H, O, true>(a, values, places[r], count, part[r], fade, first == 0, result[r]);
      else
        add_values_of<H, O, false>(a, values + first * a.value_row, nullptr, count, part[r], fade, first == 0, result[r]);
    }
  }
  for (int64_t r = 0; r < rows; r++)
    for (int h = 0; h < H; h++) {
      const __m512 scale = _mm512_set1_ps(1.0f / sum[r][h]);
      uint16_t* into = a.output + ((row + r) * a.queries + head + h) * a.size;
      for (int64_t e = 0; e < a.size; e += LANES)
        _mm256_mask_storeu_epi16(into + e, first_of(a.size - e), convert(_mm512_mul_ps(_mm512_loadu_ps(result[r][h] + e), scale)));
    }
  return true;
}

// Rows of one request that go through the keys together: one, where some fill their windows.
inline int64_t together(const Attention& a) { return a.length >= a.window ? 1 : ROWS_TOGETHER; }

// Calls of `heads` that the rows of one request take.
inline int64_t tasks_of(const Attention& a) {
  const int64_t chunks = (a.rows + together(a) - 1) / together(a);
  return chunks * (a.queries / a.shared) * ((a.shared + HEADS - 1) / HEADS);
}

// As `heads`, of up to `HEADS` of them.
template <Order O>
bool some_heads(const Attention& a, int64_t row, int64_t rows, int64_t head, int64_t count) {
  switch (count) {
    case 1: return heads<1, O>(a, row, rows, head);
    case 2: return heads<2, O>(a, row, rows, head);
    case 3: return heads<3, O>(a, row, rows, head);
    default: return heads<4, O>(a, row, rows, head);
  }
}

inline bool some_heads(int64_t order, const Attention& a, int64_t row, int64_t rows, int64_t head, int64_t count) {
  switch (order) {
    case PAIRS: return some_heads<PAIRS>(a, row, rows, head, count);
    case FOURS: return some_heads<FOURS>(a, row, rows, head, count);
    case EIGHTS: return some_heads<EIGHTS>(a, row, rows, head, count);
    default: return some_heads<TILES>(a, row, rows, head, count);
  }
}

// Every row and query head of several requests; called by every thread of a team, which waits for all at the end.
// `numbers` becomes false where some score is no finite number: nothing is promised then.
inline void attend(const Attention* all, int64_t count, int64_t order, std::atomic<bool>& numbers) {
  int64_t tasks = 0;
  for (int64_t i = 0; i < count; i++) tasks += tasks_of(all[i]);
#pragma omp for schedule(static)
  for (int64_t each = 0; each < tasks; each++) {
    int64_t task = each, request = 0;
    while (task >= tasks_of(all[request])) task -= tasks_of(all[request++]);
    const Attention& a = all[request];
    const int64_t parts = (a.shared + HEADS - 1) / HEADS, groups = a.queries / a.shared;
    const int64_t row = task / (groups * parts) * together(a), part = task % parts;
    const int64_t rows = std::min(together(a), a.rows - row);
    const int64_t head = task / parts % groups * a.shared + part * HEADS;
    const int64_t own = seen(a, row) < a.window ? order : a.filled;
    if (!some_heads(own, in_window(a, row), row, rows, head, std::min<int64_t>(HEADS, a.shared - part * HEADS))) numbers = false;
  }
}

}  // namespace
