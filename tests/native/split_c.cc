// split.h as a C function, for tests/e2e/test_split.py.
#include <cstring>

#include "split.h"

// Fills `key` (of 4096 bytes), `spans` (of `max_spans`) and `id` (offset and size). Returns the key's size, 0 where the
// message was not split; `count` is the number of spans.
extern "C" size_t split(const char* message, size_t size, const uint32_t* layout, char* key, uint64_t* spans,
                        size_t max_spans, size_t* count, uint64_t* id) {
  const Split out = split_request({message, size}, Layout{layout[0], layout[1], layout[2], layout[3]});
  if (out.key.size() > 4096 || out.spans.size() > max_spans) return 0;
  std::memcpy(key, out.key.data(), out.key.size());
  std::memcpy(spans, out.spans.data(), out.spans.size() * sizeof(uint64_t));
  *count = out.spans.size();
  id[0] = out.id_at;
  id[1] = out.id_size;
  return out.key.size();
}
