"""A detector's page and pictures say what its files say; detectors are compared with detectors."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from freeadv_fast.config.file import config_to_yaml
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.data.loader import Batch
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.detection.corruptions import CORRUPTIONS
from freeadv_fast.evaluation.detection.evaluate import DetectionEvaluation
from freeadv_fast.evaluation.page import detection_comparison, write_comparison, write_page
from freeadv_fast.evaluation.pictures import boxes, panels
from freeadv_fast.evaluation.pictures.corruptions import plot_corruptions
from freeadv_fast.evaluation.pictures.panels import Panel, plot_boxes
from freeadv_fast.evaluation.report import plot_training
from freeadv_fast.evaluation.sample import lone_world
from freeadv_fast.models.retinanet import build_detector
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.step.objects import Objects

NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl",
           "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")  # fmt: skip


def numbers(ap):
    """COCO's twelve; nothing is large."""
    return dict.fromkeys(NUMBERS, ap) | {"AP": ap, "AP50": ap + 0.1, "APl": None, "ARl": None}


def detection(ap=0.612):
    return {
        "clean": numbers(ap),
        "per_class": {"circle": ap - 0.1, "square <b>": ap + 0.1, "star": None},
        "attacks": {"pgd-10": numbers(0.214)},
        "corruptions": {
            "gaussian_noise": {"1": 0.5, "3": 0.3},
            "jpeg_compression": {"1": 0.6, "3": 0.2},
        },
        "mean_corrupted": 0.4,
        "relative": 0.4 / ap,
        "is_benchmark": False,
        "num_images": 200,
        "seconds": 12.0,
        "seed": 0,
    }


def under_coco_c(severities=(1, 2, 3, 4, 5)):
    """AP under all corruptions; under fog at all severities though others be fewer."""
    row = {str(severity): 0.5 - severity / 20 for severity in severities}
    return dict.fromkeys(CORRUPTIONS, row) | {"fog": dict.fromkeys("12345", 0.35)}


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
    """Makes the folder of a run that trained a detector."""

    def make(name="run", recipe="shapes-fast-advprop", **fields):
        folder, config = tmp_path / name, RECIPES[recipe]
        folder.mkdir()
        (folder / "config.yaml").write_text(config_to_yaml(config))
        fixture = repository / "tests" / "fixtures" / "runs" / "finished" / "result.json"
        result = json.loads(fixture.read_text()) | {
            "recipe": recipe, "method": config.method, "dataset": "shapes", "arch": config.arch,
            "m": config.m, "eps": str(config.eps), "attack_step": str(config.eval_step),
            "clean_accuracy": None, "clean_top5_accuracy": None, "robust_accuracy": {},
            "num_eval_images": 200, "holdout_images": 0, "best_epoch": -1, "best": None,
            "attack_passes": 1000, "evaluation_seconds": 2.0, "average": None,
            "detection": detection(),
        }  # fmt: skip
        write(folder / "result.json", result | fields)
        lines = [
            {"passes": 20 * n, "updates": n, "loss": 2 / n, "lr": 0.02, "passes_per_second": 9.0}
            for n in range(1, 9)
        ]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        write(folder / "env.json", {"command": ["python", "launch/coco_retinanet.py"]})
        write(folder / "export" / "config.json", {"class_names": ["circle", "square <b>", "star"]})
        for picture in ("corruptions", "boxes"):
            (folder / "plots").mkdir(exist_ok=True)
            Image.new("RGB", (30, 20)).save(folder / "plots" / f"{picture}.png")
        return folder

    return make


def test_the_page_says_what_the_files_say(finished):
    page = write_page(finished())
    text = text_of(page)
    for said in (
        "Fast AdvProp training of retinanet_resnet10_fpn_64 on synthetic shapes",
        "The last weights reach an average precision (AP) of 61.2% on 200 clean validation images, "
        "40.0% under 2 corruptions (65.4% of it), and 21.4% under the strongest attack that was "
        "made, pgd-10 within 1/255, after 5,588 image passes in 5.8 s on AMD EPYC.",
        "images AP AP50 AP75 small medium large recall "
        "clean 61.2% 71.2% 61.2% 61.2% 61.2% – 61.2% pgd-10 21.4%",
        "class AP square <b> 71.2% circle 51.2% star –",
        "corruption severity 1 severity 3 mean gaussian noise 50.0% 30.0% 40.0% JPEG compression "
        "60.0% 20.0% 40.0% mean under 2 corruptions of the clean AP: 65.4% 40.0%",
        "over 4 of the benchmark's 75 (corruption, severity) pairs and compares with no published",
        "evaluation 25.5% 2.0 s measured: precision at the end",
        "python launch/coco_retinanet.py --config config.yaml --output-dir FOLDER",
        "Training loss of classes and boxes, an image",
        "Radius 1/255 in L∞",
        "Validation images, their objects, and what is found on them",
    ):
        assert said in text, said
    for word in ("Accuracy", "held-out", "Guard", "Wilson", "Something is left out", "rPC"):
        assert word not in text, word
    source = page.read_text()
    assert source.index("plots/boxes.png") < source.index("plots/corruptions.png")
    assert source.count('class="chart"') == 3  # loss, rate, speed
    assert "square <b>" not in source


def test_mpc_is_named_where_it_is_of_the_whole_benchmark_alone(finished):
    whole = detection() | {"corruptions": under_coco_c(), "is_benchmark": True}
    folder = finished(detection=whole)
    write(folder / "evaluation-x.json", {"detection": whole})
    text = text_of(write_page(folder))
    assert "40.0% on corrupted ones (mPC, 65.4% of it)" in text
    assert "mPC rPC, of the clean AP: 65.4% 40.0% As in Michaelis et al. 2019: mPC is" in text
    assert "40.0% mPC; rPC, of the clean AP: 65.4%" in text
    assert "no published" not in text
    part = detection() | {"corruptions": under_coco_c([3])}
    text = text_of(write_page(finished("part", detection=part)))
    assert "40.0% under 15 corruptions (65.4% of it)" in text
    assert "over 19 of the benchmark's 75 (corruption, severity) pairs" in text
    assert "rPC" not in text


def test_averaged_weights_and_the_paper_stand_beside(finished):
    averaged = {"decay": 0.99, "detection": detection(0.7)}
    text = text_of(write_page(finished(average=averaged)))
    assert "clean averaged weights 70.0% 80.0%" in text
    assert "AP under corruption, averaged weights" in text
    recipe = "coco-retinanet50-fast-advprop"
    text = text_of(write_page(finished("coco", recipe, dataset="coco:/data/coco2017")))
    assert "on coco2017" in text
    assert "Paper: Fast AdvProp" in text
    assert "35.8%" in text


def test_a_natural_run_that_nobody_attacked_has_no_radius(finished):
    record = detection() | {"attacks": {}, "corruptions": {}, "mean_corrupted": None}
    folder = finished("natural", "shapes-natural", detection=record | {"relative": None})
    text = text_of(write_page(folder))
    assert "Radius" not in text
    assert "AP under corruption" not in text
    assert "of 61.2% on 200 clean validation images, after 5,588 image passes" in text


def test_later_evaluations_are_shown(finished):
    folder = finished()
    record = {"checkpoint": "last.pt", "eps": "4/255", "dataset": "coco:/elsewhere"}
    write(folder / "evaluation-last-n10.json", record | {"detection": detection(0.55)})
    write(folder / "evaluation-x.json", record | {"detection": {"attacks": 3}})
    text = text_of(write_page(folder))
    assert (
        "clean coco:/elsewhere last – 200 55.0% 40.0% mean under 2 corruptions; of the clean AP: "
        "72.7%"
    ) in text
    assert "pgd-10 coco:/elsewhere last 4/255 200 21.4% –" in text
    assert "evaluation-x.json cannot be read" in text


@pytest.mark.parametrize("wrong", [{}, {"clean": 3}, {"clean": {"AP": "x"}, "corruptions": [1]}])
def test_wrong_values_cost_their_section(finished, wrong):
    folder = finished(detection=wrong)
    assert "Average precision" in text_of(write_page(folder))
    assert "2 runs compared" in text_of(write_comparison([folder, finished("other")]))


def test_detectors_are_compared(finished, tmp_path):
    first = finished("one", detection=detection() | {"mean_corrupted": 0.5, "relative": 0.8})
    second = finished("two", "shapes-natural")
    page = write_comparison([first, second])
    text = text_of(page)
    for said in (
        "Under 2 corruptions one stands highest with a mean AP of 50.0% , with 61.2% on clean "
        "images; two follows with 40.0% .",
        "run AP AP50 AP75 pgd-10 corrupted of clean passes training",
        "compares with no published mPC",
        "200 images 61.2% 71.2% 61.2% 21.4% 50.0% 80.0% 5,588 + 1,000 attack 5.8 s",
        "corruption one two gaussian noise 40.0% 40.0% JPEG compression 40.0% 40.0%",
        "Average precision against cost",
        "Filled: under corruption. Hollow: clean.",
        "method fast-advprop natural",
    ):
        assert said in text, said
    source = page.read_text()
    assert source.count("data:image/png;base64,") == 1
    assert "<title>one: 50.0% under corruption</title>" in source
    assert "rPC" not in text
    other = detection() | {"num_images": 100}
    text = text_of(write_comparison([first, finished("three", detection=other)]))
    assert "their figures do not compare" in text
    assert "stands highest" not in text


def test_a_comparison_says_whose_radius_and_which_mean_it_is_of(finished, monkeypatch):
    monkeypatch.setattr(detection_comparison, "corruption_picture", lambda *_: None)
    whole = detection() | {"corruptions": under_coco_c(), "is_benchmark": True}
    first = finished("one", detection=whole)
    second = finished("two", detection=whole | {"mean_corrupted": 0.3}, eps="4/255")
    text = text_of(write_comparison([first, second]))
    for said in (
        "On corrupted images one stands highest with an mPC of 40.0% ,",
        "run AP AP50 AP75 pgd-10 mPC rPC passes training",
        "Last weights on validation images, which chose nothing, attacked each at its own radius.",
        "retinanet_resnet10_fpn_64; 1/255;",
        "retinanet_resnet10_fpn_64; 4/255;",
    ):
        assert said in text, said
    part = detection() | {"corruptions": under_coco_c([3]), "attacks": {}}
    text = text_of(write_comparison([first, finished("three", detection=part)]))
    assert "AP75 pgd-10 corrupted of clean passes" in text
    assert "stands highest" not in text
    text = text_of(write_comparison([finished(name, detection=part) for name in ("four", "five")]))
    assert "Under 15 corruptions" in text
    assert "radius" not in text


def test_a_mixture_is_refused(finished, tmp_path):
    detector, classifier = finished("one"), finished("two", detection=None, clean_accuracy=0.9)
    with pytest.raises(UserError, match=r"one: of a detector, and .*two of a classifier; compare"):
        write_comparison([classifier, detector])


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be written."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def texts_of(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def panel(random, num_boxes, height=90, width=120, has_scores=True):
    corners = random.uniform(0, 0.7, (num_boxes, 2)) * (width, height)
    far = np.minimum(corners + random.uniform(5, 60, (num_boxes, 2)), (width, height))
    return Panel(
        random.random((height, width, 3), dtype=np.float32),
        np.concatenate([corners, far], 1).astype(np.float32),
        random.integers(0, 4, num_boxes),
        np.sort(random.uniform(0.3, 1, num_boxes))[::-1] if has_scores else None,
    )


def test_boxes_are_drawn_where_they_are_and_labels_hide_none(tmp_path, drawn):
    random = np.random.default_rng(0)
    truth = [panel(random, 1, has_scores=False), panel(random, 4, 120, 60, has_scores=False)]
    found = [panel(random, 0), panel(random, 15, 120, 60)]
    classes = ["person", "$1_$5", "x" * 40, "two\nlines"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        columns = {"truth": truth, "clean": found}
        plot_boxes(columns, classes, tmp_path / "boxes.png", title="what it is")
    (figure,) = drawn
    assert figure.dpi == 150  # at which it is written: letters are not as wide at another
    for axes, own in zip(figure.axes, (truth[0], found[0], truth[1], found[1]), strict=True):
        rectangles = np.array([(*r.get_xy(), r.get_width(), r.get_height())
                               for r in axes.patches]).reshape(-1, 4)  # fmt: skip
        # Pixels of boxes begin at whole numbers, where imshow has their centres.
        expected = own.boxes - 0.5
        assert rectangles[:, :2] == pytest.approx(expected[:, :2], abs=1e-4)
        assert rectangles[:, :2] + rectangles[:, 2:] == pytest.approx(expected[:, 2:], abs=1e-4)
        within = axes.get_window_extent()
        extents = [text.get_window_extent() for text in axes.texts]
        for number, extent in enumerate(extents):
            assert within.x0 <= extent.x0
            assert extent.x1 <= within.x1
            assert within.y0 <= extent.y0
            assert extent.y1 <= within.y1
            assert not any(extent.overlaps(other) for other in extents[:number])
    assert len(figure.axes[0].texts) == 1
    assert 5 <= len(figure.axes[3].texts) <= 15
    words = texts_of(figure)
    assert "$1_$5" in words
    assert any(re.fullmatch(r"x{14}\.\.\. \d\.\d\d", word) for word in words)


def test_a_class_has_a_colour_of_its_own(tmp_path, drawn):
    random = np.random.default_rng(0)
    own = panel(random, 10)._replace(labels=np.arange(10))
    plot_boxes({"x": [own]}, list("abcdefghij"), tmp_path / "x.png", title="")
    (axes,) = drawn[0].axes
    assert len({tuple(rectangle.get_edgecolor()) for rectangle in axes.patches}) == 10


def test_a_label_without_place_is_left_out():
    within = matplotlib.transforms.Bbox.from_bounds(0, 0, 100, 100)
    label = matplotlib.transforms.Bbox.from_bounds(0, 0, 30, 8)
    corners = np.array([[20.0, 30.0], [60.0, 70.0]])
    place = panels.free_place(label, corners, within, [])
    assert place.y0 > 70  # above
    assert panels.free_place(label, corners, within, [within]) is None


def test_bars_are_as_high_as_the_precision(tmp_path, drawn):
    plot_corruptions({"": detection()}, tmp_path / "x.png")
    plot_corruptions(
        {"one": detection(), "$2_$": detection() | {"corruptions": {"gaussian_noise": {"3": 0.1}}}},
        tmp_path / "y.png",
    )
    one, several = (figure.axes[0] for figure in drawn)
    assert [bar.get_height() for bar in one.patches] == pytest.approx([0.5, 0.3, 0.6, 0.2])
    assert [bar.get_height() for bar in several.patches] == pytest.approx([0.3, 0.1])
    words = texts_of(drawn[0])
    assert "AP under 2 corruptions: mean 40.0%, 65.4% of the clean AP" in words
    assert "clean 61.2%" in words
    assert "JPEG compression" in words
    assert "$2_$" in texts_of(drawn[1])
    whole = detection() | {"corruptions": under_coco_c(), "is_benchmark": True}
    plot_corruptions({"": whole}, tmp_path / "z.png")
    assert "AP under corruption: mPC 40.0%, rPC 65.4%" in texts_of(drawn[2])


def test_a_detector_s_curves_have_no_accuracies(tmp_path, drawn):
    lines = [{"passes": n, "loss": 1 / n, "lr": 0.1, "passes_per_second": 3.0} for n in range(1, 5)]
    plot_training(lines, tmp_path / "x.png")
    plot_training([lines[0] | {"train_clean_accuracy": 0.5}], tmp_path / "y.png")
    titles = [[axes.get_title("left") for axes in figure.axes] for figure in drawn]
    assert titles[0] == ["Training loss", "Learning rate", "Speed"]
    assert titles[1] == ["Training loss", "Accuracy", "Learning rate", "Speed"]
    assert all(axes.get_xlabel() for axes in drawn[0].axes)


class FewImages:
    """Four images of 64 x 64, two of them lower, the first without objects."""

    classes = ("a", "b")
    objects = ((-1, -1), (1, -1), (0, -1), (1, -1))

    def __init__(self, level=0, asked=None):
        self.level, self.asked = level, asked if asked is not None else []

    def epoch(self, epoch):
        images = torch.full((4, 64, 64, 3), 100 + self.level, dtype=torch.uint8)
        sizes = torch.tensor([[64, 64], [48, 64], [64, 64], [48, 64]])
        for image, size in zip(images, sizes, strict=True):
            image[size[0] :] = 0
        boxes = torch.tensor([[[8.0, 4.0, 40.0, 44.0], [0, 0, 0, 0]]] * 4)
        targets = Objects(sizes, boxes, torch.tensor(self.objects)).packed()
        yield Batch(images, targets, 4, torch.arange(4))

    def corrupted(self, name, severity):
        self.asked.append((name, severity))
        return FewImages(50, self.asked)


@pytest.fixture(scope="module")
def model():
    """A small detector that finds something."""
    torch.manual_seed(0)
    model = build_detector(RECIPES["shapes-natural"].arch, 2)
    torch.nn.init.zeros_(model.head.classification_head.cls_logits.bias)
    return model


def test_what_is_drawn_is_what_the_detector_is_shown(tmp_path, monkeypatch, model):
    columns, loader = {}, FewImages()
    monkeypatch.setattr(boxes, "plot_boxes", lambda own, *_, **__: columns.update(own))
    config = dataclasses.replace(RECIPES["shapes-fast-advprop"], eps=Perturbation.parse("4/255"))
    severities = {"fog": {1: 0.3, 3: 0.2, 5: 0.1}, "snow": {4: 0.1}, "frost": {2: 0.2}}
    measured = DetectionEvaluation(numbers(0.5), {}, {"pgd-1": numbers(0.1)}, severities, 4, 1.0)
    written = boxes.draw_detection(
        tmp_path, model=model, loader=loader, config=config, evaluation=measured,
        world=lone_world(),
    )  # fmt: skip
    assert [path.name for path in written] == ["corruptions.png", "boxes.png"]
    assert written[0].is_file()
    assert loader.asked == [("fog", 3), ("frost", 2)]
    truth, clean, fog, _, attacked = columns.values()
    assert list(columns)[1:] == [
        "clean", "fog, severity 3", "frost, severity 2", "pgd-1 within 4/255",
    ]  # fmt: skip
    assert [panel.picture.shape for panel in truth] == [(48, 64, 3), (64, 64, 3), (48, 64, 3)]
    assert [panel.labels.tolist() for panel in truth] == [[1], [0], [1]]
    assert truth[0].boxes.tolist() == [[8, 4, 40, 44]]
    assert fog[0].picture == pytest.approx(np.float32(150 / 255))
    moved = np.abs(attacked[0].picture - clean[0].picture)
    assert 1 / 255 < moved.max() <= 4 / 255 + 1e-6
    for own in (*clean, *attacked):
        assert 0 < len(own.boxes) <= boxes.MOST_BOXES
        assert (own.scores >= boxes.LOWEST_SCORE).all()
    assert model.training


def test_images_without_objects_are_drawn(tmp_path, drawn, model):
    loader = FewImages()
    loader.objects = [[-1, -1]] * 4
    config = dataclasses.replace(RECIPES["shapes-natural"], eps=Perturbation.parse("0/255"))
    nothing = dict.fromkeys(NUMBERS)
    measured = DetectionEvaluation(nothing, {"a": None}, {}, {"fog": {3: None}}, 4, 1.0)
    boxes.draw_detection(
        tmp_path, model=model, loader=loader, config=config, evaluation=measured,
        world=lone_world(),
    )  # fmt: skip
    corruptions, pictures = drawn
    assert "AP under 1 corruption" in texts_of(corruptions)
    assert len(pictures.axes) == 4 * len(["truth", "clean", "fog"])
    assert any("AP - on clean images" in text for text in texts_of(pictures))
