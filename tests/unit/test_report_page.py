"""A run's page says what its files say, escapes all of it, and stands without the network."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from freeadv_fast.cli.run import run_tool
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.page import pictures, refresh_page, write_comparison, write_page
from freeadv_fast.evaluation.page.curves import NUM_BINS, averaged, axis, thinned
from freeadv_fast.evaluation.page.history import rewinds
from freeadv_fast.evaluation.page.render import MARK

ATTACKED = {"pgd-20": 0.4671, "autoattack": 0.4312}
CHECKS = [
    {"name": "steps", "question": "Do more steps not matter?", "is_passed": True},
    {"name": "square", "question": "Does Square beat nothing?", "is_passed": False},
    {"name": "transfer", "question": "Is transfer weaker?", "is_passed": None},
]


def write(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def change(path, **fields):
    write(path, json.loads(path.read_text()) | fields)


def text_of(page):
    """What a reader reads, in one line."""
    body = re.sub(r"<style>.*?</style>", "", page.read_text(), flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


@pytest.fixture
def finished(repository, tmp_path):
    """Makes the folder of a run with all that a run and its tools may leave."""

    def make(name="run"):
        fixtures, folder = repository / "tests" / "fixtures" / "runs", tmp_path / name
        shutil.copytree(fixtures / "finished", folder)
        shutil.copy(fixtures / "interrupted" / "log.jsonl", folder)
        change(
            folder / "result.json",
            recipe="cifar10-wrn32-free-m8",
            robust_accuracy=ATTACKED,
            attack_parts={"autoattack": {"apgd-ce": 0.4622, "square": 0.4312}},
            average={"decay": 0.99, "clean_accuracy": 0.97, "robust_accuracy": {"pgd-20": 0.5093}},
            best={"epoch": 7, "clean_accuracy": 0.9, "robust_accuracy": {"pgd-20": 0.4801},
                  "is_last": False, "is_better": False},
            num_clean_images=10000,
            num_eval_images=1000,
            attack_passes=5588,
            warm_up_seconds=1.0,
            evaluation_seconds=2.0,
        )  # fmt: skip
        write(
            folder / "env.json",
            {
                "command": ["/venv/python", "launch/cifar.py", "--data", "cifar10:/my data"],
                "git": {"commit": "0123abcd", "dirty": True},
                "hardware": {"gpus": ["H200", "H200"], "cpu": "EPYC", "cores": 8},
                "versions": {"torch": "2.11.0", "dali": None},
            },
        )
        write(
            folder / "evaluation-best-pgd-50-eps16-step2-n500.json",
            {"checkpoint": "best.pt", "eps": "16/255", "attack_step": "2/255", "dataset": "digits",
             "clean_accuracy": 0.9, "robust_accuracy": {"pgd-50": 0.6612}, "num_eval_images": 500},
        )  # fmt: skip
        write(
            folder / "robustness-last-imagenet-r-n400.json",
            {"checkpoint": "last.pt", "num_eval_images": 400, "accuracy": 0.2875},
        )
        write(
            folder / "audit.json",
            {"checkpoint": "last.pt", "eps": "32/255", "num_images": 64, "seed": 0,
             "checks": [check | {"measured": "m", "meaning": "w"} for check in CHECKS]},
        )  # fmt: skip
        write(folder / "export" / "config.json", {"class_names": ["cat", "dog"]})
        (folder / "plots").mkdir()
        Image.new("RGB", (30, 20)).save(folder / "plots" / "perturbations.png")
        return folder

    return make


def test_the_page_says_what_the_files_say(finished):
    folder = finished()
    page = write_page(folder)
    assert page == folder / "report.html"
    text = text_of(page)
    for said in (
        "Free adversarial training (m = 2) of timm/test_efficientnet on handwritten digits",
        "The last weights classify 96.7% of 10,000 clean validation images correctly, and 43.1% of "
        "1,000 under the strongest attack that was measured, autoattack within 32/255 in L∞ (95 % "
        "interval 40.1–46.2%), after 5,588 image passes in 5.8 s on AMD EPYC.",
        "attack steps step restarts images last weights 95 % interval averaged best, of epoch 7 "
        "paper",
        "43.6–49.8% 50.9% 48.0% 46.8%",
        "they are no better than the last by more than chance explains",
        "Paper: Adversarial Training for Free! (Shafahi et al. 2019), table 1.",
        "autoattack, part by part after still right apgd-ce 46.2% square 43.1%",
        "best 16/255 50 2/255 500 90.0% 66.1%",
        "imagenet-r last 400 28.7% accuracy",
        "1 of 3 checks that broken defences fail hold, 1 check failed : the robust accuracy above "
        "is not to be trusted",
        "last weights, eps 32/255 in L∞, 64 images of handwritten digits, seed 0.",
        "✓ holds Do more steps not matter? m w ✗ fails Does Square beat nothing? m w – not judged",
        "5,588 image passes for the weights and 5,588 for the attack alone",
        "start-up 12.7% 1.0 s",
        "attack 24.7% 1.9 s estimated",
        "evaluation 25.5% 2.0 s",
        "/venv/python launch/cifar.py --data 'cifar10:/my data'",
        "python launch/cifar.py --config config.yaml --output-dir FOLDER",
        "Commit 0123abcd, with changes that are not committed",
        "GPU 2 x H200",
        "Versions torch 2.11.0",
        "Classes 2: cat, dog",
    ):
        assert said in text, said
    assert "AutoAttack, the usual last word" not in text
    source = page.read_text()
    for link in ("result.json", "checkpoints/best.pt", "export/", "plots/perturbations.png"):
        assert f'href="{link}"' in source
        assert (folder / link).exists()
    assert source.count('class="chart"') == 4  # accuracy, loss, rate, speed
    assert source.count("data:image/png;base64,") == 1


def test_an_unsettled_number_is_told_so(finished):
    folder = finished()
    change(folder / "result.json", robust_accuracy={"pgd-20": 0.4671})
    text = text_of(write_page(folder))
    assert "AutoAttack, the usual last word, was not run" in text
    record = {"checkpoint": "last.pt", "eps": "32/255", "dataset": "digits", "num_eval_images": 500}
    record["robust_accuracy"] = {"autoattack": 0.31}
    write(folder / "evaluation-last-autoattack-eps32-step4-n500-0a1b2c3d.json", record)
    assert "was not run" in text_of(write_page(folder))  # other images, or other weights
    write(folder / "evaluation-last-autoattack-eps32-step4-n500.json", record)
    assert "31.0% of 500 under the strongest attack that was measured, autoattack" in text_of(
        write_page(folder)
    )


def test_what_was_seen_otherwise_is_said(finished):
    """An evaluation on prepared or listed images; an audit of another ball than the table's."""
    folder = finished()
    change(
        folder / "evaluation-best-pgd-50-eps16-step2-n500.json",
        preprocessing="Res256Crop224", image_list={"file": "ids.txt", "num_images": 500}, norm="l2",
    )  # fmt: skip
    change(folder / "audit.json", eps="8/255", norm="l2", attack_step="2/255", data="svhn:/x")
    text = text_of(write_page(folder))
    assert "in L2, preprocessing Res256Crop224, the images of ids.txt" in text
    about = "last weights, eps 8/255 in L2, step 2/255, 64 images of SVHN"
    assert f"the robust accuracy that it is about ({about}) is not to be trusted" in text
    assert "accuracy above is not to be trusted" not in text


def test_facts_that_cannot_be_read_cost_themselves_alone(finished):
    folder = finished()
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("epochs: 4.0", "epochs: x"))
    text = text_of(write_page(folder))
    assert "left out that cannot be read: ValueError" in text
    assert "Free adversarial training (m = 2) of timm/test_efficientnet" in text


def test_all_text_is_escaped(finished):
    folder = finished("<script>alert(1)</script>"[:8] + '"run')
    evil = "<script src=x></script>'\"><img src=http://x/>"
    change(folder / "result.json", dataset=evil, arch=evil, device=evil)
    write(folder / "export" / "config.json", {"class_names": [evil, "dog"]})
    write(folder / "env.json", {"command": [evil], "platform": evil, "versions": {evil: evil}})
    checks = [{"name": evil, "question": evil, "is_passed": False, "measured": evil}]
    write(folder / "audit.json", {"checks": checks, "eps": evil})
    (folder / "plots" / "perturbations.png").rename(folder / "plots" / "<b>&.png")
    source = write_page(folder).read_text()
    assert "<script" not in source
    assert "<b>&.png" not in source
    assert source.count("&lt;script src=x&gt;") >= 8
    assert not loads(source)
    other = finished("other")
    assert not loads(write_comparison([folder, other]).read_text())


def loads(source):
    """Whatever a browser would fetch: nothing but data: may be."""
    fetched = re.findall(r'<(?:img|script|link|iframe|source)\b[^>]*?(?:src|href)="([^"]*)', source)
    assert re.search(r"default-src 'none'; style-src 'unsafe-inline'; img-src data:", source)
    assert not re.search(r"@import|url\(|@font-face", source)
    return [place for place in fetched if not place.startswith("data:image/")]


def test_nothing_is_loaded_and_links_are_relative(finished):
    source = write_page(finished()).read_text()
    assert not loads(source)
    links = re.findall(r'href="([^"]*)"', source)
    assert links
    assert not [link for link in links if ":" in link or link.startswith("/")]


def test_one_file_suffices(finished):
    folder = finished()
    for path in list(folder.iterdir()):
        if path.name != "result.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = text_of(write_page(folder))
    assert "There is no log.jsonl to draw curves from." in text
    assert "Audit" not in text
    assert "Pictures" not in text
    assert "Measured later" not in text


@pytest.mark.parametrize("content", ["", "[]", '{"checks": 3, "robust_accuracy": 5}', "\x00\xff{"])
def test_damaged_files_cost_their_section(finished, content):
    folder = finished()
    names = ["env.json", "audit.json", "log.jsonl", "config.yaml", "plots/perturbations.png"]
    names += [path.name for path in folder.glob("*-n*.json")]
    for name in names:
        (folder / name).write_text(content, encoding="latin-1")
    text = text_of(write_page(folder))
    assert "perturbations.png cannot be read" in text
    assert re.search("audit.json cannot be read|left out that cannot be read: TypeError", text)
    assert "43.1% of 1,000" in text


@pytest.mark.parametrize("wrong", [None, "x", {"a": [1]}, float("nan")])
def test_wrong_values_cost_their_section(finished, wrong):
    folder = finished()
    fields = ("best", "average", "robust_accuracy", "passes", "eps", "collapse", "versions", "m")
    change(folder / "result.json", **dict.fromkeys(fields, wrong))
    page = write_page(folder)
    write_comparison([folder, finished("other")])
    assert "96.7%" in text_of(page) or "left out" in text_of(page)


def test_pictures_are_reduced_until_they_fit(tmp_path, monkeypatch):
    assert pictures.LARGEST_SUM < 3_000_000
    monkeypatch.setattr(pictures, "LARGEST_SUM", 60_000)
    noise = np.random.default_rng(0).integers(0, 255, (200, 400, 3), dtype=np.uint8)
    paths = [tmp_path / "noise.png", tmp_path / "small.png", tmp_path / "cut.png"]
    Image.fromarray(noise).save(paths[0])
    Image.new("RGB", (30, 20)).save(paths[1])
    paths[2].write_bytes(paths[0].read_bytes()[:9000])
    damage = {}
    large, small = pictures.embed(paths, damage)
    assert large.is_reduced
    assert large.source.startswith("data:image/webp;base64,")
    assert not small.is_reduced
    assert len(large.source) + len(small.source) < 60_100
    assert list(damage) == ["plots/cut.png"]


def test_collapses_are_read_from_the_log(finished):
    folder = finished()
    log = [
        {"passes": 100 * n, "updates": n, "loss": 1.0, "guard_robust_accuracy": accuracy}
        for n, accuracy in ((1, 0.3), (2, 0.44), (3, 0.02))
    ]
    log += [{"passes": 400, "updates": 3, "loss": 1.0}, {"passes": 500, "updates": 4, "loss": 1.0}]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    (found,) = rewinds(log)
    assert (found.passes, found.before, found.after) == (300, 0.44, 0.02)
    last = {"detected_at_passes": 500, "robust_accuracy_before": 0.41, "robust_accuracy_after": 0}
    last |= {"action": "stop", "rewound_to_update": 2}
    change(folder / "result.json", collapse=last)
    page = write_page(folder)
    text = text_of(page)
    assert "3 checks of robust accuracy on held-out images" in text
    assert "2 collapses of robustness were seen" in text
    assert "300 passes 44.0% 2.0% went back and on" in text
    assert "500 passes 41.0% 0.0% training stopped, from update 2 on" in text
    assert page.read_text().count('class="event"') == 3  # both in the loss, one among the checks


def test_a_file_of_the_users_stays(finished, capsys):
    folder = finished()
    (folder / "report.html").write_text("<p>mine</p>")
    with pytest.raises(UserError, match="no report of ours, so it stays"):
        write_page(folder)
    refresh_page(folder)
    assert "not written: " in capsys.readouterr().out
    assert (folder / "report.html").read_text() == "<p>mine</p>"
    (folder / "report.html").write_text(MARK)
    refresh_page(str(folder))
    assert capsys.readouterr().out == f"report: {folder}/report.html\n"
    refresh_page("module:function")
    assert capsys.readouterr().out == ""


def test_runs_are_compared(finished, tmp_path):
    first, second = finished("one"), finished("two")
    write_page(first)
    change(second / "result.json", robust_accuracy={"pgd-20": 0.30, "autoattack": 0.2}, seed=1)
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(config.replace("lr: 0.05", "lr: 0.1"))
    page = write_comparison([first, second])
    assert page == tmp_path / "comparison.html"
    text = text_of(page)
    for said in (
        "Under autoattack within 32/255, one stands highest with 43.1% ; two follows with 20.0% , "
        "which so many images tell apart.",
        "one Free adversarial training, m = 2; timm/test_efficientnet; 32/255; 2 epochs",
        "lr 0.05 0.1",
        "clean 10,000 images pgd-20 1,000 images autoattack 1,000 images passes training",
        "+ 5,588 attack",
    ):
        assert said in text, said
    source = page.read_text()
    assert 'href="one/report.html"' in source
    assert 'href="two/result.json"' in source
    assert source.count('class="chart"') == 4  # two of them scatter charts
    assert source.count("<title>") == 1 + 2 * 2 * 2
    (tmp_path / "sub").mkdir()
    other = write_comparison([first, second], tmp_path / "sub" / "x.html")
    assert 'href="../one/report.html"' in other.read_text()


def test_other_radii_have_no_leader(finished):
    first, second = finished("one"), finished("two")
    change(second / "result.json", eps="8/255")
    assert "stands highest" not in text_of(write_comparison([first, second]))
    third = finished("three")
    assert "stands highest" in text_of(write_comparison([first, third]))
    config = (third / "config.yaml").read_text()
    (third / "config.yaml").write_text(config.replace("norm: linf", "norm: l2"))
    assert "stands highest" not in text_of(write_comparison([first, third]))


@pytest.fixture
def report(repository, monkeypatch, capsys):
    """Runs launch/report.py; returns its status and what it said."""
    spec = importlib.util.spec_from_file_location("report", repository / "launch" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["launch/report.py", *map(str, arguments)])
        status = run_tool(module.main)
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


def test_the_script_writes_one_or_compares(finished, report):
    first, second = finished("one"), finished("two")
    assert report(first) == (0, f"wrote {first}/report.html\n", "")
    page = first.parent / "both.html"
    assert report(first, second, "--output", page) == (0, f"wrote {page}\n", "")
    assert report(first, second, "--output", page)[0] == 0  # its own page is replaced


def test_mistakes_are_one_line(finished, report, tmp_path):
    folder, empty, mine = finished(), tmp_path / "empty", tmp_path / "mine.html"
    empty.mkdir()
    mine.write_text("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "result.json").write_text("{")
    for arguments, line in (
        ((), "RUN: name the folder of a finished run"),
        ((empty,), f"RUN {empty}: no finished run; it has no result.json"),
        ((tmp_path / "broken",), "result.json cannot be read: JSONDecodeError"),
        ((folder, folder / ".." / "run"), "named twice; leave one of them out"),
        ((folder, "--output", mine), f"--output {mine}: for several runs"),
    ):
        status, _, said = report(*arguments)
        assert (status, said.count("\n")) == (2, 1)
        assert line in said
    other = finished("other")
    for output, line in (
        (mine, f"--output {mine}: no report of ours, so it stays; name another file"),
        (empty, f"--output {empty}: a folder; name a file"),
        (tmp_path / "no" / "x.html", "there is no folder"),
    ):
        status, _, said = report(folder, other, "--output", output)
        assert (status, said.count("\n")) == (2, 1)
        assert line in said
    assert mine.read_text() == "mine"


def test_the_script_has_a_help(report):
    status, said, _ = report("--help")
    assert status == 0
    assert "usage: launch/report.py RUN [flags]" in said
    assert "--output PATH" in said


def test_long_curves_keep_their_extremes():
    points = [(float(n), float(n % 7)) for n in range(10_000)]
    points[5000] = (5000.0, 99.0)
    kept = thinned(points)
    assert len(kept) <= 2 * NUM_BINS
    assert (5000.0, 99.0) in kept
    assert list(kept) == sorted(kept)
    assert thinned(points[:10]) == points[:10]
    assert averaged([(1.0, 2.0), (3.0, 4.0)]) == [(1.0, 2.0), (3.0, 4.0)]
    assert len(averaged(points)) == 100
    assert averaged([]) == []


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, (0, 0.25, 0.5, 0.75, 1)),
        (0, 3.4, (0, 1, 2, 3, 4)),
        (0, 0, (0, 0.25, 0.5, 0.75, 1)),
        (-0.1, 1, (-0.25, 0, 0.25, 0.5, 0.75, 1)),
        (0, 26740, (0, 10000, 20000, 30000)),
    ],
)
def test_axes_have_round_ticks(low, high, ticks):
    assert axis(low, high, 0, 100).ticks == pytest.approx(ticks)


@pytest.mark.peers
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_shows_it(finished, tmp_path, width):
    """Nothing wider than the window, and something is drawn."""
    first, second = finished("one"), finished("two")
    for page in (write_page(first), write_comparison([first, second])):
        target = tmp_path / f"{page.stem}.png"
        subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
             "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={target}",
             f"--window-size={width},2000", page.as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        with Image.open(target) as shot:
            pixels = np.asarray(shot.convert("L"))
        assert pixels.shape[1] == width
        assert (pixels < 100).mean() > 0.002
