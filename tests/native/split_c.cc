// split.h as a C function, for tests/e2e/test_split.py.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "split.h"

// Fills `key` (of 4096 bytes), `spans` (of `max_spans`) and `places` (of the first elements and of the id: offset, offset
// and size). Returns the key's size, 0 where the message was not split; `count` is the number of spans.
extern "C" size_t split(const char* message, size_t size, const uint32_t* layout, char* key, uint64_t* spans,
                        size_t max_spans, size_t* count, uint64_t* places) {
  const Layout fields{layout[0], layout[1], layout[2], layout[3], layout[4], layout[5], layout[6], layout[7]};
  std::vector<uint64_t> found;
  const Split out = split_request({message, size}, fields, &found);
  if (out.key.size() > 4096 || found.size() > max_spans) return 0;
  std::memcpy(key, out.key.data(), out.key.size());
  std::copy(found.begin(), found.end(), spans);
  *count = found.size();
  places[0] = out.data_at;
  if (!out.key.empty() && first_elements_at({message, size}, fields) != out.data_at) abort();
  for (size_t cut = 0; cut < size; cut++) {  // what a beginning tells is never wrong
    const size_t told = first_elements_at({message, cut}, fields);
    if (told && !out.key.empty() && told != out.data_at) abort();
  }
  places[1] = out.id_at;
  places[2] = out.id_size;
  return out.key.size();
}
