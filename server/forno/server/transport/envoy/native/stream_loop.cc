// The event loop's side of a Stream, and the Inbox between the two.
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "stream.h"

namespace {

constexpr size_t kJoinedBytes = 16384;  // HTTP/2's usual frame: small messages leave together, not in a frame each
constexpr size_t kHighWaterBytes = 1 << 20;  // more unread answers than this, and no more items are let go

}  // namespace

Inbox::Inbox() : fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {}

void Inbox::push(Event event) {
  bool first;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    first = events_.empty();
    events_.push_back(std::move(event));
  }
  if (first) wake();
}

void Inbox::push(std::vector<Event> events) {
  if (events.empty()) return;
  bool first;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    first = events_.empty();
    if (first) {
      events_.swap(events);
    } else {
      for (Event& event : events) events_.push_back(std::move(event));
    }
  }
  if (first) wake();
}

void Inbox::wake() {
  const uint64_t one = 1;
  if (write(fd_, &one, sizeof one) < 0) return;  // full counter: the loop is awake anyway
}

void Inbox::take(std::vector<Event>& into) {
  uint64_t count;
  if (read(fd_, &count, sizeof count) < 0) count = 0;
  std::lock_guard<std::mutex> lock(mutex_);
  into.swap(events_);
}

void Stream::schedule(std::unique_lock<std::mutex> lock) {
  if (scheduled_ || gone_ || !scheduler_) return;
  scheduled_ = true;
  std::lock_guard<std::mutex> committing(scheduler_mutex_);
  lock.unlock();
  envoy_dynamic_module_callback_http_filter_scheduler_commit(scheduler_, 0);
}

void Stream::send(std::vector<Part> parts) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (gone_ || answered_) return;
  for (Part& part : parts) {
    answered_ = answered_ || part.kind == Part::kStatus || part.kind == Part::kResponse;
    if (part.kind == Part::kMessage) {
      room_locked(part.framed.size()).append(part.framed);
    } else {
      parts_.push_back(std::move(part));
    }
  }
  schedule(std::move(lock));
}

// Where a message of so many bytes, prefix included, is to be added.
std::string& Stream::room_locked(size_t size) {
  parts_bytes_ += size + kMessageOverheadBytes;
  if (parts_.empty() || parts_.back().kind != Part::kMessage || parts_.back().framed.size() >= kJoinedBytes) {
    parts_.push_back({Part::kMessage, {}, {}});
  }
  return parts_.back().framed;
}

size_t Stream::reply(const Piece* pieces, size_t count) {
  size_t size = 0;
  for (size_t i = 0; i < count; i++) size += pieces[i].size();
  char prefix[kPrefixBytes];
  write_prefix(prefix, size, false);
  replied = true;
  std::lock_guard<std::mutex> lock(mutex_);
  if (gone_ || answered_) return size;
  answered_ = !method->request_streaming;
  std::string& out = answered_ ? reply_ : room_locked(kPrefixBytes + size);
  if (out.empty()) out.reserve(kPrefixBytes + size);
  out.append(prefix, kPrefixBytes);
  for (size_t i = 0; i < count; i++) out.append(pieces[i]);
  return size;
}

void Stream::commit() { schedule(std::unique_lock<std::mutex>(mutex_)); }

void Stream::let_in(bool remember) {
  if (remember) callers().add(method->number, credential);
  std::unique_lock<std::mutex> lock(mutex_);
  want_resume_ = true;
  schedule(std::move(lock));
}

void Stream::consumed(size_t bytes) {
  std::unique_lock<std::mutex> lock(mutex_);
  inbox_bytes_ -= std::min(inbox_bytes_, bytes + kMessageOverheadBytes);
  if (want_resume_ && inbox_bytes_ <= methods_->max_inbox_bytes) schedule(std::move(lock));
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

bool Stream::next_item(Message& item) {
  if (waiting_.empty() || items_ >= methods_->max_items) return false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    want_release_ = parts_bytes_ > kHighWaterBytes && !gone_;
    if (want_release_) return false;
  }
  item = std::move(waiting_.front());
  waiting_.pop_front();
  items_++;
  return true;
}

void Stream::item_done(size_t used_bytes) {
  items_--;
  if (used_bytes) consumed(used_bytes);
  if (!waiting_.empty()) {
    if (!release_due_) inbox_.push({EventKind::kRelease, shared_from_this(), {}});
    release_due_ = true;
  } else if (!items_ && std::exchange(want_items_done_, false)) {
    inbox_.push({EventKind::kItemsDone, shared_from_this(), {}});
  }
}

void Stream::drop_items() {
  waiting_.clear();
  items_ = 0;
  half_closed = false;
}

bool Stream::notify_items_done() {
  want_items_done_ = items_ > 0 || !waiting_.empty();
  return want_items_done_;
}
