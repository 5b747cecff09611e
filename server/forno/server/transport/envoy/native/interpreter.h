// What the files of the module share that know Python. All but `inbox` and `methods` is for the event loop's thread, with
// the interpreter's lock held.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <atomic>

#include "stream.h"

// Alive until the process ends: threads may still look at them while it does.
extern Inbox& inbox;
extern std::atomic<const Methods*> methods;  // null until the servicers have registered

// Makes `_forno_envoy`, for PyImport_AppendInittab.
PyObject* make_module();

// The stream's Call; made for its first event. New reference; null, with no error, if the loop has dropped it.
PyObject* call_of(const StreamPtr& stream, bool make);

PyObject* text(std::string_view s);

// What a gRPC status is in trailing metadata; the message is percent-encoded.
Metadata status_metadata(int code, std::string_view message);
// The same of Python's arguments: (code, message, trailing metadata). False with an error set.
bool parse_status(PyObject* args, Metadata& status);
// Appends a sequence of (str, str) to metadata. False with an error set.
bool append_metadata(PyObject* pairs, Metadata& out);
// Ends a call with a status; nobody waits for its Replies any more.
void send_status(Stream& stream, Metadata status);

constexpr int kHot = 100, kHttp = 101;  // kinds of events that no worker sends

// events.cc: all that wait.
PyObject* take(PyObject*, PyObject*);
// events_http.cc: the event of an HTTP call, (kind, call, body, None or (key, counts, numbers)). Takes the call.
PyObject* http_event(int kind, PyObject* call, const Message& message);

// replies.cc: requests that take the short way.

bool make_reply_type(PyObject* module);
// The request and the place for its answer, as one object. New reference.
PyObject* make_reply(const StreamPtr& stream, Message message);
// Tells the stream's Replies that nobody waits any more.
void drop_replies(Stream& stream);
// Called with a Reply and its error, or a size in bytes that is over the limit.
void set_fail_hook(PyObject* hook);
// From now on answers wait for the next `flush`, and leave together; large ones leave at once.
void cork();

// Takes the buffers of a sequence, and hands them over as pieces.
class Buffers {
 public:
  Buffers() = default;
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;
  ~Buffers();
  bool take(PyObject* sequence);  // once; false with an error set
  size_t size() const { return count_; }
  Piece operator[](size_t i) const { return {static_cast<const char*>(views_[i].buf), static_cast<size_t>(views_[i].len)}; }

 private:
  Py_buffer few_[8];  // an answer of one tensor has fewer
  std::vector<Py_buffer> many_;
  Py_buffer* views_ = few_;
  size_t count_ = 0;
};
