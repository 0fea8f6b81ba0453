"""The benchmark scripts run and write what bench/README.md says; speed is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def run_script(repository, *arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(repository / "bench" / arguments[0]), *map(str, arguments[1:])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_ladder_runs_on_a_cpu(repository, tmp_path):
    out = tmp_path / "results" / "ladder.json"
    done = run_script(repository, "run_gpu.py", "--tiny", "--out", out)
    assert done.returncode == 0, done.stderr
    sections = json.loads(out.read_text())["sections"]
    assert {name: entry.get("error") for name, entry in sections.items()} == dict.fromkeys(
        ["step_resnet50_224", "kernels", "input_gradient", "step_preact_resnet18_32"]
    )
    step = sections["step_preact_resnet18_32"]
    assert set(step["results"]) == {"natural", "free", "plain"}
    assert step["time_ratios"]["free_over_natural"]["n"] == 3
    assert sections["kernels"]["copy"]["gb_per_second"] > 0
    command = json.loads(out.read_text())["environment"]["command"]
    assert command.startswith("python bench/run_gpu.py --tiny")


def test_peak_memory_of_a_process_of_its_own(repository):
    flags = "--arch resnet18 --image-size 32 --batch-size 2 --m 2 --memory-of free".split()
    done = run_script(repository, "bench_step.py", *flags)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout.splitlines()[-1])
    assert "VmHWM" in peak["kind"]
    # resnet18's weights, gradients and momentum are 3 x 43 MiB.
    assert 100 < peak["peak_mib"] < 1000
