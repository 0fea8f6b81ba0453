"""What a step costs: image passes a second, peak memory, and time in steps of natural training.

    python bench/bench_step.py --arch resnet50 --image-size 224 --batch-size 256 --seconds 120
    python bench/bench_step.py --methods natural,free,plain,eager,compiled --seconds 200
    python bench/bench_step.py --arch resnet18 --image-size 32 --batch-size 80 --threads 1 \
        --methods natural,fast-advprop,advprop
    python bench/bench_step.py --arch retinanet_resnet50_fpn --image-size 800 --batch-size 20 \
        --methods natural,eager,free,fast-advprop

One sample is m steps over one minibatch, or for free-m one minibatch replayed m times; so a ratio
to natural is what a method costs on the same images. The methods are the trainer's own. Beside them
run competitors without a kernel of ours: `PlainFree` (plain; compiled-free under torch.compile) and
`PlainNatural` (eager, compiled); of detectors torchvision's own natural step (eager). All train the
same network, on the same pixels, in turn.
A method that fails is recorded with its error, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import detection_step
import harness
import torch
import torch.nn.functional as F
from bandwidth import rate_kernels
from floors import PLANS, Floors
from torch import Tensor, nn

from freeadv_fast.config.budget import Budget
from freeadv_fast.config.choices import OptimizerName, Switch
from freeadv_fast.config.method_names import METHODS
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.task_fields import task_of
from freeadv_fast.distributed.world import World
from freeadv_fast.methods.build import build_method
from freeadv_fast.models.zoo import build_model
from freeadv_fast.ops import dispatch
from freeadv_fast.session.method import RankShuffle
from freeadv_fast.session.network import PRECISIONS, build_learner, build_network, resolve_precision
from freeadv_fast.step import graphs
from freeadv_fast.step.optim import build_sgd

COMPETITORS = ("plain", "compiled-free", "eager", "compiled")
PROVIDERS = (*METHODS, *COMPETITORS)
REPLAYED = ("free", "free-trades")  # a step is a replay
WITHOUT = " without "  # between a method and the faster way (`dispatch.FAST_PATHS`) taken from it
# Methods whose step is one pass for the weights, and whether it takes the image's gradient.
IMAGE_GRADIENT = {
    "natural": False,
    "eager": False,
    "compiled": False,
    "free": True,
    "plain": True,
    "compiled-free": True,
}
NUM_CLASSES = {224: 1000}  # any other size: CIFAR's 10


class PlainFree:
    """Free-m as the published PyTorch code does it, written from its description.

    Float images in [0, 1], a float32 noise buffer in NCHW order, one eager operation at a time,
    clamp and normalisation under autograd, loss and two accuracies read by the host at every
    replay. Left as good as ours: the network's channels_last weights, autocast, the optimizer.
    """

    def __init__(self, config: TrainConfig, device: torch.device, *, compiled: bool) -> None:
        """Builds the network with the config's seed; torch.compile runs it where `compiled`."""
        net = stock_network(config, device)
        self.optimizer = build_sgd(
            net,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            decay=config.decay,
        )
        self.net = torch.compile(net) if compiled else net
        self.m, self.dtype = config.m, PRECISIONS[resolve_precision(config.precision, device)]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.eps = float(config.threat.eps)
        self.step_size = float(config.threat.step)
        size = config.image_size
        self.noise = torch.zeros(config.batch_size, 3, size, size, device=device)
        self.mean = torch.tensor(config.pixel_mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(config.pixel_std, device=device).view(3, 1, 1)
        self.meters = {"loss": 0.0, "top1": 0.0, "top5": 0.0, "images": 0}

    def train_minibatch(self, pixels: Tensor, labels: Tensor) -> None:
        """Replays a minibatch m times: (n, 3, H, W) float32 in [0, 1], (n,) int64."""
        num = len(pixels)
        for _ in range(self.m):
            noise = self.noise[:num].clone().requires_grad_()
            x = (pixels + noise).clamp(0, 1)
            x = (x - self.mean) / self.std
            is_half = self.dtype is not torch.float32
            with torch.autocast(x.device.type, self.dtype, enabled=is_half):
                logits = self.net(x)
            loss = F.cross_entropy(logits.float(), labels)
            hits = logits.topk(5, 1).indices == labels[:, None]
            self.meters["loss"] += loss.item() * num
            self.meters["top1"] += hits[:, 0].sum().item()
            self.meters["top5"] += hits.sum().item()
            self.meters["images"] += num
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.noise[:num] += self.step_size * torch.sign(noise.grad)
            self.noise.clamp_(-self.eps, self.eps)
            self.scaler.step(self.optimizer)
            self.scaler.update()


class PlainNatural:
    """Natural training as PyTorch's own examples do it: AMP, channels_last, torch's SGD.

    The network as its library builds it, SGD in torch's default form (foreach on a GPU), no
    meters. Its input is normalised before the clock starts, where ours is normalised in each step.
    """

    def __init__(self, config: TrainConfig, device: torch.device, *, compiled: bool) -> None:
        """Builds the network with the config's seed; torch.compile runs it where `compiled`."""
        net = stock_network(config, device)
        self.optimizer = torch.optim.SGD(
            net.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.net = torch.compile(net) if compiled else net
        self.dtype = PRECISIONS[resolve_precision(config.precision, device)]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def train_minibatch(self, x: Tensor, labels: Tensor) -> None:
        """One update on (n, 3, H, W) float32 normalised images and (n,) int64 labels."""
        self.optimizer.zero_grad()
        is_half = self.dtype is not torch.float32
        with torch.autocast(x.device.type, self.dtype, enabled=is_half):
            loss = F.cross_entropy(self.net(x), labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def stock_network(config: TrainConfig, device: torch.device) -> nn.Module:
    """The config's network as its library defines it, channels_last, from the config's seed."""
    torch.manual_seed(config.seed)
    classes = num_classes(config.image_size)
    net = build_model(config.arch, classes, image_size=config.image_size)
    return net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def main() -> None:
    """Parses the flags, measures or, as a child, reports one provider's peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--m", type=int, default=4)
    parser.add_argument(
        "--methods", default="natural,free,plain", help=f"of {','.join(PROVIDERS)}; natural first"
    )
    for flag in ("--fuse", "--graphs"):
        parser.add_argument(flag, default="auto", choices=get_args(Switch), help="the trainer's")
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=sorted(dispatch.FAST_PATHS),
        help="ways not taken",
    )
    parser.add_argument(
        "--without-each",
        nargs="+",
        default=[],
        choices=sorted(dispatch.FAST_PATHS),
        help="the last method again, each time without one of these ways",
    )
    parser.add_argument("--optimizer", default="sgd", choices=get_args(OptimizerName))
    parser.add_argument("--attack-steps", type=int, default=1, help="K of the attack")
    parser.add_argument(
        "--reg-every", type=int, default=2, help="updates between GradAlign's terms"
    )
    parser.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS))
    parser.add_argument("--rounds", type=int, help="at most so many samples of each")
    parser.add_argument("--seconds", type=float, help="time for all rounds together")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    parser.add_argument("--copy-gb-per-second", type=float, help="copy rate; a GPU's is measured")
    parser.add_argument("--tflops", type=float, help="matrix rate; a GPU's is measured")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    flags = parser.parse_args()
    names = flags.methods.split(",")
    dispatch.FAST_PATHS.difference_update(flags.without)
    names += [f"{names[-1]}{WITHOUT}{path}" for path in flags.without_each]
    if (flags.copy_gb_per_second is None) != (flags.tflops is None):
        parser.error("--copy-gb-per-second and --tflops belong together")
    if flags.rounds is None and flags.seconds is None:
        flags.rounds = 10
    if flags.threads:
        torch.set_num_threads(flags.threads)
    device = harness.default_device()
    torch.backends.cudnn.benchmark = True
    config = TrainConfig(
        arch=flags.arch,
        image_size=flags.image_size,
        batch_size=flags.batch_size,
        m=flags.m,
        attack_steps=flags.attack_steps,
        reg_every=flags.reg_every,
        precision=flags.precision,
        fuse=flags.fuse,
        graphs=flags.graphs,
        optimizer=flags.optimizer,
        lr=0.01,  # gentle: random labels must not drive the weights to infinity
        normalization="imagenet" if flags.image_size > 64 else "cifar10",
        **(detection_step.FIELDS if task_of(flags.arch) == "detection" else {}),
    )
    if flags.memory_of:
        print(json.dumps(peak_memory(config, device, flags.memory_of)))
        return
    environment = harness.environment_record(device)
    precision = resolve_precision(config.precision, device)
    memory, failed = ({}, {}) if flags.no_memory else all_peaks(names, sys.argv[1:])
    names = [name for name in names if name not in failed]
    dtype = PRECISIONS[precision]
    if flags.tflops:
        rates = {"bytes": flags.copy_gb_per_second * 1e9, "flops": flags.tflops * 1e12}
        ceilings: dict[str, Any] | None = {"source": "given", "per_second": rates}
    else:
        ceilings = measure_ceilings(device, dtype) if device.type == "cuda" else None
    outcome = run(names, config, device, flags.rounds, flags.seconds)
    outcome["errors"] = {**failed, **outcome["errors"]}
    record = {
        "benchmark": "step",
        "environment": environment,
        "settings": {
            "arch": config.arch,
            "image_size": config.image_size,
            "batch_size": config.batch_size,
            "m": config.m,
            "attack_steps": config.attack_steps,
            "reg_every": config.reg_every,
            "precision": precision,
            "fuse": config.fuse,
            "graphs": config.graphs,
            "optimizer": config.optimizer,
            "without": flags.without,
        },
        **outcome,
        "memory": memory,
        "ceilings": ceilings,
        "floors": add_floors(outcome["results"], config, dtype, ceilings),
    }
    report(record)
    if flags.out:
        harness.write_json(flags.out, record)
    if not outcome["results"]:
        sys.exit(1)


def run(
    names: list[str],
    config: TrainConfig,
    device: torch.device,
    rounds: int | None,
    seconds: float | None,
) -> dict[str, Any]:
    """Times the methods in turn: seconds per step, and the ratios within each round."""
    calls, errors = prepare(names, config, device)
    if not calls:
        return {"results": {}, "errors": errors, "time_ratios": {}}
    times = harness.measure(calls, device=device, rounds=rounds, seconds=seconds, warmup=0)
    images = config.m * config.batch_size
    results = {
        name: {
            "image_passes_per_second": images * weight_passes(name, config) / entry["median"],
            "seconds_per_minibatch_pass": entry["median"] / config.m,
            "sample_seconds": entry,
        }
        for name, entry in times.items()
    }
    outcome: dict[str, Any] = {"results": results, "errors": errors, "time_ratios": ratios(times)}
    if device.type == "cpu":
        cpu_times = {name: entry["cpu_seconds"] for name, entry in times.items()}
        outcome["cpu_time_ratios"] = ratios(cpu_times)
    return outcome


def prepare(
    names: list[str], config: TrainConfig, device: torch.device
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """The methods that run, warm, and the errors of those that do not.

    On a GPU a step is warm when its recording has run once; on a CPU after a call.
    """
    updates = graphs.WARM_UP + 2 if device.type == "cuda" else 1
    calls: dict[str, Callable[[], None]] = {}
    errors: dict[str, str] = {}
    for name in names:
        method, _, path = name.partition(WITHOUT)
        try:
            with way_not_taken(path):
                call = provider(method, config, device)
                for _ in range(math.ceil(updates / config.m)):
                    call()
            calls[name] = call
        except Exception as error:  # whatever a compiler, a kernel or an allocator raises
            errors[name] = f"{type(error).__name__}: {error}"[:800]
        call = None  # a failed network's memory is the next one's
        gc.collect()
    return calls, errors


@contextlib.contextmanager
def way_not_taken(path: str) -> Iterator[None]:
    """What is built and recorded in here goes without one of `dispatch.FAST_PATHS`; "" for all."""
    taken = dispatch.FAST_PATHS & {path}
    dispatch.FAST_PATHS.difference_update(taken)
    try:
        yield
    finally:
        dispatch.FAST_PATHS.update(taken)


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, *, num_bytes: int = 1 << 30, side: int = 8192
) -> dict[str, Any]:
    """The rates that the floors are divided by: memory's, and a square matrix product's.

    Memory's is the highest that one of `bandwidth.rate_kernels` reaches, named by `bytes_from`.

    Args:
        device: Where. dtype: Of the product.
        num_bytes: Of each tensor that is read or written. side: Of the matrices.
    """
    moved = rate_kernels(num_bytes, device)
    # Random, because zeros draw less power and so run at higher clocks.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    calls = {name: harness.graphed(call, device) for name, (call, _) in moved.items()}
    calls["product"] = harness.graphed(lambda: torch.mm(a, b, out=product), device)
    times = harness.measure(calls, device=device, rounds=20)
    memory = {name: size / times[name]["median"] for name, (_, size) in moved.items()}
    fastest = max(memory, key=lambda name: memory[name])
    rates = {"bytes": memory[fastest], "flops": 2 * side**3 / times["product"]["median"]}
    return {
        "source": "measured",
        "per_second": rates,
        "bytes_from": fastest,
        "memory": memory,
        "seconds": times,
    }


def add_floors(
    results: dict[str, Any],
    config: TrainConfig,
    dtype: torch.dtype,
    ceilings: dict[str, Any] | None,
) -> dict[str, Any] | None:
    """The network's floors; each result gets its share of them where the ceilings are known.

    A share is the measured rate over the rate that one floor allows alone. Every method is held
    against every plan, so that shares compare.

    Returns:
        Floating-point operations and bytes a pass, with and without the image's gradient; None of
        a detector, and where the network's operations cannot be followed.
    """
    if config.task == "detection":
        return None
    size = config.image_size
    try:
        floors = Floors.of_arch(
            config.arch, size, num_classes=num_classes(size), itemsize=dtype.itemsize
        )
    except (ValueError, RuntimeError):  # unknown, or an operation that meta tensors lack
        return None
    if ceilings is not None:
        for name in results.keys() & IMAGE_GRADIENT.keys():
            bounds = floors.bounds(
                bytes_per_second=ceilings["per_second"]["bytes"],
                flops_per_second=ceilings["per_second"]["flops"],
                image_gradient=IMAGE_GRADIENT[name],
            )
            rate = results[name]["image_passes_per_second"]
            results[name]["share_of_floors"] = {k: rate / bound for k, bound in bounds.items()}
    found: dict[str, Any] = {"in_neither": floors.unaccounted}
    for key, image_gradient in (("weights_only", False), ("with_image_gradient", True)):
        moved = {plan: floors.bytes(plan, image_gradient=image_gradient) for plan in PLANS}
        found[key] = {"flops": floors.flops(image_gradient=image_gradient), "bytes": moved}
    return found


def ratios(times: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What one step costs in steps of the first method, and a competitor's in free's.

    Within each round.
    """
    first, *others = times
    pairs = [(name, first) for name in others]
    if "free" in others:
        pairs += [(name, "free") for name in COMPETITORS if name in others]
    return {
        f"{one}_over_{other}": harness.pairwise_ratio(times[one], times[other])
        for one, other in pairs
    }


def config_of(name: str, config: TrainConfig) -> TrainConfig:
    """The settings with a method, one minibatch a step unless it is free-m."""
    changes: dict[str, Any] = {"method": name, "m": config.m if name in REPLAYED else 1}
    num_adv = round(config.p_adv * config.batch_size)
    return dataclasses.replace(config, **changes, aux_bn_group=max(2, min(16, num_adv)))


def weight_passes(name: str, config: TrainConfig) -> float:
    """Passes for the weights per image and step."""
    method, _, _ = name.partition(WITHOUT)
    own = config_of("free" if method in COMPETITORS else method, config)
    return own.weight_passes / own.m


def provider(name: str, config: TrainConfig, device: torch.device) -> Callable[[], None]:
    """A function that makes m steps over one fixed minibatch of random pixels."""
    if name not in PROVIDERS:
        raise ValueError(f"no such method; choose among {', '.join(PROVIDERS)}")
    images, labels, classes = random_minibatch(config, device)
    if name in COMPETITORS:
        return competitor(name, config, images, labels)
    num_minibatches = 1 if name in REPLAYED else config.m
    config = config_of(name, config)
    torch.manual_seed(config.seed)
    world, budget = World(0, 1, device), Budget.of(config, [1 << 30])
    network = build_network(config, [str(i) for i in range(classes)], is_fresh=True)
    learner = build_learner(network, config, world, budget)
    method = build_method(config, learner, device, classes, RankShuffle(world, config.seed))

    def steps() -> None:
        for _ in range(num_minibatches):
            method.train_minibatch(images, labels, len(images))

    return steps


def random_minibatch(config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Random pixels, (n, H, W, 3) uint8, their labels or targets, and the number of classes."""
    if config.task == "detection":
        return *detection_step.random_minibatch(config, device), detection_step.NUM_CLASSES
    generator = torch.Generator().manual_seed(0)
    size, num = config.image_size, config.batch_size
    images = torch.randint(0, 256, (num, size, size, 3), generator=generator).to(torch.uint8)
    classes = num_classes(size)
    labels = torch.randint(0, classes, (num,), generator=generator)
    return images.to(device), labels.to(device), classes


def competitor(
    name: str, config: TrainConfig, images: Tensor, labels: Tensor
) -> Callable[[], None]:
    """A function that makes m steps of a competitor over (n, H, W, 3) uint8 images."""
    if config.task == "detection":
        return detecting_competitor(name, config, images, labels)
    compiled = name.startswith("compiled")
    pixels = images.permute(0, 3, 1, 2).float().div(255).contiguous()
    if name in ("plain", "compiled-free"):
        free = PlainFree(config, images.device, compiled=compiled)
        return lambda: free.train_minibatch(pixels, labels)
    natural = PlainNatural(config, images.device, compiled=compiled)
    mean, std = (
        torch.tensor(values, device=images.device).view(3, 1, 1)
        for values in (config.pixel_mean, config.pixel_std)
    )
    x = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)

    def steps() -> None:
        for _ in range(config.m):
            natural.train_minibatch(x, labels)

    return steps


def detecting_competitor(
    name: str, config: TrainConfig, images: Tensor, targets: Tensor
) -> Callable[[], None]:
    """`competitor` over packed `step.objects`."""
    if name != "eager":
        raise ValueError(f"{name}: trains classifiers; the competitor of detectors is eager")
    eager = detection_step.EagerDetector(config, images.device)
    minibatch = detection_step.as_torchvision(images, targets)

    def steps() -> None:
        for _ in range(config.m):
            eager.train_minibatch(*minibatch)

    return steps


def num_classes(image_size: int) -> int:
    """ImageNet's 1000 at its size, CIFAR's 10 otherwise."""
    return NUM_CLASSES.get(image_size, 10)


def peak_memory(config: TrainConfig, device: torch.device, name: str) -> dict[str, Any]:
    """Peak memory of one method in this process, its first update left out.

    With one pass a call, for no method's peak depends on m: then the first call holds what happens
    once (cuDNN's search for algorithms), and a CUDA graph is recorded in the calls that count. Its
    replays allocate nothing that could be counted.
    """
    meter = harness.MemoryMeter(device)
    call = provider(name, dataclasses.replace(config, m=1), device)
    call()
    meter.forget_peak()
    for _ in range(graphs.WARM_UP + 1 if device.type == "cuda" else 1):
        call()
    found = {"peak_mib": meter.peak_mib(), "kind": meter.kind}
    if device.type == "cuda":  # a recording keeps its memory to itself
        found["reserved_mib"] = torch.cuda.max_memory_reserved(device) / 2**20
    return found


def all_peaks(names: list[str], arguments: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Peak memory of every method, each in a process of its own, and the errors of those that fail.

    Keys end in ``_peak_mib``, and on a GPU in ``_reserved_mib``: what the allocator holds.
    """
    memory: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for name in names:
        try:
            found = harness.in_child(["bench_step.py", *arguments, "--memory-of", name])
        except RuntimeError as error:
            errors[name] = str(error)[-800:]
            continue
        memory["kind"] = found.pop("kind")
        memory |= {f"{name}_{key}": value for key, value in found.items()}
    return memory, errors


def report(record: dict[str, Any]) -> None:
    """Prints the record as a table."""
    memory = record["memory"]
    for name, row in record["results"].items():
        entry = row["sample_seconds"]
        peak = f"{memory[f'{name}_peak_mib']:9.0f} MiB" if memory else ""
        shares = row.get("share_of_floors")
        floors = ""
        if shares:
            floors = (
                f"  {100 * shares['B2']:.1f} % of bytes B2, {100 * shares['flops']:.1f} % of FLOPs"
            )
        print(
            f"{name:28s} {row['image_passes_per_second']:9.1f} passes/s"
            f" {1000 * row['seconds_per_minibatch_pass']:9.2f} ms"
            f"  spread {100 * (entry['p80'] - entry['p20']) / entry['median']:5.1f} %"
            f"  n {entry['n']:3d} {peak}{floors}"
        )
    for kind in ("time_ratios", "cpu_time_ratios"):
        for name, ratio in record.get(kind, {}).items():
            spread = f"({ratio['p20']:.3f} to {ratio['p80']:.3f})"
            print(f"{kind:16s} {name:25s} {ratio['median']:.3f}  {spread}")
    for name, error in record["errors"].items():
        print(f"{name} failed: {error.splitlines()[0] if error else 'no message'}")


if __name__ == "__main__":
    main()
