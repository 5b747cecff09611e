// The half of a Stream that is no gRPC: REST calls that come as they are, past the transcoder.
#include <algorithm>

#include "stream.h"

namespace {

// A content-length, which Envoy has checked; 0 where it is not told.
size_t digits(std::string_view text) {
  size_t value = 0;
  for (char c : text) value = value * 10 + static_cast<size_t>(c - '0');
  return value;
}

}  // namespace

// Prepares for the body.
void Stream::begin_http(std::string_view type, std::string_view length, std::string_view timeout_ms) {
  content_type.assign(type);
  const size_t bytes = digits(length);
  too_large_ = bytes > methods_->max_message_bytes;
  body_ = prefix_of(static_cast<uint32_t>(too_large_ ? 0 : bytes));  // which tells append_body what room to make
  const int64_t timeout = timeout_ms_us(timeout_ms);
  if (timeout > 0) deadline_us = deadline_us < 0 ? now_us() + timeout : std::min(deadline_us, now_us() + timeout);
  // What is wrong with a timeout the servicer says, on the ordinary way.
  if (method->layout.tensors && (timeout > 0 || timeout_ms.empty())) {
    json_ = std::make_unique<JsonSplitter>(path + '\n' + content_type + '\n');
  }
}

// Takes what has come of an HTTP call's body. What is over the limit is thrown away, and refused once all of it has come:
// a client that is still sending over HTTP/1.1 would see a connection that breaks, not the answer.
void Stream::take_http(void* filter, bool end) {
  if (too_large_ || body_.size() - kPrefixBytes > methods_->max_message_bytes) {
    too_large_ = true;
    body_ = prefix_of(0);
  } else if (json_) {
    json_->advance(std::string_view(body_).substr(kPrefixBytes), end);
  }
  if (end) finish_http(filter);
}

void Stream::finish_http(void* filter) {
  request_ended_ = true;
  if (too_large_) {
    const std::string limit = std::to_string(methods_->max_message_bytes);
    return refuse(filter, kResourceExhausted, "the body has more than " + limit + " bytes (server.max_message_bytes)");
  }
  announced_ = true;
  Event event{EventKind::kCall, shared_from_this(), {std::move(body_), kPrefixBytes, false}};
  if (json_ && json_->good()) event.message.json = std::move(json_);
  json_.reset();
  body_.clear();
  inbox_.push(std::move(event));
}

// Sends the whole answer of an HTTP call.
void Stream::send_response(void* filter, const Part& response) {
  const std::string& body = response.framed;
  const std::string length = std::to_string(body.size());
  std::vector<Header> headers;
  for (const auto& [key, value] : response.metadata) headers.push_back(header(key, value));
  headers.push_back(header("content-length", length));
  envoy_dynamic_module_callback_http_send_response_headers(filter, headers.data(), headers.size(), body.empty());
  if (!gone_ && !body.empty()) {
    envoy_dynamic_module_callback_http_send_response_data(filter, {body.data(), body.size()}, true);
  }
}
