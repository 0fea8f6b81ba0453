"""What ranks send each other: images by the exchange, gradients by codecs."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

ExtensionBackend = Literal["compiled", "eager"]


@functools.cache
def exchange_backend(device_type: str) -> ExtensionBackend:
    """Which implementation of the exchange runs on a kind of device.

    Args:
        device_type: ``cpu`` or ``cuda``.

    Returns:
        "compiled": csrc/shuffle_exchange.cpp. "eager": `distributed.shuffle.start_eagerly`, where
        `freeadv_fast._C` was not built, or built without CUDA (env.json says why).
    """
    return _extension_backend("shuffle_exchange", device_type)


@functools.cache
def codec_backend(device_type: str) -> ExtensionBackend:
    """Which implementation of the gradients' codecs runs on a kind of device.

    Args:
        device_type: ``cpu`` or ``cuda``.

    Returns:
        "compiled": csrc/gradient_codec.cpp. "eager": the references in `distributed.codec`, where
        `freeadv_fast._C` was not built, or built without CUDA (env.json says why).
    """
    return _extension_backend("encode_gradients", device_type)


def _extension_backend(op: str, device_type: str) -> ExtensionBackend:
    """Whether `freeadv_fast._C` has an op for a kind of device."""
    try:
        import freeadv_fast._C  # noqa: F401 - loads the ops
    except ImportError:
        return "eager"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(
        f"freeadv_fast::{op}", device_type.upper()
    )
    return "compiled" if has_kernel else "eager"


def start_exchange(
    images: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None,
    *,
    send: list[int],
    receive: list[int],
    rank: int,
    seed: int,
    step: int,
    is_inverse: bool,
    timeout: datetime.timedelta,
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Sends images and their labels to other ranks in random order; returns at once.

    The compiled twin of `distributed.shuffle.start_eagerly`, which tells the formula and the
    errors. Only where `exchange_backend` says "compiled".

    Args:
        images: (n, ...) uint8, float16, bfloat16, float32 or float64, contiguous.
        labels: (n,) int64, on the same device.
        group: The ranks that take part; None where nothing leaves any of them.
        send: Rows to each rank. receive: Rows from each rank.
        rank: This rank. seed, step: Name the permutation. is_inverse: Whether it is undone.
        timeout: How long to wait for the others, over gloo.

    Returns:
        A function that hands over the rows that arrived; on a GPU the current stream waits for
        them, and the exchange runs on a stream of its own meanwhile.
    """
    under_way = torch.ops.freeadv_fast.shuffle_exchange(
        images,
        labels,
        group.group_name if group is not None else "",
        send,
        receive,
        rank,
        seed,
        step,
        is_inverse,
        timeout // datetime.timedelta(milliseconds=1),
    )
    wait: Callable[[], tuple[Tensor, Tensor]] = under_way.wait
    return wait


def encode_gradients(
    gradients: Tensor,
    table: Tensor,
    segments: Tensor | None,
    update: Tensor,
    seed: int,
    word: int,
    message: Tensor,
) -> None:
    """Writes levels and scales of gradients into messages; nothing waits for the device.

    The compiled twin of `distributed.codec.encode_gradients_ref`, as the next two are of theirs;
    that file tells the formula. Only where `codec_backend` says "compiled".

    Args:
        gradients: (n,) float32, contiguous.
        table: (K, 6) int32 and segments: (T + 1,) int32 or None, of `distributed.codec.Blocks`.
        update: (1,) int64, read on the device. seed, word: With it they name the random bits.
        message: (bytes,) uint8, contiguous; written where the table says.
    """
    torch.ops.freeadv_fast.encode_gradients(gradients, table, segments, update, seed, word, message)


def encode_mean(
    messages: Tensor,
    table: Tensor,
    segments: Tensor | None,
    update: Tensor,
    seed: int,
    word: int,
    message: Tensor,
) -> None:
    """Decodes messages, averages them and encodes the mean, without a tensor in between.

    Args:
        messages: (W, bytes) uint8, contiguous.
        table, segments, update, seed, word: As `encode_gradients` takes them.
        message: (bytes,) uint8, contiguous; written where the table says.
    """
    torch.ops.freeadv_fast.encode_mean(messages, table, segments, update, seed, word, message)


def decode_gradients(message: Tensor, table: Tensor, gradients: Tensor) -> None:
    """Writes the gradients that messages hold.

    Args:
        message: (bytes,) uint8, contiguous.
        table: (K, 6) int32, of `distributed.codec.Blocks`.
        gradients: (n,) float32, contiguous; overwritten where the table says.
    """
    torch.ops.freeadv_fast.decode_gradients(message, table, gradients)
