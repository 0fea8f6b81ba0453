"""Batch norm that adds a residual and applies ReLU in the same pass, and joins its neighbours."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from freeadv_fast import ops
from freeadv_fast.models.batch_norm import GhostBatchNorm2d
from freeadv_fast.models.fused.carried import moments_of, with_moments, with_shortcut
from freeadv_fast.models.half_weights import HalfWeightConv2d, under_autocast
from freeadv_fast.models.twins import is_stock
from freeadv_fast.ops import dispatch


class FusedBatchNorm2d(GhostBatchNorm2d):
    """`GhostBatchNorm2d` that can add a residual and apply (leaky) ReLU in the same pass.

    Attributes:
        group: Images that share training statistics, at most; None for the whole minibatch.
        relu: Whether the output goes through ReLU, after the addition.
        negative_slope: That of the ReLU, at least 0; 0 unless it is a leaky one.
        pool: Whether a plain ReLU's output goes through 3x3 max pooling, stride 2 and padding 1.
    """

    group: int | None  # type: ignore[assignment]

    def __init__(
        self,
        num_features: int,
        *,
        group: int | None = None,
        relu: bool = True,
        negative_slope: float = 0.0,
        pool: bool = False,
        **options: object,
    ) -> None:
        """Takes what `nn.BatchNorm2d` takes, the group size and what follows, if anything.

        Args:
            num_features: Channels.
            group: Images that share statistics, at least 1; None for the whole minibatch.
            relu: Whether the output goes through ReLU.
            negative_slope: The slope of a leaky ReLU, at least 0; unused without `relu`.
            pool: Whether the output of a plain ReLU goes through the pooling of a ResNet's stem.
            **options: eps, momentum, affine, track_running_stats, device, dtype.
        """
        super().__init__(num_features, group=group, **options)  # type: ignore[arg-type]
        self.relu = relu
        self.negative_slope = negative_slope
        self.pool = pool

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        residual_norm: FusedBatchNorm2d | None = None,
    ) -> Tensor:
        """Normalises, adds, activates and pools; memory format and dtype are kept.

        Args:
            input: (N, C, H, W) activations.
            residual: Added before ReLU, in the shape of `input`; None for nothing.
            residual_norm: What the residual goes through first; None for nothing.

        Raises:
            ValueError: `input` is not 4-D.
            RuntimeError: shapes disagree, or a channel holds a single value in training.
        """
        if residual is not None and residual_norm is not None:
            joined = self._joined(input, residual, residual_norm)
            if joined is not None:
                return joined
            residual = residual_norm(residual)
        norm = self._norm()
        if norm is None:
            return self._unfused(input, residual)
        if residual is not None and (residual.dtype != input.dtype or self.pool):
            return self._unfused(input, residual)
        self._check_input_dim(input)
        if self.pool:
            # The end of a stem, whose output the first block and its shortcut read.
            pooled = ops.batch_norm_relu_pool(
                input,
                norm.weight,
                norm.bias,
                norm.running_mean,
                norm.running_var,
                training=self.training,
                momentum=norm.momentum,
                eps=norm.eps,
                num_groups=self._num_groups(input),
                fork=True,
                num_batches_tracked=norm.num_batches_tracked,
            )
            return pooled if isinstance(pooled, Tensor) else with_shortcut(*pooled)
        # A residual marks the end of a block: the next block reads its output twice.
        output = ops.batch_norm_act(
            input,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            training=self.training,
            momentum=norm.momentum,
            eps=norm.eps,
            num_groups=self._num_groups(input),
            relu=self.relu,
            residual=residual,
            negative_slope=self.negative_slope,
            fork=residual is not None,
            num_batches_tracked=norm.num_batches_tracked,
            moments=self._moments(input),
        )
        return output if isinstance(output, Tensor) else with_shortcut(*output)

    def of_product(
        self, layer: nn.Module, input: Tensor, shortcut: Tensor, projection: list[nn.Module] | None
    ) -> Tensor | None:
        """This norm of a convolution, plus a shortcut, where all can be one call, else None.

        Args:
            layer: The convolution.
            input: (N, K, H, W), what it reads.
            shortcut: What is added; with a projection, what that reads.
            projection: The shortcut's layers, a fused norm the last of them; None for no layers.
        """
        if "product-norm" not in dispatch.FAST_PATHS or not self.relu or self.negative_slope:
            return None
        product = _product(layer, self, input)
        added = shortcut if projection is None else self._projected(shortcut, projection)
        if product is None or added is None:
            return None
        if added is shortcut and shortcut.dtype != _dtype_of_product(input):
            return None
        num_groups = self._num_groups(input)
        output = ops.product_norm(product, added, num_groups=num_groups, fork=True)
        return output if isinstance(output, Tensor) else with_shortcut(*output)

    def with_alias(self, input: Tensor, *, of_input: bool) -> tuple[Tensor, Tensor] | None:
        """The output, and what a second reader reads, where one call can sum both gradients.

        Args:
            input: (N, C, H, W) activations.
            of_input: Whether the second reads the input, and not the output.
        """
        norm = self._norm()
        if "two-readers" not in dispatch.FAST_PATHS or norm is None or not self.relu or self.pool:
            return None
        self._check_input_dim(input)
        num_groups, slope = self._num_groups(input), self.negative_slope
        if of_input:
            return ops.shared_norm_act(
                input,
                norm,
                training=self.training,
                num_groups=num_groups,
                negative_slope=slope,
                moments=self._moments(input),
            )
        both = ops.batch_norm_act(
            input,
            *norm[:4],
            training=self.training,
            momentum=norm.momentum,
            eps=norm.eps,
            num_groups=num_groups,
            negative_slope=slope,
            fork=True,
            num_batches_tracked=norm.num_batches_tracked,
            moments=self._moments(input),
        )
        assert isinstance(both, tuple)  # forked
        return both

    def block_sum(self, input: Tensor, shortcut: Tensor) -> Tensor:
        """The sum at the end of a block whose last norm this is, and on it its moments.

        They are of this norm's groups, and wanted in training only. Where the next norm's are
        others, it takes its statistics itself.

        Args:
            input: (N, C, H, W), of the block's last convolution.
            shortcut: What is added.
        """
        is_alike = input.dim() == 4 and input.shape == shortcut.shape
        if "block-sums" not in dispatch.FAST_PATHS or not self.training or not is_alike:
            return input + shortcut
        y, moments = ops.block_sum(input, shortcut, num_groups=self._num_groups(input))
        return y if moments is None else with_moments(y, moments)

    def _moments(self, input: Tensor) -> Tensor | None:
        """What the block before knows of this norm's input, in training."""
        return moments_of(input, self._num_groups(input)) if self.training else None

    def _projected(self, shortcut: Tensor, projection: list[nn.Module]) -> ops.Product | None:
        """A shortcut's convolution and norm where they can join this norm's, else None."""
        *layers, norm = projection
        assert isinstance(norm, FusedBatchNorm2d)
        if "joined-norms" not in dispatch.FAST_PATHS or len(layers) != 1:
            return None
        is_alike = not norm.relu and norm.group == self.group
        return _product(layers[0], norm, shortcut) if is_alike else None

    def _norm(self) -> ops.Norm | None:
        """The tensors and numbers of a norm that the fused operations take, else None."""
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        # Without momentum torch takes a cumulative average, whose count it reads on the host.
        if self.momentum is None or any(tensor is None for tensor in tensors):
            return None
        if not self.track_running_stats or self.num_batches_tracked is None:
            return None
        return ops.Norm(*tensors, self.num_batches_tracked, self.momentum, self.eps)

    def _num_groups(self, input: Tensor) -> int:
        """Groups of images with statistics of their own."""
        if not self.training or self.group is None:
            return 1
        # No group of one image, as in `GhostBatchNorm2d`.
        return max(1, min(math.ceil(len(input) / self.group), len(input) // 2))

    def _joined(self, input: Tensor, residual: Tensor, other: FusedBatchNorm2d) -> Tensor | None:
        """The output where an unhooked residual norm can be one with this, else None."""
        norm, residual_norm = self._norm(), other._norm()
        fits = (
            "joined-norms" in dispatch.FAST_PATHS
            and input.dim() == 4
            and (input.shape, input.dtype) == (residual.shape, residual.dtype)
            and self.training
            and other.training
            and self.group == other.group
            and self.relu
            and not (self.negative_slope or self.pool or other.relu or other.pool)
            and is_stock(other, FusedBatchNorm2d)
        )
        if not fits or norm is None or residual_norm is None:
            return None
        num_groups = self._num_groups(input)
        output = ops.joined_norms(
            input, norm, residual, residual_norm, num_groups=num_groups, fork=True
        )
        return output if isinstance(output, Tensor) else with_shortcut(*output)

    def _unfused(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """The same in up to four passes, for what the fused operations do not take."""
        plain = nn.BatchNorm2d if self.group is None else GhostBatchNorm2d
        output: Tensor = plain.forward(self, input)  # type: ignore[arg-type]
        if residual is not None:
            output += residual
        if self.relu and self.negative_slope:
            output = F.leaky_relu(output, self.negative_slope, inplace=True)
        elif self.relu:
            output = F.relu(output, inplace=True)
        return F.max_pool2d(output, 3, stride=2, padding=1) if self.pool else output

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        slope = f", negative_slope={self.negative_slope}" if self.negative_slope else ""
        pool = ", pool=True" if self.pool else ""
        return f"{super().extra_repr()}, relu={self.relu}{slope}{pool}"


def _dtype_of_product(input: Tensor) -> torch.dtype:
    """What a convolution makes of an input whose weights have its dtype, or under autocast."""
    device = input.device.type
    is_cast = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_cast else input.dtype


def _product(layer: nn.Module, norm: FusedBatchNorm2d, x: Tensor) -> ops.Product | None:
    """An unhooked convolution of single pixels and its unhooked norm in training, else None."""
    stock = is_stock(layer, nn.Conv2d, HalfWeightConv2d) and is_stock(norm, FusedBatchNorm2d)
    known = norm._norm()
    if not stock or known is None or norm.pool or not norm.training:
        return None
    assert isinstance(layer, nn.Conv2d)
    sizes = [_pair(size) for size in (layer.kernel_size, layer.stride, layer.dilation)]
    is_padded = _pair(layer.padding) != (0, 0)
    if sizes != [(1, 1)] * 3 or is_padded or layer.groups > 1 or layer.bias is not None:
        return None
    return ops.Product(x, under_autocast(layer.weight), known)
