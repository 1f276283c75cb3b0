// Attention of rows in bfloat16, each with the order of additions of torch's kernel for one row (flash attention on a CPU
// with AVX512-BF16): weights rounded to bfloat16, sums in an `Order`. Each row sees its own keys, and reads no others; where it
// has a window, its blocks begin with the first key of that. And how rows and heads are shared out over threads.
#pragma once
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "keys.h"
#include "numbers.h"
#include "scores.h"
#include "together.h"
#include "values.h"

namespace {

// Attention in one order of additions.
template <int H, Order O>
class Group : public Together<Group<H, O>, Attention, H> {
  using Base = Together<Group, Attention, H>;
  friend Base;

 public:
  Group(const Attention& a, int64_t row, int64_t rows, int64_t head) : Base(a, row, rows, head) {
    for (int64_t r = 0; r < rows; r++)
      for (int h = 0; h < H; h++) read(Base::query_of(r, h), query_[r][h]);
  }

 private:
  using Base::a_, Base::count, Base::keys_, Base::part_, Base::places_, Base::query_, Base::result_, Base::rows_,
      Base::turned_, Base::values_;
  // Rows whose sums there are registers for: of values, and of scores, which are four sums each in one order.
  static constexpr int VALUED = H < 4 ? 4 : 2, SCORED = O == FOURS ? VALUED / 2 : VALUED;

  void read(const uint16_t* from, float* into) const {
    if (in_words(O))
      std::memcpy(into, from, a_.size * sizeof *from);
    else
      for (int64_t e = 0; e < a_.size; e += LANES)
        _mm512_store_ps(into + e, widen(_mm256_maskz_loadu_epi16(first_of(a_.size - e), from + e)));
  }

  void score(int64_t first, int64_t all, bool apart) {
    const Dropping dropping(drops_small(O));
    for (int64_t key = 0; key < all; key += LANES) {
      if (!apart || first + key + LANES <= a_.settled) {
        turn<O, false>(a_, keys_ + (first + key) * a_.key_row, nullptr, all - key, turned_);
        Base::template by_rows<SCORED>([&](auto rows, int64_t r) {
          scores<rows * H, O>(a_, query_[r], turned_, (float(*)[BLOCK])(part_[r][0] + key));
        });
        continue;
      }
      for (int64_t r = 0; r < rows_; r++) {
        const int64_t left = count(r, first) - key;
        if (left <= 0) continue;
        turn<O, true>(a_, keys_, places_[r] + key, left, turned_);
        scores<H, O>(a_, query_[r], turned_, (float(*)[BLOCK])(part_[r][0] + key));
      }
    }
  }

  static float weights(float* scores, int64_t count, float* highest) { return weigh<O>(scores, count, highest); }

  static void fade(int64_t, int, int64_t, float) {}

  // First the values of keys that all rows see, as many as are added up apart from others; then each row's further ones.
  void add(int64_t first, int64_t all, bool apart) {
    const Dropping dropping(drops_small(O));
    const int64_t common = std::clamp((apart ? a_.settled : Base::fewest_) - first, int64_t{0}, all);
    // One by one, a block of keys is summed whole: together where all rows see all of it.
    const int64_t joint = O != ONES ? common / (2 * LANES) * (2 * LANES) : common < all ? 0 : all;
    const uint16_t* values = values_ + first * a_.value_row;
    if (joint)
      Base::template by_rows<VALUED>([&](auto rows, int64_t r) {
        add_values<rows * H, O, false>(a_, values, nullptr, 0, joint, part_[r], result_[r]);
      });
    for (int64_t r = 0; r < rows_; r++) {
      const int64_t own = count(r, first);
      if (own <= joint) continue;
      if (apart)
        add_values<H, O, true>(a_, values_, places_[r], joint, own, part_[r], result_[r]);
      else
        add_values<H, O, false>(a_, values, nullptr, joint, own, part_[r], result_[r]);
    }
  }

  void write(int64_t r, int h) const {
    const __m512 scale = _mm512_set1_ps(1.0f / Base::sum_[r][h]);
    uint16_t* into = Base::output_of(r, h);
    for (int64_t e = 0; e < a_.size; e += LANES)
      _mm256_mask_storeu_epi16(into + e, first_of(a_.size - e), convert(_mm512_mul_ps(_mm512_load_ps(result_[r][h] + e), scale)));
  }
};

// Rows of one request that go through the keys together: one, where some fill their windows.
template <class A>
int64_t together(const A& a) { return a.length >= a.window ? 1 : ROWS_TOGETHER; }

// Query heads that share keys, up to `HEADS` of them; whether all of it are numbers.
template <Order O>
bool some_heads(const Attention& a, int64_t row, int64_t rows, int64_t head, int64_t count) {
  switch (count) {
    case 1: return Group<1, O>(a, row, rows, head).run();
    case 2: return Group<2, O>(a, row, rows, head).run();
    case 3: return Group<3, O>(a, row, rows, head).run();
    default: return Group<4, O>(a, row, rows, head).run();
  }
}

inline bool some_heads(int64_t order, const Attention& a, int64_t row, int64_t rows, int64_t head, int64_t count) {
  switch (order) {
    case PAIRS: return some_heads<PAIRS>(a, row, rows, head, count);
    case FOURS: return some_heads<FOURS>(a, row, rows, head, count);
    case EIGHTS: return some_heads<EIGHTS>(a, row, rows, head, count);
    case ONES: return some_heads<ONES>(a, row, rows, head, count);
    default: return some_heads<TILES>(a, row, rows, head, count);
  }
}

// Query heads `part` * HEADS on of those that share keys, of every row: units `from` to `to`, a unit is a head of a row.
template <class A>
bool some_units(int64_t order, const A& a, int64_t group, int64_t part, int64_t from, int64_t to) {
  const int64_t first = group * a.shared + part * HEADS, heads = std::min<int64_t>(HEADS, a.shared - part * HEADS);
  bool fine = true;
  for (int64_t unit = from, taken; unit < to; unit += taken) {
    const int64_t row = unit / heads, head = unit % heads;
    const bool whole = head == 0 && unit + heads <= to;
    const int64_t rows = whole ? std::min(together(a), (to - unit) / heads) : 1;
    const int64_t count = whole ? heads : std::min(heads - head, to - unit);
    const int64_t own = seen(a, row) < a.window ? order : a.filled;
    fine &= some_heads(own, in_window(a, row), row, rows, first + head, count);
    taken = rows * count;
  }
  return fine;
}

// Every row and query head of several requests, shared out evenly; called by every thread of a team, which waits for all at
// the end. `numbers` becomes false where some score is no finite number: nothing is promised then.
template <class A>
void attend(const A* all, int64_t count, int64_t order, std::atomic<bool>& numbers) {
  const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
  int64_t units = 0, before = 0;
  for (int64_t i = 0; i < count; i++) units += all[i].rows * all[i].queries;
  const int64_t begin = units * thread / team, end = units * (thread + 1) / team;
  for (int64_t i = 0; i < count; i++) {
    const A& a = all[i];
    for (int64_t group = 0; group < a.queries / a.shared; group++)
      for (int64_t part = 0; part * HEADS < a.shared; part++) {
        const int64_t own = a.rows * std::min<int64_t>(HEADS, a.shared - part * HEADS);
        const int64_t from = std::max<int64_t>(0, begin - before), to = std::min(own, end - before);
        if (from < to && !some_units(order, a, group, part, from, to)) numbers = false;
        before += own;
      }
  }
#pragma omp barrier
}

}  // namespace
