// Which keys each row of a block sees: the settled ones, then those on its own path.
#pragma once
#include <cstdint>

namespace {

enum Order { PAIRS, FOURS };  // how products are added, of scores and of values

struct Attention {
  const uint16_t *query, *keys, *values;  // numbers of a head lie side by side
  uint16_t* output;                       // [rows][query heads][size]
  int64_t rows, queries, shared, size, length;
  int64_t query_head, query_row, key_head, key_row, value_head, value_row;  // strides
  float scale;
  int64_t settled;       // keys that every row sees, first
  const int64_t* paths;  // [rows][1 + length - settled]: how many more a row sees, and their places behind the settled
};                       // ones; null where rows follow one another

// Keys that a row sees.
inline int64_t seen(const Attention& a, int64_t row) {
  return a.paths ? a.settled + a.paths[row * (1 + a.length - a.settled)] : a.length - a.rows + row + 1;
}

// Places of `count` keys of a row, from its key `first` on.
inline void find(const Attention& a, int64_t row, int64_t first, int64_t count, int32_t* places) {
  const int64_t* path = a.paths + row * (1 + a.length - a.settled) + 1 - a.settled;
  for (int64_t i = 0; i < count; i++) places[i] = first + i < a.settled ? first + i : a.settled + path[first + i];
}

}  // namespace
