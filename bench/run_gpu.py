"""The whole ladder on one GPU: what matters in under seven minutes, the rest in four parts.

    python bench/run_gpu.py --out bench/results/h200/ladder.json [--data /imagenette]
    python bench/run_gpu.py --part 1 --out bench/results/h200/ladder-1.json
    python bench/run_gpu.py --part 2 --out bench/results/h200/ladder-2.json --data /imagenette
    python bench/run_gpu.py --part 3 --out bench/results/h200/ladder-3.json
    python bench/run_gpu.py --part 4 --out bench/results/h200/ladder-4.json --data /imagenette
    python bench/run_gpu.py --tiny --out /tmp/ladder.json   # a CPU, to prove the script

Without a part: the tests marked gpu, the headline step with each of its faster ways switched off in
turn, its profile, the CIFAR networks, peak memory, a run from JPEG files; most important first, and
at the end a page that sums it up. `bench/reproduce.py` says whether it learns what it should, and
`bench/accuracy.py` how accurate the networks are and in how many seconds.

Part 1 measures first: the headline step, the input gradient, batch norm, stem and elementwise
kernels alone, a profile of the eager step, torch.compile. Part 2 is what the other methods cost.
Part 3 is before and after fused kernels and CUDA graphs on three networks. Part 4 is to decide by:
precision, batch size, compiled competitors, optimizers, and the loader and a run from JPEG files.

Every section is a process of its own with its own time limit: one that fails, hangs or runs out of
memory is recorded with its error and the others go on. The file is rewritten after each section;
with --resume a second call keeps the sections that succeeded, if the commit is the same.
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

from freeadv_fast import toolchain
from freeadv_fast.models.zoo import build_model
from freeadv_fast.ops import dispatch

BENCH = Path(__file__).resolve().parent
# Below this a section is not started: the process, CUDA and the network need about as long.
SHORTEST_SECTION_S = 20

# How the trainer's lines begin that tell of a recording or a fusion which did not happen.
SAID = ("graphs: off", "fused batch norm: left", "decoding")

# Faster ways (`ops.dispatch.FAST_PATHS`) that only networks which normalise first take, and those
# that ResNets take. Each costs a recording and a share of the section's seconds.
NORM_FIRST = ["block-sums", "two-readers"]
RESIDUAL = sorted(dispatch.FAST_PATHS.difference(NORM_FIRST))

EAGER = ["--fuse", "off", "--graphs", "off"]
FUSED = ["--fuse", "on", "--graphs", "off"]


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
    parser.add_argument("--data", help="ImageFolder with train/ and val/: loader and short runs")
    parser.add_argument("--part", type=int, choices=tuple(PARTS), default=0, help="see above")
    parser.add_argument("--budget", type=float, help="seconds for everything; 400, of a part 530")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to prove the script")
    parser.add_argument("--only", nargs="+", help="names of the sections to run")
    parser.add_argument("--resume", action="store_true", help="keep what --out has of this commit")
    parser.add_argument("--input-gradient", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    flags = parser.parse_args()
    flags.budget = flags.budget or (530 if flags.part else 400)
    if flags.input_gradient:
        print(json.dumps(input_gradient(flags.input_gradient, flags.tiny)))
        return
    sections = [s for s in PARTS[flags.part](flags) if not flags.only or s.name in flags.only]
    if not sections:
        parser.error(f"--only {' '.join(flags.only)}: no such section in part {flags.part}")
    record = run_sections(sections, flags)
    print(*page(record["sections"]), sep="\n")
    print(f"{sum(s.get('wall_s', 0) for s in record['sections'].values()):.0f} s in all")
    if all("error" in outcome for outcome in record["sections"].values()):
        sys.exit(1)


def run_sections(sections: list[Section], flags: argparse.Namespace) -> dict[str, Any]:
    """Runs sections one after the other until the budget is spent; writes after each."""
    deadline = time.monotonic() + flags.budget
    record: dict[str, Any] = {
        "benchmark": "ladder",
        "environment": harness.environment_record(harness.default_device()),
        "part": flags.part,
        "sections": {},
    }
    if flags.resume and flags.out and flags.out.is_file():
        record["sections"] = succeeded(json.loads(flags.out.read_text()), record["environment"])
    for section in sections:
        if section.name in record["sections"]:
            continue
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
    return record


def succeeded(
    earlier: dict[str, Any], here: dict[str, Any], kind: str = "sections"
) -> dict[str, Any]:
    """What of an earlier record need not run again; nothing of another commit or device."""
    if any(earlier["environment"][key] != here[key] for key in ("git", "device")):
        return {}
    return {
        name: outcome
        for name, outcome in earlier[kind].items()
        if not {"error", "skipped"} & set(outcome)
    }


def essentials(flags: argparse.Namespace) -> list[Section]:
    """What every session with a GPU wants to know."""
    step = ["--methods", "natural,eager,free"]
    tests = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    tests += ["--collect-only"] if flags.tiny else ["-n", str(min(os.cpu_count() or 1, 14))]
    # Apart from the competitor: each recording holds an update's activations.
    each = ["--methods", "free", "--without-each"]
    norm_first = [*each, *NORM_FIRST] + ([] if flags.tiny else ["--m", "8"])
    memory = ["--rounds", "3", *step] if flags.tiny else step
    sections = [
        Section("gpu_tests", tests, 120, writes_out=False),
        step_section("resnet50_224", "resnet50", 224, 256, 8, flags, step),
        step_section(
            "resnet50_224_without", "resnet50", 224, 256, 8, flags, [*each, *RESIDUAL], limit_s=150
        ),
        profile_section("profile_captured", captured(flags), flags),
        step_section(
            "preact_resnet18_32_without", "preact-resnet18", 32, 128, 5, flags, norm_first
        ),
    ]
    for name, arch, seconds in (
        ("preact_resnet18_32", "preact-resnet18", 6),
        ("wrn_32_10_32", "wrn-32-10", 8),
    ):
        more = step if flags.tiny else [*step, "--m", "8"]
        sections.append(step_section(name, arch, 32, 128, seconds, flags, more, limit_s=80))
    dat = ["--methods", "natural,dat"]
    sections.append(step_section("dat_resnet50_224", "resnet50", 224, 256, 4, flags, dat))
    network = ["--arch", "resnet50", "--image-size", "224", "--batch-size", "256"]
    network = ["--image-size", "16", "--batch-size", "2"] if flags.tiny else network
    average = ["bench/bench_average.py", *network, *seconds_of(5, flags)]
    sections.append(Section("average_resnet50_224", average, 60))
    sections.append(
        step_section("memory_resnet50_224", "resnet50", 224, 256, 4, flags, memory, memory=True)
    )
    if flags.data:
        sections.append(run_section_of("free_run", "imagenet_free.py", ["--m", "4"], flags))
        sections.append(run_section_of("natural_run", "imagenet_natural.py", [], flags))
    return sections


def measure_first(flags: argparse.Namespace) -> list[Section]:
    """Part 1, in order of importance: what time cuts off comes last."""
    methods = ["--methods", "natural,free,plain,eager"]
    gradient = ["bench/run_gpu.py", "--input-gradient", "1" if flags.tiny else "25"]
    norms = ["bench/bench_batch_norm.py", *seconds_of(30, flags)]
    stems = ["bench/bench_stem.py", *seconds_of(15, flags)]
    kernels = ["bench/bench_kernels.py", *seconds_of(15, flags)]
    compiles = {"compile": "eager-bf16,default-bf16"}
    compiles["compile_others"] = "layout-bf16,reduce-overhead-bf16,eager-fp16"
    tiny_compile = []
    if flags.tiny:
        gradient += ["--tiny"]
        norms += ["--layers", "6x16", "--batch-size", "2"]
        stems += ["--batch-size", "2", "--image-size", "16"]
        kernels += ["--shape", "2", "16", "16", "3"]
        compiles = {"compile": "eager-fp32"}  # a CPU's compiler takes minutes
        tiny_compile = ["--arch", "resnet18", "--image-size", "32", "--batch-size", "2"]
    step = step_section(
        "step_resnet50_224", "resnet50", 224, 256, 40, flags, methods, limit_s=220, memory=True
    )
    return [
        step,
        Section("input_gradient", gradient, 80, writes_out=False),
        # Each compiles about 40 Triton kernels first, of a second and more each.
        Section("batch_norm", norms, 150),
        Section("stem", stems, 70),
        Section("kernels", kernels, 120),
        profile_section("profile_eager", EAGER, flags),
        *(
            Section(
                name,
                ["bench/bench_compile.py", "--variants", variants]
                + [*seconds_of(8, flags), *tiny_compile],
                300,
            )
            for name, variants in compiles.items()
        ),
    ]


def methods_ladder(flags: argparse.Namespace) -> list[Section]:
    """Part 2: the other methods in natural steps, the exchange, and two short runs to compare."""
    advprops = ["--methods", "natural,fast-advprop,advprop"]
    family = ["--methods", "natural,fgsm-rs,n-fgsm,gradalign,pgd,free", "--attack-steps", "2"]
    launched_apart = ["--methods", "natural,fgsm-rs,pgd,free", "--attack-steps", "2", *FUSED]
    detectors = ["--methods", "natural,eager,free", "--m", "2"]
    of_shares = ["--methods", "natural,fast-advprop", "--m", "1"]  # 16 clean images and 4 attacked
    rows = ["bench/bench_shuffle.py"] + (["--rounds", "3"] if flags.tiny else [])

    def steps(name: str, arch: str, size: int, batch: int, more: list[str]) -> Section:
        return step_section(name, arch, size, batch, 35, flags, more, limit_s=170, memory=True)

    sections = [
        steps("step_advprop_resnet50_224", "resnet50", 224, 320, advprops),
        steps("step_family_preact_32", "preact-resnet18", 32, 128, family),
        steps("step_family_preact_32_uncaptured", "preact-resnet18", 32, 128, launched_apart),
        Section("shuffle", rows, 90),
        steps("step_detection_resnet50_800", "retinanet_resnet50_fpn", 800, 16, detectors),
        steps("step_detection_advprop_800", "retinanet_resnet50_fpn", 800, 20, of_shares),
    ]
    if flags.data:
        for method in ("fast_advprop", "natural"):  # as many passes, so the same budget
            trained = run_section_of(f"{method}_run", f"imagenet_{method}.py", [], flags)
            sections += [trained, corruptions_section(f"{method}_corruptions", trained)]
    return sections


def before_and_after(flags: argparse.Namespace) -> list[Section]:
    """Part 3: each network eager, with fused kernels, and captured as well; then where time goes.

    Natural and free training are timed in turn; the settings are sections, one after the other.
    """
    networks = [
        ("resnet50_224", "resnet50", 224, 256, "4", 12),
        ("preact_resnet18_32", "preact-resnet18", 32, 128, "8", 8),
        ("wrn_32_10_32", "wrn-32-10", 32, 128, "8", 10),
    ]
    settings = {"off": EAGER, "fused": FUSED, "captured": captured(flags)}
    sections = []
    for name, arch, size, batch, m, seconds in networks[:1] if flags.tiny else networks:
        for setting, switches in settings.items():
            more = ["--methods", "natural,free", *switches]
            more += [] if flags.tiny else ["--m", m]
            title = f"{name}_{setting}"
            sections.append(step_section(title, arch, size, batch, seconds, flags, more))
    preact = ["--arch", "preact-resnet18", "--image-size", "32", "--batch-size", "128", "--m", "8"]
    return [
        *sections,
        profile_section("profile_fused", FUSED, flags),
        profile_section("profile_captured", captured(flags), flags),
        profile_section("profile_captured_preact", [*preact, *captured(flags)], flags),
    ]


def try_and_decide(flags: argparse.Namespace) -> list[Section]:
    """Part 4: one choice a section, on ResNet-50 as the trainer runs it by default."""

    def step(name: str, more: list[str], batch: int = 256) -> Section:
        more = ["--methods", "natural,free", *more]
        return step_section(name, "resnet50", 224, batch, 12, flags, more)

    precisions = ("fp32",) if flags.tiny else ("bf16", "fp16")
    sections = [step(f"precision_{name}", ["--precision", name]) for name in precisions]
    sections += [step(f"batch_{batch}", [], batch) for batch in (400, 512)]
    if flags.data:
        sections.append(run_section_of("free_run", "imagenet_free.py", ["--m", "4"], flags))
        if has_dali():
            command = ["bench/bench_loader.py", "--data", flags.data, *seconds_of(30, flags)]
            sections.append(Section("loader", command, 90))
    if not flags.tiny:
        methods = ["--methods", "natural,free,eager,compiled,compiled-free"]
        sections.append(
            step_section("compiled", "resnet50", 224, 256, 30, flags, methods, limit_s=360)
        )
    # No CUDA graph holds the last two, so that all three are compared without one.
    optimizers = ["sgd", "sgd-foreach"] + (["apex-sgd"] if toolchain.has_nvidia_apex() else [])
    for name in optimizers:
        more = ["--graphs", "off", "--optimizer", name]
        sections.append(step(f"optimizer_{name}", more))
    return sections


PARTS = {0: essentials, 1: measure_first, 2: methods_ladder, 3: before_and_after, 4: try_and_decide}


def has_dali() -> bool:
    """Whether NVIDIA DALI is installed."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # nothing of NVIDIA's is
        return False


def seconds_of(seconds: float, flags: argparse.Namespace) -> list[str]:
    """--seconds of a script that takes that flag."""
    return ["--seconds", "1" if flags.tiny else str(seconds)]


def captured(flags: argparse.Namespace) -> list[str]:
    """Flags of a step that is fused and one graph; a CPU has none, so the tiny one asks for it."""
    return ["--fuse", "on", "--graphs", "auto" if flags.tiny else "on"]


def step_section(
    name: str,
    arch: str,
    size: int,
    batch: int,
    seconds: float,
    flags: argparse.Namespace,
    more: list[str],
    *,
    limit_s: float = 120,
    memory: bool = False,
) -> Section:
    """bench_step on one network, with so many seconds for all samples.

    Its peak memory takes a process a method, and so minutes.
    """
    command = ["bench/bench_step.py", "--arch", arch, "--image-size", str(size)]
    if flags.tiny:
        small = "retinanet_resnet10_fpn_64" if arch.startswith("retinanet") else "timm/resnet10t"
        command = ["bench/bench_step.py", "--arch", small, "--image-size", "32"]
        command += ["--batch-size", "10", "--m", "2", "--rounds", "3", "--no-memory"]
    else:
        command += ["--batch-size", str(batch), "--seconds", str(seconds)]
        command += [] if memory else ["--no-memory"]
    return Section(name, command + more, limit_s)


def profile_section(name: str, more: list[str], flags: argparse.Namespace) -> Section:
    """profile_step on ResNet-50, or on the network that `more` names."""
    command = ["bench/profile_step.py", *more]
    if flags.tiny:
        command += ["--arch", "resnet18", "--image-size", "32", "--batch-size", "2", "--m", "2"]
        command += ["--steps", "1"]
    return Section(name, command, 90)


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
    else:
        command += ["--workers", str(max((os.cpu_count() or 1) - 2, 1))]
    return Section(name, command, 90, writes_out=False)


def corruptions_section(name: str, trained: Section) -> Section:
    """The corruptions made on the fly, on a run that another section has trained."""
    command = ["launch/robustness.py", run_folder(trained), "--on-the-fly", "--eval-images", "200"]
    return Section(name, command, 60, writes_out=False)


def run_folder(section: Section) -> str:
    """The output folder in a section's command."""
    return section.command[section.command.index("--output-dir") + 1]


def run_section(section: Section, limit_s: float) -> dict[str, Any]:
    """Runs one section to its end or its limit; never raises for what the section does.

    What a section wrote before it failed is kept beside its error. `said` are the lines in which
    the trainer tells that something runs otherwise than asked for.
    """
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
        said = [line for line in output.splitlines() if line.startswith(SAID)]
        if said:
            outcome["said"] = list(dict.fromkeys(said))
        if out.is_file():
            outcome |= json.loads(out.read_text())
            del outcome["environment"]  # the record's own
    if status != 0:
        return {**outcome, "error": f"status {status}: {output.strip()[-1500:]}"}
    print(output.strip()[-2000:], flush=True)
    if section.writes_out:
        return outcome
    if section.name == "gpu_tests":
        return {**outcome, "outcome": output.strip().splitlines()[-1].strip("= ")}
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


def page(sections: dict[str, dict[str, Any]]) -> list[str]:
    """What the sections say, in a few lines each."""
    lines = []
    for name, outcome in sections.items():
        failed = outcome.get("error") or outcome.get("skipped")
        if failed:
            lines.append(f"{name}: {failed.splitlines()[-1][-80:]}")
        elif "outcome" in outcome:
            lines.append(f"{name}: {outcome['outcome']}")
        elif outcome.get("benchmark") == "step":
            rates = [
                f"{method} {row['image_passes_per_second']:,.0f}"
                for method, row in outcome["results"].items()
            ]
            lines.append(f"{name}, passes/s: {', '.join(rates)}")
            lines += [
                f"    {ratio} {value['median']:.3f}"
                for ratio, value in outcome["time_ratios"].items()
            ]
            peaks = {k: v for k, v in outcome["memory"].items() if k != "kind"}
            lines += [f"    {what} {mib:,.0f}" for what, mib in peaks.items()]
        elif outcome.get("benchmark") == "average":
            ratios = outcome["time_ratios"].items()
            lines.append(f"{name}: " + ", ".join(f"{k} {v['median']:.4f}" for k, v in ratios))
        elif "result" in outcome:
            lines.append(
                f"{name}: {outcome['log'][-1]['passes_per_second']:,.0f} passes/s at its end"
            )
    return lines


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
