// Attention of rows in float32, each with the order of additions of torch's kernel for one row where MKL multiplies by its loops
// for older CPUs. Every product is rounded before it is added. Rows go through the keys together, as in bfloat16.
//
// Scores: of fours of keys, as in `Fours` (`singles.h`). Of the one to three keys that are left of a row's last block, the last
// four products along the head come at the end, one by one; and of the first and the third, what lies between has eight sums,
// which are added four apart.
// Weights: exponentials of 16 keys at a time, one sum for each place; the rest one by one, in double precision.
// Values: one by one along the keys, from zero. Not so in the first outputs of a head, up to three, that lie before a multiple
// of 16 bytes in the memory that torch's thread has for it: there, of every eight keys the last four are summed apart.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "keys.h"
#include "numbers.h"
#include "scores.h"
#include "together.h"

namespace {

struct SingleAttention : AttentionOf<float> {
  int64_t apart;  // query heads that one of torch's threads attends to: the first ones, the next ones, and so on
};

inline __m512 plus(__m512 sum, __m512 one, __m512 other) { return _mm512_add_ps(_mm512_mul_ps(one, other), sum); }

// e to the power of x, which is not above 0: a polynomial of what whole powers of two leave (with the coefficients that torch
// uses in this place), 0 for what is hardly a normal number.
inline __m512 exponential(__m512 x) {
  const __m512 whole = _mm512_floor_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(1.44269502f), _mm512_set1_ps(0.5f)));
  const __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693147182f), x);
  __m512 sum = _mm512_set1_ps(0.00828929059f);
  for (const float next : {0.0418978221f, 0.166676521f, 0.499991506f, 0.999999701f, 1.f})
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(next));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(whole, _mm512_set1_ps(-125.f), _CMP_GE_OQ), sum, whole);
}

// Scores of N queries with 16 keys side by side.
template <int N>
__attribute__((noinline)) void single_scores(int64_t size, float scale, const float (*query)[MAX_SIZE], const float (*keys)[LANES],
                                             float (*into)[BLOCK]) {
  __m512 sum[N][4];
  for (int n = 0; n < N; n++) {
    for (int i = 1; i < 4; i++) sum[n][i] = _mm512_setzero_ps();
    sum[n][0] = _mm512_mul_ps(_mm512_load_ps(keys[0]), _mm512_set1_ps(query[n][0]));
    for (int e = 1; e < 4; e++) sum[n][0] = plus(sum[n][0], _mm512_load_ps(keys[e]), _mm512_set1_ps(query[n][e]));
  }
  for (int64_t e = 4; e < size; e += 4)
    for (int i = 0; i < 4; i++) {
      const __m512 numbers = _mm512_load_ps(keys[e + i]);
      for (int n = 0; n < N; n++) sum[n][i] = plus(sum[n][i], numbers, _mm512_set1_ps(query[n][e + i]));
    }
  for (int n = 0; n < N; n++) {
    const __m512 whole = _mm512_add_ps(_mm512_add_ps(sum[n][0], sum[n][2]), _mm512_add_ps(sum[n][1], sum[n][3]));
    _mm512_storeu_ps(into[n], _mm512_mul_ps(whole, _mm512_set1_ps(scale)));
  }
}

// Score, not scaled, of a key that no four has; `eight` sums, or four.
inline float left_score(int64_t size, const float* query, const float* key, bool eight) {
  float first = query[0] * key[0];
  for (int e = 1; e < 4; e++) first += query[e] * key[e];
  const int64_t stop = size - 4;
  __m128 sum = _mm_set_ss(first);
  if (eight) {
    __m256 sums = _mm256_zextps128_ps256(sum);
    for (int64_t e = 4; e < stop; e += 8)
      sums = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(query + e), _mm256_loadu_ps(key + e)), sums);
    sum = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  } else {
    for (int64_t e = 4; e < stop; e += 4) sum = _mm_add_ps(_mm_mul_ps(_mm_loadu_ps(query + e), _mm_loadu_ps(key + e)), sum);
  }
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  float whole = _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  for (int64_t e = stop; e < size; e++) whole += query[e] * key[e];
  return whole;
}

// Scores to weights, in place; returns their sum. NaN among the scores makes `highest` NaN.
inline float single_weights(float* scores, int64_t count, float* highest) {
  const float top = top_of(scores, count, highest);
  __m512 sums = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const __m512 x = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(top)));
    sums = _mm512_add_ps(sums, x);
    _mm512_storeu_ps(scores + i, x);
  }
  float sum = total(sums);
  for (; i < count; i++) sum += scores[i] = (float)std::exp((double)(scores[i] - top));
  return sum;
}

// Keys `start` to `stop` of a block, by the weights of N rows; `start` is a multiple of 8. Apart, values stand at `places`.
template <int N, bool APART>
struct SingleValues {
  const SingleAttention& a;
  const float* values;
  const int32_t* places;
  const int64_t start, stop;
  const float (*weights)[BLOCK];

  __m512 numbers(int64_t key, int64_t from) const {
    const float* at = values + (APART ? places[key] : key) * a.value_row + from;
    if (!APART) fetch(at + AHEAD * a.value_row);
    return _mm512_maskz_loadu_ps(first_of(a.size - from), at);
  }

  __m512 weight(int n, int64_t key) const { return _mm512_set1_ps(weights[n][key]); }

  // V vectors of the head, one by one along the keys.
  template <int V>
  __attribute__((noinline)) void add(int64_t from, float (*result)[MAX_SIZE]) const {
    __m512 sum[N][V];
    for (int n = 0; n < N; n++)
      for (int v = 0; v < V; v++) sum[n][v] = _mm512_load_ps(result[n] + from + v * LANES);
    for (int64_t key = start; key < stop; key++) {
      __m512 own[V];
      for (int v = 0; v < V; v++) own[v] = numbers(key, from + v * LANES);
      for (int n = 0; n < N; n++)
        for (int v = 0; v < V; v++) sum[n][v] = plus(sum[n][v], own[v], weight(n, key));
    }
    for (int n = 0; n < N; n++)
      for (int v = 0; v < V; v++) _mm512_store_ps(result[n] + from + v * LANES, sum[n][v]);
  }

  // The first vector both ways: one by one, and with the last four of eight keys summed apart.
  __attribute__((noinline)) void add_first(float (*result)[MAX_SIZE], float (*fours)[LANES]) const {
    __m512 sum[N], other[N], part[N];
    for (int n = 0; n < N; n++) sum[n] = _mm512_load_ps(result[n]), other[n] = _mm512_load_ps(fours[n]);
    const int64_t whole = start + (stop - start) / 8 * 8;
    for (int64_t key = start; key < stop; key++) {
      const __m512 own = numbers(key, 0);
      const int64_t place = key < whole ? key % 8 : 0;
      for (int n = 0; n < N; n++) {
        const __m512 product = _mm512_mul_ps(own, weight(n, key));
        sum[n] = _mm512_add_ps(product, sum[n]);
        if (place < 4)
          other[n] = _mm512_add_ps(product, other[n]);
        else
          part[n] = place == 4 ? product : _mm512_add_ps(product, part[n]);
        if (place == 7) other[n] = _mm512_add_ps(part[n], other[n]);
      }
    }
    for (int n = 0; n < N; n++) _mm512_store_ps(result[n], sum[n]), _mm512_store_ps(fours[n], other[n]);
  }

  void run(float (*result)[MAX_SIZE], float (*fours)[LANES]) const {
    add_first(result, fours);
    int64_t from = LANES;
    for (; from + LANES < a.size; from += 2 * LANES) add<2>(from, result);
    if (from < a.size) add<1>(from, result);
  }
};

// Attention in that order.
template <int H>
class SingleGroup : public Together<SingleGroup<H>, SingleAttention, H> {
  using Base = Together<SingleGroup, SingleAttention, H>;
  friend Base;

 public:
  SingleGroup(const SingleAttention& a, int64_t row, int64_t rows, int64_t head) : Base(a, row, rows, head) {
    for (int64_t r = 0; r < rows; r++)
      for (int h = 0; h < H; h++) std::memcpy(query_[r][h], Base::query_of(r, h), a.size * sizeof(float));
  }

 private:
  using Base::a_, Base::count, Base::keys_, Base::part_, Base::places_, Base::query_, Base::result_, Base::rows_, Base::turned_,
      Base::values_;
  // Rows whose sums there are registers for: of values, and of scores, which are four sums each.
  static constexpr int VALUED = H < 3 ? 4 : 2, SCORED = H < 4 ? 2 : 1;

  alignas(64) float fours_[Base::R][H][LANES];  // the first outputs, the last four of eight keys summed apart

  // Up to 16 keys side by side, from one on or at places.
  void turn(const float* keys, const int32_t* places, int64_t count) {
    for (int64_t e = 0; e < a_.size; e += LANES) {
      const __mmask16 mask = first_of(a_.size - e);
      __m512i words[LANES];
      for (int i = 0; i < LANES; i++) {
        const float* at = keys + (places ? places[std::min<int64_t>(i, count - 1)] : i) * a_.key_row + e;
        if (!places) fetch(at + AHEAD * a_.key_row);
        words[i] = i < count ? _mm512_maskz_loadu_epi32(mask, at) : _mm512_setzero_si512();
      }
      transpose(words);
      for (int64_t i = 0; i < std::min<int64_t>(LANES, a_.size - e); i++) _mm512_store_si512(turned_[e + i], words[i]);
    }
  }

  void score(int64_t first, int64_t all, bool apart) {
    for (int64_t key = 0; key < all; key += LANES) {
      if (!apart || first + key + LANES <= a_.settled) {
        turn(keys_ + (first + key) * a_.key_row, nullptr, all - key);
        Base::template by_rows<SCORED>([&](auto rows, int64_t r) {
          single_scores<rows * H>(a_.size, a_.scale, query_[r], turned_, (float(*)[BLOCK])(part_[r][0] + key));
        });
        continue;
      }
      for (int64_t r = 0; r < rows_; r++) {
        const int64_t left = count(r, first) - key;
        if (left <= 0) continue;
        turn(keys_, places_[r] + key, left);
        single_scores<H>(a_.size, a_.scale, query_[r], turned_, (float(*)[BLOCK])(part_[r][0] + key));
      }
    }
    for (int64_t r = 0; r < rows_; r++)
      for (int64_t own = count(r, first), key = std::max<int64_t>(0, own) / 4 * 4; key < own; key++)
        for (int h = 0; h < H; h++) {
          const float* at = keys_ + (apart ? places_[r][key] : first + key) * a_.key_row;
          part_[r][h][key] = left_score(a_.size, query_[r][h], at, key % 4 != 1) * a_.scale;
        }
  }

  static float weights(float* scores, int64_t count, float* highest) { return single_weights(scores, count, highest); }

  void fade(int64_t r, int h, int64_t first, float fade) { faded(fours_[r][h], first, fade); }

  // First the values of keys that all rows see, in eights; then each row's further ones.
  void add(int64_t first, int64_t all, bool apart) {
    const int64_t joint = std::clamp((apart ? a_.settled : Base::fewest_) - first, int64_t{0}, all) / 8 * 8;
    const float* values = values_ + first * a_.value_row;
    if (joint)
      Base::template by_rows<VALUED>([&](auto rows, int64_t r) {
        SingleValues<rows * H, false>{a_, values, nullptr, 0, joint, part_[r]}.run(result_[r], fours_[r]);
      });
    for (int64_t r = 0; r < rows_; r++) {
      const int64_t own = count(r, first);
      if (own <= joint) continue;
      if (apart)
        SingleValues<H, true>{a_, values_, places_[r], joint, own, part_[r]}.run(result_[r], fours_[r]);
      else
        SingleValues<H, false>{a_, values, nullptr, joint, own, part_[r]}.run(result_[r], fours_[r]);
    }
  }

  // Outputs of a head that lie before a multiple of 16 bytes in torch's memory. Each thread of it has room, one after another,
  // for the scores of a block, a maximum, a sum, and the head's outputs, of which there is a multiple of four.
  __mmask16 before_whole(int64_t r, int h) const {
    const int64_t thread = (Base::head_ + h) / a_.apart, scores = std::min<int64_t>(BLOCK, Base::own_[r]);
    return first_of(-(thread + 1) * (scores + 2) & 3);
  }

  void write(int64_t r, int h) const {
    const __m512 scale = _mm512_set1_ps(1.0f / Base::sum_[r][h]);
    float* into = Base::output_of(r, h);
    for (int64_t e = 0; e < a_.size; e += LANES) {
      __m512 sums = _mm512_load_ps(result_[r][h] + e);
      if (e == 0) sums = _mm512_mask_loadu_ps(sums, before_whole(r, h), fours_[r][h]);
      _mm512_mask_storeu_ps(into + e, first_of(a_.size - e), _mm512_mul_ps(sums, scale));
    }
  }
};

inline bool some_heads(int64_t, const SingleAttention& a, int64_t row, int64_t rows, int64_t head, int64_t count) {
  switch (count) {
    case 1: return SingleGroup<1>(a, row, rows, head).run();
    case 2: return SingleGroup<2>(a, row, rows, head).run();
    case 3: return SingleGroup<3>(a, row, rows, head).run();
    default: return SingleGroup<4>(a, row, rows, head).run();
  }
}

}  // namespace
