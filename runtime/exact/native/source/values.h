// Values of keys by their weights, added up in an `Order`.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "keys.h"
#include "numbers.h"
#include "scores.h"

namespace {

// Keys `start` to `stop` of N rows of weights, E vectors of the head from `from` on. Pairs of keys in order, or fours and the
// rest backwards, or pairs in order within eights, or even and odd keys of 32 apart, or one by one, all keys of a block of
// 512 at once; `start` begins one of each. Apart, values stand at `places`.
template <int N, int E, Order O, bool APART>
struct Values {
  const uint16_t* values;
  const int32_t* places;
  const int64_t row, stop, from;
  const float (*weights)[BLOCK];
  __mmask16 mask[E];

  Values(const Attention& a, const uint16_t* values, const int32_t* places, int64_t stop, int64_t from, const float (*weights)[BLOCK])
      : values(values), places(places), row(a.value_row), stop(stop), from(from), weights(weights) {
    for (int v = 0; v < E; v++) mask[v] = first_of(a.size - from - v * LANES);
  }

  __m512i words(int64_t key, int v) const {
    const uint16_t* at = values + (APART ? places[key] : key) * row + from + v * LANES;
    if (v % 2 == 0 && !APART) fetch(at + AHEAD * row);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask[v], at));
  }

  __m512 numbers(int64_t key, int v) const { return low(words(key, v)); }

  void add_one(int64_t key, __m512 (*part)[E]) const {
    __m512 own[E];
    for (int v = 0; v < E; v++) own[v] = numbers(key, v);
    for (int n = 0; n < N; n++) {
      const __m512 times = weight(n, key);
      for (int v = 0; v < E; v++) part[n][v] = _mm512_fmadd_ps(own[v], times, part[n][v]);
    }
  }

  __m512 weight(int n, int64_t key) const { return _mm512_set1_ps(weights[n][key]); }

  void by_words(int64_t start, __m512 (*sum)[E]) const {
    for (int64_t i = start; i < stop; i += 2)
      for (int v = 0; v < E; v++) {
        __m512i pair = words(i, v);
        if (i + 1 < stop) pair = _mm512_or_si512(pair, _mm512_slli_epi32(words(i + 1, v), 16));
        for (int n = 0; n < N; n++) sum[n][v] = _mm512_dpbf16_ps(sum[n][v], (__m512bh)pair, (__m512bh)weight(n, i / 2));
      }
  }

  void by_eights(int64_t start, __m512 (*sum)[E]) const {
    for (int64_t eight = start; eight < stop; eight += 8) {
      __m512 part[N][E];
      for (int n = 0; n < N; n++)
        for (int v = 0; v < E; v++) part[n][v] = _mm512_setzero_ps();
      const int64_t count = std::min<int64_t>(8, stop - eight);
      for (int64_t i = 0; i < 8; i++) {
        const int64_t key = i ^ 1;  // of a pair, the second first
        if (key < count) add_one(eight + key, part);
      }
      for (int n = 0; n < N; n++)
        for (int v = 0; v < E; v++) sum[n][v] = _mm512_add_ps(sum[n][v], part[n][v]);
    }
  }

  void by_tiles(int64_t start, __m512 (*sum)[E]) const {
    for (int64_t tile = start; tile < stop; tile += 2 * LANES) {
      __m512 part[2][N][E];
      for (int n = 0; n < N; n++)
        for (int v = 0; v < E; v++) part[0][n][v] = part[1][n][v] = _mm512_setzero_ps();
      for (int64_t key = tile; key < std::min(tile + 2 * LANES, stop); key++)
        for (int v = 0; v < E; v++) {
          const __m512 own = numbers(key, v);
          for (int n = 0; n < N; n++) part[key % 2][n][v] = _mm512_fmadd_ps(own, weight(n, key), part[key % 2][n][v]);
        }
      for (int n = 0; n < N; n++)
        for (int v = 0; v < E; v++) sum[n][v] = _mm512_add_ps(sum[n][v], _mm512_add_ps(part[0][n][v], part[1][n][v]));
    }
  }

  void by_ones(int64_t start, __m512 (*sum)[E]) const {
    const int64_t block = summed_apart(stop - start);
    for (int64_t key = start; key < stop; key += block) {
      __m512 part[N][E];
      for (int n = 0; n < N; n++)
        for (int v = 0; v < E; v++) part[n][v] = _mm512_setzero_ps();
      for (int64_t i = key; i < std::min(key + block, stop); i++) add_one(i, part);
      for (int n = 0; n < N; n++)
        for (int v = 0; v < E; v++) sum[n][v] = _mm512_add_ps(sum[n][v], part[n][v]);
    }
  }

  void by_fours(int64_t start, __m512 (*sum)[E]) const {
    int64_t i = start;
    for (; i + 4 <= stop; i += 4)
      for (int v = 0; v < E; v++) {
        const __m512 one = numbers(i, v), two = numbers(i + 1, v), three = numbers(i + 2, v), four = numbers(i + 3, v);
        for (int n = 0; n < N; n++) {
          const __m512 even = _mm512_fmadd_ps(three, weight(n, i + 2), _mm512_mul_ps(one, weight(n, i)));
          const __m512 odd = _mm512_fmadd_ps(four, weight(n, i + 3), _mm512_mul_ps(two, weight(n, i + 1)));
          sum[n][v] = _mm512_add_ps(sum[n][v], _mm512_add_ps(even, odd));
        }
      }
    for (int64_t rest = stop - 1; rest >= i; rest--)
      for (int v = 0; v < E; v++)
        for (int n = 0; n < N; n++) sum[n][v] = _mm512_fmadd_ps(numbers(rest, v), weight(n, rest), sum[n][v]);
  }

  __attribute__((noinline)) void add(int64_t start, float (*result)[MAX_SIZE]) const {
    __m512 sum[N][E];
    for (int n = 0; n < N; n++)
      for (int v = 0; v < E; v++) sum[n][v] = _mm512_load_ps(result[n] + from + v * LANES);
    if (O == PAIRS) by_words(start, sum);
    if (O == FOURS) by_fours(start, sum);
    if (O == EIGHTS) by_eights(start, sum);
    if (O == TILES) by_tiles(start, sum);
    if (O == ONES) by_ones(start, sum);
    for (int n = 0; n < N; n++)
      for (int v = 0; v < E; v++) _mm512_store_ps(result[n] + from + v * LANES, sum[n][v]);
  }
};

// The whole head: two vectors at a time where there are registers for all sums.
template <int N, Order O, bool APART>
void add_values(const Attention& a, const uint16_t* values, const int32_t* places, int64_t start, int64_t stop,
                const float (*weights)[BLOCK], float (*result)[MAX_SIZE]) {
  constexpr int TWO = O == TILES && N > 6 ? 1 : 2;
  int64_t from = 0;
  for (; from + TWO * LANES <= a.size; from += TWO * LANES)
    Values<N, TWO, O, APART>(a, values, places, stop, from, weights).add(start, result);
  for (; from < a.size; from += LANES) Values<N, 1, O, APART>(a, values, places, stop, from, weights).add(start, result);
}

}  // namespace
