"""Compiles the stem's convolution for sm_80 and sm_90 without a GPU, as ahead_of_time.py does.

`pytest -s` prints registers; the summary of `-rP` shows them too.
"""

from __future__ import annotations

import re

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from cubin import resources
from freeadv_fast.kernels import stem_convolution as kernel

# Shared memory in KiB: of an SM, of which each program costs 1 more than it asks for, and what any
# GPU of this major capability grants a program (sm_86 the least).
SHARED = {80: (164, 99), 90: (228, 227)}
OUT = 64


def build(name, architecture, tile, constants):
    """PTX of a kernel whose pointers are 16-byte aligned and whose sizes are odd."""
    function = getattr(kernel, name)
    options = tile.options
    constants = {"OUT": OUT, "BM": options.pop("BM"), **constants}
    signature, attributes, values = {}, {}, {}
    for position, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            values[(position,)] = constants[argument]
        elif argument.endswith("_ptr"):
            is_wide = argument in ("weight_ptr", "partial_ptr")
            signature[argument] = "*fp32" if is_wide else "*bf16"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
    source = ASTSource(function, signature, values, attributes)
    binary = compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers = resources(binary.asm["cubin"])
    shared = binary.metadata.shared
    print(f"sm_{architecture} {name} {tile}: {registers} registers, {shared} bytes shared")
    assert registers <= options["maxnreg"]
    of_sm, of_program = SHARED[architecture]
    assert (shared / 1024 + 1) * tile.per_sm <= of_sm
    assert shared / 1024 <= of_program
    return binary.asm["ptx"]


def num_products(ptx):
    """Instructions that tensor cores run, of either architecture."""
    return len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx))


architectures = pytest.mark.parametrize("architecture", [80, 90])


@architectures
def test_forward(architecture):
    tile = kernel.TILES[architecture // 10].forward
    ptx = build("_stem_forward_kernel", architecture, tile, {})
    assert num_products(ptx)
    # The rows move up in registers: only the product's factors and y go through shared memory.
    assert "shfl" not in ptx


@architectures
def test_input_gradient(architecture):
    tile = kernel.TILES[architecture // 10].input_gradient
    assert num_products(build("_stem_input_gradient_kernel", architecture, tile, {}))


@architectures
def test_weight_gradient(architecture):
    tile = kernel.TILES[architecture // 10].weight_gradient
    constants = {"ROWS": kernel.TASK_ROWS}
    assert num_products(build("_stem_weight_gradient_kernel", architecture, tile, constants))
