// What the CUDA part of the extension reports about itself.
#pragma once

#include <string>

namespace freeadv_fast {

// JSON members of build_info(): "cuda": "13.0", "cuda_architectures": ["8.0"], "nccl": "2.28.9".
std::string cuda_build_info();

}  // namespace freeadv_fast
