"""Layer-wise adaptive rates for large batches: Adam's direction at the length of each tensor.

Source: Zhang et al., "Distributed Adversarial Training to Robustify Deep Neural Networks at Scale",
UAI 2022, as its authors' optimizer computes it; the formula is told in `kernels/lalr.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from freeadv_fast import ops
from freeadv_fast.errors import UserError


class Lalr(torch.optim.Optimizer):
    """Layer-wise adaptive rates (LALR).

    The moments exist from the start, as zeros. On a GPU that has the kernels the update reads
    nothing on the host, the gradient scaler's verdict included.

    A tensor that starts at zero, such as a bias, moves by Adam's direction at `lr` in its first
    step and at its own, tiny length from then on, as the authors' code has it; `exempt` lets it
    move at `lr` throughout.

    Args:
        groups: Parameter groups, each with its ``weight_decay``; float tensors, on the device where
            they train.
        lr: Learning rate, or a () tensor of it on the device.
        beta: Decay of the gradient's mean.
        min_norm: Least norm c_l of a tensor that counts. max_norm: Greatest, c_u.
        exempt: Whether the ratio of batch norm's parameters and biases is 1.

    Raises:
        UserError: a parameter does not fill its memory from end to end.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        beta: float,
        min_norm: float,
        max_norm: float,
        exempt: bool,
    ) -> None:
        """Starts with moments of zero."""
        rule = {"beta": beta, "min_norm": min_norm, "max_norm": max_norm, "exempt": exempt}
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, **rule})
        self._tables = [ops.lalr_table(g["params"], exempt) for g in self.param_groups]
        for group, table in zip(self.param_groups, self._tables, strict=True):
            group["fused"] = table is not None
            for parameter in group["params"]:
                moments = {n: torch.zeros_like(parameter) for n in ("exp_avg", "exp_avg_sq")}
                if moments["exp_avg"].stride() != parameter.stride():
                    raise UserError(
                        f"--optimizer lalr: a weight of shape {tuple(parameter.shape)} has gaps in "
                        "its memory; let the network hold a clone of it"
                    )
                self.state[parameter] = moments
        # The scaler then leaves scale and verdict in grad_scale and found_inf, on the device.
        self._step_supports_amp_scaling = None not in self._tables

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Args:
            closure: Not supported; there because torch's optimizers take one.
        """
        assert closure is None
        for group, table in zip(self.param_groups, self._tables, strict=True):
            states = [self.state[p] for p in group["params"]]
            ops.lalr_(
                table,
                group["params"],
                [p.grad for p in group["params"]],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                lr=group["lr"],
                beta=group["beta"],
                weight_decay=group["weight_decay"],
                min_norm=group["min_norm"],
                max_norm=group["max_norm"],
                exempt=group["exempt"],
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state; the moments take the order of their parameters' memory."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name, moment in state.items():
                state[name] = torch.empty_like(parameter).copy_(moment)
