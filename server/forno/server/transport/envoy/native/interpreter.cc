// `_forno_envoy`, the module that Python sees: events out (`take`), answers in (Call.reply, Call.send_*).
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

// A tuple of new references; null, and all of them dropped, if one is null.
template <typename... Items>
PyObject* pack(Items... items) {
  PyObject* all[] = {items...};
  PyObject* out = PyTuple_New(sizeof...(items));
  bool good = out != nullptr;
  for (PyObject* item : all) good = good && item;
  for (size_t i = 0; i < sizeof...(items); i++) {
    if (good) {
      PyTuple_SET_ITEM(out, static_cast<Py_ssize_t>(i), all[i]);
    } else {
      Py_XDECREF(all[i]);
    }
  }
  if (!good) Py_CLEAR(out);
  return out;
}

Stream& stream_of(PyObject* self) { return **reinterpret_cast<Call*>(self)->stream; }

Metadata status_metadata(int code, std::string_view message) {
  Metadata out;
  out.emplace_back("grpc-status", std::to_string(code));
  if (!message.empty()) out.emplace_back("grpc-message", message);
  return out;
}

void call_dealloc(PyObject* self) {
  Call* call = reinterpret_cast<Call*>(self);
  (*call->stream)->call = nullptr;
  if (!call->answered) {  // no caller is ever left waiting, whatever becomes of its handler
    (*call->stream)->send({{Part::kStatus, status_metadata(13, "the handler ended without an answer"), {}}});
  }
  delete call->stream;
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* text(std::string_view s) { return PyUnicode_DecodeUTF8(s.data(), static_cast<Py_ssize_t>(s.size()), "replace"); }

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

// Appends a sequence of (str, str) to metadata.
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
  int code;
  const char* message;
  Py_ssize_t message_size;
  PyObject* trailers;
  if (!PyArg_ParseTuple(args, "is#O", &code, &message, &message_size, &trailers)) return nullptr;
  Part part{Part::kStatus, status_metadata(code, {message, static_cast<size_t>(message_size)}), {}};
  if (!append_metadata(trailers, part.metadata)) return nullptr;
  reinterpret_cast<Call*>(self)->answered = true;
  std::vector<Part> parts;
  parts.push_back(std::move(part));
  stream_of(self).send(std::move(parts));
  Py_RETURN_NONE;
}

// Frames the parts of one message and sends them as the whole answer of a successful unary call. The parts are copied
// here and not looked at afterwards. False, and nothing sent, where together they are larger than a message may be.
PyObject* call_reply(PyObject* self, PyObject* parts) {
  PyObject* sequence = PySequence_Fast(parts, "reply takes a sequence of buffers");
  if (!sequence) return nullptr;
  const size_t limit = methods.load(std::memory_order_acquire)->max_message_bytes;
  std::string framed(kPrefixBytes, '\0');
  bool good = true;
  for (Py_ssize_t i = 0; good && i < PySequence_Fast_GET_SIZE(sequence); i++) {
    Py_buffer view;
    good = PyObject_GetBuffer(PySequence_Fast_GET_ITEM(sequence, i), &view, PyBUF_C_CONTIGUOUS) == 0;
    if (!good) break;
    framed.append(static_cast<const char*>(view.buf), static_cast<size_t>(view.len));
    PyBuffer_Release(&view);
  }
  Py_DECREF(sequence);
  if (!good) return nullptr;
  if (framed.size() - kPrefixBytes > limit) Py_RETURN_FALSE;
  set_prefix(framed, false);
  reinterpret_cast<Call*>(self)->answered = true;
  stream_of(self).reply(std::move(framed));
  Py_RETURN_TRUE;
}

PyObject* call_consumed(PyObject* self, PyObject* bytes) {
  const size_t count = PyLong_AsSize_t(bytes);
  if (PyErr_Occurred()) return nullptr;
  stream_of(self).consumed(count);
  Py_RETURN_NONE;
}

PyObject* call_notify_writable(PyObject* self, PyObject*) { return PyBool_FromLong(stream_of(self).notify_writable()); }

PyObject* get_pending_bytes(PyObject* self, void*) { return PyLong_FromSize_t(stream_of(self).pending_bytes()); }
PyObject* get_gone(PyObject* self, void*) { return PyBool_FromLong(stream_of(self).gone()); }
PyObject* get_method(PyObject* self, void*) { return PyLong_FromLong(stream_of(self).method); }
PyObject* get_deadline_us(PyObject* self, void*) { return PyLong_FromLongLong(stream_of(self).deadline_us); }
PyObject* get_credential(PyObject* self, void*) { return text(stream_of(self).credential); }
PyObject* get_peer(PyObject* self, void*) { return text(stream_of(self).peer); }

PyMethodDef call_methods[] = {
    {"metadata", call_metadata, METH_NOARGS, "The caller's headers, pairs of str."},
    {"send_headers", call_send_headers, METH_O, "Sends initial metadata."},
    {"send_message", call_send_message, METH_VARARGS, "Sends one message: (bytes, compressed=False)."},
    {"reply", call_reply, METH_O, "Answers a unary call with success; False where the message would be too large."},
    {"send_status", call_send_status, METH_VARARGS, "Ends the call: (code, percent-encoded message, trailing metadata)."},
    {"consumed", call_consumed, METH_O, "Says that so many bytes of the request stream have been used up."},
    {"notify_writable", call_notify_writable, METH_NOARGS,
     "True: a WRITABLE event comes when what was sent has left for the client. False: it has."},
    {nullptr, nullptr, 0, nullptr}};
PyGetSetDef call_getters[] = {{"pending_bytes", get_pending_bytes, nullptr, "Bytes sent that wait for the worker.", nullptr},
                              {"gone", get_gone, nullptr, "Whether the caller has gone.", nullptr},
                              {"method", get_method, nullptr, "The number the method was registered with.", nullptr},
                              {"deadline_us", get_deadline_us, nullptr, "Monotonic microseconds; -1 without one.", nullptr},
                              {"credential", get_credential, nullptr, "Who calls: keys and values, each with a NUL.", nullptr},
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

// The stream's Call; made for its first event. New reference, or null with no error if the loop has dropped it.
PyObject* call_of(const StreamPtr& stream, bool make) {
  if (stream->call) return Py_NewRef(static_cast<PyObject*>(stream->call));
  if (!make) return nullptr;
  Call* call = reinterpret_cast<Call*>(call_type->tp_alloc(call_type, 0));
  if (!call) return nullptr;
  call->stream = new StreamPtr(stream);
  call->answered = false;
  stream->call = call;
  return reinterpret_cast<PyObject*>(call);
}

// A split request's bytes: read-only, moved here rather than copied, and kept by whatever array looks at them.
struct RequestBytes {
  PyObject_HEAD
  std::string* bytes;
};

int request_bytes_get(PyObject* self, Py_buffer* view, int flags) {
  std::string& bytes = *reinterpret_cast<RequestBytes*>(self)->bytes;
  return PyBuffer_FillInfo(view, self, bytes.data() + kPrefixBytes, static_cast<Py_ssize_t>(bytes.size() - kPrefixBytes),
                           1, flags);
}

void request_bytes_dealloc(PyObject* self) {
  delete reinterpret_cast<RequestBytes*>(self)->bytes;
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyType_Slot request_bytes_slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(request_bytes_dealloc)},
                                     {Py_bf_getbuffer, reinterpret_cast<void*>(request_bytes_get)},
                                     {Py_tp_doc, const_cast<char*>("A serialized request, as a read-only buffer.")},
                                     {0, nullptr}};
PyType_Spec request_bytes_spec = {"_forno_envoy.RequestBytes", sizeof(RequestBytes), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, request_bytes_slots};
PyTypeObject* request_bytes_type = nullptr;

PyObject* bytes_of(const char* data, size_t size) {
  return PyBytes_FromStringAndSize(data, static_cast<Py_ssize_t>(size));
}

// (key, spans, request id) of a split request.
PyObject* split_of(const Message& message) {
  const Split& split = message.split;
  PyObject* spans = PyTuple_New(static_cast<Py_ssize_t>(split.spans.size()));
  for (size_t i = 0; spans && i < split.spans.size(); i++) {
    PyTuple_SET_ITEM(spans, static_cast<Py_ssize_t>(i), PyLong_FromUnsignedLongLong(split.spans[i]));
  }
  PyObject* key = bytes_of(split.key.data(), split.key.size());
  PyObject* id = bytes_of(message.bytes.data() + kPrefixBytes + split.id_at, split.id_size);
  return pack(key, spans, id);
}

PyObject* message_of(Event& event) {
  std::string& bytes = event.message.bytes;
  if (!event.message.split.key.empty()) {
    RequestBytes* out = reinterpret_cast<RequestBytes*>(request_bytes_type->tp_alloc(request_bytes_type, 0));
    if (out) out->bytes = new std::string(std::move(bytes));
    return reinterpret_cast<PyObject*>(out);
  }
  if (event.kind == EventKind::kMessage) return bytes_of(bytes.data(), bytes.size());
  if (event.kind != EventKind::kCall || bytes.empty()) return Py_NewRef(Py_None);
  return bytes_of(bytes.data() + kPrefixBytes, bytes.size() - kPrefixBytes);
}

// One event as a tuple; None where there is nobody left to tell.
PyObject* tuple_of(Event& event) {
  const bool first = event.kind == EventKind::kCall;
  if (first && event.stream->gone()) return Py_NewRef(Py_None);  // gave up before anybody looked: it never runs
  PyObject* call = event.stream ? call_of(event.stream, first) : Py_NewRef(Py_None);
  if (!call) return PyErr_Occurred() ? nullptr : Py_NewRef(Py_None);
  PyObject* split = event.message.split.key.empty() ? Py_NewRef(Py_None) : split_of(event.message);
  PyObject* message = message_of(event);
  return pack(PyLong_FromLong(static_cast<long>(event.kind)), call, message, PyBool_FromLong(event.message.compressed),
              split);
}

PyObject* take(PyObject*, PyObject*) {
  std::vector<Event> events = inbox.take();
  PyObject* out = PyList_New(0);
  for (size_t i = 0; out && i < events.size(); i++) {
    PyObject* item = tuple_of(events[i]);
    if (!item || (item != Py_None && PyList_Append(out, item) < 0)) Py_CLEAR(out);
    Py_XDECREF(item);
  }
  return out;
}

PyObject* serve(PyObject*, PyObject* args) {
  PyObject* paths;
  Py_ssize_t max_message_bytes, max_inbox_bytes;
  if (!PyArg_ParseTuple(args, "O!nn", &PyList_Type, &paths, &max_message_bytes, &max_inbox_bytes)) return nullptr;
  Methods* next = new Methods;  // never freed: streams keep looking at it
  next->max_message_bytes = static_cast<size_t>(max_message_bytes);
  next->max_inbox_bytes = static_cast<size_t>(max_inbox_bytes);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(paths); i++) {
    const char* path;
    int request_streaming;
    Layout layout;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(paths, i), "sp(IIII)", &path, &request_streaming, &layout.tensors,
                          &layout.request_id, &layout.tensor_data, &layout.tensor_plain)) {
      delete next;
      return nullptr;
    }
    next->by_path[path] = {static_cast<int>(i), request_streaming != 0, layout};
  }
  methods.store(next, std::memory_order_release);
  return PyLong_FromLong(inbox.fd());
}

PyMethodDef module_methods[] = {
    {"serve", serve, METH_VARARGS,
     "Opens the doors: ([(path, request_streaming, layout)], max_message_bytes, max_inbox_bytes) -> descriptor to\n"
     "watch. A layout has the four numbers of split.h's Layout; all 0 where requests are not to be split."},
    {"take", take, METH_NOARGS,
     "All events that wait: [(kind, Call, message or None, compressed, (key, spans, request id) or None)]."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "_forno_envoy", "The interpreter's side of Envoy.", -1, module_methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyObject* make_module() {
  PyObject* module = PyModule_Create(&module_def);
  call_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&call_spec));
  request_bytes_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&request_bytes_spec));
  if (!module || !call_type || !request_bytes_type) return nullptr;
  const std::pair<const char*, EventKind> kinds[] = {
      {"CALL", EventKind::kCall},     {"MESSAGE", EventKind::kMessage},   {"HALF_CLOSE", EventKind::kHalfClose},
      {"CANCEL", EventKind::kCancel}, {"WRITABLE", EventKind::kWritable}, {"STOP", EventKind::kStop}};
  for (const auto& [name, kind] : kinds) PyModule_AddIntConstant(module, name, static_cast<int>(kind));
  PyModule_AddObject(module, "Call", Py_NewRef(reinterpret_cast<PyObject*>(call_type)));
  return module;
}
