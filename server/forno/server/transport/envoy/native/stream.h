// One gRPC call as both of its owners see it: the Envoy worker that holds its HTTP stream, and the event loop.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "callers.h"
#include "envoy_abi.h"
#include "json_split.h"
#include "protocol.h"
#include "split.h"

using Metadata = std::vector<std::pair<std::string, std::string>>;  // to be sent

// One gRPC message, or the body of an HTTP call with room for a prefix; `compressed` is the flag of its five-byte prefix (gRPC over HTTP/2, "Length-Prefixed-Message").
struct Message {
  std::string bytes;
  size_t begin = 0;  // where it begins in `bytes`: a prefix is not worth a copy to cut it off
  bool compressed = false;
  Split split{};  // of a hot method's request; its key is empty where it was not split
  std::unique_ptr<JsonSplitter> json{};  // of an HTTP call's body; null where it was not split

  std::string_view view() const { return std::string_view(bytes).substr(begin); }
};

// Where a call came in (ends.py): at the public address, at the one for administration, or from an edge of ours.
enum class Door { kPublic, kAdmin, kInner };

// Something to be copied into an answer.
using Piece = std::string_view;

// A part of an answer on its way to the worker.
struct Part {
  enum Kind { kHeaders, kMessage, kStatus, kResponse } kind;
  Metadata metadata;   // kHeaders: initial metadata; kStatus: trailing metadata, grpc-status first; kResponse: headers
  std::string framed;  // kMessage: prefix and bytes; more than one message where they are small. kResponse: the body
};

// What a waiting message costs besides its bytes. Counted, or millions of empty ones would weigh nothing.
constexpr size_t kMessageOverheadBytes = 256;

class Stream;
using StreamPtr = std::shared_ptr<Stream>;

// kRelease: a streaming call has room for items that wait. kItemsDone: the last of its items has been answered.
// kAsk: a caller whom nobody knows wants to send a request; nothing of it is taken in before `let_in`.
enum class EventKind { kCall, kMessage, kHalfClose, kCancel, kWritable, kStop, kRelease, kItemsDone, kAsk };

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
  void push(std::vector<Event> events);
  void take(std::vector<Event>& into);  // an empty one, whose memory serves the events to come

 private:
  void wake();

  std::mutex mutex_;
  std::vector<Event> events_;  // guarded by mutex_
  int fd_;                     // an eventfd, written only when events_ was empty: one wake for all that wait
};

// What the servicers have registered. Written once by the loop before it is published, read by every worker.
struct Methods {
  struct Method {
    int number;
    bool request_streaming;
    bool guarded;     // callers are asked who they are
    Layout layout{};  // of a hot method's requests; without tensors for others
  };
  std::unordered_map<std::string, Method> by_path;
  size_t max_message_bytes = 0;
  size_t max_inbox_bytes = 0;  // of one streaming call; above it Envoy stops reading from the client
  int64_t max_message_us = 0;  // of one call: how long a message may take from its first byte to its last
  size_t max_items = 0;        // of one streaming call that are on their way through a model, by the short way
};

// Threads: the worker calls the on_* functions, the loop the others. Lifetime: shared by the worker's filter (until
// Envoy destroys it) and the loop's Call. After `gone` nothing touches Envoy on its behalf.
class Stream : public std::enable_shared_from_this<Stream> {
 public:
  Stream(Inbox& inbox, Door door) : inbox_(inbox), door_(door) {}
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
  // One message that is made of these pieces: the whole answer of a successful unary call, or one more of a streaming
  // call. It leaves with the next `commit`. Returns its size.
  size_t reply(const Piece* pieces, size_t count);
  void commit();
  void let_in(bool remember);                 // has the request of one who asked taken in; of the next ones unasked
  void consumed(size_t bytes);                // the application has taken so much of the request
  bool gone();
  size_t pending_bytes();
  bool notify_writable();  // false: nothing pends, no event will come

  // Loop side: items of a streaming call on the short way. They wait here (`hold`) until few enough are on their way and
  // the client keeps up with reading; each that is let go by `next_item` is ended by one `item_done`. A half-close waits
  // behind them.
  void hold(Message item) { waiting_.push_back(std::move(item)); }
  bool next_item(Message& item);
  void item_done(size_t used_bytes);  // the item's bytes; 0 where somebody else says `consumed`
  void drop_items();                  // those that wait: nobody will read their answers
  bool notify_items_done();           // false: there is none, no event will come
  bool has_waiting() const { return !waiting_.empty(); }
  void released() { release_due_ = false; }
  bool half_closed = false;  // the event has come, and has not been passed on
  bool replied = false;      // `reply` was called

  // Set before the first event; constant afterwards.
  bool http = false;  // a REST call that came as it is, past the transcoder: no gRPC in either direction
  const Methods::Method* method = nullptr;
  int64_t deadline_us = -1;  // CLOCK_MONOTONIC; -1 without one
  std::string path;
  std::string content_type;  // of an HTTP call
  std::string peer;
  std::string metadata;    // what the caller sent: key, NUL, value, NUL, and so on
  std::string credential;  // of that, what says who calls

  // Borrowed; touched only with the interpreter's lock held.
  void* call = nullptr;     // the loop's Call
  void* replies = nullptr;  // Replies that have not been answered, a list

 private:
  void take_body(void* filter, int type);
  void take_in(void* filter, bool end);
  void append_body(const Buffer& chunk);
  size_t gap_before(std::string_view beginning) const;
  bool split_messages(void* filter);
  void finish_request(void* filter);
  void refuse(void* filter, int code, std::string_view reason);
  void begin_http(std::string_view type, std::string_view length, std::string_view timeout_ms);
  void take_http(void* filter, bool end);
  void finish_http(void* filter);
  void send_response(void* filter, const Part& response);
  void resume(void* filter);
  void flush(void* filter);
  // Has the worker look at this stream. Releases the lock, which is `mutex_`'s, before it wakes the worker: that would
  // otherwise begin by waiting for it, on another processor.
  void schedule(std::unique_lock<std::mutex> lock);
  std::string& room_locked(size_t size);
  Message message_of(std::string bytes, size_t begin, bool compressed) const;

  Inbox& inbox_;
  const Door door_;

  // Loop only.
  std::list<Message> waiting_;  // a deque takes memory even where it stays empty, as of unary calls
  size_t items_ = 0;  // let go and not done
  bool release_due_ = false;
  bool want_items_done_ = false;

  // Worker only.
  const Methods* methods_ = nullptr;
  bool refused_ = false;
  bool request_ended_ = false;
  bool announced_ = false;  // the loop knows this call
  bool asked_ = false;      // the loop has to say whether the caller may come in
  int above_watermark_ = 0;  // Envoy reports nested levels
  bool headers_sent_ = false;
  bool left_in_envoy_ = false;   // Envoy's buffer holds body that was not taken yet
  bool ended_in_envoy_ = false;  // ... and the end of the request
  std::string body_;  // bytes of a message that is not whole yet, and before them `body_begin_` bytes of nothing
  size_t body_begin_ = 0;
  int64_t begun_us_ = 0;  // when it was first seen that `body_` holds part of a message; 0: it does not
  bool too_large_ = false;  // the body of an HTTP call
  std::unique_ptr<JsonSplitter> json_;  // of an HTTP call whose method takes split bodies

  std::mutex scheduler_mutex_;  // taken while mutex_ is held, never before it
  std::mutex mutex_;  // guards all below
  std::vector<Part> parts_;
  std::string reply_;  // instead of parts
  size_t parts_bytes_ = 0;
  size_t inbox_bytes_ = 0;
  void* scheduler_ = nullptr;  // while it is used, scheduler_mutex_ is held
  bool scheduled_ = false;
  bool want_resume_ = false;
  bool want_writable_ = false;
  bool want_release_ = false;
  bool answered_ = false;  // a status has been handed over
  bool gone_ = false;      // written by the worker alone, which may read it without the lock
};
