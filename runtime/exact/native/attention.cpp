// Attention of one query row in bfloat16, with the order of additions of torch's kernel for one row (flash attention on
// a CPU with AVX512-BF16): keys in blocks of 512, a running maximum, weights rounded to bfloat16, pairs along what is
// summed. All query heads that share keys take them from one pass. Each row sees its own number of keys.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;
constexpr int BLOCK = 512;
constexpr int HEADS = 4;       // query heads that go through the keys together
constexpr int MAX_SIZE = 256;  // of a head

enum Order { PAIRS, FOURS };  // how products are added, of scores and of values

inline __mmask16 first_of(int64_t count) { return count >= LANES ? 0xffff : (__mmask16)((1u << count) - 1); }

struct Attention {
  const uint16_t *query, *keys, *values;  // numbers of a head lie side by side
  uint16_t* output;                       // [rows][query heads][size]
  int64_t rows, queries, shared, size, length;
  int64_t query_head, query_row, key_head, key_row, value_head, value_row;  // strides
  float scale;
};

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

// The numbers of two bfloat16 in a word.
inline __m512 low(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
inline __m512 high(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000)));
}
inline __m512 number(uint16_t bits) { return _mm512_castsi512_ps(_mm512_set1_epi32((int)((uint32_t)bits << 16))); }

// Scores of `count` keys, 16 side by side: pairs along the head in order, or four sums of every fourth number.
template <int H, Order O>
void scores(const Attention& a, const uint16_t* const* query, const uint16_t* keys, int64_t count, float (*into)[BLOCK]) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i offsets = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)a.key_row * 2));
  for (int64_t first = 0; first < count; first += LANES) {
    const __mmask16 mask = first_of(count - first);
    __m512 sum[H][4];
    for (int h = 0; h < H; h++)
      for (int i = 0; i < 4; i++) sum[h][i] = _mm512_setzero_ps();
    for (int64_t e = 0; e < a.size; e += 2) {
      const void* from = keys + first * a.key_row + e;
      const __m512i pair = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, offsets, from, 1);
      for (int h = 0; h < H; h++) {
        if (O == PAIRS) {
          int32_t own;
          std::memcpy(&own, query[h] + e, 4);
          sum[h][0] = _mm512_dpbf16_ps(sum[h][0], (__m512bh)pair, (__m512bh)_mm512_set1_epi32(own));
        } else {
          __m512* into_ = sum[h] + e % 4;
          into_[0] = _mm512_fmadd_ps(low(pair), number(query[h][e]), into_[0]);
          into_[1] = _mm512_fmadd_ps(high(pair), number(query[h][e + 1]), into_[1]);
        }
      }
    }
    for (int h = 0; h < H; h++) {
      __m512* part = sum[h];
      if (O == FOURS) part[0] = _mm512_add_ps(_mm512_add_ps(part[0], part[2]), _mm512_add_ps(part[1], part[3]));
      _mm512_storeu_ps(into[h] + first, _mm512_mul_ps(part[0], _mm512_set1_ps(a.scale)));
    }
  }
}

// Scores to weights, in place and rounded; returns their sum. NaN among the scores makes `highest` NaN.
float weigh(float* scores, int64_t count, float* highest, uint16_t* weights) {
  float top = *highest;
  bool number = true;
  for (int64_t i = 0; i < count; i++) {
    number &= scores[i] == scores[i];
    top = std::max(top, scores[i]);
  }
  *highest = number ? top : NAN;
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const __m512 x = power(_mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(top)));
    sums[i / LANES % 2] = _mm512_add_ps(sums[i / LANES % 2], x);
    _mm512_storeu_ps(scores + i, x);
  }
  float sum = total(_mm512_add_ps(sums[0], sums[1]));
  for (; i < count; i++) sum += scores[i] = std::exp(scores[i] - top);
  for (int64_t j = 0; j < count; j += LANES) {  // there is room for whole vectors
    const __mmask16 mask = first_of(count - j);
    _mm256_storeu_si256((__m256i*)(weights + j), (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, scores + j)));
  }
  return sum;
}

// Values of `count` keys by their weights, added to `result`: pairs of keys in order, or fours and the rest backwards.
template <int H, Order O>
void add_values(const Attention& a, const uint16_t* values, int64_t count, uint16_t (*weights)[BLOCK], const float* fade,
                bool first, float (*result)[MAX_SIZE]) {
  for (int64_t e = 0; e < a.size; e += LANES) {
    const __mmask16 mask = first_of(a.size - e);
    auto words = [&](int64_t i) {
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, values + i * a.value_row + e));
    };
    __m512 sum[H];
    for (int h = 0; h < H; h++)
      sum[h] = first ? _mm512_setzero_ps() : _mm512_mul_ps(_mm512_loadu_ps(result[h] + e), _mm512_set1_ps(fade[h]));
    if (O == PAIRS) {
      for (int64_t i = 0; i < count; i += 2) {
        __m512i pair = words(i);
        if (i + 1 < count) pair = _mm512_or_si512(pair, _mm512_slli_epi32(words(i + 1), 16));
        for (int h = 0; h < H; h++) {
          int32_t own;
          std::memcpy(&own, weights[h] + i, 4);
          sum[h] = _mm512_dpbf16_ps(sum[h], (__m512bh)pair, (__m512bh)_mm512_set1_epi32(own));
        }
      }
    } else {
      for (int64_t i = 0; i + 4 <= count; i += 4) {
        const __m512 one = low(words(i)), two = low(words(i + 1)), three = low(words(i + 2)), four = low(words(i + 3));
        for (int h = 0; h < H; h++) {
          const uint16_t* own = weights[h] + i;
          const __m512 even = _mm512_fmadd_ps(three, number(own[2]), _mm512_mul_ps(one, number(own[0])));
          const __m512 odd = _mm512_fmadd_ps(four, number(own[3]), _mm512_mul_ps(two, number(own[1])));
          sum[h] = _mm512_add_ps(sum[h], _mm512_add_ps(even, odd));
        }
      }
      for (int64_t i = count - 1; i >= count - count % 4; i--)
        for (int h = 0; h < H; h++) sum[h] = _mm512_fmadd_ps(low(words(i)), number(weights[h][i]), sum[h]);
    }
    for (int h = 0; h < H; h++) _mm512_storeu_ps(result[h] + e, sum[h]);
  }
}

// H query heads from `head` on, of one row; whether all of it are numbers.
template <int H, Order O>
bool heads(const Attention& a, int64_t row, int64_t head) {
  const uint16_t* query[H];
  for (int h = 0; h < H; h++) query[h] = a.query + (head + h) * a.query_head + row * a.query_row;
  const uint16_t* keys = a.keys + head / a.shared * a.key_head;
  const uint16_t* values = a.values + head / a.shared * a.value_head;
  const int64_t seen = a.length - a.rows + row + 1;
  alignas(64) float part[H][BLOCK], result[H][MAX_SIZE];
  alignas(64) uint16_t weights[H][BLOCK];
  float highest[H], sum[H] = {}, fade[H];
  for (int h = 0; h < H; h++) highest[h] = -INFINITY;
  for (int64_t first = 0; first < seen; first += BLOCK) {
    const int64_t count = std::min<int64_t>(BLOCK, seen - first);
    scores<H, O>(a, query, keys + first * a.key_row, count, part);
    for (int h = 0; h < H; h++) {
      const float before = highest[h];
      const float added = weigh(part[h], count, &highest[h], weights[h]);
      fade[h] = std::exp(before - highest[h]);
      sum[h] = std::fma(fade[h], sum[h], added);
      if (!std::isfinite(highest[h])) return false;
    }
    add_values<H, O>(a, values + first * a.value_row, count, weights, fade, first == 0, result);
  }
  for (int h = 0; h < H; h++) {
    const __m512 scale = _mm512_set1_ps(1.0f / sum[h]);
    uint16_t* into = a.output + (row * a.queries + head + h) * a.size;
    for (int64_t e = 0; e < a.size; e += LANES) {
      const __mmask16 mask = first_of(a.size - e);
      const __m512 rounded = _mm512_mul_ps(_mm512_loadu_ps(result[h] + e), scale);
      _mm256_mask_storeu_epi16(into + e, mask, (__m256i)_mm512_cvtneps_pbh(rounded));
    }
  }
  return true;
}

// Every row and query head; whether all of it are numbers.
template <Order O>
bool all_rows(const Attention& a, int64_t threads) {
  const int64_t parts = (a.shared + HEADS - 1) / HEADS, groups = a.queries / a.shared;
  std::atomic<bool> numbers{true};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < a.rows * groups * parts; task++) {
    const int64_t row = task / (groups * parts), part = task % parts;
    const int64_t head = task / parts % groups * a.shared + part * HEADS;
    bool fine;
    switch (std::min<int64_t>(HEADS, a.shared - part * HEADS)) {
      case 1: fine = heads<1, O>(a, row, head); break;
      case 2: fine = heads<2, O>(a, row, head); break;
      case 3: fine = heads<3, O>(a, row, head); break;
      default: fine = heads<4, O>(a, row, head);
    }
    if (!fine) numbers = false;
  }
  return numbers;
}

}  // namespace

// See `attend.py` for the arguments. Returns 0 where some score is no finite number: nothing is promised then.
extern "C" int64_t specbound_attention(const void* query, const void* keys, const void* values, void* output,
                                       const int64_t* sizes, float scale, int64_t order, int64_t threads) {
  const Attention a{(const uint16_t*)query, (const uint16_t*)keys, (const uint16_t*)values, (uint16_t*)output,
                    sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
                    sizes[6], sizes[7], sizes[8], sizes[9], sizes[10], scale};
  return order == PAIRS ? all_rows<PAIRS>(a, threads) : all_rows<FOURS>(a, threads);
}
