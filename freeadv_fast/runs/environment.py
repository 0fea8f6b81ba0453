"""Where a run happens: code, versions, hardware and how the extension was built.

`environment()` is what env.json holds; `versions()` is its part that result.json repeats. Both ask
packages for their metadata and import nothing heavier than torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from freeadv_fast import toolchain

T = TypeVar("T")

CHECKOUT = Path(__file__).resolve().parents[2]


def build_info() -> dict[str, Any]:
    """How `freeadv_fast._C` was compiled, or why it is not there.

    Returns:
        The JSON of the op `freeadv_fast::build_info` (compiler, cxx_standard, torch, cuda,
        cuda_architectures, nccl) with `extension` naming its file; without the extension
        ``{"extension": None, "why": <one line>}``.
    """
    try:
        import freeadv_fast._C as extension
    except ImportError as error:
        return {"extension": None, "why": _why_no_extension(error)}
    info: dict[str, Any] = json.loads(torch.ops.freeadv_fast.build_info())
    return {"extension": Path(extension.__file__).name, **info}


def _why_no_extension(error: ImportError) -> str:
    """One line: what to install, or what is wrong with the file that is there."""
    if importlib.util.find_spec("freeadv_fast._C") is not None:
        reason = " ".join(str(error).split())
        return f"freeadv_fast._C does not load, build it again with `make clean run`: {reason}"
    missing = toolchain.missing_packages()
    if missing:
        return f"freeadv_fast._C needs {' and '.join(missing)}: apt install {' '.join(missing)}"
    return "freeadv_fast._C was not built: pip install --no-build-isolation -v . says why"


def versions() -> dict[str, str | None]:
    """Versions that decide whether a run can be repeated bit by bit; None where absent."""
    return {
        "freeadv_fast": _installed("freeadv-fast"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _installed("torchvision"),
        "triton": _installed("triton"),
        "timm": _installed("timm"),
        "numpy": _installed("numpy"),
        "dali": _installed("nvidia-dali-cuda130") or _installed("nvidia-dali-cuda120"),
        "cuda": torch.version.cuda,
        "cudnn": or_none(_cudnn_version),
        "nccl": or_none(_nccl_version),
    }


def hardware() -> dict[str, Any]:
    """The processors a run computes on."""
    has_gpu = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "gpus": gpus if has_gpu else [],
        "gpu_driver": or_none(_gpu_driver) if has_gpu else None,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
    }


def environment(ranks: int = 1) -> dict[str, Any]:
    """Everything that env.json records about one session of a run.

    Args:
        ranks: Number of processes of the run.
    """
    return {
        "command": [sys.executable, *sys.argv],
        "git": or_none(lambda: git_state(CHECKOUT)),
        "versions": versions(),
        "hardware": hardware(),
        "hostname": or_none(socket.gethostname),
        "platform": or_none(platform.platform),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
        "build": or_none(build_info),
        "apex": or_none(toolchain.has_nvidia_apex),
    }


def or_none(ask: Callable[[], T]) -> T | None:
    """What a machine says about itself; None where asking fails, for no run fails for that.

    Drivers, package metadata and git raise whatever they like.
    """
    try:
        return ask()
    except Exception:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of a checkout and whether its files differ from it; None outside of one.

    Measured results are no part of it: a benchmark's own would make its next call another commit's.
    """
    if not (folder / ".git").exists():
        return None
    commit = _command_output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    files = [".", ":(exclude)bench/results"]
    changes = _command_output(["git", "-C", str(folder), "status", "--porcelain", "--", *files])
    return {"commit": commit, "dirty": bool(changes)} if commit else None


def _installed(distribution: str) -> str | None:
    """Version of an installed distribution, read without importing it; None where absent."""
    return or_none(lambda: importlib.metadata.version(distribution))


def _cudnn_version() -> str | None:
    """CuDNN's version as its own integer, such as ``91900``."""
    if torch.version.cuda is None:
        return None
    return str(torch.backends.cudnn.version())


def _nccl_version() -> str | None:
    """Version of the NCCL that torch runs."""
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return None
    return ".".join(str(part) for part in torch.cuda.nccl.version())


def _gpu_driver() -> str | None:
    """NVIDIA's driver version; one per machine."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (_command_output(query) or "").split("\n")[0] or None


def _cpu_model() -> str:
    """The processor's name as Linux reports it."""
    cpuinfo = or_none(lambda: Path("/proc/cpuinfo").read_text(encoding="utf-8")) or ""
    for line in cpuinfo.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _command_output(command: list[str]) -> str | None:
    """Output of a command that may be missing or fail; None then."""
    done = or_none(
        lambda: subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    )
    return done.stdout.strip() if done else None
