// One pass over a rank's rows in the shuffle exchange: images and labels on one side, the message
// that travels on the other. freeadv_fast/shuffle.py tells the formula; it is the specification.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FREEADV_FAST_HOST_DEVICE __host__ __device__
#else
#define FREEADV_FAST_HOST_DEVICE
#endif

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

  // The first 64 bits of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
  // 1, 2, 3", SC 2011).
  FREEADV_FAST_HOST_DEVICE uint64_t key(uint32_t row) const {
    uint32_t c0 = row, c1 = uint32_t(step), c2 = uint32_t(step >> 32);
    uint32_t c3 = 2 * rank + uint32_t(side);
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = uint64_t(0xD2511F53u) * c0;
      const uint64_t product1 = uint64_t(0xCD9E8D57u) * c2;
      c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
      c1 = uint32_t(product1);
      c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
      c3 = uint32_t(product0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return uint64_t(c1) << 32 | c0;
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
