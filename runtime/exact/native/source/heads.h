// Exit heads: `deep` ones from hidden states at their exit to the likeliest tokens and their confidence, `attention` ones
// to states, and from these to tokens. Drafts are verified, so no order of additions is kept here; numbers are rounded
// where the heads' modules round.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <vector>

#include "attention.h"
#include "stack.h"
#include "multiply.h"

namespace {

constexpr Along IN_A_ROW{int64_t{1} << 32, false};  // pairs in order, in one block

inline Product product_of(const QuantizedWeight& weight, const uint16_t* input, uint16_t* output, int64_t rows, int64_t outputs,
                          int64_t inputs, const uint16_t* silu, const uint16_t* residual) {
  return {weight.bytes, (const uint32_t*)input, nullptr, output, rows, outputs, inputs / 2, IN_A_ROW, silu, residual, 1.f, outputs,
          weight.scales};
}

struct Choice {            // of the likeliest tokens of each row
  QuantizedWeight weight;   // rows of the draft vocabulary
  int64_t rows, count, size, vocabulary;
  float temperature;
};

// The largest logits of a row, the first of equal ones before the others, and their softmax at the temperature. Each is
// lost from the logits when it is founc.
inline void choose(const Choice& c, uint16_t* logits, int64_t* ids, float* chances) {
  constexpr uint16_t LOWEST = 0xff80;
  auto at = [&](int64_t i) {
    const __mmask16 mask = first_of(c.vocabulary - i);
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, widen(_mm256_maskz_loadu_epi16(mask, logits + i)));
  };
  float highest = 0.f, whole = 0.f;
  for (int64_t n = 0; n < c.count; n++) {
    __m512 tops = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < c.vocabulary; i += LANES) tops = _mm512_max_ps(tops, at(i));
    const float top = _mm512_reduce_max_ps(tops);
    int64_t best = -1;
    for (int64_t i = 0; i < c.vocabulary && best < 0; i += LANES) {
      const __mmask16 equal = _mm512_cmp_ps_mask(at(i), _mm512_set1_ps(top), _CMP_EQ_OQ);
      if (equal) best = i + __builtin_ctz(equal);
    }
    if (n == 0) {
      highest = top;
      const __m512 scale = _mm512_set1_ps(1.f / c.temperature);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t i = 0; i < c.vocabulary; i += LANES)
        sum = _mm512_add_ps(sum, power(_mm512_mul_ps(_mm512_sub_ps(at(i), _mm512_set1_ps(top)), scale)));
      whole = _mm512_reduce_add_ps(sum);
    }
    ids[n] = best;
    chances[n] = best < 0 ? NAN : std::exp((top - highest) / c.temperature) / whole;
    if (best >= 0) logits[best] = LOWEST;
  }
}

// The same from normed states [rows][size]; called by every thread of a team.
inline void likeliest(const Choice& c, const uint16_t* normed, uint16_t* logits, int64_t* ids, float* chances) {
  multiply(product_of(c.weight, normed, logits, c.rows, c.vocabulary, c.size, nullptr, nullptr));
#pragma omp for schedule(static)
  for (int64_t row = 0; row < c.rows; row++)
    choose(c, logits + row * c.vocabulary, ids + row * c.count, chances + row * c.count);
}

struct DeepHead {  // as `heads.py` lays it out
  QuantizedWeight gate_up, down, rows;
  const uint16_t *hidden_norm, *embedding_norm, *deep_norm, *final_norm, *keep, *carry, *ages;
};

struct Draft {
  const DeepHead* head;
  const uint16_t *hidden, *embedding, *deep;  // [rows][size]
  const int64_t* ages;                        // of each row's deep state
  const uint16_t* silu;
  int64_t rows, count, size, rank, vocabulary;  // count: tokens of each row
  float epsilon, final_epsilon, temperature;
};

// Norms of what a head reads of a row, side by side; `mark`, what kind of deep state that is, is added to its own.
template <class Head>
void read(const Head& head, const uint16_t* hidden, const uint16_t* embedding, const uint16_t* deep, const uint16_t* mark,
          int64_t size, float epsilon, uint16_t* joined) {
  norm(hidden, head.hidden_norm, size, epsilon, joined);
  norm(embedding, head.embedding_norm, size, epsilon, joined + size);
  uint16_t* last = joined + 2 * size;
  norm(deep, head.deep_norm, size, epsilon, last);
  for (int64_t i = 0; i < size; i += LANES) {
    const __mmask16 mask = first_of(size - i);
    auto at = [&](const uint16_t* from) { return widen(_mm256_maskz_loadu_epi16(mask, from + i)); };
    _mm256_mask_storeu_epi16(last + i, mask, narrow(_mm512_add_ps(at(last), at(mark))));
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

// What one thread of the team does.
inline void draft(const Draft& d, uint16_t* inner, uint16_t* added, uint16_t* logits, int64_t* ids, float* chances) {
  std::vector<uint16_t> joined(d.rows * 3 * d.size), normed(d.rows * d.size);
  for (int64_t row = 0; row < d.rows; row++) {
    const int64_t place = row * d.size;
    read(*d.head, d.hidden + place, d.embedding + place, d.deep + place, d.head->ages + d.ages[row] * d.size, d.size,
         d.epsilon, joined.data() + 3 * place);
  }
  multiply(product_of(d.head->gate_up, joined.data(), inner, d.rows, 2 * d.rank, 3 * d.size, d.silu, nullptr));
  multiply(product_of(d.head->down, inner, added, d.rows, d.size, d.rank, nullptr, nullptr));
#pragma omp for schedule(static)
  for (int64_t row = 0; row < d.rows; row++) skip(d, row, added + row * d.size);
  for (int64_t row = 0; row < d.rows; row++)
    norm(added + row * d.size, d.head->final_norm, d.size, d.final_epsilon, normed.data() + row * d.size);
  likeliest({d.head->rows, d.rows, d.count, d.size, d.vocabulary, d.temperature}, normed.data(), logits, ids, chances);
}

struct AttentionHead {  // as `heads.py` lays it out
  QuantizedWeight mix, query_key_value, output, gate_up, down;
  const uint16_t *hidden_norm, *embedding_norm, *deep_norm, *norm, *second_norm, *final_norm, *sources;
};

struct HeadPart {          // of one request, as `heads.py` lays it out
  int64_t rows, drafting;  // drafting: the last rows; others give keys alone
  int64_t held, settled;   // held: keys before these; settled: keys that all rows see
  int64_t capacity;
  uint16_t *keys, *values;  // [key heads][capacity][size]
  const int64_t* paths;     // of the rows that draft, as `Attention` has them
};

struct Step {
  const AttentionHead* head;
  const HeadPart* parts;
  const uint16_t *hidden, *embedding, *deep;  // [rows][hidden size]
  const int64_t *sources, *positions;         // of each row's deep state, and its place in the text
  const float* turns;                         // [positions][size]: cosines, then sines
  const uint16_t* silu;
  int64_t requests, rows, drafting, hidden_size, inner, queries, key_heads, size;  // rows: of all parts
  float epsilon, final_epsilon;
};

// A head turned to its position by angles in float32, in place or elsewhere.
inline void turn_head(const uint16_t* head, const float* turns, int64_t size, uint16_t* into) {
  const int64_t half = size / 2;
  for (int64_t e = 0; e < half; e += LANES) {
    const __mmask16 mask = first_of(half - e);
    auto at = [&](const uint16_t* from) { return widen(_mm256_maskz_loadu_epi16(mask, from)); };
    const __m512 first = at(head + e), second = at(head + e + half);
    const __m512 cosine = _mm512_maskz_loadu_ps(mask, turns + e), sine = _mm512_maskz_loadu_ps(mask, turns + half + e);
    const __m512 low = _mm512_fmsub_ps(first, cosine, _mm512_mul_ps(second, sine));
    const __m512 high = _mm512_fmadd_ps(second, cosine, _mm512_mul_ps(first, sine));
    _mm256_mask_storeu_epi16(into + e, mask, narrow(low));
    _mm256_mask_storeu_epi16(into + e + half, mask, narrow(high));
  }
}

// Queries in place, keys and values behind those that are held.
inline void place_heads(const Step& s, uint16_t* heads) {
  const int64_t all = s.queries + 2 * s.key_heads;
#pragma omp for schedule(static)
  for (int64_t task = 0; task < s.rows * all; task++) {
    const int64_t row = task / all, head = task % all, key = head - s.queries;
    uint16_t* from = heads + task * s.size;
    const float* turns = s.turns + s.positions[row] * s.size;
    int64_t own = row;  // row of its request
    const HeadPart* part = s.parts;
    while (own >= part->rows) own -= part++->rows;
    own += part->held;
    if (key < 0)
      turn_head(from, turns, s.size, from);
    else if (key < s.key_heads)
      turn_head(from, turns, s.size, part->keys + (key * part->capacity + own) * s.size);
    else
      std::memcpy(part->values + ((key - s.key_heads) * part->capacity + own) * s.size, from, s.size * sizeof *from);
  }
}

// What one thread of the team does: keys and values of all rows, `states` [drafting][hidden size] of the last ones.
inline void step(const Step& s, uint16_t* joined, uint16_t* mixed, uint16_t* heads, uint16_t* attended, uint16_t* kept,
                 uint16_t* inner, uint16_t* states, std::atomic<bool>& numbers) {
  const int64_t size = s.hidden_size, all = s.queries * s.size, wide = all + 2 * s.key_heads * s.size;
  std::vector<uint16_t> normed(s.rows * size);
  std::vector<Attention> rows(s.requests);
  auto normalise = [&](const uint16_t* from, const uint16_t* weight, int64_t rows, float epsilon, uint16_t* into) {
    for (int64_t row = 0; row < rows; row++) norm(from + row * size, weight, size, epsilon, into + row * size);
  };
  auto product = [](auto... given) { multiply(product_of(given...)); };
#pragma omp for schedule(static)
  for (int64_t row = 0; row < s.rows; row++) {
    const int64_t place = row * size;
    read(*s.head, s.hidden + place, s.embedding + place, s.deep + place, s.head->sources + s.sources[row] * size, size,
         s.epsilon, joined + 3 * place);
  }
  product(s.head->mix, joined, mixed, s.rows, size, 3 * size, nullptr, nullptr);
  normalise(mixed, s.head->norm, s.rows, s.epsilon, normed.data());
  product(s.head->query_key_value, normed.data(), heads, s.rows, wide, size, nullptr, nullptr);
  place_heads(s, heads);
  int64_t first = 0, drafted = 0;
  for (int64_t r = 0; r < s.requests; r++) {
    const HeadPart& part = s.parts[r];
    const int64_t drafts = first + part.rows - part.drafting, head = part.capacity * s.size;
    rows[r] = {heads + drafts * wide, part.keys, part.values, attended + drafted * all, part.drafting, s.queries,
               s.queries / s.key_heads, s.size, part.held + part.rows, s.size, wide, head, s.size, head, s.size,
               1.f / std::sqrt((float)s.size), part.settled, part.paths};
#pragma omp single nowait
    std::memcpy(kept + drafted * size, mixed + drafts * size, part.drafting * size * sizeof *kept);
    first += part.rows;
    drafted += part.drafting;
  }
  attend(rows.data(), s.requests, PAIRS, numbers);
  product(s.head->output, attended, kept, s.drafting, size, all, nullptr, kept);
  normalise(kept, s.head->second_norm, s.drafting, s.epsilon, normed.data());
  product(s.head->gate_up, normed.data(), inner, s.drafting, 2 * s.inner, size, s.silu, nullptr);
  product(s.head->down, inner, kept, s.drafting, size, s.inner, nullptr, kept);
#pragma omp single
  normalise(kept, s.head->final_norm, s.drafting, s.final_epsilon, states);
}

}  // namespace
