"""SGD that keeps copies of its weights in half precision for the layers that read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from freeadv_fast import ops
from freeadv_fast.models.half_weights import half_copy, refresh_copies, state_of


class MasterSgd(torch.optim.SGD):
    """`torch.optim.SGD` on float32 weights of which some have copies in half precision.

    One launch a parameter group updates weights, momentum and copies (`kernels/sgd.py`). What it
    saves is what torch's SGD saves, and each continues from the other's state. Momentum buffers
    have to exist before the first step, as in `optim.build_sgd`. On a GPU the update reads nothing
    on the host, the gradient scaler's verdict included.

    Args:
        groups: Parameter groups, each with its ``weight_decay``: float32, on the device where they
            train, with their copies (`models.half_weights.use_half_weights`).
        lr: Learning rate, or a () tensor of it on the device. momentum: Of the velocity.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float) -> None:
        """Nothing was updated yet."""
        self._tables = [ops.sgd_table(group["params"]) for group in groups]
        super().__init__(groups, lr=lr, momentum=momentum, fused=None not in self._tables or None)
        # The scaler then leaves scale and verdict in grad_scale and found_inf, on the device.
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Args:
            closure: Not supported; there because torch's optimizers take one.
        """
        assert closure is None
        self.refresh_copies()  # also of weights that this update leaves as they are
        for group, table in zip(self.param_groups, self._tables, strict=True):
            params = group["params"]
            copies = [half_copy(p) for p in params]
            ops.sgd_(
                table,
                params,
                [p.grad for p in params],
                [self.state[p].get("momentum_buffer") for p in params],
                [None if copy is None else copy.tensor for copy in copies],
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )
            for parameter, copy in zip(params, copies, strict=True):
                if copy is not None:
                    copy.made_of = state_of(parameter)

    def refresh_copies(self) -> None:
        """Rounds those weights anew that others have changed: a recorded update cannot tell."""
        for group in self.param_groups:
            refresh_copies(group["params"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state; momentum takes the order of its parameters' memory."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name, buffer in state.items():
                state[name] = torch.empty_like(parameter).copy_(buffer)
