// What Python is told of HTTP calls.
#include "interpreter.h"

namespace {

Py_ssize_t size_of(size_t size) { return static_cast<Py_ssize_t>(size); }

// Key, counts and numbers of a split body. New reference.
PyObject* split_of(JsonSplitter& json) {
  PyObject* counts = PyTuple_New(size_of(json.counts().size()));
  for (size_t i = 0; counts && i < json.counts().size(); i++) {
    PyTuple_SET_ITEM(counts, size_of(i), PyLong_FromUnsignedLongLong(json.counts()[i]));
  }
  if (!counts) return nullptr;
  return Py_BuildValue("(y#Ny#)", json.key().data(), size_of(json.key().size()), counts,
                       reinterpret_cast<const char*>(json.numbers().data()),
                       size_of(json.numbers().size() * sizeof(double)));
}

}  // namespace

PyObject* http_event(int kind, PyObject* call, const Message& message) {
  PyObject* json = message.json ? split_of(*message.json) : Py_NewRef(Py_None);
  if (!json) {
    Py_DECREF(call);
    return nullptr;
  }
  const std::string_view body = message.view();
  return Py_BuildValue("(iNy#N)", kind, call, body.data(), size_of(body.size()), json);
}
