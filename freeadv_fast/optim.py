"""SGD as the papers use it, ready for a training loop that never waits for the device."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

Decay = Literal["all", "kernels", "no-bn"]


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


def build_sgd(
    model: nn.Module, *, lr: float, momentum: float, weight_decay: float, decay: Decay
) -> torch.optim.SGD:
    """SGD with momentum over a network's parameters.

    On a GPU the fused kernel, which reads the gradient scaler's verdict on the device; any other
    variant reads it on the host at every step. Its momentum buffers exist from the start: the
    fused kernel leaves them uninitialised when fp16 overflows in the very first step
    (pytorch 2.11). Zeros there give the same first update.
    """
    groups = parameter_groups(model, weight_decay, decay)
    is_cuda = next(model.parameters()).is_cuda
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=is_cuda or None)
    if momentum:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
