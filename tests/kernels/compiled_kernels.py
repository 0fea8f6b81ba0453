"""The Triton kernels against the references; run by the tests that set up Triton's environment.

On a CPU this needs TRITON_INTERPRET=1 before Triton is imported. The interpreter truncates where
hardware rounds float32 to bfloat16, so bfloat16 may be one ulp low there.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from freeadv_fast.kernels import ascend_normalize as fused
from freeadv_fast.kernels import perturb_normalize as perturb
from freeadv_fast.kernels import sign_ascent as ascent
from freeadv_fast.kernels.space_to_depth import is_packed, pack
from interpreted import DEVICE, IS_INTERPRETED
from pairwise import every_pair

# Odd totals, one channel, whole spans without and with a remainder.
SHAPES = [(3, 41, 37, 3), (1, 5, 7, 1), (2, 9, 4, 4), (2, 64, 64, 3), (0, 8, 8, 3)]
# (shape, packed): several programs and a remainder, odd heights and widths, one pixel.
PACKED_SHAPES = [(1, 21, 19, 3), (3, 12, 9, 3), (2, 7, 10, 3), (3, 1, 1, 3), (0, 8, 8, 3)]
LAYOUTS = [*((s, False) for s in SHAPES), *((s, True) for s in PACKED_SHAPES)]
STORAGES = [(torch.int8, 4.0), (torch.int8, 2.5), (torch.float32, 1.0), (torch.float16, 1.0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def of_layouts(storages, dtypes):
    """Cases of layouts, storages and dtypes: all on a GPU, in the slow interpreter every pair."""
    choose = every_pair if IS_INTERPRETED else itertools.product
    cases = [
        (*layout, *storage, dtype) for layout, storage, dtype in choose(LAYOUTS, storages, dtypes)
    ]
    return pytest.mark.parametrize(("shape", "packed", "storage", "unit", "dtype"), cases, ids=str)


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


def assert_same(result, expected):
    """Bit for bit, but for the interpreter's bfloat16."""
    if IS_INTERPRETED and expected.dtype is torch.bfloat16:
        torch.testing.assert_close(result, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(result, expected)


def fill_memory(num_bytes):
    """Leaves NaN in memory that the allocator may hand out next."""
    torch.full((num_bytes // 4 + 1,), torch.nan, device=DEVICE)


@of_layouts([*STORAGES, (None, 1.0)], DTYPES)
def test_perturb_normalize(shape, packed, storage, unit, dtype):
    images, delta, mean, std = example(shape, storage or torch.int8)
    delta = None if storage is None else delta
    expected = perturb.perturb_normalize_ref(images, delta, mean, std, unit, dtype, packed)
    moved = [None if t is None else t.to(DEVICE) for t in (images, delta, mean, std)]
    fill_memory(expected.nbytes)
    result = perturb._launch(*moved, unit, dtype, packed).cpu()
    assert result.permute(0, 2, 3, 1).is_contiguous()
    assert_same(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_perturb_normalize_takes_float16_images(dtype, packed):
    images, delta, mean, std = example((3, 41, 37, 3), torch.float16)
    images = (images + delta).clamp_(0, 255)
    expected = perturb.perturb_normalize_ref(images, None, mean, std, 1.0, dtype, packed)
    images, mean, std = (t.to(DEVICE) for t in (images, mean, std))
    result = perturb._launch(images, None, mean, std, 1.0, dtype, packed)
    assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("spans", [1, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_spans_and_tiles_do_not_show(spans, packed, monkeypatch):
    images, delta, mean, std = example((2, 64, 64, 3), torch.int8)
    expected = perturb.perturb_normalize_ref(images, delta, mean, std, 4.0, torch.float32, packed)
    monkeypatch.setattr(perturb, "MANY_VALUES", 0)
    monkeypatch.setattr(perturb, "SPANS", spans)
    monkeypatch.setattr(perturb, "TILES", 2)
    moved = [t.to(DEVICE) for t in (images, delta, mean, std)]
    assert torch.equal(perturb._launch(*moved, 4.0, torch.float32, packed).cpu(), expected)


def example_gradient(shape, dtype, packed):
    """Zeros, tiny, huge and non-finite values; packed, the border and padding are not finite."""
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(shape, generator=generator).to(dtype)
    grad[torch.rand(shape, generator=generator) < 0.2] = 0
    if grad.numel():
        grad.view(-1)[:9] = torch.tensor(
            [torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45, 1e-300, -1e-300, 3e38, -0.0],
            dtype=torch.float64,
        )
    grad = grad.permute(0, 3, 1, 2)
    if packed:
        is_value = pack(torch.ones_like(grad)) == 1
        return torch.where(is_value, pack(grad), torch.full((), torch.inf, dtype=dtype))
    return grad


@of_layouts(STORAGES, [*DTYPES, torch.float64])
def test_sign_ascent(shape, packed, storage, unit, dtype):
    images, delta, _, _ = example(shape, storage)
    grad = example_gradient(shape, dtype, packed)
    num_expected = int((~example_gradient(shape, dtype, False).isfinite()).sum())
    if shape[0] == 2:
        grad = grad.contiguous()
    step = unit if storage is torch.int8 else 1.5
    args = (step, 2 * unit, unit)
    counts = torch.full((), 7), torch.full((), 7)
    expected = delta.clone()
    ascent.sign_ascent_ref_(expected, grad, images, counts[0], *args)
    result, count = delta.to(DEVICE), counts[1].to(DEVICE)
    ascent._launch_(result, grad.to(DEVICE), images.to(DEVICE), count, *args)
    assert torch.equal(result.cpu(), expected)
    assert counts[0] == count.cpu() == 7 + num_expected


@of_layouts(STORAGES[1::2], DTYPES)
def test_ascend_normalize(shape, packed, storage, unit, dtype):
    images, delta, mean, std = example(shape, storage)
    grad = example_gradient(shape, dtype, packed)
    args = (unit if storage is torch.int8 else 1.5, 2 * unit, unit)
    counts = torch.zeros(()).long(), torch.zeros(()).long()
    x = perturb.perturb_normalize_ref(images, delta, mean, std, unit, dtype, packed)
    expected, expected_x = delta.clone(), x.clone()
    fused.ascend_normalize_ref_(expected, expected_x, grad, images, mean, std, counts[0], *args)
    result, x, count = delta.to(DEVICE), x.to(DEVICE).requires_grad_(), counts[1].to(DEVICE)
    before = x.detach().clone()
    moved = [t.to(DEVICE) for t in (grad, images, mean, std)]
    fused._launch_(result, x, *moved, count, *args)
    assert torch.equal(result.cpu(), expected)
    assert_same(x.detach().cpu(), expected_x)
    assert counts[0] == count.cpu()
    assert delta.numel() < 100 or not torch.equal(x, before)


def all_ops(images, delta, mean, std, nonfinite):
    """A pass through every op, plain and packed; moves delta."""
    sizes = {"step": 4.0, "eps": 12.0, "unit": 4.0}
    for packed in (False, True):
        x = perturb.perturb_normalize(
            images, delta, mean, std, unit=4.0, dtype=torch.bfloat16, space_to_depth=packed
        ).requires_grad_()
        assert is_packed(x.shape, images.shape) == packed
        grad = x.detach().clone()
        ascent.sign_ascent_(delta, grad, images, nonfinite, **sizes)
        fused.ascend_normalize_(delta, x, grad, images, mean, std, nonfinite, **sizes)
        ascent.sign_ascent_(delta, -x.detach(), images, nonfinite, **sizes)


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a CUDA device")
def test_public_functions_never_wait_for_the_device():
    images, delta, mean, std = (t.to(DEVICE) for t in example((2, 64, 64, 3), torch.int8))
    nonfinite = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def one_pass():
        all_ops(images, delta, mean, std, nonfinite)

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
        all_ops(images, delta, mean, std, nonfinite)

    start = delta.clone()
    one_pass()
    expected = delta.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_pass()
    delta.copy_(start)
    graph.replay()
    assert torch.equal(delta, expected)
