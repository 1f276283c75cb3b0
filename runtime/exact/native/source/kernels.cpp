// What Python calls. Plain C, no torch header: it compiles in a few seconds.
#include <cstdint>

#include "attention.h"
#include "attention_singles.h"
#include "heads.h"
#include "prompt.h"
#include "reading.h"
#include "singles.h"

// Whether the CPU's tiles can be used in this process.
extern "C" int64_t specbound_tiles() { return ask_for_tiles(); }

// See `products.py` for the arguments.
extern "C" void specbound_products(const void* weight, const void* input, const void* bias, void* output, int64_t rows,
                                   int64_t outputs, int64_t pairs, int64_t block, int64_t tiles, int64_t group,
                                   int64_t threads) {
  const Product p{(const uint32_t*)weight, (const uint32_t*)input, (const uint16_t*)bias, (uint16_t*)output, rows, outputs,
                  pairs, {block, tiles != 0, group}, nullptr, nullptr, 1.f};
#pragma omp parallel num_threads(threads)
  multiply(p);
}

// See `singles.py` for the arguments.
extern "C" void specbound_singles(const void* weight, const void* input, const void* bias, void* output, int64_t rows,
                                  int64_t outputs, int64_t inputs, int64_t stride, int64_t lanes, int64_t threads) {
  const Single p{(const float*)weight, (const float*)input, (const float*)bias, (float*)output, rows, outputs, inputs, stride};
#pragma omp parallel num_threads(threads)
  multiply_singles(p, lanes);
}

// See `attend.py` for the arguments. Returns 0 where some score is no finite number: nothing is promised then.
extern "C" int64_t specbound_attention(const void* query, const void* keys, const void* values, void* output,
                                       const int64_t* sizes, const int64_t* paths, float scale, int64_t order,
                                       int64_t threads) {
  const Attention a{(const uint16_t*)query, (const uint16_t*)keys, (const uint16_t*)values, (uint16_t*)output,
                    sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
                    sizes[6], sizes[7], sizes[8], sizes[9], sizes[10], scale, sizes[11], paths, sizes[12], sizes[13]};
  std::atomic<bool> numbers{true};
#pragma omp parallel num_threads(threads)
  attend(&a, 1, order, numbers);
  return numbers;
}

// See `attend.py` for the arguments. In float32; `apart` query heads are those of one of torch's threads.
extern "C" int64_t specbound_attention_singles(const void* query, const void* keys, const void* values, void* output,
                                               const int64_t* sizes, const int64_t* paths, float scale, int64_t apart,
                                               int64_t threads) {
  const SingleAttention a{{(const float*)query, (const float*)keys, (const float*)values, (float*)output,
                           sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
                           sizes[6], sizes[7], sizes[8], sizes[9], sizes[10], scale, sizes[11], paths}, apart};
  std::atomic<bool> numbers{true};
#pragma omp parallel num_threads(threads)
  attend(&a, 1, 0, numbers);
  return numbers;
}

// See `prompt_attention.py` for the arguments. Returns 0 where some number is not finite: nothing is promised then.
extern "C" int64_t specbound_reading(const void* query, const void* keys, const void* values, void* output, const int64_t* sizes,
                                     float scale, int64_t threads) {
  const Attention a{(const uint16_t*)query, (const uint16_t*)keys, (const uint16_t*)values, (uint16_t*)output,
                    sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
                    sizes[6], sizes[7], sizes[8], sizes[9], sizes[10], scale, 0, nullptr};
  Widened widened(a);
  std::atomic<bool> numbers{true};
#pragma omp parallel num_threads(threads)
  read_prompt(a, widened, sizes[11], numbers);
  return numbers;
}

// Norms of rows as in `stack.h`, for a look at their order of additions.
extern "C" void specbound_norms(const void* hidden, const void* weight, void* output, int64_t rows, int64_t size,
                                float epsilon, int64_t weighing) {
  for (int64_t row = 0; row < rows; row++)
    norm((const uint16_t*)hidden + row * size, (const uint16_t*)weight, size, epsilon, (uint16_t*)output + row * size,
         (Weighing)weighing);
}

static Run run_of(const void* layers, const void* parts, const void* caches, const int64_t* sizes, const float* floats,
                  const float* cosines, const float* sines, const void* opened) {
  return {(const Layer*)layers, (const Part*)parts, (const Cache*)caches, cosines, sines,
          (const uint16_t*)opened,
          sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7],
          sizes[8], floats[0], floats[1], floats[2], sizes[9] != 0,
          {sizes[10], sizes[11], sizes[12], sizes[13]}, sizes[14], sizes[15] != 0, (Weighing)sizes[16],
          sizes[17] != 0, sizes[18], {sizes[19], sizes[20], sizes[21], sizes[22]}};
}

// See `stack.py` for the arguments. Returns 0 where some score is no finite number: nothing is promised then.
extern "C" int64_t specbound_layers(const void* layers, const void* parts, const void* caches, const int64_t* sizes,
                                    const float* floats, const float* cosines, const float* sines, const void* opened,
                                    void* hidden, int64_t threads) {
  const Run run = run_of(layers, parts, caches, sizes, floats, cosines, sines, opened);
  std::vector<uint16_t> heads(run.rows * (run.queries + 2 * run.keys) * run.size);
  std::vector<uint16_t> attended(run.rows * run.queries * run.size), inner(run.rows * run.inner);
  std::vector<uint16_t> branch(run.rows * run.hidden);
  std::atomic<bool> numbers{true};
#pragma omp parallel num_threads(threads)
  through(run, (uint16_t*)hidden, heads.data(), attended.data(), inner.data(), branch.data(), numbers);
  return numbers;
}

// See `prompt.py` for the arguments.
extern "C" void specbound_before(const void* layer, const int64_t* sizes, const float* floats, const float* cosines,
                                 const float* sines, const void* hidden, void* heads, void* keys, void* values, void* room,
                                 int64_t threads) {
  Layer own = *(const Layer*)layer;
  own.table = std::min<int64_t>(own.table, 0);  // the angles that are given are this layer's
  const Part part{sizes[2], 0, 0, nullptr};
  const Cache cache{(uint16_t*)keys, (uint16_t*)values, sizes[2]};
  const Run run = run_of(&own, &part, &cache, sizes, floats, cosines, sines, nullptr);
#pragma omp parallel num_threads(threads)
  before_attention(run, {sizes[23], sizes[9] != 0, sizes[24]}, (const uint16_t*)hidden, (uint16_t*)room, (uint16_t*)heads);
}

// See `prompt.py` for the arguments.
extern "C" void specbound_after(const void* layer, const int64_t* sizes, const float* floats, const void* opened,
                                const void* attended, void* hidden, void* room, int64_t threads) {
  const Run run = run_of(layer, nullptr, nullptr, sizes, floats, nullptr, nullptr, opened);
  uint16_t *normed = (uint16_t*)room, *branch = normed + run.rows * run.hidden, *inner = branch + run.rows * run.hidden;
#pragma omp parallel num_threads(threads)
  after_attention(run, (const uint16_t*)attended, (uint16_t*)hidden, normed, inner, branch);
}

// See `heads.py` for the arguments. `count` draft ids and chances of each row; id -1 where no logit is a number.
extern "C" void specbound_draft(const void* head, const int64_t* sizes, const float* floats, const void* hidden,
                                const void* embedding, const void* deep, const int64_t* ages, const void* silu,
                                int64_t* ids, float* chances, int64_t threads) {
  const Draft d{(const DeepHead*)head, (const uint16_t*)hidden, (const uint16_t*)embedding, (const uint16_t*)deep, ages,
                (const uint16_t*)silu, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], floats[0], floats[1], floats[2]};
  std::vector<uint16_t> inner(d.rows * d.rank), added(d.rows * d.size), logits(d.rows * d.vocabulary);
#pragma omp parallel num_threads(threads)
  draft(d, inner.data(), added.data(), logits.data(), ids, chances);
}

// See `heads.py` for the arguments. Returns 0 where some score is no finite number: the states are none then.
extern "C" int64_t specbound_head_step(const void* head, const void* parts, const int64_t* sizes, const float* floats,
                                       const void* hidden, const void* embedding, const void* deep,
                                       const int64_t* sources, const int64_t* positions, const void* turns,
                                       const void* silu, void* states, int64_t threads) {
  const Step s{(const AttentionHead*)head, (const HeadPart*)parts, (const uint16_t*)hidden, (const uint16_t*)embedding,
               (const uint16_t*)deep, sources, positions, (const float*)turns, (const uint16_t*)silu,
               sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], floats[0], floats[1]};
  std::vector<uint16_t> joined(s.rows * 3 * s.hidden_size), mixed(s.rows * s.hidden_size);
  std::vector<uint16_t> heads(s.rows * (s.queries + 2 * s.key_heads) * s.size), kept(s.drafting * s.hidden_size);
  std::vector<uint16_t> attended(s.drafting * s.queries * s.size), inner(s.drafting * s.inner);
  std::atomic<bool> numbers{true};
#pragma omp parallel num_threads(threads)
  step(s, joined.data(), mixed.data(), heads.data(), attended.data(), kept.data(), inner.data(), (uint16_t*)states, numbers);
  return numbers;
}

// See `heads.py` for the arguments. As `specbound_draft`, from normed states.
extern "C" void specbound_likeliest(const void* weight, const int64_t* sizes, float temperature, const void* states,
                                    int64_t* ids, float* chances, int64_t threads) {
  const Choice c{*(const QuantizedWeight*)weight, sizes[0], sizes[1], sizes[2], sizes[3], temperature};
  std::vector<uint16_t> logits(c.rows * c.vocabulary);
#pragma omp parallel num_threads(threads)
  likeliest(c, (const uint16_t*)states, logits.data(), ids, chances);
}

// Rows of a cache moved up behind the settled ones: keys and values of each layer, [heads][capacity][bytes].
extern "C" void specbound_keep(const int64_t* buffers, const int64_t* sizes, const int64_t* places) {
  const int64_t count = sizes[0], heads = sizes[1], capacity = sizes[2], bytes = sizes[3], settled = sizes[4];
  for (int64_t b = 0; b < count; b++)
    for (int64_t head = 0; head < heads; head++) {
      char* rows = (char*)buffers[b] + (head * capacity + settled) * bytes;
      for (int64_t i = 0; i < sizes[5]; i++)
        if (places[i] != i) std::memcpy(rows + i * bytes, rows + places[i] * bytes, bytes);
    }
}
