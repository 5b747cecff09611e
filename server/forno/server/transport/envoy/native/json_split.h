// Cuts a JSON body into what repeats from call to call and the numbers, which do not.
//
//     {"instances": [[0.5, 1], [2, 3]]}   ->   {"instances": {"\u0000":[2,2]}}   and   0.5 1 2 3
//
// What is left (the `key`) says everything else, so it is looked at once, by the ordinary reader; calls with an equal
// key need only their numbers, which are read here: on Envoy's thread, without the interpreter's lock, as the body
// arrives. Anything unusual makes it give up, and the ordinary reader, which has the whole body, decides and explains.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

// Reads a body in pieces. One thread at a time.
class JsonSplitter {
 public:
  // The key begins with `head`, which says what is not in the body.
  explicit JsonSplitter(std::string head) : key_(std::move(head)), head_size_(key_.size()) {}

  // Reads on. `text` is all that has come so far, and may have moved; `end` says that no more will.
  void advance(std::string_view text, bool end);

  // After the end: whether there are numbers and everything has been understood.
  bool good() const { return good_ && mode_ == kSkeleton && !counts_.empty(); }

  std::string& key() { return key_; }
  std::vector<uint64_t>& counts() { return counts_; }  // of numbers in each array, in order
  std::vector<double>& numbers() { return numbers_; }  // of all arrays

 private:
  enum Mode { kSkeleton, kString, kArray };
  static constexpr int kMaxRank = 8;

  bool skeleton(std::string_view text, bool end);  // these return false where more of the body is needed
  bool string(std::string_view text, bool end);
  bool array(std::string_view text, bool end);
  bool number(std::string_view text, bool end);
  bool give_up();
  void close_array();

  std::string key_;
  size_t head_size_;
  std::vector<uint64_t> counts_;
  std::vector<double> numbers_;
  bool good_ = true;
  Mode mode_ = kSkeleton;
  size_t at_ = 0;  // what has been read of the body
  size_t string_at_ = 0, string_size_ = 0;  // the last string, in the key

  // The array that is being read.
  int depth_ = 0, rank_ = 0;         // lists open now; lists around each number, 0 until the first
  bool item_next_ = true;            // rather than a comma or a bracket
  uint64_t sizes_[kMaxRank + 1] = {};   // of the lists at each depth; 0 until the first has been closed
  uint64_t filled_[kMaxRank + 1] = {};  // of the list that is open at each depth
  size_t began_ = 0;                 // its first number, in numbers_
};
