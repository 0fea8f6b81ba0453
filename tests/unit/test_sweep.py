"""A sweep skips what is finished, resumes what is not, and reports what failed."""

from __future__ import annotations

import csv
import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

from freeadv_fast import sweep
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.report import plot_sweep
from freeadv_fast.evaluation.tables import markdown_table
from freeadv_fast.runs.json_file import write_json
from freeadv_fast.runs.log import RunFolder, save_config
from freeadv_fast.session import side_by_side
from freeadv_fast.session.signals import Interrupted
from freeadv_fast.sweep import Cell, run_sweep, split_arguments

FLAGS = ["--methods", "natural,free", "--eps", "8/255,32/255", "--seeds", "0,1"]
NAMES = [f"{m}-eps{e}-seed{s}" for m in ("natural", "free") for e in (8, 32) for s in (0, 1)]


class FakeTrainer:
    """Writes what a run leaves behind; records the configs it was called with.

    Args:
        failing: Error by name of cell.
    """

    def __init__(self, failing=None, **result):
        self.failing, self.result, self.configs = failing or {}, result, []

    @property
    def names(self):
        return [RunFolder(self.path(config)).root.name for config in self.configs]

    def path(self, config):
        return sweep.Path(config.run_folder)

    def __call__(self, config):
        self.configs.append(config)
        folder = RunFolder(self.path(config))
        folder.claim(config.resume)
        save_config(config, folder.config)
        if folder.root.name in self.failing:
            raise self.failing[folder.root.name]
        robust = 0.6 - float(config.eps.levels) / 100 - 0.01 * config.seed
        write_json(
            folder.result,
            {
                "clean_accuracy": 0.9,
                "robust_accuracy": {"pgd-5": 0.7, "pgd-50-10": robust},
                "passes_per_second": 1234.5,
                "train_seconds": 6.7,
                "attack_step": "1/255",
                **self.result,
            },
        )


@pytest.fixture
def root(tmp_path):
    return tmp_path / "sweep"


@pytest.fixture(autouse=True)
def _no_plots(request, monkeypatch):
    """A sweep draws after every cell, in half a second; tests that ask for `pictures` let it."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(sweep, "plot_sweep", lambda _, path: path.touch())


@pytest.fixture
def run(root):
    def call(trainer, *flags):
        return run_sweep([*FLAGS, "--output-dir", str(root), *flags], trainer, gpus=())

    return call


def cells_of(root):
    return json.loads((root / "sweep.json").read_text())["cells"]


def test_every_cell_is_a_run_of_its_own(root, run, pictures, capsys):
    trainer = FakeTrainer()
    assert run(trainer, "--epochs", "2", "--", "--lr", "0.5") == 0
    assert trainer.names == NAMES
    assert {(c.epochs, c.lr, c.resume) for c in trainer.configs} == {(2.0, 0.5, False)}
    assert [(c.method, str(c.eps), c.seed) for c in trainer.configs][5] == ("free", "8/255", 1)
    assert [c["attack"] for c in cells_of(root)] == ["pgd-50-10"] * 8
    assert cells_of(root)[5]["robust"] == pytest.approx(0.51)
    assert cells_of(root)[5]["attack_step"] == "1/255"
    with (root / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (rows[5]["method"], rows[5]["eps"], rows[5]["seed"]) == ("free", "8/255", "1")
    table = (root / "sweep.md").read_text().splitlines()
    assert table[0].startswith(
        "| method | eps | seed | clean | robust | attack | steps | step | restarts |"
    )
    assert table[7] == (
        "| free | 8/255 | 1 | 90.0% | 51.0% | pgd-50-10 | 50 | 1/255 | 10 | 1,234 | 7 | no |"
    )
    pixels = np.asarray(Image.open(root / "sweep.png"))
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50
    printed = capsys.readouterr().out
    assert "8 cells" in printed
    assert printed.count("no GPU: evaluating with pgd-20 only") <= 1
    assert not list(root.glob(".*"))


def test_an_interrupted_sweep_goes_on(root, run, capsys):
    trainer = FakeTrainer({NAMES[2]: Interrupted(15)})
    assert run(trainer) == 128 + 15
    assert trainer.names == NAMES[:3]
    assert [cell["clean"] for cell in cells_of(root)] == [0.9, 0.9] + [None] * 6
    assert run(FakeTrainer()) == 2
    assert "holds another sweep; add --resume" in capsys.readouterr().err
    trainer = FakeTrainer()
    assert run(trainer, "--resume") == 0
    assert trainer.names == NAMES[2:]
    assert [config.resume for config in trainer.configs] == [True] + [False] * 5
    trainer = FakeTrainer()
    assert run(trainer, "--resume") == 0
    assert not trainer.names
    assert all(cell["clean"] == 0.9 for cell in cells_of(root))


def test_a_cell_that_fails_stops_no_other(root, run):
    trainer = FakeTrainer({NAMES[1]: UserError("--lr 9: became non-finite | start again")})
    assert run(trainer) == 2
    assert trainer.names == NAMES
    assert [bool(cell["error"]) for cell in cells_of(root)] == [n == NAMES[1] for n in NAMES]
    assert "--lr 9: became non-finite \\| start again" in (root / "sweep.md").read_text()
    again = FakeTrainer()
    assert run(again, "--resume") == 0
    assert again.names == [NAMES[1]]


def test_flags_that_do_not_fit_a_method_are_its_error(root, run):
    trainer = FakeTrainer()
    flags = ["--methods", "natural,gradalign", "--fuse", "on", "--max-passes", "9"]
    assert run(trainer, *flags) == 2
    assert trainer.names == NAMES[:4]
    assert all("--fuse on: GradAlign" in cell["error"] for cell in cells_of(root)[4:])


def test_a_flag_goes_to_the_methods_that_read_it(root, run):
    trainer = FakeTrainer()
    assert run(trainer, "--mix", "mixup", "--m", "2", "--step-size=3/255", "--epochs", "9") == 0
    assert trainer.names == NAMES
    natural, free = trainer.configs[0], trainer.configs[4]
    assert (natural.mix, natural.m, natural.step_size, natural.epochs) == ("mixup", 2, None, 9)
    assert (free.mix, free.m, str(free.step_size), free.epochs) == ("none", 2, "3/255", 9)


def test_a_flag_that_no_method_reads_is_refused(root, run, capsys):
    trainer = FakeTrainer()
    assert run(trainer, "--trades-beta", "3") == 2
    error = "error: --trades-beta 3: natural does not read it; for trades, free-trades\n"
    assert capsys.readouterr().err == error
    assert not trainer.names


def tables(root):
    """The sweep's files and what they hold."""
    return {path.name: path.read_bytes() for path in root.glob("sweep.*")}


def test_a_finished_table_is_not_overwritten_by_other_flags(root, run, capsys):
    run(FakeTrainer(), "--epochs", "2")
    before, trainer = tables(root), FakeTrainer()
    assert run(trainer, "--resume", "--epochs", "3", "--workers", "1") == 2
    assert not trainer.names
    error = capsys.readouterr().err
    assert f"--epochs 3.0: the run in {root / NAMES[0]} was made with --epochs 2.0" in error
    assert tables(root) == before


def test_a_finished_table_is_not_overwritten_by_a_smaller_one(root, run, capsys):
    """More cells are welcome."""
    run(FakeTrainer())
    before, trainer = tables(root), FakeTrainer()
    assert run(trainer, "--resume", "--seeds", "0") == 2
    assert f"the table in {root} holds natural-eps8-seed1, which these" in capsys.readouterr().err
    assert tables(root) == before
    assert run(trainer, "--resume", "--seeds", "0,1,2") == 0
    assert trainer.names == [f"{m}-eps{e}-seed2" for m in ("natural", "free") for e in (8, 32)]


def test_a_sweep_is_named_by_its_folder(root, run, capsys):
    run(FakeTrainer())
    trainer = FakeTrainer()
    assert run_sweep([*FLAGS, "--resume", str(root)], trainer) == 0
    assert not trainer.names
    assert run_sweep([*FLAGS, "--resume", str(root / NAMES[0])], trainer) == 2
    assert "nothing to continue there, for it has no sweep.json" in capsys.readouterr().err


def test_two_sweeps_do_not_share_a_folder(root, run, capsys):
    class Second(FakeTrainer):
        def __call__(self, config):
            if not self.configs:
                assert run(FakeTrainer(), "--resume") == 2
            super().__call__(config)

    assert run(Second()) == 0
    assert f"--output-dir {root}: in use by process " in capsys.readouterr().err


# Writes what a run leaves behind, and which GPU it saw; one of them fails.
STAND_IN = """import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output-dir") + 1])
print(os.environ["CUDA_VISIBLE_DEVICES"], "--resume" in sys.argv, flush=True)
time.sleep(0.5)
if folder.name == "free-eps8-seed1":
    sys.exit("error: --lr 9: became non-finite")
folder.mkdir(exist_ok=True)
(folder / "config.yaml").write_text("{}")
result = dict(clean_accuracy=0.9, robust_accuracy={"pgd-5": 0.5}, passes_per_second=1.0)
result |= dict(attack_step="1/255")
(folder / "result.json").write_text(json.dumps(result | {"train_seconds": 1.0}))
"""


@pytest.fixture
def _stand_in(monkeypatch):
    monkeypatch.setattr(sweep, "CELL", STAND_IN)
    monkeypatch.setattr(sweep, "refuse_other_run", lambda config, folder: None)


@pytest.mark.usefixtures("_stand_in")
def test_each_gpu_takes_a_cell(root, capsys):
    """In processes of their own, so that all are busy; a failed one stops no other."""
    (root / NAMES[3]).mkdir(parents=True)
    trainer = FakeTrainer()
    flags = [*FLAGS, "--output-dir", str(root), "--resume"]
    assert run_sweep(flags, trainer, gpus=["GPU-a", "3"]) == 2
    assert not trainer.names
    logs = {name: (root / f"{name}.log").read_text().split() for name in NAMES}
    assert {gpu for gpu, *_ in logs.values()} == {"GPU-a", "3"}
    assert [name for name, words in logs.items() if words[1] == "True"] == [NAMES[3]]
    cells = cells_of(root)
    assert [cell["clean"] for cell in cells] == [0.9] * 5 + [None] + [0.9] * 2
    assert cells[5]["error"] == "--lr 9: became non-finite"
    assert f"[6/8] free-eps8-seed1: {root}/free-eps8-seed1.log" in capsys.readouterr().out


@pytest.mark.usefixtures("_stand_in")
def test_a_signal_ends_the_cells_on_all_gpus(root, monkeypatch):
    """They are told once more, and waited for."""
    monkeypatch.setattr(sweep, "CELL", STAND_IN.replace("0.5)", "60)", 1))
    jobs, real = [], side_by_side.start

    def start(job, gpu):
        jobs.append(job)
        process = real(job, gpu)
        if len(jobs) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(side_by_side, "start", start)
    flags = [*FLAGS, "--output-dir", str(root)]
    assert run_sweep(flags, FakeTrainer(), gpus=["0", "1"]) == 128 + signal.SIGTERM
    assert sorted(path.stem for path in root.glob("*.log")) == sorted(NAMES[:2])
    assert {(cell["clean"], cell["error"]) for cell in cells_of(root)} == {(None, "")}


@pytest.mark.parametrize(
    ("collapse", "flags", "free"),
    [(None, [], False), ({"epoch": 3}, [], True), (None, ["--guard-every", "0"], None)],
)
def test_collapse(root, run, collapse, flags, free):
    """Of runs that nobody watched nothing is known: natural ones, and those without a guard."""
    assert run(FakeTrainer(collapse=collapse), *flags) == 0
    found = {(cell["method"], cell["collapsed"]) for cell in cells_of(root)}
    assert found == {("natural", None), ("free", free)}
    shown = {
        line.split("|")[-2].strip() for line in (root / "sweep.md").read_text().splitlines()[2:]
    }
    assert shown == {"-", {None: "-", False: "no", True: "yes"}[free]}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods", "fgms"], "--methods fgms: no recipe for digits; choose among "),
        (["--eps", "4"], "--eps 4: larger than the whole pixel range; did you mean 4/255?"),
        (["--seeds", "0,x"], "--seeds x: write whole numbers"),
        (["--seed", "0"], "--seed: a sweep sets it for each cell; use --seeds"),
        (["--epoch", "3"], "--epoch: no such flag; did you mean --epochs?"),
        (["--epochs", "-1"], "--epochs -1: must be a positive number"),
        (["--data", "nowhere", "--methods", "x"], "--methods x: no recipe for cifar"),
    ],
)
def test_mistakes_are_one_line(root, capsys, flags, words):
    trainer = FakeTrainer()
    assert run_sweep(["--output-dir", str(root), *flags], trainer) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}")
    assert error.count("\n") == 1
    assert not trainer.names
    assert not root.exists()


def test_torchrun_is_refused(root, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_sweep(["--output-dir", str(root)], FakeTrainer()) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_flags_are_told_apart():
    own, flags = split_arguments(
        ["--eps", "1/255", "--lr=0.1", "--epochs", "3", "--resume", "--", "--eps", "x"]
    )
    assert own == ["--eps", "1/255", "--resume"]
    assert flags == ["--lr=0.1", "--epochs", "3", "--eps", "x"]


def test_a_real_cell(root):
    flags = ["--methods", "free", "--eps", "32/255", "--output-dir", str(root)]
    flags += ["--max-passes", "128", "--batch-size", "32", "--m", "2", "--eval-images", "8"]
    flags += ["--eval-attacks", "pgd-2", "--holdout-images", "0", "--workers", "1"]
    assert run_sweep(flags) == 0
    (cell,) = cells_of(root)
    assert (cell["method"], cell["eps"], cell["attack"], cell["error"]) == (
        "free",
        "32/255",
        "pgd-2",
        "",
    )
    assert 0 <= cell["robust"] <= cell["clean"] <= 1
    before = (root / cell_name(cell) / "result.json").stat().st_mtime_ns
    assert run_sweep([*flags, "--resume"]) == 0
    assert (root / cell_name(cell) / "result.json").stat().st_mtime_ns == before


def cell_name(cell):
    return Cell(cell["method"], cell["eps"], cell["seed"]).name


def test_plot(tmp_path):
    random = np.random.default_rng(0)
    runs = [
        {"method": method, "eps_levels": eps, "seed": seed, "clean": 0.9 - 0.02 * eps}
        | {"robust": float(0.8 - 0.04 * eps + 0.03 * random.normal()), "attack": "pgd-50-10"}
        | {"collapsed": method == "fgsm" and eps > 8}
        for method in ("fgsm", "fgsm-rs", "gradalign", "free", "pgd", "trades", "yopo", "elle")
        for eps in (2.0, 8.0, 12.0)
        for seed in range(3)
    ]
    plot_sweep([*runs, {"method": "natural", "robust": None}], tmp_path / "many.png")
    plot_sweep(runs[:1], tmp_path / "one.png")
    for name in ("many", "one"):
        assert Image.open(tmp_path / f"{name}.png").size[1] > 400


def test_markdown():
    rows = [{"method": "free", "clean": 0.5}, {"method": "a|b", "n": 12345}]
    assert markdown_table(rows).splitlines() == [
        "| method | clean | n |",
        "| --- | --- | --- |",
        "| free | 50.0% | - |",
        "| a\\|b | - | 12,345 |",
    ]
    assert markdown_table([]) == ""
