"""The whole ladder on one GPU in two parts of under nine minutes, each written to one JSON.

    python bench/run_gpu.py --out bench/results/h200/ladder.json --data /imagenette
    python bench/run_gpu.py --part 2 --out bench/results/h200/ladder-methods.json --data /imagenette
    python bench/run_gpu.py --tiny --out /tmp/ladder.json        # a CPU, to prove the script

Every section is a process of its own with its own time limit: one that fails, hangs or runs out of
memory is recorded with its error and the others go on. The file is rewritten after each section.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F

from freeadv_fast.models.zoo import build_model

BENCH = Path(__file__).resolve().parent
# Below this a section is not started: the process, CUDA and the network need about as long.
SHORTEST_SECTION_S = 20


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the ladder.

    Attributes:
        name: Its key in the result.
        command: Script and flags; ``--out FILE`` is added where `writes_out`.
        limit_s: Seconds after which it is ended.
        writes_out: Whether it writes its own JSON; else its last line of output is the result.
    """

    name: str
    command: list[str]
    limit_s: float
    writes_out: bool = True


def main() -> None:
    """Runs the sections, or, as a child, the one that lives in this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="ImageFolder with train/ and val/: loader and a short run")
    parser.add_argument(
        "--part", type=int, choices=(1, 2), default=1, help="1: free training; 2: the other methods"
    )
    parser.add_argument("--budget", type=float, default=530, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to prove the script")
    parser.add_argument("--only", nargs="+", help="names of the sections to run")
    parser.add_argument("--input-gradient", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    flags = parser.parse_args()
    if flags.input_gradient:
        print(json.dumps(input_gradient(flags.input_gradient, flags.tiny)))
        return
    device = harness.default_device()
    parts = {1: ladder, 2: methods_ladder}
    sections = [s for s in parts[flags.part](flags) if not flags.only or s.name in flags.only]
    deadline = time.monotonic() + flags.budget
    record: dict[str, Any] = {
        "benchmark": "ladder",
        "environment": harness.environment_record(device),
        "sections": {},
    }
    for section in sections:
        left = deadline - time.monotonic()
        if left < SHORTEST_SECTION_S:
            outcome: dict[str, Any] = {"skipped": "the time was up"}
        else:
            print(f"== {section.name} (at most {min(left, section.limit_s):.0f} s)", flush=True)
            outcome = run_section(section, min(left, section.limit_s))
        if "error" in outcome:
            print(f"{section.name} failed: {outcome['error'][-300:]}", flush=True)
        record["sections"][section.name] = outcome
        if flags.out:
            harness.write_json(flags.out, record)
    print(f"{sum(s.get('wall_s', 0) for s in record['sections'].values()):.0f} s in all")
    if all("error" in outcome for outcome in record["sections"].values()):
        sys.exit(1)


def ladder(flags: argparse.Namespace) -> list[Section]:
    """The sections in order of importance: what time cuts off comes last."""
    tiny = flags.tiny
    sections = [
        step_section("step_resnet50_224", "resnet50", 224, 256, 110, flags),
        Section(
            "kernels",
            ["bench/bench_kernels.py", "--seconds", "1" if tiny else "25"]
            + (["--shape", "2", "16", "16", "3"] if tiny else []),
            60,
        ),
        Section(
            "input_gradient",
            ["bench/run_gpu.py", "--input-gradient", "1" if tiny else "40"]
            + (["--tiny"] if tiny else []),
            80,
            writes_out=False,
        ),
        step_section("step_preact_resnet18_32", "preact-resnet18", 32, 128, 50, flags),
        step_section("step_wrn_32_10_32", "wrn-32-10", 32, 128, 60, flags),
    ]
    if tiny:
        sections = [s for s in sections if s.name != "step_wrn_32_10_32"]
    if flags.data:
        if has_dali():
            command = ["bench/bench_loader.py", "--data", flags.data, "--seconds", "30"]
            sections.append(Section("loader", command, 90))
        sections.append(run_section_of("free_run", "imagenet_free.py", ["--m", "4"], flags))
    return sections


def methods_ladder(flags: argparse.Namespace) -> list[Section]:
    """What the other methods cost in natural steps, the exchange, and two short runs to compare."""
    advprops = ["--methods", "natural,fast-advprop,advprop"]
    family = ["--methods", "natural,fgsm-rs,n-fgsm,gradalign,pgd,free", "--attack-steps", "2"]
    rows = ["bench/bench_shuffle.py"] + (["--rounds", "3"] if flags.tiny else [])
    sections = [
        step_section("step_advprop_resnet50_224", "resnet50", 224, 320, 110, flags, advprops),
        step_section("step_family_preact_32", "preact-resnet18", 32, 128, 90, flags, family),
        Section("shuffle", rows, 90),
    ]
    if flags.data:
        for method in ("fast_advprop", "natural"):  # as many passes, so the same budget
            trained = run_section_of(f"{method}_run", f"imagenet_{method}.py", [], flags)
            sections += [trained, corruptions_section(f"{method}_corruptions", trained)]
    return sections


def has_dali() -> bool:
    """Whether NVIDIA DALI is installed."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # nothing of NVIDIA's is
        return False


def step_section(
    name: str,
    arch: str,
    size: int,
    batch: int,
    limit_s: float,
    flags: argparse.Namespace,
    more: list[str] | None = None,
) -> Section:
    """bench_step on one network; a third of the limit is for the processes and peak memory."""
    command = ["bench/bench_step.py", "--arch", arch, "--image-size", str(size)]
    if flags.tiny:
        command = ["bench/bench_step.py", "--arch", "resnet18", "--image-size", "32"]
        command += ["--batch-size", "10" if more else "2", "--m", "2", "--rounds", "3"]
        command += ["--no-memory"]
    else:
        command += ["--batch-size", str(batch), "--seconds", str(limit_s / 3)]
    return Section(name, command + (more or []), limit_s)


def run_section_of(name: str, script: str, more: list[str], flags: argparse.Namespace) -> Section:
    """A short run from JPEG files through the trainer; passes_per_second is in its log."""
    folder = Path(tempfile.mkdtemp(prefix="freeadv-ladder-")) / "run"
    passes = "64" if flags.tiny else "150000"
    command = [f"launch/{script}", "--data", flags.data, "--max-passes", passes, *more]
    command += ["--output-dir", str(folder), "--eval-images", "64", "--eval-attacks", "pgd-10"]
    if flags.tiny:
        command += ["--arch", "resnet18", "--image-size", "32", "--batch-size", "10"]
        command += ["--workers", "2", "--holdout-images", "0"]
        command += ["--aux-bn-group", "2"] if "advprop" in script else []
    return Section(name, command, 90, writes_out=False)


def corruptions_section(name: str, trained: Section) -> Section:
    """The corruptions made on the fly, on a run that another section has trained."""
    command = ["launch/robustness.py", run_folder(trained), "--on-the-fly", "--eval-images", "200"]
    return Section(name, command, 60, writes_out=False)


def run_folder(section: Section) -> str:
    """The output folder in a section's command."""
    return section.command[section.command.index("--output-dir") + 1]


def run_section(section: Section, limit_s: float) -> dict[str, Any]:
    """Runs one section to its end or its limit; never raises for what the section does."""
    command = [sys.executable, *section.command]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "section.json"
        if section.writes_out:
            command += ["--out", str(out)]
        status, output = run_limited(command, limit_s)
        outcome: dict[str, Any] = {
            "command": " ".join(["python", *section.command]),
            "wall_s": time.monotonic() - start,
        }
        if status != 0:
            return {**outcome, "error": f"status {status}: {output.strip()[-1500:]}"}
        print(output.strip()[-2000:], flush=True)
        if section.writes_out:
            result = json.loads(out.read_text())
            del result["environment"]  # the record's own
            return {**outcome, **result}
    if section.name.endswith("_run"):
        return {**outcome, **read_run(Path(run_folder(section)))}
    if section.name.endswith("_corruptions"):
        (found,) = Path(section.command[1]).glob("robustness-*.json")
        return {**outcome, **json.loads(found.read_text())}
    return {**outcome, **json.loads(output.strip().splitlines()[-1])}


def run_limited(command: list[str], limit_s: float) -> tuple[int | str, str]:
    """Status and output of a process group that is ended at its limit."""
    process = subprocess.Popen(
        command,
        cwd=BENCH.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return f"ended after {limit_s:.0f} s", output


def read_run(folder: Path) -> dict[str, Any]:
    """Result and log of a run."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return {
        "result": json.loads((folder / "result.json").read_text()),
        "log": [json.loads(line) for line in lines],
    }


def input_gradient(seconds: float, tiny: bool) -> dict[str, Any]:
    """Eager ResNet-50 forward and backward, with and without the input's gradient, per dtype.

    No optimizer, no kernels of ours: what the input gradient alone costs in this PyTorch.
    """
    device = harness.default_device()
    torch.backends.cudnn.benchmark = True
    size, batch = (32, 2) if tiny else (224, 256)
    net = build_model("resnet50", 1000, image_size=size).to(
        device, memory_format=torch.channels_last
    )
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if device.type == "cpu":
        dtypes = {"fp32": torch.float32}

    def one_pass(x: torch.Tensor) -> None:
        with torch.autocast(device.type, x.dtype, enabled=x.dtype is not torch.float32):
            logits = net(x)
        F.cross_entropy(logits.float(), labels).backward()
        net.zero_grad(set_to_none=True)
        x.grad = None

    calls = {}
    for name, dtype in dtypes.items():
        x = torch.randn(batch, 3, size, size, device=device).to(
            dtype, memory_format=torch.channels_last
        )
        leaf = x.clone().requires_grad_()
        calls[f"{name}_weights_only"] = lambda x=x: one_pass(x)
        calls[f"{name}_with_input"] = lambda leaf=leaf: one_pass(leaf)
    times = harness.measure(calls, device=device, seconds=seconds, warmup=3)
    ratios = {
        name: harness.pairwise_ratio(times[f"{name}_with_input"], times[f"{name}_weights_only"])
        for name in dtypes
    }
    rates = {name: batch / entry["median"] for name, entry in times.items()}
    return {"images_per_second": rates, "time_ratios": ratios, "seconds": times}


if __name__ == "__main__":
    main()
