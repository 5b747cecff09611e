// What the clients of stream_test.cc do, and what has to come back.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <string>

#include "protocol.h"

constexpr size_t kMaxMessageBytes = 100000, kMaxInboxBytes = 2048, kMaxItems = 4;
using Random = std::mt19937;
inline size_t below(Random& random, size_t end) { return random() % end; }

#define CHECK(condition)                                                         \
  do {                                                                           \
    if (!(condition)) {                                                          \
      fprintf(stderr, "line %d: %s does not hold\n", __LINE__, #condition);      \
      abort();                                                                   \
    }                                                                            \
  } while (0)

// What the client does, and what has to come back.
struct Plan {
  bool unary = false, http = false;
  std::string body;            // all bytes that the client sends
  std::string expected;        // all bytes that come back
  std::string status = "0";
  std::string path = "/unary";
  std::string timeout;
  bool goes_away = false;      // at some moment: nothing is expected then
  bool trailers = false;       // the request ends with trailers
  bool known = true;           // shows a good key; others are refused, and of their requests nothing is read
  bool items = false;          // messages are items that take the short way; their answers come in any order
};

inline std::string random_bytes(Random& random, size_t size) {
  std::string out(size, 0);
  for (char& c : out) c = static_cast<char>(random());
  return out;
}

// An item of kLayout with its own elements; sometimes what is none, and takes the ordinary way.
inline std::string random_item(Random& random) {
  const std::string elements = random_bytes(random, 20 + below(random, 60));
  const auto field = [](char number, const std::string& data) {
    return std::string{static_cast<char>(number << 3 | 2), static_cast<char>(data.size())} + data;
  };
  const std::string id = below(random, 2) ? field(2, std::string(below(random, 9), 'i')) : "";
  const std::string tensor = field(1, field(1, "x") + field(3, elements));
  const std::string item = field(6, below(random, 2) ? id + tensor : tensor + id);
  return below(random, 8) ? item : item.substr(1);
}

// A REST call: a body of numbers, or of anything, comes back as it is.
inline Plan make_http_plan(Random& random) {
  Plan plan;
  plan.http = true;
  plan.path = "/v1/echo";
  plan.status = "200";
  plan.goes_away = below(random, 4) == 0;
  plan.trailers = below(random, 8) == 0;
  if (below(random, 4)) {
    const size_t rows = 1 + below(random, 40), columns = 1 + below(random, 9);
    plan.body = R"({"instances": [)";
    for (size_t row = 0; row < rows; row++) {
      plan.body += row ? ",[" : "[";
      for (size_t i = 0; i < columns; i++) plan.body += (i ? ", " : "") + std::to_string(random() % 20000 / 7.0 - 1000);
      plan.body += "]";
    }
    plan.body += "]}";
  } else {
    // Bytes that are no JSON: now and then a few by chance are, and would be split.
    plan.body = random_bytes(random, below(random, 8000));
    if (!plan.body.empty()) plan.body[0] = '\\';
  }
  plan.expected = plan.body;
  if (below(random, 16) == 0) plan.body.resize(kMaxMessageBytes + 1 + below(random, 2000), ' ');
  if (plan.body.size() > kMaxMessageBytes) {
    plan.status = "413";
    plan.expected.clear();
  }
  if (below(random, 6) == 0) {
    plan.known = false;
    plan.status = "401";
    plan.expected.clear();
  }
  return plan;
}

// A request of kLayout whose elements are many.
inline std::string large_request(Random& random) {
  const size_t size = 66000 + below(random, 20000);
  const auto head = [](char number, size_t length) {  // three bytes of varint
    const char bytes[] = {static_cast<char>(number << 3 | 2), static_cast<char>(length | 0x80),
                          static_cast<char>(length >> 7 | 0x80), static_cast<char>(length >> 14)};
    return std::string(bytes, 4);
  };
  const std::string name(below(random, 20), 'x');
  const std::string named = std::string{1 << 3 | 2, static_cast<char>(name.size())} + name;
  return head(1, named.size() + 4 + size) + named + head(3, size) + random_bytes(random, size);
}

inline Plan make_plan(Random& random) {
  if (below(random, 4) == 0) return make_http_plan(random);
  Plan plan;
  plan.unary = below(random, 2);
  plan.items = !plan.unary && below(random, 2);
  plan.path = plan.unary ? "/unary" : plan.items ? "/items" : "/stream";
  plan.goes_away = below(random, 4) == 0;
  plan.trailers = below(random, 8) == 0;
  const size_t count = plan.unary ? 1 : below(random, 20);
  const bool large = plan.unary && below(random, 20) == 0;
  for (size_t i = 0; i < count; i++) {
    const std::string message = plan.items ? random_item(random) : large ? large_request(random) : random_bytes(random, below(random, 3) ? below(random, 40) : below(random, 4097));
    plan.body += frame_message(message.data(), message.size(), false);
  }
  plan.expected = plan.body;
  const auto fails = [&plan](const char* status) {
    plan.status = status;
    plan.expected.clear();
  };
  switch (below(random, 16)) {
    case 0:
      plan.path = "/unknown";
      fails("12");
      break;
    case 1:
      plan.timeout = "soon";
      fails("13");
      break;
    case 2:  // one byte too few
      if (plan.body.empty()) break;
      plan.body.pop_back();
      fails("13");
      break;
    case 3:  // one byte too many
      plan.body.push_back(0);
      fails("13");
      break;
    case 4:
      plan.body += std::string("\2\0\0\0\0", 5);
      fails("13");
      break;
    case 5:
      if (plan.unary) plan.body.clear();
      plan.body += std::string("\0\xff\xff\xff\xff", 5);
      fails("8");
      break;
    default:
      break;
  }
  if (plan.unary && below(random, 6) == 0) {
    plan.known = false;
    if (plan.path == "/unary" && plan.timeout.empty() && (!plan.body.empty() || plan.trailers)) fails("16");
  }
  return plan;
}

// Whole messages, in no order.
inline std::multiset<std::string> messages_of(const std::string& framed) {
  std::multiset<std::string> out;
  for (size_t at = 0; at < framed.size();) {
    const size_t size = kPrefixBytes + message_bytes(framed.data() + at);
    CHECK(at + size <= framed.size());
    out.insert(framed.substr(at, size));
    at += size;
  }
  return out;
}
