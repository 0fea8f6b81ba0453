"""Compiles convolutions and their norms for sm_80 and sm_90, as ahead_of_time.py does.

`pytest -s` prints registers; the summary of `-rP` shows them too.
"""

from __future__ import annotations

import re

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from cubin import resources
from freeadv_fast.kernels import product_moments
from freeadv_fast.kernels import product_norm as kernel

# Shared memory in KiB: of an SM, of which each program costs 1 more than it asks for, and what any
# GPU of this major capability grants a program (sm_86 the least).
SHARED = {80: (164, 99), 90: (228, 227)}
HALVES = ("x_ptr", "w_ptr", "dw_ptr", "scaled_ptr", "square_ptr", "dz_ptr", "dy_ptr", "dx_ptr")
HALVES += ("z_ptr", "shortcut_ptr", "projection_ptr", "shortcut_dy_ptr")
OTHERS = {"bits_ptr": "*u8", "num_batches_ptr": "*i64", "counter_ptr": "*i32"}
OTHERS |= {"momentum": "fp32", "eps": "fp32"}
# Each tile of the card that was measured, and the largest and the smallest of the other.
CASES = [(90, 64), (90, 128), (90, 256), (80, 64), (80, 256)]
cases = pytest.mark.parametrize(("architecture", "narrow"), CASES)


def build(name, architecture, constants, per_sm=1, **options):
    """PTX of a kernel whose pointers are 16-byte aligned and whose sizes are odd; no spills."""
    function = getattr(kernel, name, None) or getattr(product_moments, name)
    signature, attributes, values = {}, {}, {}
    for position, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            values[(position,)] = constants[argument]
        elif argument in OTHERS:
            signature[argument] = OTHERS[argument]
        elif argument.endswith("_ptr"):
            signature[argument] = "*bf16" if argument in HALVES else "*fp32"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
    source = ASTSource(function, signature, values, attributes)
    binary = compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers = resources(binary.asm["cubin"])
    shared = binary.metadata.shared
    print(f"sm_{architecture} {name} {constants}: {registers} registers, {shared} bytes shared")
    of_sm, of_program = SHARED[architecture]
    assert (shared / 1024 + 1) * per_sm <= of_sm
    assert shared / 1024 <= of_program
    return binary.asm["ptx"]


def num_products(ptx):
    """Instructions that tensor cores run, of either architecture."""
    return len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx))


@cases
def test_products_of_activations(architecture, narrow):
    generation = architecture // 10
    moments = product_moments.TILES[generation][narrow]
    input_gradient = kernel.INPUT_GRADIENT[generation][narrow]
    constants = {"K": narrow, "BK": moments.columns, "PAIRS": narrow // moments.columns * 2 - 1}
    options = moments.options
    constants["BM"] = options.pop("BM")
    assert num_products(
        build("_moments_kernel", architecture, constants, moments.per_sm, **options)
    )
    options = input_gradient.options
    constants = {"N": 4 * narrow, "K": narrow, "BD": kernel.DEPTH}
    constants["BC"] = input_gradient.columns
    constants["BM"] = options.pop("BM")
    assert num_products(build("_input_gradient_kernel", architecture, constants, **options))


@pytest.mark.parametrize(
    ("architecture", "narrow", "projection"),
    [(*case, {"projection_ptr": None}) for case in CASES] + [(90, 64, {}), (80, 64, {})],
)
def test_forward(architecture, narrow, projection):
    tile = kernel.FORWARD[architecture // 10][narrow]
    options = tile.options
    constants = {"N": 4 * narrow, "K": narrow, "L": narrow, "BM": options.pop("BM")}
    constants |= {"BN": tile.columns, "BD": kernel.DEPTH, "BL": kernel.DEPTH}
    assert num_products(build("_forward_kernel", architecture, constants | projection, **options))


@pytest.mark.parametrize(("architecture", "narrow"), [CASES[0], CASES[2], CASES[4]])
def test_small_kernels(architecture, narrow):
    warps = max(4, narrow // 32)
    channels = {"K": narrow, "BN": kernel.CHANNELS}
    build("_coefficients_kernel", architecture, channels | {"BK": 32}, num_warps=warps)
    build("_weights_kernel", architecture, channels | {"BP": kernel.ADDED}, num_warps=warps)
    build("_square_kernel", architecture, channels | {"BT": 32})
    columns = product_moments.TILES[architecture // 10][narrow].columns
    constants = {"K": narrow, "BK": columns, "PAIRS": narrow // columns * 2 - 1}
    build("_merge_kernel", architecture, constants | {"BP": kernel.ADDED, "BN": 32})


@pytest.mark.parametrize(
    ("architecture", "shortcut"), [(90, {}), (90, {"shortcut_dy_ptr": None}), (80, {})]
)
def test_rectify(architecture, shortcut):
    schedule = kernel.RECTIFY
    rows = schedule.num_warps * 32 * 8 // schedule.columns
    constants = {"BM": rows, "BC": schedule.columns, "DEPTH": schedule.depth}
    options = {"num_warps": schedule.num_warps, "maxnreg": schedule.max_registers}
    build("_rectify_kernel", architecture, constants | shortcut, schedule.per_sm, **options)
