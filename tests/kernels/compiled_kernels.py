"""The Triton kernels against the references; run by the tests that set up Triton's environment.

On a CPU this needs TRITON_INTERPRET=1 before Triton is imported. The interpreter truncates where
hardware rounds float32 to bfloat16, so bfloat16 may be one ulp low there.
"""

from __future__ import annotations

import os

import pytest
import torch

from freeadv_fast.kernels import perturb_normalize as perturb
from freeadv_fast.kernels import sign_ascent as ascent

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
# Odd totals, one channel, whole spans without and with a remainder.
SHAPES = [(3, 41, 37, 3), (1, 5, 7, 1), (2, 9, 4, 4), (2, 64, 64, 3), (0, 8, 8, 3)]
STORAGES = [(torch.int8, 4.0), (torch.int8, 2.5), (torch.float32, 1.0), (torch.float16, 1.0)]


def example(shape, storage):
    """Images with many black and white pixels and a perturbation that crosses both ends."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(-40, 296, shape, generator=generator).clamp_(0, 255).to(torch.uint8)
    delta = torch.randint(-2, 3, shape, generator=generator).to(storage)
    if storage.is_floating_point:
        delta += torch.rand(shape, generator=generator).to(storage)
    mean = torch.tensor([0.485, 0.456, 0.406, 0.5][: shape[3]])
    std = torch.tensor([0.229, 0.224, 0.225, 0.25][: shape[3]])
    return images, delta, mean, std


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("storage", "unit"), [*STORAGES, (None, 1.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_perturb_normalize(shape, storage, unit, dtype):
    images, delta, mean, std = example(shape, storage or torch.int8)
    delta = None if storage is None else delta
    expected = perturb.perturb_normalize_ref(images, delta, mean, std, unit, dtype)
    moved = [None if t is None else t.to(DEVICE) for t in (images, delta, mean, std)]
    result = perturb._launch(*moved, unit, dtype).cpu()
    assert result.is_contiguous(memory_format=torch.channels_last)
    if IS_INTERPRETED and dtype is torch.bfloat16:
        torch.testing.assert_close(result, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_perturb_normalize_takes_float16_images(dtype):
    images, delta, mean, std = example((3, 41, 37, 3), torch.float16)
    images = (images + delta).clamp_(0, 255)
    expected = perturb.perturb_normalize_ref(images, None, mean, std, 1.0, dtype)
    moved = [t.to(DEVICE) for t in (images, mean, std)]
    assert torch.equal(perturb._launch(moved[0], None, *moved[1:], 1.0, dtype).cpu(), expected)


@pytest.mark.parametrize("spans", [1, 3])
def test_spans_and_tiles_do_not_show(spans, monkeypatch):
    images, delta, mean, std = example((2, 64, 64, 3), torch.int8)
    expected = perturb.perturb_normalize_ref(images, delta, mean, std, 4.0, torch.float32)
    monkeypatch.setattr(perturb, "MANY_VALUES", 0)
    monkeypatch.setattr(perturb, "SPANS", spans)
    monkeypatch.setattr(perturb, "TILES", 2)
    moved = [t.to(DEVICE) for t in (images, delta, mean, std)]
    assert torch.equal(perturb._launch(*moved, 4.0, torch.float32).cpu(), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("storage", "unit"), STORAGES, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_sign_ascent(shape, storage, unit, dtype):
    images, delta, _, _ = example(shape, storage)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(shape, generator=generator).to(dtype)
    grad[torch.rand(shape, generator=generator) < 0.2] = 0
    if grad.numel():
        grad.view(-1)[:9] = torch.tensor(
            [torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45, 1e-300, -1e-300, 3e38, -0.0],
            dtype=torch.float64,
        )
    grad = grad.permute(0, 3, 1, 2)
    if shape[0] == 2:
        grad = grad.contiguous()
    num_expected = int((~grad.isfinite()).sum())
    step = unit if storage is torch.int8 else 1.5
    args = (step, 2 * unit, unit)
    counts = torch.full((), 7), torch.full((), 7)
    expected = delta.clone()
    ascent.sign_ascent_ref_(expected, grad, images, counts[0], *args)
    result, count = delta.to(DEVICE), counts[1].to(DEVICE)
    ascent._launch_(result, grad.to(DEVICE), images.to(DEVICE), count, *args)
    assert torch.equal(result.cpu(), expected)
    assert counts[0] == count.cpu() == 7 + num_expected


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a CUDA device")
def test_public_functions_never_wait_for_the_device():
    images, delta, mean, std = (t.to(DEVICE) for t in example((2, 64, 64, 3), torch.int8))
    nonfinite = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def one_pass():
        x = perturb.perturb_normalize(images, delta, mean, std, unit=4.0, dtype=torch.bfloat16)
        ascent.sign_ascent_(delta, x, images, nonfinite, step=4.0, eps=8.0, unit=4.0)

    one_pass()  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_pass()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a CUDA device")
def test_public_functions_are_captured_in_a_graph():
    images, delta, mean, std = (t.to(DEVICE) for t in example((2, 64, 64, 3), torch.int8))
    nonfinite = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def one_pass():
        x = perturb.perturb_normalize(images, delta, mean, std, unit=4.0, dtype=torch.bfloat16)
        ascent.sign_ascent_(delta, x, images, nonfinite, step=4.0, eps=8.0, unit=4.0)

    start = delta.clone()
    one_pass()
    expected = delta.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_pass()
    delta.copy_(start)
    graph.replay()
    assert torch.equal(delta, expected)
