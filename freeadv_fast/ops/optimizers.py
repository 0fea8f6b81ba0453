"""Updates of many tensors at once: by LALR, by SGD, and of weights' averages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from freeadv_fast.kernels import averaging as _averaging
from freeadv_fast.kernels import lalr as _lalr
from freeadv_fast.kernels import sgd as _sgd
from freeadv_fast.ops import dispatch


def lalr_table(params: Sequence[Tensor], exempt: bool) -> _lalr.Table | None:
    """What `lalr_` needs beside tensors where kernels do it; None where the reference does.

    Args:
        params: Tensors of one parameter group, as they lie in memory while they train.
        exempt: Whether vectors and scalars among them have ratio 1.
    """
    device = params[0].device
    if dispatch.backend(device) == "triton" and all(
        p.dtype is torch.float32 and p.device == device for p in params
    ):
        return _lalr.Table(params, exempt)
    return None


def lalr_(
    table: _lalr.Table | None,
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
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One update with layer-wise adaptive rates, in place, of many tensors at once.

    For each tensor theta with a gradient g: ``m <- beta m + (1 - beta) g``, ``v <- 0.999 v + 0.001
    g^2``, ``u = m / (sqrt(v) + 1e-6) + weight_decay theta``, ``theta <- theta - lr ratio u`` with
    ``ratio = clip(|theta|_2, min_norm, max_norm) / |u|_2``, and 1 where either is 0. Nothing is
    corrected for m and v starting at 0. The host never waits for a GPU.

    Args:
        table: Of these parameters, from `lalr_table`.
        params: theta, dense in memory; updated.
        grads: g, copied unless in their parameter's order; None leaves a parameter as it is.
        exp_avgs: m, in the parameters' order; updated. exp_avg_sqs: v, likewise.
        lr: Learning rate; a () float32 tensor on the device for CUDA graphs.
        beta: Decay of m.
        weight_decay: Coefficient of theta in u.
        min_norm: c_l. max_norm: c_u.
        exempt: Whether the ratio of vectors and scalars is 1; as the table was made.
        grad_scale: () float32, what the gradients were multiplied by. Kernels only.
        found_inf: () float32; unless 0, nothing is updated. Kernels only.

    Source: Zhang et al., UAI 2022, Algorithm 1, as its authors' optimizer computes it.
    """
    tensors = (params, grads, exp_avgs, exp_avg_sqs)
    numbers = {"lr": lr, "beta": beta, "weight_decay": weight_decay}
    numbers |= {"min_norm": min_norm, "max_norm": max_norm}
    if table is not None:
        _lalr.lalr_(table, *tensors, **numbers, grad_scale=grad_scale, found_inf=found_inf)
    else:
        _lalr.lalr_ref_(*tensors, **numbers, exempt=exempt)


def sgd_table(params: Sequence[Tensor]) -> _sgd.Table | None:
    """What `sgd_` needs beside tensors where a kernel does it; None where the reference does.

    Args:
        params: Tensors of one parameter group, as they lie in memory while they train.
    """
    device = params[0].device
    if dispatch.backend(device) == "triton" and all(
        p.dtype is torch.float32 and p.device == device for p in params
    ):
        return _sgd.Table(params)
    return None


def sgd_(
    table: _sgd.Table | None,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momentum_buffers: Sequence[Tensor | None],
    copies: Sequence[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One update of SGD with momentum, in place, of many tensors and their half-precision copies.

    For each tensor w with a gradient g: ``v <- momentum v + (g + weight_decay w)``, ``w <- w - lr
    v``, and where it has a copy h, ``h <- w``. The host never waits for a GPU.

    Args:
        table: Of these parameters, from `sgd_table`.
        params: w, dense in memory; updated.
        grads: g, of w's dtype, or those of all tensors with a copy of the copies'; copied unless
            in their parameter's order; None leaves a parameter and its copy as they are.
        momentum_buffers: v, in the parameters' order; updated. None for all without momentum.
        copies: h in bfloat16 or float16, all alike, in the parameters' order; updated. None where
            there is none.
        lr: Learning rate; a () float32 tensor on the device for CUDA graphs.
        momentum: Of v.
        weight_decay: Coefficient of w in the gradient.
        grad_scale: () float32, what the gradients were multiplied by.
        found_inf: () float32; unless 0, nothing is updated.

    Raises:
        RuntimeError: from the kernel, of gradients or copies of another dtype.

    Source: Sutskever et al. 2013, as `torch.optim.SGD` computes it.
    """
    tensors = (params, grads, momentum_buffers, copies)
    numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    if table is not None:
        _sgd.sgd_(table, *tensors, **numbers, grad_scale=grad_scale, found_inf=found_inf)
    else:
        _sgd.sgd_ref_(*tensors, **numbers, grad_scale=grad_scale, found_inf=found_inf)


def average_table(averages: Sequence[Tensor]) -> _averaging.Table | None:
    """What `average_` needs beside tensors where a kernel does it; None where the reference does.

    Args:
        averages: Of one network's tensors, as they lie in memory.
    """
    device = averages[0].device
    if dispatch.backend(device) == "triton" and all(
        a.dtype is torch.float32 and a.device == device for a in averages
    ):
        return _averaging.Table(averages)
    return None


def average_(
    table: _averaging.Table | None,
    averages: Sequence[Tensor],
    weights: Sequence[Tensor],
    share: float | Tensor,
) -> None:
    """Moves running averages towards weights, in place, of many tensors at once.

    For each average a of a weight w: ``a <- a + share (w - a)``, which is w at share 1, whatever
    finite value stood there. The host never waits for a GPU.

    Args:
        table: Of these averages, from `average_table`.
        averages: a, dense in memory; updated.
        weights: w, of their shapes and dtypes; for the kernel copied unless in their order.
        share: Of w in the average, in (0, 1]; a () float32 tensor on the device for CUDA graphs.

    Source: Polyak and Juditsky 1992, with weights that fall off exponentially.
    """
    if table is not None:
        _averaging.average_(table, averages, weights, share)
    else:
        _averaging.average_ref_(averages, weights, share)
