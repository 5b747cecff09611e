#include "stream.h"

#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace {

constexpr size_t kPrefixBytes = 5;
constexpr int kResourceExhausted = 8, kUnimplemented = 12, kInternal = 13, kUnavailable = 14;

int64_t now_us() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1000000 + t.tv_nsec / 1000;
}

// "grpc-timeout": up to eight digits and a unit (gRPC over HTTP/2). -1 where it is not one.
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

uint32_t big_endian(const char* at) {
  uint32_t value;
  std::memcpy(&value, at, 4);
  return __builtin_bswap32(value);
}

}  // namespace

std::string frame_message(const char* data, size_t size, bool compressed) {
  std::string out;
  out.reserve(kPrefixBytes + size);
  const uint32_t length = __builtin_bswap32(static_cast<uint32_t>(size));
  out.push_back(compressed ? 1 : 0);
  out.append(reinterpret_cast<const char*>(&length), 4);
  out.append(data, size);
  return out;
}

namespace {

Header header(std::string_view key, std::string_view value) { return {key.data(), key.size(), value.data(), value.size()}; }

bool is_grpc_type(std::string_view content_type) {
  constexpr std::string_view kGrpc = "application/grpc";
  if (content_type.substr(0, kGrpc.size()) != kGrpc) return false;
  return content_type.size() == kGrpc.size() || content_type[kGrpc.size()] == '+' || content_type[kGrpc.size()] == ';';
}

// Headers that belong to the transport, not to the application's metadata.
bool is_transport_header(std::string_view key) {
  return key.empty() || key[0] == ':' || key == "te" || key == "content-type" || key == "grpc-timeout" ||
         key == "content-length" || key == "host";
}

}  // namespace

Inbox::Inbox() : fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {}

void Inbox::push(Event event) {
  bool first;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    first = events_.empty();
    events_.push_back(std::move(event));
  }
  const uint64_t one = 1;
  if (first && write(fd_, &one, sizeof one) < 0) return;  // full counter: the loop is awake anyway
}

std::vector<Event> Inbox::take() {
  uint64_t count;
  if (read(fd_, &count, sizeof count) < 0) count = 0;
  std::vector<Event> events;
  std::lock_guard<std::mutex> lock(mutex_);
  events.swap(events_);
  return events;
}

Stream::~Stream() {
  if (scheduler_) envoy_dynamic_module_callback_http_filter_scheduler_delete(scheduler_);
}

void Stream::on_headers(void* filter, const Methods* methods, bool end) {
  std::vector<Header> headers(envoy_dynamic_module_callback_http_get_headers_size(filter, kRequestHeaders));
  envoy_dynamic_module_callback_http_get_headers(filter, kRequestHeaders, headers.data());
  bool is_grpc = false;
  std::string_view http_method, bad_timeout;
  metadata.reserve(headers.size());
  for (const Header& h : headers) {
    const std::string_view key(h.key, h.key_size), value(h.value, h.value_size);
    if (key == ":path") {
      path.assign(value);
    } else if (key == ":method") {
      http_method = value;
    } else if (key == "content-type") {
      is_grpc = is_grpc_type(value);
    } else if (key == "grpc-timeout") {
      const int64_t timeout = timeout_us(value);
      if (timeout < 0) bad_timeout = value;
      if (timeout >= 0) deadline_us = now_us() + timeout;
    }
    if (!is_transport_header(key)) metadata.emplace_back(key, value);
  }
  if (!is_grpc) {
    // Nothing that the transcoder knows as REST, and no gRPC either. The body's form is local_reply_config's business.
    refused_ = true;
    const std::string body = "no such path: " + std::string(http_method) + " " + path.substr(0, path.find('?'));
    envoy_dynamic_module_callback_http_send_response(filter, 404, nullptr, 0, {body.data(), body.size()}, {nullptr, 0});
    return;
  }
  if (http_method != "POST") {
    return refuse(filter, kUnimplemented, "a gRPC call is a POST, this is a " + std::string(http_method));
  }
  if (!methods) return refuse(filter, kUnavailable, "the server is starting");
  if (!bad_timeout.empty()) {
    return refuse(filter, kInternal,
                  "grpc-timeout is '" + std::string(bad_timeout) + "'; expected 1 to 8 digits and H, M, S, m, u or n");
  }
  methods_ = methods;
  const auto found = methods->by_path.find(path);
  if (found == methods->by_path.end()) return refuse(filter, kUnimplemented, "no such method: " + path);
  method = found->second.number;
  request_streaming_ = found->second.request_streaming;
  Buffer address{nullptr, 0};
  if (envoy_dynamic_module_callback_http_filter_get_attribute_string(filter, kSourceAddress, &address)) {
    peer.assign(address.data, address.size);
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    scheduler_ = envoy_dynamic_module_callback_http_filter_scheduler_new(filter);
  }
  if (request_streaming_) {
    announced_ = true;
    inbox_.push({EventKind::kCall, shared_from_this(), {}});
  }
  if (end) finish_request(filter);
}

int Stream::on_body(void* filter, bool end) {
  if (refused_ || request_ended_) return kStopBodyNoBuffer;
  if (request_streaming_) {
    bool full;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      full = inbox_bytes_ > methods_->max_inbox_bytes;
      want_resume_ = full;
    }
    if (full) {  // leave it to Envoy, which stops reading from the client when its own buffer is full
      left_in_envoy_ = true;
      ended_in_envoy_ = end;
      return kStopBodyAndWatermark;
    }
    if (left_in_envoy_) take_body(filter, kBufferedRequestBody);
  }
  take_body(filter, kReceivedRequestBody);
  if (split_messages(filter) && end) finish_request(filter);
  return kStopBodyNoBuffer;
}

void Stream::take_body(void* filter, int type) {
  const size_t count = envoy_dynamic_module_callback_http_get_body_chunks_size(filter, type);
  if (!count) return;
  std::vector<Buffer> chunks(count);
  envoy_dynamic_module_callback_http_get_body_chunks(filter, type, chunks.data());
  size_t total = 0;
  for (const Buffer& chunk : chunks) {
    append_body(chunk);
    total += chunk.size;
  }
  if (type == kBufferedRequestBody) {
    left_in_envoy_ = false;
    envoy_dynamic_module_callback_http_drain_body(filter, type, total);
  }
}

void Stream::append_body(const Buffer& chunk) {
  const size_t size = body_.size() + chunk.size;
  if (size > body_.capacity()) {
    // The prefix says how much will come. Trusted only in proportion to what has come: five bytes of each of many
    // calls must not reserve the message limit for each.
    const char* prefix = body_.size() >= kPrefixBytes ? body_.data() : chunk.data;
    const size_t whole = size >= kPrefixBytes && (body_.empty() || body_.size() >= kPrefixBytes)
                             ? kPrefixBytes + std::min<size_t>(big_endian(prefix + 1), methods_->max_message_bytes)
                             : 0;
    body_.reserve(std::max(size, std::min(whole, 16 * size)));
  }
  body_.append(chunk.data, chunk.size);
}

// Hands whole messages of a streaming call to the loop, and checks limits. False when the call has been refused.
bool Stream::split_messages(void* filter) {
  size_t at = 0;
  while (body_.size() - at >= kPrefixBytes) {
    const size_t length = big_endian(body_.data() + at + 1);
    if (length > methods_->max_message_bytes) {
      refuse(filter, kResourceExhausted,
             "the message has " + std::to_string(length) + " bytes, the limit is " +
                 std::to_string(methods_->max_message_bytes) + " (server.max_message_bytes)");
      return false;
    }
    if (const int flag = static_cast<unsigned char>(body_[at]); flag > 1) {
      refuse(filter, kInternal, "a message has the flag " + std::to_string(flag) + "; expected 0 or 1");
      return false;
    }
    if (!request_streaming_) {  // handed over when it is whole
      if (body_.size() - kPrefixBytes <= length) return true;
      refuse(filter, kInternal, "the request body goes on after its one gRPC message");
      return false;
    }
    if (body_.size() - at - kPrefixBytes < length) break;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      inbox_bytes_ += length + kMessageOverheadBytes;
    }
    inbox_.push({EventKind::kMessage, shared_from_this(), {body_.substr(at + kPrefixBytes, length), body_[at] == 1}});
    at += kPrefixBytes + length;
  }
  body_.erase(0, at);
  return true;
}

void Stream::finish_request(void* filter) {
  request_ended_ = true;
  if (request_streaming_) {
    if (!body_.empty()) return refuse(filter, kInternal, "the request stream ends inside a message");
    inbox_.push({EventKind::kHalfClose, shared_from_this(), {}});
    return;
  }
  if (body_.size() < kPrefixBytes || body_.size() - kPrefixBytes != big_endian(body_.data() + 1)) {
    return refuse(filter, kInternal, "the request body is not one whole gRPC message");
  }
  announced_ = true;
  const bool compressed = body_[0] == 1;
  inbox_.push({EventKind::kCall, shared_from_this(), {std::move(body_), compressed}});
  body_.clear();
}

// Answers a call that the application never sees, or no longer.
void Stream::refuse(void* filter, int code, std::string_view reason) {
  refused_ = true;
  std::string text;  // grpc-message is percent-encoded: leave out what would need it
  for (char c : reason) text.push_back(c >= 0x20 && c < 0x7f && c != '%' ? c : '?');
  {
    std::lock_guard<std::mutex> lock(mutex_);
    answered_ = true;
    parts_.clear();
  }
  if (announced_) inbox_.push({EventKind::kCancel, shared_from_this(), {}});
  const std::string status = std::to_string(code);
  if (headers_sent_) {
    Header trailers[] = {header("grpc-status", status), header("grpc-message", text)};
    envoy_dynamic_module_callback_http_send_response_trailers(filter, trailers, 2);
    return;
  }
  headers_sent_ = true;
  Header headers[] = {header(":status", "200"), header("content-type", "application/grpc"),
                      header("grpc-status", status), header("grpc-message", text)};
  envoy_dynamic_module_callback_http_send_response_headers(filter, headers, 4, true);
}

void Stream::on_scheduled(void* filter) {
  bool resume_now;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    scheduled_ = false;
    resume_now = want_resume_ && inbox_bytes_ <= methods_->max_inbox_bytes;
    if (resume_now) want_resume_ = false;
  }
  if (resume_now && !refused_ && !request_ended_) resume(filter);
  flush(filter);
}

void Stream::resume(void* filter) {
  if (!left_in_envoy_) return;
  take_body(filter, kBufferedRequestBody);
  if (split_messages(filter) && ended_in_envoy_) finish_request(filter);
}

void Stream::on_trailers(void* filter) {
  if (refused_ || request_ended_) return;
  if (left_in_envoy_) {
    ended_in_envoy_ = true;
  } else {
    finish_request(filter);
  }
}

void Stream::on_watermark(bool above) {
  above_watermark_ += above ? 1 : -1;
  if (above_watermark_) return;
  std::lock_guard<std::mutex> lock(mutex_);
  schedule_locked();  // not flush: Envoy says this in the middle of its own writing
}

void Stream::flush(void* filter) {
  if (above_watermark_ || refused_) return;
  std::vector<Part> parts;
  bool writable;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    parts.swap(parts_);
    parts_bytes_ = 0;
    writable = want_writable_;
    want_writable_ = false;
  }
  std::vector<Header> headers;
  for (Part& part : parts) {
    if (gone_) return;  // what was sent before has ended the stream
    if (part.kind == Part::kMessage) {
      envoy_dynamic_module_callback_http_send_response_data(filter, {part.framed.data(), part.framed.size()}, false);
      continue;
    }
    headers.clear();
    const bool trailers = part.kind == Part::kStatus && headers_sent_;
    if (!trailers) {
      headers.push_back(header(":status", "200"));
      headers.push_back(header("content-type", "application/grpc"));
    }
    for (const auto& [key, value] : part.metadata) headers.push_back(header(key, value));
    if (trailers) {
      envoy_dynamic_module_callback_http_send_response_trailers(filter, headers.data(), headers.size());
    } else {
      headers_sent_ = true;
      envoy_dynamic_module_callback_http_send_response_headers(filter, headers.data(), headers.size(),
                                                               part.kind == Part::kStatus);
    }
  }
  if (writable) inbox_.push({EventKind::kWritable, shared_from_this(), {}});
}

void Stream::on_gone() {
  bool cancelled;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (gone_) return;
    gone_ = true;
    cancelled = announced_ && !answered_;
    parts_.clear();
    if (scheduler_) envoy_dynamic_module_callback_http_filter_scheduler_delete(scheduler_);
    scheduler_ = nullptr;
  }
  if (cancelled) inbox_.push({EventKind::kCancel, shared_from_this(), {}});
}

void Stream::schedule_locked() {
  if (scheduled_ || gone_ || !scheduler_) return;
  scheduled_ = true;
  envoy_dynamic_module_callback_http_filter_scheduler_commit(scheduler_, 0);
}

void Stream::send(std::vector<Part> parts) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (gone_ || answered_) return;
  for (Part& part : parts) {
    if (part.kind == Part::kMessage) parts_bytes_ += part.framed.size() + kMessageOverheadBytes;
    answered_ = answered_ || part.kind == Part::kStatus;
    parts_.push_back(std::move(part));
  }
  schedule_locked();
}

void Stream::reply(const char* data, size_t size) {
  std::vector<Part> parts(3);
  parts[0].kind = Part::kHeaders;
  parts[1].kind = Part::kMessage;
  parts[1].framed = frame_message(data, size, false);
  parts[2].kind = Part::kStatus;
  parts[2].metadata.emplace_back("grpc-status", "0");
  send(std::move(parts));
}

void Stream::consumed(size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  inbox_bytes_ -= std::min(inbox_bytes_, bytes + kMessageOverheadBytes);
  if (want_resume_ && inbox_bytes_ <= methods_->max_inbox_bytes) schedule_locked();
}

bool Stream::gone() {
  std::lock_guard<std::mutex> lock(mutex_);
  return gone_;
}

size_t Stream::pending_bytes() {
  std::lock_guard<std::mutex> lock(mutex_);
  return parts_bytes_;
}

bool Stream::notify_writable() {
  std::lock_guard<std::mutex> lock(mutex_);
  want_writable_ = parts_bytes_ > 0 && !gone_;
  return want_writable_;
}
