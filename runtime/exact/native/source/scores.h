// Scores of queries with 16 keys side by side, in an `Order`, and the weights that become of them.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "keys.h"
#include "numbers.h"

namespace {

constexpr int BLOCK = 512;     // keys that are weighed together
constexpr int MAX_SIZE = 256;  // of a head

// A pair added to N sums, as the CPU's instruction for pairs adds it.
template <int N>
void add_pair(const float (*query)[MAX_SIZE], const float (*keys)[LANES], int64_t pair, __m512* sums) {
  for (int64_t e = 2 * pair + 1; e >= 2 * pair; e--) {
    const __m512 numbers = _mm512_load_ps(keys[e]);
    for (int n = 0; n < N; n++) sums[n] = _mm512_fmadd_ps(numbers, _mm512_set1_ps(query[n][e]), sums[n]);
  }
}

// As 16 sums of every 16th pair: these are added eight apart, then neighbours.
template <int N>
void by_eights(int64_t pairs, const float (*query)[MAX_SIZE], const float (*keys)[LANES], __m512 (*sum)[4]) {
  for (int i = 0; i < 8; i++) {
    __m512 low[N], high[N];
    for (int n = 0; n < N; n++) low[n] = high[n] = _mm512_setzero_ps();
    for (int64_t pair = i; pair < pairs; pair += LANES) add_pair<N>(query, keys, pair, low);
    for (int64_t pair = i + 8; pair < pairs; pair += LANES) add_pair<N>(query, keys, pair, high);
    for (int n = 0; n < N; n++) {
      __m512 x = _mm512_add_ps(low[n], high[n]);
      if (i % 2) x = _mm512_add_ps(sum[n][1], x);
      if (i % 4 == 3) x = _mm512_add_ps(sum[n][2], x);
      if (i == 7) x = _mm512_add_ps(sum[n][3], x);
      sum[n][i == 7 ? 0 : i % 2 == 0 ? 1 : i % 4 == 1 ? 2 : 3] = x;
    }
  }
}

// As even and odd numbers of 32 apart.
template <int N>
void by_tiles(int64_t size, const float (*query)[MAX_SIZE], const float (*keys)[LANES], __m512 (*sum)[4]) {
  for (int64_t tile = 0; tile < size; tile += 2 * LANES) {
    __m512 apart[2][N];
    for (int n = 0; n < N; n++) apart[0][n] = apart[1][n] = _mm512_setzero_ps();
    for (int64_t e = tile; e < std::min(tile + 2 * LANES, size); e++) {
      const __m512 numbers = _mm512_load_ps(keys[e]);
      for (int n = 0; n < N; n++)
        apart[e % 2][n] = _mm512_fmadd_ps(numbers, _mm512_set1_ps(query[n][e]), apart[e % 2][n]);
    }
    for (int n = 0; n < N; n++) sum[n][0] = _mm512_add_ps(sum[n][0], _mm512_add_ps(apart[0][n], apart[1][n]));
  }
}

// One by one, some of them summed apart.
template <int N>
void by_ones(int64_t size, const float (*query)[MAX_SIZE], const float (*keys)[LANES], __m512 (*sum)[4]) {
  const int64_t block = summed_apart(size);
  for (int64_t start = 0; start < size; start += block) {
    __m512 part[N];
    for (int n = 0; n < N; n++) part[n] = _mm512_setzero_ps();
    for (int64_t e = start; e < std::min(start + block, size); e++) {
      const __m512 numbers = _mm512_load_ps(keys[e]);
      for (int n = 0; n < N; n++) part[n] = _mm512_fmadd_ps(numbers, _mm512_set1_ps(query[n][e]), part[n]);
    }
    for (int n = 0; n < N; n++) sum[n][0] = _mm512_add_ps(sum[n][0], part[n]);
  }
}

// Of N queries: pairs along the head in order, or four sums of every fourth number, or sixteen, or by tiles, or one by one.
template <int N, Order O>
__attribute__((noinline)) void scores(const Attention& a, const float (*query)[MAX_SIZE], const float (*keys)[LANES],
                                      float (*into)[BLOCK]) {
  __m512 sum[N][4];
  for (int n = 0; n < N; n++)
    for (int i = 0; i < 4; i++) sum[n][i] = _mm512_setzero_ps();
  if (O == PAIRS) {
    for (int64_t pair = 0; pair < a.size / 2; pair++) {
      const __m512bh words = (__m512bh)_mm512_load_ps(keys[pair]);
      for (int n = 0; n < N; n++) sum[n][0] = _mm512_dpbf16_ps(sum[n][0], words, (__m512bh)_mm512_set1_ps(query[n][pair]));
    }
  } else if (O == EIGHTS) {
    by_eights<N>(a.size / 2, query, keys, sum);
  } else if (O == TILES) {
    by_tiles<N>(a.size, query, keys, sum);
  } else if (O == ONES) {
    by_ones<N>(a.size, query, keys, sum);
  } else {
    for (int64_t e = 0; e < a.size; e += 4)
      for (int i = 0; i < 4; i++) {
        const __m512 numbers = _mm512_load_ps(keys[e + i]);
        for (int n = 0; n < N; n++) sum[n][i] = _mm512_fmadd_ps(numbers, _mm512_set1_ps(query[n][e + i]), sum[n][i]);
      }
  }
  for (int n = 0; n < N; n++) {
    __m512* part = sum[n];
    if (O == FOURS) part[0] = _mm512_add_ps(_mm512_add_ps(part[0], part[2]), _mm512_add_ps(part[1], part[3]));
    _mm512_storeu_ps(into[n], _mm512_mul_ps(part[0], _mm512_set1_ps(a.scale)));
  }
}

// The highest of scores and of what was `highest` before; that becomes it, or NaN where there is one among the scores.
inline float top_of(const float* scores, int64_t count, float* highest) {
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
  return top;
}

// Scores to weights, in place: numbers rounded to bfloat16, or words of two; returns the sum of those that are not
// rounded. NaN among the scores makes `highest` NaN.
template <Order O>
float weigh(float* scores, int64_t count, float* highest) {
  const float top = top_of(scores, count, highest);
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
    if (in_words(O))
      _mm256_storeu_si256((__m256i*)(scores + j / 2), bits);
    else
      _mm512_storeu_ps(scores + j, widen(bits));
  }
  return sum;
}

}  // namespace
