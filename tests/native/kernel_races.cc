// Runs the kernels whose threads share memory under ThreadSanitizer, where only barriers order the threads of a block.
//
//     kernel_races            the kernels: must be silent
//     kernel_races racy       one that forgets its barrier: must be told of
#include "forno.cu"

#include <cstdio>
#include <vector>

extern "C" __global__ void racy(float* out) {
  __shared__ float room[kMostWarps];
  if (threadIdx.x % kWarp == 0) {
    room[threadIdx.x / kWarp] = 1.0f;
  }
  out[first_item()] = room[0];
}
EXPORT(racy)

// As `Device.launch` does it.
template <class... Values>
int run(void (*kernel)(Values...), unsigned blocks, unsigned threads, Values... values) {
  std::vector<char> arguments(cpu::packed_bytes<Values...>());
  std::size_t at = 0;
  ((at = (at + alignof(Values) - 1) / alignof(Values) * alignof(Values),
    std::memcpy(&arguments[at], &values, sizeof values), at += sizeof values),
   ...);
  const cpu::Bound* bound = cpu::bind(kernel, arguments.data(), arguments.size());
  const unsigned shape[] = {blocks, 1, 1, threads, 1, 1};
  const int outcome = on_cpu_run(bound, shape);
  on_cpu_drop(bound);
  return outcome;
}

int main(int count, char**) {
  std::vector<float> out(4096);
  if (count > 1) {
    return run(racy, 2, 64, out.data());
  }
  std::vector<float> hidden(4 * 5 * 70, 0.5f);
  std::vector<i64> mask(4 * 5, 1);
  std::vector<i32> indices(64);
  int outcome = 0;
  for (const unsigned threads : {32u, 64u, 128u}) {
    for (const i32 flag : {0, 1}) {
      outcome |= run<const float*, float*, i32*, i32, i32, i32, i32>(softmax_topk_f32, 3, threads, hidden.data(),
                                                                     out.data(), indices.data(), 4, 350, 3, flag);
      outcome |= run<const float*, const i64*, float*, i32, i32, i32, i32>(mean_pool_f32, 3, threads, hidden.data(),
                                                                           mask.data(), out.data(), 4, 5, 70, flag);
    }
  }
  std::vector<i64> offsets = {0, 3, 3, 60};
  outcome |= run<const u32*, const i64*, u32*, void*, i32, i32, i32, u32>(
      pack_rows_u32, 2, 32, reinterpret_cast<u32*>(hidden.data()), offsets.data(),
      reinterpret_cast<u32*>(out.data()), nullptr, 0, 3, 65, 7u);
  std::printf("outcome %d\n", outcome);
  return outcome;
}
