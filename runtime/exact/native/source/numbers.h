// Sixteen numbers at a time, between float32 and bfloat16.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int LANES = 16;

inline __mmask16 first_of(int64_t count) { return count >= LANES ? 0xffff : (__mmask16)((1u << count) - 1); }

inline __m512 widen(__m256i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

// As oneDNN rounds, by the CPU's own instruction.
inline __m256i convert(__m512 numbers) { return (__m256i)_mm512_cvtneps_pbh(numbers); }

// As torch rounds between operations: the same but for numbers too small to be normal, which the instruction drops.
inline __m256i narrow(__m512 numbers) {
  const __m512i bits = _mm512_castps_si512(numbers);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(numbers, numbers, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0xffff)));
}

// The numbers of two bfloat16 in a word.
inline __m512 low(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
inline __m512 high(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000)));
}

// 2 to the power of x / ln 2: the exponent's bits from the whole part, a cubic for the fraction (Malossi et al., 2015),
// with the coefficients that torch uses in this place.
inline __m512 power(__m512 x) {
  const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269502f));
  const __m512 fraction = _mm512_sub_ps(scaled, _mm512_floor_ps(scaled));
  __m512 cubic = _mm512_fmadd_ps(fraction, _mm512_set1_ps(-0.079204240219773236f), _mm512_set1_ps(-0.22433836478672356f));
  cubic = _mm512_fmadd_ps(fraction, cubic, _mm512_set1_ps(0.30354260500649682f));
  cubic = _mm512_fmadd_ps(fraction, cubic, _mm512_set1_ps(0.00010703434948458272f));
  const __m512 bits = _mm512_fmadd_ps(_mm512_set1_ps(8388608.f), _mm512_sub_ps(scaled, cubic), _mm512_set1_ps(8388608.f * 127.f));
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_castsi512_ps(_mm512_set1_epi32((int)0xc2aeac50)), _CMP_NLT_US);
  return _mm512_castsi512_ps(_mm512_maskz_cvttps_epi32(normal, bits));
}

// Halves added to halves.
inline float total(__m512 x) {
  x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  x = _mm512_add_ps(x, _mm512_shuffle_ps(x, x, 0x4e));
  x = _mm512_add_ps(x, _mm512_shuffle_ps(x, x, 0xb1));
  return _mm512_cvtss_f32(x);
}

// 16 x 16 words turned over.
inline void transpose(__m512i (&rows)[LANES]) {
  __m512i half[LANES];
  for (int i = 0; i < LANES; i += 4) {
    const __m512i one = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), two = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    const __m512i three = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
    const __m512i four = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
    half[i] = _mm512_unpacklo_epi64(one, three);
    half[i + 1] = _mm512_unpackhi_epi64(one, three);
    half[i + 2] = _mm512_unpacklo_epi64(two, four);
    half[i + 3] = _mm512_unpackhi_epi64(two, four);
  }
  for (int i = 0; i < 4; i++) {
    const __m512i one = _mm512_shuffle_i32x4(half[i], half[i + 4], 0x88), two = _mm512_shuffle_i32x4(half[i], half[i + 4], 0xdd);
    const __m512i three = _mm512_shuffle_i32x4(half[i + 8], half[i + 12], 0x88);
    const __m512i four = _mm512_shuffle_i32x4(half[i + 8], half[i + 12], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(one, three, 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(one, three, 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(two, four, 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(two, four, 0xdd);
  }
}

}  // namespace
