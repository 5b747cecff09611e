#include "json_split.h"

#include <charconv>
#include <cstdlib>
#include <cstring>

namespace {

constexpr size_t kMaxKeyBytes = 4096;
constexpr size_t kMaxTokenBytes = 1024;  // what is not whole is read again once more has come: keep it short
constexpr double kMaxMagnitude = 3e38;  // larger ones may be out of a narrower type's range: the ordinary reader says so

bool is_space(char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }
bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Powers of ten that a double holds exactly.
constexpr double kTens[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                            1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};

// The double nearest to a number written in JSON's grammar. False where there is none.
bool slow_double(const char* begin, const char* end, double& value) {
#if defined(__cpp_lib_to_chars) && __cpp_lib_to_chars >= 201611L
  const auto [stop, error] = std::from_chars(begin, end, value);
  return error == std::errc{} && stop == end;
#else
  const std::string text(begin, end);
  char* stop;
  value = std::strtod(text.c_str(), &stop);  // the process keeps the "C" locale for numbers
  return *stop == '\0';
#endif
}

}  // namespace

void JsonSplitter::advance(std::string_view text, bool end) {
  while (good_ && at_ < text.size()) {
    bool more = false;
    switch (mode_) {
      case kSkeleton: more = skeleton(text, end); break;
      case kString: more = string(text, end); break;
      case kArray: more = array(text, end); break;
    }
    if (good_ && key_.size() - head_size_ > kMaxKeyBytes) give_up();
    if (!more) return;
  }
}

bool JsonSplitter::give_up() {
  good_ = false;
  return false;
}

bool JsonSplitter::skeleton(std::string_view text, bool end) {
  const char c = text[at_];
  if (c == '"') {
    mode_ = kString;
    key_.push_back(c);
    string_at_ = key_.size();
    at_++;
    return true;
  }
  if (c == '[') {
    size_t ahead = at_;
    for (int lists = 0; ahead < text.size() && (text[ahead] == '[' || is_space(text[ahead])); ahead++) {
      if (text[ahead] == '[' && ++lists > kMaxRank) return give_up();
    }
    if (ahead - at_ > kMaxTokenBytes) return give_up();
    if (ahead == text.size() && !end) return false;
    const bool numeric = ahead < text.size() && (text[ahead] == '-' || is_digit(text[ahead]));
    // A shape is no data: it decides what the numbers mean, and so belongs to the key.
    if (numeric && key_.compare(string_at_, string_size_, "shape") != 0) {
      mode_ = kArray;
      item_next_ = true;
      depth_ = rank_ = 0;
      began_ = numbers_.size();
      std::memset(sizes_, 0, sizeof sizes_);
      return true;
    }
  }
  if (c == '\\') return give_up();
  key_.push_back(c);
  at_++;
  return true;
}

bool JsonSplitter::string(std::string_view text, bool end) {
  const size_t quote = text.find('"', at_);
  const size_t stop = quote == std::string_view::npos ? text.size() : quote;
  const std::string_view part = text.substr(at_, stop - at_);
  // An escape may hide a quote, and could spell the mark of an array.
  if (part.find('\\') != std::string_view::npos || part.size() > kMaxKeyBytes) return give_up();
  key_.append(part);
  at_ = stop;
  if (quote == std::string_view::npos) return end ? give_up() : false;
  string_size_ = key_.size() - string_at_;
  key_.push_back('"');
  at_++;
  mode_ = kSkeleton;
  return true;
}

// Lists of lists of numbers, all of one length at each depth.
bool JsonSplitter::array(std::string_view text, bool end) {
  while (at_ < text.size()) {
    const char c = text[at_];
    if (is_space(c)) {
      at_++;
    } else if (item_next_ && c == '[') {
      if (++depth_ > (rank_ ? rank_ : kMaxRank)) return give_up();
      filled_[depth_] = 0;
      at_++;
    } else if (item_next_) {
      if (!rank_) rank_ = depth_;
      if (depth_ != rank_ || !number(text, end)) return depth_ != rank_ ? give_up() : false;
      filled_[depth_]++;
      item_next_ = false;
    } else if (c == ',') {
      item_next_ = true;
      at_++;
    } else if (c == ']') {
      if (!sizes_[depth_]) sizes_[depth_] = filled_[depth_];
      if (filled_[depth_] != sizes_[depth_]) return give_up();
      at_++;
      if (--depth_ == 0) {
        close_array();
        return true;
      }
      filled_[depth_]++;
    } else {
      return give_up();
    }
  }
  return end ? give_up() : false;
}

void JsonSplitter::close_array() {
  key_ += "{\"\\u0000\":[";
  for (int depth = 1; depth <= rank_; depth++) {
    if (depth > 1) key_.push_back(',');
    key_ += std::to_string(sizes_[depth]);
  }
  key_ += "]}";
  counts_.push_back(numbers_.size() - began_);
  mode_ = kSkeleton;
}

// One number in JSON's grammar (RFC 8259, section 6). False where it may go on beyond what has come.
bool JsonSplitter::number(std::string_view text, bool end) {
  const char* const begin = text.data() + at_;
  const char* const stop = text.data() + text.size();
  const char* p = begin;
  uint64_t mantissa = 0;
  int digits = 0, exponent = 0;
  const bool negative = *p == '-';
  bool whole = true, good = true;
  if (negative) p++;
  const char* const first = p;
  for (; p < stop && is_digit(*p); p++, digits++) mantissa = mantissa * 10 + static_cast<uint64_t>(*p - '0');
  if (p < stop || end) good = p > first && (*first != '0' || p == first + 1);
  if (good && p < stop && *p == '.') {
    whole = false;
    const char* const point = p++;
    for (; p < stop && is_digit(*p); p++, digits++) mantissa = mantissa * 10 + static_cast<uint64_t>(*p - '0');
    exponent = -static_cast<int>(p - point - 1);
    if (p < stop || end) good = exponent < 0;
  }
  if (good && p < stop && (*p == 'e' || *p == 'E')) {
    whole = false;
    p++;
    bool down = false;
    if (p < stop && (*p == '-' || *p == '+')) down = *p++ == '-';
    const char* const power = p;
    int value = 0;
    for (; p < stop && is_digit(*p); p++) value = value < 1000 ? value * 10 + (*p - '0') : value;
    exponent += down ? -value : value;
    if (p < stop || end) good = p > power;
  }
  if (!good || p - begin > static_cast<ptrdiff_t>(kMaxTokenBytes)) return give_up();
  if (p == stop && !end) return false;
  double value;
  if (digits <= 19 && mantissa <= uint64_t{1} << 53 && exponent >= -22 && exponent <= 22) {
    // Both are exact, so one rounding remains (W. D. Clinger, "How to Read Floating Point Numbers Accurately").
    value = static_cast<double>(mantissa);
    value = exponent < 0 ? value / kTens[-exponent] : value * kTens[exponent];
    if (negative && (mantissa || !whole)) value = -value;  // a whole "-0" is the integer 0
  } else if (!slow_double(begin, p, value)) {
    return give_up();
  }
  if (value > kMaxMagnitude || value < -kMaxMagnitude) return give_up();
  numbers_.push_back(value);
  at_ += static_cast<size_t>(p - begin);
  return true;
}
