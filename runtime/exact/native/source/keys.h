// Which keys each row of a block sees: the settled ones, then those on its own path; and keys turned side by side.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "numbers.h"

namespace {

constexpr int AHEAD = 32;  // keys to come that are fetched from memory meanwhile

inline void fetch(const void* from) { _mm_prefetch((const char*)from, _MM_HINT_T0); }

enum Order { PAIRS, FOURS, EIGHTS, TILES, ONES };  // how products are added, of scores and of values

// Whether numbers are taken two at a time, by the CPU's instruction for pairs. What that does is two fused additions, the odd
// number's first, with numbers too small to be normal taken for 0. Other orders have it by such additions: an Intel CPU makes
// more than four of them in the time of one instruction. Where they drop small numbers, so do the sums of sums between them.
constexpr bool in_words(Order order) { return order == PAIRS; }
constexpr bool drops_small(Order order) { return order == EIGHTS || order == TILES; }

// Of so many numbers that are added one by one, those that are summed apart: 192, or half of fewer than two such blocks.
inline int64_t summed_apart(int64_t count) { return count <= 192 ? count : count < 384 ? count / 2 : 192; }

// While it stands, numbers too small to be normal are 0 for this thread, if asked for.
class Dropping {
 public:
  explicit Dropping(bool on) {
    if (on) _mm_setcsr(before_ | 0x8040);  // flush to zero, denormals are zero
  }
  ~Dropping() { _mm_setcsr(before_); }

 private:
  const unsigned before_ = _mm_getcsr();
};

template <class N>
struct AttentionOf {
  using Number = N;
  const N *query, *keys, *values;  // numbers of a head lie side by side
  N* output;                       // [rows][query heads][size]
  int64_t rows, queries, shared, size, length;
  int64_t query_head, query_row, key_head, key_row, value_head, value_row;  // strides
  float scale;
  int64_t settled;       // keys that every row sees, first
  const int64_t* paths;  // [rows][1 + length - settled]: how many more a row sees, and their places behind the settled
                         // ones; null where rows follow one another
  int64_t window = int64_t{1} << 62;  // keys that a row sees at most: the last ones
  int64_t filled = PAIRS;             // order of a row whose window is full
};

using Attention = AttentionOf<uint16_t>;

// Keys that a row sees.
template <class A>
int64_t seen(const A& a, int64_t row) {
  return a.paths ? a.settled + a.paths[row * (1 + a.length - a.settled)] : a.length - a.rows + row + 1;
}

// As a row finds it, whose first keys have left its window: what is left begins with the first that it sees.
template <class A>
A in_window(A a, int64_t row) {
  const int64_t left = std::max<int64_t>(0, seen(a, row) - a.window);
  a.keys += left * a.key_row;
  a.values += left * a.value_row;
  a.length -= left;
  a.settled -= left;  // less than none where some of the path have left too
  return a;
}

// Places of `count` keys of a row, from its key `first` on.
template <class A>
void find(const A& a, int64_t row, int64_t first, int64_t count, int32_t* places) {
  const int64_t* path = a.paths + row * (1 + a.length - a.settled) + 1 - a.settled;
  for (int64_t i = 0; i < count; i++) places[i] = first + i < a.settled ? first + i : a.settled + path[first + i];
}

// Up to 16 keys side by side, as the order takes them: words of two numbers, or numbers. They follow one another from
// `keys` on; or, apart, they stand at `places`.
template <Order O, bool APART>
void turn(const Attention& a, const uint16_t* keys, const int32_t* places, int64_t count, float (*into)[LANES]) {
  for (int64_t e = 0; e < a.size; e += 2 * LANES) {
    const __mmask16 mask = first_of((a.size - e) / 2);
    __m512i words[LANES];
    for (int i = 0; i < LANES; i++) {
      const uint16_t* at = keys + (APART ? places[std::min<int64_t>(i, count - 1)] : i) * a.key_row + e;
      if (!APART) fetch(at + AHEAD * a.key_row);
      words[i] = i < count ? _mm512_maskz_loadu_epi32(mask, at) : _mm512_setzero_si512();
    }
    transpose(words);
    const int64_t pairs = std::min<int64_t>(LANES, (a.size - e) / 2);
    for (int64_t i = 0; i < pairs; i++) {
      if (in_words(O)) {
        _mm512_store_si512(into[e / 2 + i], words[i]);
      } else {
        _mm512_store_ps(into[e + 2 * i], low(words[i]));
        _mm512_store_ps(into[e + 2 * i + 1], high(words[i]));
      }
    }
  }
}

}  // namespace
