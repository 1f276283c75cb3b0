// Drafts of a `deep` head, from hidden states at its exit to the likeliest tokens and their confidence. Drafts are
// verified, so no order of additions is kept here; numbers are rounded where the head's modules round.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <vector>

#include "attention.h"
#include "stack.h"
#include "products.h"

namespace {

struct Head {  // as `deep_head.py` lays it out
  const uint32_t *gate_up, *down, *rows;  // packed weights
  const uint16_t *hidden_norm, *embedding_norm, *deep_norm, *final_norm, *keep, *carry, *ages;
};

struct Draft {
  const Head* head;
  const uint16_t *hidden, *embedding, *deep;  // [rows][size]
  const int64_t* ages;                        // of each row's deep state
  const uint16_t* silu;
  int64_t rows, count, size, rank, vocabulary, block;  // count: tokens of each row
  float epsilon, final_epsilon, temperature;
};

// Norms of what the head reads of a row, side by side; the age of the deep state is added to its own.
inline void read(const Draft& d, int64_t row, uint16_t* joined) {
  const int64_t place = row * d.size;
  norm(d.hidden + place, d.head->hidden_norm, d.size, d.epsilon, joined);
  norm(d.embedding + place, d.head->embedding_norm, d.size, d.epsilon, joined + d.size);
  uint16_t* deep = joined + 2 * d.size;
  norm(d.deep + place, d.head->deep_norm, d.size, d.epsilon, deep);
  for (int64_t i = 0; i < d.size; i += LANES) {
    const __mmask16 mask = first_of(d.size - i);
    auto at = [&](const uint16_t* from) { return widen(_mm256_maskz_loadu_epi16(mask, from + i)); };
    const uint16_t* age = d.head->ages + d.ages[row] * d.size;
    _mm256_mask_storeu_epi16(deep + i, mask, narrow(_mm512_add_ps(at(deep), at(age))));
  }
}

// The hidden and the deep state of a row, weighed, and what the gated block adds.
inline void skip(const Draft& d, int64_t row, uint16_t* added) {
  for (int64_t i = 0; i < d.size; i += LANES) {
    const __mmask16 mask = first_of(d.size - i);
    auto at = [&](const uint16_t* from) { return widen(_mm256_maskz_loadu_epi16(mask, from + i)); };
    auto times = [&](const uint16_t* one, const uint16_t* other) { return widen(narrow(_mm512_mul_ps(at(one), at(other)))); };
    const int64_t place = row * d.size;
    const __m512 kept = widen(narrow(_mm512_add_ps(times(d.head->keep, d.hidden + place), times(d.head->carry, d.deep + place))));
    _mm256_mask_storeu_epi16(added + i, mask, narrow(_mm512_add_ps(kept, at(added))));
  }
}

// The largest logits of a row, the first of equal ones before the others, and their softmax at the temperature. Each is
// lost from the logits when it is found.
inline void choose(const Draft& d, uint16_t* logits, int64_t* ids, float* chances) {
  constexpr uint16_t LOWEST = 0xff80;
  auto at = [&](int64_t i) {
    const __mmask16 mask = first_of(d.vocabulary - i);
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, widen(_mm256_maskz_loadu_epi16(mask, logits + i)));
  };
  float highest = 0.f, whole = 0.f;
  for (int64_t n = 0; n < d.count; n++) {
    __m512 tops = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < d.vocabulary; i += LANES) tops = _mm512_max_ps(tops, at(i));
    const float top = _mm512_reduce_max_ps(tops);
    int64_t best = -1;
    for (int64_t i = 0; i < d.vocabulary && best < 0; i += LANES) {
      const __mmask16 equal = _mm512_cmp_ps_mask(at(i), _mm512_set1_ps(top), _CMP_EQ_OQ);
      if (equal) best = i + __builtin_ctz(equal);
    }
    if (n == 0) {
      highest = top;
      const __m512 scale = _mm512_set1_ps(1.f / d.temperature);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t i = 0; i < d.vocabulary; i += LANES)
        sum = _mm512_add_ps(sum, power(_mm512_mul_ps(_mm512_sub_ps(at(i), _mm512_set1_ps(top)), scale)));
      whole = _mm512_reduce_add_ps(sum);
    }
    ids[n] = best;
    chances[n] = best < 0 ? NAN : std::exp((top - highest) / d.temperature) / whole;
    if (best >= 0) logits[best] = LOWEST;
  }
}

// What one thread of the team does.
inline void draft(const Draft& d, uint16_t* inner, uint16_t* added, uint16_t* logits, int64_t* ids, float* chances) {
  std::vector<uint16_t> joined(d.rows * 3 * d.size), normed(d.rows * d.size);
  auto product = [&](const uint32_t* weight, const uint16_t* input, uint16_t* output, int64_t outputs, int64_t inputs,
                     const uint16_t* silu) {
    multiply({weight, (const uint32_t*)input, nullptr, output, d.rows, outputs, inputs / 2, d.block, silu, nullptr, 1.f});
  };
  for (int64_t row = 0; row < d.rows; row++) read(d, row, joined.data() + row * 3 * d.size);
  product(d.head->gate_up, joined.data(), inner, 2 * d.rank, 3 * d.size, d.silu);
  product(d.head->down, inner, added, d.size, d.rank, nullptr);
#pragma omp for schedule(static)
  for (int64_t row = 0; row < d.rows; row++) skip(d, row, added + row * d.size);
  for (int64_t row = 0; row < d.rows; row++)
    norm(added + row * d.size, d.head->final_norm, d.size, d.final_epsilon, normed.data() + row * d.size);
  product(d.head->rows, normed.data(), logits, d.vocabulary, d.size, nullptr);
#pragma omp for schedule(static)
  for (int64_t row = 0; row < d.rows; row++)
    choose(d, logits + row * d.vocabulary, ids + row * d.count, chances + row * d.count);
}

}  // namespace
