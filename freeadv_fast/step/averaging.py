"""A running average of a network's weights, kept beside them while they train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from freeadv_fast import ops

# Narrower floats cannot hold an average: a share of 0.0005 is below bfloat16's rounding.
AVERAGED = (torch.float32, torch.float64)


class WeightAverage:
    """The exponential moving average of a network's weights over its updates, without a bias.

    After t updates it is the weighted mean of the weights w_1 .. w_t that they led to, w_s with the
    weight decay^(t - s), divided by the sum of these:

        avg_t = avg_{t-1} + f_t (w_t - avg_{t-1})    with    f_t = (1 - decay) / (1 - decay^t)

    so that it starts as w_1, and what the network started from has no part in it. Of a decay of
    0.9995 an average reaches back over some 2,000 updates.

    Parameters and the running statistics of batch norm are averaged alike, with the same share:
    those of the auxiliary branch as well. Nothing is recomputed on training images: the statistics
    are those that the averaged weights' own past has seen, and an evaluation needs no pass over the
    data before it. Counts, and whatever else is no float of 32 or 64 bits, are the network's own of
    the moment. An update that fp16's scaler skips is one that leads to the same weights again.

    On a GPU one launch takes all weights in, in the recording where updates are recorded; tiny ones
    write their addresses before it, in a recording at every replay (`kernels.multi_tensor`). The
    share is set outside of it, by `begin_update`: a fill of a tensor on the device. Weights that
    have half-precision copies are read as they are, in float32.

    Source: Polyak and Juditsky 1992; Izmailov et al., "Averaging Weights Leads to Wider Optima and
    Better Generalization", UAI 2018; with weights that fall off in adversarial training: Gowal et
    al., "Uncovering the Limits of Adversarial Training against Norm-Bounded Adversarial Examples",
    2020. The share is Adam's correction of a mean that starts at zero (Kingma and Ba, ICLR 2015,
    section 3).

    Attributes:
        decay: Of a weight in the average, from one update to the next; above 0 and below 1.
        updates: Averaged so far.

    Args:
        network: The network on the device where it trains, without data parallelism and branches.
        decay: See above.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Nothing is averaged yet: until then the average is the weights as they are."""
        self._network = network
        self.decay = decay
        self.updates = 0
        self._places = _averaged_places(network)
        self._averages = {n: torch.empty_like(w) for n, w in self._weights().items()}
        self._table = ops.average_table(self.tensors)
        device = self.tensors[0].device
        self._share = torch.zeros((), device=device) if device.type == "cuda" else 0.0
        self.restart()

    @property
    def tensors(self) -> list[Tensor]:
        """The averages, in the order of the network's modules; updates change them in place."""
        return list(self._averages.values())

    def begin_update(self) -> None:
        """The host's half of an update: counts it, and sets the share of its weights."""
        self.updates += 1
        share = (1 - self.decay) / (1 - self.decay**self.updates)
        if isinstance(self._share, Tensor):
            self._share.fill_(share)
        else:
            self._share = share

    @torch.no_grad()
    def update(self) -> None:
        """The device's half, after the optimizer's: takes the weights in; waits for nothing."""
        ops.average_(self._table, self.tensors, list(self._weights().values()), self._share)

    @torch.no_grad()
    def restart(self) -> None:
        """Forgets what was averaged; the average begins with the next update's weights."""
        self.updates = 0
        torch._foreach_copy_(self.tensors, list(self._weights().values()))

    def state_dict(self) -> dict[str, Any]:
        """The average as a checkpoint holds it.

        Returns:
            ``decay``, ``updates``, and ``model``: the network's state dict with the averages in
            place of what is averaged; their own memory, not copied.
        """
        model = self._network.state_dict() | self._averages
        return {"decay": self.decay, "updates": self.updates, "model": model}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved average, whose decay must be this one's."""
        assert state["decay"] == self.decay
        self.updates = state["updates"]
        self._put(state["model"])

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The averages of buffers, by their names: each rank's own, as the buffers are."""
        names = {name for name, _ in self._network.named_buffers(remove_duplicate=False)}
        return {name: value for name, value in self._averages.items() if name in names}

    def load_statistics(self, statistics: dict[str, Tensor]) -> None:
        """Continues from a rank's own averages of its buffers."""
        self._put({**self._averages, **statistics})

    def _put(self, values: dict[str, Tensor]) -> None:
        """Writes averages into the memory of the present ones."""
        for name, average in self._averages.items():
            average.copy_(values[name])

    def _weights(self) -> dict[str, Tensor]:
        """What is averaged as it is now; a module may have put another buffer into its place."""
        return {name: kept[key] for name, (kept, key) in self._places.items()}


def _averaged_places(network: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where modules keep the tensors that are averaged, by their names in the state dict."""
    return {
        f"{path}.{key}".lstrip("."): (kept, key)
        for path, module in network.named_modules(remove_duplicate=False)
        for kept in (module._parameters, module._buffers)
        for key, value in kept.items()
        if value is not None
        and value.dtype in AVERAGED
        and key not in module._non_persistent_buffers_set
    }
