// Products of float32 rows with a float32 weight as the model holds it, in orders in which MKL adds for one row: the products
// along K are dealt to the lanes of a vector, which are folded at the end. The order does not depend on the number of rows.
#pragma once
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "numbers.h"

namespace {

constexpr int TOGETHER = 8;      // rows that go through a weight together
constexpr int OUTPUTS_APART = 8;  // outputs that do; a multiple of them is multiplied

struct Single {
  const float* weight;  // [outputs][inputs]
  const float* input;   // [rows][inputs]
  const float* bias;    // [outputs], or null
  float* output;        // [rows][stride]
  int64_t rows, outputs, inputs, stride;
};

// Four lanes an output: a product is rounded before it is added. The first one to four, in order, begin the first lane; then
// every fourth goes to the same lane; (0 + 2) + (1 + 3).
struct Fours {
  static constexpr int OUTPUTS = 4;  // of a vector

  // Four numbers of each of four rows, from one on.
  static __m512 load(const float* from, int64_t row) {
    __m512 numbers = _mm512_castps128_ps512(_mm_loadu_ps(from));
    numbers = _mm512_insertf32x4(numbers, _mm_loadu_ps(from + row), 1);
    numbers = _mm512_insertf32x4(numbers, _mm_loadu_ps(from + 2 * row), 2);
    return _mm512_insertf32x4(numbers, _mm_loadu_ps(from + 3 * row), 3);
  }

  static int64_t begins(int64_t inputs) { return (inputs - 1) % 4 + 1; }
  static int64_t ends(int64_t inputs) { return inputs; }
  static constexpr int64_t STEP = 4;

  static __m512 given(const float* input) { return _mm512_broadcast_f32x4(_mm_loadu_ps(input)); }

  static __m512 begin(const float* weight, const float* input, int64_t inputs) {
    const __m512 products = _mm512_mul_ps(load(weight, inputs), given(input));
    const int64_t count = begins(inputs);
    __m512 sum = products;
    if (count > 1) sum = _mm512_add_ps(sum, _mm512_permute_ps(products, 1));
    if (count > 2) sum = _mm512_add_ps(sum, _mm512_permute_ps(products, 2));
    if (count > 3) sum = _mm512_add_ps(sum, _mm512_permute_ps(products, 3));
    return _mm512_maskz_mov_ps(0x1111, sum);
  }

  static __m512 add(__m512 weight, __m512 input, __m512 sum) { return _mm512_add_ps(_mm512_mul_ps(weight, input), sum); }

  static void end(__m512 sum, const float*, const float*, int64_t, float* totals) {
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4e));
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));
    const __m512i firsts = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
    _mm_storeu_ps(totals, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, sum)));
  }
};

// Sixteen lanes an output, by fused additions from the second number on; the first product begins the first lane. What fills no
// vector is one more, whose first lane begins with the sum of the others.
struct Sixteens {
  static constexpr int OUTPUTS = 1;
  static constexpr int64_t STEP = LANES;

  static __m512 load(const float* from, int64_t) { return _mm512_loadu_ps(from); }
  static int64_t begins(int64_t) { return 1; }
  static int64_t ends(int64_t inputs) { return inputs - (inputs - 1) % LANES; }
  static __m512 given(const float* input) { return _mm512_loadu_ps(input); }

  static __m512 begin(const float* weight, const float* input, int64_t) {
    return _mm512_maskz_mul_ps(1, _mm512_set1_ps(*weight), _mm512_set1_ps(*input));
  }

  static __m512 add(__m512 weight, __m512 input, __m512 sum) { return _mm512_fmadd_ps(weight, input, sum); }

  static void end(__m512 sum, const float* weight, const float* input, int64_t inputs, float* totals) {
    *totals = total(sum);
    const int64_t place = ends(inputs);
    if (place == inputs) return;
    const __mmask16 rest = first_of(inputs - place);
    sum = _mm512_maskz_mov_ps(1, _mm512_set1_ps(*totals));
    *totals = total(_mm512_fmadd_ps(_mm512_maskz_loadu_ps(rest, weight + place), _mm512_maskz_loadu_ps(rest, input + place), sum));
  }
};

// M rows by the outputs of B vectors.
template <class L, int M, int B>
void singles(const Single& p, int64_t row, int64_t output) {
  const float *weight = p.weight + output * p.inputs, *input = p.input + row * p.inputs;
  const int64_t apart = L::OUTPUTS * p.inputs, stop = L::ends(p.inputs);
  __m512 sum[M][B];
  for (int m = 0; m < M; m++)
    for (int b = 0; b < B; b++) sum[m][b] = L::begin(weight + b * apart, input + m * p.inputs, p.inputs);
  for (int64_t k = L::begins(p.inputs); k < stop; k += L::STEP) {
    __m512 numbers[B];
    for (int b = 0; b < B; b++) numbers[b] = L::load(weight + b * apart + k, p.inputs);
    for (int m = 0; m < M; m++) {
      const __m512 given = L::given(input + m * p.inputs + k);
      for (int b = 0; b < B; b++) sum[m][b] = L::add(numbers[b], given, sum[m][b]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int b = 0; b < B; b++) {
      float totals[L::OUTPUTS];
      L::end(sum[m][b], weight + b * apart, input + m * p.inputs, p.inputs, totals);
      for (int i = 0; i < L::OUTPUTS; i++) {
        const int64_t at = output + b * L::OUTPUTS + i;
        p.output[(row + m) * p.stride + at] = p.bias ? totals[i] + p.bias[at] : totals[i];
      }
    }
}

// All rows of some outputs, in passes of as many rows each as can be.
template <class L>
void all_rows(const Single& p, int64_t output) {
  constexpr int B = 2;
  if (!p.rows) return;
  const int64_t passes = (p.rows + TOGETHER - 1) / TOGETHER, each = (p.rows + passes - 1) / passes;
  for (int64_t row = 0; row < p.rows; row += each) {
    for (int64_t at = output; at < output + OUTPUTS_APART; at += B * L::OUTPUTS) {
      switch (std::min(each, p.rows - row)) {
        case 1: singles<L, 1, B>(p, row, at); break;
        case 2: singles<L, 2, B>(p, row, at); break;
        case 3: singles<L, 3, B>(p, row, at); break;
        case 4: singles<L, 4, B>(p, row, at); break;
        case 5: singles<L, 5, B>(p, row, at); break;
        case 6: singles<L, 6, B>(p, row, at); break;
        case 7: singles<L, 7, B>(p, row, at); break;
        default: singles<L, 8, B>(p, row, at);
      }
    }
  }
}

// All of it; called by every thread of a team.
inline void multiply_singles(const Single& p, int64_t lanes) {
  const int64_t tiles = p.outputs / OUTPUTS_APART, team = omp_get_num_threads(), thread = omp_get_thread_num();
  for (int64_t tile = tiles * thread / team; tile < tiles * (thread + 1) / team; tile++)
    lanes == LANES ? all_rows<Sixteens>(p, tile * OUTPUTS_APART) : all_rows<Fours>(p, tile * OUTPUTS_APART);
}

}  // namespace
