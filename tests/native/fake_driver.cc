// libcuda.so.1 without a GPU: the calls that our adapters make, on the CPU, with our kernels built in.
//
// It is what the real cuda-bindings and the real PyCUDA are tested through: that they are called with the right
// arguments in the right order. Work is done at once, but for what a capture keeps. What is wrong is refused, as the
// driver does: handles of another kind or given back, memory outside of any allocation, calls without a context.
#include "forno.cu"

#include <dlfcn.h>

#include <cstdlib>
#include <functional>
#include <map>
#include <set>
#include <string>

namespace {

enum { kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kInvalidDevice = 101, kInvalidContext = 201, kInvalidHandle = 400,
       kNotFound = 500 };

constexpr std::size_t kCapacityBytes = std::size_t{1} << 30;

struct Capture {
  std::vector<std::function<void()>> work;
};

struct State {
  std::mutex mutex;
  bool started = false;
  int retained = 0;
  std::size_t used_bytes = 0;
  std::map<char*, std::size_t> device, pinned;
  std::set<void*> streams, events, modules, functions;
  std::map<void*, Capture> captures;  // by stream
  std::set<Capture*> graphs, executables;
  std::uintptr_t next = 0x1000;
} state;

thread_local void* current = nullptr;
thread_local std::vector<void*> below;  // of contexts that were pushed
char context, modules_image;

void* handle(std::set<void*>& of) {
  void* made = reinterpret_cast<void*>(state.next += 0x10);
  of.insert(made);
  return made;
}

bool within(const std::map<char*, std::size_t>& rooms, const void* pointer, std::size_t bytes) {
  const char* at = static_cast<const char*>(pointer);
  for (const auto& [start, size] : rooms) {
    if (at >= start && at + bytes <= start + size) return true;
  }
  return false;
}

int put(void* stream, std::function<void()> work) {
  if (!state.streams.count(stream)) return kInvalidHandle;
  if (const auto found = state.captures.find(stream); found != state.captures.end()) {
    found->second.work.push_back(std::move(work));
  } else {
    work();
  }
  return kSuccess;
}

}  // namespace

#define CALL extern "C" int
#define NEEDS_CONTEXT                                            \
  const std::lock_guard<std::mutex> lock(state.mutex);           \
  if (!state.started || current != &context) return kInvalidContext;

CALL cuInit(unsigned flags) {
  state.started = true;
  return flags == 0 ? kSuccess : kInvalidValue;
}
CALL cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
CALL cuDeviceGetCount(int* count) { return *count = 1, kSuccess; }
CALL cuDeviceGet(int* device, int ordinal) { return *device = 0, ordinal == 0 ? kSuccess : kInvalidDevice; }
CALL cuDeviceGetAttribute(int* value, int attribute, int) {
  const std::map<int, int> known = {{16, 132}, {75, 9}, {76, 0}};  // multiprocessors, and the compute capability
  return known.count(attribute) ? (*value = known.at(attribute), kSuccess) : kInvalidValue;
}
CALL cuDeviceGetPCIBusId(char* out, int size, int) {
  return std::strncpy(out, "0000:65:00.0", size), size > 12 ? kSuccess : kInvalidValue;
}
CALL cuDeviceGetName(char* name, int bytes, int) { return std::strncpy(name, "Fake H200", bytes), kSuccess; }
CALL cuDeviceComputeCapability(int* major, int* minor, int) { return *major = 9, *minor = 0, kSuccess; }
CALL cuDevicePrimaryCtxRetain(void** out, int) { return *out = &context, ++state.retained, kSuccess; }
CALL cuDevicePrimaryCtxRelease_v2(int) { return --state.retained < 0 ? kInvalidContext : kSuccess; }
CALL cuCtxSetCurrent(void* given) {
  if (given != nullptr && given != &context) return kInvalidContext;
  return current = given, kSuccess;
}
CALL cuCtxGetCurrent(void** out) { return *out = current, kSuccess; }
CALL cuCtxPushCurrent_v2(void* given) {
  if (given != &context) return kInvalidContext;
  return below.push_back(current), current = given, kSuccess;
}
CALL cuCtxPopCurrent_v2(void** out) {
  if (below.empty()) return kInvalidContext;
  return *out = current, current = below.back(), below.pop_back(), kSuccess;
}
CALL cuCtxGetDevice(int* device) { return *device = 0, current ? kSuccess : kInvalidContext; }
CALL cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  NEEDS_CONTEXT
  return *free = kCapacityBytes - state.used_bytes, *total = kCapacityBytes, kSuccess;
}
CALL cuMemAlloc_v2(char** out, std::size_t bytes) {
  NEEDS_CONTEXT
  if (bytes == 0) return kInvalidValue;
  if (bytes > kCapacityBytes - state.used_bytes) return kOutOfMemory;
  *out = static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  std::memset(*out, 0xA5, bytes);
  state.used_bytes += state.device[*out] = bytes;
  return kSuccess;
}
CALL cuMemFree_v2(char* pointer) {
  NEEDS_CONTEXT
  const auto found = state.device.find(pointer);
  if (found == state.device.end()) return kInvalidValue;
  state.used_bytes -= found->second;
  std::free(pointer);
  state.device.erase(found);
  return kSuccess;
}
CALL cuMemHostAlloc(char** out, std::size_t bytes, unsigned flags) {
  NEEDS_CONTEXT
  if (flags != 1) return kInvalidValue;  // portable
  *out = static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
  state.pinned[*out] = bytes;
  return kSuccess;
}
CALL cuMemFreeHost(char* pointer) {
  NEEDS_CONTEXT
  if (!state.pinned.erase(pointer)) return kInvalidValue;
  return std::free(pointer), kSuccess;
}
CALL cuStreamCreate(void** out, unsigned flags) {
  NEEDS_CONTEXT
  return *out = handle(state.streams), flags == 1 ? kSuccess : kInvalidValue;  // non-blocking
}
CALL cuStreamDestroy_v2(void* stream) {
  NEEDS_CONTEXT
  return state.streams.erase(stream) ? kSuccess : kInvalidHandle;
}
CALL cuStreamSynchronize(void* stream) {
  NEEDS_CONTEXT
  return state.streams.count(stream) ? kSuccess : kInvalidHandle;
}
CALL cuEventCreate(void** out, unsigned flags) {
  NEEDS_CONTEXT
  return *out = handle(state.events), (flags & ~1u) == 2 ? kSuccess : kInvalidValue;  // without timing
}
CALL cuEventDestroy_v2(void* event) {
  NEEDS_CONTEXT
  return state.events.erase(event) ? kSuccess : kInvalidHandle;
}
CALL cuEventRecord(void* event, void* stream) {
  NEEDS_CONTEXT
  return state.events.count(event) && state.streams.count(stream) ? kSuccess : kInvalidHandle;
}
CALL cuStreamWaitEvent(void* stream, void* event, unsigned flags) {
  NEEDS_CONTEXT
  return flags == 0 && state.events.count(event) && state.streams.count(stream) ? kSuccess : kInvalidHandle;
}
CALL cuEventSynchronize(void* event) {
  NEEDS_CONTEXT
  return state.events.count(event) ? kSuccess : kInvalidHandle;
}
CALL cuMemcpyHtoDAsync_v2(char* to, const char* from, std::size_t bytes, void* stream) {
  NEEDS_CONTEXT
  if (!within(state.device, to, bytes) || !within(state.pinned, from, bytes)) return kInvalidValue;
  return put(stream, [=] { std::memcpy(to, from, bytes); });
}
CALL cuMemcpyDtoHAsync_v2(char* to, const char* from, std::size_t bytes, void* stream) {
  NEEDS_CONTEXT
  if (!within(state.pinned, to, bytes) || !within(state.device, from, bytes)) return kInvalidValue;
  return put(stream, [=] { std::memcpy(to, from, bytes); });
}
CALL cuMemsetD8Async(char* to, unsigned char value, std::size_t bytes, void* stream) {
  NEEDS_CONTEXT
  if (!within(state.device, to, bytes)) return kInvalidValue;
  return put(stream, [=] { std::memset(to, value, bytes); });
}
CALL cuModuleLoadDataEx(void** out, const char* image, unsigned, int*, void**) {
  NEEDS_CONTEXT
  const bool is_cubin = std::memcmp(image, "\x7f" "ELF", 4) == 0, is_fatbin = std::memcmp(image, "\x50\xed\x55\xba", 4) == 0;
  if (!is_cubin && !is_fatbin) return 200;  // invalid image
  return *out = handle(state.modules), kSuccess;
}
CALL cuModuleLoadData(void** out, const char* image) { return cuModuleLoadDataEx(out, image, 0, nullptr, nullptr); }
CALL cuModuleUnload(void* module) {
  NEEDS_CONTEXT
  return state.modules.erase(module) ? kSuccess : kInvalidHandle;
}
CALL cuModuleGetFunction(void** out, void* module, const char* name) {
  NEEDS_CONTEXT
  if (!state.modules.count(module)) return kInvalidHandle;
  Dl_info own;
  dladdr(&modules_image, &own);
  *out = dlsym(dlopen(own.dli_fname, RTLD_NOW | RTLD_NOLOAD), (std::string("on_cpu_") + name).c_str());
  return *out != nullptr ? state.functions.insert(*out), kSuccess : kNotFound;
}
CALL cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                    unsigned shared, void* stream, void** parameters, void** extra) {
  NEEDS_CONTEXT
  if (!state.functions.count(function)) return kInvalidHandle;
  if (parameters != nullptr || shared != 0 || gx * gy * gz == 0) return kInvalidValue;
  const auto kind = [&](int index) { return reinterpret_cast<std::uintptr_t>(extra[index]); };
  if (kind(0) != 1 || kind(2) != 2 || kind(4) != 0) return kInvalidValue;
  using Bind = cpu::Bound* (*)(const char*, std::size_t);
  const std::shared_ptr<cpu::Bound> bound(
      reinterpret_cast<Bind>(function)(static_cast<char*>(extra[1]), *static_cast<std::size_t*>(extra[3])));
  if (bound == nullptr) return kInvalidValue;
  return put(stream, [=] {
    const unsigned shape[] = {gx, gy, gz, bx, by, bz};
    if (on_cpu_run(bound.get(), shape) != 0) std::abort();
  });
}
CALL cuStreamBeginCapture_v2(void* stream, int mode) {
  NEEDS_CONTEXT
  if (!state.streams.count(stream) || mode != 1) return kInvalidValue;  // of this thread
  return state.captures.emplace(stream, Capture()).second ? kSuccess : kInvalidValue;
}
CALL cuStreamEndCapture(void* stream, Capture** out) {
  NEEDS_CONTEXT
  const auto found = state.captures.find(stream);
  if (found == state.captures.end()) return kInvalidValue;
  state.graphs.insert(*out = new Capture(std::move(found->second)));
  state.captures.erase(found);
  return kSuccess;
}
CALL cuGraphInstantiateWithFlags(Capture** out, Capture* graph, unsigned long long flags) {
  NEEDS_CONTEXT
  if (!state.graphs.count(graph) || flags != 0) return kInvalidValue;
  return state.executables.insert(*out = new Capture(*graph)), kSuccess;
}
CALL cuGraphDestroy(Capture* graph) {
  NEEDS_CONTEXT
  if (!state.graphs.erase(graph)) return kInvalidHandle;
  return delete graph, kSuccess;
}
CALL cuGraphLaunch(Capture* graph, void* stream) {
  NEEDS_CONTEXT
  if (!state.executables.count(graph)) return kInvalidHandle;
  return put(stream, [=] { for (const auto& work : graph->work) work(); });
}
CALL cuGraphExecDestroy(Capture* graph) {
  NEEDS_CONTEXT
  if (!state.executables.erase(graph)) return kInvalidHandle;
  return delete graph, kSuccess;
}
CALL cuStreamIsCapturing(void* stream, int* status) {
  NEEDS_CONTEXT
  return *status = state.captures.count(stream) != 0, state.streams.count(stream) ? kSuccess : kInvalidHandle;
}
CALL cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
  NEEDS_CONTEXT
  return put(stream, [=] { function(data); });
}
CALL cuGetErrorString(int status, const char** text) { return *text = status ? "as the fake driver says" : "no error", kSuccess; }
CALL cuGetErrorName(int, const char** text) { return *text = "CUDA_ERROR", kSuccess; }

// cuda-bindings asks for every call by name, and takes the newest version.
CALL cuGetProcAddress_v2(const char* name, void** out, int, std::uint64_t, int* found) {
  Dl_info own;
  dladdr(&modules_image, &own);
  void* library = dlopen(own.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  *out = nullptr;
  for (const char* version : {"_v2", "", "WithFlags"}) {
    if (*out == nullptr) *out = dlsym(library, (std::string(name) + version).c_str());
  }
  if (found != nullptr) *found = *out == nullptr;
  return *out != nullptr ? kSuccess : kNotFound;
}
CALL cuGetProcAddress(const char* name, void** out, int version, std::uint64_t flags) {
  return cuGetProcAddress_v2(name, out, version, flags, nullptr);
}
