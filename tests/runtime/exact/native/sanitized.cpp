// Runs the kernels over odd sizes in buffers of exactly the size they may touch; built with sanitizers by test_native.py.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

extern "C" void specbound_products(const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
extern "C" void specbound_singles(const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
extern "C" int64_t specbound_tiles();
extern "C" int64_t specbound_reading(const void*, const void*, const void*, void*, const int64_t*, float, int64_t);
extern "C" int64_t specbound_attention(const void*, const void*, const void*, void*, const int64_t*, const int64_t*, float, int64_t, int64_t);
extern "C" int64_t specbound_attention_singles(const void*, const void*, const void*, void*, const int64_t*, const int64_t*, float, int64_t, int64_t);

extern "C" void specbound_before(const void*, const int64_t*, const float*, const float*, const float*, const void*, void*, void*, void*, void*, int64_t);
extern "C" void specbound_after(const void*, const int64_t*, const float*, const void*, const void*, void*, void*, int64_t);
extern "C" int64_t specbound_layers(const void*, const void*, const void*, const int64_t*, const float*, const float*, const float*, const void*, void*, int64_t);

extern "C" void specbound_likeliest(const void*, const int64_t*, float, const void*, int64_t*, float*, int64_t);

// Of each row, how many rows of its block it sees, and their places: every other one before it, and itself.
static std::vector<int64_t> every_other(int64_t rows) {
  std::vector<int64_t> paths(rows * (1 + rows));
  for (int64_t row = 0; row < rows; row++) {
    int64_t* path = paths.data() + row * (1 + rows);
    for (int64_t at = row % 2; at <= row; at += 2) path[1 + path[0]++] = at;
  }
  return paths;
}

static std::vector<uint16_t> numbers(int64_t count) {
  std::vector<uint16_t> made(count);
  uint32_t state = 1;
  for (auto& one : made) {
    state = state * 1664525u + 1013904223u;
    one = (uint16_t)(0x3f00 | (state >> 24 & 0x7f) | (state >> 16 & 0x8000));  // 0.5 to 1, of either sign
  }
  return made;
}

int main() {
  const int64_t has_tiles = specbound_tiles();
  for (int64_t rows : {1, 2, 7, 8, 9, 64})
    for (int64_t outputs : {1, 15, 16, 17, 33, 100})
      for (int64_t pairs : {1, 255, 256, 257, 608}) {
        auto weight = numbers((outputs + 15) / 16 * pairs * 32), input = numbers(rows * pairs * 2), bias = numbers(outputs);
        std::vector<uint16_t> output(rows * outputs);
        for (int64_t tiles = 0; tiles <= (has_tiles && pairs % 16 == 0); tiles++)
          for (int64_t block : {256, 64, 16})  // one group, the first of two whole and the other cut short, and three
            for (int64_t group : {int64_t{0}, (pairs + 2 * block - 1) / (2 * block) * block, (pairs + 3 * block - 1) / (3 * block) * block})
              specbound_products(weight.data(), input.data(), bias.data(), output.data(), rows, outputs, pairs, block, tiles, group, 2);
      }
  for (int64_t rows : {1, 2, 7, 8, 9, 64})
    for (int64_t outputs : {16, 48})
      for (int64_t inputs : {16, 17, 18, 19, 32, 33, 577})
        for (int64_t lanes : {4, 16}) {
          std::vector<float> weight(outputs * inputs, 0.5f), input(rows * inputs, 0.5f), bias(outputs, 0.5f), output(rows * outputs);
          specbound_singles(weight.data(), input.data(), bias.data(), output.data(), rows, outputs, inputs, outputs, lanes, 2);
          for (float one : output)
            if (one != 0.25f * (float)inputs + 0.5f) return 4;
        }
  for (int64_t rows : {1, 2, 8, 9, 64})
    for (int64_t vocabulary : {3, 16, 17, 100})
      for (int64_t size : {2, 62, 576}) {
        std::vector<uint8_t> bytes((vocabulary + 15) / 16 * 16 * size, 64 + 3);
        std::vector<float> scales((vocabulary + 15) / 16 * 16, 0.5f), chances(rows * 2);
        const void* weight[] = {bytes.data(), scales.data()};
        const std::vector<uint16_t> states(rows * size, 0x3f80);  // 1
        const int64_t sizes[] = {rows, 2, size, vocabulary};
        std::vector<int64_t> ids(rows * 2);
        specbound_likeliest(weight, sizes, 1.0f, states.data(), ids.data(), chances.data(), 2);
        for (int64_t row = 0; row < rows; row++)  // all are as likely: the first ones
          if (ids[2 * row] != 0 || ids[2 * row + 1] != 1 || std::abs(chances[2 * row] * (float)vocabulary - 1.0f) > 1e-3f) return 7;
      }
  int64_t turn = 0;  // each window occurs with each order, with others at each size
  for (int64_t rows : {1, 3, 64})
    for (int64_t length : {1, 2, 15, 17, 511, 512, 513, 8192})
      for (int64_t size : {4, 20, 64, 80, 128, 256}) {
        const int64_t windows[] = {length + 1, length, (length + 1) / 2, 1};
        turn++;
        for (int64_t order : {0, 1, 2, 3, 4}) {
          const int64_t window = windows[(order + turn) % 4];
          if (rows > length || rows * length > 8192 * 3) continue;
          const int64_t queries = 5, groups = 1;
          auto query = numbers(queries * rows * size), keys = numbers(groups * length * size), values = keys;
          std::vector<uint16_t> output(rows * queries * size);
          const int64_t sizes[] = {rows, queries, queries / groups, size, length, rows * size, size, length * size, size, length * size, size, length - rows, window, (order + turn) % 5};
          if (!specbound_attention(query.data(), keys.data(), values.data(), output.data(), sizes, nullptr, 0.1f, order, 2)) return 1;
          const auto paths = every_other(rows);
          if (!specbound_attention(query.data(), keys.data(), values.data(), output.data(), sizes, paths.data(), 0.1f, order, 2)) return 3;
        }
      }
  for (int64_t rows : {1, 3, 64})
    for (int64_t length : {1, 2, 15, 17, 64, 511, 512, 513, 8192})
      for (int64_t size : {8, 24, 64, 80, 256})
        for (int64_t shared : {1, 2, 3, 7}) {
          if (rows > length || rows * length > 8192 * 3) continue;
          const int64_t queries = 2 * shared;
          std::vector<float> query(queries * rows * size, 0.5f), keys(2 * length * size, 0.5f), values = keys, output(rows * queries * size);
          const int64_t sizes[] = {rows, queries, shared, size, length, rows * size, size, length * size, size, length * size, size, length - rows};
          const auto paths = every_other(rows);
          for (const int64_t* path : {(const int64_t*)nullptr, paths.data()}) {
            if (!specbound_attention_singles(query.data(), keys.data(), values.data(), output.data(), sizes, path, 0.1f, shared, 2)) return 5;
            for (float one : output)
              if (one < 0.499f || one > 0.501f) return 6;
          }
        }
  for (int64_t length : {1, 17, 65, 512, 513, 700})
    for (int64_t rows : {length, int64_t{1}, (length + 1) / 2})
      for (int64_t size : {4, 20, 64, 80, 256}) {
        auto query = numbers(4 * rows * size), keys = numbers(2 * length * size), values = keys;
        std::vector<uint16_t> output(rows * 4 * size);
        const int64_t whole = length + rows % 2 * 300;
        const int64_t sizes[] = {rows, 4, 2, size, length, rows * size, size, length * size, size, length * size, size, whole};
        if (!specbound_reading(query.data(), keys.data(), values.data(), output.data(), sizes, 0.1f, 2)) return 5;
      }
  for (int64_t rows : {1, 3, 17})
    for (int64_t held : {0, 1, 600})
      for (int64_t size : {32, 96})
      for (int64_t hidden : {50, 64})
      for (int64_t kind : {0, 1, 2}) {  // as Llama's; norms around both branches; after them, and of all heads, a part of each turned
        const int64_t queries = 4, keys = 2, inner = 64, capacity = held + rows;
        auto packed = [](int64_t outputs, int64_t inputs) { return numbers((outputs + 15) / 16 * 16 * inputs); };
        auto wide = packed((queries + 2 * keys) * size, hidden), output = packed(hidden, queries * size);
        auto gate_up = packed(2 * inner, hidden), down = packed(hidden, inner), norm = numbers(hidden), head = numbers(kind == 2 ? queries * size : size), key_head = numbers(kind == 2 ? keys * size : size);
        const int64_t further = 2;  // rows of a second request, whose cache is new
        auto key = numbers(keys * capacity * size), value = key, table = numbers(65537), state = numbers((rows + further) * hidden);
        auto other_key = numbers(keys * further * size), other_value = other_key;
        const int64_t turned = kind == 2 ? 32 : size;
        std::vector<float> angles(2 * (rows + further) * turned, 0.5f);  // two tables
        const int64_t window = kind == 0 ? int64_t{1} << 62 : 5;
        auto at = [&](bool there) { return there ? norm.data() : nullptr; };
        const void* layer[] = {wide.data(), output.data(), gate_up.data(), down.data(), nullptr, nullptr, nullptr, nullptr,
                               at(kind < 2), at(kind > 0), at(kind < 2), at(kind > 0), head.data(), key_head.data(), (const void*)1,
                               (const void*)window};
        const void* parts[] = {(const void*)rows, (const void*)held, (const void*)held, nullptr, (const void*)further, nullptr, nullptr, nullptr};
        const void* caches[] = {key.data(), value.data(), (const void*)capacity, other_key.data(), other_value.data(), (const void*)further};
        const int64_t sizes[] = {1, 2, rows + further, hidden, queries, keys, size, inner, 1, has_tiles && hidden % 32 == 0, 256, 256, 256, 256, turned,
                                 kind != 2, kind, kind == 2, 3, 0, 0, 0, 0};
        const float floats[] = {1e-5f, 0.1f, 0.5f};
        if (!specbound_layers(layer, parts, caches, sizes, floats, angles.data(), angles.data(), table.data(), state.data(), 2)) return 2;
        // The same layer of a prompt, around its attention.
        auto hidden_rows = numbers(rows * hidden), attended = numbers(rows * queries * size);
        std::vector<uint16_t> heads(rows * (queries + 2 * keys) * size), new_keys(keys * rows * size), new_values(keys * rows * size), room(rows * (2 * hidden + inner));
        const int64_t own[] = {1, 1, rows, hidden, queries, keys, size, inner, 1, has_tiles && hidden % 32 == 0, 16, 32, 16, 16, turned,
                               kind != 2, kind, kind == 2, 3, 0, 64, 16, 0, 16, 16};
        specbound_before(layer, own, floats, angles.data(), angles.data(), hidden_rows.data(), heads.data(), new_keys.data(), new_values.data(), room.data(), 2);
        specbound_after(layer, own, floats, table.data(), attended.data(), hidden_rows.data(), room.data(), 2);
      }
  std::puts("fine");
}
