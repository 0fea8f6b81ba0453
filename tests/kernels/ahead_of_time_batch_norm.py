"""Compiles fused batch norm for sm_80 and sm_90 without a GPU, as ahead_of_time.py does.

`pytest -s` prints registers; the summary of `-rP` shows them too.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from freeadv_fast.kernels import batch_norm as kernel
from pairwise import every_pair

BYTES = {"bf16": 2, "fp32": 4}
REGISTERS_PER_SM = 65536
# What is not an activation.
TYPES = {
    "bits_ptr": "u8",
    **dict.fromkeys(("partial_ptr", "coefficients_ptr", "k_ptr"), "fp32"),
    **dict.fromkeys(("running_mean_ptr", "running_var_ptr", "weight_ptr", "bias_ptr"), "fp32"),
    **dict.fromkeys(("dweight_ptr", "dbias_ptr"), "fp32"),
}


def build(name, dtype, architecture, constants, *, warps=4, per_sm=None, fork=False):
    """PTX and registers of a kernel whose pointers are 16-byte aligned and whose sizes are odd."""
    constants = constants if fork else {**constants, "shortcut_dy_ptr": None}
    function = getattr(kernel, name)
    signature, attributes, values = {}, {}, {}
    for position, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            values[(position,)] = constants[argument]
        elif argument.endswith("_ptr"):
            signature[argument] = f"*{TYPES.get(argument, dtype)}"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument in ("momentum", "eps") else "i32"
    options = {"num_warps": warps}
    if per_sm is not None:
        options["maxnreg"] = kernel._max_registers(per_sm)
    source = ASTSource(function, signature, values, attributes)
    binary = compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm
    registers = resources(binary["cubin"])
    print(f"sm_{architecture} {dtype} {name} {constants}: {registers} registers")
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


def tile(channels, dtype):
    """The tile that the launcher chooses."""
    rows = kernel.Rows(1, 1, 1, channels, BYTES[dtype])
    return {"BM": rows.tile_rows, "BC": rows.columns}


def assert_wide(ptx, kind, num_wide, *, bits=False):
    """At least so many accesses of 16 bytes; no narrow ones but of columns' data and of bits."""
    found = accesses(ptx, kind)
    assert found.count(16) >= num_wide, found
    assert bits or 1 not in found
    assert 2 not in found


def assert_fits(registers, per_sm):
    """So many programs are on an SM at once; registers are given out in eights."""
    per_thread = -(-registers // 8) * 8
    assert per_thread * kernel.NUM_THREADS * per_sm <= REGISTERS_PER_SM


# 64, 32 and 128 columns: a kernel sees nothing else of the number of channels.
CASES = [("bf16", 64), ("bf16", 160), ("bf16", 2048), ("fp32", 2048)]
ARCHITECTURES = [80, 90]
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def cases(name, values):
    """Cases of layers, architectures and the values of one more argument."""
    found = [
        (*layer, architecture, value)
        for layer, architecture, value in every_pair(CASES, ARCHITECTURES, values)
    ]
    return pytest.mark.parametrize(("dtype", "channels", "architecture", name), found, ids=str)


def test_one_tile_serves_all_wide_layers():
    assert tile(256, "bf16") == tile(512, "bf16") == tile(2048, "bf16") == {"BM": 16, "BC": 128}


@architectures
@pytest.mark.parametrize(("dtype", "channels"), CASES)
def test_stats(dtype, channels, architecture):
    per_sm = kernel.STATS_PER_SM
    ptx, registers = build(
        "_stats_kernel", dtype, architecture, tile(channels, dtype), per_sm=per_sm
    )
    assert_wide(ptx, "ld", 4)
    assert_fits(registers, per_sm)


@cases("residual", [False, True])
def test_forward(dtype, channels, residual, architecture):
    switches = {"HAS_RESIDUAL": residual, "RELU": True, "SLOPE": 0.0, "WRITE_BITS": residual}
    constants = {**tile(channels, dtype), **switches, "TILES": kernel.TILES}
    ptx, registers = build("_forward_kernel", dtype, architecture, constants)
    assert_wide(ptx, "ld", 2 * kernel.TILES * (1 + residual))
    assert_wide(ptx, "st", 2 * kernel.TILES, bits=residual)
    # A multiply-add is one instruction in both directions, else masks would differ.
    assert "fma.rn.f32" in ptx
    assert_fits(registers, 6)


@cases("mask", [kernel.NO_MASK, kernel.RECOMPUTED, kernel.BITS])
def test_backward_reduce(dtype, channels, mask, architecture):
    per_sm = kernel.REDUCE_PER_SM
    constants = {**tile(channels, dtype), "MASK": mask, "SLOPE": 0.0}
    ptx, registers = build("_backward_reduce_kernel", dtype, architecture, constants, per_sm=per_sm)
    assert_wide(ptx, "ld", 8, bits=mask == kernel.BITS)
    assert_wide(ptx, "st", 2 * (mask == kernel.BITS))
    assert_fits(registers, per_sm)


@cases("slope", [0.0, 0.1])
def test_backward_reduce_of_two_gradients(dtype, channels, slope, architecture):
    per_sm = kernel.REDUCE_PER_SM
    constants = {**tile(channels, dtype), "MASK": kernel.BITS, "SLOPE": slope}
    ptx, registers = build(
        "_backward_reduce_kernel", dtype, architecture, constants, per_sm=per_sm, fork=True
    )
    assert_wide(ptx, "ld", 12, bits=True)
    assert_wide(ptx, "st", 2, bits=True)
    assert_fits(registers, per_sm)


@cases("mode", [(True, kernel.NO_MASK), (True, kernel.RECOMPUTED), (False, kernel.RECOMPUTED)])
def test_backward(dtype, channels, mode, architecture):
    training, mask = mode
    switches = {"TRAINING": training, "MASK": mask, "SLOPE": 0.0, "WRITE_DZ": False}
    constants = {**tile(channels, dtype), **switches, "TILES": kernel.TILES}
    ptx, registers = build("_backward_kernel", dtype, architecture, constants)
    assert_wide(ptx, "ld", 4 * kernel.TILES)
    assert_wide(ptx, "st", 2 * kernel.TILES)
    assert_fits(registers, 5)


@architectures
def test_backward_of_eval_mode_with_bits(architecture):
    switches = {"TRAINING": False, "MASK": kernel.BITS, "SLOPE": 0.0, "WRITE_DZ": True}
    constants = {**tile(256, "bf16"), **switches, "TILES": kernel.TILES}
    ptx, _ = build("_backward_kernel", "bf16", architecture, constants)
    assert_wide(ptx, "st", 4 * kernel.TILES)


@cases("residual", [False, True])
def test_leaky_relu(dtype, channels, residual, architecture):
    mask = kernel.BITS if residual else kernel.RECOMPUTED
    common = {**tile(channels, dtype), "SLOPE": 0.1}
    forward = {"HAS_RESIDUAL": residual, "RELU": True, "WRITE_BITS": residual}
    backward = {"TRAINING": not residual, "MASK": mask, "WRITE_DZ": residual}
    tiles = {"TILES": kernel.TILES}
    for name, switches, programs, options in (
        ("_forward_kernel", forward | tiles, 5 if residual else 6, {}),
        ("_backward_reduce_kernel", {"MASK": mask}, 4, {"per_sm": kernel.REDUCE_PER_SM}),
        ("_backward_kernel", backward | tiles, 5, {}),
    ):
        ptx, registers = build(name, dtype, architecture, common | switches, **options)
        assert "0f3DCCCCCD" in ptx  # 0.1 in float32
        assert "f64" not in ptx
        assert_fits(registers, programs)


@architectures
@pytest.mark.parametrize("rows", kernel.MERGE_ROWS)
def test_merges(rows, architecture):
    block = {"BP": rows, "BC": kernel.MERGE_COLUMNS}
    switches = {"HAS_WEIGHT": True, "HAS_BIAS": True, "HAS_RUNNING": True}
    warps = kernel.MERGE_WARPS
    build("_merge_stats_kernel", "fp32", architecture, {**block, **switches}, warps=warps)
    build("_merge_sums_kernel", "fp32", architecture, {**block, "TRAINING": True}, warps=warps)


@architectures
def test_running_coefficients(architecture):
    switches = {"HAS_WEIGHT": True, "HAS_BIAS": True, "BLOCK": kernel.NUM_THREADS}
    build("_running_coefficients_kernel", "fp32", architecture, switches)
