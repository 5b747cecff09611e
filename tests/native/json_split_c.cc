// json_split.h as a C function, for tests/e2e/test_json_split.py.
#include <algorithm>
#include <cstring>

#include "json_split.h"

// Feeds a body of `size` bytes in pieces that end at `ends`, the last at `size`. Returns the size of the key, which goes
// into `key` (of 8192 bytes), 0 where the body was not split; `counts` gets what is in each array, `numbers` all of them.
extern "C" size_t json_split(const char* body, size_t size, const uint64_t* ends, size_t pieces, char* key,
                             uint64_t* counts, size_t* count, double* numbers) {
  JsonSplitter splitter("head\n");
  for (size_t i = 0; i < pieces; i++) {
    const std::string moved(body, ends[i]);  // as a buffer that grows may move
    splitter.advance(moved, ends[i] == size && i + 1 == pieces);
  }
  if (!splitter.good()) return 0;
  std::memcpy(key, splitter.key().data(), splitter.key().size());
  std::copy(splitter.counts().begin(), splitter.counts().end(), counts);
  *count = splitter.counts().size();
  std::copy(splitter.numbers().begin(), splitter.numbers().end(), numbers);
  return splitter.key().size();
}
