// freeadv_fast::shuffle_exchange: moves images and their labels between ranks in random order.
//
//   pack (local permutation) -> one all-to-all -> unpack (local permutation)
//
// The formula and the numbers of rows come from freeadv_fast/shuffle.py, which is the
// specification. On a GPU everything is issued at once on a stream of its own, so that the clean
// minibatch's pass hides it; on a CPU gloo's threads carry the message while the caller computes.
//
// The all-to-all goes through c10d's base class: it links no NCCL.

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/custom_class.h>
#include <torch/library.h>

#ifdef FREEADV_FAST_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "shuffle_rows.h"

namespace freeadv_fast {
namespace {

using at::Tensor;
using c10::impl::VirtualGuardImpl;

void copy_rows_cpu(const RowCopy& copy) {
  std::vector<std::pair<uint64_t, int64_t>> keys(copy.num_rows);
  for (int64_t row = 0; row < copy.num_rows; ++row) keys[row] = {copy.order.key(row), row};
  std::sort(keys.begin(), keys.end());
  const bool is_before = copy.order.side == Side::kBefore;
  for (int64_t place = 0; place < copy.num_rows; ++place) {
    const int64_t row = keys[place].second;
    const int64_t image_row = is_before ? row : place;
    const int64_t message_row = is_before ? place : row;
    char* image = copy.images + image_row * copy.image_bytes;
    int64_t* label = copy.labels + image_row;
    char* message = copy.message + message_row * (copy.image_bytes + kLabelBytes);
    if (copy.is_packing) {
      std::memcpy(message, image, copy.image_bytes);
      std::memcpy(message + copy.image_bytes, label, kLabelBytes);
    } else {
      std::memcpy(image, message, copy.image_bytes);
      std::memcpy(label, message + copy.image_bytes, kLabelBytes);
    }
  }
}

void copy_rows(const RowCopy& copy, c10::Device device) {
#ifdef FREEADV_FAST_WITH_CUDA
  if (device.is_cuda()) {
    TORCH_CHECK(c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None,
                "shuffle_exchange: a CUDA graph would repeat the order of step ", copy.order.step,
                " at every replay; exchange outside of the graph");
    C10_CUDA_CHECK(copy_rows_cuda(copy, c10::cuda::getCurrentCUDAStream()));
    return;
  }
#endif
  copy_rows_cpu(copy);
}

// The stream on which a GPU's exchanges run, the same for all of them: two at a time would only
// share the links. High priority, because the message should leave before the clean pass ends.
c10::Stream exchange_stream(c10::Device device) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, c10::Stream> streams;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = streams.find(device.index());
  if (found == streams.end()) {
    const VirtualGuardImpl guard(device.type());
    found = streams.emplace(device.index(), guard.getStreamFromGlobalPool(device, true)).first;
  }
  return found->second;
}

// How a rank's rows move.
struct Route {
  std::string group;             // c10d's name; empty: nothing leaves any rank
  std::vector<int64_t> send;     // rows for each rank
  std::vector<int64_t> receive;  // rows from each rank
  uint64_t seed;
  uint64_t step;
  uint32_t rank;
  bool is_inverse;
  std::chrono::milliseconds timeout;
};

// An exchange under way.
class Exchange final : public torch::CustomClassHolder {
 public:
  Exchange(const Tensor& images, const Tensor& labels, Route route)
      : route_(std::move(route)), device_(images.device()) {
    std::optional<c10::StreamGuard> guard;
    if (device_.is_cuda()) {
      const c10::Stream stream = exchange_stream(device_);
      c10::Event ready(device_.type());
      ready.record(VirtualGuardImpl(device_.type()).getStream(device_));
      ready.block(stream);
      images.record_stream(stream);
      labels.record_stream(stream);
      guard.emplace(stream);
    }
    images_ = at::empty_like(images);
    labels_ = at::empty_like(labels);
    message_ =
        at::empty({images.size(0), image_bytes() + kLabelBytes}, images.options().dtype(at::kByte));
    copy(images, labels, /*is_packing=*/true);
    if (!route_.group.empty()) send_message();
    // NCCL's wait only orders streams, so the rest is issued now. Gloo's blocks the host, for GPU
    // tensors too, and is left to `wait`.
    if (device_.is_cuda() && (!work_ || is_nccl_)) {
      if (work_) work_->wait();  // a time-out would block the host; the group's watchdog has one
      unpack();
    }
  }

  // The rows that arrived. On a GPU the current stream waits for them, the host does not.
  std::tuple<Tensor, Tensor> wait() {
    if (message_.defined()) {
      std::optional<c10::StreamGuard> guard;
      if (device_.is_cuda()) guard.emplace(exchange_stream(device_));
      if (work_) await_message();
      unpack();
    }
    if (device_.is_cuda()) {
      const c10::Stream current = VirtualGuardImpl(device_.type()).getStream(device_);
      done_->block(current);
      images_.record_stream(current);
      labels_.record_stream(current);
    }
    return {images_, labels_};
  }

 private:
  int64_t image_bytes() const {
    const auto sizes = images_.sizes().slice(1);
    return c10::multiply_integers(sizes) * images_.element_size();
  }

  void copy(const Tensor& images, const Tensor& labels, bool is_packing) const {
    const Side side = is_packing == route_.is_inverse ? Side::kAfter : Side::kBefore;
    copy_rows({static_cast<char*>(images.data_ptr()), labels.data_ptr<int64_t>(),
               static_cast<char*>(message_.data_ptr()), images.size(0), image_bytes(),
               RowOrder{route_.seed, route_.step, route_.rank, side}, is_packing},
              device_);
  }

  void send_message() {
    const auto group = c10d::resolve_process_group(route_.group);
    is_nccl_ = group->getBackend(device_.type())->getBackendName() == "nccl";
    Tensor received = at::empty_like(message_);
    c10d::AllToAllOptions options;
    // Gloo's threads give up then, and the process can leave; the group's own patience is an hour.
    options.timeout = route_.timeout;
    work_ = group->alltoall_base(received, message_, route_.receive, route_.send, options);
    message_ = received;
  }

  void await_message() {
    try {
      work_->wait(route_.timeout);
    } catch (const std::exception& error) {
      C10_THROW_ERROR(DistBackendError, error.what());
    }
  }

  // From the message to images_ and labels_; an exchange is unpacked once.
  void unpack() {
    copy(images_, labels_, /*is_packing=*/false);
    message_.reset();
    work_.reset();
    if (device_.is_cuda()) {
      done_.emplace(device_.type());
      done_->record(exchange_stream(device_));
    }
  }

  Route route_;
  c10::Device device_;
  Tensor images_, labels_;  // what arrives
  Tensor message_;          // what leaves; once it is under way, what is received
  c10::intrusive_ptr<c10d::Work> work_;
  bool is_nccl_ = false;
  std::optional<c10::Event> done_;  // on the exchange's stream: images_ and labels_ are there
};

c10::intrusive_ptr<Exchange> shuffle_exchange(const Tensor& images, const Tensor& labels,
                                              std::string group, std::vector<int64_t> send,
                                              std::vector<int64_t> receive, int64_t rank,
                                              int64_t seed, int64_t step, bool is_inverse,
                                              int64_t timeout_ms) {
  const auto sum = [](const auto& rows) {
    return std::accumulate(rows.begin(), rows.end(), int64_t(0));
  };
  TORCH_CHECK(images.dim() >= 1 && images.is_contiguous(), "images: expected contiguous (N, ...)");
  TORCH_CHECK(labels.dim() == 1 && labels.size(0) == images.size(0) && labels.is_contiguous() &&
                  labels.scalar_type() == at::kLong && labels.device() == images.device(),
              "labels: expected contiguous int64 (", images.size(0), ",) on ", images.device());
  TORCH_CHECK(sum(send) == images.size(0) && sum(receive) == images.size(0), "send ", send,
              " and receive ", receive, ": expected sums of ", images.size(0));
  TORCH_CHECK(images.size(0) >> 32 == 0, "images: expected fewer than 2^32 rows");
  return c10::make_intrusive<Exchange>(
      images, labels,
      Route{std::move(group), std::move(send), std::move(receive), uint64_t(seed), uint64_t(step),
            uint32_t(rank), is_inverse, std::chrono::milliseconds(timeout_ms)});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(freeadv_fast, library) {
  library.class_<Exchange>("Exchange").def("wait", &Exchange::wait);
  library.def(
      "shuffle_exchange(Tensor images, Tensor labels, str group, int[] send, int[] receive, "
      "int rank, int seed, int step, bool is_inverse, int timeout_ms) "
      "-> __torch__.torch.classes.freeadv_fast.Exchange");
}

TORCH_LIBRARY_IMPL(freeadv_fast, CPU, library) {
  library.impl("shuffle_exchange", &shuffle_exchange);
}

#ifdef FREEADV_FAST_WITH_CUDA
TORCH_LIBRARY_IMPL(freeadv_fast, CUDA, library) {
  library.impl("shuffle_exchange", &shuffle_exchange);
}
#endif

}  // namespace freeadv_fast
