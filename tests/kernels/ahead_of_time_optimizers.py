"""Compiles kernels of optimizers and averages for sm_80 and sm_90, as ahead_of_time.py does."""

from __future__ import annotations

import re

import pytest
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from cubin import accesses, resources
from freeadv_fast.kernels import averaging, lalr, multi_tensor, sgd

TYPES = {
    **dict.fromkeys(("table_ptr", "layout_ptr", "tensor_ptr"), "*i64"),
    **dict.fromkeys(("partial_ptr", "lr_ptr", "grad_scale_ptr", "found_inf_ptr"), "*fp32"),
    "share_ptr": "*fp32",
    "addresses": ("i64",) * multi_tensor.NUM_WRITTEN,
    "num_tensors": "i32",
    **dict.fromkeys(("beta", "momentum", "weight_decay", "min_norm", "max_norm"), "fp32"),
}
CONSTANTS = ("BETA2", "EPS", "BLOCK", "TILES")
architectures = pytest.mark.parametrize("architecture", [80, 90])
scalers = pytest.mark.parametrize("scaled", [False, True])
alignments = pytest.mark.parametrize("aligned", [False, True])


def build(kernel, name, architecture, *, scaled=True, **constants):
    """PTX of a kernel as the launcher compiles it, and the registers of a thread."""
    function = getattr(kernel, name)
    constants |= {"COUNT": multi_tensor.NUM_WRITTEN, "NOWHERE": multi_tensor.NOWHERE}
    constants |= {key: getattr(kernel, key) for key in CONSTANTS if hasattr(kernel, key)}
    if not scaled:
        constants |= {"grad_scale_ptr": None, "found_inf_ptr": None}
    signature, values, attributes = {}, {}, {}
    for position, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            values[(position,)] = constants[argument]
            continue
        signature[argument] = TYPES[argument]
        if argument.endswith("_ptr"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, values, attributes)
    warps = 1 if "addresses" in signature else kernel.NUM_THREADS // 32
    target, options = GPUTarget("cuda", architecture, 32), {"num_warps": warps}
    binary = compile(source, target=target, options=options).asm
    registers = resources(binary["cubin"])
    print(f"sm_{architecture} {name} {constants} scaled={scaled}: {registers} registers")
    return binary["ptx"], registers


@architectures
@scalers
@alignments
def test_moments(architecture, scaled, aligned):
    """Four tensors in and two out, in whole 16 bytes where they are aligned; half an SM's warps."""
    ptx, registers = build(lalr, "_moments_kernel", architecture, ALIGNED=aligned, scaled=scaled)
    width, count = (16, 1) if aligned else (4, 4)
    assert accesses(ptx, "ld").count(width) >= 4 * count
    assert accesses(ptx, "st").count(width) >= 2 * count
    assert "atom" not in ptx
    assert registers <= 64


@architectures
@scalers
@alignments
def test_descend(architecture, scaled, aligned):
    """Three tensors in and one out."""
    ptx, registers = build(lalr, "_descend_kernel", architecture, ALIGNED=aligned, scaled=scaled)
    width, count = (16, 1) if aligned else (4, 4)
    assert accesses(ptx, "ld").count(width) >= 3 * count
    assert accesses(ptx, "st").count(width) >= count
    assert registers <= 64


@architectures
def test_addresses_fit_into_the_arguments_of_a_launch(architecture):
    """As 64-bit values, in at most the 4,096 bytes that every GPU takes."""
    ptx, _ = build(multi_tensor, "_write_addresses_kernel", architecture)
    assert len(re.findall(r"\.param \.u64", ptx)) <= 4096 // 8
    assert sum(accesses(ptx, "st")) == 8 * multi_tensor.NUM_WRITTEN


@pytest.mark.parametrize(
    ("architecture", "half", "grad", "aligned", "scaled", "has_momentum"),
    [
        (90, tl.bfloat16, tl.bfloat16, True, False, True),
        (90, tl.float16, tl.float32, True, True, True),
        (80, tl.bfloat16, tl.bfloat16, False, False, False),
    ],
)
def test_sgd(architecture, half, grad, aligned, scaled, has_momentum):
    """16 bytes a thread of w, v and float32 gradients, 8 of half precision, without and with h."""
    ptx, registers = build(
        sgd, "_sgd_kernel", architecture,
        HALF=half, GRAD=grad, ALIGNED=aligned, scaled=scaled, HAS_MOMENTUM=has_momentum,
    )  # fmt: skip
    loads, stores = accesses(ptx, "ld"), accesses(ptx, "st")
    if aligned:
        assert loads.count(16) == (6 if grad is tl.float32 else 5)
        assert (stores.count(16), stores.count(8)) == (4, 1)
    else:
        assert 16 not in loads + stores
    assert "atom" not in ptx
    assert registers <= 32  # all of an SM's warps


@architectures
@alignments
def test_average(architecture, aligned):
    """Two tensors in and one out."""
    ptx, registers = build(averaging, "_average_kernel", architecture, ALIGNED=aligned)
    loads, stores = accesses(ptx, "ld"), accesses(ptx, "st")
    if aligned:
        assert (loads.count(16), stores.count(16)) == (2, 1)
    else:
        assert 16 not in loads + stores
    assert "atom" not in ptx
    assert registers <= 32  # all of an SM's warps
