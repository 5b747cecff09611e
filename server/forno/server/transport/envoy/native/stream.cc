// The worker's side of a Stream from its body on: what Envoy's hooks tell it, and what leaves for the client.
#include "stream.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

namespace {

constexpr size_t kLargeBytes = 64 * 1024;  // below this a request's elements are copied to where they run
constexpr size_t kAlignment = 16;          // of what malloc gives, and enough for numbers

}  // namespace

Stream::~Stream() {
  if (scheduler_) envoy_dynamic_module_callback_http_filter_scheduler_delete(scheduler_);
}

int Stream::on_body(void* filter, bool end) {
  if (refused_ || request_ended_) return kStopBodyNoBuffer;
  if (asked_) {
    left_in_envoy_ = true;
    ended_in_envoy_ = end;
    return kStopBodyAndWatermark;
  }
  if (method->request_streaming) {
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
  take_in(filter, end);
  return kStopBodyNoBuffer;
}

// Does what can be done with the body that was taken.
void Stream::take_in(void* filter, bool end) {
  if (http) {
    take_http(filter, end);
  } else if (split_messages(filter) && end) {
    finish_request(filter);
  }
}

void Stream::take_body(void* filter, int type) {
  if (type == kBufferedRequestBody) {
    left_in_envoy_ = false;
    begun_us_ = 0;  // it was we who did not read
  }
  const size_t count = envoy_dynamic_module_callback_http_get_body_chunks_size(filter, type);
  if (!count) return;
  Buffer few[4];
  std::vector<Buffer> many(count > std::size(few) ? count : 0);
  Buffer* const chunks = many.empty() ? few : many.data();
  envoy_dynamic_module_callback_http_get_body_chunks(filter, type, chunks);
  size_t total = 0;
  for (size_t i = 0; i < count; i++) {
    append_body(chunks[i]);
    total += chunks[i].size;
  }
  if (type == kBufferedRequestBody) envoy_dynamic_module_callback_http_drain_body(filter, type, total);
}

void Stream::append_body(const Buffer& chunk) {
  const bool first = body_.size() == body_begin_;
  if (first && chunk.size >= kPrefixBytes && message_bytes(chunk.data) >= kLargeBytes) {
    body_begin_ = gap_before({chunk.data, chunk.size});
    body_.assign(body_begin_, 0);
  }
  const size_t size = body_.size() + chunk.size;
  if (size > body_.capacity()) {
    // The prefix says how much will come. Trusted only in proportion to what has come: five bytes of each of many
    // calls must not reserve the message limit for each.
    const char* prefix = first ? chunk.data : body_.data() + body_begin_;
    const size_t known = first ? chunk.size : body_.size() - body_begin_;
    const size_t whole = known >= kPrefixBytes ? body_begin_ + kPrefixBytes +
                                                     std::min<size_t>(message_bytes(prefix), methods_->max_message_bytes)
                                               : 0;
    body_.reserve(std::max(size, std::min(whole, 16 * size)));
  }
  body_.append(chunk.data, chunk.size);
}

// How many bytes are to stand before a large request so that the elements of its first tensor lie where they can be read
// as numbers, and need not be copied for that.
size_t Stream::gap_before(std::string_view beginning) const {
  if (!method->layout.tensors || method->request_streaming) return 0;
  const size_t at = first_elements_at(beginning.substr(kPrefixBytes), method->layout);
  return at ? (kAlignment - (kPrefixBytes + at) % kAlignment) % kAlignment : 0;
}

// Hands whole messages of a streaming call to the loop, and checks limits of any call. False when that has been refused.
bool Stream::split_messages(void* filter) {
  std::vector<Event> events;
  size_t at = body_begin_, taken_bytes = 0;
  int code = 0;
  std::string reason;
  while (body_.size() - at >= kPrefixBytes) {
    const size_t length = message_bytes(body_.data() + at);
    if (length > methods_->max_message_bytes) {
      code = kResourceExhausted;
      reason = "the message has " + std::to_string(length) + " bytes, the limit is " +
               std::to_string(methods_->max_message_bytes) + " (server.max_message_bytes)";
      break;
    }
    if (const int flag = static_cast<unsigned char>(body_[at]); flag > 1) {
      code = kInternal;
      reason = "a message has the flag " + std::to_string(flag) + "; expected 0 or 1";
      break;
    }
    const size_t come = body_.size() - at - kPrefixBytes;
    if (!method->request_streaming && come >= length) {
      if (come == length) return true;  // handed over once the request ends
      code = kInternal;
      reason = "the request body goes on after its one gRPC message";
      break;
    }
    if (come < length) break;
    events.push_back({EventKind::kMessage, shared_from_this(), message_of(body_.substr(at + kPrefixBytes, length), 0, body_[at] == 1)});
    taken_bytes += length + kMessageOverheadBytes;
    at += kPrefixBytes + length;
  }
  if (taken_bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    inbox_bytes_ += taken_bytes;
  }
  if (!events.empty()) inbox_.push(std::move(events));
  if (code) {
    refuse(filter, code, reason);
    return false;
  }
  body_.erase(body_begin_, at - body_begin_);
  if (at > body_begin_ || body_.empty()) begun_us_ = 0;
  if (body_.empty()) return true;
  const int64_t now = now_us();
  if (!begun_us_) begun_us_ = now;
  if (now - begun_us_ <= methods_->max_message_us) return true;
  refuse(filter, kDeadlineExceeded, "a message took too long to come (server.max_call_s)");
  return false;
}

Message Stream::message_of(std::string bytes, size_t begin, bool compressed) const {
  Message message{std::move(bytes), begin, compressed, {}};
  if (method->layout.tensors && !compressed) message.split = split_request(message.view(), method->layout);
  return message;
}

void Stream::finish_request(void* filter) {
  if (http) return finish_http(filter);
  request_ended_ = true;
  if (method->request_streaming) {
    if (!body_.empty()) return refuse(filter, kInternal, "the request stream ends inside a message");
    inbox_.push({EventKind::kHalfClose, shared_from_this(), {}});
    return;
  }
  const size_t begin = body_begin_ + kPrefixBytes;
  if (body_.size() < begin || body_.size() - begin != message_bytes(body_.data() + body_begin_)) {
    return refuse(filter, kInternal, "the request body is not one whole gRPC message");
  }
  announced_ = true;
  const bool compressed = body_[body_begin_] == 1;
  inbox_.push({EventKind::kCall, shared_from_this(), message_of(std::move(body_), begin, compressed)});
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
  if (http) {  // the body's form is local_reply_config's business
    const uint32_t told = code == kResourceExhausted ? 413 : http_status(code);
    envoy_dynamic_module_callback_http_send_response(filter, told, nullptr, 0, {text.data(), text.size()}, {nullptr, 0});
    return;
  }
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
  asked_ = false;
  if (left_in_envoy_) {
    take_body(filter, kBufferedRequestBody);
    take_in(filter, ended_in_envoy_);
  } else if (ended_in_envoy_) {
    finish_request(filter);
  }
}

void Stream::on_trailers(void* filter) {
  if (refused_ || request_ended_) return;
  if (left_in_envoy_ || asked_) {
    ended_in_envoy_ = true;
  } else {
    finish_request(filter);
  }
}

void Stream::on_watermark(bool above) {
  above_watermark_ += above ? 1 : -1;
  if (above_watermark_) return;
  schedule(std::unique_lock<std::mutex>(mutex_));  // not flush: Envoy says this in the middle of its own writing
}

void Stream::flush(void* filter) {
  if (above_watermark_ || refused_) return;
  std::vector<Part> parts;
  std::string reply;
  bool writable, release;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    parts.swap(parts_);
    reply.swap(reply_);
    parts_bytes_ = 0;
    writable = std::exchange(want_writable_, false);
    release = std::exchange(want_release_, false);
  }
  static Header kHeaders[] = {header(":status", "200"), header("content-type", "application/grpc")};
  if (!reply.empty()) {
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
      if (!headers_sent_) {  // an item was answered before the handler had anything to say
        headers_sent_ = true;
        envoy_dynamic_module_callback_http_send_response_headers(filter, kHeaders, 2, false);
        if (gone_) return;
      }
      const std::string& data = part.framed;
      envoy_dynamic_module_callback_http_send_response_data(filter, {data.data(), data.size()}, false);
      continue;
    }
    if (part.kind == Part::kResponse) return send_response(filter, part);
    if (http) {  // the host itself refuses, such as while it drains; metadata: status, and message if there is one
      const std::string_view text = part.metadata.size() > 1 ? std::string_view(part.metadata[1].second) : "";
      return refuse(filter, std::stoi(part.metadata[0].second), text);
    }
    if (part.kind == Part::kHeaders && headers_sent_) continue;
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
  if (release) inbox_.push({EventKind::kRelease, shared_from_this(), {}});
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
    std::lock_guard<std::mutex> committing(scheduler_mutex_);  // Envoy's thread may end after this
    if (scheduler_) envoy_dynamic_module_callback_http_filter_scheduler_delete(scheduler_);
    scheduler_ = nullptr;
  }
  if (cancelled) inbox_.push({EventKind::kCancel, shared_from_this(), {}});
}
