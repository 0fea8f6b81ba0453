"""Compiles layer-wise adaptive rates for sm_80 and sm_90, as ahead_of_time.py does."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from freeadv_fast.kernels import lalr as kernel

TYPES = {
    **dict.fromkeys(("table_ptr", "layout_ptr", "tensor_ptr"), "*i64"),
    **dict.fromkeys(("partial_ptr", "lr_ptr", "grad_scale_ptr", "found_inf_ptr"), "*fp32"),
    "addresses": ("i64",) * kernel.NUM_WRITTEN,
    "num_tensors": "i32",
    **dict.fromkeys(("beta", "weight_decay", "min_norm", "max_norm"), "fp32"),
}
CONSTANTS = {
    "BETA2": kernel.BETA2,
    "EPS": kernel.EPS,
    "NOWHERE": kernel.NOWHERE,
    "BLOCK": kernel.BLOCK,
    "TILES": kernel.TILES,
    "COUNT": kernel.NUM_WRITTEN,
}
architectures = pytest.mark.parametrize("architecture", [80, 90])
scalers = pytest.mark.parametrize("scaled", [False, True])
alignments = pytest.mark.parametrize("aligned", [False, True])


def build(name, architecture, *, aligned=True, scaled=True):
    """PTX of a kernel as the launcher compiles it, and the registers of a thread."""
    function = getattr(kernel, name)
    constants = {**CONSTANTS, "ALIGNED": aligned}
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
    print(f"sm_{architecture} {name} aligned={aligned} scaled={scaled}: {registers} registers")
    return binary["ptx"], registers


def resources(cubin):
    """Registers of a thread; none of them in local memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton comes without cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    assert stack == local == 0
    return registers


def accesses(ptx, kind):
    """Bytes per thread of each global load (ld) or store (st)."""
    found = re.findall(rf"{kind}\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return [int(count or 1) * int(bits) // 8 for count, bits in found]


@architectures
@scalers
@alignments
def test_moments(architecture, scaled, aligned):
    """Four tensors in and two out, in whole 16 bytes where they are aligned; half an SM's warps."""
    ptx, registers = build("_moments_kernel", architecture, aligned=aligned, scaled=scaled)
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
    ptx, registers = build("_descend_kernel", architecture, aligned=aligned, scaled=scaled)
    width, count = (16, 1) if aligned else (4, 4)
    assert accesses(ptx, "ld").count(width) >= 3 * count
    assert accesses(ptx, "st").count(width) >= count
    assert registers <= 64


@architectures
def test_addresses_fit_into_the_arguments_of_a_launch(architecture):
    """As 64-bit values, in at most the 4,096 bytes that every GPU takes."""
    ptx, _ = build("_write_addresses_kernel", architecture)
    assert len(re.findall(r"\.param \.u64", ptx)) <= 4096 // 8
    assert sum(accesses(ptx, "st")) == 8 * kernel.NUM_WRITTEN
