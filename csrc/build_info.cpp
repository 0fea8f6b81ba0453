// freeadv_fast::build_info(): how this extension was compiled, as JSON. The first op, and the
// module's entry point.
//
// <torch/library.h> instead of <torch/extension.h>: 5 s instead of 25 s to compile, and nothing of
// Python's C API but PyInit, so that one binary (abi3) serves every Python from 3.11 on.

#include <Python.h>

#include <string>

#include <torch/library.h>
#include <torch/version.h>

#include "build_info.h"

namespace freeadv_fast {
namespace {

std::string quoted(const std::string& text) { return "\"" + text + "\""; }

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

std::string build_info() {
  std::string json = "{\"compiler\": " + quoted(compiler());
  json += ", \"cxx_standard\": " + std::to_string(__cplusplus / 100 % 100);
  json += ", \"torch\": " + quoted(TORCH_VERSION);
#ifdef FREEADV_FAST_WITH_CUDA
  json += ", " + cuda_build_info();
#else
  json += ", \"cuda\": null, \"cuda_architectures\": [], \"nccl\": null";
#endif
  return json + "}";
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(freeadv_fast, library) { library.def("build_info() -> str", &build_info); }

}  // namespace freeadv_fast

// `import freeadv_fast._C` loads the ops above; the module itself stays empty.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
