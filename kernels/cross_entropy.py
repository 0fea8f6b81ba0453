"""Cross-entropy of a pass, and what the metrics count of it.

With logits z of n images over C classes and their labels y, of which a share s is spread over all
classes,

    loss = sum_i (logsumexp(z_i) - t_i . z_i),    dz_i = g (softmax(z_i) - t_i),
    t_i = (1 - s) onehot(y_i) + s / C,

and the metrics' row of sums grows by (loss, images whose largest logit is their label's, n, 0), or
where the loss is not finite by (0, hits, n, 1).

Fused, three launches where PyTorch makes 25: (1) one program an image computes its loss and hit;
(2) one program adds them up, in the same order in every run, and counts; (3) backward, one program
an image computes its softmax again and writes dz. Together 9.7 us on an H200 for 256 images of 1000
classes, where the 25 take 44.9; 7.8 and 35.7 for 128 of 10
(bench/results/h200/trials/cross-entropy.log).

Numerics: float32; the metrics are float64. s is compiled in, so that at 0 nothing of it is there. A
label outside of 0..classes-1 makes the loss NaN, where PyTorch's kernel ends the process. Of equal
largest logits the first is the guess.

Source: Bridle, "Probabilistic Interpretation of Feedforward Classification Network Outputs", 1990,
as `torch.nn.functional.cross_entropy` computes it; label smoothing: Szegedy et al., "Rethinking the
Inception Architecture for Computer Vision", CVPR 2016, section 7.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # torch builds without CUDA may come without Triton; the reference remains

    def jit(kernel):
        """Leaves a kernel as it is; nothing launches it."""
        return kernel


# A program holds a row of logits, and one program the losses of all images.
MOST_CLASSES = MOST_IMAGES = 8192


@torch.no_grad()
def count_ref_(sums: Tensor, loss_sum: Tensor, hits: Tensor, num_images: int) -> None:
    """Counts a pass into a row of sums, (4,): loss, hits, images, non-finite losses."""
    is_finite = torch.isfinite(loss_sum)
    sums[0] += loss_sum.masked_fill(~is_finite, 0.0)
    sums[1] += hits
    sums[2] += num_images
    sums[3] += ~is_finite


def cross_entropy_sum_ref_(
    logits: Tensor, labels: Tensor, sums: Tensor, smoothing: float = 0.0
) -> Tensor:
    """The reference, in PyTorch's own operations."""
    loss_sum = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    count_ref_(sums, loss_sum.detach(), (logits.detach().argmax(1) == labels).sum(), len(logits))
    return loss_sum


@jit
def _row_of(logits_ptr, row, classes, BLOCK: tl.constexpr):
    """A row of logits, its columns, and its largest value; other columns are -inf."""
    columns = tl.arange(0, BLOCK)
    where = logits_ptr + row.to(tl.int64) * classes + columns
    z = tl.load(where, mask=columns < classes, other=-float("inf"))
    return z, columns, tl.max(z, axis=0)


@jit
def _losses_kernel(
    found_ptr,  # [2, n] f32: losses, hits
    logits_ptr,  # [n, classes] f32
    labels_ptr,  # [n] i64
    num_images,
    classes,
    SMOOTHING: tl.constexpr,  # s
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    z, columns, largest = _row_of(logits_ptr, row, classes, BLOCK)
    label = tl.load(labels_ptr + row)
    logsumexp = largest + tl.log(tl.sum(tl.exp(z - largest), axis=0))
    own = tl.sum(tl.where(columns == label, z, 0.0), axis=0)
    is_label = (label >= 0) & (label < classes)
    guess = tl.min(tl.where(z == largest, columns, BLOCK), axis=0)
    loss = logsumexp - own
    if SMOOTHING > 0:
        # From the label's logit to the mean one; around the largest, so that little cancels.
        distances = tl.where(columns < classes, z - largest, 0.0)
        loss += SMOOTHING * ((own - largest) - tl.sum(distances, axis=0) / classes)
    tl.store(found_ptr + row, tl.where(is_label, loss, float("nan")))
    tl.store(found_ptr + num_images + row, tl.where(guess == label, 1.0, 0.0))


@jit
def _count_kernel(
    loss_ptr,  # [] f32
    sums_ptr,  # [4] f64: loss, hits, images, non-finite losses
    found_ptr,  # [2, n] f32
    num_images,
    BLOCK: tl.constexpr,
):
    images = tl.arange(0, BLOCK)
    is_there = images < num_images
    loss = tl.sum(tl.load(found_ptr + images, mask=is_there, other=0.0), axis=0)
    hits = tl.sum(tl.load(found_ptr + num_images + images, mask=is_there, other=0.0), axis=0)
    is_finite = tl.abs(loss) < float("inf")
    tl.store(loss_ptr, loss)
    tl.store(sums_ptr, tl.load(sums_ptr) + tl.where(is_finite, loss, 0.0).to(tl.float64))
    tl.store(sums_ptr + 1, tl.load(sums_ptr + 1) + hits.to(tl.float64))
    tl.store(sums_ptr + 2, tl.load(sums_ptr + 2) + num_images)
    tl.store(sums_ptr + 3, tl.load(sums_ptr + 3) + tl.where(is_finite, 0.0, 1.0).to(tl.float64))


@jit
def _gradient_kernel(
    dz_ptr,  # [n, classes] f32
    logits_ptr,  # [n, classes] f32
    labels_ptr,  # [n] i64
    gradient_ptr,  # [] f32
    classes,
    SMOOTHING: tl.constexpr,  # s
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    z, columns, largest = _row_of(logits_ptr, row, classes, BLOCK)
    exponentials = tl.exp(z - largest)
    softmax = exponentials / tl.sum(exponentials, axis=0)
    target = tl.where(columns == tl.load(labels_ptr + row), 1.0, 0.0)
    if SMOOTHING > 0:
        target = (1 - SMOOTHING) * target + SMOOTHING / classes
    dz = tl.load(gradient_ptr) * (softmax - target)
    where = dz_ptr + row.to(tl.int64) * classes + columns
    tl.store(where, dz, mask=columns < classes)


def supports(logits: Tensor, labels: Tensor) -> bool:
    """Whether the kernels take these: float32 logits, each image's in a row, and int64 labels."""
    return (
        logits.dtype is torch.float32
        and labels.dtype is torch.int64
        and logits.dim() == 2
        and labels.shape == logits.shape[:1]
        and 0 < logits.shape[0] <= MOST_IMAGES
        and 0 < logits.shape[1] <= MOST_CLASSES
    )


def _constants(classes: int, smoothing: float) -> dict[str, float]:
    """What the kernels of a row are compiled for."""
    return {"SMOOTHING": smoothing, **_block(classes)}


def _block(classes: int) -> dict[str, int]:
    """The columns of a program and its warps: up to 16 values a thread."""
    block = triton.next_power_of_2(classes)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


class _CrossEntropy(torch.autograd.Function):
    """Loss and count forward; the gradient is the second Function's."""

    @staticmethod
    def forward(ctx, logits, labels, sums, smoothing):
        num, classes = logits.shape
        constants = _constants(classes, smoothing)
        found, loss = logits.new_empty((2, num)), logits.new_empty(())
        with torch.cuda.device_of(logits):
            _losses_kernel[num,](found, logits, labels, num, classes, **constants)
            _count_kernel[1,](loss, sums, found, num, BLOCK=triton.next_power_of_2(num))
        ctx.save_for_backward(logits, labels)
        ctx.smoothing = smoothing
        return loss

    @staticmethod
    def backward(ctx, gradient):
        return _Gradient.apply(gradient, *ctx.saved_tensors, ctx.smoothing), None, None, None


class _Gradient(torch.autograd.Function):
    """The gradient, whose own derivative is an error and not a silent zero."""

    @staticmethod
    def forward(ctx, gradient, logits, labels, smoothing):
        num, classes = logits.shape
        constants = _constants(classes, smoothing)
        dz = torch.empty_like(logits)
        with torch.cuda.device_of(logits):
            _gradient_kernel[num,](dz, logits, labels, gradient, classes, **constants)
        return dz

    @staticmethod
    def backward(ctx, *gradients):
        """Second derivatives.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "cross_entropy_sum_ was differentiated twice, and its kernels have first derivatives "
            "only; use torch.nn.functional.cross_entropy"
        )


def cross_entropy_sum_(
    logits: Tensor, labels: Tensor, sums: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy summed over the images of a pass, which is counted; differentiable once.

    Args:
        logits: (n, classes) float32; see `supports`.
        labels: (n,) int64.
        sums: (4,) float64, updated: losses, hits, images, non-finite losses.
        smoothing: Share of a label that is spread over all classes, in [0, 1).

    Returns:
        () float32.

    Raises:
        RuntimeError: in backward, of a second derivative.
    """
    loss: Tensor = _CrossEntropy.apply(logits.contiguous(), labels.contiguous(), sums, smoothing)
    return loss
