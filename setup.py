"""Builds freeadv_fast: the package, its kernels and, where the machine can, the extension _C.

The metadata is in pyproject.toml. What is decided here: `kernels/` is installed as
`freeadv_fast.kernels`, and `freeadv_fast._C` is compiled from `csrc/`: the C++ sources where there
are a compiler, Python.h and torch, the CUDA sources too where nvcc fits torch's CUDA. A machine
that lacks any of these gets the package without that part, and one line that says why.

FREEADV_FAST_EXTENSION=auto|none|cpp|cuda overrides the choice; a build that cannot deliver the
`cpp` or `cuda` it was asked for fails. TORCH_CUDA_ARCH_LIST picks the CUDA architectures.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
except ImportError:  # pip's build isolation hides an installed torch
    torch = None

ROOT = Path(__file__).resolve().parent
WANTED = os.environ.get("FREEADV_FAST_EXTENSION", "auto")
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0"

# Loaded by path: PEP 517 builds do not put the source tree on sys.path.
_spec = importlib.util.spec_from_file_location("toolchain", ROOT / "freeadv_fast/toolchain.py")
toolchain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toolchain)


# No product is fused with a sum: codecs give the bits of their formula on every machine. By default
# nvcc fuses, and so does gcc where the processor can (64-bit Arm). Python's own flags ask for debug
# information: half of shuffle_exchange.cpp's 54 s, and 7.8 of its object's 8.1 MB.
COMPILER_FLAGS = {
    "cxx": ["-O3", "-Wall", "-ffp-contract=off", "-g0"],
    "nvcc": ["-O3", "-fmad=false"],
}


def leave_out(part: str, why: str) -> None:
    """Says in one line that a part is not built; fails if the user insisted on it."""
    if WANTED in ("cpp", "cuda") and part != "CUDA" or WANTED == "cuda":
        raise SystemExit(f"freeadv_fast: FREEADV_FAST_EXTENSION={WANTED}, but {why}")
    print(f"freeadv_fast: building without {part}: {why}", flush=True)


def why_no_extension() -> str | None:
    """Why nothing of csrc/ can be compiled here; None when the C++ part can."""
    missing = toolchain.missing_packages()
    if WANTED == "none":
        return "FREEADV_FAST_EXTENSION=none"
    if missing:
        return f"install {' and '.join(missing)} first (apt install {' '.join(missing)})"
    if torch is None:
        return "torch cannot be imported (install torch first, then use --no-build-isolation)"
    return None


def why_no_cuda() -> str | None:
    """Why the CUDA sources cannot be compiled here; None when they can."""
    if WANTED == "cpp":
        return "FREEADV_FAST_EXTENSION=cpp"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    cuda_home = toolchain.find_cuda_home()
    if cuda_home is None:
        return "no CUDA toolkit (nvcc and cuda_runtime.h) was found"
    nvcc = toolchain.nvcc_version(cuda_home)
    if nvcc is None or nvcc.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc {nvcc} does not fit torch's CUDA {torch.version.cuda}"
    return None


def sources(*suffixes: str) -> list[str]:
    """The files of csrc/ with these suffixes, relative to the root as setuptools wants them."""
    return sorted(
        f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.suffix in suffixes
    )


def pypi_cuda_folders(kind: str) -> list[str]:
    """`include` or `lib` folders of NVIDIA's PyPI packages (nvidia/cu13, nvidia/nccl, ...)."""
    site_packages = Path(torch.__file__).parents[1]
    return sorted(str(path) for path in site_packages.glob(f"nvidia/*/{kind}"))


def runtime_paths() -> list[str]:
    """Linker flags with which `import freeadv_fast._C` finds torch's libraries before torch does.

    torch lies beside the package in a site-packages, and where it was built against in an editable
    installation. Once torch is imported its libraries are loaded, and nobody looks for them.
    """
    site_packages = Path(torch.__file__).parents[1]
    folders = [Path(torch.__file__).parent / "lib", *map(Path, pypi_cuda_folders("lib"))]
    needed = [f for f in folders if any(f.glob("libc10.so")) or any(f.glob("libcudart.so*"))]
    return [
        f"-Wl,-rpath,{place}"
        for folder in needed
        for place in (f"$ORIGIN/../{folder.relative_to(site_packages)}", folder)
    ]


def describe_extension(with_cuda: bool) -> Extension:
    """freeadv_fast._C for torch's BuildExtension, with or without the CUDA sources."""
    from torch.utils import cpp_extension

    make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    extension = make(
        "freeadv_fast._C",
        sources(".cpp", ".cu") if with_cuda else sources(".cpp"),
        include_dirs=[str(ROOT / "csrc")],
        depends=sources(".h"),
        define_macros=[("FREEADV_FAST_WITH_CUDA", "1")] if with_cuda else [],
        extra_compile_args=COMPILER_FLAGS,
        py_limited_api=True,
    )
    extension.extra_link_args += runtime_paths()
    if not with_cuda:
        return extension
    # Last, so that the toolkit's own headers win: they are the ones its nvcc was made for. PyPI's
    # fill the gaps (nccl.h; cublas and cusparse where the toolkit was installed without them).
    extension.include_dirs += pypi_cuda_folders("include")
    if not any(Path(d, "libcudart.so").exists() for d in extension.library_dirs):
        # A toolkit from PyPI has libcudart.so.13 only. Nothing needs to find it at run time: torch
        # has loaded it before _C is imported.
        extension.libraries.remove("cudart")
        extension.library_dirs += pypi_cuda_folders("lib")
        extension.extra_link_args.append(f"-l:libcudart.so.{torch.version.cuda.split('.')[0]}")
    return extension


def choose_build() -> tuple[list[Extension], type[build_ext]]:
    """What to compile on this machine, and the command that compiles it."""
    if WANTED not in ("auto", "none", "cpp", "cuda"):
        raise SystemExit(f"FREEADV_FAST_EXTENSION={WANTED}: use auto, none, cpp or cuda")
    why = why_no_extension()
    if why:
        leave_out("freeadv_fast._C", why)
        return [], build_ext
    why = why_no_cuda()
    if why:
        leave_out("CUDA", why)
    else:
        # torch's helper takes these from the environment, when it is imported.
        os.environ["CUDA_HOME"] = str(toolchain.find_cuda_home())
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
    # setuptools would compile with the compiler that built Python, which may not be here.
    os.environ["CXX"] = toolchain.find_cxx()
    os.environ.setdefault("CC", os.environ["CXX"])

    from torch.utils.cpp_extension import BuildExtension

    class BuildWithFallback(BuildExtension):
        """Compiles the extension; when the CUDA sources fail, once more without them."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # ninja, distutils and torch each raise their own
                if not any(source.endswith(".cu") for source in self.extensions[0].sources):
                    raise RuntimeError(
                        "the C++ sources of freeadv_fast._C did not compile; to install without "
                        "them, set FREEADV_FAST_EXTENSION=none"
                    ) from error
                leave_out("CUDA", f"its sources did not compile ({error})".replace("\n", " "))
                vars(self.extensions[0]).update(vars(describe_extension(with_cuda=False)))
                self.compiler = None
                super().run()

    return [describe_extension(with_cuda=not why)], BuildWithFallback


extensions, build_command = choose_build()
setup(
    license="Apache-2.0",
    packages=[
        *find_packages(include=["freeadv_fast", "freeadv_fast.*"]),
        "freeadv_fast.kernels",
        *(f"freeadv_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"freeadv_fast.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": build_command},
    # One binary for every Python from 3.11 on: nothing but PyInit touches Python's C API.
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if extensions else {},
)
