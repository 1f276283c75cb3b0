// Products of bfloat16 rows with a bfloat16 weight, in the order in which oneDNN adds for one row on AVX512-BF16:
// one output a lane, pairs along K in order, blocks along K summed apart and then added in order. The order does
// not depend on the number of rows. Plain C, no torch header: it compiles in a second.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int LANES = 16;  // outputs side by side in a register
constexpr int TILE = 2;    // registers of outputs that run along K together
constexpr int ROWS = 8;    // rows that fit into registers beside a tile

struct Product {
  const uint32_t* weight;  // [ceil(outputs / 16)][pairs][16], two bfloat16 of one output each
  const uint32_t* input;   // [rows][pairs]
  const uint16_t* bias;    // [outputs], or null
  uint16_t* output;        // [rows][outputs]
  int64_t rows, outputs, pairs, block;
};

inline __m512 widen(__m256i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

// Adds the bias, rounds, and stores 16 outputs of a row, fewer at the end.
inline void finish(const Product& p, int64_t row, int64_t first, __m512 sum) {
  const int64_t left = p.outputs - first;
  const __mmask16 mask = left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
  if (p.bias) sum = _mm512_add_ps(sum, widen(_mm256_maskz_loadu_epi16(mask, p.bias + first)));
  _mm256_mask_storeu_epi16(p.output + row * p.outputs + first, mask, (__m256i)_mm512_cvtneps_pbh(sum));
}

// M rows by B registers of outputs.
template <int M, int B>
void tile(const Product& p, int64_t row, int64_t part) {
  __m512 total[M][B];
  const uint32_t* weight = p.weight + part * p.pairs * LANES;
  const uint32_t* input = p.input + row * p.pairs;
  for (int64_t start = 0; start < p.pairs; start += p.block) {
    const int64_t stop = std::min(start + p.block, p.pairs);
    __m512 sum[M][B];
    for (int m = 0; m < M; m++)
      for (int b = 0; b < B; b++) sum[m][b] = _mm512_setzero_ps();
    for (int64_t k = start; k < stop; k++) {
      __m512bh numbers[B];
      for (int b = 0; b < B; b++) {
        const uint32_t* from = weight + (b * p.pairs + k) * LANES;
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
    for (int b = 0; b < B; b++) finish(p, row + m, (part + b) * LANES, total[m][b]);
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

}  // namespace

// See `library.py` for the arguments.
extern "C" void specbound_products(const void* weight, const void* input, const void* bias, void* output, int64_t rows_,
                                   int64_t outputs, int64_t pairs, int64_t block, int64_t threads) {
  const Product p{(const uint32_t*)weight, (const uint32_t*)input, (const uint16_t*)bias, (uint16_t*)output,
                  rows_,                   outputs,                pairs,                 block};
  const int64_t parts = (outputs + LANES - 1) / LANES, tiles = (parts + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < tiles; t++) {
    if (t * TILE + TILE <= parts)
      rows<TILE>(p, t * TILE);
    else
      rows<1>(p, t * TILE);
  }
}
