"""The two floors of a network: floating-point operations and bytes that one image pass must cost.

    python bench/floors.py --arch resnet50 --image-size 224
    python bench/floors.py --arch resnet50 resnet101 --copy-gb-per-second 4300 --tflops 790

Nothing is measured here. A forward pass without data (meta tensors) records every operation with
its shapes and who reads its result; products and bytes follow from these by the accounting of the
notes, performance.md section 8. What a device sustains, its copy rate and its matrix rate, comes
from outside and turns the floors into images a second.

Activations count, at `itemsize` bytes an element and N elements an operation: every tensor goes to
memory and comes back, for it is many times larger than the L2 cache. Weights, batch norm's
statistics, the optimizer and the kernels around the image are left out, less than 2 % in all.

Plans:
    A: eager. Batch norm 3N forward (two reads, one write) and 5N backward, ReLU 2N and 3N, addition
        3N, and 3N for each sum of gradients where a tensor has two readers.
    B: batch norm with its ReLU 3N and 5N (the mask is recomputed); with a residual before the ReLU
        4N and 8N (its output is read as the mask by both backward passes, and the residual's
        gradient is written).
    B2: B with that mask as a bit an element, written forward and read once (the first backward pass
        writes the residual's gradient, the second reads that), and sums of gradients folded into
        the kernel that makes the second one, 1N.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from freeadv_fast.models.zoo import build_model

PLANS = ("A", "B", "B2")
GROUPS = (
    "conv forward",
    "conv input gradients",
    "conv weight gradients",
    "norm, ReLU, add forward",
    "norm, ReLU, add backward",
    "gradient sums",
    "pool and pad",
)
IMAGE_GRADIENT = "image gradient"

KINDS = {
    "convolution": "convolution",
    "addmm": "linear",
    "native_batch_norm": "norm",
    "relu": "relu",
    "relu_": "relu",
    "leaky_relu": "relu",
    "leaky_relu_": "relu",
    "add": "add",
    "add_": "add",
    "max_pool2d_with_indices": "pool",
    "avg_pool2d": "pool",
    "_adaptive_avg_pool2d": "pool",
    "mean": "pool",
    "constant_pad_nd": "pool",
}
VIEWS = {"view", "_unsafe_view", "detach", "alias"}
# Batch norm needs more than one value a channel, also where the picture is one pixel.
NUM_IMAGES = 2


@dataclasses.dataclass(frozen=True)
class Floors:
    """What one image pass must cost.

    Attributes:
        forward_flops: Of the convolutions and linear layers, forward; 2 a multiply-add.
        backward_flops: Of their weights' and inputs' gradients, but for the image's.
        image_gradient_flops: Of the image's gradient.
        traffic: Bytes by plan and then by group (`GROUPS`), without the image's gradient.
        image_gradient_bytes: Bytes that the image's gradient adds, in any plan.
        unaccounted: Operations on activations that are in neither floor: the accounting does not
            know them.
    """

    forward_flops: float
    backward_flops: float
    image_gradient_flops: float
    traffic: dict[str, dict[str, float]]
    image_gradient_bytes: float
    unaccounted: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, image_size: int, itemsize: int = 2) -> Floors:
        """The floors of a network, which is left as it is.

        Args:
            model: (N, 3, image_size, image_size) to logits, in training mode, its batch norms not
                fused.
            image_size: Side of the square images in pixels.
            itemsize: Bytes of an activation: 2 in half precision, 4 in float32.

        Raises:
            ValueError: the logits do not follow from the image by operations that were seen.
        """
        trace = _trace(model, image_size)
        flops: dict[str, float] = defaultdict(float)
        for op in trace.ops:
            if op.products:
                flops["forward"] += 2 * op.products
                gradients = 2 if op.source.varies else 1
                flops["backward"] += 2 * op.products * gradients
                flops["image"] += 2 * op.products * (2 - gradients)
        elements = {plan: _elements(trace, plan, itemsize) for plan in PLANS}
        traffic = {
            plan: {group: itemsize * found[group] for group in GROUPS}
            for plan, found in elements.items()
        }
        return cls(
            flops["forward"],
            flops["backward"],
            flops["image"],
            traffic,
            itemsize * elements["A"][IMAGE_GRADIENT],
            tuple(sorted(trace.unaccounted)),
        )

    @classmethod
    def of_arch(
        cls, arch: str, image_size: int, *, num_classes: int = 1000, itemsize: int = 2
    ) -> Floors:
        """The floors of a network by name; no weights are made.

        Args:
            arch: As `build_model` takes it. image_size: Side of the images in pixels.
            num_classes: Logits. itemsize: Bytes of an activation.

        Raises:
            UserError: no such network. ValueError: as `of` says.
        """
        with torch.device("meta"):
            model = build_model(arch, num_classes, image_size=image_size)
        return cls.of(model, image_size, itemsize)

    def flops(self, *, image_gradient: bool) -> float:
        """Floating-point operations of a forward and backward pass over one image."""
        extra = self.image_gradient_flops if image_gradient else 0.0
        return self.forward_flops + self.backward_flops + extra

    def bytes(self, plan: str, *, image_gradient: bool) -> float:
        """Bytes of a forward and backward pass over one image."""
        extra = self.image_gradient_bytes if image_gradient else 0.0
        return sum(self.traffic[plan].values()) + extra

    def bounds(
        self, *, bytes_per_second: float, flops_per_second: float, image_gradient: bool
    ) -> dict[str, float]:
        """Image passes a second that each floor allows alone: ``flops`` and every plan's bytes.

        Args:
            bytes_per_second: The device's copy rate, bytes read and bytes written both counted.
            flops_per_second: Its matrix rate in the network's precision.
            image_gradient: Whether the pass takes the image's gradient too.
        """
        by_bytes = {
            plan: bytes_per_second / self.bytes(plan, image_gradient=image_gradient)
            for plan in PLANS
        }
        return {"flops": flops_per_second / self.flops(image_gradient=image_gradient), **by_bytes}


@dataclasses.dataclass(eq=False)
class _Value:
    """A tensor between operations.

    Attributes:
        elements: Of one image.
        varies: Whether a parameter is behind it, so that training needs its gradient.
        producer: What wrote it; None for the image. readers: What reads it.
    """

    elements: float
    varies: bool
    producer: _Op | None = None
    readers: list[_Op] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class _Op:
    """An operation on activations.

    Attributes:
        kind: One of the values of `KINDS`. sources: Activations that it reads. result: What it
            writes.
        products: Multiply-adds of one image. read: Elements of the first source that it reads.
    """

    kind: str
    sources: list[_Value]
    result: _Value
    products: float
    read: float

    @property
    def source(self) -> _Value:
        """The only source, or the first."""
        return self.sources[0]


class _Trace(TorchDispatchMode):
    """Records the operations that follow from one tensor."""

    def __init__(self, image: Tensor) -> None:
        """Starts at the image, (NUM_IMAGES, 3, H, W)."""
        super().__init__()
        self.ops: list[_Op] = []
        self.unaccounted: set[str] = set()
        self._kept: list[Tensor] = []  # alive, so that no later tensor gets the same id
        self._values: dict[int, _Value] = {}
        self._bind(image, _Value(image.numel() / NUM_IMAGES, varies=False))

    def _bind(self, tensor: Tensor, value: _Value) -> None:
        """Makes `tensor` stand for `value` from now on, in-place operations included."""
        self._kept.append(tensor)
        self._values[id(tensor)] = value

    def has_seen(self, tensor: Tensor) -> bool:
        """Whether `tensor` follows from the image."""
        return id(tensor) in self._values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and notes it."""
        read = [id(arg) for arg in tree_leaves(args)]
        sources = [self._values[key] for key in read if key in self._values]
        returned = func(*args, **(kwargs or {}))
        if sources:
            result = returned[0] if isinstance(returned, tuple) else returned
            self._note(func.overloadpacket.__name__, args, sources, result)
        return returned

    def _note(self, name: str, args: Any, sources: list[_Value], result: Tensor) -> None:
        """Appends an operation, or lets a view stand for what it shows."""
        if name in VIEWS:
            self._bind(result, sources[0])
            return
        kind = KINDS.get(name)
        if kind is None or (kind == "add" and len(sources) != 2):
            self.unaccounted.add(name)
        elements = result.numel() / NUM_IMAGES
        products, read = 0.0, sources[0].elements
        if kind == "convolution":
            weight = args[1]
            products = elements * weight[0].numel()
            if weight[0, 0].numel() == 1:  # a strided 1x1 kernel reads no more than it uses
                read /= math.prod(args[3])
        elif kind == "linear":
            products = elements * args[2].shape[0]
        has_weights = kind in ("convolution", "linear", "norm")
        varies = has_weights or any(source.varies for source in sources)
        value = _Value(elements, varies)
        op = _Op(kind or "", sources, value, products, read)
        value.producer = op
        for source in sources:
            source.readers.append(op)
        self.ops.append(op)
        self._bind(result, value)


def _trace(model: nn.Module, image_size: int) -> _Trace:
    """The operations of a forward pass over images without data."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    image = torch.empty(NUM_IMAGES, 3, image_size, image_size, device="meta")
    with torch.no_grad(), _Trace(image) as trace:
        logits = functional_call(model, empty, (image,))
    if not trace.has_seen(logits):
        raise ValueError(f"{type(model).__name__}: its logits cannot be traced back to the image")
    return trace


def _elements(trace: _Trace, plan: str, itemsize: int) -> dict[str, float]:
    """Elements read and written for one image, by group; `IMAGE_GRADIENT` is one of them."""
    found: dict[str, float] = defaultdict(float)
    fused = {} if plan == "A" else _fused_norms(trace)
    free = {op for absorbed in fused.values() for op in absorbed}
    bit = 1 / (8 * itemsize)
    values = {value for op in trace.ops for value in (*op.sources, op.result)}
    for op in trace.ops:
        num, source = op.result.elements, op.source
        to_input = "conv input gradients" if source.varies else IMAGE_GRADIENT
        if op.kind in ("convolution", "linear"):
            found["conv forward"] += op.read + num
            found["conv weight gradients"] += op.read + num
            found[to_input] += num + source.elements
        elif op.kind == "pool":
            found["pool and pad"] += 2 * (source.elements + num) if source.varies else 0
        elif op in free:
            continue
        elif op.kind == "norm":
            forward, backward = 3.0, 5.0
            if len(fused.get(op, ())) == 2:  # with an addition
                forward += 1 + (bit if plan == "B2" else 0)
                backward += 1 + bit if plan == "B2" else 3
            found["norm, ReLU, add forward"] += forward * num
            found["norm, ReLU, add backward"] += backward * num
        elif op.kind in ("relu", "add"):
            forward, backward = (2, 3) if op.kind == "relu" else (3, 0)
            found["norm, ReLU, add forward"] += forward * num
            found["norm, ReLU, add backward"] += backward * num
    for value in values:
        sums = max(0, len(value.readers) - 1)
        group = "gradient sums" if value.varies else IMAGE_GRADIENT
        found[group] += sums * value.elements * (1 if plan == "B2" else 3)
    return found


def _fused_norms(trace: _Trace) -> dict[_Op, tuple[_Op, ...]]:
    """Batch norms with what one kernel takes along: their ReLU, or an addition and its ReLU."""
    fused: dict[_Op, tuple[_Op, ...]] = {}
    for relu in trace.ops:
        if relu.kind != "relu" or len(relu.source.readers) > 1:
            continue
        before = relu.source.producer
        if before is None:
            continue
        if before.kind == "norm":
            fused[before] = (relu,)
        elif before.kind == "add":
            norms = [
                value.producer
                for value in before.sources
                if value.producer and value.producer.kind == "norm" and len(value.readers) == 1
            ]
            if norms:
                fused[norms[0]] = (before, relu)
    return fused


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def floors_table(found: dict[str, Floors]) -> str:
    """Both floors of each network."""
    header = ["network", "GF forward", "+ backward", "+ image gradient"]
    header += [f"MB {plan}" for plan in PLANS] + ["of which image gradient"]
    rows = []
    for name, floors in found.items():
        flops = [floors.forward_flops, *(floors.flops(image_gradient=g) for g in (False, True))]
        moved = [floors.bytes(plan, image_gradient=True) for plan in PLANS]
        moved.append(floors.image_gradient_bytes)
        cells = [f"{value / 1e9:.2f}" for value in flops] + [f"{v / 1e6:.1f}" for v in moved]
        rows.append([name, *cells])
    return markdown(header, rows)


def traffic_table(found: dict[str, Floors]) -> str:
    """MB an image by what moves them."""
    rows = [
        [f"{name}, {plan}", *(f"{moved / 1e6:.1f}" for moved in floors.traffic[plan].values())]
        for name, floors in found.items()
        for plan in PLANS
    ]
    return markdown(["network, plan", *GROUPS], rows)


def bounds_table(found: dict[str, Floors], bytes_per_second: float, flops_per_second: float) -> str:
    """Images a second that each floor allows alone."""
    rows = []
    for name, floors in found.items():
        for image_gradient in (False, True):
            bounds = floors.bounds(
                bytes_per_second=bytes_per_second,
                flops_per_second=flops_per_second,
                image_gradient=image_gradient,
            )
            cells = [f"{bound:,.0f}" for bound in bounds.values()]
            rows.append([name, "yes" if image_gradient else "no", *cells])
    header = ["network", "image gradient", "by FLOPs", *(f"by bytes {plan}" for plan in PLANS)]
    return markdown(header, rows)


def main() -> None:
    """Prints the tables of some networks, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["resnet50"])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--itemsize", type=int, default=2, help="bytes of an activation")
    parser.add_argument("--copy-gb-per-second", type=float, help="the device's copy rate")
    parser.add_argument("--tflops", type=float, help="the device's matrix rate")
    flags = parser.parse_args()
    if (flags.copy_gb_per_second is None) != (flags.tflops is None):
        parser.error("--copy-gb-per-second and --tflops belong together")
    found: dict[str, Floors] = {}
    for arch in flags.arch:
        found[f"{arch} @{flags.image_size}"] = Floors.of_arch(
            arch, flags.image_size, num_classes=flags.num_classes, itemsize=flags.itemsize
        )
    print(floors_table(found))
    print(
        f"\nMB an image by what moves them, without the image gradient:\n\n{traffic_table(found)}"
    )
    if flags.tflops:
        bounds = bounds_table(found, flags.copy_gb_per_second * 1e9, flags.tflops * 1e12)
        print(f"\nImages a second at most:\n\n{bounds}")
    for name, floors in found.items():
        if floors.unaccounted:
            print(f"\n{name}: in neither floor: {', '.join(floors.unaccounted)}")


if __name__ == "__main__":
    main()
