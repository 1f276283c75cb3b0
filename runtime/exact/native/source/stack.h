// A run of decoder layers of the Llama kind on blocks of rows, one of each of several requests, with the bits of transformers' modules: norm, query,
// key and value, rotary positions, attention, output, norm, residual, norm, gated activation, norm, residual; of the norms, those
// that there are. One team of threads runs through all of it.
#pragma once
#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "multiply.h"

namespace {

enum Weighing { ROUNDED, WHOLE, FROM_ONE };  // a norm's weight times numbers that are rounded before; that are not; and plus 1

struct Layer {  // as `stack.py` lays it out
  const uint32_t *query_key_value, *output, *gate_up, *down;            // packed weights
  const uint16_t *query_key_value_bias, *output_bias, *gate_up_bias, *down_bias;  // or null
  const uint16_t *norm, *after_norm, *second_norm, *after_second_norm;  // before attention, after it; of the gated part; or null
  const uint16_t *query_norm, *key_norm;                                // of a head, or of all heads; or null
  int64_t table;                                                        // of the angles by which heads are turned; or -1
  int64_t window;                                                       // keys that a row sees at most
};

struct Part {           // the rows of one request
  int64_t rows, held;   // held: rows of its cache before these
  int64_t settled;      // rows of its cache that all of these see
  const int64_t* paths; // as `Attention` has them
};

struct Cache {  // of one request in one layer
  uint16_t *keys, *values;  // [key heads][capacity][size]
  int64_t capacity;
};

struct Run {
  const Layer* layers;
  const Part* parts;
  const Cache* caches;              // [layers][parts]
  const float *cosines, *sines;     // [tables][rows][turned]
  const uint16_t* opened;           // activation of every bfloat16
  int64_t count, requests, rows;    // of layers; of all parts
  int64_t hidden, queries, keys, size, inner;
  int64_t order;                    // of additions in attention
  float epsilon, scale, multiplier;  // of norms, of scores, of what is added to the residual
  bool tiles;                        // as `Along` has them, with the blocks of the four products of a layer
  int64_t blocks[4];
  int64_t turned;     // numbers of a head that are turned, the first ones
  bool rounds;        // whether products with cosines and sines are rounded before they are added
  Weighing weighing;  // of all norms
  bool whole;         // whether the norms of queries and keys are of all heads together
  int64_t filled;     // order of additions in attention where a window is full
  int64_t groups[4];  // of blocks, as `Along` has them
};

// The sum of squares in the order of torch's float32 sum: vectors of 8 dealt to four sums in turn, each in levels of 16
// and more; the vectors that are left, to the first; then the numbers that fill no vector, and the lanes one by one.
inline float sum_of_squares(const uint16_t* numbers, int64_t count) {
  constexpr int WIDTH = 8, LEVELS = 4, APART = 4;
  const int64_t vectors = count / WIDTH, steps = vectors / APART;
  int64_t power = 0;
  while ((int64_t{1} << power) < steps) power++;
  power = std::max<int64_t>(4, power / LEVELS);
  const int64_t step = int64_t{1} << power;
  __m256 sums[LEVELS][APART] = {};
  auto add = [&](__m256& sum, int64_t vector) {
    const __m128i bits = _mm_loadu_si128((const __m128i*)(numbers + vector * WIDTH));
    const __m256 x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    sum = _mm256_add_ps(sum, _mm256_mul_ps(x, x));
  };
  int64_t i = 0;
  while (i + step <= steps) {
    for (int64_t j = 0; j < step; j++, i++)
      for (int k = 0; k < APART; k++) add(sums[0][k], i * APART + k);
    for (int64_t level = 1; level < LEVELS; level++) {
      for (int k = 0; k < APART; k++) {
        sums[level][k] = _mm256_add_ps(sums[level][k], sums[level - 1][k]);
        sums[level - 1][k] = _mm256_setzero_ps();
      }
      if (i & ((step - 1) << (level * power))) break;
    }
  }
  for (; i < steps; i++)
    for (int k = 0; k < APART; k++) add(sums[0][k], i * APART + k);
  for (int level = 1; level < LEVELS; level++)
    for (int k = 0; k < APART; k++) sums[0][k] = _mm256_add_ps(sums[0][k], sums[level][k]);
  for (int64_t vector = steps * APART; vector < vectors; vector++) add(sums[0][0], vector);
  for (int k = 1; k < APART; k++) sums[0][0] = _mm256_add_ps(sums[0][0], sums[0][k]);
  alignas(32) float lanes[WIDTH];
  _mm256_store_ps(lanes, sums[0][0]);
  float total = 0.f;
  for (int64_t rest = vectors * WIDTH; rest < count; rest++) {
    const uint32_t bits = (uint32_t)numbers[rest] << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    total += x * x;
  }
  for (float lane : lanes) total += lane;
  return total;
}

// The module's own sums in float32, rounded where it rounds.
inline void norm(const uint16_t* from, const uint16_t* weight, int64_t count, float epsilon, uint16_t* into,
                 Weighing weighing = ROUNDED) {
  const __m512 scale = _mm512_set1_ps(1.f / std::sqrt(sum_of_squares(from, count) / (float)count + epsilon));
  for (int64_t i = 0; i < count; i += LANES) {
    const __mmask16 mask = first_of(count - i);
    __m512 x = _mm512_mul_ps(widen(_mm256_maskz_loadu_epi16(mask, from + i)), scale);
    __m512 times = widen(_mm256_maskz_loadu_epi16(mask, weight + i));
    if (weighing == ROUNDED) x = widen(narrow(x));
    if (weighing == FROM_ONE) times = _mm512_add_ps(_mm512_set1_ps(1.f), times);
    _mm256_mask_storeu_epi16(into + i, mask, narrow(_mm512_mul_ps(times, x)));
  }
}

// A head turned to the position of a row, in place or elsewhere; a multiple of 32 numbers is turned.
inline void rotate(const Run& run, int64_t table, int64_t row, const uint16_t* head, uint16_t* into) {
  const int64_t half = run.turned / 2, angles = (table * run.rows + row) * run.turned;
  auto at = [](const uint16_t* from) { return widen(_mm256_loadu_si256((const __m256i*)from)); };
  auto times = [&](__m512 one, const float* other) {
    const __m512 product = _mm512_mul_ps(one, _mm512_loadu_ps(other + angles));
    return run.rounds ? widen(narrow(product)) : product;
  };
  for (int64_t e = 0; e < half; e += LANES) {
    const __m512 first = at(head + e), second = at(head + e + half);
    const __m512 low = _mm512_sub_ps(times(first, run.cosines + e), times(second, run.sines + e));
    const __m512 high = _mm512_add_ps(times(second, run.cosines + e + half), times(first, run.sines + e + half));
    _mm256_storeu_si256((__m256i*)(into + e), narrow(low));
    _mm256_storeu_si256((__m256i*)(into + e + half), narrow(high));
  }
  if (into != head) std::memcpy(into + run.turned, head + run.turned, (run.size - run.turned) * sizeof *head);
}

// Norms of the queries, and of the keys, of a row together.
inline void norm_all_heads(const Run& run, const Layer& layer, uint16_t* heads) {
#pragma omp for schedule(static)
  for (int64_t task = 0; task < 2 * run.rows; task++) {
    const bool keys = task % 2;
    uint16_t* from = heads + (task / 2 * (run.queries + 2 * run.keys) + (keys ? run.queries : 0)) * run.size;
    norm(from, keys ? layer.key_norm : layer.query_norm, (keys ? run.keys : run.queries) * run.size, run.epsilon, from,
         run.weighing);
  }
}

// What a norm makes of a branch, added to the hidden states.
inline void add_normed(const Run& run, const uint16_t* weight, uint16_t* branch, uint16_t* hidden) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < run.rows; row++) {
    uint16_t *from = branch + row * run.hidden, *into = hidden + row * run.hidden;
    norm(from, weight, run.hidden, run.epsilon, from, run.weighing);
    for (int64_t e = 0; e < run.hidden; e += LANES) {
      const __mmask16 mask = first_of(run.hidden - e);
      __m512 x = widen(_mm256_maskz_loadu_epi16(mask, from + e));
      if (run.multiplier != 1.f) x = widen(narrow(_mm512_mul_ps(x, _mm512_set1_ps(run.multiplier))));
      _mm256_mask_storeu_epi16(into + e, mask, narrow(_mm512_add_ps(widen(_mm256_maskz_loadu_epi16(mask, into + e)), x)));
    }
  }
}

// Queries in place, keys and values of the rows into their caches.
inline void place_heads(const Run& run, const Layer& layer, const Cache* caches, uint16_t* heads) {
  const int64_t all = run.queries + 2 * run.keys;
#pragma omp for schedule(static)
  for (int64_t task = 0; task < run.rows * all; task++) {
    const int64_t row = task / all, head = task % all, key = head - run.queries;
    int64_t part = 0, own = row;  // row of its request
    while (own >= run.parts[part].rows) own -= run.parts[part++].rows;
    const Cache& cache = caches[part];
    own += run.parts[part].held;
    uint16_t* from = heads + task * run.size;
    if (key >= run.keys) {  // a value
      uint16_t* into = cache.values + ((key - run.keys) * cache.capacity + own) * run.size;
      std::memcpy(into, from, run.size * sizeof(uint16_t));
      continue;
    }
    uint16_t* into = key < 0 ? from : cache.keys + (key * cache.capacity + own) * run.size;
    if (layer.query_norm && !run.whole)
      norm(from, key < 0 ? layer.query_norm : layer.key_norm, run.size, run.epsilon, from, run.weighing);
    if (layer.table >= 0)
      rotate(run, layer.table, row, from, into);
    else if (into != from)
      std::memcpy(into, from, run.size * sizeof(uint16_t));
  }
}

// A product that ends a branch: added to the hidden states, after a norm where there is one.
inline void end_branch(const Run& run, const uint32_t* weight, const uint16_t* input, const uint16_t* bias, int64_t inputs,
                       int64_t block, int64_t group, const uint16_t* after, uint16_t* branch, uint16_t* hidden) {
  multiply({weight, (const uint32_t*)input, bias, after ? branch : hidden, run.rows, run.hidden, inputs / 2, {block, run.tiles, group},
            nullptr, after ? nullptr : hidden, after ? 1.f : run.multiplier});
  if (after) add_normed(run, after, branch, hidden);
}

// What the gated part reads, opened and multiplied.
inline void gate(const Run& run, const Layer& layer, const uint16_t* input, uint16_t* inner) {
  multiply({layer.gate_up, (const uint32_t*)input, layer.gate_up_bias, inner, run.rows, 2 * run.inner, run.hidden / 2,
            {run.blocks[2], run.tiles, run.groups[2]}, run.opened, nullptr, 1.f});
}

// What one thread of the team does; `hidden` [rows][hidden] becomes that above the last layer.
inline void through(const Run& run, uint16_t* hidden, uint16_t* heads, uint16_t* attended, uint16_t* inner,
                    uint16_t* branch, std::atomic<bool>& numbers) {
  std::vector<Attention> rows(run.requests);
  std::vector<uint16_t> normed(run.rows * run.hidden);  // each thread its own: cheaper than to wait for another's
  auto normalised = [&](const uint16_t* weight) -> const uint16_t* {
    if (!weight) return hidden;
    for (int64_t row = 0; row < run.rows; row++)
      norm(hidden + row * run.hidden, weight, run.hidden, run.epsilon, normed.data() + row * run.hidden, run.weighing);
    return normed.data();
  };
  const int64_t wide = (run.queries + 2 * run.keys) * run.size, all = run.queries * run.size;
  for (int64_t i = 0; i < run.count; i++) {
    const Layer& layer = run.layers[i];
    multiply({layer.query_key_value, (const uint32_t*)normalised(layer.norm), layer.query_key_value_bias, heads, run.rows, wide,
              run.hidden / 2, {run.blocks[0], run.tiles, run.groups[0]}, nullptr, nullptr, 1.f});
    if (layer.query_norm && run.whole) norm_all_heads(run, layer, heads);
    const Cache* caches = run.caches + i * run.requests;
    place_heads(run, layer, caches, heads);
    int64_t first = 0;
    for (int64_t r = 0; r < run.requests; r++) {
      const Part& part = run.parts[r];
      const int64_t head = caches[r].capacity * run.size;
      rows[r] = {heads + first * wide, caches[r].keys, caches[r].values, attended + first * all, part.rows, run.queries,
                 run.queries / run.keys, run.size, part.held + part.rows, run.size, wide, head, run.size, head, run.size,
                 run.scale, part.settled, part.paths, layer.window, run.filled};
      first += part.rows;
    }
    attend(rows.data(), run.requests, run.order, numbers);
    end_branch(run, layer.output, attended, layer.output_bias, all, run.blocks[1], run.groups[1], layer.after_norm, branch, hidden);
    gate(run, layer, normalised(layer.second_norm), inner);
    end_branch(run, layer.down, inner, layer.down_bias, run.inner, run.blocks[3], run.groups[3], layer.after_second_norm, branch, hidden);
  }
}

}  // namespace
