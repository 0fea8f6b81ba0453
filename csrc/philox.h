// Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FREEADV_FAST_HOST_DEVICE __host__ __device__
#else
#define FREEADV_FAST_HOST_DEVICE
#endif

namespace freeadv_fast {

// Four words: a counter, then random.
struct Words {
  uint32_t w0, w1, w2, w3;
};

FREEADV_FAST_HOST_DEVICE inline Words philox(Words c, uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * c.w0;
    const uint64_t product1 = uint64_t(0xCD9E8D57u) * c.w2;
    c = {uint32_t(product1 >> 32) ^ c.w1 ^ k0, uint32_t(product1),
         uint32_t(product0 >> 32) ^ c.w3 ^ k1, uint32_t(product0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace freeadv_fast
