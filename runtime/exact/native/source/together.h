// Rows of a request, and query heads that share keys, that go through the keys together: in blocks of 512, each row as far as
// it sees, with a running maximum. What attention in bfloat16 and in float32 have in common.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "keys.h"
#include "numbers.h"
#include "scores.h"

namespace {

constexpr int HEADS = 4;          // query heads that go through the keys together,
constexpr int ROWS_TOGETHER = 4;  // and rows

// What was added up before a block of keys, which begins at `first`.
inline void faded(float* sums, int64_t first, float fade) {
  _mm512_store_ps(sums, first ? _mm512_mul_ps(_mm512_load_ps(sums), _mm512_set1_ps(fade)) : _mm512_setzero_ps());
}

// H query heads from `head` on, of `rows` rows. `Kernel`, which derives from this, reads the queries; it scores the keys of a
// block, makes weights of scores, adds values, fades what else it has added up, and writes.
template <class Kernel, class A, int H>
class Together {
 public:
  // Whether all of it are numbers.
  bool run() {
    Kernel& kernel = static_cast<Kernel&>(*this);
    for (int64_t first = 0; first < most_; first += BLOCK) {
      const int64_t all = std::min<int64_t>(BLOCK, most_ - first);
      const bool apart = a_.paths && first + all > a_.settled;  // some keys of this block are not those of all rows
      for (int64_t r = 0; apart && r < rows_; r++) find(a_, row_ + r, first, count(r, first), places_[r]);
      kernel.score(first, all, apart);
      for (int64_t r = 0; r < rows_; r++)
        for (int h = 0; h < H && count(r, first) > 0; h++)
          if (!weigh(kernel, r, h, first)) return false;
      kernel.add(first, all, apart);
    }
    for (int64_t r = 0; r < rows_; r++)
      for (int h = 0; h < H; h++) kernel.write(r, h);
    return true;
  }

 protected:
  static constexpr int R = ROWS_TOGETHER;

  const A& a_;
  const typename A::Number *keys_, *values_;
  const int64_t row_, rows_, head_;
  int64_t own_[R], most_ = 0, fewest_ = 0;  // keys that each of the rows sees; the most and the fewest
  int32_t places_[R][BLOCK];
  alignas(64) float query_[R][H][MAX_SIZE], part_[R][H][BLOCK], result_[R][H][MAX_SIZE], turned_[MAX_SIZE][LANES];
  float highest_[R][H], sum_[R][H] = {};

  Together(const A& a, int64_t row, int64_t rows, int64_t head)
      : a_(a), keys_(a.keys + head / a.shared * a.key_head), values_(a.values + head / a.shared * a.value_head), row_(row),
        rows_(rows), head_(head) {
    for (int64_t r = 0; r < rows; r++) {
      own_[r] = seen(a, row + r);
      most_ = std::max(most_, own_[r]);
      fewest_ = r ? std::min(fewest_, own_[r]) : own_[r];
      for (int h = 0; h < H; h++) highest_[r][h] = -INFINITY;
    }
  }

  const typename A::Number* query_of(int64_t r, int h) const {
    return a_.query + (head_ + h) * a_.query_head + (row_ + r) * a_.query_row;
  }

  typename A::Number* output_of(int64_t r, int h) const { return a_.output + ((row_ + r) * a_.queries + head_ + h) * a_.size; }

  // Keys of a block that a row sees.
  int64_t count(int64_t r, int64_t first) const { return std::min<int64_t>(BLOCK, own_[r] - first); }

  // Calls `some(rows, r)` for all rows, with a number of them that is known when this is compiled.
  template <int MOST, class Some>
  void by_rows(const Some& some) const {
    int64_t r = 0;
    for (; MOST >= 4 && r + 4 <= rows_; r += 4) some(std::integral_constant<int, MOST>(), r);
    for (; MOST >= 2 && r + 2 <= rows_; r += 2) some(std::integral_constant<int, std::min(2, MOST)>(), r);
    for (; r < rows_; r++) some(std::integral_constant<int, 1>(), r);
  }

 private:
  // Scores to weights; what was added up so far fades to the new maximum.
  bool weigh(Kernel& kernel, int64_t r, int h, int64_t first) {
    const float earlier = highest_[r][h];
    const float added = kernel.weights(part_[r][h], count(r, first), &highest_[r][h]);
    const float fade = std::exp(earlier - highest_[r][h]);
    sum_[r][h] = std::fma(fade, sum_[r][h], added);
    if (!std::isfinite(highest_[r][h])) return false;
    for (int64_t e = 0; e < a_.size; e += LANES) faded(result_[r][h] + e, first, fade);
    kernel.fade(r, h, first, fade);
    return true;
  }
};

}  // namespace
