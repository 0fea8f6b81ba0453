"""The Slurm script with stand-ins for Slurm's commands: it saves, requeues and resumes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$SCONTROL_LOG"; fi
"""


TORCHRUN = """#!/bin/bash
echo "$@"
"""


def test_jobs_on_a_node_have_ports_of_their_own(repository, tmp_path):
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    ports = set()
    for job in ("77", "78", "12345678"):
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NNODES": "1", "SLURM_JOB_ID": job,
        }  # fmt: skip
        command = ["bash", repository / "launch" / "slurm" / "train.sbatch", tmp_path / "run", "x"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        ports.add(int(re.search(r"--rdzv-endpoint localhost:(\d+) ", done.stdout)[1]))
    assert ports == {20077, 20078, 25678}


@pytest.mark.slow
def test_a_job_out_of_time_is_requeued_and_goes_on(repository, small_images, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    asked = tmp_path / "scontrol.log"
    environment = os.environ | {
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SCONTROL_LOG": str(asked), "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "77", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    folder = tmp_path / "run"
    command = [
        "bash", repository / "launch" / "slurm" / "train.sbatch", folder,
        repository / "launch" / "imagenet_fast_advprop.py", "--data", small_images,
        "--arch", "test_resnet", "--image-size", "16", "--batch-size", "10", "--p-adv", "0.4",
        "--epochs", "8", "--holdout-images", "6", "--eval-images", "8", "--workers", "1",
        "--eval-attacks", "pgd-2", "--log-every", "2", "--aux-bn-group", "2",
    ]  # fmt: skip
    job = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    log, deadline = folder / "log.jsonl", time.monotonic() + 180
    while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
        assert job.poll() is None, job.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    _, complaint = job.communicate(timeout=400)
    assert job.returncode == 0, complaint
    assert asked.read_text() == "requeue 77\n"
    assert not (folder / "result.json").exists()

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stdout
    passes = [json.loads(line)["passes"] for line in log.read_text().splitlines()]
    assert passes == sorted(passes)
    assert json.loads((folder / "result.json").read_text())["passes"] == passes[-1]
