#include "stream.h"

#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace {

constexpr size_t kJoinedBytes = 16384;  // HTTP/2's usual frame

int64_t now_us() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1000000 + t.tv_nsec / 1000;
}

Header header(std::string_view key, std::string_view value) { return {key.data(), key.size(), value.data(), value.size()}; }

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
  thread_local std::vector<Header> headers;
  headers.resize(envoy_dynamic_module_callback_http_get_headers_size(filter, kRequestHeaders));
  envoy_dynamic_module_callback_http_get_headers(filter, kRequestHeaders, headers.data());
  bool is_grpc = false;
  std::string_view http_method, bad_timeout;
  metadata.reserve(512);
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
    if (is_credential_header(key)) {
      credential.append(key).push_back('\0');
      credential.append(value).push_back('\0');
    }
    if (!is_transport_header(key)) {
      metadata.append(key).push_back('\0');
      metadata.append(value).push_back('\0');
    }
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
  method_ = &found->second;
  method = method_->number;
  Buffer address{nullptr, 0};
  if (envoy_dynamic_module_callback_http_filter_get_attribute_string(filter, kSourceAddress, &address)) {
    peer.assign(address.data, address.size);
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    scheduler_ = envoy_dynamic_module_callback_http_filter_scheduler_new(filter);
  }
  if (method_->request_streaming) {
    announced_ = true;
    inbox_.push({EventKind::kCall, shared_from_this(), {}});
  }
  if (end) finish_request(filter);
}

int Stream::on_body(void* filter, bool end) {
  if (refused_ || request_ended_) return kStopBodyNoBuffer;
  if (method_->request_streaming) {
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
  if (type == kBufferedRequestBody) left_in_envoy_ = false;
  const size_t count = envoy_dynamic_module_callback_http_get_body_chunks_size(filter, type);
  if (!count) return;
  std::vector<Buffer> chunks(count);
  envoy_dynamic_module_callback_http_get_body_chunks(filter, type, chunks.data());
  size_t total = 0;
  for (const Buffer& chunk : chunks) {
    append_body(chunk);
    total += chunk.size;
  }
  if (type == kBufferedRequestBody) envoy_dynamic_module_callback_http_drain_body(filter, type, total);
}

void Stream::append_body(const Buffer& chunk) {
  const size_t size = body_.size() + chunk.size;
  if (size > body_.capacity()) {
    // The prefix says how much will come. Trusted only in proportion to what has come: five bytes of each of many
    // calls must not reserve the message limit for each.
    const char* prefix = body_.size() >= kPrefixBytes ? body_.data() : chunk.data;
    const size_t whole = size >= kPrefixBytes && (body_.empty() || body_.size() >= kPrefixBytes)
                             ? kPrefixBytes + std::min<size_t>(message_bytes(prefix), methods_->max_message_bytes)
                             : 0;
    body_.reserve(std::max(size, std::min(whole, 16 * size)));
  }
  body_.append(chunk.data, chunk.size);
}

// Hands whole messages of a streaming call to the loop, and checks limits. False when the call has been refused.
bool Stream::split_messages(void* filter) {
  size_t at = 0;
  while (body_.size() - at >= kPrefixBytes) {
    const size_t length = message_bytes(body_.data() + at);
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
    if (!method_->request_streaming) {  // handed over when it is whole
      if (body_.size() - kPrefixBytes <= length) return true;
      refuse(filter, kInternal, "the request body goes on after its one gRPC message");
      return false;
    }
    if (body_.size() - at - kPrefixBytes < length) break;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      inbox_bytes_ += length + kMessageOverheadBytes;
    }
    inbox_.push({EventKind::kMessage, shared_from_this(), {body_.substr(at + kPrefixBytes, length), body_[at] == 1, {}}});
    at += kPrefixBytes + length;
  }
  body_.erase(0, at);
  return true;
}

void Stream::finish_request(void* filter) {
  request_ended_ = true;
  if (method_->request_streaming) {
    if (!body_.empty()) return refuse(filter, kInternal, "the request stream ends inside a message");
    inbox_.push({EventKind::kHalfClose, shared_from_this(), {}});
    return;
  }
  if (body_.size() < kPrefixBytes || body_.size() - kPrefixBytes != message_bytes(body_.data())) {
    return refuse(filter, kInternal, "the request body is not one whole gRPC message");
  }
  announced_ = true;
  Message message{std::move(body_), false, {}};
  message.compressed = message.bytes[0] == 1;
  if (method_->layout.tensors && !message.compressed) {
    message.split = split_request(std::string_view(message.bytes).substr(kPrefixBytes), method_->layout);
  }
  inbox_.push({EventKind::kCall, shared_from_this(), std::move(message)});
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
  std::string reply;
  bool writable;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    parts.swap(parts_);
    reply.swap(reply_);
    parts_bytes_ = 0;
    writable = want_writable_;
    want_writable_ = false;
  }
  if (!reply.empty()) {
    static Header kHeaders[] = {header(":status", "200"), header("content-type", "application/grpc")};
    static Header kTrailers[] = {header("grpc-status", "0")};
    envoy_dynamic_module_callback_http_send_response_headers(filter, kHeaders, 2, false);
    if (!gone_) envoy_dynamic_module_callback_http_send_response_data(filter, {reply.data(), reply.size()}, false);
    if (!gone_) envoy_dynamic_module_callback_http_send_response_trailers(filter, kTrailers, 1);
    return;
  }
  std::vector<Header> headers;
  for (size_t i = 0; i < parts.size(); i++) {
    if (gone_) return;  // what was sent before has ended the stream
    Part& part = parts[i];
    if (part.kind == Part::kMessage) {
      std::string& data = part.framed;  // small messages leave together: a frame for each would cost more than they do
      while (data.size() < kJoinedBytes && i + 1 < parts.size() && parts[i + 1].kind == Part::kMessage) {
        data += parts[++i].framed;
      }
      envoy_dynamic_module_callback_http_send_response_data(filter, {data.data(), data.size()}, false);
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
    reply_.clear();
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

void Stream::reply(std::string framed) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (gone_ || answered_) return;
  answered_ = true;
  reply_ = std::move(framed);
  schedule_locked();
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
