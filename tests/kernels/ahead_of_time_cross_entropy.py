"""Compiles cross-entropy's kernels for sm_80 and sm_90, as ahead_of_time.py does."""

from __future__ import annotations

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from cubin import resources
from freeadv_fast.kernels import cross_entropy as kernel

TYPES = {"labels_ptr": "*i64", "sums_ptr": "*fp64", "num_images": "i32", "classes": "i32"}


@pytest.mark.parametrize(
    ("name", "block", "architecture"),
    [
        ("_losses_kernel", {"SMOOTHING": 0.0, "BLOCK": 1024, "num_warps": 2}, 90),
        ("_losses_kernel", kernel._constants(kernel.MOST_CLASSES, 0.1), 80),
        ("_gradient_kernel", kernel._constants(kernel.MOST_CLASSES, 0.1), 90),
        ("_count_kernel", {"BLOCK": kernel.MOST_IMAGES, "num_warps": 4}, 90),
    ],
)
def test_compiles_without_local_memory(name, block, architecture):
    function = getattr(kernel, name)
    names = function.arg_names
    constants = {(place,): block[n] for place, n in enumerate(names) if n in block}
    signature = {n: "constexpr" if n in block else TYPES.get(n, "*fp32") for n in names}
    attributes = {
        (place,): [["tt.divisibility", 16]] for place, n in enumerate(names) if n.endswith("_ptr")
    }
    source = ASTSource(function, signature, constants, attributes)
    options = {"num_warps": block["num_warps"]}
    binary = compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm
    registers = resources(binary["cubin"])
    print(f"sm_{architecture} {name} {block}: {registers} registers")
    assert registers <= 168
