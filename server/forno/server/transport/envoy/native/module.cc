// Envoy with the Python interpreter inside: the hooks that Envoy calls.
//
// Envoy's workers never take the interpreter's lock. They put events into the Inbox; Python's event loop, on a thread
// of its own, wakes once for all that wait, and hands each answer back as a task posted to the worker that owns the
// stream.
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <chrono>
#include <future>
#include <string>
#include <thread>

#include "interpreter.h"

namespace {

std::string& application = *new std::string;  // "module:function\nargument"
constexpr Door kDoors[] = {Door::kPublic, Door::kAdmin, Door::kInner};
std::promise<void>& finished = *new std::promise<void>;
std::future<void>& python_ended = *new std::future<void>(finished.get_future());
bool python_started = false;

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

// Main thread, once for each listener. The configuration is "door\nmodule:function\nargument".
HOOK const void* envoy_dynamic_module_on_http_filter_config_new(void*, Buffer, Buffer config) {
  const std::string_view text(config.data, config.size);
  const size_t door_end = text.find('\n');
  if (!getenv("FORNO_VALIDATE") && !python_started) {
    application.assign(text.substr(door_end + 1));
    if (!start_python()) return nullptr;
  }
  const std::string_view door = text.substr(0, door_end);
  return &kDoors[door == "inner" ? 2 : door == "admin" ? 1 : 0];
}

// Main thread, at shutdown, when no worker runs any more. The application has been drained before by its supervisor;
// this lets its thread end, so that nothing of it runs while the process takes itself apart.
HOOK void envoy_dynamic_module_on_http_filter_config_destroy(const void*) {
  if (!python_started) return;
  inbox.push({EventKind::kStop, nullptr, {}});
  python_ended.wait_for(std::chrono::seconds(10));
}

HOOK void* envoy_dynamic_module_on_http_filter_new(const void* door, void*) {
  return new StreamPtr(std::make_shared<Stream>(inbox, *static_cast<const Door*>(door)));
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
// Of a route that leaves the transcoder out: the name of the method that takes its calls as they come.
HOOK void* envoy_dynamic_module_on_http_filter_per_route_config_new(Buffer, Buffer config) {
  return new std::string(config.data, config.size);
}
HOOK void envoy_dynamic_module_on_http_filter_per_route_config_destroy(void* config) {
  delete static_cast<std::string*>(config);
}

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
