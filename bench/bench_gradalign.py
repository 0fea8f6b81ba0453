"""What each way of computing GradAlign's term costs, in FGSM-RS steps, and how right it is.

    python bench/bench_gradalign.py --batch-size 32 --threads 1 --rounds 5 \\
        --out bench/results/MACHINE/gradalign-options.json

A step is everything that fills the weights' gradients; the optimizer is left out. FGSM-RS is an
attack pass for the input's gradient alone and a pass for the weights. Errors are those of the
term's weight gradient against eager double backward in float64, on the same images and eta,
scikit-learn's digits at 32 px after some FGSM steps.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from freeadv_fast.config.presets import preset_lambda
from freeadv_fast.models import double_backward
from freeadv_fast.models.double_backward import FastDoubleBackward
from freeadv_fast.models.zoo import build_model
from freeadv_fast.step.alignment import misalignment

ARCH = "preact-resnet18-gradalign"
EPS = 8 / 255
LAMBDA = preset_lambda("cifar10", 8)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclasses.dataclass(frozen=True)
class Option:
    """A way to take GradAlign's step.

    Attributes:
        layout: Memory format of weights and activations.
        double: `eager`, `fast` (FastDoubleBackward) or `dual` (reverse over forward mode).
        g1: `graph`: its own pass, differentiated too; `pass`: its own pass, detached; `attack`:
            the attack's gradient, the same number for an attack that starts at zero.
        share: Part of the images that enter the term.
        backward: `one` over the sum of both losses, or `two`.
        eta: `uniform`, or `delta`: the term at the training point, one forward pass less.
        bf16: Whether the term's convolutions run in bfloat16.
    """

    layout: str = "channels_last"
    double: str = "fast"
    g1: str = "attack"
    share: float = 1.0
    backward: str = "one"
    eta: str = "uniform"
    bf16: bool = False


OPTIONS = {
    "eager, g1 differentiated too": Option(double="eager", g1="graph"),
    "eager, g1 detached": Option(double="eager", g1="pass"),
    "eager, g1 from the attack": Option(double="eager"),
    "eager, g1 from the attack, nchw": Option(double="eager", layout="nchw"),
    "fast": Option(),
    "fast, nchw": Option(layout="nchw"),
    "fast, two backward passes": Option(backward="two"),
    "fast, bf16 term": Option(bf16=True),
    "reverse over forward": Option(double="dual"),
    "fast, 3/4 of the images": Option(share=0.75),
    "fast, 1/2 of the images": Option(share=0.5),
    "fast, 1/4 of the images": Option(share=0.25),
    "fast, eta = delta": Option(eta="delta"),
}


@dataclasses.dataclass(frozen=True)
class Minibatch:
    """(N, 3, 32, 32) images in [0, 1], (N,) labels, and (N, 3, 32, 32) noise in the eps-ball."""

    x: Tensor
    labels: Tensor
    eta: Tensor

    def to(self, **to: Any) -> Minibatch:
        return Minibatch(self.x.to(**to), self.labels, self.eta.to(**to))

    def first(self, num: int) -> Minibatch:
        return Minibatch(self.x[:num], self.labels[:num], self.eta[:num])


def main() -> None:
    """Parses the flags, measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--options", nargs="*", default=list(OPTIONS), metavar="NAME")
    parser.add_argument("--training-steps", type=int, default=20, help="FGSM steps beforehand")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    device = harness.default_device()
    record = {
        "benchmark": "gradalign",
        "environment": harness.environment_record(device),
        "settings": {
            "arch": ARCH,
            "image_size": 32,
            "batch_size": flags.batch_size,
            "precision": "fp32",
            "training_steps": flags.training_steps,
        },
        "options": run(flags, device),
    }
    for name, row in record["options"].items():
        error = row.get("term_gradient")
        told = f"cosine {error['cosine']:.5f} error {error['relative']:.1e}" if error else ""
        print(f"{name:34s}{row['fgsm_rs_steps']['median']:6.2f} FGSM-RS steps  {told}")
    if flags.out:
        harness.write_json(flags.out, record)


def run(flags: argparse.Namespace, device: torch.device) -> dict[str, dict[str, Any]]:
    """One row an option: seconds, FGSM-RS steps, error of the term's gradient."""
    torch.manual_seed(0)
    net = build_model(ARCH, 10, image_size=32).to(device)
    digits = load_digits()
    train_a_little(net, digits, flags, device)
    batch = minibatch(digits, flags.batch_size, device)
    nets = {name: copy.deepcopy(net).to(memory_format=LAYOUTS[name]) for name in LAYOUTS}
    batches = {name: batch.to(memory_format=LAYOUTS[name]) for name in LAYOUTS}
    calls: dict[str, Callable[[], object]] = {
        f"fgsm-rs, {name}": functools.partial(fgsm_rs, nets[name], batches[name])
        for name in LAYOUTS
    }
    exact = term_gradient(copy.deepcopy(net).double(), batch.to(dtype=torch.float64), EXACT)
    rows: dict[str, dict[str, Any]] = {name: {} for name in calls}
    for name in flags.options:
        option = OPTIONS[name]
        at = nets[option.layout], batches[option.layout]
        gradient = term_gradient(copy.deepcopy(at[0]), at[1], option)
        rows[name] = {"term_gradient": compare(gradient, exact)}
        calls[name] = functools.partial(gradalign, *at, option)
    times = harness.measure(calls, device=device, rounds=flags.rounds, warmup=1)
    clock = {name: row.get("cpu_seconds", row) for name, row in times.items()}
    for name, row in rows.items():
        row["seconds"] = times[name]
        baseline = clock["fgsm-rs, channels_last"]
        row["fgsm_rs_steps"] = harness.pairwise_ratio(clock[name], baseline)
    return rows


EXACT = Option(layout="nchw", double="eager")


def minibatch(digits: Any, num: int, device: torch.device) -> Minibatch:
    """Random digits at 32 px in three equal channels."""
    rows = torch.randint(len(digits.target), (num,))
    small = torch.from_numpy(digits.images).float()[rows, None] / 16
    x = F.interpolate(small, size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    eta = torch.empty_like(x).uniform_(-EPS, EPS)
    return Minibatch(x.to(device), torch.from_numpy(digits.target)[rows].to(device), eta.to(device))


def train_a_little(
    net: nn.Module, digits: Any, flags: argparse.Namespace, device: torch.device
) -> None:
    """FGSM training, so that gradients are not those of a fresh network."""
    optimizer = torch.optim.SGD(net.parameters(), 0.005, momentum=0.9)
    for _ in range(flags.training_steps):
        fgsm_rs(net, minibatch(digits, 32, device))
        optimizer.step()


def compare(gradient: Tensor, exact: Tensor) -> dict[str, float]:
    """Cosine and relative error of a flat gradient."""
    cosine = F.cosine_similarity(gradient, exact, 0)
    relative = (gradient - exact).norm() / exact.norm()
    return {"cosine": float(cosine), "relative": float(relative)}


def loss_at(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in float32 or better."""
    logits = net(x)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def input_gradient(net: nn.Module, x: Tensor, labels: Tensor, **options: bool) -> Tensor:
    """Gradient of the mean loss at `x`, of no weight."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss_at(net, x, labels), x, **options)[0]


def fgsm_rs(net: nn.Module, batch: Minibatch) -> None:
    """An attack pass from a random start, and a pass for the weights."""
    net.zero_grad(set_to_none=True)
    gradient = input_gradient(net, batch.x + batch.eta, batch.labels)
    delta = (batch.eta + 1.25 * EPS * gradient.sign()).clamp(-EPS, EPS)
    loss_at(net, (batch.x + delta).clamp(0, 1), batch.labels).backward()


def gradalign(net: nn.Module, batch: Minibatch, option: Option) -> None:
    """FGSM from zero, and the term."""
    net.zero_grad(set_to_none=True)
    g1 = input_gradient(net, batch.x, batch.labels)
    adversarial = (batch.x + EPS * g1.sign()).clamp(0, 1)
    if option.eta == "delta":
        with FastDoubleBackward():
            x = adversarial.requires_grad_()
            loss = loss_at(net, x, batch.labels)
        (g2,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + LAMBDA * misalignment(g1, g2).mean()).backward()
    elif option.backward == "two":
        loss_at(net, adversarial, batch.labels).backward()
        (LAMBDA * term(net, batch, g1, option)).backward()
    else:
        loss = loss_at(net, adversarial, batch.labels)
        (loss + LAMBDA * term(net, batch, g1, option)).backward()


def term(net: nn.Module, batch: Minibatch, g1: Tensor, option: Option) -> Tensor:
    """The mean of 1 - cos, or for `dual` a number whose gradient is that of the mean."""
    if option.g1 != "attack":
        g1 = input_gradient(net, batch.x, batch.labels, create_graph=option.g1 == "graph")
    num = round(option.share * len(batch.x))
    batch, g1 = batch.first(num), g1[:num]
    x = (batch.x + batch.eta).requires_grad_()
    if option.double == "dual":
        g2 = input_gradient(net, x, batch.labels).requires_grad_()
        (v,) = torch.autograd.grad(misalignment(g1, g2).mean(), g2)
        return directional_derivative(net, x.detach(), v, batch.labels)
    with contextlib.ExitStack() as stack:
        if option.double == "fast":
            stack.enter_context(FastDoubleBackward())
        if option.bf16:
            stack.enter_context(torch.autocast(x.device.type, torch.bfloat16))
        loss = loss_at(net, x, batch.labels)
    (g2,) = torch.autograd.grad(loss, x, create_graph=True)
    return misalignment(g1, g2).mean()


def term_gradient(net: nn.Module, batch: Minibatch, option: Option) -> Tensor:
    """The gradient of the weights, flat, in float64."""
    g1 = input_gradient(net, batch.x, batch.labels)
    if option.eta == "delta":
        at_delta = (batch.x + EPS * g1.sign()).clamp(0, 1) - batch.x
        batch = dataclasses.replace(batch, eta=at_delta)
    term(net, batch, g1, option).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def directional_derivative(net: nn.Module, x: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """d/dh loss(x + h v) at 0, by forward mode; its weight gradient is that of <v, grad_x loss>."""
    with DualNumbers():
        logits, tangent = net(torch.cat([x, v])).chunk(2)
    slope = logits.softmax(1) - F.one_hot(labels, logits.size(1))
    return (slope * tangent).sum() / len(labels)


class DualNumbers(TorchFunctionMode):
    """Reads a batch of 2N as N images and their N tangents: one convolution serves both.

    Convolutions without bias, additions and means are linear and need no care.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return DUAL_LAYERS.get(func, func)(*args, **(kwargs or {}))


def dual_batch_norm(
    both: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Its derivative is symmetric: forward mode applies the map that reverse mode does."""
    x, tangent = both.chunk(2)
    y, mean, s = torch.native_batch_norm(
        x, weight, bias, running_mean, running_var, training, momentum, eps
    )
    gradient = double_backward._BatchNormInputGradient
    return torch.cat([y, gradient.apply(tangent, x, weight, mean.detach(), s.detach())[0]])


def dual_relu(both: Tensor, inplace: bool = False) -> Tensor:
    """The tangent passes where its image does."""
    mask = both.chunk(2)[0] > 0
    return both * torch.cat([mask, mask])


def dual_linear(both: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The bias is no part of a tangent."""
    x, tangent = both.chunk(2)
    return torch.cat([F.linear(x, weight, bias), F.linear(tangent, weight)])


DUAL_LAYERS: dict[Any, Any] = {
    F.batch_norm: dual_batch_norm,
    F.relu: dual_relu,
    F.linear: dual_linear,
}

if __name__ == "__main__":
    main()
