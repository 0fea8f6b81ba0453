// As much of CUDA as gradient_codec_cuda.cu needs, on a CPU: a thread for each of a block's
// threads, one block after another, the last one first: what a block writes beyond its place then
// destroys what belongs there. The test puts `emulate(Launch{...}, ...)` where <<<...>>> was.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct dim3 {
  dim3(uint32_t x) : x(x) {}
  uint32_t x;
};

struct float4 {
  float x, y, z, w;
};
struct char4 {
  signed char x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline char4 make_char4(int x, int y, int z, int w) {
  return {(signed char)x, (signed char)y, (signed char)z, (signed char)w};
}

struct Warp {
  std::barrier<> barrier{32};
  uint64_t values[32];
};

inline thread_local dim3 blockIdx{0}, threadIdx{0};
inline thread_local Warp* current_warp;
inline thread_local std::barrier<>* current_block;

inline void __syncthreads() { current_block->arrive_and_wait(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = threadIdx.x % 32;
  std::memcpy(&current_warp->values[lane], &value, sizeof value);
  current_warp->barrier.arrive_and_wait();
  std::memcpy(&value, &current_warp->values[lane ^ mask], sizeof value);
  current_warp->barrier.arrive_and_wait();
  return value;
}

struct Launch {
  dim3 blocks, threads;
  int shared_bytes;
  cudaStream_t stream;
};

template <typename Kernel>
void emulate(const Launch& launch, const Kernel& kernel) {
  for (uint32_t block = launch.blocks.x; block-- > 0;) {
    std::vector<Warp> warps(launch.threads.x / 32);
    std::barrier<> barrier(launch.threads.x);
    std::vector<std::thread> threads;
    for (uint32_t thread = 0; thread < launch.threads.x; ++thread) {
      threads.emplace_back([&, block, thread] {
        blockIdx.x = block;
        threadIdx.x = thread;
        current_warp = &warps[thread / 32];
        current_block = &barrier;
        kernel();
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}
