"""The optimizers of the papers, ready for a training loop that never waits for the device."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any, get_args

import torch
from torch import nn

from freeadv_fast.config.choices import Decay, OptimizerName
from freeadv_fast.errors import UserError
from freeadv_fast.models.half_weights import half_copy
from freeadv_fast.step.lalr import Lalr
from freeadv_fast.step.sgd import MasterSgd
from freeadv_fast.toolchain import has_nvidia_apex

BUILD_APEX = (
    "build https://github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or use "
    "--optimizer sgd"
)


def parameter_groups(model: nn.Module, weight_decay: float, decay: Decay) -> list[dict[str, Any]]:
    """Splits the parameters into decayed and not decayed ones.

    Args:
        model: The network.
        weight_decay: L2 coefficient of the decayed group.
        decay: ``all`` decays every parameter, batch norm and biases too (Free AT's ImageNet
            code); ``kernels`` only those of two or more dimensions (its CIFAR code); ``no-bn`` all
            but batch norm's weights and biases (Wong et al.'s ImageNet code, main_fast.py, which
            decays the last layer's bias).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    exempt: set[nn.Parameter] = set()
    if decay == "kernels":
        exempt = {p for p in parameters if p.ndim < 2}
    elif decay == "no-bn":
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        exempt = {p for norm in norms for p in norm.parameters(recurse=False)}
    groups = [
        {"params": [p for p in parameters if p not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module,
    *,
    name: OptimizerName,
    lr: float,
    momentum: float,
    weight_decay: float,
    decay: Decay,
    lalr_min: float,
    lalr_max: float,
    lalr_exempt: bool,
) -> torch.optim.Optimizer:
    """The optimizer of a network's parameters that a config names.

    Args:
        model: The network, on the device where it trains.
        name: ``lalr`` (layer-wise adaptive rates), or one of `build_sgd`.
        lr: Learning rate. momentum: Of SGD's velocity, or of lalr's mean gradient.
        weight_decay: L2 coefficient. decay: Parameters under it; see `parameter_groups`.
        lalr_min: Least norm of a tensor that lalr counts with. lalr_max: Greatest.
        lalr_exempt: Whether batch norm's parameters and biases move at `lr` itself.

    Raises:
        UserError: no such optimizer, or it cannot run here; names the fix.
    """
    if name == "lalr":
        return Lalr(
            parameter_groups(model, weight_decay, decay),
            lr=lr,
            beta=momentum,
            min_norm=lalr_min,
            max_norm=lalr_max,
            exempt=lalr_exempt,
        )
    return build_sgd(
        model, lr=lr, momentum=momentum, weight_decay=weight_decay, decay=decay, name=name
    )


def build_sgd(
    model: nn.Module,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    decay: Decay,
    name: OptimizerName = "sgd",
) -> torch.optim.Optimizer:
    """SGD with momentum over a network's parameters.

    All three compute the same update. On a GPU ``sgd`` is torch's fused kernel, or our own where
    weights have copies in half precision (`MasterSgd`); both read the gradient scaler's verdict on
    the device. ``sgd-foreach`` and ``apex-sgd`` leave that to the scaler, which reads it on the
    host at every fp16 step (`GradScaler._maybe_opt_step`).

    The momentum buffers exist from the start. torch's fused kernel leaves them uninitialised when
    fp16 overflows in the very first step (pytorch 2.11), and apex takes the last parameter's word
    for whether all of them exist (`FusedSGD.get_momentums`). Zeros there give the same first
    update.

    Args:
        model: The network, on the device where it trains.
        lr: Learning rate. momentum: Of the velocity. weight_decay: L2 coefficient.
        decay: Parameters under weight decay; see `parameter_groups`.
        name: ``sgd``, ``sgd-foreach`` (torch's foreach operations) or ``apex-sgd`` (NVIDIA apex).

    Raises:
        UserError: no such optimizer, or ``apex-sgd`` cannot run here; names the fix.
    """
    groups = parameter_groups(model, weight_decay, decay)
    optimizer: torch.optim.Optimizer
    match name:
        case "sgd" if any(half_copy(p) is not None for p in model.parameters()):
            optimizer = MasterSgd(groups, lr=lr, momentum=momentum)
        case "sgd":
            is_cuda = next(model.parameters()).is_cuda
            optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=is_cuda or None)
        case "sgd-foreach":
            optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, foreach=True)
        case "apex-sgd":
            optimizer = _build_apex_sgd(groups, lr, momentum)
        case _:
            names = ", ".join(get_args(OptimizerName))
            raise UserError(f"--optimizer {name}: choose one of {names}")
    if momentum:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def is_capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a CUDA graph can hold the optimizer's step.

    That of torch's fused SGD and those of our own kernels: given the learning rate as a tensor on
    the device, they read nothing on the host. The foreach SGD turns it into a Python number
    (`torch.optim.sgd`, ``_to_scalar``), and apex's kernel takes it by value, so that a graph would
    repeat the rate of its capture.
    """
    return isinstance(optimizer, torch.optim.SGD | Lalr) and all(
        bool(group["fused"]) for group in optimizer.param_groups
    )


def load_apex_sgd() -> type[torch.optim.Optimizer]:
    """`apex.optimizers.FusedSGD` of NVIDIA's apex, which is imported here and nowhere else.

    Raises:
        UserError: no GPU, no apex, another package of that name (not imported), an apex without
            CUDA extensions, or one that does not load. No module of a failed import stays behind.
    """
    flag = "--optimizer apex-sgd"
    if not torch.cuda.is_available():
        raise UserError(f"{flag}: its kernel needs a GPU; use --optimizer sgd")
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise UserError(f"{flag}: NVIDIA apex is not installed; {BUILD_APEX}")
    if not has_nvidia_apex():
        where = spec.origin or next(iter(spec.submodule_search_locations or ()))
        raise UserError(
            f"{flag}: the apex in {where} is not NVIDIA's (PyPI's is a web toolkit of that name); "
            f"remove it, and {BUILD_APEX}"
        )
    if importlib.util.find_spec("amp_C") is None:
        raise UserError(
            f"{flag}: this NVIDIA apex has no CUDA extensions (amp_C is missing); {BUILD_APEX}"
        )
    before = set(sys.modules)
    try:
        # FusedSGD's constructor would say only that there are no extensions, not what is wrong.
        importlib.import_module("amp_C")
        fused_sgd: type[torch.optim.Optimizer] = importlib.import_module("apex.optimizers").FusedSGD
    except Exception as error:  # compiled for another torch, older than this torch's Python API
        for module in set(sys.modules) - before:
            if module.partition(".")[0] in ("apex", "amp_C"):
                del sys.modules[module]
        reason = " ".join(str(error).split())
        raise UserError(
            f"{flag}: NVIDIA apex does not load with torch {torch.__version__} ({reason}); "
            f"{BUILD_APEX}"
        ) from None
    return fused_sgd


def _build_apex_sgd(
    groups: list[dict[str, Any]], lr: float, momentum: float
) -> torch.optim.Optimizer:
    """NVIDIA apex's FusedSGD, made to answer as torch's optimizers do.

    Read at NVIDIA/apex 6424da3 (8 Jul 2026). csrc/multi_tensor_sgd_kernel.cu computes torch's
    update: v <- momentum v + (g + decay w), w <- w - lr v. The gradient scaler treats it as any
    optimizer that does not know it: gradients are unscaled in place and an overflow skips the step.

    Raises:
        UserError: apex cannot be used, or would leave parameters as they are.
    """
    fused_sgd = load_apex_sgd()
    # apex/optimizers/fused_sgd.py, step: parameters of other dtypes are passed over in silence.
    for parameter in (p for group in groups for p in group["params"]):
        if parameter.dtype not in (torch.float32, torch.float16):
            raise UserError(
                f"--optimizer apex-sgd: trains float32 weights, not {parameter.dtype}; use "
                "--optimizer sgd"
            )
    # Its zero_grad has no set_to_none.
    kind = type("ApexSGD", (fused_sgd,), {"zero_grad": torch.optim.Optimizer.zero_grad})
    # torch's key, which `Learner.load_state_dict` reads from every group.
    groups = [{**group, "fused": False} for group in groups]
    optimizer: torch.optim.Optimizer = kind(groups, lr=lr, momentum=momentum)
    return optimizer
