#include "protocol.h"

#include <time.h>

#include <cstring>

uint32_t message_bytes(const char* prefix) {
  uint32_t value;
  std::memcpy(&value, prefix + 1, 4);
  return __builtin_bswap32(value);
}

void write_prefix(char* prefix, size_t size, bool compressed) {
  const uint32_t length = __builtin_bswap32(static_cast<uint32_t>(size));
  prefix[0] = compressed ? 1 : 0;
  std::memcpy(prefix + 1, &length, 4);
}

std::string prefix_of(uint32_t length) {
  std::string out(kPrefixBytes, '\0');
  length = __builtin_bswap32(length);
  std::memcpy(&out[1], &length, 4);
  return out;
}

std::string frame_message(const char* data, size_t size, bool compressed) {
  std::string out;
  out.reserve(kPrefixBytes + size);
  out.resize(kPrefixBytes);
  write_prefix(out.data(), size, compressed);
  out.append(data, size);
  return out;
}

int64_t now_us() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1000000 + t.tv_nsec / 1000;
}

int64_t timeout_us(std::string_view text) {
  if (text.size() < 2 || text.size() > 9) return -1;
  int64_t value = 0;
  for (char c : text.substr(0, text.size() - 1)) {
    if (c < '0' || c > '9') return -1;
    value = value * 10 + (c - '0');
  }
  switch (text.back()) {
    case 'H': return value * 3600000000;
    case 'M': return value * 60000000;
    case 'S': return value * 1000000;
    case 'm': return value * 1000;
    case 'u': return value;
    case 'n': return (value + 999) / 1000;
    default: return -1;
  }
}

int64_t timeout_ms_us(std::string_view text) {
  if (text.empty() || text.size() > 9) return -1;
  int64_t value = 0;
  for (char c : text) {
    if (c < '0' || c > '9') return -1;
    value = value * 10 + (c - '0');
  }
  return value ? value * 1000 : -1;
}

uint32_t http_status(int code) {
  constexpr uint16_t kStatuses[] = {200, 499, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401};
  return code >= 0 && code <= 16 ? kStatuses[code] : 500;
}

bool is_grpc_type(std::string_view content_type) {
  constexpr std::string_view kGrpc = "application/grpc";
  if (content_type.substr(0, kGrpc.size()) != kGrpc) return false;
  return content_type.size() == kGrpc.size() || content_type[kGrpc.size()] == '+' || content_type[kGrpc.size()] == ';';
}

bool is_transport_header(std::string_view key) {
  return key.empty() || key[0] == ':' || key == "te" || key == "content-type" || key == "grpc-timeout" ||
         key == "content-length" || key == "host";
}

bool is_credential_header(std::string_view key) {
  return key == "authorization" || key == "x-api-key" || key == "x-forwarded-client-cert";
}

bool is_edge_header(std::string_view key) { return key == "x-forno-door" || key == "x-forno-peer"; }
