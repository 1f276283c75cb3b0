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

}  // namespace
