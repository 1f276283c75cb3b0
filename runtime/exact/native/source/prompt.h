// One decoder layer of a prompt around its attention, which stays with torch: before it norm, query, key and value, rotary
// positions; after it output, norm, residual, norm, gated activation, norm, residual. Torch adds in another order for many rows
// than for one, and by the shape of each weight, so queries are multiplied apart from keys and values.
#pragma once
#include "stack.h"

namespace {

// Rows shared out over the team, which waits for all.
inline const uint16_t* normed_together(const Run& run, const uint16_t* weight, const uint16_t* hidden, uint16_t* normed) {
  if (!weight) return hidden;
#pragma omp for schedule(static)
  for (int64_t row = 0; row < run.rows; row++)
    norm(hidden + row * run.hidden, weight, run.hidden, run.epsilon, normed + row * run.hidden, run.weighing);
  return normed;
}

// Queries into `heads` [rows][queries + 2 * keys][size], keys and values into the one cache of the run.
inline void before_attention(const Run& run, const Along& along_keys, const uint16_t* hidden, uint16_t* normed, uint16_t* heads) {
  const Layer& layer = *run.layers;
  const uint32_t *input = (const uint32_t*)normed_together(run, layer.norm, hidden, normed), *weight = layer.query_key_value;
  const uint16_t* bias = layer.query_key_value_bias;
  const int64_t queries = run.queries * run.size, keys = 2 * run.keys * run.size, pairs = run.hidden / 2;
  multiply({weight, input, bias, heads, run.rows, queries, pairs, {run.blocks[0], run.tiles, run.groups[0]}, nullptr, nullptr, 1.f,
            queries + keys});
  multiply({weight + queries * pairs, input, bias ? bias + queries : nullptr, heads + queries, run.rows, keys, pairs,
            along_keys, nullptr, nullptr, 1.f, queries + keys});
  if (layer.query_norm && run.whole) norm_all_heads(run, layer, heads);
  place_heads(run, layer, run.caches, heads);
}

// `hidden` [rows][hidden] becomes that above the layer; `attended` is [rows][queries][size].
inline void after_attention(const Run& run, const uint16_t* attended, uint16_t* hidden, uint16_t* normed, uint16_t* inner,
                            uint16_t* branch) {
  const Layer& layer = *run.layers;
  end_branch(run, layer.output, attended, layer.output_bias, run.queries * run.size, run.blocks[1], run.groups[1], layer.after_norm, branch,
             hidden);
  gate(run, layer, normed_together(run, layer.second_norm, hidden, normed), inner);
  end_branch(run, layer.down, inner, layer.down_bias, run.inner, run.blocks[3], run.groups[3], layer.after_second_norm, branch, hidden);
}

}  // namespace
