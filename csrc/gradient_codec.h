// Gradients at one signed byte an element. freeadv_fast/distributed/codec.py tells the formula and
// what a message holds; it is the specification.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

#ifdef FREEADV_FAST_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace freeadv_fast {

constexpr int kBlock = 512;  // elements
constexpr int kGroup = 4;    // elements that share a Philox counter
constexpr float kLevels = 127.0f;
constexpr float kUnits = kLevels * (1 << 24);  // levels in fixed point, 24 binary places
constexpr float kSmallestScale = 0x1p-96f;
constexpr float kNoScale = 0x1p96f;
// Running sums of a segment's norm.
constexpr int kSums = 256;

// A row of `Blocks.table`.
struct Block {
  int32_t offset;   // of its first element in the gradients
  int32_t length;   // in elements, 1..512
  int32_t number;   // among all blocks of the network
  int32_t levels;   // first byte in the messages, a multiple of 4
  int32_t scale;    // float in the messages
  int32_t segment;  // its tensor
};

struct Blocks {
  const Block* rows;
  int64_t num_rows;
  const int32_t* segments;  // (num_segments + 1,) first rows; nullptr: each block has its own scale
  int64_t num_segments;
};

// Where values come from: a rank's gradients, or the mean of what messages hold.
struct Gradients {
  const float* values;
};
struct Messages {
  const char* bytes;  // (num, stride)
  int64_t num;
  int64_t stride;
  float factor;  // of a sum of scale * level: fl(1 / (127 num))
};

// An encoding's random bits; `update` is read where the values are.
struct RandomStream {
  uint64_t seed;
  const int64_t* update;
  uint32_t word;
};

FREEADV_FAST_HOST_DEVICE inline int32_t bits_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FREEADV_FAST_HOST_DEVICE inline float float_of(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The bits of a value without its sign: as integers they are ordered like magnitudes, with infinity
// above all finite ones and NaN above that.
FREEADV_FAST_HOST_DEVICE inline int32_t magnitude_bits(float value) {
  return bits_of(value) & 0x7FFFFFFF;
}

// A scale as it is sent.
FREEADV_FAST_HOST_DEVICE inline float sent_scale(float scale) {
  if (scale < kSmallestScale) return 0.0f;
  if (!(scale < kNoScale)) return float_of(0x7FC00000);
  return float_of((bits_of(scale) + 0xFF) & ~0xFF);
}

// What turns magnitudes into fixed point. Segments of zeros, and those that are not finite, have
// none, and levels of 0.
FREEADV_FAST_HOST_DEVICE inline float units_per_value(float scale) { return kUnits / scale; }

// The level of a value of a segment with a scale above 0; `bits` is a random word.
FREEADV_FAST_HOST_DEVICE inline int32_t draw_level(float value, float units_per_value,
                                                   uint32_t bits) {
  const float units = float_of(magnitude_bits(value)) * units_per_value;
  const int32_t fixed = int32_t(units < kUnits ? units : kUnits);
  const int32_t magnitude = (fixed + int32_t(bits >> 8)) >> 24;
  return value < 0 ? -magnitude : magnitude;
}

// The counter of a block's group of elements.
FREEADV_FAST_HOST_DEVICE inline Words counter_of(int32_t block, int group, int64_t update,
                                                 uint32_t word) {
  return {uint32_t(block) * (kBlock / kGroup) + group, uint32_t(update),
          uint32_t(uint64_t(update) >> 32), word};
}

#ifdef FREEADV_FAST_WITH_CUDA
// Workspace of an encoding with segments.
struct Workspace {
  double* squares;  // (num_rows,) each block's sum
  float* scales;    // (num_segments,)
};

// These launch on a stream and return the launch's error. `message` is on the device, as all
// pointers are.
cudaError_t encode_cuda(const Gradients& source, const Blocks& blocks, const RandomStream& random,
                        const Workspace& workspace, char* message, cudaStream_t stream);
cudaError_t encode_cuda(const Messages& source, const Blocks& blocks, const RandomStream& random,
                        const Workspace& workspace, char* message, cudaStream_t stream);
cudaError_t decode_cuda(const Messages& source, const Blocks& blocks, float* gradients,
                        cudaStream_t stream);
#endif

}  // namespace freeadv_fast
