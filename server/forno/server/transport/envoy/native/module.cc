// Envoy with the Python interpreter inside: the hooks that Envoy calls, and `_forno_envoy`, the module that Python sees.
//
// Envoy's workers never take the interpreter's lock. They put events into the Inbox; Python's event loop, on a thread
// of its own, wakes once for all that wait (`take`), and hands answers back the same way (`reply`, Call.send_*), each
// as one task posted to the worker that owns the stream.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <future>
#include <thread>

#include "stream.h"

namespace {

// Alive until the process ends: threads may still look at them while it does.
Inbox& inbox = *new Inbox;
std::atomic<const Methods*> methods{nullptr};
std::string& application = *new std::string;  // "module:function\nargument"
std::promise<void>& finished = *new std::promise<void>;
std::future<void>& python_ended = *new std::future<void>(finished.get_future());
bool python_started = false;

struct Call {
  PyObject_HEAD
  StreamPtr* stream;
  bool answered;
};

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
  const Metadata& metadata = stream_of(self).metadata;
  PyObject* out = PyTuple_New(static_cast<Py_ssize_t>(metadata.size()));
  if (!out) return nullptr;
  for (size_t i = 0; i < metadata.size(); i++) {
    PyObject* pair = Py_BuildValue("(NN)", text(metadata[i].first), text(metadata[i].second));
    if (!pair) {
      Py_DECREF(out);
      return nullptr;
    }
    PyTuple_SET_ITEM(out, static_cast<Py_ssize_t>(i), pair);
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
PyObject* get_peer(PyObject* self, void*) { return text(stream_of(self).peer); }

PyMethodDef call_methods[] = {
    {"metadata", call_metadata, METH_NOARGS, "The caller's headers, pairs of str."},
    {"send_headers", call_send_headers, METH_O, "Sends initial metadata."},
    {"send_message", call_send_message, METH_VARARGS, "Sends one message: (bytes, compressed=False)."},
    {"send_status", call_send_status, METH_VARARGS, "Ends the call: (code, percent-encoded message, trailing metadata)."},
    {"consumed", call_consumed, METH_O, "Says that so many bytes of the request stream have been used up."},
    {"notify_writable", call_notify_writable, METH_NOARGS,
     "True: a WRITABLE event comes when what was sent has left for the client. False: it has."},
    {nullptr, nullptr, 0, nullptr}};
PyGetSetDef call_getters[] = {{"pending_bytes", get_pending_bytes, nullptr, "Bytes sent that wait for the worker.", nullptr},
                              {"gone", get_gone, nullptr, "Whether the caller has gone.", nullptr},
                              {"method", get_method, nullptr, "The number the method was registered with.", nullptr},
                              {"deadline_us", get_deadline_us, nullptr, "Monotonic microseconds; -1 without one.", nullptr},
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

PyObject* take(PyObject*, PyObject*) {
  const std::vector<Event> events = inbox.take();
  PyObject* out = PyList_New(0);
  if (!out) return nullptr;
  for (const Event& event : events) {
    const bool first = event.kind == EventKind::kCall;
    if (first && event.stream->gone()) continue;  // gave up before anybody looked: it never runs
    PyObject* call = event.stream ? call_of(event.stream, first) : Py_NewRef(Py_None);
    if (!call) {
      if (!PyErr_Occurred()) continue;
      Py_DECREF(out);
      return nullptr;
    }
    const std::string& bytes = event.message.bytes;
    // A unary request still has its prefix (it was not copied to cut it off); one of a stream has not.
    const size_t skip = first && !bytes.empty() ? 5 : 0;
    const bool has_message = event.kind == EventKind::kMessage || skip;
    PyObject* message =
        has_message ? PyBytes_FromStringAndSize(bytes.data() + skip, static_cast<Py_ssize_t>(bytes.size() - skip))
                    : Py_NewRef(Py_None);
    PyObject* item = message ? Py_BuildValue("(iNNi)", static_cast<int>(event.kind), call, message,
                                             static_cast<int>(event.message.compressed))
                             : nullptr;
    if (!item || PyList_Append(out, item) < 0) {
      Py_XDECREF(item);
      Py_DECREF(out);
      return nullptr;
    }
    Py_DECREF(item);
  }
  return out;
}

PyObject* reply(PyObject*, PyObject* list) {
  if (!PyList_Check(list)) return PyErr_Format(PyExc_TypeError, "reply takes a list of (Call, bytes)");
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) {
    PyObject* call;
    char* data;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(list, i), "O!y#", call_type, &call, &data, &size)) {
      PyErr_WriteUnraisable(list);  // the others must not suffer; this one is told when its Call goes
      continue;
    }
    reinterpret_cast<Call*>(call)->answered = true;
    stream_of(call).reply(data, static_cast<size_t>(size));
  }
  Py_RETURN_NONE;
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
    if (!PyArg_ParseTuple(PyList_GET_ITEM(paths, i), "sp", &path, &request_streaming)) {
      delete next;
      return nullptr;
    }
    next->by_path[path] = {static_cast<int>(i), request_streaming != 0};
  }
  methods.store(next, std::memory_order_release);
  return PyLong_FromLong(inbox.fd());
}

PyMethodDef module_methods[] = {
    {"serve", serve, METH_VARARGS,
     "Opens the doors: ([(path, request_streaming)], max_message_bytes, max_inbox_bytes) -> descriptor to watch."},
    {"take", take, METH_NOARGS, "All events that wait: [(kind, Call, message or None, compressed)]."},
    {"reply", reply, METH_O, "Answers unary calls with success: [(Call, bytes)]."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "_forno_envoy", "The interpreter's side of Envoy.", -1, module_methods,
                          nullptr, nullptr, nullptr, nullptr};

PyObject* make_module() {
  PyObject* module = PyModule_Create(&module_def);
  call_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&call_spec));
  if (!module || !call_type) return nullptr;
  const std::pair<const char*, EventKind> kinds[] = {
      {"CALL", EventKind::kCall},     {"MESSAGE", EventKind::kMessage},   {"HALF_CLOSE", EventKind::kHalfClose},
      {"CANCEL", EventKind::kCancel}, {"WRITABLE", EventKind::kWritable}, {"STOP", EventKind::kStop}};
  for (const auto& [name, kind] : kinds) PyModule_AddIntConstant(module, name, static_cast<int>(kind));
  PyModule_AddObject(module, "Call", Py_NewRef(reinterpret_cast<PyObject*>(call_type)));
  return module;
}

// The interpreter's thread: runs the application's event loop until it returns.
void run_python() {
  const PyGILState_STATE state = PyGILState_Ensure();
  const size_t colon = application.find(':'), end = application.find('\n');
  PyObject* module = PyImport_ImportModule(application.substr(0, colon).c_str());
  PyObject* result = module ? PyObject_CallMethod(module, application.substr(colon + 1, end - colon - 1).c_str(), "s",
                                                  application.substr(end + 1).c_str())
                            : nullptr;
  if (!result) {
    if (PyErr_ExceptionMatches(PyExc_SystemExit)) PyErr_Clear();  // printing it would end the process from this thread
    if (PyErr_Occurred()) PyErr_Print();
    kill(getpid(), SIGTERM);
  }
  Py_XDECREF(result);
  Py_XDECREF(module);
  PyGILState_Release(state);
  finished.set_value();
}

bool start_python() {
  PyImport_AppendInittab("_forno_envoy", make_module);
  PyConfig config;
  PyConfig_InitPythonConfig(&config);
  config.install_signal_handlers = 0;  // signals are Envoy's
  const char* executable = getenv("FORNO_PYTHON");
  PyStatus status = executable ? PyConfig_SetBytesString(&config, &config.program_name, executable) : PyStatus_Ok();
  if (!PyStatus_Exception(status)) status = Py_InitializeFromConfig(&config);
  PyConfig_Clear(&config);
  if (PyStatus_Exception(status)) {
    fprintf(stderr, "forno: Python did not start: %s\n", status.err_msg ? status.err_msg : "unknown reason");
    return false;
  }
  Py_XDECREF(PyImport_ImportModule("threading"));  // on the thread that initialised Python, or uvloop refuses the other
  PyEval_SaveThread();
  python_started = true;
  std::thread(run_python).detach();
  return true;
}

// A share of its own for the length of a hook: Envoy may destroy the filter while it sends what the hook gives it.
StreamPtr state_of(void* state) { return *static_cast<StreamPtr*>(state); }

}  // namespace

#define HOOK extern "C" __attribute__((visibility("default")))

HOOK const char* envoy_dynamic_module_on_program_init() { return "v0.2.0"; }

// Main thread. The configuration is "module:function\nargument"; empty where Envoy only validates its file.
HOOK void* envoy_dynamic_module_on_http_filter_config_new(void*, Buffer, Buffer config) {
  application.assign(config.data, config.size);
  if (!getenv("FORNO_VALIDATE") && !python_started && !start_python()) return nullptr;
  return &inbox;
}

// Main thread, at shutdown, when no worker runs any more. The application has been drained before by its supervisor;
// this lets its thread end, so that nothing of it runs while the process takes itself apart.
HOOK void envoy_dynamic_module_on_http_filter_config_destroy(void*) {
  if (!python_started) return;
  inbox.push({EventKind::kStop, nullptr, {}});
  python_ended.wait_for(std::chrono::seconds(10));
}

HOOK void* envoy_dynamic_module_on_http_filter_new(void*, void*) {
  return new StreamPtr(std::make_shared<Stream>(inbox));
}
HOOK void envoy_dynamic_module_on_http_filter_destroy(void* state) {
  state_of(state)->on_gone();
  delete static_cast<StreamPtr*>(state);
}
HOOK void envoy_dynamic_module_on_http_filter_stream_complete(void*, void* state) {
  if (state) state_of(state)->on_gone();
}

HOOK int envoy_dynamic_module_on_http_filter_request_headers(void* filter, void* state, bool end) {
  state_of(state)->on_headers(filter, methods.load(std::memory_order_acquire), end);
  return kStopHeaders;
}
HOOK int envoy_dynamic_module_on_http_filter_request_body(void* filter, void* state, bool end) {
  return state_of(state)->on_body(filter, end);
}
HOOK int envoy_dynamic_module_on_http_filter_request_trailers(void* filter, void* state) {
  state_of(state)->on_trailers(filter);
  return kStopHeaders;
}
HOOK void envoy_dynamic_module_on_http_filter_scheduled(void* filter, void* state, uint64_t) {
  state_of(state)->on_scheduled(filter);
}
HOOK void envoy_dynamic_module_on_http_filter_downstream_above_write_buffer_high_watermark(void*, void* state) {
  if (state) state_of(state)->on_watermark(true);  // null once destroyed, which Envoy does not look at here
}
HOOK void envoy_dynamic_module_on_http_filter_downstream_below_write_buffer_low_watermark(void*, void* state) {
  if (state) state_of(state)->on_watermark(false);
}

HOOK int envoy_dynamic_module_on_http_filter_response_headers(void*, void*, bool) { return 0; }
HOOK int envoy_dynamic_module_on_http_filter_response_body(void*, void*, bool) { return 0; }
HOOK int envoy_dynamic_module_on_http_filter_response_trailers(void*, void*) { return 0; }
HOOK int envoy_dynamic_module_on_http_filter_local_reply(void*, void*, uint32_t, Buffer, bool) { return 0; }
HOOK void* envoy_dynamic_module_on_http_filter_per_route_config_new(Buffer, Buffer) { return &inbox; }
HOOK void envoy_dynamic_module_on_http_filter_per_route_config_destroy(void*) {}

// Envoy looks every hook up when it loads the module; these serve features that Forno does not use.
#define UNUSED(name) \
  HOOK void envoy_dynamic_module_on_http_filter_##name() {}
UNUSED(http_callout_done)
UNUSED(http_stream_headers)
UNUSED(http_stream_data)
UNUSED(http_stream_trailers)
UNUSED(http_stream_complete)
UNUSED(http_stream_reset)
UNUSED(config_scheduled)
UNUSED(config_http_callout_done)
UNUSED(config_http_stream_headers)
UNUSED(config_http_stream_data)
UNUSED(config_http_stream_trailers)
UNUSED(config_http_stream_complete)
UNUSED(config_http_stream_reset)
