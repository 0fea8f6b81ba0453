"""What a machine offers for compiling `freeadv_fast._C`; standard library only.

setup.py loads this file by path, before the package and even torch are installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path


def find_cxx() -> str | None:
    """The C++ compiler: $CXX, else the first of c++, g++, clang++ on PATH; None without one."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    return None


def has_python_headers() -> bool:
    """Whether Python.h of the running interpreter is installed."""
    return any(
        Path(folder, "Python.h").is_file()
        for folder in (sysconfig.get_path("include"), sysconfig.get_path("platinclude"))
    )


def missing_packages() -> list[str]:
    """The Debian packages to install before `freeadv_fast._C` can be compiled."""
    missing = [] if find_cxx() else ["g++"]
    return missing if has_python_headers() else [*missing, "python3-dev"]


def find_cuda_home() -> Path | None:
    """The CUDA toolkit's folder (the one with include/cuda_runtime.h), or None.

    An nvcc on PATH may be a link or a wrapper script far from its toolkit, so nvcc itself is
    asked where it lives.
    """
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    if nvcc:
        dryrun = _output([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull])
        homes += [Path(line).parent for line in re.findall(r"^#\$ _HERE_=(.+)$", dryrun, re.M)]
        homes.append(Path(nvcc).resolve().parent.parent)
    homes.append(Path("/usr/local/cuda"))
    for home in homes:
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return home.resolve()
    return None


def nvcc_version(cuda_home: Path) -> str | None:
    """The release of `cuda_home`'s nvcc, such as ``13.0``; None when it does not run."""
    match = re.search(r"release (\d+\.\d+)", _output([str(cuda_home / "bin" / "nvcc"), "-V"]))
    return match[1] if match else None


def has_nvidia_apex() -> bool:
    """Whether NVIDIA's apex is installed.

    PyPI's package `apex` is an unrelated web toolkit, so the name alone proves nothing, and
    importing it to find out would run its code. NVIDIA's has a subpackage `optimizers`.
    """
    spec = importlib.util.find_spec("apex")
    folders = (spec.submodule_search_locations if spec else None) or []
    return any(Path(folder, "optimizers", "__init__.py").is_file() for folder in folders)


def _output(command: list[str]) -> str:
    """What a command prints on both streams; empty when it cannot start."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr
