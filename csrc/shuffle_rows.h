// One pass over a rank's rows in the shuffle exchange: images and labels on one side, the message
// that travels on the other. freeadv_fast/shuffle.py tells the formula; it is the specification.
#pragma once

#include <cstdint>

#include "philox.h"

#ifdef FREEADV_FAST_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace freeadv_fast {

// The two local permutations of an exchange: before and after the rows travel.
enum class Side : uint32_t { kBefore = 0, kAfter = 1 };

// The random order of one rank's rows on one side: row i goes to the place that (key(i), i) takes
// among all of them. No index is stored or sent; whoever needs a place counts the smaller keys.
struct RowOrder {
  uint64_t seed;
  uint64_t step;
  uint32_t rank;
  Side side;

  FREEADV_FAST_HOST_DEVICE uint64_t key(uint32_t row) const {
    const uint32_t last = 2 * rank + uint32_t(side);
    const Words random = philox({row, uint32_t(step), uint32_t(step >> 32), last}, seed);
    return uint64_t(random.w1) << 32 | random.w0;
  }
};

// What one pass copies, and which way. A row of the message is an image's bytes and then its
// label, without padding: at most (W-1)/W of the batch and its labels leave a rank.
//
//   side kBefore   image i <-> row place(i) of the message
//   side kAfter    image place(i) <-> row i of the message
//
// Undoing an exchange packs on the side kAfter and unpacks on the side kBefore.
struct RowCopy {
  char* images;      // (num_rows, image_bytes)
  int64_t* labels;   // (num_rows,)
  char* message;     // (num_rows, image_bytes + 8)
  int64_t num_rows;  // below 2^32
  int64_t image_bytes;
  RowOrder order;
  bool is_packing;  // images and labels -> message; else message -> images and labels
};

constexpr int64_t kLabelBytes = sizeof(int64_t);

#ifdef FREEADV_FAST_WITH_CUDA
// Launches the pass on a stream; returns the launch's error.
cudaError_t copy_rows_cuda(const RowCopy& copy, cudaStream_t stream);
#endif

}  // namespace freeadv_fast
