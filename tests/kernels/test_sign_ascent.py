"""sign_ascent_ against autograd through the clip, and against integer arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from freeadv_fast import ops
from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.kernels import sign_ascent as kernel
from freeadv_fast.kernels.space_to_depth import pack

WALKS = [(2, 2), (4, 4), (8, 8), (4, 1), (8, 2), (5, 2.5), (8, Fraction(8, 3)), (127, 1)]
SHAPES = [(2, 8, 8, 3), (3, 41, 37, 3), (1, 5, 7, 1), (2, 9, 4, 4), (0, 8, 8, 3)]


def threat(eps, step) -> ThreatModel:
    """A threat model in grey levels."""
    return ThreatModel(Perturbation(Fraction(eps)), Perturbation(Fraction(step)))


def random_images(shape, generator) -> torch.Tensor:
    """uint8 with many values at 0 and 255 and within a few levels of them."""
    near = torch.randint(-6, 7, shape, generator=generator) % 256
    anywhere = torch.randint(0, 256, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.7, near, anywhere).to(torch.uint8)


def random_grad(shape, generator, dtype=torch.float32) -> torch.Tensor:
    """(N, C, H, W) channels_last, with zeros."""
    grad = torch.randn(shape, generator=generator)
    grad[torch.rand(shape, generator=generator) < 0.1] = 0
    return grad.to(dtype).permute(0, 3, 1, 2)


def counter() -> torch.Tensor:
    """Where non-finite gradients are counted."""
    return torch.zeros((), dtype=torch.int64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("eps", "step"), [(4, 4), (8, 2), (8, 3)])
def test_equals_autograd_through_clamp_and_normalise(shape, eps, step):
    generator = torch.Generator().manual_seed(3)
    model = threat(eps, step)
    std = torch.rand(shape[3], generator=generator, dtype=torch.float64) + 0.1
    delta, nonfinite = model.zero_delta(shape, torch.device("cpu")), counter()
    for _ in range(6):
        images = random_images(shape, generator)
        weight = random_grad(shape, generator).permute(0, 2, 3, 1).double()
        # Independent: double precision, autograd through clamp and normalise, loss = sum(w * x).
        leaf = (delta.double() * model.delta_unit).requires_grad_()
        x = ((images.double() + leaf).clamp(0, 255) / 255 - 0.45) / std
        (x * weight).sum().backward()
        expected = (leaf.detach() + step * torch.sign(leaf.grad)).clamp(-eps, eps)
        # Ours: the gradient at the normalised input is the weight itself.
        grad = weight.float().permute(0, 3, 1, 2)
        ops.sign_ascent_(delta, grad, images, nonfinite, step=step, eps=eps, unit=model.delta_unit)
        assert torch.equal(delta.double() * model.delta_unit, expected)
    assert nonfinite == 0


def test_mask_is_inclusive_and_taken_before_the_update():
    images = torch.tensor([0, 3, 4, 5, 250, 251, 252, 255], dtype=torch.uint8).view(1, 1, 8, 1)
    grad = torch.tensor([-1.0, -1, -1, -1, 1, 1, 1, 1]).view(1, 1, 1, 8)
    delta = torch.tensor([0.0, -4, -4, -4, 4, 4, 4, 0]).view(1, 1, 8, 1)
    ops.sign_ascent_(delta, grad, images, counter(), step=2, eps=8)
    # 3 - 4 and 252 + 4 are outside: frozen. 4 - 4 = 0 and 251 + 4 = 255 are not.
    assert delta.flatten().tolist() == [-2, -4, -6, -6, 6, 6, 4, 2]


def test_perturbations_outside_the_ball_are_projected():
    images = torch.full((1, 1, 2, 1), 128, dtype=torch.uint8)
    delta = torch.tensor([9.0, -9.0]).view(1, 1, 2, 1)
    ops.sign_ascent_(delta, torch.zeros(1, 1, 1, 2), images, counter(), step=1, eps=4)
    assert delta.flatten().tolist() == [4, -4]


@pytest.mark.parametrize(("eps", "step"), WALKS)
def test_int8_is_exact_integer_arithmetic(eps, step):
    generator = torch.Generator().manual_seed(5)
    model, shape = threat(eps, step), (2, 9, 7, 3)
    unit, num_steps = Fraction(step), int(Fraction(eps) / Fraction(step))
    delta, exact = model.zero_delta(shape, torch.device("cpu")), torch.zeros(shape).long()
    assert delta.dtype is torch.int8
    drift = random_grad(shape, generator)  # a walk that reaches the ball's edge
    for _ in range(20 + 3 * num_steps):
        images = random_images(shape, generator)
        grad = drift + 0.5 * random_grad(shape, generator)
        s = images.long() * unit.denominator + exact * unit.numerator
        inside = (s >= 0) & (s <= 255 * unit.denominator)
        move = torch.sign(grad.permute(0, 2, 3, 1)).long() * inside
        exact = (exact + move).clamp(-num_steps, num_steps)
        ops.sign_ascent_(
            delta, grad, images, counter(), step=float(step), eps=float(eps), unit=float(step)
        )
        assert torch.equal(delta.long(), exact)
    assert exact.abs().max() == num_steps


@pytest.mark.parametrize(("eps", "step"), [w for w in WALKS if w[0] == w[1]])
def test_float_delta_equals_int8_where_the_step_is_eps(eps, step):
    generator = torch.Generator().manual_seed(7)
    shape = (2, 9, 7, 3)
    whole = torch.zeros(shape, dtype=torch.int8)
    floats = [torch.zeros(shape, dtype=dtype) for dtype in (torch.float32, torch.float16)]
    for _ in range(10):
        images, grad = random_images(shape, generator), random_grad(shape, generator)
        ops.sign_ascent_(whole, grad, images, counter(), step=step, eps=eps, unit=step)
        for delta in floats:
            ops.sign_ascent_(delta, grad, images, counter(), step=step, eps=eps)
            assert torch.equal(delta.float(), whole.float() * step)


def test_smaller_last_batch_updates_the_first_rows_only():
    generator = torch.Generator().manual_seed(9)
    images, grad = random_images((4, 8, 8, 3), generator), random_grad((4, 8, 8, 3), generator)
    whole, part = (torch.zeros(4, 8, 8, 3, dtype=torch.int8) for _ in range(2))
    ops.sign_ascent_(whole, grad, images, counter(), step=4, eps=4, unit=4)
    ops.sign_ascent_(part[:3], grad[:3], images[:3], counter(), step=4, eps=4, unit=4)
    assert torch.equal(part[:3], whole[:3])
    assert not part[3].any()
    assert whole[3].any()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("storage", [torch.int8, torch.float32], ids=str)
def test_nonfinite_gradients_are_counted_and_move_nothing(dtype, storage):
    generator = torch.Generator().manual_seed(11)
    shape, unit = (2, 16, 16, 3), 4.0 if storage is torch.int8 else 1.0
    images = torch.full(shape, 128, dtype=torch.uint8)
    grad = torch.where(random_grad(shape, generator) > 0, 1.0, -1.0).to(dtype)
    bad = torch.rand(grad.shape, generator=generator) < 0.2
    values = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    broken = torch.where(bad, values[torch.randint(0, 3, grad.shape, generator=generator)], grad)
    delta, nonfinite = torch.zeros(shape, dtype=storage), torch.full((1,), 5)
    ops.sign_ascent_(delta, broken, images, nonfinite, step=4, eps=4, unit=unit)
    assert nonfinite.item() == 5 + int(bad.sum())
    expected = torch.where(bad, 0, grad.float()).permute(0, 2, 3, 1) * 4
    assert torch.equal(delta.float() * unit, expected)


def test_float64_gradients_keep_the_sign_of_tiny_values():
    grad = torch.tensor([1e-300, -1e-300, 1e300], dtype=torch.float64).view(1, 1, 1, 3)
    delta, nonfinite = torch.zeros(1, 1, 3, 1, dtype=torch.int8), counter()
    images = torch.full((1, 1, 3, 1), 9, dtype=torch.uint8)
    ops.sign_ascent_(delta, grad, images, nonfinite, step=4, eps=4, unit=4)
    assert delta.flatten().tolist() == [1, -1, 1]
    assert nonfinite == 0


def test_any_gradient_layout():
    generator = torch.Generator().manual_seed(13)
    images, grad = random_images((2, 8, 6, 3), generator), random_grad((2, 8, 6, 3), generator)
    last, first = (torch.zeros(2, 8, 6, 3, dtype=torch.int8) for _ in range(2))
    ops.sign_ascent_(last, grad, images, counter(), step=4, eps=4, unit=4)
    ops.sign_ascent_(first, grad.contiguous(), images, counter(), step=4, eps=4, unit=4)
    assert torch.equal(last, first)


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (3, 7, 5, 3), (0, 8, 8, 3)])
@pytest.mark.parametrize("implementation", [ops.sign_ascent_, kernel.sign_ascent_])
@pytest.mark.parametrize("is_contiguous", [False, True])
def test_packed_gradient(shape, implementation, is_contiguous):
    generator = torch.Generator().manual_seed(21)
    images, grad = random_images(shape, generator), random_grad(shape, generator)
    packed = torch.where(pack(torch.ones_like(grad)) == 1, pack(grad), torch.nan)
    if len(grad):
        grad[0, 0, 1, 1] = packed[0, 11, 2, 2] = torch.inf  # row 1, column 1, colour 0
    if is_contiguous:
        packed = packed.contiguous()
    plain, moved = (torch.zeros(shape, dtype=torch.int8) for _ in range(2))
    count, expected = counter(), counter()
    ops.sign_ascent_(plain, grad, images, expected, step=4, eps=4, unit=4)
    implementation(moved, packed, images, count, step=4, eps=4, unit=4)
    assert torch.equal(moved, plain)
    assert count == expected == min(len(grad), 1)


def test_pieces_do_not_show(monkeypatch):
    generator = torch.Generator().manual_seed(15)
    images, grad = random_images((3, 7, 5, 3), generator), random_grad((3, 7, 5, 3), generator)
    grad[0, 0, 0, 0] = torch.nan
    whole, pieces = (torch.zeros(3, 7, 5, 3, dtype=torch.int8) for _ in range(2))
    one, many = counter(), counter()
    ops.sign_ascent_(whole, grad, images, one, step=4, eps=4, unit=4)
    monkeypatch.setattr(kernel, "CPU_CHUNK", 16)
    ops.sign_ascent_(pieces, grad, images, many, step=4, eps=4, unit=4)
    assert torch.equal(whole, pieces)
    assert one == many == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": torch.zeros(3, 8, 8, 3)}, r"delta \(3, 8, 8, 3\) and images \(2, 8, 8, 3\)"),
        ({"grad": torch.zeros(2, 8, 8, 3)}, r"expected \(2, 3, 8, 8\).*got \(2, 8, 8, 3\)"),
        ({"grad": torch.zeros(2, 16, 8, 7)}, r"packed \(2, 16, 7, 7\).*got \(2, 16, 8, 7\)"),
        ({"grad": torch.zeros(2, 3, 8, 8, dtype=torch.int32)}, "no float dtype"),
        ({"nonfinite": torch.zeros(2, dtype=torch.int64)}, "one int64"),
        ({"nonfinite": torch.zeros(())}, "one int64"),
        ({"step": 2.0}, "unit = step"),
        ({"eps": 6.0}, "whole number of steps"),
        ({"eps": 512.0}, "up to 127"),
        ({"unit": 0.0}, "> 0"),
        ({"delta": torch.zeros(2, 3, 8, 8).permute(0, 2, 3, 1)}, "contiguous"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "delta": torch.zeros(2, 8, 8, 3, dtype=torch.int8),
        "grad": torch.zeros(2, 3, 8, 8),
        "images": torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        "nonfinite": counter(),
        **{"step": 4.0, "eps": 4.0, "unit": 4.0},
    }
    with pytest.raises(RuntimeError, match=message):
        ops.sign_ascent_(**{**arguments, **change})


@pytest.mark.parametrize("storage", [torch.int8, torch.float32], ids=str)
@pytest.mark.parametrize("layout", [torch.clone, pack], ids=["plain", "packed"])
def test_opcheck(storage, layout):
    generator = torch.Generator().manual_seed(17)
    shape, unit = (2, 5, 7, 3), 4.0 if storage is torch.int8 else 1.0
    images, grad = random_images(shape, generator), layout(random_grad(shape, generator))
    arguments = (torch.zeros(shape, dtype=storage), grad, images, counter(), 4.0, 8.0, unit)
    torch.library.opcheck(torch.ops.freeadv_fast.sign_ascent_.default, arguments)


def test_pairs_of_bytes_need_even_addresses():
    """The kernel stores two values of an int8 delta at once only where each run is aligned."""
    memory, grad = torch.zeros(1 + 2 * 4 * 6 * 3, dtype=torch.int8), torch.zeros(0)
    aligned, shifted = memory[:-1].view(2, 4, 6, 3), memory[1:].view(2, 4, 6, 3)
    assert kernel.packed_constants(aligned, grad, 4)["PAIRS"]
    assert not kernel.packed_constants(shifted, grad, 4)["PAIRS"]
    assert not kernel.packed_constants(memory[:-1].view(2, 6, 4, 3)[:, :, :3], grad, 4)["PAIRS"]
    assert not kernel.packed_constants(aligned.float(), grad, 4)["PAIRS"]


def test_custom_op_equals_the_reference():
    generator = torch.Generator().manual_seed(19)
    images, grad = random_images((2, 8, 6, 3), generator), random_grad((2, 8, 6, 3), generator)
    reference, op = (torch.zeros(2, 8, 6, 3, dtype=torch.int8) for _ in range(2))
    ops.sign_ascent_(reference, grad, images, counter(), step=4, eps=4, unit=4)
    kernel.sign_ascent_(op, grad, images, counter(), step=4, eps=4, unit=4)
    assert torch.equal(op, reference)
    assert op.any()
