// libnvidia-ml.so.1 without a GPU: one at 0000:65:00.0, with the calls that we make of NVML.
//
// It is what the real nvidia-ml-py is tested through. FAKE_NVML chooses what goes wrong: "driver", "utilization", "memory".
#include <cstdlib>
#include <cstring>

namespace {

enum { kSuccess = 0, kUninitialized = 1, kNotSupported = 3, kNotFound = 6, kDriverNotLoaded = 9, kGpuIsLost = 15 };

int started = 0, gpu = 0;

bool chosen(const char* what) {
  const char* given = std::getenv("FAKE_NVML");
  return given != nullptr && std::strcmp(given, what) == 0;
}

struct Memory {
  unsigned long long total, free, used;
};

struct Utilization {
  unsigned gpu, memory;
};

}  // namespace

#define CALL extern "C" __attribute__((visibility("default"))) int

CALL nvmlInitWithFlags(unsigned) { return chosen("driver") ? kDriverNotLoaded : (++started, kSuccess); }
CALL nvmlInit_v2() { return nvmlInitWithFlags(0); }
CALL nvmlShutdown() { return started > 0 ? (--started, kSuccess) : kUninitialized; }
CALL nvmlDeviceGetHandleByPciBusId_v2(const char* bus_id, void** handle) {
  if (started == 0) return kUninitialized;
  return std::strcmp(bus_id, "0000:65:00.0") == 0 ? (*handle = &gpu, kSuccess) : kNotFound;
}
CALL nvmlDeviceGetMemoryInfo(void* handle, Memory* out) {
  if (started == 0 || handle != &gpu) return kUninitialized;
  return chosen("memory") ? kGpuIsLost : (*out = {150'000'000'000, 149'000'000'000, 1'000'000'000}, kSuccess);
}
CALL nvmlDeviceGetUtilizationRates(void* handle, Utilization* out) {
  if (started == 0 || handle != &gpu) return kUninitialized;
  return chosen("utilization") ? kNotSupported : (*out = {37, 12}, kSuccess);
}
extern "C" __attribute__((visibility("default"))) const char* nvmlErrorString(int) { return "as it was told"; }
