// What the event loop of stream_test.cc knows of callers and of what they send.
#pragma once

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "stream.h"
#include "stream_plans.h"

inline bool is_unknown(const Stream& stream) { return stream.credential.find("bad") != std::string::npos; }

inline void turn_away(Stream& stream) {
  std::vector<Part> parts;
  if (stream.http) {
    parts.push_back({Part::kResponse, {{":status", "401"}}, "no"});
  } else {
    parts.push_back({Part::kStatus, {{"grpc-status", "16"}}, {}});
  }
  stream.send(std::move(parts));
}

// A body of numbers is split, and its numbers are those that are written in it.
inline void check_split(const Message& message) {
  const std::string body(message.view());
  CHECK((message.json != nullptr) == (body.compare(0, 4, R"({"in)") == 0));
  if (!message.json) return;
  CHECK(message.json->counts().size() == 1 && message.json->counts()[0] == message.json->numbers().size());
  size_t at = body.find('[') + 1;
  for (const double number : message.json->numbers()) {
    at = body.find_first_of("-0123456789", at);
    CHECK(strtod(body.c_str() + at, nullptr) == number);
    at = body.find_first_of(",]", at);
  }
}
