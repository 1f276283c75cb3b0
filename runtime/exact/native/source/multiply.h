// A product by a team of threads; on CPUs with AMX by their tiles, which take 32 numbers along K at a time, of up to 16 rows
// and 16 outputs: even and odd numbers are summed apart, from zero, and both sums are then added to the output's.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "products.h"

namespace {

constexpr int64_t FETCHED = 64;  // pairs along K from those that are multiplied to those that are fetched meanwhile
constexpr int TILE_ROWS = 16, TILE_PAIRS = 16, TILE_BYTES = 64;

// Asks the system for the tiles, once in a process; whether it gives them.
inline bool ask_for_tiles() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA of the Linux kernel
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// The tiles of one thread, given back at the end: 0 to 3 for sums of two registers of outputs by two tiles of rows, 4 and 5
// for these rows, 6 and 7 for the weights. `pairs` is a multiple of `TILE_PAIRS`.
class Tiles {
 public:
  ~Tiles() {
    if (shaped_) _tile_release();
  }

  // All rows of B registers of outputs.
  template <int B>
  void rows(const Product& p, int64_t part) {
    for (int64_t row = 0; row < p.rows; row += 2 * TILE_ROWS) {
      const int64_t count = std::min<int64_t>(2 * TILE_ROWS, p.rows - row);
      shape(count);
      count > TILE_ROWS ? tile<B, 2>(p, row, count, part) : tile<B, 1>(p, row, count, part);
    }
  }

 private:
  int64_t shaped_ = 0;  // rows

  void shape(int64_t rows) {
    if (rows == shaped_) return;
    shaped_ = rows;
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    auto set = [&](std::initializer_list<int> tiles, int64_t rows) {
      for (int tile : tiles) shapes.rows[tile] = (uint8_t)rows, shapes.bytes[tile] = TILE_BYTES;
    };
    set({0, 1, 4}, std::min<int64_t>(TILE_ROWS, rows));
    set({2, 3, 5}, std::max<int64_t>(1, rows - TILE_ROWS));
    set({6, 7}, TILE_PAIRS);
    asm volatile("" ::: "memory");
    _tile_loadconfig(&shapes);
  }

  // C tiles of rows, the last of them maybe not full.
  template <int B, int C>
  void tile(const Product& p, int64_t row, int64_t count, int64_t part) {
    constexpr int MOST = C * TILE_ROWS;
    alignas(64) float sums[B][MOST][LANES];
    __m512 total[MOST][B], before[MOST][B];
    const uint32_t *weight = p.weight + part * p.pairs * LANES, *input = p.input + row * p.pairs;
    for (int64_t start = 0; start < p.pairs; start += p.along.block) {
      const int64_t stop = std::min(start + p.along.block, p.pairs);
      row ? add<B, C, false>(p, weight, input, start, stop) : add<B, C, true>(p, weight, input, start, stop);
      _tile_stored(0, sums[0], TILE_BYTES);
      if (B == 2) _tile_stored(1, sums[B - 1], TILE_BYTES);
      if (C == 2) _tile_stored(2, sums[0][MOST - TILE_ROWS], TILE_BYTES);
      if (C == 2 && B == 2) _tile_stored(3, sums[B - 1][MOST - TILE_ROWS], TILE_BYTES);
      for (int64_t m = 0; m < count; m++)
        for (int b = 0; b < B; b++) add_block(p.along, start, _mm512_load_ps(sums[b][m]), total[m][b], before[m][b]);
    }
    if (p.along.group && p.along.group < p.pairs)
      for (int64_t m = 0; m < count; m++)
        for (int b = 0; b < B; b++) total[m][b] = _mm512_add_ps(before[m][b], total[m][b]);
    for (int64_t m = 0; m < count; m++) finish<B>(p, row + m, part, total[m]);
  }

  // Weights of the tiles that come `FETCHED` pairs later; the CPU does not see by itself which will be read.
  template <int B>
  static void fetch(const Product& p, const uint32_t* from, int64_t k) {
    const int64_t over = k + FETCHED < p.pairs || p.silu ? 0 : (B - 1) * p.pairs;  // what lies between this tile and the next
    for (int line = 0; line < TILE_PAIRS; line++)
      for (int b = 0; b < B; b++)
        _mm_prefetch((const char*)(from + (FETCHED + over + line) * LANES + b * apart_of(p)), _MM_HINT_T0);
  }

  // Pairs `k` to `stop` along K. Numbers of registers are literals: the compiler's intrinsics paste them.
  template <int B, int C, bool FETCHES>
  static void add(const Product& p, const uint32_t* weight, const uint32_t* input, int64_t k, int64_t stop) {
    const int64_t stride = 4 * p.pairs, apart = apart_of(p);
    asm volatile("" ::: "memory");
    _tile_zero(0);
    if (B == 2) _tile_zero(1);
    if (C == 2) _tile_zero(2);
    if (C == 2 && B == 2) _tile_zero(3);
    for (; k < stop; k += TILE_PAIRS) {
      const uint32_t* from = weight + k * LANES;
      if (FETCHES) fetch<B>(p, from, k);
      _tile_loadd(4, input + k, stride);
      _tile_loadd(6, from, TILE_BYTES);
      _tile_dpbf16ps(0, 4, 6);
      if (C == 2) {
        _tile_loadd(5, input + k + TILE_ROWS * p.pairs, stride);
        _tile_dpbf16ps(2, 5, 6);
      }
      if (B == 1) continue;
      _tile_loadd(7, from + apart, TILE_BYTES);
      _tile_dpbf16ps(1, 4, 7);
      if (C == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
};

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
