// The CUDA compiler's own account of what it built. It includes no PyTorch header: 2 s to compile.

#include <string>

#include <cuda_runtime_api.h>

#if __has_include(<nccl.h>)
#include <nccl.h>
#endif

#include "build_info.h"

namespace freeadv_fast {
namespace {

// The version of the NCCL headers on the include path; nothing here links NCCL.
std::string nccl() {
#ifdef NCCL_VERSION_CODE
  return "\"" + std::to_string(NCCL_MAJOR) + "." + std::to_string(NCCL_MINOR) + "." +
         std::to_string(NCCL_PATCH) + "\"";
#else
  return "null";
#endif
}

}  // namespace

std::string cuda_build_info() {
  // __CUDA_ARCH_LIST__ is nvcc's list of all -gencode targets, for example 800,900.
  const int architectures[] = {__CUDA_ARCH_LIST__};
  std::string list;
  for (int architecture : architectures) {
    if (!list.empty()) list += ", ";
    list += "\"" + std::to_string(architecture / 100) + "." +
            std::to_string(architecture / 10 % 10) + "\"";
  }
  return "\"cuda\": \"" + std::to_string(CUDART_VERSION / 1000) + "." +
         std::to_string(CUDART_VERSION / 10 % 100) + "\", \"cuda_architectures\": [" + list +
         "], \"nccl\": " + nccl();
}

}  // namespace freeadv_fast
