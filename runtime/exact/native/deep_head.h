// One draft of a `deep` head, from the hidden state at its exit to the likeliest token and its confidence. Drafts are
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
  const uint16_t *hidden, *embedding, *deep, *silu;
  int64_t size, rank, vocabulary, age, block;
  float epsilon, final_epsilon, temperature;
};

// Norms of what the head reads, side by side; the age of the deep state is added to its own.
inline void read(const Draft& d, uint16_t* joined) {
  norm(d.hidden, d.head->hidden_norm, d.size, d.epsilon, joined);
  norm(d.embedding, d.head->embedding_norm, d.size, d.epsilon, joined + d.size);
  uint16_t* deep = joined + 2 * d.size;
  norm(d.deep, d.head->deep_norm, d.size, d.epsilon, deep);
  for (int64_t i = 0; i < d.size; i += LANES) {
    const __mmask16 mask = first_of(d.size - i);
    auto at = [&](const uint16_t* from) { return widen(_mm256_maskz_loadu_epi16(mask, from + i)); };
    _mm256_mask_storeu_epi16(deep + i, mask, narrow(_mm512_add_ps(at(deep), at(d.head->ages + d.age * d.size))));
  }
}

// The hidden and the deep state, weighed, and what the gated block adds.
inline void skip(const Draft& d, uint16_t* added) {
  for (int64_t i = 0; i < d.size; i += LANES) {
    const __mmask16 mask = first_of(d.size - i);
    auto at = [&](const uint16_t* from) { return widen(_mm256_maskz_loadu_epi16(mask, from + i)); };
    auto times = [&](const uint16_t* one, const uint16_t* other) { return widen(narrow(_mm512_mul_ps(at(one), at(other)))); };
    const __m512 kept = widen(narrow(_mm512_add_ps(times(d.head->keep, d.hidden), times(d.head->carry, d.deep))));
    _mm256_mask_storeu_epi16(added + i, mask, narrow(_mm512_add_ps(kept, at(added))));
  }
}

// The first of the largest logits; its softmax at the temperature goes into `chance`.
inline int64_t choose(const Draft& d, const uint16_t* logits, float* chance) {
  auto at = [&](int64_t i) {
    const __mmask16 mask = first_of(d.vocabulary - i);
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, widen(_mm256_maskz_loadu_epi16(mask, logits + i)));
  };
  __m512 tops = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < d.vocabulary; i += LANES) tops = _mm512_max_ps(tops, at(i));
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(tops)), scale = _mm512_set1_ps(1.f / d.temperature);
  int64_t best = -1;
  for (int64_t i = 0; i < d.vocabulary; i += LANES) {
    const __mmask16 equal = _mm512_cmp_ps_mask(at(i), top, _CMP_EQ_OQ);
    if (best < 0 && equal) best = i + __builtin_ctz(equal);
    sum = _mm512_add_ps(sum, power(_mm512_mul_ps(_mm512_sub_ps(at(i), top), scale)));
  }
  *chance = best < 0 ? NAN : 1.f / _mm512_reduce_add_ps(sum);
  return best;
}

// What one thread of the team does; the logits are whole when all are done.
inline void draft(const Draft& d, uint16_t* inner, uint16_t* added, uint16_t* logits) {
  std::vector<uint16_t> joined(3 * d.size), normed(d.size);
  auto product = [&](const uint32_t* weight, const uint16_t* input, uint16_t* output, int64_t outputs, int64_t inputs,
                     const uint16_t* silu) {
    multiply({weight, (const uint32_t*)input, nullptr, output, 1, outputs, inputs / 2, d.block, silu, nullptr, 1.f});
  };
  read(d, joined.data());
  product(d.head->gate_up, joined.data(), inner, 2 * d.rank, 3 * d.size, d.silu);
  product(d.head->down, inner, added, d.size, d.rank, nullptr);
#pragma omp single
  skip(d, added);
  norm(added, d.head->final_norm, d.size, d.final_epsilon, normed.data());
  product(d.head->rows, normed.data(), logits, d.vocabulary, d.size, nullptr);
}

}  // namespace
