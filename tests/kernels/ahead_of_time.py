"""Compiles every kernel for sm_80 and sm_90 without a GPU; needs Triton without its interpreter."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from freeadv_fast.kernels import ascend_normalize as fused
from freeadv_fast.kernels import perturb_normalize as perturb
from freeadv_fast.kernels import sign_ascent as ascent
from freeadv_fast.kernels.space_to_depth import num_blocks
from pairwise import every_pair

DTYPES = {
    "i8": torch.int8,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
BYTES = {"i8": 1, "u8": 1, "bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
NUM_THREADS = 128


def build(kernel, pointers, scalars, constants, architecture, most_registers=64):
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
    assert_no_spill(binary["cubin"], most_registers)
    return binary["ptx"]


def accesses(ptx, kind):
    """Bytes per thread of each global load (ld) or store (st), the widest first."""
    found = re.findall(rf"{kind}\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return sorted((int(count or 1) * int(bits) // 8 for count, bits in found), reverse=True)


def assert_no_spill(cubin, most_registers):
    """No register lives in local memory; 64 and fewer fit for half of an SM's warps."""
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
    assert registers <= most_registers


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
    # 1 / 255 in the two floats for which test_perturb_normalize.py checks every mantissa.
    for constant in (1 / 255, -2.3191758e-10):
        assert f"0f{struct.unpack('<I', struct.pack('<f', constant))[0]:08X}" in ptx
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


# Sizes of a packed image and the width of what a thread loads of images and delta, in values.
PACKED_SIZES = [(224, 2), (225, 1)]


def packed(types):
    """Cases of types, sizes and architectures."""
    cases = every_pair(types, PACKED_SIZES, [80, 90])
    return pytest.mark.parametrize(("types", "size_and_run", "architecture"), cases, ids=str)


def packed_constants(size, tiles, grad, delta):
    """What the launchers choose for square images."""
    delta = torch.empty(1, size, size, 3, dtype=DTYPES[delta])
    return ascent.packed_constants(delta, torch.empty(0, dtype=DTYPES[grad]), tiles)


def assert_packed_accesses(ptx, constants, x, delta, is_x_stored):
    """Whole 16 bytes of x and gradient, images and int8 delta as wide as a run allows."""
    tiles, width = constants["TILES"], 2 if constants["WIDTH"] % 2 == 0 else 1
    loads = accesses(ptx, "ld")
    assert loads.count(16) >= tiles * 8 * BYTES[x] // 16
    assert loads.count(width) >= tiles * 6 // width
    width = 2 if constants["PAIRS"] else BYTES[delta]
    stores = [16] * (tiles * 8 * BYTES[x] // 16) if is_x_stored else []
    assert accesses(ptx, "st") == stores + [width] * (tiles * 6 * BYTES[delta] // width)


@packed([("bf16", "i8"), ("bf16", None), ("fp32", "fp16")])
def test_perturb_normalize_packed(types, size_and_run, architecture):
    (out, delta), (size, run) = types, size_and_run
    values = 16 // BYTES[out]
    ptx = build(
        perturb._perturb_normalize_packed_kernel,
        {
            "x_ptr": out,
            "image_ptr": "u8",
            "delta_ptr": delta or "u8",
            "mean_ptr": "fp32",
            "std_ptr": "fp32",
        },
        {"unit": "fp32"},
        {
            "HEIGHT": size,
            "WIDTH": size,
            "HAS_DELTA": delta is not None,
            "FMA": True,
            "TILES": perturb.TILES,
            "BLOCKS": num_blocks(size, size, perturb.TILES),
        },
        architecture,
    )
    # All stores are 16 bytes a thread, remainders and border included.
    assert accesses(ptx, "st") == [16] * (8 // values) * (perturb.TILES + 1)
    loads = accesses(ptx, "ld")
    for element in ["u8"] if delta is None else ["u8", delta]:
        assert loads.count(run * BYTES[element]) >= perturb.TILES * 6 // run
    assert ptx.count("div.rn.f32") <= values


@packed([("bf16", "i8"), ("fp32", "i8"), ("bf16", "fp32")])
def test_sign_ascent_packed(types, size_and_run, architecture):
    (grad, delta), (size, run) = types, size_and_run
    constants = packed_constants(size, ascent.TILES, grad, delta)
    ptx = build(
        ascent._sign_ascent_packed_kernel,
        {"delta_ptr": delta, "nonfinite_ptr": "i64", "grad_ptr": grad, "image_ptr": "u8"},
        {"step": "fp32", "eps": "fp32", "unit": "fp32"},
        constants,
        architecture,
        64 if run == 2 else 96,
    )
    assert_packed_accesses(ptx, constants, grad, delta, False)
    assert ptx.count("atom.global") == 1


FUSED_POINTERS = {"nonfinite_ptr": "i64", "image_ptr": "u8", "mean_ptr": "fp32", "std_ptr": "fp32"}
FUSED_SCALARS = {"step": "fp32", "eps": "fp32", "unit": "fp32"}
FUSED_TYPES = [("bf16", "i8"), ("fp16", "fp32"), ("fp32", "i8")]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("x", "delta"), FUSED_TYPES)
def test_ascend_normalize(x, delta, architecture):
    values = fused.BYTES // max(BYTES[x], BYTES[delta])
    ptx = build(
        fused._ascend_normalize_kernel,
        {"delta_ptr": delta, "x_ptr": x, "grad_ptr": x, **FUSED_POINTERS},
        {"total": "i32", **FUSED_SCALARS},
        {"C": 3, "FMA": True, "BLOCK": NUM_THREADS * values, "TILES": fused.TILES},
        architecture,
    )
    stores, loads = accesses(ptx, "st"), accesses(ptx, "ld")
    assert values * BYTES[delta] in stores
    assert values * BYTES[x] in stores
    assert values * BYTES[x] in loads
    assert values in loads
    assert ptx.count("atom.global") == 1
    assert ptx.count("div.rn.f32") <= values


@packed(FUSED_TYPES)
def test_ascend_normalize_packed(types, size_and_run, architecture):
    (x, delta), (size, run) = types, size_and_run
    constants = packed_constants(size, fused.TILES, x, delta)
    ptx = build(
        fused._ascend_normalize_packed_kernel,
        {"delta_ptr": delta, "x_ptr": x, "grad_ptr": x, **FUSED_POINTERS},
        FUSED_SCALARS,
        {**constants, "FMA": True},
        architecture,
        72 if run == 2 else 96,
    )
    assert_packed_accesses(ptx, constants, x, delta, True)
    assert ptx.count("atom.global") == 1
    assert ptx.count("div.rn.f32") <= 8
