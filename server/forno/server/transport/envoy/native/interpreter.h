// What the two halves of the module share: Envoy's hooks (module.cc) and the Python module (interpreter.cc).
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
