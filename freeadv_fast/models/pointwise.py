"""1x1 convolutions as matrix products, where those are faster.

Activations in channels_last memory are the rows of a matrix, M = N * H * W of them, and a 1x1
convolution with weight W [out, in] is three products:

    y  = x W^T     [M, out]
    dx = dy W      [M, in]
    dW = dy^T x    [out, in], sums over M, in float32

With stride 2 the rows of x are every second pixel of every second row, which are gathered first,
and dx is laid out between zeros.

Neither cuDNN nor cuBLAS wins everywhere. Microseconds of cuDNN and of the product, ResNet-50, batch
256, bfloat16, one H200:

                       output     input gradient  weight gradient
    256 > 1024, 14 px   56   74       87   44         83   52
    512 > 2048,  7 px   93   83       57   43        113   46
    64  >  256, 56 px  146  148      134  125        126  127

So a layer chooses, for each direction, shape and dtype, as cuDNN does among its own algorithms, and
under the same switch (`torch.backends.cudnn.benchmark`): where a shape is first met, both are timed
on the layer's own tensors, and the choice holds for the process (`CHOICES`; a run writes them to
env.json). Nothing is timed while a CUDA graph is recorded, whose steps have run before; what is
met there for the first time is a convolution. The ways differ in rounding only, as cuDNN's
algorithms do, so that each rank may choose for itself: all apply the same sum of their gradients.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freeadv_fast.models.fused import twin_of
from freeadv_fast.models.half_weights import weight_for

Direction = Literal["output", "input_gradient", "weight_gradient"]
Way = Literal["convolution", "product"]

# Share of a convolution's time that a product has to save: less is noise, and ties are cuDNN's.
MARGIN = 0.02

WARM_UP, REPETITIONS = 2, 5


class Layer(NamedTuple):
    """What choices are made for.

    Attributes:
        input: (N, in, H, W), the shape of the input.
        out_channels: Channels of the output.
        stride: 1 or 2, both ways.
        dtype: Of input, weight and output.
    """

    input: tuple[int, ...]
    out_channels: int
    stride: int
    dtype: torch.dtype

    @property
    def output(self) -> tuple[int, int, int, int]:
        """(N, out, ceil(H / stride), ceil(W / stride)), the shape of the output."""
        num_images, _, height, width = self.input
        stride = self.stride
        return num_images, self.out_channels, -(-height // stride), -(-width // stride)


class Choice(NamedTuple):
    """How one direction of a layer is computed.

    Attributes:
        way: The chosen one.
        microseconds: Of each.
    """

    way: Way
    microseconds: dict[Way, float]


CHOICES: dict[Layer, dict[Direction, Choice]] = {}


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution that is a matrix product in the directions in which that is faster.

    On a GPU, in half precision and channels_last; elsewhere it is `nn.Conv2d`.
    """

    reads_half_weights = True

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, **options: object
    ) -> None:
        """Builds the convolution.

        Args:
            in_channels: Channels of the input.
            out_channels: Channels of the output.
            stride: 1 or 2.
            **options: device, dtype.
        """
        super().__init__(in_channels, out_channels, 1, stride=stride, bias=False, **options)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, ceil(H / stride), ceil(W / stride)), as autocast says."""
        device, weight = input.device.type, self.weight
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            input, weight = input.to(dtype), weight_for(weight, dtype)
        if _is_taken(input, weight):
            return pointwise_conv2d(input, weight, self.stride[0])
        output: Tensor = self._conv_forward(input, weight, None)
        return output


def use_products(model: nn.Module) -> None:
    """Lets a network's 1x1 convolutions be products, in place below its top level.

    To be called before anything builds module trees (`DualNetwork`). Convolutions with a bias,
    padding, groups or another stride than 1 and 2 stay as they are, and so do subclasses and
    patched ones. Tensors, keys and hooks are shared, and hooks see the same inputs and outputs.

    Args:
        model: The network; parameters stay the same objects under the same keys.
    """
    twins: dict[nn.Module, PointwiseConv2d] = {}  # a layer may stand at several places
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if _is_pointwise(child):
                if child not in twins:
                    twins[child] = twin_of(child, PointwiseConv2d)
                module._modules[name] = twins[child]


def pointwise_conv2d(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """A 1x1 convolution without bias or padding, each direction in the way that is faster.

    Differentiable as often as a convolution. Only the gradients that are asked for are computed.

    Args:
        x: (N, in, H, W) activations in channels_last memory.
        weight: (out, in, 1, 1) of x's dtype.
        stride: Both ways, at least 1.

    Returns:
        (N, out, ceil(H / stride), ceil(W / stride)) of x's dtype, channels_last.
    """
    layer = Layer(tuple(x.shape), len(weight), stride, x.dtype)
    choices = CHOICES.get(layer, {})
    if len(choices) == 3 and all(choice.way == "convolution" for choice in choices.values()):
        return F.conv2d(x, weight, stride=stride)
    weight_path = _WeightPath.apply(weight, (x,), layer)  # type: ignore[no-untyped-call]
    y: Tensor = _Convolution.apply(x, weight, weight_path, layer)  # type: ignore[no-untyped-call]
    return y


def choices_made() -> list[dict[str, Any]]:
    """What was chosen so far and how long each way took, for env.json: an entry a layer's shape."""
    return [
        layer._asdict()
        | {"input": list(layer.input), "dtype": str(layer.dtype).removeprefix("torch.")}
        | {direction: choice._asdict() for direction, choice in choices.items()}
        for layer, choices in CHOICES.items()
    ]


def _is_pointwise(layer: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution that `PointwiseConv2d` computes."""
    return (
        isinstance(layer, nn.Conv2d)
        and type(layer) is nn.Conv2d
        and "forward" not in layer.__dict__
        and layer.bias is None
        and layer.stride in ((1, 1), (2, 2))
        and (layer.kernel_size, layer.padding, layer.groups, layer.padding_mode)
        == ((1, 1), (0, 0), 1, "zeros")
    )


def _is_taken(x: Tensor, weight: Tensor) -> bool:
    """Whether a product may take the convolution's place here.

    Not in float32, where PyTorch's convolutions are in TF32 by default and its products are not.
    Nor where cuDNN's search is off: a shape is then one of many, or met rarely.
    """
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.dtype == weight.dtype
        and x.dim() == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and torch.backends.cudnn.benchmark
    )


class _Convolution(torch.autograd.Function):
    """The output and the input's gradient; the weight's leaves through `weight_path`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, weight_path: Tensor, layer: Layer) -> Tensor:
        """No view, so that in-place operations on it are allowed."""
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return _fastest(layer, "output", x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, None]:
        """The input's gradient, if it is needed, and the output's for the weight's."""
        x, weight = ctx.saved_tensors
        dy = gradients[0].contiguous(memory_format=torch.channels_last)
        needs_dx = ctx.needs_input_grad[0]
        dx = _fastest(ctx.layer, "input_gradient", dy, x, weight) if needs_dx else None
        return dx, None, dy, None


class _WeightPath(torch.autograd.Function):
    """The way of the weight's gradient: a node of its own, for attacks to leave out.

    A Function computes the gradients of all its inputs that require one, whichever of them
    `torch.autograd.grad` was asked for. A node on no way to what was asked for does not run.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, inputs: tuple[Tensor], layer: Layer) -> Tensor:
        """A tensor of the output's shape that is never read and has no memory of its own.

        The input comes in a tuple, where autograd sees no way from here to it.
        """
        (x,) = inputs
        ctx.save_for_backward(weight, x)
        ctx.layer = layer
        return x.new_empty(()).expand(layer.output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The weight's gradient."""
        weight, x = ctx.saved_tensors
        return _fastest(ctx.layer, "weight_gradient", gradients[0], x, weight), None, None


def _fastest(layer: Layer, direction: Direction, *tensors: Tensor) -> Tensor:
    """One direction in the way that is faster; where that is not known yet both are timed."""
    ways = WAYS[direction]
    choice = CHOICES.get(layer, {}).get(direction)
    if choice is None and not torch.cuda.is_current_stream_capturing():
        runs = {way: functools.partial(run, layer, *tensors) for way, run in ways.items()}
        # Without memory for a trial the convolution runs, for which cuDNN finds what fits.
        with contextlib.suppress(torch.OutOfMemoryError), torch.no_grad():
            choice = chosen(time_ways(runs))
            CHOICES.setdefault(layer, {})[direction] = choice
    return ways[choice.way if choice is not None else "convolution"](layer, *tensors)


def chosen(microseconds: dict[Way, float]) -> Choice:
    """The product where it saves enough of the convolution's time, else the convolution."""
    is_faster = microseconds["product"] < (1 - MARGIN) * microseconds["convolution"]
    return Choice("product" if is_faster else "convolution", microseconds)


def time_ways(ways: Mapping[Way, Callable[[], Tensor]]) -> dict[Way, float]:
    """Microseconds of each way on the current stream, medians of runs in turn; waits for them.

    Before each run four times the bytes of the L2 cache are filled: it then holds none of the
    tensors, and the host has launched the run before its turn comes.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    num_bytes = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    filled = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    spans: dict[Way, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {way: [] for way in ways}
    for _ in range(WARM_UP + REPETITIONS):
        for way, run in ways.items():
            filled.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            spans[way].append((start, end))
    torch.cuda.current_stream().synchronize()
    return {
        way: round(1000 * statistics.median(a.elapsed_time(b) for a, b in pairs[WARM_UP:]), 1)
        for way, pairs in spans.items()
    }


# The two ways of each direction.


def _output_by_convolution(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """What `nn.Conv2d` does."""
    return F.conv2d(x, weight, stride=layer.stride)


def _output_by_product(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """y = x W^T, over the pixels that the stride leaves."""
    y = torch.empty(layer.output, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    with _float32_sums(x.dtype):
        torch.mm(_rows(_gathered(layer, x)), weight.flatten(1).t(), out=_rows(y))
    return y


def _input_gradient_by_convolution(layer: Layer, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """What autograd does for `nn.Conv2d`."""
    return _convolution_backward(layer, dy, x, weight, (True, False, False))[0]


def _input_gradient_by_product(layer: Layer, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dx = dy W, between zeros where the stride left pixels out."""
    num_images, _, height, width = layer.output
    with _float32_sums(dy.dtype):
        rows = torch.mm(_rows(dy), weight.flatten(1))
    gradient = rows.view(num_images, height, width, -1).permute(0, 3, 1, 2)
    if layer.stride == 1:
        return gradient
    dx = torch.empty_like(x, memory_format=torch.channels_last).zero_()
    dx[:, :, :: layer.stride, :: layer.stride] = gradient
    return dx


def _weight_gradient_by_convolution(layer: Layer, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """What autograd does for `nn.Conv2d`."""
    return _convolution_backward(layer, dy, x, weight, (False, True, False))[1]


def _weight_gradient_by_product(layer: Layer, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dW = dy^T x, with the strides of a weight in channels_last, which DDP's buckets expect."""
    with _float32_sums(x.dtype):
        product = torch.mm(_rows(dy).t(), _rows(_gathered(layer, x)))
    return product[:, None, None].permute(0, 3, 1, 2)


WAYS: dict[Direction, dict[Way, Callable[..., Tensor]]] = {
    "output": {"convolution": _output_by_convolution, "product": _output_by_product},
    "input_gradient": {
        "convolution": _input_gradient_by_convolution,
        "product": _input_gradient_by_product,
    },
    "weight_gradient": {
        "convolution": _weight_gradient_by_convolution,
        "product": _weight_gradient_by_product,
    },
}


def _convolution_backward(
    layer: Layer, dy: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias, those that the mask names."""
    strides, zeros, ones = (layer.stride, layer.stride), (0, 0), (1, 1)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        dy, x, weight, None, strides, zeros, ones, False, zeros, 1, mask
    )
    return gradients


@contextlib.contextmanager
def _float32_sums(dtype: torch.dtype) -> Iterator[None]:
    """Sums that cuBLAS splits are added up in float32 in here, as those of convolutions are.

    By default PyTorch lets it round the parts to half precision first, and a weight's gradient is a
    sum over up to 800,000 rows.
    """
    name = f"allow_{'bf16' if dtype is torch.bfloat16 else 'fp16'}_reduced_precision_reduction"
    matmul = torch.backends.cuda.matmul
    allowed = getattr(matmul, name)
    if allowed:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        if allowed:
            setattr(matmul, name, True)


def _gathered(layer: Layer, x: Tensor) -> Tensor:
    """The pixels that the stride leaves, in channels_last memory; without a stride x itself."""
    stride = layer.stride
    return x[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last)


def _rows(images: Tensor) -> Tensor:
    """(N, C, H, W) in channels_last memory as (N * H * W, C), in the same memory."""
    return images.permute(0, 2, 3, 1).view(-1, images.size(1))
