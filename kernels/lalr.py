"""Layer-wise adaptive rates: one update of many tensors at once, in place.

For each tensor theta with gradient g:

    m <- beta m + (1 - beta) g                     mean of the gradient
    v <- 0.999 v + 0.001 g^2                       and of its square; not corrected for their start
    u  = m / (sqrt(v) + 1e-6) + decay * theta
    theta <- theta - lr * ratio * u                ratio = clip(|theta|_2, c_l, c_u) / |u|_2

The ratio is 1 where the clipped norm or |u| is 0, as for biases before their first step, and for
vectors and scalars where these are exempt.

Fused, two launches for all tensors: (1) m, v and, of every chunk of a tensor, the sums of theta^2
and u^2; (2) each chunk's program adds up the sums of its tensor, always in the same order, and
moves theta. No atomics: results are the same in every run. Tensors are found by a table of their
addresses (`multi_tensor`).

Bytes per element, float32: (1) reads theta, g, m, v and writes m, v, 24; (2) reads theta, m, v and
writes theta, 16. 40 in all, where SGD with momentum moves 20 in one launch. (2) walks backwards, so
that it finds in L2 what (1) has touched last.

Accesses of a thread: 16 bytes where all addresses are multiples of 16, as the allocator's are. In a
bucket of data parallelism gradients follow each other without gaps: 4 bytes then, side by side.

Numerics: float32, division and root rounded to nearest. Under fp16's gradient scaler gradients are
divided by the scale as they are read; after an overflow both launches leave everything as it is,
and the host never learns of it.

Sources: Zhang et al., "Distributed Adversarial Training to Robustify Deep Neural Networks at
Scale", UAI 2022, Algorithm 1 and the authors' optimizer; You et al., "Large Batch Optimization for
Deep Learning: Training BERT in 76 minutes", 2020.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from freeadv_fast.kernels import multi_tensor
from freeadv_fast.kernels.multi_tensor import (
    NOWHERE,
    addresses_of,
    are_aligned,
    in_layout_of,
    tensor_at,
)

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # torch builds without CUDA may come without Triton; the reference remains

    def jit(kernel):
        """Leaves a kernel as it is; nothing launches it."""
        return kernel


BETA2 = 0.999
EPS = 1e-6
# Values of one batch of the reference: few calls for the many small tensors, and a scratch that
# stays as small as the largest tensor.
BATCH = 1 << 18
# 4 warps, 16 bytes a thread and tensor.
NUM_THREADS = 128
BLOCK = 4 * NUM_THREADS
# Tiles of a chunk. ResNet-50 has 3,200 chunks of 8,192 values, 24 to each of an H100's SMs; the
# largest tensor's 288 pairs of sums are 2 % of what a program of launch (2) reads.
TILES = 16
CHUNK = TILES * BLOCK


def _line(tensor: Tensor) -> Tensor:
    """A dense tensor's values in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _batches(params: Sequence[Tensor]) -> Iterator[slice]:
    """Consecutive tensors that together have just enough values for a batch."""
    start = num_values = 0
    for end, param in enumerate(params, 1):
        num_values += param.numel()
        if num_values >= BATCH or end == len(params):
            yield slice(start, end)
            start, num_values = end, 0


def lalr_ref_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta: float,
    weight_decay: float,
    min_norm: float,
    max_norm: float,
    exempt: bool,
) -> None:
    """The update in plain PyTorch, and the path of a CPU; see `ops.lalr_`.

    What torch's fused Adam adds to the decay term after infinitely many steps, when nothing is left
    of its bias correction, makes it u: one pass for m, v and u.
    """
    present = [i for i, g in enumerate(grads) if g is not None]
    every = [[tensors[i] for i in present] for tensors in (params, grads, exp_avgs, exp_avg_sqs)]
    every[1] = in_layout_of(every[0], every[1])
    batches = list(_batches(every[0]))
    most = max((sum(p.numel() for p in every[0][batch]) for batch in batches), default=0)
    # One for all batches: fresh pages for each took longer to come than to be filled.
    scratch = torch.empty(most, dtype=params[0].dtype, device=params[0].device)
    infinity = torch.full((), torch.inf, device=scratch.device)
    for batch in batches:
        # As lines, for fused Adam copies what is not contiguous.
        theta, g, m, v = ([_line(t) for t in tensors[batch]] for tensors in every)
        sizes = [len(line) for line in theta]
        u = scratch[: sum(sizes)].split(sizes)
        for decayed, line in zip(u, theta, strict=True):
            torch.mul(line, weight_decay, out=decayed)
        torch._fused_adam_(
            u,
            g,
            m,
            v,
            [],
            [infinity] * len(u),
            lr=-1.0,
            beta1=beta,
            beta2=BETA2,
            weight_decay=0.0,
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )
        norm = torch.stack(torch._foreach_norm(theta)).clamp_(min_norm, max_norm)
        u_norm = torch.stack(torch._foreach_norm(u))
        ratio = torch.where((norm > 0) & (u_norm > 0), norm / u_norm, 1.0)
        if exempt:
            is_vector = torch.tensor([p.ndim < 2 for p in every[0][batch]], device=ratio.device)
            ratio.masked_fill_(is_vector, 1.0)
        torch._foreach_addcmul_(theta, u, (-lr * ratio).unbind())


@jit
def _direction(m, v, theta, weight_decay, EPS: tl.constexpr):
    """u of the formula."""
    return tl.div_rn(m, tl.sqrt_rn(v) + EPS) + weight_decay * theta


@jit
def _moments(
    m_ptr,
    v_ptr,
    theta_ptr,
    grad_ptr,
    at,
    left,
    inverse_scale,
    beta,
    weight_decay,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Updates m and v of one tile, at offsets `at`; if MASKED, only where they are below `left`.

    Returns:
        theta^2 and u^2, zeros where masked.
    """
    mask = at < left if MASKED else None
    other = 0.0 if MASKED else None
    theta = tl.load(theta_ptr + at, mask=mask, other=other)
    grad = tl.load(grad_ptr + at, mask=mask, other=other) * inverse_scale
    m = tl.load(m_ptr + at, mask=mask, other=other)
    v = tl.load(v_ptr + at, mask=mask, other=other)
    m = beta * m + (1 - beta) * grad
    v = BETA2 * v + (1 - BETA2) * grad * grad
    tl.store(m_ptr + at, m, mask=mask)
    tl.store(v_ptr + at, v, mask=mask)
    u = _direction(m, v, theta, weight_decay, EPS)
    return theta * theta, u * u


@jit
def _moments_kernel(
    partial_ptr,  # [chunks, 2] fp32, sums of theta^2 and u^2
    table_ptr,  # [4, tensors] i64, addresses of parameters, gradients, m and v
    layout_ptr,  # [3, tensors] i64, values, first chunk, whether exempt
    tensor_ptr,  # [chunks] i64, the tensor of each chunk
    grad_scale_ptr,  # [] fp32, or None
    found_inf_ptr,  # [] fp32, or None
    num_tensors,
    beta,
    weight_decay,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    NOWHERE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A program takes one chunk: TILES * BLOCK neighbouring values of a tensor."""
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0.0:
            return
    inverse_scale = 1.0
    if grad_scale_ptr is not None:
        inverse_scale = 1.0 / tl.load(grad_scale_ptr)
    chunk = tl.program_id(0)
    tensor = tl.load(tensor_ptr + chunk)
    if tl.load(table_ptr + num_tensors + tensor) == NOWHERE:
        return
    start = (chunk - tl.load(layout_ptr + num_tensors + tensor)) * (TILES * BLOCK)
    left = tl.minimum(tl.load(layout_ptr + tensor) - start, TILES * BLOCK)
    theta = tensor_at(table_ptr, tensor, tl.float32, ALIGNED) + start
    grad = tensor_at(table_ptr, num_tensors + tensor, tl.float32, ALIGNED) + start
    m = tensor_at(table_ptr, 2 * num_tensors + tensor, tl.float32, ALIGNED) + start
    v = tensor_at(table_ptr, 3 * num_tensors + tensor, tl.float32, ALIGNED) + start
    offsets = tl.arange(0, BLOCK)
    theta_sum = tl.zeros([BLOCK], tl.float32)
    u_sum = tl.zeros([BLOCK], tl.float32)
    # Whole chunks go unmasked, for wide accesses.
    if left == TILES * BLOCK:
        for tile in tl.range(0, TILES, loop_unroll_factor=1):
            at = offsets + tile * BLOCK
            theta2, u2 = _moments(
                m, v, theta, grad, at, left, inverse_scale, beta, weight_decay, BETA2, EPS, False
            )
            theta_sum += theta2
            u_sum += u2
    else:
        done = 0
        while done < left:
            at = offsets + done
            theta2, u2 = _moments(
                m, v, theta, grad, at, left, inverse_scale, beta, weight_decay, BETA2, EPS, True
            )
            theta_sum += theta2
            u_sum += u2
            done += BLOCK
    tl.store(partial_ptr + 2 * chunk, tl.sum(theta_sum, 0))
    tl.store(partial_ptr + 2 * chunk + 1, tl.sum(u_sum, 0))


@jit
def _norms(partial_ptr, first, num_chunks, BLOCK: tl.constexpr):
    """|theta|_2 and |u|_2 of a tensor from the sums of its chunks."""
    offsets = tl.arange(0, BLOCK)
    theta_sum = tl.zeros([BLOCK], tl.float32)
    u_sum = tl.zeros([BLOCK], tl.float32)
    done = 0
    while done < num_chunks:
        at = done + offsets
        pair = partial_ptr + 2 * (first + at)
        theta_sum += tl.load(pair, mask=at < num_chunks, other=0.0)
        u_sum += tl.load(pair + 1, mask=at < num_chunks, other=0.0)
        done += BLOCK
    return tl.sqrt_rn(tl.sum(theta_sum, 0)), tl.sqrt_rn(tl.sum(u_sum, 0))


@jit
def _descend(
    theta_ptr,
    m_ptr,
    v_ptr,
    at,
    left,
    rate,
    weight_decay,
    EPS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Moves theta of one tile; see `_moments`."""
    mask = at < left if MASKED else None
    theta = tl.load(theta_ptr + at, mask=mask)
    m = tl.load(m_ptr + at, mask=mask)
    v = tl.load(v_ptr + at, mask=mask)
    u = _direction(m, v, theta, weight_decay, EPS)
    tl.store(theta_ptr + at, theta - rate * u, mask=mask)


@jit
def _descend_kernel(
    table_ptr,  # [4, tensors] i64, addresses of parameters, gradients, m and v
    layout_ptr,  # [3, tensors] i64, values, first chunk, whether exempt
    tensor_ptr,  # [chunks] i64, the tensor of each chunk
    partial_ptr,  # [chunks, 2] fp32, sums of theta^2 and u^2
    lr_ptr,  # [] fp32
    found_inf_ptr,  # [] fp32, or None
    num_tensors,
    weight_decay,
    min_norm,
    max_norm,
    EPS: tl.constexpr,
    NOWHERE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A program takes one chunk, the last one first."""
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0.0:
            return
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    tensor = tl.load(tensor_ptr + chunk)
    if tl.load(table_ptr + num_tensors + tensor) == NOWHERE:
        return
    num_values = tl.load(layout_ptr + tensor)
    first = tl.load(layout_ptr + num_tensors + tensor)
    rate = tl.load(lr_ptr)
    if tl.load(layout_ptr + 2 * num_tensors + tensor) == 0:
        norm, u_norm = _norms(partial_ptr, first, tl.cdiv(num_values, TILES * BLOCK), BLOCK)
        norm = tl.minimum(tl.maximum(norm, min_norm), max_norm)
        rate *= tl.where((norm > 0.0) & (u_norm > 0.0), norm / u_norm, 1.0)
    start = (chunk - first) * (TILES * BLOCK)
    left = tl.minimum(num_values - start, TILES * BLOCK)
    theta = tensor_at(table_ptr, tensor, tl.float32, ALIGNED) + start
    m = tensor_at(table_ptr, 2 * num_tensors + tensor, tl.float32, ALIGNED) + start
    v = tensor_at(table_ptr, 3 * num_tensors + tensor, tl.float32, ALIGNED) + start
    offsets = tl.arange(0, BLOCK)
    if left == TILES * BLOCK:
        for tile in tl.range(0, TILES, loop_unroll_factor=1):
            at = offsets + tile * BLOCK
            _descend(theta, m, v, at, left, rate, weight_decay, EPS, False)
    else:
        done = 0
        while done < left:
            _descend(theta, m, v, offsets + done, left, rate, weight_decay, EPS, True)
            done += BLOCK


class Table(multi_tensor.Table):
    """Where the kernels find the tensors of a parameter group.

    Args:
        params: Float32, on one device.
        exempt: Whether vectors and scalars have ratio 1.
    """

    def __init__(self, params: Sequence[Tensor], exempt: bool) -> None:
        """Fills what depends on shapes; addresses come with the first update."""
        super().__init__(params, CHUNK, num_rows=4)
        is_exempt = torch.tensor([exempt and p.ndim < 2 for p in params])
        self.layout = torch.cat([self.layout, is_exempt.to(self.layout)[None]])
        self.partials = torch.empty(self.num_chunks, 2, device=self.layout.device)


def lalr_(
    table: Table,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta: float,
    weight_decay: float,
    min_norm: float,
    max_norm: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The update by the kernels; see `ops.lalr_`."""
    grads = in_layout_of(params, grads)
    addresses = addresses_of(params, grads, exp_avgs, exp_avg_sqs)
    if not isinstance(lr, Tensor):
        lr = torch.full((), lr, device=table.partials.device)
    shape = {"EPS": EPS, "NOWHERE": NOWHERE, "BLOCK": BLOCK, "TILES": TILES}
    shape |= {"ALIGNED": are_aligned(addresses), "num_warps": NUM_THREADS // 32}
    with torch.cuda.device_of(table.partials):
        held = table.hold(addresses)
        where = (held, table.layout, table.tensors)
        _moments_kernel[(table.num_chunks,)](
            table.partials,
            *where,
            grad_scale,
            found_inf,
            table.num_tensors,
            beta,
            weight_decay,
            BETA2=BETA2,
            **shape,
        )
        _descend_kernel[(table.num_chunks,)](
            *where,
            table.partials,
            lr,
            found_inf,
            table.num_tensors,
            weight_decay,
            min_norm,
            max_norm,
            **shape,
        )
    # Of which torch knows only the addresses.
    torch.autograd.graph.increment_version(params)
