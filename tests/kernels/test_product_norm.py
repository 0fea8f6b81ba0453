"""The door of the convolutions and their norms; compiled_product_norm.py tells what kernels do."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from freeadv_fast import ops
from freeadv_fast.kernels import product_norm as kernel
from freeadv_fast.kernels.batch_norm_statistics import Norm
from freeadv_fast.kernels.product_norm import Product
from freeadv_fast.ops import block_ends, dispatch


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and dtypes of a product."""

    narrow: int = 64
    wide: int = 256
    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.bfloat16
    side: int = 1
    num: int = 2

    def make(self):
        x = torch.randn(self.num, self.narrow, 3, 3).to(self.dtype)
        w = torch.randn(self.wide, self.narrow, self.side, self.side).to(self.weight_dtype)
        vectors = [torch.ones(self.wide) for _ in range(4)]
        return Product(x, w, Norm(*vectors, torch.tensor(0), 0.1, 1e-5))


@pytest.mark.parametrize(
    ("case", "is_taken"),
    [
        (Case(), True),
        (Case(narrow=256, wide=1024), True),
        (Case(narrow=128, wide=256), True),
        (Case(narrow=512, wide=2048), False),
        (Case(narrow=48, wide=256), False),
        (Case(narrow=256, wide=256), False),
        (Case(wide=264), False),
        (Case(dtype=torch.float16, weight_dtype=torch.float16), False),
        (Case(weight_dtype=torch.float32), True),
        (Case(side=3), False),
        (Case(num=0), False),
    ],
    ids=str,
)
def test_what_the_kernels_take(case, is_taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    product = case.make()
    assert kernel.supports(product) == is_taken
    strided = product.w.new_empty(1, *product.w.shape[1:]).expand_as(product.w)
    assert not kernel.supports(product._replace(w=strided))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    assert not kernel.supports(product)


@pytest.mark.parametrize("change", ["bias", "counter"])
def test_norms_that_the_kernels_do_not_take(change, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    product = Case().make()
    values = {"bias": torch.zeros(256).double(), "counter": torch.tensor(0.0)}
    field = {"bias": "bias", "counter": "num_batches_tracked"}[change]
    norm = product.norm._replace(**{field: values[change]})
    assert not kernel.supports(product._replace(norm=norm))


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_the_door_takes_what_the_kernels_do(projected, num_groups, monkeypatch):
    """Weights in float32 under autocast; groups, no gradients and other dtypes go elsewhere."""
    given = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(dispatch, "backend", lambda _: "triton")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(kernel, "product_norm", lambda *a, **k: given.append((*a, k)))
    others = []
    for name in ("_normalized", "joined_norms"):
        monkeypatch.setattr(block_ends, name, lambda *a, name=name, **k: others.append(name))
    monkeypatch.setattr(block_ends.F, "conv2d", lambda x, w: x)
    product, shortcut = (
        Case(weight_dtype=torch.float32).make(),
        torch.zeros(2, 256, 3, 3).bfloat16(),
    )
    shortcut = Case(weight_dtype=torch.float32).make() if projected else shortcut

    def door():
        ops.product_norm(product, shortcut, num_groups=num_groups, fork=True)

    door()
    elsewhere = "joined_norms" if projected else "_normalized"
    if num_groups == 2:
        assert not given
        assert others == [elsewhere]
        return
    ((first, second, options),) = given
    assert options == {"fork": True}
    assert first.w.dtype == torch.bfloat16
    assert (second.w if projected else second).dtype == torch.bfloat16
    with torch.no_grad():
        door()
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.float16)
    door()
    assert len(given) == 1
    assert others == [elsewhere] * 2
