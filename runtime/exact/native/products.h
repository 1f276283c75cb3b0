// Products of bfloat16 rows with a bfloat16 weight, in the order in which oneDNN adds for one row on AVX512-BF16:
// one output a lane, pairs along K in order, blocks along K summed apart and then added in order. The order does
// not depend on the number of rows.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "numbers.h"

namespace {

constexpr int TILE = 2;  // registers of outputs that run along K together
constexpr int ROWS = 8;  // rows that fit into registers beside a tile

struct Product {
  const uint32_t* weight;  // [ceil(outputs / 16)][pairs][16], two bfloat16 of one output each
  const uint32_t* input;   // [rows][pairs]
  const uint16_t* bias;    // [outputs], or null
  uint16_t* output;        // [rows][outputs], or [rows][outputs / 2] where gated
  int64_t rows, outputs, pairs, block;
  const uint16_t* silu;      // of every bfloat16, where the first half of the outputs gates the second; or null
  const uint16_t* residual;  // [rows][outputs], added to the rounded outputs; or null
  float multiplier;          // of the rounded outputs before that
};

// Parts of a weight: 16 outputs each.
inline int64_t parts_of(const Product& p) { return (p.outputs + LANES - 1) / LANES; }

inline __mmask16 mask_of(const Product& p, int64_t part) { return first_of(p.outputs - part * LANES); }

// 16 outputs with their bias, rounded.
inline __m256i biased(const Product& p, int64_t part, __m512 sum) {
  if (p.bias) sum = _mm512_add_ps(sum, widen(_mm256_maskz_loadu_epi16(mask_of(p, part), p.bias + part * LANES)));
  return convert(sum);
}

// Stores 16 outputs of a row, fewer at the end.
inline void finish(const Product& p, int64_t row, int64_t part, __m512 sum) {
  const __mmask16 mask = mask_of(p, part);
  const int64_t place = row * p.outputs + part * LANES;
  __m256i output = biased(p, part, sum);
  if (p.multiplier != 1.f) output = narrow(_mm512_mul_ps(widen(output), _mm512_set1_ps(p.multiplier)));
  if (p.residual)
    output = narrow(_mm512_add_ps(widen(_mm256_maskz_loadu_epi16(mask, p.residual + place)), widen(output)));
  _mm256_mask_storeu_epi16(p.output + place, mask, output);
}

// Stores 16 gated outputs of a row: SiLU of the first, rounded, times the second.
inline void finish_gated(const Product& p, int64_t row, int64_t part, __m512 gate, __m512 up) {
  const __m512i words = _mm512_i32gather_epi32(_mm512_cvtepu16_epi32(biased(p, part, gate)), p.silu, 2);
  const __m512 opened = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  const __m512 output = _mm512_mul_ps(opened, widen(biased(p, part + parts_of(p) / 2, up)));
  _mm256_storeu_si256((__m256i*)(p.output + row * (p.outputs / 2) + part * LANES), narrow(output));
}

// M rows by B registers of outputs.
template <int M, int B>
void tile(const Product& p, int64_t row, int64_t part) {
  __m512 total[M][B];
  const uint32_t* weight = p.weight + part * p.pairs * LANES;
  const int64_t apart = (p.silu ? parts_of(p) / 2 : 1) * p.pairs * LANES;  // from one register's weights to the next's
  const uint32_t* input = p.input + row * p.pairs;
  for (int64_t start = 0; start < p.pairs; start += p.block) {
    const int64_t stop = std::min(start + p.block, p.pairs);
    __m512 sum[M][B];
    for (int m = 0; m < M; m++)
      for (int b = 0; b < B; b++) sum[m][b] = _mm512_setzero_ps();
    for (int64_t k = start; k < stop; k++) {
      __m512bh numbers[B];
      for (int b = 0; b < B; b++) {
        const uint32_t* from = weight + b * apart + k * LANES;
        _mm_prefetch((const char*)(from + 24 * LANES), _MM_HINT_T0);
        numbers[b] = (__m512bh)_mm512_loadu_si512(from);
      }
      for (int m = 0; m < M; m++) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32((int)input[m * p.pairs + k]);
        for (int b = 0; b < B; b++) sum[m][b] = _mm512_dpbf16_ps(sum[m][b], numbers[b], pair);
      }
    }
    for (int m = 0; m < M; m++)
      for (int b = 0; b < B; b++) total[m][b] = start == 0 ? sum[m][b] : _mm512_add_ps(total[m][b], sum[m][b]);
  }
  for (int m = 0; m < M; m++)
    if (B == 2 && p.silu)
      finish_gated(p, row + m, part, total[m][0], total[m][B - 1]);
    else
      for (int b = 0; b < B; b++) finish(p, row + m, part + b, total[m][b]);
}

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
#pragma omp for schedule(static)
  for (int64_t t = 0; t < tiles; t++) {
    if (p.silu)
      rows<TILE>(p, t);
    else if (t * TILE + TILE <= parts)
      rows<TILE>(p, t * TILE);
    else
      rows<1>(p, t * TILE);
  }
}

}  // namespace
