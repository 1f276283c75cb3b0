// Products of bfloat16 rows with a bfloat16 weight, in the order in which oneDNN adds for one row: with AVX512-BF16 one
// output a lane, pairs along K in order; with AMX by its tiles (`multiply.h`). Blocks along K are summed apart and then added
// in order. The order does not depend on the number of rows. Weights of drafts, which need no bits of anybody's, are quantized.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "numbers.h"

namespace {

constexpr int TILE = 2;  // registers of outputs that run along K together
constexpr int ROWS = 8;  // rows that fit into registers beside a tile

struct Along {    // how numbers are added along K
  int64_t block;  // pairs that are summed apart
  bool tiles;     // by the CPU's tiles
  int64_t group;  // pairs of blocks that are added up apart from others, as by a thread each; 0 for all together
};

// A weight of drafts in half the memory: each number is a byte from 1 to 127, less 64, times the scale of its output.
struct QuantizedWeight {
  const uint8_t* bytes;  // [ceil(outputs / 16)][pairs][16][2]
  const float* scales;   // [outputs, filled up to 16]
};

struct Product {
  const void* weight;      // [ceil(outputs / 16)][pairs][16], two bfloat16 of one output each, or bytes of a quantized one
  const uint32_t* input;   // [rows][pairs]
  const uint16_t* bias;    // [outputs], or null
  uint16_t* output;        // [rows][outputs], or [rows][outputs / 2] where gated
  int64_t rows, outputs, pairs;
  Along along;
  const uint16_t* silu;      // of every bfloat16, where the first half of the outputs gates the second; or null
  const uint16_t* residual;  // [rows][outputs], added to the rounded outputs; or null
  float multiplier;          // of the rounded outputs before that
  int64_t stride = outputs;  // numbers from a row of outputs to the next, where nothing gates
  const float* scales = nullptr;  // of a quantized weight
};

// Parts of a weight: 16 outputs each.
inline int64_t parts_of(const Product& p) { return (p.outputs + LANES - 1) / LANES; }

inline __mmask16 mask_of(const Product& p, int64_t part) { return first_of(p.outputs - part * LANES); }

// 16 outputs with their scale or bias, rounded.
inline __m256i biased(const Product& p, int64_t part, __m512 sum) {
  if (p.scales) sum = _mm512_mul_ps(sum, _mm512_loadu_ps(p.scales + part * LANES));
  if (p.bias) sum = _mm512_add_ps(sum, widen(_mm256_maskz_loadu_epi16(mask_of(p, part), p.bias + part * LANES)));
  return convert(sum);
}

// Stores 16 outputs of a row, fewer at the end.
inline void finish_part(const Product& p, int64_t row, int64_t part, __m512 sum) {
  const __mmask16 mask = mask_of(p, part);
  const int64_t place = row * p.stride + part * LANES;
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

// B registers of outputs of a row, or what they gate.
template <int B>
void finish(const Product& p, int64_t row, int64_t part, const __m512* sums) {
  if (B == 2 && p.silu)
    finish_gated(p, row, part, sums[0], sums[B - 1]);
  else
    for (int b = 0; b < B; b++) finish_part(p, row, part + b, sums[b]);
}

// Pairs of weights from those of one register of outputs to those of the next.
inline int64_t apart_of(const Product& p) { return (p.silu ? parts_of(p) / 2 : 1) * p.pairs * LANES; }

// Adds the sum of the block that begins at a pair to the total of its group; a total that is whole, to those before.
inline void add_block(const Along& along, int64_t start, __m512 sum, __m512& total, __m512& before) {
  const bool begins = along.group && start && start % along.group == 0;
  if (begins) before = start == along.group ? total : _mm512_add_ps(before, total);
  total = start == 0 || begins ? sum : _mm512_add_ps(total, sum);
}

// Some rows of a tile. While they are added up, their share of the next tile's weights is fetched: without that, memory
// rests while a CPU adds, and an AMD EPYC takes 1.3 times as long for 16 rows.
struct Pass {
  int64_t number, count;
  bool last;  // whether no tile follows
};

// A byte of a quantized weight as bfloat16 is these bits and its own: 128 more than the byte, and 192 more than the number.
constexpr short OFFSET_BITS = 0x4300;
constexpr float OFFSET = 192.f;

// 16 pairs of weights.
template <bool QUANTIZED>
inline __m512bh pairs_at(const char* from) {
  if constexpr (!QUANTIZED) return (__m512bh)_mm512_loadu_si512(from);
  const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
  return (__m512bh)_mm512_or_si512(bytes, _mm512_set1_epi16(OFFSET_BITS));
}

// What offsets add to an output of a row, to be taken away.
inline float offset_of(const uint32_t* input, int64_t pairs) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; k += LANES)
    sum = _mm512_dpbf16_ps(sum, ones, (__m512bh)_mm512_maskz_loadu_epi32(first_of(pairs - k), input + k));
  return OFFSET * _mm512_reduce_add_ps(sum);
}

// M rows by B registers of outputs.
template <int M, int B, bool QUANTIZED>
void tile(const Product& p, int64_t row, int64_t part, Pass pass) {
  __m512 total[M][B], before[M][B];
  constexpr int64_t VECTOR = QUANTIZED ? 32 : 64;  // bytes of 16 pairs
  const char* weight = (const char*)p.weight + part * p.pairs * VECTOR;
  const int64_t apart = apart_of(p) / LANES * VECTOR, ahead = (p.silu ? 1 : B) * p.pairs * VECTOR;
  const int64_t every = pass.last ? INT64_MAX : pass.count;  // so many pairs, those of one are fetched
  int64_t since = pass.number;
  const uint32_t* input = p.input + row * p.pairs;
  for (int64_t start = 0; start < p.pairs; start += p.along.block) {
    const int64_t stop = std::min(start + p.along.block, p.pairs);
    __m512 sum[M][B];
    for (int m = 0; m < M; m++) {
      const float first = QUANTIZED ? -offset_of(input + m * p.pairs + start, stop - start) : 0.f;
      for (int b = 0; b < B; b++) sum[m][b] = _mm512_set1_ps(first);
    }
    for (int64_t k = start; k < stop; k++) {
      __m512bh numbers[B];
      for (int b = 0; b < B; b++) {
        const char* from = weight + b * apart + k * VECTOR;
        _mm_prefetch(from + 1536, _MM_HINT_T0);
        numbers[b] = pairs_at<QUANTIZED>(from);
      }
      if (++since == every) {
        since = 0;
        for (int b = 0; b < B; b++) _mm_prefetch(weight + b * apart + k * VECTOR + ahead, _MM_HINT_T1);
      }
      for (int m = 0; m < M; m++) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32((int)input[m * p.pairs + k]);
        for (int b = 0; b < B; b++) sum[m][b] = _mm512_dpbf16_ps(sum[m][b], numbers[b], pair);
      }
    }
    for (int m = 0; m < M; m++)
      for (int b = 0; b < B; b++) add_block(p.along, start, sum[m][b], total[m][b], before[m][b]);
  }
  if (p.along.group && p.along.group < p.pairs)
    for (int m = 0; m < M; m++)
      for (int b = 0; b < B; b++) total[m][b] = _mm512_add_ps(before[m][b], total[m][b]);
  for (int m = 0; m < M; m++) finish<B>(p, row + m, part, total[m]);
}

}  // namespace
