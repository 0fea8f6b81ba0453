"""Batch norm with ReLU and residual add, forward and backward apart: PyTorch's against ours.

    python bench/bench_batch_norm.py --seconds 60 --out bench/results/MACHINE/batch-norm.json
    python bench/bench_batch_norm.py --layers 8x16 --batch-size 2 --seconds 1       # any machine

PyTorch runs cuDNN's kernels for fp16 and its own for bf16; `backend` says which it took. Bytes are
those of the fused formula (a separate read for the statistics): what an eager chain moves beyond
them counts against it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bandwidth
import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from freeadv_fast import ops
from freeadv_fast.ops import dispatch

# Stem, block end of stages 1 and 2, where 62 % of ResNet-50's bytes are; a 64-channel layer of
# stage 1 and the block end of stage 3.
LAYERS = "112x64,56x256,28x512,56x64,14x1024"
OPS = ("bn", "bn_relu", "bn_add_relu")
MOMENTUM, EPS = 0.1, 1e-5


def main() -> None:
    """Parses the flags, measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default=LAYERS, help="sides x channels, comma between layers")
    parser.add_argument("--batch-size", type=int, help="images; default: 256, on a CPU 4")
    parser.add_argument("--seconds", type=float, default=60, help="time for all turns together")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    device = harness.default_device()
    torch.backends.cudnn.benchmark = True
    num = flags.batch_size or (256 if device.type == "cuda" else 4)
    layers = flags.layers.split(",")
    record: dict[str, Any] = {
        "benchmark": "batch_norm",
        "environment": harness.environment_record(device),
        "settings": {"batch_size": num, "backend": dispatch.backend(device)},
        "layers": {},
    }
    for layer in layers:
        side, channels = map(int, layer.split("x"))
        shape = (num, channels, side, side)
        rows = [
            row
            for dtype in bandwidth.activations(device)
            for row in layer_rows(shape, dtype, device)
        ]
        print(f"{side}x{side}x{channels}")
        result = bandwidth.time_rows(rows, device, flags.seconds / len(layers))
        bandwidth.report(result, ["op", "direction", "provider", "dtype"])
        record["layers"][layer] = result
        del rows  # the graphs hold a layer's tensors: 12 candidates of up to 3 GB each
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if flags.out:
        harness.write_json(flags.out, record)


def layer_rows(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> list[tuple[bandwidth.Row, Callable[[], bandwidth.Call]]]:
    """Every op, direction and provider on one layer of (N, C, H, W) activations."""

    def draw() -> Tensor:
        values = torch.randn(shape, device=device)
        return values.to(dtype, memory_format=torch.channels_last)

    x, residual = draw().requires_grad_(), draw().requires_grad_()
    grad = draw()
    names = {"dtype": bandwidth.NAMES[dtype]}
    found: list[tuple[bandwidth.Row, Callable[[], bandwidth.Call]]] = []
    for op in OPS:
        read = residual if op == "bn_add_relu" else None
        num_bytes = minimum_bytes(op, x.numel(), dtype.itemsize)
        for provider in ("torch", "ours"):
            pair = Pair(op, provider, x, read, grad)
            backend = torch_backend(x) if provider == "torch" else dispatch.backend(device)
            for direction in ("forward", "backward"):
                row = {"op": op, "direction": direction, "provider": provider, **names}
                row |= {"backend": backend, "bytes": num_bytes[direction]}
                found.append((row, getattr(pair, direction)))
    return found


def minimum_bytes(op: str, values: int, itemsize: int) -> dict[str, int]:
    """Bytes that a fused kernel with a separate statistics read must move, forward and backward.

    Forward: read x for the statistics; read x, write y; with a residual read it, and write a bit
    for each ReLU. Backward: read dy and x for the sums (with a residual the bits too, and write
    its gradient dz); read dy or dz and x, write dx.
    """
    if op == "bn_add_relu":
        bits = values // 8
        return {
            "forward": 4 * values * itemsize + bits,
            "backward": 6 * values * itemsize + bits,
        }
    return {"forward": 3 * values * itemsize, "backward": 5 * values * itemsize}


class Pair:
    """Forward and backward of one provider, ready to be timed apart.

    On a GPU each is a graph, and both share a pool: the backward graph reads what the forward
    graph has saved. A call is made ready once, whichever direction asks first.
    """

    def __init__(
        self, op: str, provider: str, x: Tensor, residual: Tensor | None, grad: Tensor
    ) -> None:
        """Allocates nothing large yet."""
        channels, device = x.shape[1], x.device
        self.is_ours, self.has_relu = provider == "ours", op != "bn"
        self.x, self.residual, self.grad = x, residual, grad
        self.weight = torch.ones(channels, device=device, requires_grad=True)
        self.bias = torch.zeros(channels, device=device, requires_grad=True)
        self.running = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        self.calls: dict[str, bandwidth.Call] | None = None

    def forward(self) -> bandwidth.Call:
        """The forward call."""
        return self.ready()["forward"]

    def backward(self) -> bandwidth.Call:
        """The backward call: gradients of x, weight, bias and residual."""
        return self.ready()["backward"]

    def ready(self) -> dict[str, bandwidth.Call]:
        """Both calls, warm."""
        if self.calls is None:
            self.calls = self.captured() if self.x.is_cuda else self.eager()
        return self.calls

    def compute(self) -> Tensor:
        """The op itself; PyTorch's as torchvision's blocks write it, with in-place add and ReLU."""
        if self.is_ours:
            return ops.batch_norm_act(
                self.x,
                self.weight,
                self.bias,
                *self.running,
                training=True,
                momentum=MOMENTUM,
                eps=EPS,
                relu=self.has_relu,
                residual=self.residual,
            )
        y = F.batch_norm(self.x, *self.running, self.weight, self.bias, True, MOMENTUM, EPS)
        if self.residual is not None:
            y += self.residual
        return F.relu(y, inplace=True) if self.has_relu else y

    def gradients(self, y: Tensor) -> tuple[Tensor, ...]:
        """One backward pass that keeps what the forward pass saved."""
        inputs = [self.x, self.weight, self.bias]
        inputs += [self.residual] if self.residual is not None else []
        return torch.autograd.grad(y, inputs, self.grad, retain_graph=True)

    def eager(self) -> dict[str, bandwidth.Call]:
        """On a CPU the functions themselves."""
        y = self.compute()
        self.gradients(y)
        return {"forward": self.compute, "backward": lambda: self.gradients(y)}

    def captured(self) -> dict[str, bandwidth.Call]:
        """Two graphs on one pool, as `torch.cuda.make_graphed_callables` captures them.

        Autograd runs a backward kernel on the stream of its forward, so that both must be captured
        on the same stream: `torch.cuda.graph` takes one for all captures.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.gradients(self.compute())
        torch.cuda.current_stream().wait_stream(stream)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward):
            y = self.compute()
        with torch.cuda.graph(backward, pool=forward.pool()):
            self.gradients(y)
        forward.replay()
        return {"forward": forward.replay, "backward": backward.replay}


def torch_backend(x: Tensor) -> str:
    """Which kernels `F.batch_norm` takes for an input, by the rule that it asks itself."""
    channels = torch.ones(x.shape[1], device=x.device)
    choice = torch._C._select_batch_norm_backend(
        x, channels, channels, channels, channels, True, EPS
    )
    return str(choice).split(".")[-1].lower()


if __name__ == "__main__":
    main()
