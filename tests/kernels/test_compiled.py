"""The compiled kernels three ways: interpreted, ahead of time, and on a GPU.

The first two need opposite settings of TRITON_INTERPRET before Triton is imported, hence a process
each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

HERE = Path(__file__).parent
BY_VALUE = pytest.mark.parametrize(
    "files",
    [
        # Small ones together, for a process takes seconds to start.
        "compiled_kernels.py compiled_stem_convolution.py compiled_product_norm.py",
        "compiled_batch_norm.py compiled_block_sum.py compiled_norm_pool.py",
        "compiled_training.py",
        "compiled_lalr.py compiled_sgd.py compiled_averaging.py compiled_cross_entropy.py",
    ],
)


def run(files: str, tmp_path: Path, interpret: bool, *flags: str) -> None:
    """Runs the tests in files of this folder in a fresh process; `flags` are pytest's."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1" if interpret else "0",
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "OMP_NUM_THREADS": "1",
    }
    # The fixtures of conftest.py import for 3 s, and no test there asks for one.
    options = ["-q", "-p", "no:cacheprovider", "--noconftest", *flags]
    command = [sys.executable, "-m", "pytest", *options, *map(HERE.joinpath, files.split())]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
@BY_VALUE
def test_interpreted_kernels_equal_the_references(files, tmp_path):
    run(files, tmp_path, True, "-x")


@pytest.mark.slow
@pytest.mark.parametrize(
    "files",
    [
        "ahead_of_time.py ahead_of_time_cross_entropy.py ahead_of_time_product_norm.py",
        "ahead_of_time_batch_norm.py ahead_of_time_norm_pool.py",
        "ahead_of_time_optimizers.py ahead_of_time_stem_convolution.py",
    ],
)
def test_kernels_compile_ahead_of_time(files, tmp_path):
    run(files, tmp_path, False, "-x")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BY_VALUE
def test_kernels_on_the_device(files, tmp_path):
    """Four at a time, for a file compiles up to 230 kernels; past failures, for GPUs are rare."""
    run(files, tmp_path, False, "-n", "4")
