"""Compiles fused batch norm for sm_80 and sm_90 without a GPU, as ahead_of_time.py does.

`pytest -s` prints registers; the summary of `-rP` shows them too.
"""

from __future__ import annotations

import re

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from cubin import accesses, resources
from freeadv_fast.kernels import batch_norm_backward as backward
from freeadv_fast.kernels import batch_norm_forward as forward
from freeadv_fast.kernels import batch_norm_statistics as statistics
from freeadv_fast.kernels import block_sum
from freeadv_fast.kernels import joined_norms as joined
from pairwise import every_pair

BYTES = {"bf16": 2, "fp32": 4}
REGISTERS_PER_SM = 65536
VECTORS = ("weight", "bias", "running_mean", "running_var", "moments", "dweight", "dbias")
# Of a forward kernel that is told its input's moments.
OF_MOMENTS = (*VECTORS[:5], "num_batches")
# What is not an activation.
TYPES = {
    "bits_ptr": "u8",
    "counters_ptr": "i32",
    "num_batches_ptr": "i64",
    "partial_ptr": "fp32",
    **dict.fromkeys((f"{name}_ptr" for name in (*VECTORS, "coefficients", "k")), "fp32"),
}


def build(function, dtype, architecture, constants, *, fork=False, shared=False, moments=False):
    """PTX and registers of a kernel whose pointers are 16-byte aligned and whose sizes are odd."""
    options = {name: constants[name] for name in ("num_warps", "maxnreg") if name in constants}
    constants = {name: value for name, value in constants.items() if name not in options}
    given = {"shortcut_dy_ptr": fork, "other_dx_ptr": shared}
    if function is forward._batch_norm_forward_kernel:
        given |= {f"{name}_ptr": moments for name in OF_MOMENTS}
    constants |= {name: None for name, is_given in given.items() if not is_given}
    signature, attributes, values = {}, {}, {}
    for position, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            values[(position,)] = constants[argument]
        elif argument.endswith("_ptr"):
            signature[argument] = f"*{TYPES.get(argument.removeprefix('shortcut_'), dtype)}"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument in ("momentum", "eps") else "i32"
    source = ASTSource(function, signature, values, attributes)
    binary = compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm
    registers = resources(binary["cubin"])
    print(f"sm_{architecture} {dtype} {function.__name__} {constants}: {registers} registers")
    return binary["ptx"], registers


def rows(channels, dtype):
    """Activations of one row."""
    return statistics.Rows(1, 1, 1, channels, BYTES[dtype])


def elementwise(channels, dtype, accesses=forward.ACCESSES):
    """What the launcher chooses."""
    return forward.elementwise(rows(channels, dtype), accesses)[1]


def assert_wide(ptx, kind, num_wide, *, bits=False):
    """At least so many accesses of 16 bytes; no narrow ones but of columns' data and of bits."""
    found = accesses(ptx, kind)
    assert found.count(16) >= num_wide, found
    assert bits or 1 not in found
    assert 2 not in found


def assert_leaky(ptx):
    """A slope of 0.1 in float32."""
    assert "0f3DCCCCCD" in ptx
    assert "f64" not in ptx


def assert_fits(registers, programs, num_warps=forward.NUM_WARPS):
    """So many programs are on an SM at once; registers are given out in eights."""
    per_thread = -(-registers // 8) * 8
    assert per_thread * num_warps * 32 * programs <= REGISTERS_PER_SM


def assert_scheduled(ptx, registers, schedule, inputs):
    """All tiles of each input are under way, and those programs fit that shall run at once."""
    assert accesses(ptx, "ld").count(16) >= inputs * (schedule.depth + 1)
    assert_fits(registers, schedule.per_sm, schedule.num_warps)


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
    wide = elementwise(2048, "bf16")
    assert elementwise(256, "bf16") == elementwise(512, "bf16") == wide
    assert (wide["BM"], wide["BC"]) == (16, 128)


# The widest, which takes the most registers, on both; the others on one each.
FEW_CASES = [("bf16", 64, 80), ("bf16", 160, 90), ("fp32", 2048, 80)]
FEW_CASES += [("bf16", 2048, architecture) for architecture in ARCHITECTURES]
few_cases = pytest.mark.parametrize(("dtype", "channels", "architecture"), FEW_CASES)


@few_cases
def test_stats(dtype, channels, architecture):
    schedule = statistics.STATISTICS
    constants = schedule.options(rows(channels, dtype).tiled(schedule))
    ptx, registers = build(statistics._stats_kernel, dtype, architecture, constants)
    assert_scheduled(ptx, registers, schedule, 1)
    # The last program is found by one addition, before and after which all threads wait.
    before, after = re.split(r"atom\.global\.gpu\.acq_rel\.add\.u32", ptx)
    assert "bar.sync" in before.rsplit("st.global", 1)[1]
    assert "bar.sync" in after.split("ld.global", 1)[0]


@cases("residual", [False, True])
def test_forward(dtype, channels, residual, architecture):
    switches = {"HAS_RESIDUAL": residual, "RELU": True, "SLOPE": 0.0, "WRITE_BITS": residual}
    constants = elementwise(channels, dtype) | switches
    ptx, registers = build(forward._batch_norm_forward_kernel, dtype, architecture, constants)
    assert_wide(ptx, "ld", 2 * forward.TILES * (1 + residual))
    assert_wide(ptx, "st", 2 * forward.TILES, bits=residual)
    # A multiply-add is one instruction in both directions, else masks would differ.
    assert "fma.rn.f32" in ptx
    assert_fits(registers, 6)


@few_cases
def test_block_sum(dtype, channels, architecture):
    constants = block_sum.SUM.options(rows(channels, dtype).tiled(block_sum.SUM))
    ptx, registers = build(block_sum._block_sum_kernel, dtype, architecture, constants)
    assert_scheduled(ptx, registers, block_sum.SUM, 2)
    assert_wide(ptx, "st", block_sum.SUM.turn)


@few_cases
def test_forward_of_moments(dtype, channels, architecture):
    switches = {"HAS_RESIDUAL": False, "RELU": True, "SLOPE": 0.0, "WRITE_BITS": False}
    constants = elementwise(channels, dtype) | switches
    ptx, registers = build(
        forward._batch_norm_forward_kernel, dtype, architecture, constants, moments=True
    )
    assert_wide(ptx, "ld", 2 * forward.TILES)
    assert_fits(registers, 6)


def reduction(channels, dtype, mask, slope=0.0):
    """What the launcher chooses."""
    switches = {"TRAINING": True, "MASK": mask, "SLOPE": slope}
    return backward.REDUCTION.options(rows(channels, dtype).tiled(backward.REDUCTION)) | switches


@pytest.mark.parametrize(
    ("dtype", "channels", "architecture", "mask"),
    [
        *[("bf16", 2048, 90, mask) for mask in (forward.NO_MASK, forward.RECOMPUTED, forward.BITS)],
        *[("bf16", 2048, 80, mask) for mask in (forward.RECOMPUTED, forward.BITS)],
        ("bf16", 64, 90, forward.RECOMPUTED),
        ("bf16", 160, 80, forward.BITS),
        ("fp32", 2048, 90, forward.NO_MASK),
    ],
)
def test_backward_reduce(dtype, channels, architecture, mask):
    constants = reduction(channels, dtype, mask)
    ptx, registers = build(backward._batch_norm_reduce_kernel, dtype, architecture, constants)
    assert_scheduled(ptx, registers, backward.REDUCTION, 2)
    assert_wide(ptx, "st", mask == forward.BITS)


@few_cases
def test_backward_reduce_of_two_gradients(dtype, channels, architecture):
    slope = 0.0 if channels == 2048 else 0.1
    constants = reduction(channels, dtype, forward.BITS, slope)
    ptx, registers = build(
        backward._batch_norm_reduce_kernel, dtype, architecture, constants, fork=True
    )
    assert_scheduled(ptx, registers, backward.REDUCTION, 3)
    assert_wide(ptx, "st", 1)
    if slope:
        assert_leaky(ptx)


@cases("mode", [(True, forward.NO_MASK), (True, forward.RECOMPUTED), (False, forward.RECOMPUTED)])
def test_backward(dtype, channels, mode, architecture):
    training, mask = mode
    switches = {"TRAINING": training, "MASK": mask, "SLOPE": 0.0, "WRITE_DZ": False}
    constants = elementwise(channels, dtype) | switches
    ptx, registers = build(backward._batch_norm_backward_kernel, dtype, architecture, constants)
    assert_wide(ptx, "ld", 4 * forward.TILES)
    assert_wide(ptx, "st", 2 * forward.TILES)
    assert_fits(registers, 5)


@pytest.mark.parametrize(
    ("dtype", "channels", "architecture", "reader"),
    [
        *[("bf16", 2048, architecture, "shared") for architecture in ARCHITECTURES],
        ("bf16", 64, 90, "shared"),
        ("fp32", 2048, 80, "shared"),
        ("bf16", 2048, 90, "fork"),
        ("bf16", 160, 80, "fork"),
    ],
)
def test_backward_of_two_gradients(dtype, channels, architecture, reader):
    slope = 0.0 if channels == 2048 else 0.1
    switches = {"TRAINING": True, "MASK": forward.RECOMPUTED, "SLOPE": slope, "WRITE_DZ": False}
    constants = elementwise(channels, dtype) | switches
    ptx, registers = build(
        backward._batch_norm_backward_kernel, dtype, architecture, constants, **{reader: True}
    )
    assert_wide(ptx, "ld", 6 * forward.TILES)
    assert_wide(ptx, "st", 2 * forward.TILES)
    assert_fits(registers, 5 if reader == "shared" else 4)
    if slope:
        assert_leaky(ptx)


@architectures
@pytest.mark.parametrize("fork", [False, True])
def test_backward_of_eval_mode_with_bits(architecture, fork):
    switches = {"TRAINING": False, "MASK": forward.BITS, "SLOPE": 0.0, "WRITE_DZ": True}
    constants = elementwise(256, "bf16") | switches
    ptx, registers = build(
        backward._batch_norm_backward_kernel, "bf16", architecture, constants, fork=fork
    )
    assert_wide(ptx, "st", 4 * forward.TILES)
    assert_fits(registers, 5)


@cases("residual", [False, True])
def test_leaky_relu(dtype, channels, residual, architecture):
    mask = forward.BITS if residual else forward.RECOMPUTED
    common = elementwise(channels, dtype) | {"SLOPE": 0.1}
    there = {"HAS_RESIDUAL": residual, "RELU": True, "WRITE_BITS": residual}
    back = {"TRAINING": not residual, "MASK": mask, "WRITE_DZ": residual}
    for function, constants, programs in (
        (forward._batch_norm_forward_kernel, common | there, 5 if residual else 6),
        (backward._batch_norm_backward_kernel, common | back, 5),
    ):
        ptx, registers = build(function, dtype, architecture, constants)
        assert_leaky(ptx)
        assert_fits(registers, programs)


@pytest.mark.parametrize(("dtype", "channels", "architecture"), FEW_CASES[1:])
def test_joined_norms(dtype, channels, architecture):
    schedule, fork = joined.REDUCTION, channels != 160
    constants = schedule.options(rows(channels, dtype).tiled(schedule))
    ptx, registers = build(
        joined._joined_norms_reduce_kernel, dtype, architecture, constants, fork=fork
    )
    assert_scheduled(ptx, registers, schedule, 3 + fork)
    constants = elementwise(channels, dtype, accesses=1)
    ptx, registers = build(
        joined._joined_norms_backward_kernel, dtype, architecture, constants, fork=fork
    )
    assert_wide(ptx, "ld", (3 + fork) * forward.TILES)
    assert_wide(ptx, "st", 2 * forward.TILES)
    assert_fits(registers, 4)
    constants = elementwise(channels, dtype)
    ptx, registers = build(joined._joined_norms_forward_kernel, dtype, architecture, constants)
    assert_wide(ptx, "ld", 4 * forward.TILES)
    assert_wide(ptx, "st", 2 * forward.TILES)
    assert_fits(registers, 6)


@architectures
def test_running_coefficients(architecture):
    build(statistics._running_coefficients_kernel, "fp32", architecture, {"BLOCK": 128})
