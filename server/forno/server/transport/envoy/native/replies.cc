// `_forno_envoy.Reply`: a request that takes the short way, and the place for its answer.
//
// It is the request's buffer, from the elements of its first tensor on, and as much of a future as the batcher and the
// worker need. A unary call has one; of a streaming call, each item has its own. A Reply that is dropped without an answer
// ends its call with INTERNAL.
#include "interpreter.h"

#include <structmember.h>

#include <iterator>
#include <new>

namespace {

constexpr long long kNeverUs = 1LL << 62;  // as request.py's NEVER_US
constexpr size_t kLargeAnswerBytes = 64 * 1024;

struct Reply {
  PyObject_HEAD
  StreamPtr stream;
  Message message;
  Reply *before, *after;  // in `unary`, or in its stream's list
  long long expires_us;
  int method;
  bool is_item;
  bool done;
};

PyTypeObject* reply_type = nullptr;
PyObject* fail_hook = nullptr;
Reply* unary = nullptr;  // those of unary calls that have not been answered
Py_ssize_t unary_count = 0;
std::vector<uint64_t>& answered = *new std::vector<uint64_t>;  // unary successes by method since they were last read

// Calls with small answers that have not left: they leave together, when `flush` is called.
bool corked = false;
std::vector<StreamPtr>& uncommitted = *new std::vector<StreamPtr>;

Reply* reply_of(PyObject* self) { return reinterpret_cast<Reply*>(self); }
const Layout& layout_of(const Reply& reply) { return reply.stream->method->layout; }

void link(Reply* reply) {
  Stream& stream = *reply->stream;
  Reply* first = reply->is_item ? static_cast<Reply*>(stream.replies) : unary;
  reply->before = nullptr;
  reply->after = first;
  if (first) first->before = reply;
  stream.replies = reply;
  if (!reply->is_item) {
    unary = reply;
    unary_count++;
  }
}

// Marks the end of a Reply, whatever it was.
void finish(Reply* reply) {
  Stream& stream = *reply->stream;
  reply->done = true;
  if (reply->before) reply->before->after = reply->after;
  if (reply->after) reply->after->before = reply->before;
  if (reply->is_item) {
    if (!reply->before) stream.replies = reply->after;
  } else {
    if (!reply->before) unary = reply->after;
    stream.replies = nullptr;
    unary_count--;
  }
}

// A large answer leaves at once: the worker sends it while the next one is copied.
void commit(const StreamPtr& stream, size_t size) {
  if (!corked || size >= kLargeAnswerBytes) return stream->commit();
  if (uncommitted.empty() || uncommitted.back() != stream) uncommitted.push_back(stream);
}

// Answers with one message.
void answer(Reply* reply, const Piece* pieces, size_t count) {
  const size_t size = reply->stream->reply(pieces, count);
  finish(reply);
  if (reply->is_item) reply->stream->item_done(reply->message.bytes.size());
  commit(reply->stream, size);
}

size_t put_varint(char* out, uint64_t value) {
  size_t size = 0;
  for (; value > 0x7f; value >>= 7) out[size++] = static_cast<char>(value | 0x80);
  out[size++] = static_cast<char>(value);
  return size;
}

// Tag and size of a delimited field (protobuf.dev, "Encoding").
struct Head {
  char bytes[20];
  size_t size = 0;
  Head() = default;
  Head(uint32_t field, size_t length) {
    size = put_varint(bytes, uint64_t{field} << 3 | 2);
    size += put_varint(bytes + size, length);
  }
  Piece piece() const { return {bytes, size}; }
};

void reply_dealloc(PyObject* self) {
  Reply* reply = reply_of(self);
  if (!reply->done) {  // no caller is ever left waiting, whatever becomes of its handler
    finish(reply);
    send_status(*reply->stream, status_metadata(kInternal, "the handler ended without an answer"));
  }
  reply->message.~Message();
  reply->stream.~StreamPtr();
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

int reply_get_buffer(PyObject* self, Py_buffer* view, int flags) {
  Message& message = reply_of(self)->message;
  const size_t from = message.begin + message.split.data_at;
  return PyBuffer_FillInfo(view, self, message.bytes.data() + from, static_cast<Py_ssize_t>(message.bytes.size() - from), 1,
                           flags);
}

PyObject* reply_done(PyObject* self, PyObject*) { return PyBool_FromLong(reply_of(self)->done); }

bool fail(PyObject* self, PyObject* why) {
  PyObject* result = fail_hook ? PyObject_CallFunctionObjArgs(fail_hook, self, why, nullptr) : nullptr;
  Py_XDECREF(result);
  return result != nullptr;
}

// The parts of an answer; the field with the request's id goes before the last of them. Copied here.
PyObject* reply_set_result(PyObject* self, PyObject* parts) {
  Reply* reply = reply_of(self);
  if (reply->done) Py_RETURN_NONE;
  Buffers buffers;
  if (!buffers.take(parts)) return nullptr;
  const Methods& all = *methods.load(std::memory_order_acquire);
  const Layout& layout = layout_of(*reply);
  const Split& split = reply->message.split;
  const Piece id = reply->message.view().substr(split.id_at, split.id_size);
  const Head id_head(layout.answer_id, id.size());
  Head item_id_head, answer_head;
  Piece few[12];
  std::vector<Piece> many;
  Piece* pieces = few;
  if (buffers.size() + 5 > std::size(few)) {
    many.resize(buffers.size() + 5);
    pieces = many.data();
  }
  size_t count = reply->is_item ? 3 : 0, size = 0;  // an item's own fields come first, once the size is known
  const size_t first = count;
  for (size_t i = 0; i < buffers.size(); i++) {
    if (i + 1 == buffers.size() && !id.empty()) {
      pieces[count++] = id_head.piece();
      pieces[count++] = id;
    }
    pieces[count++] = buffers[i];
  }
  for (size_t i = first; i < count; i++) size += pieces[i].size();
  if (reply->is_item) {
    item_id_head = Head(layout.item_id, id.size());
    answer_head = Head(layout.item_answer, size);
    pieces[0] = id.empty() ? Piece() : item_id_head.piece();
    pieces[1] = id;
    pieces[2] = answer_head.piece();
  }
  if (size > all.max_message_bytes) {
    PyObject* bytes = PyLong_FromSize_t(size);
    const bool told = bytes && fail(self, bytes);
    Py_XDECREF(bytes);
    if (!told) return nullptr;
    Py_RETURN_NONE;
  }
  if (!reply->is_item) answered[static_cast<size_t>(reply->method)]++;
  answer(reply, pieces, count);
  Py_RETURN_NONE;
}

PyObject* reply_set_exception(PyObject* self, PyObject* error) {
  if (!reply_of(self)->done && !fail(self, error)) return nullptr;
  Py_RETURN_NONE;
}

PyObject* reply_end(PyObject* self, PyObject* args) {
  Reply* reply = reply_of(self);
  Metadata status;
  if (!parse_status(args, status)) return nullptr;
  if (reply->done) Py_RETURN_NONE;
  finish(reply);
  send_status(*reply->stream, std::move(status));
  Py_RETURN_NONE;
}

PyObject* reply_send(PyObject* self, PyObject* data) {
  Py_buffer view;
  if (PyObject_GetBuffer(data, &view, PyBUF_C_CONTIGUOUS) < 0) return nullptr;
  const Piece piece(static_cast<const char*>(view.buf), static_cast<size_t>(view.len));
  if (!reply_of(self)->done) answer(reply_of(self), &piece, 1);
  PyBuffer_Release(&view);
  Py_RETURN_NONE;
}

PyObject* reply_hand_over(PyObject* self, PyObject*) {
  Reply* reply = reply_of(self);
  if (reply->done) Py_RETURN_NONE;
  PyObject* call = call_of(reply->stream, !reply->is_item);
  if (!call && PyErr_Occurred()) return nullptr;
  finish(reply);
  if (reply->is_item) reply->stream->item_done(0);
  return call ? call : Py_NewRef(Py_None);
}

PyObject* reply_message(PyObject* self, PyObject*) {
  const std::string_view message = reply_of(self)->message.view();
  return PyBytes_FromStringAndSize(message.data(), static_cast<Py_ssize_t>(message.size()));
}

PyObject* reply_spans(PyObject* self, PyObject*) {
  const Reply& reply = *reply_of(self);
  std::vector<uint64_t> spans;
  const Split split = split_request(reply.message.view(), layout_of(reply), &spans);
  PyObject* out = PyTuple_New(static_cast<Py_ssize_t>(spans.size()));
  for (size_t i = 0; out && i < spans.size(); i++) {
    const uint64_t value = i % 2 ? spans[i] : spans[i] - split.data_at;
    PyTuple_SET_ITEM(out, static_cast<Py_ssize_t>(i), PyLong_FromUnsignedLongLong(value));
  }
  return out;
}

PyObject* get_request_id(PyObject* self, void*) {
  const Message& message = reply_of(self)->message;
  const std::string_view id = message.view().substr(message.split.id_at, message.split.id_size);
  return PyUnicode_DecodeASCII(id.data(), static_cast<Py_ssize_t>(id.size()), "replace");
}

PyObject* get_credential(PyObject* self, void*) { return text(reply_of(self)->stream->credential); }
PyObject* get_peer(PyObject* self, void*) { return text(reply_of(self)->stream->peer); }

PyObject* get_call(PyObject* self, void*) {
  void* call = reply_of(self)->stream->call;
  return Py_NewRef(call ? static_cast<PyObject*>(call) : Py_None);
}

PyMethodDef reply_methods[] = {
    {"done", reply_done, METH_NOARGS, "Whether nobody waits any more."},
    {"set_result", reply_set_result, METH_O, "Answers with a message, given in parts that are copied."},
    {"set_exception", reply_set_exception, METH_O, "Has the host answer with an error."},
    {"end", reply_end, METH_VARARGS, "Ends the whole call: (code, percent-encoded message, trailing metadata)."},
    {"send", reply_send, METH_O, "Answers with a whole message."},
    {"hand_over", reply_hand_over, METH_NOARGS, "Leaves the short way: the Call, or None where it has ended."},
    {"message", reply_message, METH_NOARGS, "The whole serialized message."},
    {"spans", reply_spans, METH_NOARGS, "Offset and size of each tensor's elements, offsets into the buffer."},
    {nullptr, nullptr, 0, nullptr}};
PyMemberDef reply_members[] = {
    {const_cast<char*>("expires_us"), T_LONGLONG, offsetof(Reply, expires_us), READONLY,
     const_cast<char*>("The call's deadline, monotonic microseconds; 1 << 62 without one.")},
    {const_cast<char*>("method"), T_INT, offsetof(Reply, method), READONLY,
     const_cast<char*>("The number the method was registered with.")},
    {const_cast<char*>("is_item"), T_BOOL, offsetof(Reply, is_item), READONLY,
     const_cast<char*>("Whether it is an item of a streaming call.")},
    {nullptr, 0, 0, 0, nullptr}};
PyGetSetDef reply_getters[] = {{"request_id", get_request_id, nullptr, "The request's id.", nullptr},
                               {"credential", get_credential, nullptr, "As of a Call.", nullptr},
                               {"peer", get_peer, nullptr, "As of a Call.", nullptr},
                               {"call", get_call, nullptr, "The Call that it is an item of, or None.", nullptr},
                               {nullptr, nullptr, nullptr, nullptr, nullptr}};
PyType_Slot reply_slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(reply_dealloc)},
                             {Py_bf_getbuffer, reinterpret_cast<void*>(reply_get_buffer)},
                             {Py_tp_methods, reply_methods},
                             {Py_tp_members, reply_members},
                             {Py_tp_getset, reply_getters},
                             {Py_tp_doc, const_cast<char*>("A request, and where its answer goes. Event loop only.")},
                             {0, nullptr}};
PyType_Spec reply_spec = {"_forno_envoy.Reply", sizeof(Reply), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                          reply_slots};

PyObject* flush(PyObject*, PyObject*) {
  corked = false;
  for (const StreamPtr& stream : uncommitted) stream->commit();
  uncommitted.clear();
  Py_RETURN_NONE;
}

PyObject* take_answered(PyObject*, PyObject*) {
  PyObject* out = PyList_New(0);
  for (size_t i = 0; out && i < answered.size(); i++) {
    if (!answered[i]) continue;
    PyObject* pair = Py_BuildValue("(nK)", static_cast<Py_ssize_t>(i), static_cast<unsigned long long>(answered[i]));
    if (!pair || PyList_Append(out, pair) < 0) Py_CLEAR(out);
    Py_XDECREF(pair);
    answered[i] = 0;
  }
  return out;
}

PyObject* unanswered(PyObject*, PyObject*) {
  PyObject* out = PyList_New(0);
  for (Reply* reply = unary; out && reply; reply = reply->after) {
    if (PyList_Append(out, reinterpret_cast<PyObject*>(reply)) < 0) Py_CLEAR(out);
  }
  return out;
}

PyMethodDef functions[] = {
    {"flush", flush, METH_NOARGS, "Lets all answers leave that were given since `take` and have not left."},
    {"take_answered", take_answered, METH_NOARGS, "Unary successes since the last time: [(method, how many)]."},
    {"unanswered", unanswered, METH_NOARGS, "The Replies of unary calls that have no answer yet."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool make_reply_type(PyObject* module) {
  reply_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&reply_spec));
  return reply_type && PyModule_AddObjectRef(module, "Reply", reinterpret_cast<PyObject*>(reply_type)) == 0 &&
         PyModule_AddFunctions(module, functions) == 0;
}

PyObject* make_reply(const StreamPtr& stream, Message message) {
  Reply* reply = reply_of(reply_type->tp_alloc(reply_type, 0));
  if (!reply) return nullptr;
  new (&reply->stream) StreamPtr(stream);
  new (&reply->message) Message(std::move(message));
  reply->method = stream->method->number;
  reply->expires_us = stream->deadline_us < 0 ? kNeverUs : stream->deadline_us;
  reply->is_item = layout_of(*reply).item_request != 0;
  reply->done = false;
  link(reply);
  if (answered.size() <= static_cast<size_t>(reply->method)) answered.resize(static_cast<size_t>(reply->method) + 1);
  return reinterpret_cast<PyObject*>(reply);
}

void cork() { corked = true; }

void drop_replies(Stream& stream) {
  while (stream.replies) finish(static_cast<Reply*>(stream.replies));
  stream.drop_items();
}

void set_fail_hook(PyObject* hook) {
  Py_XINCREF(hook);
  Py_XSETREF(fail_hook, hook);
}

Buffers::~Buffers() {
  for (size_t i = 0; i < count_; i++) PyBuffer_Release(&views_[i]);
}

bool Buffers::take(PyObject* sequence) {
  PyObject* items = PySequence_Fast(sequence, "an answer is a sequence of buffers");
  if (!items) return false;
  const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(items));
  if (count > std::size(few_)) {
    many_.resize(count);
    views_ = many_.data();
  }
  bool good = true;
  while (good && count_ < count) {
    PyObject* item = PySequence_Fast_GET_ITEM(items, static_cast<Py_ssize_t>(count_));
    good = PyObject_GetBuffer(item, &views_[count_], PyBUF_C_CONTIGUOUS) == 0;
    if (good) count_++;
  }
  Py_DECREF(items);
  return good;
}
