"""perturb_normalize against plain and against double-precision arithmetic."""

from __future__ import annotations

import pytest
import torch

from freeadv_fast import ops
from freeadv_fast.kernels import perturb_normalize as kernel
from freeadv_fast.kernels.space_to_depth import pack

MEAN = (0.485, 0.456, 0.406, 0.5)
STD = (0.229, 0.224, 0.225, 0.25)
SHAPES = [(2, 8, 8, 3), (3, 41, 37, 3), (1, 5, 7, 1), (2, 9, 4, 4), (0, 8, 8, 3)]
# Storage dtype, unit: what delta may be.
STORAGES = [(torch.int8, 4.0), (torch.int8, 2.5), (torch.float32, 1.0), (torch.float16, 1.0)]


def example(shape: tuple[int, ...], storage: torch.dtype, seed: int = 0):
    """Images with many black and white pixels, and a perturbation that crosses both ends."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(-40, 296, shape, generator=generator).clamp_(0, 255).to(torch.uint8)
    delta = torch.randint(-3, 4, shape, generator=generator).to(storage)
    if storage.is_floating_point:
        delta += torch.rand(shape, generator=generator).to(storage)
    mean, std = (torch.tensor(v[: shape[3]]) for v in (MEAN, STD))
    return images, delta, mean, std


def eager(images, delta, mean, std, unit, work=torch.float32):
    """The formula as one reads it, NHWC."""
    s = images.to(work) + delta.to(work) * unit
    return (s.clamp(0, 255) / 255 - mean.to(work)) / std.to(work)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("storage", "unit"), STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equals_the_formula(shape, storage, unit, dtype):
    images, delta, mean, std = example(shape, storage)
    x = ops.perturb_normalize(images, delta, mean, std, unit=unit, dtype=dtype)
    work = torch.float64 if dtype is torch.float64 else torch.float32
    expected = eager(images, delta, mean, std, unit, work).to(dtype)
    assert x.dtype is dtype
    assert torch.equal(x, expected.permute(0, 3, 1, 2))
    assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (3, 11, 7, 3), (0, 8, 8, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("implementation", [ops.perturb_normalize, kernel.perturb_normalize])
def test_packed_is_the_plain_result_packed(shape, dtype, implementation):
    images, delta, mean, std = example(shape, torch.int8)
    sizes = {"unit": 4.0, "dtype": dtype}
    x = implementation(images, delta, mean, std, **sizes, space_to_depth=True)
    assert torch.equal(x, pack(ops.perturb_normalize(images, delta, mean, std, **sizes)))
    assert x.dtype is dtype
    assert x.permute(0, 2, 3, 1).is_contiguous()


def test_float32_is_near_double():
    images, delta, mean, std = example((4, 32, 32, 3), torch.int8)
    x = ops.perturb_normalize(images, delta, mean, std, unit=4.0)
    exact = ops.perturb_normalize(images, delta, mean, std, unit=4.0, dtype=torch.float64)
    torch.testing.assert_close(x.double(), exact, rtol=1e-6, atol=3e-7)


def test_pieces_do_not_show(monkeypatch):
    images, delta, mean, std = example((5, 11, 7, 3), torch.int8)
    whole = ops.perturb_normalize(images, delta, mean, std, unit=4.0)
    monkeypatch.setattr(kernel, "CPU_CHUNK", 50)
    assert torch.equal(ops.perturb_normalize(images, delta, mean, std, unit=4.0), whole)


def test_no_delta_is_zero_delta():
    images, delta, mean, std = example((2, 9, 9, 3), torch.int8)
    clean = ops.perturb_normalize(images, None, mean, std)
    assert torch.equal(clean, ops.perturb_normalize(images, delta.zero_(), mean, std))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_takes_images_that_were_perturbed_before(dtype):
    """float16 grey levels, as adversarial images travel between ranks."""
    images, delta, mean, std = example((2, 9, 7, 3), torch.float32)
    moved = (images + delta).clamp_(0, 255).half()
    x = ops.perturb_normalize(moved, None, mean, std, dtype=dtype)
    expected = eager(moved, torch.zeros(1), mean, std, 1.0).to(dtype)
    assert torch.equal(x, expected.permute(0, 3, 1, 2))
    whole = images.half()  # whole grey levels are exact
    assert torch.equal(
        ops.perturb_normalize(whole, None, mean, std),
        ops.perturb_normalize(images, None, mean, std),
    )


def test_smaller_last_batch_reads_the_first_rows():
    images, delta, mean, std = example((4, 8, 8, 3), torch.int8)
    whole = ops.perturb_normalize(images, delta, mean, std, unit=4.0)
    part = ops.perturb_normalize(images[:3], delta[:3], mean, std, unit=4.0)
    assert torch.equal(part, whole[:3])


def test_result_is_a_leaf_that_takes_a_gradient():
    images, delta, mean, std = example((2, 8, 8, 3), torch.int8)
    x = ops.perturb_normalize(images, delta, mean, std).requires_grad_()
    x.square().sum().backward()
    assert x.is_leaf
    assert torch.equal(x.grad, 2 * x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": torch.zeros(3, 8, 8, 3)}, r"delta \(3, 8, 8, 3\) and images \(2, 8, 8, 3\)"),
        ({"delta": torch.zeros(2, 8, 8, 3, dtype=torch.int16)}, "int8, float16 or float32"),
        ({"delta": torch.zeros(2, 8, 8, 3, requires_grad=True)}, "requires grad"),
        ({"images": torch.zeros(2, 8, 8, 3)}, "contiguous uint8 or float16"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8).permute(0, 2, 3, 1)}, "strides"),
        ({"pixel_mean": torch.zeros(4)}, r"mean: expected float32 \(3,\)"),
        ({"pixel_std": torch.ones(3, dtype=torch.float16)}, "std: expected float32"),
        ({"dtype": torch.int32}, "dtype torch.int32"),
    ],
)
def test_refuses(change, message):
    images, delta, mean, std = example((2, 8, 8, 3), torch.int8)
    arguments = {"images": images, "delta": delta, "pixel_mean": mean, "pixel_std": std}
    with pytest.raises(RuntimeError, match=message):
        ops.perturb_normalize(**{**arguments, "dtype": torch.float32, **change})


@pytest.mark.parametrize("channels", [1, 4])
def test_packs_three_channels_only(channels):
    images, delta, mean, std = example((2, 8, 8, channels), torch.int8)
    with pytest.raises(RuntimeError, match=f"expected 3 channels, got {channels}"):
        ops.perturb_normalize(images, delta, mean, std, space_to_depth=True)


@pytest.mark.parametrize("storage", [torch.int8, torch.float32, None])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(storage, packed):
    images, delta, mean, std = example((2, 5, 7, 3), storage or torch.int8)
    delta = None if storage is None else delta
    arguments = (images, delta, mean, std, 4.0, torch.bfloat16, packed)
    torch.library.opcheck(torch.ops.freeadv_fast.perturb_normalize.default, arguments)


def test_custom_op_equals_the_reference_and_compiles_whole():
    images, delta, mean, std = example((2, 5, 7, 3), torch.int8)
    expected = ops.perturb_normalize(images, delta, mean, std, unit=4.0)
    assert torch.equal(kernel.perturb_normalize(images, delta, mean, std, unit=4.0), expected)
    compiled = torch.compile(
        lambda i, d: kernel.perturb_normalize(i, d, mean, std, unit=4.0) + 1,
        backend="aot_eager",
        fullgraph=True,
    )
    assert torch.equal(compiled(images, delta), expected + 1)


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c rounded to float32, of float32 values in double precision.

    The product is exact; the sum is rounded twice, which cannot hurt further than 2^-29 of the
    cases.
    """
    return (a * b + c).float().double()


def reciprocal(b: float) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / b in two float32, as `kernel.reciprocal` computes it."""
    divisor = torch.tensor(b, dtype=torch.float32).double()
    high = (1 / divisor).float().double()
    return high, (fma(high, -divisor, torch.ones(())) * high).float().double()


@pytest.mark.parametrize("binade", [1.0, 128.0])
def test_two_floats_divide_by_255_exactly(binade):
    high, _ = reciprocal(255.0)
    low = torch.tensor(-2.3191758e-10).double()  # the kernel's constant
    # All 2^23 mantissas: a division's rounding does not depend on the exponent.
    values = torch.arange(1 << 23, dtype=torch.int32)
    a = (values + torch.tensor(binade).view(torch.int32)).view(torch.float32)
    quotient = fma(a.double(), high, (a.double() * low).float().double())
    assert torch.equal(quotient.float(), a / torch.tensor(255.0))


@pytest.mark.parametrize("std", [*STD, 0.2471, 0.2435, 0.2616, 0.2673, 0.2564, 1.0, 0.99999994])
def test_one_correction_divides_by_std_exactly(std):
    a = torch.rand(1 << 20, generator=torch.Generator().manual_seed(1)) - 0.5
    high, low = reciprocal(std)
    divisor = torch.tensor(std, dtype=torch.float32).double()
    quotient = fma(a.double(), high, (a.double() * low).float().double())
    remainder = fma(quotient, -divisor, a.double())
    assert torch.equal(fma(remainder, high, quotient).float(), a / torch.tensor(std))
