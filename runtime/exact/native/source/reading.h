// Attention of a prompt, each row on the keys up to its own, in the order in which torch's kernel adds for many queries where
// MKL multiplies for it: products one by one (`ONES`); of values all those of a block of 512 keys that the prompt has, seen by
// the row or not, so that the same parts of them are summed apart. Rows do not depend on one another.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "keys.h"
#include "numbers.h"
#include "scores.h"

namespace {

constexpr int READ_ROWS = 6, READ_VECTORS = 4;  // sums there are registers for
constexpr int UNIT_ROWS = 64;                   // of one head, that a thread takes at a time; blocks of keys begin with one

inline int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// Keys turned and values, as numbers: keys [heads][size][padded length], values [heads][length][padded size].
struct Widened {
  std::vector<float> keys, values;
  int64_t length, size;

  explicit Widened(const Attention& a) : length(padded(a.length)), size(padded(a.size)) {
    const int64_t heads = a.queries / a.shared;
    keys.resize(heads * a.size * length);
    values.resize(heads * a.length * size);
  }
};

// Called by every thread of a team; whether all values are finite.
inline bool widen_all(const Attention& a, Widened& w) {
  const int64_t heads = a.queries / a.shared, chunks = w.length / LANES;
  bool finite = true;
  alignas(64) float turned[MAX_SIZE][LANES];
#pragma omp for schedule(static) collapse(2)
  for (int64_t head = 0; head < heads; head++)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t first = chunk * LANES, count = std::min<int64_t>(LANES, a.length - first);
      const uint16_t* keys = a.keys + head * a.key_head + first * a.key_row;
      turn<ONES, false>(a, keys, nullptr, count, turned);
      for (int64_t e = 0; e < a.size; e++)
        _mm512_storeu_ps(&w.keys[(head * a.size + e) * w.length + first], _mm512_load_ps(turned[e]));
      for (int64_t i = first; i < first + count; i++)
        for (int64_t e = 0; e < a.size; e += LANES) {
          const __m512 x = widen(_mm256_maskz_loadu_epi16(first_of(a.size - e), a.values + head * a.value_head + i * a.value_row + e));
          finite &= !_mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
          _mm512_storeu_ps(&w.values[(head * a.length + i) * w.size + e], x);
        }
    }
  return finite;
}

// Adds R rows of `left` times V vectors of `count` lines of `right` to `sum`: one by one, blocks of them summed apart.
template <int R, int V>
__attribute__((noinline)) void one_by_one(const float* left, int64_t left_row, const float* right, int64_t right_line, int64_t block,
                                          int64_t count, float* sum, int64_t sum_row) {
  for (int64_t start = 0; start < count; start += block) {
    __m512 part[R][V];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) part[r][v] = _mm512_setzero_ps();
    for (int64_t i = start; i < std::min(start + block, count); i++) {
      __m512 line[V];
      for (int v = 0; v < V; v++) line[v] = _mm512_loadu_ps(right + i * right_line + v * LANES);
      for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) part[r][v] = _mm512_fmadd_ps(line[v], _mm512_set1_ps(left[r * left_row + i]), part[r][v]);
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) {
        float* at = sum + r * sum_row + v * LANES;
        _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), part[r][v]));
      }
  }
}

// Any number of rows.
template <int V>
void some_rows(int64_t rows, const float* left, int64_t left_row, const float* right, int64_t right_line, int64_t block, int64_t count,
               float* sum, int64_t sum_row) {
  const auto some = [&](auto taken, int64_t r) {
    one_by_one<taken, V>(left + r * left_row, left_row, right, right_line, block, count, sum + r * sum_row, sum_row);
  };
  int64_t r = 0;
  for (; r + READ_ROWS <= rows; r += READ_ROWS) some(std::integral_constant<int, READ_ROWS>(), r);
  for (; r + 2 <= rows; r += 2) some(std::integral_constant<int, 2>(), r);
  if (r < rows) some(std::integral_constant<int, 1>(), r);
}

// The same for `width` numbers of each line, a multiple of a vector.
inline void multiply_ones(int64_t rows, const float* left, int64_t left_row, const float* right, int64_t right_line, int64_t width,
                          int64_t block, int64_t count, float* sum, int64_t sum_row) {
  int64_t at = 0;
  for (; at + READ_VECTORS * LANES <= width; at += READ_VECTORS * LANES)
    some_rows<READ_VECTORS>(rows, left, left_row, right + at, right_line, block, count, sum + at, sum_row);
  for (; at < width; at += LANES) some_rows<1>(rows, left, left_row, right + at, right_line, block, count, sum + at, sum_row);
}

// Rows of one head, not beyond a unit, of a prompt that has `whole` keys, of which those to the last row are there.
class Reading {
 public:
  Reading(const Attention& a, const Widened& w, int64_t whole, int64_t head, int64_t row, int64_t rows)
      : a_(a), w_(w), whole_(whole), keys_(&w.keys[head / a.shared * a.size * w.length]), values_(&w.values[head / a.shared * a.length * w.size]),
        head_(head), row_(row), rows_(rows), first_(a.length - a.rows + row) {}

  // Whether all of it are numbers.
  bool run() {
    for (int64_t r = 0; r < rows_; r++) {
      highest_[r] = -INFINITY;
      sum_[r] = 0;
      const uint16_t* from = a_.query + head_ * a_.query_head + (row_ + r) * a_.query_row;
      for (int64_t e = 0; e < a_.size; e += LANES)
        _mm512_store_ps(query_[r] + e, widen(_mm256_maskz_loadu_epi16(first_of(a_.size - e), from + e)));
    }
    const int64_t most = first_ + rows_;
    for (int64_t key = 0; key < most; key += BLOCK) {
      const int64_t seen = std::min<int64_t>(BLOCK, most - key), count = std::min<int64_t>(BLOCK, whole_ - key);
      for (int64_t r = 0; r < rows_; r++) std::fill_n(part_[r], padded(seen), 0.f);
      multiply_ones(rows_, query_[0], MAX_SIZE, keys_ + key, w_.length, padded(seen), summed_apart(a_.size), a_.size, part_[0], BLOCK);
      for (int64_t r = 0; r < rows_; r++)
        if (!weigh_row(r, key, padded(seen), count)) return false;
      multiply_ones(rows_, part_[0], BLOCK, values_ + key * w_.size, w_.size, w_.size, summed_apart(count), seen, result_[0], MAX_SIZE);
    }
    for (int64_t r = 0; r < rows_; r++) write(r);
    return true;
  }

 private:
  const Attention& a_;
  const Widened& w_;
  const int64_t whole_;
  const float *keys_, *values_;
  const int64_t head_, row_, rows_, first_;  // `first_` is the place of the first row among the keys
  alignas(64) float query_[UNIT_ROWS][MAX_SIZE], part_[UNIT_ROWS][BLOCK], result_[UNIT_ROWS][MAX_SIZE];
  float highest_[UNIT_ROWS], sum_[UNIT_ROWS];

  // A row's products with keys from `key` on, up to `width` of the `count` of that block, to weights, 0 for keys that it does
  // not see; what was added up so far fades to the new maximum.
  bool weigh_row(int64_t r, int64_t key, int64_t width, int64_t count) {
    float* part = part_[r];
    const __m512 scale = _mm512_set1_ps(a_.scale);
    for (int64_t i = 0; i < width; i += LANES) _mm512_store_ps(part + i, _mm512_mul_ps(_mm512_load_ps(part + i), scale));
    const int64_t own = std::min<int64_t>(BLOCK, first_ + r + 1 - key), vectors = count / LANES * LANES;
    std::fill(part + own, part + padded(own), -INFINITY);
    const float earlier = highest_[r];
    // Keys that fill no vector of the block are weighed apart, but others never are, wherever the row ends.
    const float added = weigh<ONES>(part, own <= vectors ? padded(own) : own, &highest_[r]);
    std::fill(part + padded(own), part + width, 0.f);
    const float fade = std::exp(earlier - highest_[r]);
    sum_[r] = std::fma(fade, sum_[r], added);
    for (int64_t e = 0; e < w_.size; e += LANES)
      _mm512_store_ps(result_[r] + e, key ? _mm512_mul_ps(_mm512_load_ps(result_[r] + e), _mm512_set1_ps(fade)) : _mm512_setzero_ps());
    return std::isfinite(highest_[r]);
  }

  void write(int64_t r) const {
    const __m512 scale = _mm512_set1_ps(1.0f / sum_[r]);
    uint16_t* into = a_.output + ((row_ + r) * a_.queries + head_) * a_.size;
    for (int64_t e = 0; e < a_.size; e += LANES)
      _mm256_mask_storeu_epi16(into + e, first_of(a_.size - e), convert(_mm512_mul_ps(_mm512_load_ps(result_[r] + e), scale)));
  }
};

// Every row and query head of a prompt; called by every thread of a team. `numbers` becomes false where a score or a value is
// no finite number: nothing is promised then.
inline void read_prompt(const Attention& a, Widened& w, int64_t whole, std::atomic<bool>& numbers) {
  if (!widen_all(a, w)) numbers = false;
  const int64_t start = a.length - a.rows, last = (a.length - 1) / UNIT_ROWS;
  const int64_t units = last - start / UNIT_ROWS + 1;
#pragma omp for schedule(dynamic) collapse(2)
  for (int64_t unit = 0; unit < units; unit++)  // those that see most first
    for (int64_t head = 0; head < a.queries; head++) {
      const int64_t first = (last - unit) * UNIT_ROWS, from = std::max(first, start), to = std::min(first + UNIT_ROWS, a.length);
      if (!Reading(a, w, whole, head, from - start, to - from).run()) numbers = false;
    }
}

}  // namespace
