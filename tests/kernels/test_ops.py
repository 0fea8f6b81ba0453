"""The door to the kernels: which implementation, and that the host never waits."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from freeadv_fast import ops
from freeadv_fast.ops import dispatch


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    def __init__(self) -> None:
        """Starts at none."""
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Passes every operation on."""
        self.num += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_cpu_runs_the_references():
    assert dispatch.backend("cpu") == dispatch.backend(torch.device("cpu")) == "eager"


def test_the_host_reads_nothing():
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    delta, nonfinite = torch.zeros(2, 8, 8, 3, dtype=torch.int8), torch.zeros(()).long()
    mean, std = torch.zeros(3), torch.ones(3)
    with HostReads() as reads:
        x = ops.perturb_normalize(images, delta, mean, std, unit=4.0, dtype=torch.bfloat16)
        ops.sign_ascent_(delta, torch.ones_like(x), images, nonfinite, step=4, eps=4, unit=4)
    assert reads.num == 0
    assert (delta == 1).all()
