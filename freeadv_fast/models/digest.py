"""What stands for a network's weights where they are compared."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def digest_weights(network: nn.Module) -> bytes:
    """64 bytes that are the same for the same names, dtypes, shapes and bits, on any device.

    A module's extra state that is no tensor is left out: it may print otherwise in every process.
    """
    digest = hashlib.blake2b()
    for name, value in network.state_dict().items():
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()
