"""Compiles every kernel for sm_80 and sm_90 without a GPU; needs Triton without its interpreter."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from freeadv_fast.kernels import perturb_normalize as perturb
from freeadv_fast.kernels import sign_ascent as ascent

BYTES = {"i8": 1, "u8": 1, "bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
NUM_THREADS = 128


def build(kernel, pointers, scalars, constants, architecture):
    """PTX of a kernel whose pointers are 16-byte aligned and whose total is odd."""
    types = {name: f"*{element}" for name, element in pointers.items()} | scalars
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    index = {name: (position,) for position, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature,
        {index[name]: value for name, value in constants.items()},
        {index[name]: [["tt.divisibility", 16]] for name in pointers},
    )
    options = {"num_warps": NUM_THREADS // 32, "enable_fp_fusion": False}
    binary = compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm
    assert_no_spill(binary["cubin"])
    return binary["ptx"]


def accesses(ptx, kind):
    """Bytes per thread of each global load (ld) or store (st), the widest first."""
    found = re.findall(rf"{kind}\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return sorted((int(count or 1) * int(bits) // 8 for count, bits in found), reverse=True)


def assert_no_spill(cubin):
    """No register lives in local memory, and enough fit for half of an SM's warps."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    print(f"{registers} registers")
    assert stack == local == 0
    assert registers <= 64


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("out", "delta", "image"),
    [
        ("bf16", "i8", "u8"),
        ("bf16", None, "u8"),
        ("fp16", "fp32", "u8"),
        ("fp32", "i8", "u8"),
        ("fp32", "fp16", "u8"),
        ("bf16", None, "fp16"),
    ],
)
def test_perturb_normalize(out, delta, image, architecture):
    values = 16 // BYTES[out]  # a thread's share of a tile
    ptx = build(
        perturb._perturb_normalize_kernel,
        {
            "x_ptr": out,
            "image_ptr": image,
            "delta_ptr": delta or "u8",
            "mean_ptr": "fp32",
            "std_ptr": "fp32",
        },
        {"total": "i32", "unit": "fp32"},
        {
            "C": 3,
            "HAS_DELTA": delta is not None,
            "FMA": True,
            "BLOCK": NUM_THREADS * values,
            "TILES": perturb.TILES,
            "SPANS": perturb.SPANS,
        },
        architecture,
    )
    # Whole spans store 16 bytes a thread and load images as wide as that allows.
    assert accesses(ptx, "st").count(16) >= perturb.TILES
    loads = accesses(ptx, "ld")
    assert loads.count(values * BYTES[image]) >= perturb.TILES
    if delta is not None:
        wide = min(16, values * BYTES[delta])
        assert sum(load >= wide for load in loads) >= perturb.TILES
    # Division by constants is multiplication; only the per-channel reciprocals divide.
    assert ptx.count("div.rn.f32") <= values


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("grad", "delta"),
    [("bf16", "i8"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "i8"), ("fp64", "i8")],
)
def test_sign_ascent(grad, delta, architecture):
    values = 16 // max(BYTES[grad], BYTES[delta])
    ptx = build(
        ascent._sign_ascent_kernel,
        {"delta_ptr": delta, "nonfinite_ptr": "i64", "grad_ptr": grad, "image_ptr": "u8"},
        {"total": "i32", "step": "fp32", "eps": "fp32", "unit": "fp32"},
        {"BLOCK": NUM_THREADS * values, "TILES": ascent.TILES},
        architecture,
    )
    assert accesses(ptx, "st").count(values * BYTES[delta]) >= ascent.TILES
    assert accesses(ptx, "ld").count(values * BYTES[grad]) >= ascent.TILES
    assert ptx.count("atom.global") == 1
