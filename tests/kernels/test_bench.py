"""The benchmark scripts run and write what bench/README.md says; speed is not tested."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from freeadv_fast.config.run import TrainConfig


def run_script(repository, *arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(repository / "bench" / arguments[0]), *map(str, arguments[1:])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture
def bench(repository, monkeypatch):
    """Imports a script of bench/ by name."""
    monkeypatch.syspath_prepend(repository / "bench")
    return importlib.import_module


@pytest.fixture
def run_main(bench, monkeypatch):
    """Runs a script's main in this process."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        bench(name).main()

    return run


@pytest.mark.slow
def test_a_section_of_the_ladder_runs_on_a_cpu(repository, tmp_path):
    out = tmp_path / "results" / "ladder.json"
    done = run_script(
        repository, "run_gpu.py", "--tiny", "--only", "preact_resnet18_32_without", "--out", out
    )
    assert done.returncode == 0, done.stderr
    (step,) = json.loads(out.read_text())["sections"].values()
    without = {f"free without {path}" for path in ("block-sums", "two-readers")}
    assert set(step["results"]) == {"free"} | without
    assert step["time_ratios"]["free without block-sums_over_free"]["n"] == 3
    assert "preact_resnet18_32_without, passes/s: free " in done.stdout
    command = json.loads(out.read_text())["environment"]["command"]
    assert command.startswith("python bench/run_gpu.py --tiny")


def test_peak_memory_of_a_process_of_its_own(repository):
    flags = "--arch resnet18 --image-size 32 --batch-size 2 --m 2 --memory-of free".split()
    done = run_script(repository, "bench_step.py", *flags)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout.splitlines()[-1])
    assert "VmHWM" in peak["kind"]
    # resnet18's weights, gradients and momentum are 3 x 43 MiB.
    assert 100 < peak["peak_mib"] < 1000


STEP = "--arch resnet18 --image-size 32 --batch-size 2 --m 2 --rounds 3".split()


def test_step_records_floors_competitors_and_what_fails(run_main, tmp_path):
    out = tmp_path / "step.json"
    flags = ["--no-memory", "--fuse", "off", "--graphs", "off", "--optimizer", "sgd-foreach"]
    flags += ["--copy-gb-per-second", "10", "--tflops", "0.1"]
    names = "natural,free,plain,eager,fast-advprop,nonsense"
    run_main("bench_step", *STEP, *flags, "--methods", names, "--out", out)
    record = json.loads(out.read_text())
    assert set(record["results"]) == {"natural", "free", "plain", "eager"}
    # Two images are too few for two shares.
    assert set(record["errors"]) == {"fast-advprop", "nonsense"}
    assert record["errors"]["nonsense"].startswith("ValueError: no such method")
    assert {"free_over_natural", "eager_over_natural", "eager_over_free", "plain_over_free"} < set(
        record["time_ratios"]
    )
    switches = {name: record["settings"][name] for name in ("fuse", "graphs", "optimizer")}
    assert switches == {"fuse": "off", "graphs": "off", "optimizer": "sgd-foreach"}
    floors = record["floors"]
    for name, kind in (("eager", "weights_only"), ("free", "with_image_gradient")):
        row = record["results"][name]
        share = row["image_passes_per_second"] * floors[kind]["flops"] / 0.1e12
        assert row["share_of_floors"]["flops"] == pytest.approx(share)
        share = row["image_passes_per_second"] * floors[kind]["bytes"]["B2"] / 10e9
        assert row["share_of_floors"]["B2"] == pytest.approx(share)


def test_step_of_detectors_beside_torchvisions_own(run_main, tmp_path):
    """A first update of the same network, here and there; no classifier's competitor runs."""
    out = tmp_path / "step.json"
    step = "--arch retinanet_resnet10_fpn_64 --image-size 32 --batch-size 10 --m 1 --rounds 1"
    names = "natural,eager,plain"
    run_main("bench_step", *step.split(), "--no-memory", "--methods", names, "--out", out)
    record = json.loads(out.read_text())
    assert set(record["results"]) == {"natural", "eager"}
    assert set(record["errors"]) == {"plain"}
    assert record["errors"]["plain"].endswith("the competitor of detectors is eager")
    assert "eager_over_natural" in record["time_ratios"]
    assert record["floors"] is None


def test_a_detectors_minibatch_is_the_same_to_torchvision(bench):
    """Padding is cut off, pixels are in [0, 1], boxes lie inside and belong to their classes."""
    step = bench("detection_step")
    config = TrainConfig(
        arch="retinanet_resnet10_fpn_64", image_size=40, batch_size=2, **step.FIELDS
    )
    images, targets = step.random_minibatch(config, torch.device("cpu"))
    assert images.shape == (2, 64, 64, 3)
    assert not images[:, 40:].any()
    assert not images[:, :, 53:].any()
    for image, own, pixels in zip(*step.as_torchvision(images, targets), images, strict=True):
        assert torch.equal((image * 255).round().byte(), pixels[:40, :53].permute(2, 0, 1))
        assert own["boxes"].shape == (7, 4)
        assert (own["boxes"][:, 2:] > own["boxes"][:, :2]).all()
        assert (own["boxes"] <= torch.tensor([53.0, 40.0] * 2)).all()
        assert own["labels"].max() < 80


def test_switches_reach_the_trainer(run_main, tmp_path, monkeypatch, bench):
    built = []
    step = bench("bench_step")
    monkeypatch.setattr(
        step, "provider", lambda name, config, device: built.append(config) or (lambda: None)
    )
    flags = ["--fuse", "on", "--graphs", "off", "--optimizer", "sgd-foreach", "--no-memory"]
    run_main("bench_step", *STEP, *flags, "--methods", "natural")
    assert (built[0].fuse, built[0].graphs, built[0].optimizer) == ("on", "off", "sgd-foreach")


def test_step_without_any_result_fails(run_main, bench, monkeypatch, tmp_path):
    out = tmp_path / "step.json"

    def in_child(arguments):
        name = arguments[-1]
        if name == "free":
            raise RuntimeError("out of memory")
        return {"peak_mib": 1.0, "kind": "counted"}

    monkeypatch.setattr(bench("harness"), "in_child", in_child)
    with pytest.raises(SystemExit) as stop:
        run_main("bench_step", *STEP, "--methods", "free,nonsense", "--out", out)
    assert stop.value.code == 1
    record = json.loads(out.read_text())
    assert record["memory"] == {"kind": "counted", "nonsense_peak_mib": 1.0}
    assert record["errors"]["free"] == "out of memory"
    assert "no such method" in record["errors"]["nonsense"]


def test_ceilings_of_a_copy_and_a_product(bench):
    found = bench("bench_step").measure_ceilings(
        torch.device("cpu"), torch.float32, num_bytes=1 << 16, side=32
    )
    seconds = {name: entry["median"] for name, entry in found["seconds"].items()}
    assert found["per_second"]["bytes"] * seconds["copy"] == pytest.approx(2 << 16)
    assert found["per_second"]["flops"] * seconds["product"] == pytest.approx(2 * 32**3)


# performance.md, sections 2a and 2b: GF forward, with backward, with the image's gradient; MB of
# the plans A, B and B2.
NOTES = {
    "resnet50": (8.18, 24.30, 24.53, 472, 387, 344),
    "resnet101": (15.60, 46.57, 46.81, 707, 578, None),
    "resnet152": (23.03, 68.85, 69.08, 998, 814, None),
}


@pytest.mark.parametrize("arch", NOTES)
def test_floors_are_those_of_the_notes(bench, arch):
    floors = bench("floors").Floors.of_arch(arch, 224)
    found = [
        floors.forward_flops / 1e9,
        floors.flops(image_gradient=False) / 1e9,
        floors.flops(image_gradient=True) / 1e9,
        *(floors.bytes(plan, image_gradient=True) / 1e6 for plan in ("A", "B", "B2")),
    ]
    for value, expected in zip(found, NOTES[arch], strict=True):
        assert expected is None or value == pytest.approx(expected, rel=0.01)
    assert floors.unaccounted == ()


def test_bounds_are_those_of_the_notes(bench):
    floors = bench("floors").Floors.of_arch("resnet50", 224)
    bounds = floors.bounds(bytes_per_second=4.3e12, flops_per_second=790e12, image_gradient=True)
    expected = {"flops": 32_200, "A": 9_110, "B": 11_110, "B2": 12_500}  # section 2c, H200
    assert bounds == pytest.approx(expected, rel=0.01)
    without = floors.bounds(bytes_per_second=4.3e12, flops_per_second=790e12, image_gradient=False)
    # The stem's output read, the image's gradient written.
    extra = 2 * (64 * 112**2 + 3 * 224**2)
    assert 4.3e12 / bounds["A"] - 4.3e12 / without["A"] == pytest.approx(extra)


class OneBlock(nn.Module):
    """A strided 1x1 stem, a block with a residual, a block of pre-activation, a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1, stride=2, bias=False)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.linear = nn.Linear(4, 5)

    def forward(self, images):
        x = F.relu(self.norms[0](self.stem(images)), inplace=True)
        x = F.relu(self.norms[1](self.conv1(x)) + x)
        x = x + self.conv2(F.leaky_relu(self.norms[2](x), 0.1))
        return self.linear(x.mean(dim=(2, 3)))


def test_floors_by_hand(bench):
    net = OneBlock()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    floors = bench("floors").Floors.of(net, 16)
    num = 4 * 8 * 8  # elements behind the stem; the image has three times as many
    products = 8 * 8 * 4 * 3, 2 * num * 4 * 9, 4 * 5
    assert floors.forward_flops == 2 * sum(products)
    assert floors.image_gradient_flops == 2 * products[0]
    assert floors.backward_flops == 2 * (2 * sum(products) - products[0])
    # The stem reads a quarter of the image.
    forward = 3 * num / 4 + num + 2 * 2 * num + 4 + 5
    common = {
        "conv forward": forward,
        "conv weight gradients": forward,
        "conv input gradients": 2 * 2 * num + 4 + 5,
        "pool and pad": 2 * (num + 4),
    }
    # Three norms, three ReLUs, two additions; two tensors with two readers.
    norms = {
        "A": (3 * 3 + 3 * 2 + 2 * 3, 3 * 5 + 3 * 3, 2 * 3),
        "B": (3 + 4 + 3 + 3, 5 + 8 + 5, 2 * 3),
        "B2": (3 + 4 + 1 / 16 + 3 + 3, 5 + 6 + 1 / 16 + 5, 2),
    }
    for plan, factors in norms.items():
        groups = "norm, ReLU, add forward", "norm, ReLU, add backward", "gradient sums"
        own = {name: factor * num for name, factor in zip(groups, factors, strict=True)}
        expected = {name: 2 * elements for name, elements in (common | own).items()}
        assert floors.traffic[plan] == expected
    assert floors.image_gradient_bytes == 2 * (num + 3 * 16 * 16)
    assert bench("floors").Floors.of(net, 16, itemsize=4).image_gradient_bytes == 4 * (num + 768)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


class TwiceRead(nn.Module):
    """Batch norms that no kernel can take along: something else reads their output too."""

    def __init__(self, *, with_addition):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.with_addition = with_addition

    def forward(self, images):
        x = self.conv(images)
        normed = self.norm(x)
        return F.relu(normed + x if self.with_addition else normed) + normed


@pytest.mark.parametrize("with_addition", [False, True])
def test_floors_fuse_no_norm_that_is_read_twice(bench, with_addition):
    traffic = bench("floors").Floors.of(TwiceRead(with_addition=with_addition), 8).traffic
    assert traffic["A"] == traffic["B"]


def test_floors_name_what_they_leave_out_and_refuse_what_they_cannot_follow(bench):
    floors = bench("floors").Floors
    assert floors.of_arch("densenet121", 64).unaccounted == ("cat",)

    class Constant(nn.Module):
        def forward(self, images):
            return torch.zeros(len(images), 10)

    with pytest.raises(ValueError, match="Constant"):
        floors.of(Constant(), 32)


def step_record(arch, rate, device="NVIDIA H200", size=224):
    settings = {"arch": arch, "image_size": size, "batch_size": 256, "precision": "bf16"}
    results = {"free": {"image_passes_per_second": rate}}
    record = {"benchmark": "step", "settings": settings, "results": results}
    return {"environment": {"device": device}, **record}


def test_cost_of_measured_rates(run_main, tmp_path):
    ladder, out = tmp_path / "ladder.json", tmp_path / "cost.json"
    sections = {
        "kernels": {"benchmark": "kernels"},
        "small": step_record("resnet50", 90_000, size=32),
        "slow": step_record("resnet50", 6_000),
        "fast": step_record("resnet50", 7_000),
        "deep": step_record("resnet152", 3_000),
    }
    ladder.write_text(json.dumps({"environment": {"device": "NVIDIA H200"}, "sections": sections}))
    run_main("bench_cost", ladder, "--efficiency", "1", "0.9", "0.8", "--out", out)
    record = json.loads(out.read_text())
    assert record["kind"] == "projection"
    assert "117.9 M passes" in record["assumptions"][0]
    hours = {(row["arch"], row["gpus"]): row["hours"] for row in record["hours"]}
    one = 23 * 4 * 1_281_167 / 7_000 / 3600
    assert hours["resnet50", 1] == pytest.approx(one)
    assert hours["resnet50", 4] == pytest.approx(one / 4 / 0.9)
    assert hours["resnet50", 8] == pytest.approx(one / 8 / 0.8)
    assert hours["resnet101", 1] == pytest.approx(one * 508 / 343.5, rel=1e-2)  # MB, plan B2
    assert hours["resnet152", 1] == pytest.approx(one * 7 / 3)
    assert "divided by 1.48" in record["rates"]["resnet101"]["origin"]
    assert "ladder.json" in record["rates"]["resnet152"]["origin"]


def test_cost_without_a_measured_rate_says_so(run_main, tmp_path, capsys):
    file, out = tmp_path / "step.json", tmp_path / "cost.json"
    file.write_text(json.dumps(step_record("resnet50", 6.0, device="cpu")))
    with pytest.raises(SystemExit) as stop:
        run_main("bench_cost", file, "--out", out)
    assert stop.value.code == 1
    assert "nothing was measured" in capsys.readouterr().out
    assert not out.exists()
    run_main("bench_cost", file, "--passes-per-second", 7_000, "--out", out)
    assert "nothing was measured" in capsys.readouterr().out
    rates = json.loads(out.read_text())["rates"]
    assert rates["resnet50"]["origin"] == "typed, not measured"


def test_cost_of_two_devices_is_refused(run_main, tmp_path, capsys):
    files = []
    for arch, device in (("resnet50", "NVIDIA H200"), ("resnet101", "NVIDIA A100")):
        files.append(tmp_path / f"{arch}.json")
        files[-1].write_text(json.dumps(step_record(arch, 5_000, device)))
    with pytest.raises(SystemExit):
        run_main("bench_cost", *files)
    assert "different devices" in capsys.readouterr().err


def test_the_detection_study_reads_compares_and_draws(bench, run_main, monkeypatch, tmp_path):
    """Runs are made once, and only those that the file lacks."""
    study, made = bench("detection"), []

    def result(method, seed):
        clean = {"natural": 0.5, "fast-advprop": 0.52, "free": 0.4}[method] + seed / 10
        return {
            "eps": "1/255", "passes": 10, "attack_passes": 2, "train_seconds": 3.0,
            "detection": {
                "clean": {"AP": clean, "AP50": 0.9}, "mean_corrupted": clean / 2, "seconds": 1.0,
                "corruptions": {"motion_blur": {"3": clean / 2}},
                "attacks": {"pgd-10": {"AP": 0.1}},
            },
        }  # fmt: skip

    def run(method, seed, folder, num_threads):
        made.append((method, seed))
        return study.row_of(method, seed, result(method, seed))

    monkeypatch.setattr(study, "run", run)
    out = tmp_path / "detection.json"
    run_main("detection", "--seeds", "1", "--out", out)
    run_main("detection", "--seeds", "2", "--out", out)
    assert made == [(method, seed) for seed in (0, 1) for method in study.METHODS]
    record = json.loads(out.read_text())
    assert len(record["runs"]) == 6
    assert record["runs"][0]["attacks"] == {"pgd-10": 0.1}
    lines = {line["method"]: line for line in record["summary"]}
    assert lines["natural"]["mean"]["clean"] == pytest.approx(0.55)
    assert lines["fast-advprop"]["gain"]["motion blur"] == pytest.approx(0.01)
    assert lines["free"]["gain"]["mean of the corruptions"] == pytest.approx(-0.05)
    assert out.with_suffix(".png").stat().st_size > 10_000
