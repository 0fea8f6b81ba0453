"""Honest timing: candidates in turn, medians with spread, and a record of where it ran.

Other users of a machine, clock changes and warm caches drift over minutes. Candidates therefore
take turns, one call each per round, in an order that rotates; a comparison between two of them
is made within each round. `measure` returns every sample.

Scripts in this folder import it as `harness` (Python puts a script's folder on its path).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from freeadv_fast.runs import environment

REPOSITORY = Path(__file__).resolve().parents[1]

# Several times the L2 of today's GPUs (H100, H200: 50 to 60 MB), and long enough to overwrite that
# the host is ahead of the GPU when the timed call starts.
FLUSH_BYTES = 512 << 20

# Freed blocks above 128 KiB go back to the system at once, so that a peak is what was in use.
CPU_MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def summarize(samples: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile and number of samples."""
    ordered = sorted(samples)
    rank = (len(ordered) - 1) / 5
    low, high = ordered[round(rank)], ordered[round(len(ordered) - 1 - rank)]
    return {"median": statistics.median(ordered), "p20": low, "p80": high, "n": len(ordered)}


def measure(
    candidates: dict[str, Callable[[], object]],
    *,
    device: torch.device,
    seconds: float | None = None,
    rounds: int | None = None,
    warmup: int = 2,
    flush: bool = False,
) -> dict[str, dict[str, Any]]:
    """Times functions in turn.

    Args:
        candidates: What to time, by name; each call does the same work every time.
        device: cuda: time between two events on the GPU. cpu: wall clock.
        seconds: Start no further round after so long, warm-up not counted.
        rounds: Number of rounds, at most; at least 3 are made whatever the time.
        warmup: Calls of each candidate before the first round: compilation, autotuning, caches.
        flush: Whether to overwrite a GPU's L2 cache before each call.

    Returns:
        For each name the summary of seconds per call (median, p20, p80, n) and all `samples`;
        sample i of every candidate is from round i. On a CPU `cpu_seconds` is the same of the
        processor time, which other users of the machine disturb far less.
    """
    if seconds is None and rounds is None:
        raise ValueError("measure needs seconds, rounds or both")
    for function in candidates.values():
        for _ in range(warmup):
            function()
    is_gpu = device.type == "cuda"
    junk = torch.empty(FLUSH_BYTES // 4, device=device) if flush and is_gpu else None
    time_call = _time_on_gpu if is_gpu else _time_on_cpu
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    cpu_samples: dict[str, list[float]] = {name: [] for name in names}
    start, done = time.monotonic(), 0
    while rounds is None or done < rounds:
        if seconds is not None and done >= 3 and time.monotonic() - start >= seconds:
            break
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
            cpu_start = time.process_time()
            samples[name].append(time_call(candidates[name], junk))
            cpu_samples[name].append(time.process_time() - cpu_start)
        done += 1
    result: dict[str, dict[str, Any]] = {name: _with_samples(samples[name]) for name in names}
    if not is_gpu:
        for name in names:
            result[name]["cpu_seconds"] = _with_samples(cpu_samples[name])
    return result


def make_missing(
    keys: Sequence[tuple[Any, ...]],
    make: Callable[..., dict[str, Any]],
    record: dict[str, Any],
    names: Sequence[str],
    out: Path,
    jobs: int = 1,
) -> list[dict[str, Any]]:
    """The runs of a study in their order; those that its record lacks are made and kept.

    Args:
        keys: What tells one run from another, each as `make` takes it.
        make: Makes one run and returns its row; from several threads where `jobs` allows.
        record: The study's; its ``runs`` grows.
        names: The row's fields that hold the key.
        out: JSON file, written after every run.
        jobs: Runs at a time.
    """
    made = {tuple(row[name] for name in names): row for row in record["runs"]}
    writing = threading.Lock()

    def one(key: tuple[Any, ...]) -> dict[str, Any]:
        if key in made:
            return made[key]
        row = make(*key)
        with writing:
            record["runs"].append(row)
            write_json(out, record)
        return row

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, keys))


def with_earlier_runs(record: dict[str, Any], out: Path) -> dict[str, Any]:
    """A study's record with the runs of an earlier call, if that had the same settings."""
    if out.is_file():
        earlier = json.loads(out.read_text())
        if earlier["settings"] == record["settings"]:
            record["runs"] = earlier["runs"]
    return record


def _with_samples(samples: list[float]) -> dict[str, Any]:
    """The summary with what it is of."""
    return {**summarize(samples), "samples": samples}


def pairwise_ratio(numerator: dict[str, Any], denominator: dict[str, Any]) -> dict[str, float]:
    """Summary of the ratio of two candidates of one `measure`, taken within each round."""
    pairs = zip(numerator["samples"], denominator["samples"], strict=True)
    return summarize([a / b for a, b in pairs])


def _time_on_cpu(function: Callable[[], object], junk: None) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _time_on_gpu(function: Callable[[], object], junk: torch.Tensor | None) -> float:
    """Seconds between events around one call, which finds an idle GPU and, after `junk`, no L2."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if junk is not None:
        junk.zero_()
    before.record()
    function()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1000


def graphed(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same GPU work as one CUDA graph, so that a short kernel is timed without its launch.

    On a CPU the function itself.
    """
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def launch() -> None:
        graph.replay()

    # The tensors at the recorded addresses may belong to `function` alone.
    launch.function = function  # type: ignore[attr-defined]
    return launch


class MemoryMeter:
    """Peak memory from now on. One candidate per process: see `in_child`.

    On a GPU the allocator's peak (`max_memory_allocated`), everything that lives included. On a
    CPU the growth of the resident set (Linux's VmHWM) since this object was made; make it after
    the imports and before the network.
    """

    def __init__(self, device: torch.device) -> None:
        """Starts here."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.init()  # before it the allocator knows no device, and has no peak to reset
        self.before = 0 if device.type == "cuda" else _status_bytes("VmRSS")
        self.forget_peak()

    def forget_peak(self) -> None:
        """Counts from what is in use now; what came before, such as autotuning, is left out."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):  # some containers forbid it: then all counts
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def peak_mib(self) -> float:
        """The peak so far in MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return (_status_bytes("VmHWM") - self.before) / 2**20

    @property
    def kind(self) -> str:
        """What `peak_mib` counts, for the record."""
        if self.device.type == "cuda":
            return "torch.cuda.max_memory_allocated of a process of its own"
        return "growth of VmHWM over the imports' VmRSS, in a process of its own"


def _status_bytes(field: str) -> int:
    """A memory field of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def in_child(arguments: list[str], timeout: float | None = None) -> dict[str, Any]:
    """Runs a script of this folder in a fresh process; its last line of output is JSON.

    Args:
        arguments: Script name and flags.
        timeout: Seconds after which the child is ended.

    Raises:
        RuntimeError: the child failed; the message ends with what it said.
    """
    command = [sys.executable, str(REPOSITORY / "bench" / arguments[0]), *arguments[1:]]
    done = subprocess.run(
        command,
        env={**os.environ, **CPU_MEMORY_ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip()[-800:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def environment_record(device: torch.device) -> dict[str, Any]:
    """What a result must say about its origin: hardware, versions, commit, command, date."""
    return {
        "command": f"python bench/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "hardware": environment.hardware(),
        "gpu_clocks": _gpu_clocks() if device.type == "cuda" else None,
        "versions": environment.versions(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "git": environment.git_state(REPOSITORY),
    }


def _gpu_clocks() -> str | None:
    """Current and largest SM and memory clock, as nvidia-smi reports them."""
    fields = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
