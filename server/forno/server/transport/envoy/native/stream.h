// One gRPC call as both of its owners see it: the Envoy worker that holds its HTTP stream, and the event loop.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "envoy_abi.h"
#include "protocol.h"
#include "split.h"

using Metadata = std::vector<std::pair<std::string, std::string>>;  // to be sent

// One gRPC message; `compressed` is the flag of its five-byte prefix (gRPC over HTTP/2, "Length-Prefixed-Message").
struct Message {
  std::string bytes;  // of a unary request with its prefix, which is not worth a copy to cut it off
  bool compressed = false;
  Split split{};  // of a hot method's request, without regard to the prefix; its key is empty where it was not split
};

// A piece of an answer on its way to the worker.
struct Part {
  enum Kind { kHeaders, kMessage, kStatus } kind;
  Metadata metadata;   // kHeaders: initial metadata; kStatus: trailing metadata, grpc-status first
  std::string framed;  // kMessage: prefix and bytes
};

// What a waiting message costs besides its bytes. Counted, or millions of empty ones would weigh nothing.
constexpr size_t kMessageOverheadBytes = 256;

class Stream;
using StreamPtr = std::shared_ptr<Stream>;

enum class EventKind { kCall, kMessage, kHalfClose, kCancel, kWritable, kStop };

struct Event {
  EventKind kind;
  StreamPtr stream;
  Message message;
};

// Events on their way to the event loop. Any thread pushes; only the loop takes. It lives as long as the process.
class Inbox {
 public:
  Inbox();
  int fd() const { return fd_; }
  void push(Event event);
  std::vector<Event> take();

 private:
  std::mutex mutex_;
  std::vector<Event> events_;  // guarded by mutex_
  int fd_;                     // an eventfd, written only when events_ was empty: one wake for all that wait
};

// What the servicers have registered. Written once by the loop before it is published, read by every worker.
struct Methods {
  struct Method {
    int number;
    bool request_streaming;
    Layout layout;  // of a hot method's requests; without tensors for others
  };
  std::unordered_map<std::string, Method> by_path;
  size_t max_message_bytes = 0;
  size_t max_inbox_bytes = 0;  // of one streaming call; above it Envoy stops reading from the client
};

// Threads: the worker calls the on_* functions, the loop the others. Lifetime: shared by the worker's filter (until
// Envoy destroys it) and the loop's Call. After `gone` nothing touches Envoy on its behalf.
class Stream : public std::enable_shared_from_this<Stream> {
 public:
  explicit Stream(Inbox& inbox) : inbox_(inbox) {}
  ~Stream();

  // Worker side.
  void on_headers(void* filter, const Methods* methods, bool end);
  int on_body(void* filter, bool end);
  void on_scheduled(void* filter);
  void on_trailers(void* filter);
  void on_watermark(bool above);
  void on_gone();

  // Loop side.
  void send(std::vector<Part> parts);
  void reply(std::string framed);  // the whole answer of a successful unary call: one message with its prefix
  void consumed(size_t bytes);                // the application has taken so much of the request
  bool gone();
  size_t pending_bytes();
  bool notify_writable();  // false: nothing pends, no event will come

  // Set before the first event; constant afterwards.
  int method = -1;
  int64_t deadline_us = -1;  // CLOCK_MONOTONIC; -1 without one
  std::string path;
  std::string peer;
  std::string metadata;    // what the caller sent: key, NUL, value, NUL, and so on
  std::string credential;  // of that, what says who calls

  void* call = nullptr;  // the loop's Call, borrowed; touched only with the interpreter's lock held

 private:
  void take_body(void* filter, int type);
  void append_body(const Buffer& chunk);
  bool split_messages(void* filter);
  void finish_request(void* filter);
  void refuse(void* filter, int code, std::string_view reason);
  void resume(void* filter);
  void flush(void* filter);
  void schedule_locked();

  Inbox& inbox_;

  // Worker only.
  const Methods* methods_ = nullptr;
  const Methods::Method* method_ = nullptr;
  bool refused_ = false;
  bool request_ended_ = false;
  bool announced_ = false;  // the loop knows this call
  int above_watermark_ = 0;  // Envoy reports nested levels
  bool headers_sent_ = false;
  bool left_in_envoy_ = false;   // Envoy's buffer holds body that was not taken yet
  bool ended_in_envoy_ = false;  // ... and the end of the request
  std::string body_;  // bytes of a message that is not whole yet

  std::mutex mutex_;  // guards all below
  std::vector<Part> parts_;
  std::string reply_;  // instead of parts
  size_t parts_bytes_ = 0;
  size_t inbox_bytes_ = 0;
  void* scheduler_ = nullptr;
  bool scheduled_ = false;
  bool want_resume_ = false;
  bool want_writable_ = false;
  bool answered_ = false;  // a status has been handed over
  bool gone_ = false;      // written by the worker alone, which may read it without the lock
};
