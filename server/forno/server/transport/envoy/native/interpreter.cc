// `_forno_envoy`, the module that Python sees: events out (`take`), answers in (Call.reply, Call.send_*; for requests that
// take the short way, see replies.cc).
//
// All of it runs on the event loop's thread, with the interpreter's lock held.
#include "interpreter.h"

Inbox& inbox = *new Inbox;
std::atomic<const Methods*> methods{nullptr};

namespace {

struct Call {
  PyObject_HEAD
  StreamPtr* stream;
  bool answered;
};

Stream& stream_of(PyObject* self) { return **reinterpret_cast<Call*>(self)->stream; }

void call_dealloc(PyObject* self) {
  Call* call = reinterpret_cast<Call*>(self);
  (*call->stream)->call = nullptr;
  if (!call->answered) {  // no caller is ever left waiting, whatever becomes of its handler
    send_status(**call->stream, status_metadata(kInternal, "the handler ended without an answer"));
  }
  delete call->stream;
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* call_metadata(PyObject* self, PyObject*) {
  const std::string_view metadata = stream_of(self).metadata;
  PyObject* out = PyList_New(0);
  for (size_t at = 0; out && at < metadata.size();) {
    const size_t key_end = metadata.find('\0', at), value_end = metadata.find('\0', key_end + 1);
    PyObject* pair = Py_BuildValue("(NN)", text(metadata.substr(at, key_end - at)),
                                   text(metadata.substr(key_end + 1, value_end - key_end - 1)));
    if (!pair || PyList_Append(out, pair) < 0) Py_CLEAR(out);
    Py_XDECREF(pair);
    at = value_end + 1;
  }
  return out;
}

PyObject* call_send_headers(PyObject* self, PyObject* pairs) {
  Part part{Part::kHeaders, {}, {}};
  if (!append_metadata(pairs, part.metadata)) return nullptr;
  std::vector<Part> parts;
  parts.push_back(std::move(part));
  stream_of(self).send(std::move(parts));
  Py_RETURN_NONE;
}

PyObject* call_send_message(PyObject* self, PyObject* args) {
  Py_buffer data;
  int compressed = 0;
  if (!PyArg_ParseTuple(args, "y*|p", &data, &compressed)) return nullptr;
  std::vector<Part> parts(1);
  parts[0].kind = Part::kMessage;
  parts[0].framed = frame_message(static_cast<const char*>(data.buf), static_cast<size_t>(data.len), compressed != 0);
  PyBuffer_Release(&data);
  stream_of(self).send(std::move(parts));
  Py_RETURN_NONE;
}

PyObject* call_send_status(PyObject* self, PyObject* args) {
  Metadata status;
  if (!parse_status(args, status)) return nullptr;
  reinterpret_cast<Call*>(self)->answered = true;
  send_status(stream_of(self), std::move(status));
  Py_RETURN_NONE;
}

void respond(PyObject* self, Metadata headers, Piece body) {
  reinterpret_cast<Call*>(self)->answered = true;
  std::vector<Part> parts;
  parts.push_back({Part::kResponse, std::move(headers), std::string(body)});
  stream_of(self).send(std::move(parts));
}

PyObject* call_respond(PyObject* self, PyObject* args) {
  int code;
  PyObject* pairs;
  const char* body;
  Py_ssize_t size;
  if (!PyArg_ParseTuple(args, "iOy#", &code, &pairs, &body, &size)) return nullptr;
  Metadata headers{{":status", std::to_string(http_status(code))}, {"content-type", "application/json"}};
  if (!append_metadata(pairs, headers)) return nullptr;
  respond(self, std::move(headers), {body, static_cast<size_t>(size)});
  Py_RETURN_NONE;
}

// One message as the whole answer of a successful unary call. False, and nothing sent, where it is larger than a message
// may be.
PyObject* call_reply(PyObject* self, PyObject* data) {
  Py_buffer view;
  if (PyObject_GetBuffer(data, &view, PyBUF_C_CONTIGUOUS) < 0) return nullptr;
  const Piece piece(static_cast<const char*>(view.buf), static_cast<size_t>(view.len));
  const bool fits = piece.size() <= methods.load(std::memory_order_acquire)->max_message_bytes;
  if (fits && stream_of(self).http) {
    respond(self, {{":status", "200"}, {"content-type", "application/json"}}, piece);
  } else if (fits) {
    reinterpret_cast<Call*>(self)->answered = true;
    stream_of(self).reply(&piece, 1);
    stream_of(self).commit();
  }
  PyBuffer_Release(&view);
  return PyBool_FromLong(fits);
}

PyObject* call_let_in(PyObject* self, PyObject* remember) {
  reinterpret_cast<Call*>(self)->answered = true;  // its request, once that is whole, is another Call
  stream_of(self).let_in(PyObject_IsTrue(remember) == 1);
  Py_RETURN_NONE;
}

PyObject* call_consumed(PyObject* self, PyObject* bytes) {
  const size_t count = PyLong_AsSize_t(bytes);
  if (PyErr_Occurred()) return nullptr;
  stream_of(self).consumed(count);
  Py_RETURN_NONE;
}

PyObject* call_notify_writable(PyObject* self, PyObject*) { return PyBool_FromLong(stream_of(self).notify_writable()); }

PyObject* call_notify_items_done(PyObject* self, PyObject*) {
  return PyBool_FromLong(stream_of(self).notify_items_done());
}

PyObject* get_pending_bytes(PyObject* self, void*) { return PyLong_FromSize_t(stream_of(self).pending_bytes()); }
PyObject* get_replied(PyObject* self, void*) { return PyBool_FromLong(stream_of(self).replied); }
PyObject* get_gone(PyObject* self, void*) { return PyBool_FromLong(stream_of(self).gone()); }
PyObject* get_method(PyObject* self, void*) { return PyLong_FromLong(stream_of(self).method->number); }
PyObject* get_deadline_us(PyObject* self, void*) { return PyLong_FromLongLong(stream_of(self).deadline_us); }
PyObject* get_credential(PyObject* self, void*) { return text(stream_of(self).credential); }
PyObject* get_path(PyObject* self, void*) { return text(stream_of(self).path); }
PyObject* get_content_type(PyObject* self, void*) { return text(stream_of(self).content_type); }
PyObject* get_peer(PyObject* self, void*) { return text(stream_of(self).peer); }

PyMethodDef call_methods[] = {
    {"metadata", call_metadata, METH_NOARGS, "The caller's headers, pairs of str."},
    {"send_headers", call_send_headers, METH_O, "Sends initial metadata."},
    {"send_message", call_send_message, METH_VARARGS, "Sends one message: (bytes, compressed=False)."},
    {"reply", call_reply, METH_O, "Answers a unary call with success; False where the message would be too large."},
    {"send_status", call_send_status, METH_VARARGS, "Ends the call: (code, percent-encoded message, trailing metadata)."},
    {"respond", call_respond, METH_VARARGS,
     "Answers an HTTP call: (gRPC code, which gives the HTTP status, further headers, JSON body)."},
    {"let_in", call_let_in, METH_O, "Has the request of a caller who asked taken in; true: of its next ones unasked."},
    {"consumed", call_consumed, METH_O, "Says that so many bytes of the request stream have been used up."},
    {"notify_writable", call_notify_writable, METH_NOARGS,
     "True: a WRITABLE event comes when what was sent has left for the client. False: it has."},
    {"notify_items_done", call_notify_items_done, METH_NOARGS,
     "True: an ITEMS_DONE event comes when the last item on the short way has been answered. False: it has."},
    {nullptr, nullptr, 0, nullptr}};
PyGetSetDef call_getters[] = {{"pending_bytes", get_pending_bytes, nullptr, "Bytes sent that wait for the worker.", nullptr},
                              {"replied", get_replied, nullptr, "Whether an item was answered on the short way.", nullptr},
                              {"gone", get_gone, nullptr, "Whether the caller has gone.", nullptr},
                              {"method", get_method, nullptr, "The number the method was registered with.", nullptr},
                              {"deadline_us", get_deadline_us, nullptr, "Monotonic microseconds; -1 without one.", nullptr},
                              {"credential", get_credential, nullptr, "Who calls: keys and values, each with a NUL.", nullptr},
                              {"path", get_path, nullptr, "The path that was called.", nullptr},
                              {"content_type", get_content_type, nullptr, "That of an HTTP call's body.", nullptr},
                              {"peer", get_peer, nullptr, "The caller's address.", nullptr},
                              {nullptr, nullptr, nullptr, nullptr, nullptr}};
PyType_Slot call_slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(call_dealloc)},
                            {Py_tp_methods, call_methods},
                            {Py_tp_getset, call_getters},
                            {Py_tp_doc, const_cast<char*>("One gRPC call. Event loop only.")},
                            {0, nullptr}};
PyType_Spec call_spec = {"_forno_envoy.Call", sizeof(Call), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                         call_slots};
PyTypeObject* call_type = nullptr;

PyObject* serve(PyObject*, PyObject* args) {
  PyObject* paths;
  Py_ssize_t max_message_bytes, max_inbox_bytes, max_items;
  double max_message_s;
  PyObject* fail;
  if (!PyArg_ParseTuple(args, "O!nnndO", &PyList_Type, &paths, &max_message_bytes, &max_inbox_bytes, &max_items,
                        &max_message_s, &fail)) {
    return nullptr;
  }
  Methods* next = new Methods;  // never freed: streams keep looking at it
  next->max_message_bytes = static_cast<size_t>(max_message_bytes);
  next->max_inbox_bytes = static_cast<size_t>(max_inbox_bytes);
  next->max_items = static_cast<size_t>(max_items);
  next->max_message_us = static_cast<int64_t>(max_message_s * 1e6);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(paths); i++) {
    const char* path;
    int request_streaming, guarded;
    Layout layout;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(paths, i), "spp(IIIIIIII)", &path, &request_streaming, &guarded,
                          &layout.tensors, &layout.request_id, &layout.tensor_data, &layout.tensor_plain, &layout.answer_id,
                          &layout.item_request, &layout.item_id, &layout.item_answer)) {
      delete next;
      return nullptr;
    }
    next->by_path[path] = {static_cast<int>(i), request_streaming != 0, guarded != 0, layout};
  }
  set_fail_hook(fail);
  methods.store(next, std::memory_order_release);
  return PyLong_FromLong(inbox.fd());
}

PyObject* forget_callers(PyObject*, PyObject*) {
  callers().clear();
  Py_RETURN_NONE;
}

PyMethodDef module_methods[] = {
    {"serve", serve, METH_VARARGS,
     "Opens the doors: ([(path, request_streaming, guarded, layout)], max_message_bytes, max_inbox_bytes, max_items,\n"
     "max_message_s, fail) -> descriptor to watch. A layout has the numbers of split.h's Layout; all 0 where requests\n"
     "are not to be split. `fail` is called with a Reply and an error, or a size that is over the limit."},
    {"take", take, METH_NOARGS,
     "All events that wait: [(kind, Call, message or None, compressed)], but (HOT, method, key, [Reply]),\n"
     "(HTTP, Call, body, None or (key, counts, numbers)), and\n"
     "(CANCEL, method, None, False) of a call on the short way. `flush` is to be called when they have been handled."},
    {"forget_callers", forget_callers, METH_NOARGS, "Has every caller ask again."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "_forno_envoy", "The interpreter's side of Envoy.", -1, module_methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyObject* text(std::string_view s) { return PyUnicode_DecodeUTF8(s.data(), static_cast<Py_ssize_t>(s.size()), "replace"); }

Metadata status_metadata(int code, std::string_view message) {
  Metadata out;
  out.emplace_back("grpc-status", std::to_string(code));
  if (!message.empty()) out.emplace_back("grpc-message", message);
  return out;
}

bool append_metadata(PyObject* pairs, Metadata& out) {
  PyObject* sequence = PySequence_Fast(pairs, "metadata must be a sequence of pairs");
  if (!sequence) return false;
  bool good = true;
  for (Py_ssize_t i = 0; good && i < PySequence_Fast_GET_SIZE(sequence); i++) {
    const char *key, *value;
    Py_ssize_t key_size, value_size;
    good = PyArg_ParseTuple(PySequence_Fast_GET_ITEM(sequence, i), "s#s#", &key, &key_size, &value, &value_size);
    if (good) out.emplace_back(std::string(key, key_size), std::string(value, value_size));
  }
  Py_DECREF(sequence);
  return good;
}

bool parse_status(PyObject* args, Metadata& status) {
  int code;
  const char* message;
  Py_ssize_t message_size;
  PyObject* trailers;
  if (!PyArg_ParseTuple(args, "is#O", &code, &message, &message_size, &trailers)) return false;
  status = status_metadata(code, {message, static_cast<size_t>(message_size)});
  return append_metadata(trailers, status);
}

void send_status(Stream& stream, Metadata status) {
  drop_replies(stream);
  std::vector<Part> parts;
  parts.push_back({Part::kStatus, std::move(status), {}});
  stream.send(std::move(parts));
}

PyObject* call_of(const StreamPtr& stream, bool make) {
  if (stream->call) {
    if (make) static_cast<Call*>(stream->call)->answered = false;  // that of an Ask, which nobody has dropped yet
    return Py_NewRef(static_cast<PyObject*>(stream->call));
  }
  if (!make) return nullptr;
  Call* call = reinterpret_cast<Call*>(call_type->tp_alloc(call_type, 0));
  if (!call) return nullptr;
  call->stream = new StreamPtr(stream);
  call->answered = false;
  stream->call = call;
  return reinterpret_cast<PyObject*>(call);
}

PyObject* make_module() {
  PyObject* module = PyModule_Create(&module_def);
  call_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&call_spec));
  if (!module || !call_type || !make_reply_type(module)) return nullptr;
  const std::pair<const char*, EventKind> kinds[] = {
      {"CALL", EventKind::kCall},     {"MESSAGE", EventKind::kMessage},   {"HALF_CLOSE", EventKind::kHalfClose},
      {"CANCEL", EventKind::kCancel}, {"WRITABLE", EventKind::kWritable}, {"STOP", EventKind::kStop},
      {"ITEMS_DONE", EventKind::kItemsDone}, {"ASK", EventKind::kAsk}};
  for (const auto& [name, kind] : kinds) PyModule_AddIntConstant(module, name, static_cast<int>(kind));
  PyModule_AddIntConstant(module, "HOT", kHot);
  PyModule_AddIntConstant(module, "HTTP", kHttp);
  PyModule_AddObject(module, "Call", Py_NewRef(reinterpret_cast<PyObject*>(call_type)));
  return module;
}
