// The pass over a rank's rows on a GPU. It includes no PyTorch header: 2 s to compile.
//
// Bytes: each row is read once and written once. A block finds its row's place by itself, so that
// nothing is sorted, stored or known to the host: n keys of about 100 instructions by 256 threads
// are 2 keys a thread for n = 512 rows.

#include "shuffle_rows.h"

namespace freeadv_fast {
namespace {

constexpr int kThreads = 256;
// 8 loads of 8 bytes in flight a thread; an image of 224x224x3 bytes then takes 10 blocks, and 16
// of them fill the 132 processors of an H200.
constexpr int kWordsPerThread = 8;
constexpr int kWordsPerBlock = kThreads * kWordsPerThread;

// The place of `row` in its order; every thread of the block gets it.
__device__ int64_t find_place(const RowOrder& order, int64_t row, int64_t num_rows) {
  const uint64_t key = order.key(uint32_t(row));
  int64_t place = 0;
  for (int64_t start = 0; start < num_rows; start += kThreads) {
    const int64_t other = start + threadIdx.x;
    const uint64_t other_key = order.key(uint32_t(other));
    const bool is_before = other_key < key || (other_key == key && other < row);
    place += __syncthreads_count(other < num_rows && is_before);
  }
  return place;
}

// Block (row, chunk). Word is uint64_t where rows are aligned to it, else a byte.
template <typename Word>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(const RowCopy copy) {
  const int64_t row = blockIdx.x;
  const int64_t place = find_place(copy.order, row, copy.num_rows);
  const bool is_before = copy.order.side == Side::kBefore;
  const int64_t image_row = is_before ? row : place;
  const int64_t message_row = is_before ? place : row;
  Word* image = reinterpret_cast<Word*>(copy.images + image_row * copy.image_bytes);
  Word* label = reinterpret_cast<Word*>(copy.labels + image_row);
  Word* message =
      reinterpret_cast<Word*>(copy.message + message_row * (copy.image_bytes + kLabelBytes));
  const int64_t image_words = copy.image_bytes / sizeof(Word);
  const int64_t row_words = image_words + kLabelBytes / sizeof(Word);
  const int64_t first = int64_t(blockIdx.y) * kWordsPerBlock + threadIdx.x;

  // All loads before all stores: the compiler must assume that a store changes what is loaded next.
  Word held[kWordsPerThread];
#pragma unroll
  for (int k = 0; k < kWordsPerThread; ++k) {
    const int64_t word = first + k * kThreads;
    const Word* own = word < image_words ? image + word : label + (word - image_words);
    if (word < row_words) held[k] = copy.is_packing ? *own : message[word];
  }
#pragma unroll
  for (int k = 0; k < kWordsPerThread; ++k) {
    const int64_t word = first + k * kThreads;
    Word* own = word < image_words ? image + word : label + (word - image_words);
    if (word < row_words) *(copy.is_packing ? message + word : own) = held[k];
  }
}

template <typename Word>
cudaError_t launch(const RowCopy& copy, cudaStream_t stream) {
  const int64_t row_words = (copy.image_bytes + kLabelBytes) / sizeof(Word);
  const int64_t chunks = (row_words + kWordsPerBlock - 1) / kWordsPerBlock;
  const dim3 grid(uint32_t(copy.num_rows), uint32_t(chunks));
  copy_rows_kernel<Word><<<grid, kThreads, 0, stream>>>(copy);
  return cudaGetLastError();
}

}  // namespace

cudaError_t copy_rows_cuda(const RowCopy& copy, cudaStream_t stream) {
  if (copy.num_rows == 0) return cudaSuccess;  // an empty grid is an error
  const auto start = reinterpret_cast<uintptr_t>(copy.images);
  const bool is_aligned = (start | uintptr_t(copy.image_bytes)) % sizeof(uint64_t) == 0;
  return is_aligned ? launch<uint64_t>(copy, stream) : launch<uint8_t>(copy, stream);
}

}  // namespace freeadv_fast
