"""The ladder's sections run on a CPU, write numbers that agree, and survive each other."""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import math
import runpy
import subprocess
import sys
import time

import pytest
import torch

from freeadv_fast.runs.environment import git_state
from freeadv_fast.step.averaging import WeightAverage

TINY_STEP = ["--arch", "resnet18", "--image-size", "32", "--batch-size", "2"]


@pytest.fixture
def bench(repository, monkeypatch):
    """Imports a script of bench/ as Python would run it, with its folder on the path."""
    monkeypatch.syspath_prepend(str(repository / "bench"))
    return importlib.import_module


@pytest.fixture
def run_main(bench, monkeypatch, tmp_path):
    """Runs a script in this process and returns the JSON that it writes."""

    def run(script, *flags):
        out = tmp_path / f"{script}.json"
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags, "--out", str(out)])
        bench(script).main()
        return json.loads(out.read_text())

    return run


def check_rates(result):
    """Bytes, seconds, GB/s and the share of the copy belong together, in every row."""
    copy = result["copy"]
    assert copy["gb_per_second"] * 1e9 == pytest.approx(copy["bytes"] / copy["seconds"]["median"])
    for row in result["results"]:
        assert "error" not in row
        rate = row["bytes"] / row["seconds"]["median"]
        assert row["gb_per_second"] * 1e9 == pytest.approx(rate)
        assert row["share_of_copy"] == pytest.approx(row["gb_per_second"] / copy["gb_per_second"])


def test_batch_norm_forward_and_backward_apart(run_main):
    record = run_main(
        "bench_batch_norm", "--layers", "6x16,4x8", "--batch-size", "2", "--seconds", "0.05"
    )
    assert set(record["layers"]) == {"6x16", "4x8"}
    for result in record["layers"].values():
        check_rates(result)
        assert len(result["results"]) == 3 * 2 * 2  # op, direction, provider
    (row,) = (
        row
        for row in record["layers"]["6x16"]["results"]
        if (row["op"], row["direction"], row["provider"]) == ("bn_relu", "backward", "ours")
    )
    assert row["bytes"] == 5 * 4 * (2 * 16 * 6 * 6)


def test_batch_norm_bytes_are_those_of_the_notes(bench):
    # performance.md's 1-bit masks; experiments.md section 1: bytes an element in bf16.
    expected = {"bn": (6, 10), "bn_relu": (6, 10), "bn_add_relu": (8.125, 12.125)}
    for op, (forward, backward) in expected.items():
        found = bench("bench_batch_norm").minimum_bytes(op, 1000, 2)
        assert found == {"forward": 1000 * forward, "backward": 1000 * backward}


@pytest.mark.parametrize("op", ["bn", "bn_relu", "bn_add_relu"])
def test_both_batch_norms_compute_the_same(bench, op):
    generator = torch.Generator().manual_seed(1)
    x, residual, grad = (
        torch.randn(3, 8, 5, 5, generator=generator).to(memory_format=torch.channels_last)
        for _ in range(3)
    )
    x.requires_grad_()
    read = residual.requires_grad_() if op == "bn_add_relu" else None
    torch_pair, our_pair = (
        bench("bench_batch_norm").Pair(op, provider, x, read, grad)
        for provider in ("torch", "ours")
    )
    expected, found = torch_pair.compute(), our_pair.compute()
    torch.testing.assert_close(found, expected)
    assert (expected >= 0).all() == (op != "bn")
    gradients = our_pair.gradients(found)
    assert len(gradients) == (4 if op == "bn_add_relu" else 3)
    torch.testing.assert_close(gradients, torch_pair.gradients(expected))


def test_stems_and_their_gradients(run_main):
    record = run_main("bench_stem", "--batch-size", "2", "--image-size", "8", "--seconds", "0.05")
    check_rates(record)
    rows = {(row["stem"], row["direction"]): row["bytes"] for row in record["results"]}
    kinds = {"forward", "weight_grad", "input_grad"}
    assert {stem for stem, kind in rows if kind in kinds} == {"c3", "c4", "c8", "s2d16"}
    assert len(rows) == 4 * 3 + 1
    output, kernel = 2 * 64 * 4 * 4, 64 * 16 * 4 * 4
    packed = 4 * (2 * 16 * 7 * 7 + output + kernel)
    assert rows["s2d16", "input_grad_as_forward"] == rows["s2d16", "forward"] == packed


def test_averaged_weights_beside_plain_ones(run_main, monkeypatch):
    """A candidate keeps one while it trains, and another one is nothing but an average."""
    moved, real = [], WeightAverage.update
    monkeypatch.setattr(WeightAverage, "update", lambda own: (moved.append(own), real(own)))
    flags = ["--arch", "test_resnet", "--image-size", "16", "--batch-size", "2", "--rounds", "3"]
    record = run_main("bench_average", *flags)
    assert set(record["results"]) == {"plain", "averaged", "average alone"}
    # One call before the three rounds, of either.
    assert list(collections.Counter(map(id, moved)).values()) == [4, 4]
    assert record["cpu_time_ratios"]["averaged_over_plain"]["n"] == 3
    alone = record["results"]["average alone"]["median"]
    assert record["average_gb_per_second"] * 1e9 == pytest.approx(record["average_bytes"] / alone)


def test_stem_input_gradient_as_forward_convolution(bench):
    stem = bench("bench_stem")
    generator = torch.Generator().manual_seed(2)
    draw = {"generator": generator, "dtype": torch.float64}
    x = torch.randn(2, 16, 9, 7, **draw)
    weight, grad = torch.randn(64, 16, 4, 4, **draw), torch.randn(2, 64, 6, 4, **draw)
    expected = stem.backward(grad, x, weight, 1, 0, stem.INPUT)
    found = stem.input_gradient_as_forward(grad, weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_kernel_that_does_not_build_is_recorded(bench):
    def broken():
        raise RuntimeError("out of registers")

    rows = [({"bytes": 8, "op": "bad"}, broken), ({"bytes": 8, "op": "good"}, lambda: lambda: 0)]
    bad, good = bench("bandwidth").time_rows(rows, torch.device("cpu"), 0.01)["results"]
    assert bad["error"] == "RuntimeError: out of registers"
    assert "seconds" not in bad
    assert good["seconds"]["n"] >= 3


CHILD = """
import json, os, sys
if sys.argv[-1] == "default-bf16":
    raise SystemExit("cannot be compiled")
layout = os.environ.get("TORCHINDUCTOR_FORCE_LAYOUT_OPT")
print("a compiler's warning")
print(json.dumps({"argv": sys.argv[1:], "layout": layout, "images_per_second": 20,
                  "seconds": {"median": 0.1}, "compile_seconds": 1}))
"""


def test_compile_variants_run_in_processes_of_their_own(run_main, bench, monkeypatch, tmp_path):
    bench_compile = bench("bench_compile")
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    monkeypatch.setattr(bench_compile, "__file__", str(child))
    names = "eager-bf16,default-bf16,layout-bf16"
    variants = run_main("bench_compile", "--variants", names)["variants"]
    eager, broken, layout = (variants[name] for name in names.split(","))
    assert "cannot be compiled" in broken["error"]
    assert eager["argv"][-2:] == ["--variant", "eager-bf16"]
    assert eager["argv"][:2] == ["--variants", names]
    assert (eager["layout"], layout["layout"]) == (None, "1")
    child.write_text("import time; time.sleep(60)")
    late = bench_compile.run_child("eager-bf16", [], 0.2)
    assert late["error"].startswith("status ended after 0 s")
    assert bench_compile.run_child("eager-bf16", [], 0) == {"error": "the time was up"}


def test_a_variant_of_the_natural_step(bench):
    flags = argparse.Namespace(arch="squeezenet1_1", image_size=32, batch_size=2, seconds=0.05)
    entry = bench("bench_compile").measure_variant("eager-fp32", flags)
    assert entry["images_per_second"] == pytest.approx(2 / entry["seconds"]["median"])
    assert entry["compile_seconds"] > 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_sign_ascent_kernel", "ours: _sign_ascent_kernel"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<__half, float, 512, true, 1>(...)", "batch norm"),
        ("void at::native::batch_norm_collect_statistics_channels_last_kernel<...>", "batch norm"),
        ("sm90_xmma_dgrad_implicit_gemm_f16f16_f16f32_nhwckrsc_nhwc_cudnn", "convolution"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_s1688fprop_nhwc_align4>", "convolution"),
        ("nvjet_tst_128x24_64x11_2x1_v_bz_TNT", "convolution"),
        ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false>(...)", "copies"),
        (
            "void at::native::elementwise_kernel<128, 4, "
            "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
            "copies",
        ),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        (
            "void at::native::vectorized_elementwise_kernel<4, "
            "at::native::CUDAFunctor_add<c10::BFloat16> >",
            "elementwise",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<4, "
            "at::native::launch_clamp_scalar(at::TensorIteratorBase&)>",
            "elementwise",
        ),
        ("void at::native::multi_tensor_apply_kernel<FusedSgdMathFunctor<float> >", "optimizer"),
        ("void at::native::max_pool_backward_nhwc<c10::BFloat16, float>", "pooling"),
        ("void at::native::nll_loss_forward_reduce_cuda_kernel_2d<float>", "other"),
    ],
)
def test_kernels_by_name(bench, name, kind):
    assert bench("profile_step").classify(name) == kind


def test_our_kernels_are_found(bench):
    names = bench("profile_step").our_kernels()
    assert {"_sign_ascent_kernel", "_perturb_normalize_kernel"} <= names
    assert "_divide" not in names


def test_profile_of_a_step(run_main):
    flags = ["--m", "2", "--steps", "1", "--fuse", "off", "--graphs", "off"]
    record = run_main("profile_step", *TINY_STEP, *flags)
    classes, kernels = record["classes"], record["kernels"]
    assert {"convolution", "batch norm", "elementwise", "pooling", "optimizer"} <= set(classes)
    assert math.isclose(sum(entry["share"] for entry in classes.values()), 1)
    seconds = sum(entry["seconds"] for entry in classes.values())
    assert seconds == pytest.approx(record["kernel_seconds"])
    assert seconds == pytest.approx(sum(kernel["seconds"] for kernel in kernels))
    # Forward convolutions of ResNet-18, and one backward each; four more are products.
    counts = {kernel["name"]: kernel["count"] for kernel in kernels}
    assert counts["aten::mkldnn_convolution"] == counts["aten::convolution_backward"] == 16
    update = [kernel for kernel in kernels if kernel["name"].startswith("Optimizer.step")]
    assert [kernel["class"] for kernel in update] == ["optimizer"]
    busy = 2 * record["kernel_seconds"] / record["step_seconds"]["median"]
    assert record["busy_share"] == pytest.approx(busy)


@pytest.fixture
def ladder(bench, tmp_path):
    """Runs sections of Python code and returns the record."""
    run_gpu = bench("run_gpu")
    flags = argparse.Namespace(part=1, budget=600, resume=False, out=tmp_path / "ladder.json")

    def run(codes, **changes):
        sections = [
            run_gpu.Section(name, ["-c", code], 2, writes_out="--out" in code)
            for name, code in codes.items()
        ]
        run_gpu.run_sections(sections, argparse.Namespace(**{**vars(flags), **changes}))
        return json.loads(flags.out.read_text())["sections"]

    return run


WRITE = """
import json, pathlib, sys, time  # called with --out FILE
pathlib.Path(sys.argv[-1]).write_text(json.dumps({"environment": {}, "found": 1}))
"""


def test_a_failing_section_is_recorded_and_others_go_on(ladder):
    start = time.monotonic()
    sections = ladder(
        {
            "fails": "raise SystemExit('no such kernel')",
            "hangs": f"{WRITE}time.sleep(60)",
            "writes": f"{WRITE}print('graphs: off, a reason')",
            "prints": "print('{\"answer\": 42}')",
        }
    )
    assert time.monotonic() - start < 30
    assert "no such kernel" in sections["fails"]["error"]
    assert sections["hangs"]["error"].startswith("status ended after 2 s")
    assert sections["hangs"]["found"] == 1  # what it wrote before its end
    assert sections["writes"]["found"] == 1
    assert sections["writes"]["said"] == ["graphs: off, a reason"]
    assert "error" not in sections["writes"]
    assert sections["prints"]["answer"] == 42


def test_without_time_left_sections_are_skipped(ladder):
    assert ladder({"a": "print('{}')"}, budget=1) == {"a": {"skipped": "the time was up"}}


def test_resume_keeps_what_succeeded(ladder, bench, tmp_path):
    ladder({"good": "print('{\"run\": 1}')", "bad": "raise SystemExit(1)"})
    again = {"good": "print('{\"run\": 2}')", "bad": "print('{\"run\": 2}')"}
    sections = ladder(again, resume=True)
    assert (sections["good"]["run"], sections["bad"]["run"]) == (1, 2)
    assert "error" not in sections["bad"]
    earlier = json.loads((tmp_path / "ladder.json").read_text())
    other = {**earlier["environment"], "git": {"commit": "another", "dirty": False}}
    assert bench("run_gpu").succeeded(earlier, other) == {}


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("part", [0, 1, 2, 3, 4])
def test_every_section_is_a_command_that_its_script_takes(
    bench, repository, monkeypatch, tmp_path, part, tiny
):
    run_gpu = bench("run_gpu")
    parse = argparse.ArgumentParser.parse_args
    taken = []

    def stop_after_parsing(parser):
        taken.append(parse(parser))
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after_parsing)
    flags = argparse.Namespace(data=str(tmp_path), tiny=tiny, part=part)
    sections = run_gpu.PARTS[part](flags)
    names = [section.name for section in sections]
    assert len(set(names)) == len(names)
    for section in sections:
        if section.command[:2] == ["-m", "pytest"]:
            continue
        script = repository / section.command[0]
        assert script.is_file()
        if script.parent.name == "bench":
            monkeypatch.setattr(sys, "argv", [str(script), *section.command[1:]])
            with pytest.raises(SystemExit) as stopped:
                runpy.run_path(str(script), run_name="__main__")
            assert stopped.value.code == 0, section.name
    assert taken


def test_results_are_no_change_of_a_checkout(tmp_path):
    """A second call goes on with what the first one left in bench/results."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    git("init", "--quiet")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (results / "step.json").write_text("{}")
    assert git_state(tmp_path)["dirty"] is False
    (tmp_path / "code.py").write_text("2")
    assert git_state(tmp_path)["dirty"] is True
