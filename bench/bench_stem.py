"""The stem alone: forward, weight gradient and input gradient, 7x7 against space-to-depth.

    python bench/bench_stem.py --seconds 30 --out bench/results/MACHINE/stem.json
    python bench/bench_stem.py --batch-size 2 --image-size 16 --seconds 1           # any machine

c3, c4, c8: the 7x7 stride-2 convolution on 3 channels, and on 4 and 8 of which the rest is zero.
s2d16: the same function as a 4x4 stride-1 convolution on 12 channels, padded to 16
(`freeadv_fast.models.stem`). Its input gradient is timed twice: as autograd computes it, and as the
forward convolution of the output's gradient that it equals. Bytes are what each must read and
write once, its own zero channels included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import bandwidth
import harness
import torch
import torch.nn.functional as F
from torch import Tensor

OUT_CHANNELS = 64
INPUT, WEIGHT = (True, False, False), (False, True, False)  # output masks of the backward


def main() -> None:
    """Parses the flags, measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, help="images; default: 256, on a CPU 4")
    parser.add_argument("--image-size", type=int, default=224, help="even")
    parser.add_argument("--seconds", type=float, default=30, help="time for all turns together")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    device = harness.default_device()
    torch.backends.cudnn.benchmark = True
    num = flags.batch_size or (256 if device.type == "cuda" else 4)
    rows = [
        row
        for dtype in bandwidth.activations(device)
        for row in stem_rows(num, flags.image_size, dtype, device)
    ]
    record = {
        "benchmark": "stem",
        "environment": harness.environment_record(device),
        "settings": {"batch_size": num, "image_size": flags.image_size},
        **bandwidth.time_rows(rows, device, flags.seconds),
    }
    bandwidth.report(record, ["direction", "stem", "dtype"])
    if flags.out:
        harness.write_json(flags.out, record)


def stem_rows(
    num: int, size: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[bandwidth.Row, Callable[[], bandwidth.Call]]]:
    """Every stem and direction, each with the tensors that it reads and writes."""
    half = size // 2
    found: list[tuple[bandwidth.Row, Callable[[], bandwidth.Call]]] = []
    for channels, side, kernel, stride, padding in (
        (3, size, 7, 2, 3),
        (4, size, 7, 2, 3),
        (8, size, 7, 2, 3),
        (16, half + 3, 4, 1, 0),
    ):

        def draw(*shape: int) -> Tensor:
            values = torch.randn(shape, device=device)
            return values.to(dtype, memory_format=torch.channels_last)

        x, grad = draw(num, channels, side, side), draw(num, OUT_CHANNELS, half, half)
        weight = draw(OUT_CHANNELS, channels, kernel, kernel)
        is_packed = channels == 16
        names = {
            "stem": "s2d16" if is_packed else f"c{channels}",
            "dtype": bandwidth.NAMES[dtype],
            "bytes": (x.numel() + grad.numel() + weight.numel()) * dtype.itemsize,
        }
        calls = {
            "forward": bound(forward, x, weight, stride, padding),
            "weight_grad": bound(backward, grad, x, weight, stride, padding, WEIGHT),
            "input_grad": bound(backward, grad, x, weight, stride, padding, INPUT),
        }
        if is_packed:
            calls["input_grad_as_forward"] = bound(input_gradient_as_forward, grad, weight)
        for direction, call in calls.items():
            ready = bound(harness.graphed, call, device)
            found.append(({"direction": direction, **names}, ready))
    return found


def bound(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    """The call with its arguments as they are now, not as the loop leaves them."""
    return lambda: function(*arguments)


def forward(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The convolution."""
    return F.conv2d(x, weight, None, stride, padding)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    mask: tuple[bool, bool, bool],
) -> Tensor:
    """One of its gradients: `mask` asks for that of (input, weight, bias)."""
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, mask
    )
    gradient: Tensor = found[mask.index(True)]
    return gradient


def input_gradient_as_forward(grad: Tensor, weight: Tensor) -> Tensor:
    """The stride-1 input gradient as the forward convolution that it equals.

    The output's gradient, padded by kernel - 1, under the flipped weights with input and output
    channels exchanged; turning the weights is part of what it costs.
    """
    turned = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
    return F.conv2d(grad, turned, padding=weight.shape[2] - 1)


if __name__ == "__main__":
    main()
