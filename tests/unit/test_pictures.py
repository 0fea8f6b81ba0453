"""Pictures of two tiny networks side by side; what is drawn against slow loops."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixed_batches import FixedLoader
from PIL import Image
from torch import nn

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import L2ThreatModel, Perturbation, ThreatModel
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation import images
from freeadv_fast.evaluation.pictures import draw
from freeadv_fast.evaluation.pictures.curves import STEPS, Curve, curves_record, measure
from freeadv_fast.evaluation.pictures.draw import draw_pictures
from freeadv_fast.evaluation.pictures.large_eps import large_threat
from freeadv_fast.evaluation.pictures.saliency import visible
from freeadv_fast.evaluation.pictures.subjects import (
    Subject,
    ball_directions,
    choose,
    input_gradient,
    line_up,
)
from freeadv_fast.evaluation.pictures.surface import GRID, loss_surface
from freeadv_fast.evaluation.sample import Sample
from freeadv_fast.runs.log import RunFolder, save_config
from freeadv_fast.runs.saved import SavedRun

SIDE, CLASSES = 8, [f"class {i}" for i in range(6)]
THREAT = ThreatModel(Perturbation.parse("8/255"), Perturbation.parse("2/255"))
L2 = L2ThreatModel(Perturbation.parse("128/255"), Perturbation.parse("16/255"))
CONFIG = TrainConfig(image_size=SIDE, normalization="none", eps="8/255", eval_step="2/255")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 6)).eval()


def saved(root, seed=0, **fields):
    config = dataclasses.replace(CONFIG, **fields)
    folder = RunFolder(root)
    return SavedRun(folder, config, folder.checkpoints / "last.pt", CLASSES, network(seed))


def subject(root, seed=0, label="free m=4"):
    run = saved(root, seed)
    return Subject(label, run, run.network)


def sample_of(seen_by, count=6):
    """Random images; every third has a label that the network does not give it."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(count, 3, SIDE, SIDE, generator=generator)
    with torch.no_grad():
        labels = seen_by(pixels).argmax(1)
    labels[2::3] = (labels[2::3] + 1) % 6
    return Sample(pixels, labels, CLASSES, 4)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Folders of two runs, natural and free, without checkpoints: networks are given."""
    made = {}
    for seed, (name, fields) in enumerate(
        {"free": {}, "natural": {"method": "natural", "m": 1}, "cifar": {"data": "x"}}.items()
    ):
        run = saved(tmp_path / name, seed, **fields)
        run.folder.root.mkdir()
        save_config(run.config, run.folder.config)
        (run.folder.root / "result.json").write_text("kept")
        made[run.folder.root] = run

    def val_loader(config, world, num_images, *view):
        return FixedLoader([num_images], num_classes=6, image_size=SIDE)

    monkeypatch.setattr(images, "build_val_loader", val_loader)
    monkeypatch.setattr(draw, "load_run", lambda folder, checkpoint: made[folder])
    return [*made]


def test_all_pictures_of_two_runs(runs, capsys):
    free, natural, _ = runs
    written = draw_pictures([free, natural], num_images=10)
    names = {path.name for path in written}
    pictures = {"loss-surface.png", "large-eps.png", "saliency.png", "robustness-curves.png"}
    assert names == pictures | {"robustness-curves.json"}
    assert {path.name for path in (free / "plots").iterdir()} == names
    for name in pictures:
        pixels = np.asarray(Image.open(free / "plots" / name).convert("RGB"))
        assert min(pixels.shape[:2]) > 400
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
        assert (pixels[:2] == 255).all()  # nothing reaches the edge
    record = json.loads((free / "plots" / "robustness-curves.json").read_text())
    assert [own["run"] for own in record["networks"]] == ["free", "natural"]
    assert (record["eps"], record["num_images"]) == ("8/255", 10)
    assert all((folder / "result.json").read_text() == "kept" for folder in runs)
    assert not (natural / "plots").exists()
    assert capsys.readouterr().out.count("wrote ") == 4


def test_a_surface_is_the_loss_at_each_point(tmp_path):
    own = subject(tmp_path)
    sample = sample_of(own.network, 2)
    surfaces = loss_surface(own, sample, THREAT, seed=3)
    generator = torch.Generator().manual_seed(3)
    random = torch.empty_like(sample.images).normal_(generator=generator).sign()
    eps = 8 / 255
    for surface, image, label, signs in zip(
        surfaces, sample.images, sample.labels, random, strict=True
    ):
        x = image[None].requires_grad_()
        F.cross_entropy(own.network(x), label[None]).backward()
        for i, j in ((0, 0), (GRID // 2, GRID // 2), (GRID - 1, 3)):
            u, v = (2 * k / (GRID - 1) - 1 for k in (i, j))
            point = (image + eps * (u * x.grad[0].sign() + v * signs)).clamp(0, 1)
            expected = F.cross_entropy(own.network(point[None]), label[None])
            assert surface[i, j].item() == pytest.approx(expected.item(), rel=1e-4)


def test_directions_in_l2_are_as_long_as_the_radius():
    gradient = torch.full((2, 3, 4, 4), 1e-30)
    for direction in ball_directions(gradient, L2, torch.Generator().manual_seed(0)):
        assert direction.flatten(1).norm(dim=1).tolist() == pytest.approx([128 / 255] * 2)
    ascent, _ = ball_directions(torch.zeros(1, 3, 4, 4), L2, torch.Generator())
    assert ascent.abs().max() == 0


def test_saliency_is_clipped_at_three_deviations():
    gradient = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    gradient[0] *= 1e-9
    gradient[1, 0, 0, 0] = 50
    shown = visible(gradient)
    assert shown[1, 0, 0, 0] == 1
    for image, picture in zip(gradient, shown, strict=True):
        expected = 0.5 + image / (6 * image.std())
        torch.testing.assert_close(picture, expected.clamp(0, 1))
    assert visible(torch.zeros(1, 3, 4, 4)).unique().tolist() == [0.5]


def test_curves_fall_and_say_what_they_are_of(tmp_path):
    own = subject(tmp_path)
    sample = sample_of(own.network, 12)
    for threat in (THREAT, L2):
        curve = measure(own, sample, threat, seed=0)
        over_eps = list(curve.over_eps.values())
        assert over_eps[0] == 8 / 12  # every third label is another
        assert over_eps == sorted(over_eps, reverse=True)
        assert over_eps[-1] == 0
        assert list(curve.over_steps) == list(STEPS)
        assert curve.over_steps[1] >= curve.over_steps[100] >= curve.over_eps[2 * threat.eps.levels]
        assert curve.has_settled
    (written,) = curves_record([curve], [own], L2, 12, 0)["networks"]
    assert written["over_eps"][0] == {
        "eps": "0/255",
        "steps": 20,
        "accuracy": 8 / 12,
        "low": 0.3906,
        "high": 0.8619,
    }
    assert [point["step"] for point in written["over_steps"]][:2] == ["128/255", "128/255"]


class FoolsAfter(nn.Module):
    """Its gradient leads nowhere for many steps: a stand-in for masked gradients."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, pixels):
        self.calls += 1
        sign = -1.0 if self.calls > 140 else 1.0
        first = 1 + (0 * pixels).sum((1, 2, 3))
        return torch.stack([sign * first, 0 * first], 1)


def test_a_curve_that_keeps_falling_is_named(tmp_path):
    run = saved(tmp_path)
    sample = Sample(torch.rand(20, 3, 4, 4), torch.zeros(20, dtype=torch.long), ["a", "b"], 20)
    far = ThreatModel(Perturbation.parse("255/255"), Perturbation.parse("8/255"))
    curve = measure(Subject("masked", run, FoolsAfter()), sample, far, seed=0)
    assert isinstance(curve, Curve)
    assert curve.over_steps[20] == 1
    assert curve.over_steps[100] == 0
    assert not curve.has_settled


def test_images_that_all_networks_know_are_chosen(tmp_path):
    subjects = [subject(tmp_path), subject(tmp_path, label="again")]
    sample = sample_of(subjects[0].network, 9)
    chosen = choose(sample, subjects, 3)
    assert chosen.images.equal(sample.images[[0, 3, 7]])  # of 0, 1, 3, 4, 6, 7
    assert len(choose(sample, subjects, 8).labels) == 8
    assert len(choose(sample, subjects, 50).labels) == 9


def test_input_gradient_is_each_images_own(tmp_path):
    own = subject(tmp_path)
    sample = sample_of(own.network, 6)
    alone = [input_gradient(own.network, sample.rows(torch.tensor([row]))) for row in range(6)]
    torch.testing.assert_close(input_gradient(own.network, sample), torch.cat(alone))


@pytest.mark.parametrize(
    ("eps", "norm", "large"),
    [("4/255", "linf", "32/255"), ("32/255", "linf", "64/255"), ("200/255", "linf", "255/255"),
     ("128/255", "l2", "640/255")],
)  # fmt: skip
def test_the_large_radius(eps, norm, large):
    kind = L2ThreatModel if norm == "l2" else ThreatModel
    threat = large_threat(kind(Perturbation.parse(eps), Perturbation.parse("1/255")))
    assert str(threat.eps) == large
    assert threat.step.levels * 30 >= 2 * threat.eps.levels


def test_labels_are_methods_or_folders(tmp_path):
    free, other = saved(tmp_path / "free"), saved(tmp_path / "other", method="natural", m=1)
    device = torch.device("cpu")
    assert [s.label for s in line_up([free, other], device)] == ["free m=4", "natural"]
    again = saved(tmp_path / "again")
    assert [s.label for s in line_up([free, again], device)] == ["free", "again"]


def test_mistakes_are_one_line(runs, tmp_path, monkeypatch):
    free, _, cifar = runs
    with pytest.raises(UserError, match="RUN: give a run's folder"):
        draw_pictures([])
    with pytest.raises(UserError, match="--eval-images 0"):
        draw_pictures([free], num_images=0)
    with pytest.raises(UserError, match=r"cifar: its --data x is not the .* of .*free; pictures"):
        draw_pictures([free, cifar], num_images=4)
    with pytest.raises(UserError, match="5 runs; at most 4"):
        draw_pictures([free] * 5, num_images=4)
    assert not (free / "plots").exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match="nowhere: not a run's folder"):
        draw_pictures([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"--checkpoint .*free/checkpoints/.*: no such file"):
        draw_pictures([free])
    monkeypatch.setenv("RANK", "1")
    assert draw_pictures([free]) == []


def test_the_script_takes_several_runs(repository, monkeypatch):
    path = repository / "launch" / "pictures.py"
    spec = importlib.util.spec_from_file_location("pictures_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    asked = []
    monkeypatch.setattr(script, "draw_pictures", lambda run, **flags: asked.append((run, flags)))
    monkeypatch.setattr(script, "refresh_page", lambda run: asked.append(run))
    monkeypatch.setattr("sys.argv", ["pictures.py", "a", "b", "--eval-images", "9"])
    assert script.run_tool(script.main) == 0
    assert asked == [(["a", "b"], {"checkpoint": "last", "num_images": 9}), "a"]
