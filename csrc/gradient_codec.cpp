// freeadv_fast::encode_gradients, encode_mean and decode_gradients: gradients at one signed byte an
// element, on a CPU; on a GPU they launch the kernels of gradient_codec_cuda.cu.
//
// The formula and the places in the messages come from freeadv_fast/distributed/codec.py, which is
// the specification.

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#ifdef FREEADV_FAST_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "gradient_codec.h"

// Hot loops are compiled twice, and the machine picks: AVX2 has products of 4 words, SSE2 of 2.
#if defined(__x86_64__) && defined(__GLIBC__)
#define FREEADV_FAST_VECTORIZED __attribute__((noinline, target_clones("avx2", "default")))
#else
#define FREEADV_FAST_VECTORIZED
#endif

namespace freeadv_fast {
namespace {

using at::Tensor;
using Values = std::array<float, kBlock>;  // of a block; 0 behind its end

constexpr int64_t kBlocksPerTask = 64;  // 128 KB of gradients

FREEADV_FAST_VECTORIZED void load(const Gradients& source, const Block& block, Values& values) {
  std::memcpy(values.data(), source.values + block.offset, block.length * sizeof(float));
  std::fill(values.begin() + block.length, values.end(), 0.0f);
}

FREEADV_FAST_VECTORIZED void load(const Messages& source, const Block& block, Values& values) {
  values.fill(0.0f);
  for (int64_t m = 0; m < source.num; ++m) {
    const char* message = source.bytes + m * source.stride;
    const auto* levels = reinterpret_cast<const int8_t*>(message) + block.levels;
    const float scale = reinterpret_cast<const float*>(message)[block.scale];
    for (int i = 0; i < block.length; ++i) values[i] += scale * levels[i];
  }
  for (int i = 0; i < block.length; ++i) values[i] *= source.factor;
}

FREEADV_FAST_VECTORIZED float largest_magnitude(const Values& values) {
  int32_t largest = 0;
  for (const float value : values) largest = std::max(largest, magnitude_bits(value));
  return float_of(largest);
}

// The order of the additions is `codec._segment_norms`.
FREEADV_FAST_VECTORIZED double sum_squares(const Values& values) {
  constexpr int kQuarter = kBlock / 4;
  std::array<double, kBlock> squares;
  for (int i = 0; i < kBlock; ++i) squares[i] = double(values[i]) * values[i];
  std::array<double, kQuarter> quarters;
  for (int i = 0; i < kQuarter; ++i) {
    quarters[i] = (squares[i] + squares[2 * kQuarter + i]) +
                  (squares[kQuarter + i] + squares[3 * kQuarter + i]);
  }
  std::array<double, kQuarter / kGroup> sums;
  for (int i = 0; i < kQuarter / kGroup; ++i) {
    const double* group = &quarters[kGroup * i];
    sums[i] = (group[0] + group[2]) + (group[1] + group[3]);
  }
  for (int half = sums.size() / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[half + i];
  }
  return sums[0];
}

FREEADV_FAST_VECTORIZED void draw_levels(const Values& values, float units_per_value,
                                         const Block& block, uint64_t seed, int64_t update,
                                         uint32_t word, int8_t* levels) {
  std::array<uint32_t, kBlock> bits;
  for (int group = 0; group < kBlock / kGroup; ++group) {
    const Words words = philox(counter_of(block.number, group, update, word), seed);
    bits[kGroup * group] = words.w0;
    bits[kGroup * group + 1] = words.w1;
    bits[kGroup * group + 2] = words.w2;
    bits[kGroup * group + 3] = words.w3;
  }
  for (int i = 0; i < kBlock; ++i) {
    levels[i] = int8_t(draw_level(values[i], units_per_value, bits[i]));
  }
}

// Scales of all segments, as they are sent.
template <typename Source>
std::vector<float> scale_segments(const Source& source, const Blocks& blocks) {
  std::vector<double> squares(blocks.num_rows);
  at::parallel_for(0, blocks.num_rows, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    Values values;
    for (int64_t row = begin; row < end; ++row) {
      load(source, blocks.rows[row], values);
      squares[row] = sum_squares(values);
    }
  });
  std::vector<float> scales(blocks.num_segments);
  for (int64_t segment = 0; segment < blocks.num_segments; ++segment) {
    std::array<double, kSums> sums{};
    const int64_t first = blocks.segments[segment], end = blocks.segments[segment + 1];
    for (int64_t row = first; row < end; ++row) sums[(row - first) % kSums] += squares[row];
    for (int half = kSums / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sums[i] += sums[half + i];
    }
    scales[segment] = sent_scale(float(std::sqrt(sums[0])));
  }
  return scales;
}

template <typename Source>
void encode_cpu(const Source& source, const Blocks& blocks, const RandomStream& random,
                char* message) {
  auto* sent_scales = reinterpret_cast<float*>(message);
  std::vector<float> scales;
  if (blocks.segments) {
    scales = scale_segments(source, blocks);
    for (int64_t row = 0; row < blocks.num_rows; ++row) {
      sent_scales[blocks.rows[row].scale] = scales[blocks.rows[row].segment];
    }
  }
  at::parallel_for(0, blocks.num_rows, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    Values values;
    std::array<int8_t, kBlock> levels;
    for (int64_t row = begin; row < end; ++row) {
      const Block& block = blocks.rows[row];
      load(source, block, values);
      float scale;
      if (blocks.segments) {
        scale = scales[block.segment];
      } else {
        scale = sent_scales[block.scale] = sent_scale(largest_magnitude(values));
      }
      if (scale > 0) {
        draw_levels(values, units_per_value(scale), block, random.seed, *random.update,
                    random.word, levels.data());
      } else {
        levels.fill(0);
      }
      std::memcpy(message + block.levels, levels.data(), (block.length + 3) / 4 * 4);
    }
  });
}

void decode_cpu(const Messages& source, const Blocks& blocks, float* gradients) {
  at::parallel_for(0, blocks.num_rows, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    Values values;
    for (int64_t row = begin; row < end; ++row) {
      const Block& block = blocks.rows[row];
      load(source, block, values);
      std::memcpy(gradients + block.offset, values.data(), block.length * sizeof(float));
    }
  });
}

void check(const Tensor& tensor, at::ScalarType type, int64_t num_dims, const Tensor& beside,
           const char* name) {
  TORCH_CHECK(tensor.scalar_type() == type && tensor.dim() == num_dims && tensor.is_contiguous() &&
                  tensor.device() == beside.device(),
              name, ": expected contiguous ", type, " of ", num_dims, " dimensions on ",
              beside.device(), ", got ", tensor.scalar_type(), " ", tensor.sizes(), " on ",
              tensor.device());
}

Blocks view_blocks(const Tensor& table, const std::optional<Tensor>& segments,
                   const Tensor& beside) {
  check(table, at::kInt, 2, beside, "table");
  TORCH_CHECK(table.size(1) * sizeof(int32_t) == sizeof(Block), "table: expected (K, 6)");
  Blocks blocks{static_cast<const Block*>(table.const_data_ptr()), table.size(0), nullptr, 0};
  if (segments) {
    check(*segments, at::kInt, 1, beside, "segments");
    blocks.segments = segments->const_data_ptr<int32_t>();
    blocks.num_segments = segments->size(0) - 1;
  }
  return blocks;
}

Messages view_messages(const Tensor& messages) {
  const int64_t num = messages.dim() == 2 ? messages.size(0) : 1;
  return {static_cast<const char*>(messages.const_data_ptr()), num, messages.size(-1),
          float(1.0 / (double(kLevels) * double(num)))};
}

template <typename Source>
void encode(const Source& source, const Tensor& beside, const Tensor& table,
            const std::optional<Tensor>& segments, const Tensor& update, int64_t seed,
            int64_t word, const Tensor& message) {
  const Blocks blocks = view_blocks(table, segments, beside);
  check(update, at::kLong, 1, beside, "update");
  check(message, at::kByte, 1, beside, "message");
  const RandomStream random{uint64_t(seed), update.const_data_ptr<int64_t>(), uint32_t(word)};
  char* bytes = static_cast<char*>(message.data_ptr());
#ifdef FREEADV_FAST_WITH_CUDA
  if (beside.is_cuda()) {
    const c10::DeviceGuard guard(beside.device());
    const auto options = beside.options();
    const int64_t num_squares = blocks.segments ? blocks.num_rows : 0;
    const Tensor squares = at::empty({num_squares}, options.dtype(at::kDouble));
    const Tensor scales = at::empty({blocks.num_segments}, options.dtype(at::kFloat));
    const Workspace workspace{squares.data_ptr<double>(), scales.data_ptr<float>()};
    C10_CUDA_CHECK(encode_cuda(source, blocks, random, workspace, bytes,
                               c10::cuda::getCurrentCUDAStream()));
    return;
  }
#endif
  encode_cpu(source, blocks, random, bytes);
}

void encode_gradients(const Tensor& gradients, const Tensor& table,
                      const std::optional<Tensor>& segments, const Tensor& update, int64_t seed,
                      int64_t word, Tensor message) {
  check(gradients, at::kFloat, 1, gradients, "gradients");
  encode(Gradients{gradients.const_data_ptr<float>()}, gradients, table, segments, update, seed,
         word, message);
}

void encode_mean(const Tensor& messages, const Tensor& table, const std::optional<Tensor>& segments,
                 const Tensor& update, int64_t seed, int64_t word, Tensor message) {
  check(messages, at::kByte, 2, messages, "messages");
  encode(view_messages(messages), messages, table, segments, update, seed, word, message);
}

void decode_gradients(const Tensor& message, const Tensor& table, Tensor gradients) {
  check(message, at::kByte, 1, message, "message");
  check(gradients, at::kFloat, 1, message, "gradients");
  const Blocks blocks = view_blocks(table, std::nullopt, message);
  float* values = gradients.data_ptr<float>();
#ifdef FREEADV_FAST_WITH_CUDA
  if (message.is_cuda()) {
    const c10::DeviceGuard guard(message.device());
    C10_CUDA_CHECK(decode_cuda(view_messages(message), blocks, values,
                               c10::cuda::getCurrentCUDAStream()));
    return;
  }
#endif
  decode_cpu(view_messages(message), blocks, values);
}

void register_codec(torch::Library& library) {
  library.impl("encode_gradients", &encode_gradients);
  library.impl("encode_mean", &encode_mean);
  library.impl("decode_gradients", &decode_gradients);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(freeadv_fast, library) {
  library.def(
      "encode_gradients(Tensor gradients, Tensor table, Tensor? segments, Tensor update, int seed, "
      "int word, Tensor(a!) message) -> ()");
  library.def(
      "encode_mean(Tensor messages, Tensor table, Tensor? segments, Tensor update, int seed, "
      "int word, Tensor(a!) message) -> ()");
  library.def("decode_gradients(Tensor message, Tensor table, Tensor(a!) gradients) -> ()");
}

TORCH_LIBRARY_IMPL(freeadv_fast, CPU, library) { register_codec(library); }

#ifdef FREEADV_FAST_WITH_CUDA
TORCH_LIBRARY_IMPL(freeadv_fast, CUDA, library) { register_codec(library); }
#endif

}  // namespace freeadv_fast
