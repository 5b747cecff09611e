// What Python is told: the events of a turn, those of one kind together where they come so.
#include "interpreter.h"

namespace {

constexpr size_t kKeptEvents = 4096;  // for so many, memory is kept from turn to turn

PyObject* bytes_of(std::string_view data) { return PyBytes_FromStringAndSize(data.data(), static_cast<Py_ssize_t>(data.size())); }

// The list of events that `take` makes.
class Events {
 public:
  Events() : out_(PyList_New(0)) {}

  bool good() const { return out_ && !PyErr_Occurred(); }

  // The list; null with an error set.
  PyObject* finish() {
    if (!good()) Py_CLEAR(out_);
    return out_;
  }

  void add(Event& event) {
    switch (event.kind) {
      case EventKind::kCall:
        if (event.stream->gone()) return;  // gave up before anybody looked: it never runs
        if (event.stream->http) return add_http(event);
        if (!event.message.split.key.empty()) return add_hot(event.stream, std::move(event.message));
        return add(event, call_of(event.stream, true));
      case EventKind::kMessage:
        if (event.message.split.key.empty()) return add(event, call_of(event.stream, false));
        event.stream->hold(std::move(event.message));
        return release(event.stream);
      case EventKind::kRelease:
        event.stream->released();
        return release(event.stream);
      case EventKind::kHalfClose:
        event.stream->half_closed = true;
        return release(event.stream);
      case EventKind::kCancel: {
        const bool hot = event.stream->replies && !event.stream->call;
        drop_replies(*event.stream);
        if (!hot) return add(event, call_of(event.stream, false));
        return append(Py_BuildValue("(iiOi)", static_cast<int>(EventKind::kCancel), event.stream->method->number, Py_None, 0));
      }
      case EventKind::kAsk:
        if (!event.stream->gone()) add(event, call_of(event.stream, true));
        return;
      case EventKind::kStop:
        return add(event, Py_NewRef(Py_None));
      default:
        return add(event, call_of(event.stream, false));
    }
  }

 private:
  void append(PyObject* item) {
    if (item && out_) PyList_Append(out_, item);
    Py_XDECREF(item);
    replies_ = nullptr;
  }

  // Takes the call. Without one there is nobody left to tell.
  void add(const Event& event, PyObject* call) {
    if (!call) return;
    const std::string_view bytes = event.message.view();
    const bool has_message = event.kind == EventKind::kMessage || (event.kind == EventKind::kCall && event.message.begin);
    PyObject* message = has_message ? bytes_of(bytes) : Py_NewRef(Py_None);
    if (!message) return Py_DECREF(call);
    append(Py_BuildValue("(iNNO)", static_cast<int>(event.kind), call, message,
                         event.message.compressed ? Py_True : Py_False));
  }

  void add_http(const Event& event) {
    if (PyObject* call = call_of(event.stream, true)) append(http_event(kHttp, call, event.message));
  }

  // Requests of one method that differ in nothing but their elements stand together, where they come so; those of a
  // method whose callers are asked, if they are one caller's.
  void add_hot(const StreamPtr& stream, Message message) {
    if (!replies_ || first_->method != stream->method || key_ != message.split.key || !same_caller(*stream)) {
      key_ = message.split.key;
      first_ = stream;
      PyObject* replies = PyList_New(0);
      PyObject* key = replies ? bytes_of(key_) : nullptr;
      if (!key) return Py_XDECREF(replies);
      append(Py_BuildValue("(iiNN)", kHot, stream->method->number, key, replies));
      replies_ = replies;
    }
    PyObject* reply = good() ? make_reply(stream, std::move(message)) : nullptr;
    if (reply) PyList_Append(replies_, reply);
    Py_XDECREF(reply);
  }

  // Whether the caller is the one of the last group. Of a stream's items that is the stream: what it may can change.
  bool same_caller(const Stream& stream) const {
    if (!stream.method->guarded || first_.get() == &stream) return true;
    const auto address = [](std::string_view peer) { return peer.substr(0, peer.rfind(':')); };
    return !stream.method->request_streaming && first_->credential == stream.credential &&
           address(first_->peer) == address(stream.peer);
  }

  // Lets go what there is room for, and then the half-close behind it.
  void release(const StreamPtr& stream) {
    Message message;
    while (stream->next_item(message)) add_hot(stream, std::move(message));
    if (!stream->half_closed || stream->has_waiting()) return;
    stream->half_closed = false;
    const Event event{EventKind::kHalfClose, stream, {}};
    add(event, call_of(stream, false));
  }

  PyObject* out_;
  PyObject* replies_ = nullptr;  // of the last event, borrowed; null where that is no group
  std::string key_;
  StreamPtr first_;  // of that event
};

}  // namespace

PyObject* take(PyObject*, PyObject*) {
  static std::vector<Event>& taken = *new std::vector<Event>;
  inbox.take(taken);
  cork();
  Events events;
  for (size_t i = 0; events.good() && i < taken.size(); i++) events.add(taken[i]);
  taken.clear();
  if (taken.capacity() > kKeptEvents) taken.shrink_to_fit();
  return events.finish();
}
