// What the event loop of stream_test.cc knows of callers and of what they send.
#pragma once

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "stream.h"
#include "stream_plans.h"

constexpr Door kDoors[] = {Door::kPublic, Door::kAdmin, Door::kInner};

// What an edge says in a header is believed of an edge alone; what came in where is known. `x-a` says which of `kDoors`.
inline void check_caller(const Stream& stream) {
  const std::string_view told("x-forno-door\0told\0", 18), admin("x-forno-door\0admin\0", 19), metadata(stream.metadata);
  const Door door = kDoors[metadata[4] - '0'];
  CHECK(metadata.substr(0, 4) == std::string_view("x-a\0", 4));
  std::string key(metadata.substr(6));
  if (door == Door::kInner) {
    CHECK(key.substr(0, told.size()) == told && stream.credential == key);
    return;
  }
  CHECK(key.substr(0, 10) == std::string_view("x-api-key\0", 10));
  CHECK(stream.credential == (door == Door::kAdmin ? key.append(admin) : key));
}

inline std::vector<std::pair<std::string, std::string>> headers_of(const Plan& plan, size_t door, Random& random) {
  return {{":path", plan.path},
          {":method", "POST"},
          {"content-type", "application/grpc"},
          {"x-a", std::to_string(door)},
          {"x-forno-door", "told"},
          {"x-api-key", plan.known ? "good" + std::to_string(below(random, 9)) : "bad"}};
}

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
