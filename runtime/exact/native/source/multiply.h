// A product by a team of threads; on CPUs with AMX by their tiles, which take 32 numbers along K at a time, of up to 16 rows
// and 16 outputs: even and odd numbers are summed apart, from zero, and both sums are then added to the output's.
#pragma once
#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

#include "products.h"

namespace {

constexpr int TILE_ROWS = 16, TILE_PAIRS = 16, TILE_BYTES = 64;
// Registers: sums of two parts, the input, and both parts' weights.
constexpr int SUM = 0, INPUT = 2, WEIGHT = 3;

// Asks the system for the tiles, once in a process; whether it gives them.
inline bool ask_for_tiles() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA of the Linux kernel
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// The tiles of one thread: given back at the end. `pairs` is a multiple of `TILE_PAIRS`.
class Tiles {
 public:
  ~Tiles() {
    if (shaped_) _tile_release();
  }

  // All rows of B registers of outputs.
  template <int B>
  void rows(const Product& p, int64_t part) {
    for (int64_t row = 0; row < p.rows; row += TILE_ROWS) {
      const int64_t count = std::min<int64_t>(TILE_ROWS, p.rows - row);
      shape(count);
      tile<B>(p, row, count, part);
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
    for (int tile = SUM; tile < WEIGHT + TILE; tile++) {
      shapes.rows[tile] = (uint8_t)(tile < WEIGHT ? rows : TILE_PAIRS);
      shapes.bytes[tile] = TILE_BYTES;
    }
    asm volatile("" ::: "memory");
    _tile_loadconfig(&shapes);
  }

  template <int B>
  void tile(const Product& p, int64_t row, int64_t count, int64_t part) {
    alignas(64) float sums[B][TILE_ROWS][LANES];
    __m512 total[TILE_ROWS][B], before[TILE_ROWS][B];
    const uint32_t *weight = (const uint32_t*)p.weight + part * p.pairs * LANES, *input = p.input + row * p.pairs;
    for (int64_t start = 0; start < p.pairs; start += p.along.block) {
      add<B>(weight, input, start, std::min(start + p.along.block, p.pairs), apart_of(p), p.pairs);
      _tile_stored(0, sums[0], TILE_BYTES);
      if (B == 2) _tile_stored(1, sums[B - 1], TILE_BYTES);
      for (int64_t m = 0; m < count; m++)
        for (int b = 0; b < B; b++) add_block(p.along, start, _mm512_load_ps(sums[b][m]), total[m][b], before[m][b]);
    }
    if (p.along.group && p.along.group < p.pairs)
      for (int64_t m = 0; m < count; m++)
        for (int b = 0; b < B; b++) total[m][b] = _mm512_add_ps(before[m][b], total[m][b]);
    for (int64_t m = 0; m < count; m++) finish<B>(p, row + m, part, total[m]);
  }

  // Pairs `k` to `stop` along K. Numbers of registers are literals: the compiler's intrinsics paste them.
  template <int B>
  static void add(const uint32_t* weight, const uint32_t* input, int64_t k, int64_t stop, int64_t apart, int64_t stride) {
    asm volatile("" ::: "memory");
    _tile_zero(0);
    if (B == 2) _tile_zero(1);
    for (; k < stop; k += TILE_PAIRS) {
      const uint32_t* from = weight + k * LANES;
      _tile_loadd(2, input + k, 4 * stride);
      _tile_loadd(3, from, TILE_BYTES);
      _tile_dpbf16ps(0, 2, 3);
      if (B == 1) continue;
      _tile_loadd(4, from + apart, TILE_BYTES);
      _tile_dpbf16ps(1, 2, 4);
    }
  }
};

// All rows of B registers of outputs, in passes of as many rows each as can be; the weight stays in the cache for further ones.
template <int B, bool QUANTIZED>
void rows_of(const Product& p, int64_t part, bool last) {
  if (!p.rows) return;
  Pass pass{0, (p.rows + ROWS - 1) / ROWS, last};
  const int64_t each = (p.rows + pass.count - 1) / pass.count;
  for (int64_t row = 0; row < p.rows; row += each, pass.number++) {
    switch (std::min(each, p.rows - row)) {
      case 1: tile<1, B, QUANTIZED>(p, row, part, pass); break;
      case 2: tile<2, B, QUANTIZED>(p, row, part, pass); break;
      case 3: tile<3, B, QUANTIZED>(p, row, part, pass); break;
      case 4: tile<4, B, QUANTIZED>(p, row, part, pass); break;
      case 5: tile<5, B, QUANTIZED>(p, row, part, pass); break;
      case 6: tile<6, B, QUANTIZED>(p, row, part, pass); break;
      case 7: tile<7, B, QUANTIZED>(p, row, part, pass); break;
      default: tile<8, B, QUANTIZED>(p, row, part, pass);
    }
  }
}

template <int B>
void rows(const Product& p, int64_t part, bool last) {
  p.scales ? rows_of<B, true>(p, part, last) : rows_of<B, false>(p, part, last);
}

// All of it; called by every thread of a team, which waits for all at the end.
inline void multiply(const Product& p) {
  const int64_t parts = parts_of(p), tiles = (parts + TILE - 1) / TILE;
  Tiles own;
  const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num(), stop = tiles * (thread + 1) / team;
  for (int64_t t = tiles * thread / team; t < stop; t++) {
    const int64_t part = p.silu ? t : t * TILE;
    const bool whole = p.silu || part + TILE <= parts;
    if (p.along.tiles)
      whole ? own.rows<TILE>(p, part) : own.rows<1>(p, part);
    else
      whole ? rows<TILE>(p, part, t + 1 == stop) : rows<1>(p, part, true);
  }
#pragma omp barrier
}

}  // namespace
