"""Compiles batch norm with ReLU and pooling for sm_80 and sm_90, as ahead_of_time.py does."""

from __future__ import annotations

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from cubin import accesses, resources
from freeadv_fast.kernels import norm_pool as kernel

BYTES = {"bf16": 2, "fp32": 4}
TYPES = {"tap_ptr": "u8", "coefficients_ptr": "fp32", "k_ptr": "fp32"}
CHANNELS = 64


def build(name, tile, dtype, sides, architecture, *, fork=False, **switches):
    """PTX and registers of a kernel as the launcher compiles it."""
    function = getattr(kernel, name)
    switches = switches if fork else {**switches, "shortcut_dy_ptr": None}
    constants = {
        **dict(zip(("HEIGHT", "WIDTH"), sides, strict=True)),
        **{"C": CHANNELS, "BC": CHANNELS, "BM": tile.size // BYTES[dtype] // CHANNELS},
        **{"STRIP": tile.strip, "CLOSED": kernel.CLOSED, **switches},
    }
    signature, attributes, values = {}, {}, {}
    for position, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            values[(position,)] = constants[argument]
        elif argument.endswith("_ptr"):
            signature[argument] = f"*{TYPES.get(argument, dtype)}"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
    source = ASTSource(function, signature, values, attributes)
    target, options = GPUTarget("cuda", architecture, 32), {"num_warps": tile.warps}
    binary = compile(source, target=target, options=options).asm
    registers = resources(binary["cubin"])
    print(f"sm_{architecture} {dtype} {name} {switches}: {registers} registers")
    return binary["ptx"], registers


CASES = pytest.mark.parametrize(
    ("dtype", "sides", "architecture", "training"),
    [
        ("bf16", (112, 112), 80, True),
        ("bf16", (112, 112), 90, True),
        ("fp32", (113, 111), 90, False),
    ],
)


@CASES
def test_forward(dtype, sides, architecture, training):
    """Three rows of three taps, of which a row is loaded before the loop; at least 5 programs."""
    switches = {"KEEPS": training, "LAST_NAN": not training}
    ptx, registers = build(
        "_norm_pool_forward_kernel", kernel.FORWARD, dtype, sides, architecture, **switches
    )
    assert accesses(ptx, "ld").count(16) >= 9
    assert sorted(accesses(ptx, "st")) == ([8, 16, 16] if training else [16])
    assert "bar.sync" not in ptx  # all tensors lie among the threads in one way
    assert registers <= 96


@CASES
def test_backward(dtype, sides, architecture, training):
    """Four windows and their taps, four pixels read in training; at least 4 programs."""
    assert_backward(dtype, sides, architecture, training, fork=False, registers_at_most=128)


def test_backward_of_two_gradients():
    """At least 3 programs, which have more bytes under way than 4 with one gradient."""
    assert_backward("bf16", (112, 112), 90, True, fork=True, registers_at_most=168)


def assert_backward(dtype, sides, architecture, training, *, fork, registers_at_most):
    """What the kernel loads and stores, and how many of it fit on an SM."""
    ptx, registers = build(
        "_norm_pool_backward_kernel",
        kernel.BACKWARD,
        dtype,
        sides,
        architecture,
        fork=fork,
        TRAINING=training,
    )
    assert accesses(ptx, "ld").count(16) >= 4 + 4 * fork + 4 * training
    assert accesses(ptx, "ld").count(16 // BYTES[dtype]) >= 4
    assert accesses(ptx, "st") == [16] * 4
    assert "bar.sync" not in ptx
    assert registers <= registers_at_most
