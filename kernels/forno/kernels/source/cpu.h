// What a kernel finds on a GPU, on the CPU: so that the source that ships is the source that is tested.
//
// Blocks run one after another. Each thread of a block that has to wait for others is a fiber of its own; threads that
// never wait share one. `__shared__` is static storage, and `__syncthreads` and the shuffles change fibers. That makes a
// run deterministic. Under ThreadSanitizer each thread is a fiber that it knows of, and only barriers order those of a
// block, so it finds the races between them. Races between blocks it cannot see.
#pragma once

#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#define FORNO_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define FORNO_TSAN 1
#endif
#endif

#ifdef FORNO_TSAN
#include <sanitizer/tsan_interface.h>
#define FORNO_UNSEEN __attribute__((no_sanitize("thread"), noinline))  // our own bookkeeping is no kernel's
#else
#define FORNO_UNSEEN
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static

struct uint3 {
  unsigned x, y, z;
};

inline uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace cpu {

constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024;
constexpr std::size_t kStackBytes = 64 * 1024;

constexpr unsigned kOrdered = 0, kUnordered = 1;  // for ThreadSanitizer: whether a change of fibers orders them

enum Outcome { kDone = 0, kBadShape = 1, kStuck = 2 };

// A kernel and the values of its parameters.
struct Bound {
  virtual ~Bound() = default;
  virtual void call() const = 0;
};

// Takes the next parameter, where a structure of all of them would have it.
template <class Value>
Value taken(const char* arguments, std::size_t& at) {
  at = (at + alignof(Value) - 1) / alignof(Value) * alignof(Value);
  Value value;
  std::memcpy(&value, arguments + at, sizeof value);
  at += sizeof value;
  return value;
}

// What the structure is long, without what may be added at its end.
template <class... Values>
constexpr std::size_t packed_bytes() {
  std::size_t at = 0;
  ((at = (at + alignof(Values) - 1) / alignof(Values) * alignof(Values) + sizeof(Values)), ...);
  return at;
}

template <class... Values>
Bound* bind(void (*kernel)(Values...), const char* arguments, std::size_t arguments_bytes) {
  struct Call final : Bound {
    void (*kernel)(Values...);
    std::tuple<Values...> values;
    Call(void (*given)(Values...), std::tuple<Values...> read) : kernel(given), values(read) {}
    void call() const override { std::apply(kernel, values); }
  };
  if (arguments_bytes != packed_bytes<Values...>()) {
    return nullptr;
  }
  std::size_t at = 0;
  return new Call(kernel, std::tuple<Values...>{taken<Values>(arguments, at)...});  // braces go from left to right
}

// Lets go of all when the last of `expected` has come.
struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  unsigned thread = 0;
  Barrier* barrier = nullptr;  // that it waits at
  unsigned generation = 0;     // of the barrier, when it came
  void* seen = nullptr;        // ThreadSanitizer's name of it
};

// Runs a grid on the calling thread. One at a time: static storage is what blocks share their memory in.
class Grid {
 public:
  FORNO_UNSEEN Outcome run(uint3 grid, uint3 block, const Bound& bound) {
    const unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || threads > kMostThreads || threads % kWarp != 0 || block.y != 1 || block.z != 1) {
      return kBadShape;
    }
    bound_ = &bound, threads_ = threads;
    gridDim = grid, blockDim = block;
#ifdef FORNO_TSAN
    main_ = __tsan_get_current_fiber();
#endif
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = {x, y, z};
          if (!run_block()) {
            fibers_.clear();  // what waits forever is abandoned
            return kStuck;
          }
        }
      }
    }
    return kDone;
  }

  FORNO_UNSEEN void wait(Barrier& barrier) {
#ifdef FORNO_TSAN
    __tsan_release(&barrier);
#endif
    Fiber& own = *current_;
    own.generation = barrier.generation;
    if (++barrier.arrived == barrier.expected) {
      barrier.arrived = 0;
      ++barrier.generation;
    } else {
      own.barrier = &barrier;
      leave(own);
      own.barrier = nullptr;
    }
#ifdef FORNO_TSAN
    __tsan_acquire(&barrier);
#endif
  }

  Barrier& block_barrier() { return block_barrier_; }
  Barrier& warp_barrier() { return warp_barriers_[threadIdx.x / kWarp]; }
  std::uint64_t& exchange(unsigned thread) { return exchange_[thread]; }

 private:
  FORNO_UNSEEN bool run_block() {
    next_ = finished_ = 0;
    block_barrier_ = {threads_, 0, 0};
    for (unsigned warp = 0; warp < threads_ / kWarp; ++warp) {
      warp_barriers_[warp] = {kWarp, 0, 0};
    }
    unsigned used = 0;
    while (next_ < threads_) {  // each fiber goes on until one of its threads waits
      if (used == fibers_.size()) {
        fibers_.push_back(std::make_unique<Fiber>());
      }
      begin(*fibers_[used++]);
    }
    while (finished_ < threads_) {
      bool moved = false;
      for (unsigned index = 0; index < used; ++index) {
        Fiber& fiber = *fibers_[index];
        if (fiber.barrier != nullptr && fiber.barrier->generation != fiber.generation) {
          moved = true;
          enter(fiber);
        }
      }
      if (!moved) {
        return false;  // a barrier that not all threads come to
      }
    }
#ifdef FORNO_TSAN
    __tsan_acquire(this);  // of all threads: the next block's, which use the same memory, come later
    for (unsigned index = 0; index < used; ++index) {
      __tsan_destroy_fiber(fibers_[index]->seen);
    }
#endif
    return true;
  }

  FORNO_UNSEEN void begin(Fiber& fiber) {
    fiber.barrier = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Grid::start, 0);
#ifdef FORNO_TSAN
    fiber.seen = __tsan_create_fiber(0);
#endif
    fiber.thread = next_++;
    enter(fiber, kOrdered);
  }

  FORNO_UNSEEN void enter(Fiber& fiber, [[maybe_unused]] unsigned order = kUnordered) {
    current_ = &fiber;
    threadIdx = {fiber.thread, 0, 0};
#ifdef FORNO_TSAN
    __tsan_switch_to_fiber(fiber.seen, order);
#endif
    swapcontext(&scheduler_, &fiber.context);
  }

  FORNO_UNSEEN void leave(Fiber& fiber) {
#ifdef FORNO_TSAN
    __tsan_switch_to_fiber(main_, kUnordered);
#endif
    swapcontext(&fiber.context, &scheduler_);
  }

  FORNO_UNSEEN static void start() { instance().work(); }

  FORNO_UNSEEN void work() {
    Fiber& own = *current_;
    for (;;) {
      bound_->call();
      ++finished_;
#ifdef FORNO_TSAN
      __tsan_release(this);
#else  // there, no two threads may share a fiber
      if (next_ < threads_) {
        own.thread = next_++;
        threadIdx = {own.thread, 0, 0};
        continue;
      }
#endif
      leave(own);  // for good
    }
  }

 public:
  static Grid& instance() {
    static Grid grid;
    return grid;
  }

  std::mutex busy;

 private:
  const Bound* bound_ = nullptr;
  void* main_ = nullptr;
  unsigned threads_ = 0, next_ = 0, finished_ = 0;
  Fiber* current_ = nullptr;
  ucontext_t scheduler_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Barrier block_barrier_;
  std::array<Barrier, kMostThreads / kWarp> warp_barriers_;
  std::array<std::uint64_t, kMostThreads> exchange_;
};

inline float float_of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t bits_of_float(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t exponent = half >> 10 & 31u, fraction = half & 0x3ffu;
  if (exponent == 31) {
    return float_of_bits(sign | 0x7f800000u | fraction << 13);
  }
  if (exponent == 0) {  // a multiple of 2^-24
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

inline std::uint16_t half_of_float(float value) {
  const std::uint32_t bits = bits_of_float(value), size = bits & 0x7fffffffu;
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  if (size > 0x7f800000u) {
    return sign | 0x7e00u;
  }
  if (size >= 0x477ff000u) {  // 65520, where rounding leaves what half precision can hold
    return sign | 0x7c00u;
  }
  if (size < 0x38800000u) {  // 2^-14: the sum is rounded to a multiple of 2^-24 by the addition itself
    return sign | static_cast<std::uint16_t>(bits_of_float(float_of_bits(size) + 0.5f) - 0x3f000000u);
  }
  return sign | static_cast<std::uint16_t>((size + 0xfffu + (size >> 13 & 1u) - (112u << 23)) >> 13);
}

}  // namespace cpu

inline void __syncthreads() { cpu::Grid::instance().wait(cpu::Grid::instance().block_barrier()); }

// The value of the lane whose number differs by `distance`; all lanes of the warp call it.
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  cpu::Grid& grid = cpu::Grid::instance();
  const unsigned own = threadIdx.x;
  std::memcpy(&grid.exchange(own), &value, sizeof value);
  grid.wait(grid.warp_barrier());
  T other;
  std::memcpy(&other, &grid.exchange(own ^ static_cast<unsigned>(distance)), sizeof other);
  grid.wait(grid.warp_barrier());
  return other;
}

inline std::uint32_t __float_as_uint(float value) { return cpu::bits_of_float(value); }

inline float __uint_as_float(std::uint32_t bits) { return cpu::float_of_bits(bits); }

#define EXPORT(kernel) \
  extern "C" cpu::Bound* on_cpu_##kernel(const char* arguments, std::size_t arguments_bytes) { \
    return cpu::bind(kernel, arguments, arguments_bytes); \
  }

// shape: blocks along x, y and z, then threads of each. Returns an Outcome.
extern "C" inline __attribute__((used)) int on_cpu_run(const cpu::Bound* bound, const unsigned* shape) {
  cpu::Grid& grid = cpu::Grid::instance();
  const std::lock_guard<std::mutex> lock(grid.busy);
  return grid.run({shape[0], shape[1], shape[2]}, {shape[3], shape[4], shape[5]}, *bound);
}

extern "C" inline __attribute__((used)) void on_cpu_drop(const cpu::Bound* bound) { delete bound; }
