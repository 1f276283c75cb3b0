// A product by a team of threads.
#pragma once
#include <algorithm>
#include <cstdint>

#include "products.h"
#include "tiles.h"

namespace {

// All rows of B registers of outputs; the weight stays in the cache for further rows.
template <int B>
void rows(const Product& p, int64_t part) {
  for (int64_t row = 0; row < p.rows; row += ROWS) {
    switch (std::min<int64_t>(ROWS, p.rows - row)) {
      case 1: tile<1, B>(p, row, part); break;
      case 2: tile<2, B>(p, row, part); break;
      case 3: tile<3, B>(p, row, part); break;
      case 4: tile<4, B>(p, row, part); break;
      case 5: tile<5, B>(p, row, part); break;
      case 6: tile<6, B>(p, row, part); break;
      case 7: tile<7, B>(p, row, part); break;
      default: tile<8, B>(p, row, part);
    }
  }
}

// All of it; called by every thread of a team, which waits for all at the end.
inline void multiply(const Product& p) {
  const int64_t parts = parts_of(p), tiles = (parts + TILE - 1) / TILE;
  Tiles own;
#pragma omp for schedule(static)
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t part = p.silu ? t : t * TILE;
    const bool whole = p.silu || part + TILE <= parts;
    if (p.along.tiles)
      whole ? own.rows<TILE>(p, part) : own.rows<1>(p, part);
    else
      whole ? rows<TILE>(p, part) : rows<1>(p, part);
  }
}

}  // namespace
