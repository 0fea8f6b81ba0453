// Gradients at one signed byte an element, on a GPU. It includes no PyTorch header: 2 s to compile.
//
// A warp takes a block of 512 elements, 16 a thread, and keeps them in registers. Launches, and
// bytes an element, with W ranks, of which each owns 1/W of the elements:
//
//   encode gradients   bucket  1 launch    reads 4, writes 1
//                      paper   3 launches  reads 4 + 4, writes 1: the norm must be known first
//   encode a mean      bucket  1 launch    reads 1, writes 1/W
//                      paper   3 launches  reads 1 + 1, writes 1/W
//   decode             both    1 launch    reads 1, writes 4
//
// and 24 bytes a block of its row. Nothing is atomic: the same bits at every run.

#include "gradient_codec.h"

namespace freeadv_fast {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kLanes = 32;
constexpr int kWarps = 8;  // blocks of elements a block of threads
constexpr int kRounds = kBlock / (kLanes * kGroup);

// Round r of a lane holds the group of elements 4 (lane + 32 r) ..., of which one Philox counter
// makes the bits; neighbouring lanes hold neighbouring groups.
__device__ int group_of(int lane, int round) { return lane + kLanes * round; }

using Values = float[kRounds][kGroup];

// Whether groups of a block can be moved 16 bytes at a time; DDP's buckets promise 4.
__device__ bool is_aligned(const float* values, const Block& block) {
  return block.length == kBlock && reinterpret_cast<uintptr_t>(values) % sizeof(float4) == 0;
}

__device__ void load(const Gradients& source, const Block& block, int lane, Values& values) {
  const float* first = source.values + block.offset;
  if (is_aligned(first, block)) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const float4 group = reinterpret_cast<const float4*>(first)[group_of(lane, round)];
      values[round][0] = group.x;
      values[round][1] = group.y;
      values[round][2] = group.z;
      values[round][3] = group.w;
    }
    return;
  }
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int i = kGroup * group_of(lane, round) + k;
      values[round][k] = i < block.length ? first[i] : 0.0f;
    }
  }
}

__device__ void load(const Messages& source, const Block& block, int lane, Values& values) {
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) values[round][k] = 0.0f;
  }
  for (int64_t m = 0; m < source.num; ++m) {
    const char* message = source.bytes + m * source.stride;
    const float scale = reinterpret_cast<const float*>(message)[block.scale];
    const char4* levels = reinterpret_cast<const char4*>(message + block.levels);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int group = group_of(lane, round);
      if (kGroup * group >= block.length) continue;
      const char4 level = levels[group];
      values[round][0] += scale * level.x;
      values[round][1] += scale * level.y;
      values[round][2] += scale * level.z;
      values[round][3] += scale * level.w;
    }
  }
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const bool is_within = kGroup * group_of(lane, round) + k < block.length;
      values[round][k] = is_within ? values[round][k] * source.factor : 0.0f;
    }
  }
}

// The row of this warp; whole warps leave where there is none.
__device__ int64_t own_row() { return int64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes; }

__device__ int own_lane() { return threadIdx.x % kLanes; }

__device__ float largest_magnitude(const Values& values) {
  int32_t largest = 0;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int32_t bits = magnitude_bits(values[round][k]);
      largest = bits > largest ? bits : largest;
    }
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    const int32_t other = __shfl_xor_sync(kAllLanes, largest, half);
    largest = other > largest ? other : largest;
  }
  return float_of(largest);
}

// The order of the additions is `codec._segment_norms`. Products of floats are exact in double.
__device__ double sum_squares(const Values& values) {
  double sums[kGroup];
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    const double a = values[0][k], b = values[1][k], c = values[2][k], d = values[3][k];
    sums[k] = (a * a + c * c) + (b * b + d * d);
  }
  double sum = (sums[0] + sums[2]) + (sums[1] + sums[3]);
  for (int half = kLanes / 2; half > 0; half /= 2) sum += __shfl_xor_sync(kAllLanes, sum, half);
  return sum;
}

template <typename Source>
__global__ void __launch_bounds__(kWarps* kLanes)
    sum_squares_kernel(const Source source, const Blocks blocks, double* squares) {
  const int64_t row = own_row();
  if (row >= blocks.num_rows) return;
  Values values;
  load(source, blocks.rows[row], own_lane(), values);
  const double sum = sum_squares(values);
  if (own_lane() == 0) squares[row] = sum;
}

// A block of threads a segment.
__global__ void __launch_bounds__(kSums)
    scale_segments_kernel(const Blocks blocks, const double* squares, float* scales) {
  __shared__ double sums[kSums];
  const int segment = blockIdx.x, own = threadIdx.x;
  double sum = 0;
  for (int64_t row = int64_t(blocks.segments[segment]) + own; row < blocks.segments[segment + 1];
       row += kSums) {
    sum += squares[row];
  }
  sums[own] = sum;
  for (int half = kSums / 2; half > 0; half /= 2) {
    __syncthreads();
    if (own < half) sums[own] += sums[half + own];
  }
  if (own == 0) scales[segment] = sent_scale(float(sqrt(sums[0])));
}

template <typename Source>
__global__ void __launch_bounds__(kWarps* kLanes)
    encode_kernel(const Source source, const Blocks blocks, const RandomStream random,
                  const float* scales, char* message) {
  const int64_t row = own_row();
  if (row >= blocks.num_rows) return;
  const Block block = blocks.rows[row];
  const int lane = own_lane();
  Values values;
  load(source, block, lane, values);
  const float scale =
      blocks.segments ? scales[block.segment] : sent_scale(largest_magnitude(values));
  // Blocks of one segment write the same value.
  if (lane == 0) reinterpret_cast<float*>(message)[block.scale] = scale;
  const float units = units_per_value(scale);
  const int64_t update = *random.update;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int group = group_of(lane, round);
    if (kGroup * group >= block.length) continue;
    char4 levels = make_char4(0, 0, 0, 0);
    if (scale > 0) {
      const Words bits = philox(counter_of(block.number, group, update, random.word), random.seed);
      levels = make_char4(draw_level(values[round][0], units, bits.w0),
                          draw_level(values[round][1], units, bits.w1),
                          draw_level(values[round][2], units, bits.w2),
                          draw_level(values[round][3], units, bits.w3));
    }
    reinterpret_cast<char4*>(message + block.levels)[group] = levels;
  }
}

__global__ void __launch_bounds__(kWarps* kLanes)
    decode_kernel(const Messages source, const Blocks blocks, float* gradients) {
  const int64_t row = own_row();
  if (row >= blocks.num_rows) return;
  const Block block = blocks.rows[row];
  const int lane = own_lane();
  Values values;
  load(source, block, lane, values);
  float* first = gradients + block.offset;
  if (is_aligned(first, block)) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      reinterpret_cast<float4*>(first)[group_of(lane, round)] = make_float4(
          values[round][0], values[round][1], values[round][2], values[round][3]);
    }
    return;
  }
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int i = kGroup * group_of(lane, round) + k;
      if (i < block.length) first[i] = values[round][k];
    }
  }
}

dim3 grid_of(const Blocks& blocks) {
  return dim3(uint32_t((blocks.num_rows + kWarps - 1) / kWarps));
}

template <typename Source>
cudaError_t encode(const Source& source, const Blocks& blocks, const RandomStream& random,
                   const Workspace& workspace, char* message, cudaStream_t stream) {
  if (blocks.num_rows == 0) return cudaSuccess;  // an empty grid is an error
  const dim3 grid = grid_of(blocks), threads(kWarps * kLanes);
  if (blocks.segments) {
    sum_squares_kernel<Source><<<grid, threads, 0, stream>>>(source, blocks, workspace.squares);
    const dim3 segments{uint32_t(blocks.num_segments)};
    scale_segments_kernel<<<segments, kSums, 0, stream>>>(blocks, workspace.squares,
                                                          workspace.scales);
  }
  encode_kernel<Source>
      <<<grid, threads, 0, stream>>>(source, blocks, random, workspace.scales, message);
  return cudaGetLastError();
}

}  // namespace

cudaError_t encode_cuda(const Gradients& source, const Blocks& blocks, const RandomStream& random,
                        const Workspace& workspace, char* message, cudaStream_t stream) {
  return encode(source, blocks, random, workspace, message, stream);
}

cudaError_t encode_cuda(const Messages& source, const Blocks& blocks, const RandomStream& random,
                        const Workspace& workspace, char* message, cudaStream_t stream) {
  return encode(source, blocks, random, workspace, message, stream);
}

cudaError_t decode_cuda(const Messages& source, const Blocks& blocks, float* gradients,
                        cudaStream_t stream) {
  if (blocks.num_rows == 0) return cudaSuccess;
  decode_kernel<<<grid_of(blocks), kWarps * kLanes, 0, stream>>>(source, blocks, gradients);
  return cudaGetLastError();
}

}  // namespace freeadv_fast
