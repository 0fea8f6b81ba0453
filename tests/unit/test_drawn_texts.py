"""Pictures take any text for what it is, bars stay where accuracies are, folders get words."""

from __future__ import annotations

import warnings

import matplotlib
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.evaluation.class_words import class_words, worded
from freeadv_fast.evaluation.report import drawable, plot_perturbations, plot_sweep
from freeadv_fast.evaluation.shifts.report import plot_corruptions
from freeadv_fast.evaluation.tables import markdown_table, results_table

# Names that folders can have: matplotlib reads $...$ as a formula, and fails on these.
NAMES = (
    "$1_$5",
    r"$\frac{1}$",
    "100 % ^_{}",
    "two\nlines\tand a tab",
    "\N{GRINNING FACE} emoji",
    "\u732b \u72d7",  # glyphs that DejaVu Sans lacks
    "\u05d0\u05d1 right to left",
    "x" * 300,
    "\x1b[31mred\x1b[0m \x00\x07",
    "undecodable \udcff",
    "",
)


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def texts(monkeypatch):
    """Every text of a figure, as matplotlib holds it when the picture is written."""
    found = []
    real = Figure.savefig

    def savefig(figure, *arguments, **options):
        found.extend(text.get_text() for text in figure.findobj(matplotlib.text.Text))
        return real(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


def test_classes_of_any_name(tmp_path, small_network, texts):
    for first in range(0, len(NAMES), 5):
        names = [*NAMES[first : first + 5], *NAMES[:5]][:5]
        plot_perturbations(
            small_network(),
            torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8),
            torch.arange(5),
            names,
            Attack.parse("pgd-1"),
            ThreatModel(Perturbation.parse("8/255"), Perturbation.parse("2/255")),
            tmp_path / "picture.png",
        )
    assert "$1_$5" in texts
    assert "two lines and ..." in texts
    assert "x" * 14 + "..." in texts
    assert not any("\x1b" in text or "\udcff" in text for text in texts)


def test_sets_and_runs_of_any_name(tmp_path, texts):
    for name in NAMES:
        plot_corruptions(
            {name: {name: {1: 0.2, 5: 0.9}, name + "2": {1: 0.3}}},
            tmp_path / "picture.png",
            title=f"{name} on ImageNet-C",
            references={name: 0.5},
            starred={name},
            footnote=name,
        )
    assert "$1_$5 on ImageNet-C" in texts
    assert r"$\frac{1}$ 50.0%" in texts


def cell(method, seed, robust, collapsed=False):
    return {
        "method": method, "eps_levels": 8.0, "seed": seed, "clean": 0.99, "robust": robust,
        "attack": "pgd-50", "collapsed": collapsed,
    }  # fmt: skip


def test_sweeps_of_any_name(tmp_path, texts):
    plot_sweep([cell(name, 0, 0.5) for name in NAMES], tmp_path / "picture.png")
    assert "$1_$5" in texts


def test_a_user_s_own_settings_do_not_bring_formulas_back(tmp_path, texts):
    with matplotlib.rc_context({"text.usetex": True, "text.parse_math": True}):
        plot_sweep([cell("$1_$5", 0, 0.5)], tmp_path / "picture.png")
    assert "$1_$5" in texts


def test_error_bars_stay_between_0_and_100_percent(tmp_path, monkeypatch):
    bars = []
    real = Axes.errorbar

    def errorbar(axes, x, y, yerr, **options):
        bars.append((y, yerr))
        return real(axes, x, y, yerr=yerr, **options)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    cells = [cell("free", seed, robust) for seed, robust in enumerate((0.0, 0.0, 0.3))]
    plot_sweep(cells, tmp_path / "picture.png")
    (means, ((below,), (above,))), (clean, (_, (clean_above,))) = bars
    assert means == pytest.approx([0.1])
    assert below == pytest.approx(0.1)  # one standard deviation is 17 points
    assert above == pytest.approx(0.1732, abs=1e-4)
    assert clean[0] + clean_above <= 1


def test_tables_keep_their_lines():
    rows = [{"run": "two\nlines", "error": "\x1b[2Jcleared|"}]
    assert len(results_table(rows).splitlines()) == 3
    assert "\x1b" not in results_table(rows)
    assert len(markdown_table(rows).splitlines()) == 3


def test_a_text_that_fits_is_left_alone():
    assert drawable("great white shark", 17) == "great white shark"
    assert drawable("great white shark.", 17) == "great white sh..."


def test_imagenet_s_folders_get_words(tmp_path):
    classes = ["n01440764", "n02012849", "n03126707", "other", "n99999999"]
    words = ["tench", "crane n02012849", "crane n03126707", "other", "n99999999"]
    assert class_words(classes, str(tmp_path)) == words
    assert class_words(["cat", "dog"], str(tmp_path)) == ["cat", "dog"]


def test_the_table_beside_the_data_comes_first(tmp_path):
    data = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    data.mkdir(parents=True)
    table = "n01440764 Schleie, Tinca tinca\nn01443537 goldfish\n\n"
    (tmp_path / "LOC_synset_mapping.txt").write_text(table)
    classes = ["n01440764", "n01443537", "n01484850"]
    assert class_words(classes, str(data)) == ["Schleie", "goldfish", "n01484850"]
    (data / "LOC_synset_mapping.txt").write_bytes(b"n01440764 \xff\n")
    assert class_words(classes, str(data))[1:] == classes[1:]


def test_a_word_of_two_classes_keeps_their_ids():
    assert worded(["a", "b", "c"], {"a": "crane", "b": "crane, bird", "c": ""}) == [
        "crane a",
        "crane b",
        "c",
    ]
