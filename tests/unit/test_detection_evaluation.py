"""Detectors evaluated: an oracle that reads its answer from the pixels, kills, ranks, PGD."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixed_batches import finished_run
from torch import nn
from torch.nn import functional as F

from coco_files import write_coco
from freeadv_fast.cli.evaluate import EvaluateFlags, run_evaluation
from freeadv_fast.config.attack import Attack
from freeadv_fast.config.file import load_config
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import L2ThreatModel, Perturbation, ThreatModel
from freeadv_fast.data.build import build_val_loader
from freeadv_fast.data.coco.annotations import read_annotations
from freeadv_fast.data.loader import Batch
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.autoattack.ledger import forget
from freeadv_fast.evaluation.detection import evaluate as evaluation
from freeadv_fast.evaluation.detection.attack import parse_attacks, perturb
from freeadv_fast.evaluation.detection.average_precision import average_precision
from freeadv_fast.evaluation.detection.corruptions import (
    CORRUPTIONS,
    is_benchmark,
    mean_precision,
    parse_corruptions,
    relative_precision,
)
from freeadv_fast.evaluation.detection.evaluate import DetectionEvaluation, evaluate_detector
from freeadv_fast.evaluation.detection.ledger import digest_of
from freeadv_fast.evaluation.detection.predict import (
    PixelDetector,
    in_halves,
    in_stored_pixels,
    on_own_canvases,
)
from freeadv_fast.evaluation.evaluate import eval_mode
from freeadv_fast.evaluation.subject import evaluate as evaluate_subject
from freeadv_fast.models.retinanet import DETECTORS, build_detector
from freeadv_fast.runs.export.again import export_run
from freeadv_fast.runs.export.detector import export_detector
from freeadv_fast.runs.log import save_config
from freeadv_fast.runs.saved import load_run
from freeadv_fast.step.objects import NO_OBJECT, Objects
from freeadv_fast.training import dry_run, train

MEAN, STD = (0.5, 0.4, 0.6), (0.2, 0.25, 0.3)
THREAT = ThreatModel(Perturbation.parse("4/255"), Perturbation.parse("1/255"))
# Images are seen in another size than they are stored, height and width.
SCALE, CANVAS = np.array([1.25, 0.75]), (88, 56)
ROW_STEP = 20
# The detector for a CPU.
TOY = next(name for name in DETECTORS if name.endswith("_64"))
# What no run says.
OTHERS = {"data": "digits", "eps": "4/255"}


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    folder = write_coco(tmp_path_factory.mktemp("coco"), num_images=9)
    return read_annotations(str(folder), "val")


class AnswerLoader:
    """Images that say which row they are (red), and how corrupted (green); padding is white."""

    canvases = np.array([(64, 56), CANVAS])

    def __init__(self, annotations, parts=(4, 0, 5), first=0, severity=0, made=None):
        self.annotations, self.severity = annotations, severity
        self.made = [] if made is None else made
        self.parts, self.first, self.num_batches = parts, first, len(parts)
        self.sizes = np.ceil(annotations.sizes * SCALE).astype(int)

    def corrupted(self, name, severity):
        return AnswerLoader(
            self.annotations, self.parts, self.first, severity + 10 * (name == "fog"), self.made
        )

    def epoch(self, epoch, start=0):
        self.made.append(self.severity)
        row = self.first
        for size in self.parts:
            yield self.batch(range(row, row + size))
            row += size

    def batch(self, rows):
        seen = self.sizes[list(rows)]
        images = torch.full((len(rows), *CANVAS, 3), 255, dtype=torch.uint8)
        capacity = self.annotations.capacity
        boxes = torch.zeros(len(rows), capacity, 4)
        classes = torch.full((len(rows), capacity), NO_OBJECT)
        for slot, (row, (height, width)) in enumerate(zip(rows, seen, strict=True)):
            colour = torch.tensor([ROW_STEP * row, ROW_STEP * self.severity // 2, 90])
            images[slot, :height, :width] = colour.to(torch.uint8)
            count = len(self.annotations.labels[row])
            stored = self.annotations.sizes[row]
            scale = np.array([width / stored[1], height / stored[0]] * 2)
            boxes[slot, :count] = torch.from_numpy(self.annotations.boxes[row] * scale)
            classes[slot, :count] = torch.from_numpy(self.annotations.labels[row])
        targets = Objects(torch.from_numpy(seen), boxes, classes).packed()
        return Batch(images, targets, len(rows), torch.tensor(list(rows), dtype=torch.int64))


class Oracle(nn.Module):
    """Knows where everything is; in images that say so it is as many pixels off."""

    def __init__(self, annotations, dies_at=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.head = SimpleNamespace(regression_head=SimpleNamespace(_loss_type="l1"))
        self.annotations, self.dies_at, self.padding = annotations, dies_at, []

    def forward(self, x):
        assert not self.training
        assert x.dtype == torch.float32
        pixels = [x[:, c, 0, 0] * STD[c] + MEAN[c] for c in (0, 1)]
        rows, severities = ((255 * p).round().long() for p in pixels)
        severities = severities * 2 // ROW_STEP
        if self.dies_at in severities.tolist():
            raise KeyboardInterrupt
        self.padding.append(x[:, :, -1, -1].abs().max().item())
        return rows // ROW_STEP, severities

    def predictions(self, outputs, sizes):
        found = []
        for row, severity, size in zip(*outputs, sizes, strict=True):
            scale = size.flip(0).repeat(2) / torch.from_numpy(
                self.annotations.sizes[row][[1, 0, 1, 0]]
            )
            boxes = torch.from_numpy(self.annotations.boxes[row]) + 0.7 * (severity % 10)
            labels = torch.from_numpy(self.annotations.labels[row])
            found.append({"boxes": boxes * scale, "scores": 0.9 + 0 * labels, "labels": labels})
        return found


def measured_by(annotations, corruptions=(), oracle=None, loader=None, world=None, folder=None):
    return evaluate_detector(
        oracle or Oracle(annotations),
        loader or AnswerLoader(annotations),
        [],
        THREAT,
        parse_corruptions(corruptions),
        world=world or World(0, 1, torch.device("cpu")),
        mean=MEAN,
        std=STD,
        progress=False,
        folder=folder,
    )


def test_who_knows_everything_scores_one(annotations):
    """Boxes come back in stored pixels, labels as category ids; padding is 0 to the network."""
    oracle = Oracle(annotations)
    oracle.train()
    measured = measured_by(annotations, oracle=oracle)
    assert measured.clean["AP"] == pytest.approx(1, abs=1e-6)
    assert measured.clean["APl"] is None
    assert measured.per_class == pytest.approx({"red": 1, "green": 1, "blue": 1}, abs=1e-6)
    assert (measured.num_images, measured.corruptions, measured.attacks) == (9, {}, {})
    assert (measured.mean_corrupted, measured.relative) == (None, None)
    assert oracle.padding == [0] * 4
    assert oracle.training
    assert oracle.weight.requires_grad


def test_shifted_boxes_score_less_and_means_are_of_them(annotations):
    measured = measured_by(annotations, ["fog", "snow-2"])
    fog, snow = measured.corruptions["fog"], measured.corruptions["snow"]
    assert list(measured.corruptions) == ["snow", "fog"]
    assert list(fog) == [1, 2, 3, 4, 5]
    assert snow == {2: fog[2]}
    assert 1 > fog[1] > fog[2] > fog[3] > fog[4] > fog[5] > 0
    assert measured.mean_corrupted == pytest.approx((sum(fog.values()) / 5 + fog[2]) / 2)
    assert measured.relative == pytest.approx(measured.mean_corrupted / measured.clean["AP"])
    record = json.loads(json.dumps(measured.record()))
    assert record["corruptions"]["snow"] == {"2": fog[2]}
    assert record["mean_corrupted"] == measured.mean_corrupted
    assert record["clean"] == measured.clean
    assert record["is_benchmark"] is False


def test_a_killed_evaluation_goes_on(annotations, tmp_path):
    """What is done is not done again; other weights begin anew."""
    names = ["snow-1", "snow-2", "snow-3", "fog-1"]
    whole = measured_by(annotations, names)
    dying, loader = Oracle(annotations, dies_at=3), AnswerLoader(annotations)
    with pytest.raises(KeyboardInterrupt):
        measured_by(annotations, names, oracle=dying, loader=loader, folder=tmp_path)
    assert loader.made == [0, 1, 2, 3]
    loader = AnswerLoader(annotations)
    resumed = measured_by(annotations, names, loader=loader, folder=tmp_path)
    assert loader.made == [0, 3, 11]
    assert resumed.corruptions == whole.corruptions
    other, loader = Oracle(annotations), AnswerLoader(annotations)
    other.weight.data += 1
    measured_by(annotations, names, oracle=other, loader=loader, folder=tmp_path)
    assert loader.made == [0, 1, 2, 3, 11]
    some = AnswerLoader(annotations, parts=(4,))
    measured_by(annotations, names, loader=some, folder=tmp_path)
    assert some.made == [0, 1, 2, 3, 11]
    assert len(list(tmp_path.iterdir())) == 3
    forget(resumed.ledgers)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_ledger_is_of_these_files_seen_in_this_size(annotations):
    def digest(loader):
        return digest_of(Oracle(annotations), MEAN, STD, loader, [1, 2])

    whole = digest(AnswerLoader(annotations))
    assert digest(AnswerLoader(annotations, parts=(2, 1), first=3)) == whole  # another rank's
    others = AnswerLoader(dataclasses.replace(annotations, num_bytes=annotations.num_bytes + 1))
    larger, wider = AnswerLoader(annotations), AnswerLoader(annotations)
    larger.sizes, wider.canvases = larger.sizes + 1, wider.canvases + 32
    assert len({whole, *map(digest, (others, larger, wider))}) == 4


@dataclasses.dataclass(frozen=True)
class Together(World):
    """Ranks as threads of this process."""

    shared: dict = dataclasses.field(default_factory=dict)
    barrier_: threading.Barrier | None = None

    def together(self, work):
        return work()

    def gather_on_host(self, value):
        self.shared[self.rank] = value
        self.barrier_.wait()
        values = [self.shared[rank] for rank in range(self.size)] if self.is_main else []
        self.barrier_.wait()
        return values

    def on_main(self, work):
        if self.is_main:
            self.shared["main"] = work()
        self.barrier_.wait()
        value = copy.deepcopy(self.shared["main"])
        self.barrier_.wait()
        return value


def test_two_shares_come_to_what_one_does(annotations):
    """Also where both have an image; every rank has the numbers."""
    barrier, shared, results = threading.Barrier(2, timeout=30), {}, [None, None]
    loaders = [
        AnswerLoader(annotations, parts=(3, 2)),
        AnswerLoader(annotations, parts=(2, 3), first=4),
    ]

    def work(rank):
        world = Together(rank, 2, torch.device("cpu"), shared=shared, barrier_=barrier)
        results[rank] = measured_by(annotations, ["fog-4"], loader=loaders[rank], world=world)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = measured_by(annotations, ["fog-4"])
    assert 0 < alone.corruptions["fog"][4] < 1
    for result in results:
        assert dataclasses.replace(result, seconds=alone.seconds) == alone


def test_targets_of_the_loader_are_found_in_stored_pixels(run_folder, world):
    """What the loader says of the objects it shows, taken for predictions, scores one."""
    loader, found = build_val_loader(load_config(run_folder / "config.yaml"), world, None), {}
    for batch in loader.epoch(0):
        predictions = [
            {"boxes": boxes[kept], "labels": classes[kept], "scores": torch.ones(int(kept.sum()))}
            for boxes, classes in zip(*Objects.of(batch.labels)[1:], strict=True)
            for kept in [classes != NO_OBJECT]
        ]
        found |= in_stored_pixels(predictions, batch, loader.annotations)
    assert len(found) == 6
    numbers = average_precision(loader.annotations.record, found).numbers
    assert numbers["AP"] == pytest.approx(1, abs=1e-6)


def test_an_image_is_seen_alike_whatever_came_along(annotations):
    """On the smallest canvas that holds it, of those that the loader knows."""
    loader = AnswerLoader(annotations)
    alone = [loader.batch([row]) for row in range(4)]
    together = list(on_own_canvases([loader.batch(range(4)), loader.batch([])], loader.canvases))
    assert [part.indices.tolist() for part in together] == [[0, 2], [1, 3]]
    assert [tuple(part.images.shape[1:3]) for part in together] == [(64, 56), CANVAS]
    for part in together:
        height, width = part.images.shape[1:3]
        for slot, row in enumerate(part.indices.tolist()):
            assert torch.equal(part.images[slot], alone[row].images[0, :height, :width])
            assert torch.equal(part.labels[slot], alone[row].labels[0])


def test_short_memory_halves_a_minibatch(annotations):
    """Down to one image, of which a half cannot be made."""
    loader, asked = AnswerLoader(annotations), []

    def detect_in(batch, most=1):
        asked.append(batch.indices.tolist())
        if len(batch.labels) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {int(batch.indices[0]): "found"}

    found = in_halves(loader.batch(range(3)), detect_in)
    assert sorted(found) == [0, 1, 2]
    assert asked == [[0, 1, 2], [0], [1, 2], [1], [2]]
    with pytest.raises(torch.OutOfMemoryError):
        in_halves(loader.batch(range(3)), functools.partial(detect_in, most=0))


def test_no_images_is_an_error(annotations):
    with pytest.raises(ValueError, match="no images to evaluate"):
        measured_by(annotations, loader=AnswerLoader(annotations, parts=()))


def test_means_of_hand_made_numbers():
    """Equations 2 and 3: severities first, so that a corruption of one weighs as one of five."""
    precisions = {"fog": {1: 0.4, 2: 0.2}, "snow": {3: 0.1}}
    assert mean_precision(precisions) == pytest.approx((0.3 + 0.1) / 2)
    assert relative_precision(0.2, 0.4) == pytest.approx(0.5)
    assert (mean_precision({}), relative_precision(None, 0.4)) == (None, None)
    assert mean_precision({"fog": {1: None}}) is None
    assert relative_precision(0.2, 0.0) is None
    full = {name: dict.fromkeys(range(1, 6), 0.2) for name in CORRUPTIONS}
    assert is_benchmark(full)
    assert not is_benchmark(full | {"fog": {1: 0.2}})
    assert not is_benchmark(precisions)


def test_corruptions_by_name():
    assert parse_corruptions([]) == parse_corruptions(["none"]) == {}
    assert parse_corruptions(["all"]) == dict.fromkeys(CORRUPTIONS, (1, 2, 3, 4, 5))
    assert parse_corruptions(["all-3", "fog-1"])["fog"] == (1, 3)
    assert list(parse_corruptions(["fog", "shot_noise-5"])) == ["shot_noise", "fog"]
    with pytest.raises(UserError, match=r"--eval-corruptions frog: .*did you mean fog\?"):
        parse_corruptions(["frog"])
    with pytest.raises(UserError, match="--corruptions fog-6: no such corruption"):
        parse_corruptions(["fog-6"], "--corruptions")
    with pytest.raises(UserError, match="--corruptions : no such corruption"):
        parse_corruptions([""], "--corruptions")


def test_corruptions_are_those_of_the_package():
    package = pytest.importorskip("imagecorruptions")
    assert tuple(package.get_corruption_names()) == CORRUPTIONS


def test_the_table_says_all(annotations):
    numbers = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), 0.358)
    attacked = {"pgd-10": numbers | {"AP": 0.012, "APs": None}}
    rows = {"fog": {1: 0.3, 2: 0.2}}
    measured = DetectionEvaluation(numbers, {}, attacked, rows, 5000, 1.0)
    lines = measured.lines("1/255")
    assert [line.split()[0] for line in lines[2:4]] == ["none", "pgd-10"]
    assert "5,000" in lines[2]
    assert "35.8%" in lines[2]
    assert lines[3].split()[1:5] == ["1/255", "5,000", "1.2%", "35.8%"]
    assert lines[-2].split() == ["fog", "30.0%", "20.0%", "25.0%"]
    assert lines[-1] == (
        "mean 25.0%, 69.8% of the clean AP, over 2 of the 75 pairs of mPC (5,000 images)"
    )
    full = {name: dict.fromkeys(range(1, 6), 0.179) for name in CORRUPTIONS}
    whole = DetectionEvaluation(numbers, {}, {}, full, 5000, 1.0)
    lines = whole.lines("1/255")
    assert whole.record()["is_benchmark"] is True
    assert lines[-1].endswith("rPC 50.0% of the clean AP (5,000 images)")
    assert len(DetectionEvaluation(numbers, {}, {}, {}, 5000, 1.0).lines("1/255")) == 3


@pytest.mark.parametrize(
    ("name", "norm", "complaint"),
    [
        ("cw-10", "linf", "fools classifiers; a detector takes pgd-STEPS"),
        ("autoattack", "linf", "fools classifiers"),
        ("pgd-10-3", "linf", "use pgd-10"),
        ("pgd-10", "l2", "in linf, not in l2"),
    ],
)
def test_attacks_that_detectors_do_not_take(name, norm, complaint):
    ball = THREAT if norm == "linf" else L2ThreatModel(THREAT.eps, THREAT.step)
    with pytest.raises(UserError, match=f"--attacks {name}: .*{complaint}"):
        parse_attacks([name], ball)


@pytest.fixture(scope="module")
def detector():
    """Fresh weights that say something: class biases as in the middle of training."""
    torch.manual_seed(1)
    detector = build_detector("retinanet_resnet10_fpn_64", 3)
    nn.init.constant_(detector.head.classification_head.cls_logits.bias, -1.0)
    return detector


@pytest.fixture(scope="module")
def noisy_batch(annotations):
    batch = AnswerLoader(annotations).batch(range(2, 4))
    noise = torch.randint(0, 256, batch.images.shape, generator=torch.Generator().manual_seed(2))
    return batch._replace(images=noise.to(torch.uint8))


def loss_of(detector, images, targets):
    """torchvision's own loss, image by image."""
    total = 0
    for image, packed in zip(images, targets, strict=True):
        size, boxes, classes = Objects.of(packed[None])
        height, width = size[0].tolist()
        mean, std = (torch.tensor(v)[:, None, None].double() for v in (MEAN, STD))
        normalised = (image[:, :height, :width] - mean) / std
        padding = (0, image.shape[2] - width, 0, image.shape[1] - height)
        outputs = detector(F.pad(normalised, padding)[None])
        head = {"cls_logits": outputs.class_logits, "bbox_regression": outputs.box_deltas}
        kept = classes[0] != NO_OBJECT
        target = {"boxes": boxes[0][kept], "labels": classes[0][kept]}
        total += sum(detector.compute_loss([target], head, [outputs.anchors]).values())
    return total


def test_pgd_equals_a_slow_loop_and_moves_no_padding(detector, noisy_batch):
    """In float64, where a batch of two rounds as two batches of one."""
    detector = copy.deepcopy(detector).double()
    images = noisy_batch.images.permute(0, 3, 1, 2).double() / 255
    targets, eps, step = noisy_batch.labels, float(THREAT.eps), float(THREAT.step)
    generator = torch.Generator().manual_seed((5 * 2654435761 + 2) % 2**32)
    noise = torch.empty_like(images).uniform_(-eps, eps, generator=generator)
    is_image = torch.zeros(images.shape, dtype=torch.bool)
    for row, (height, width) in enumerate(Objects.of(targets).sizes.tolist()):
        is_image[row, :, :height, :width] = True
    expected = (images + noise * is_image).clamp(0, 1)
    network = PixelDetector(detector, MEAN, STD, torch.device("cpu"))
    network.normalize.double()
    with eval_mode(detector):
        for _ in range(2):
            expected.requires_grad_()
            (gradient,) = torch.autograd.grad(loss_of(detector, expected, targets), expected)
            moved = expected.detach() + step * gradient.sign()
            expected = torch.minimum(torch.maximum(moved, images - eps), images + eps).clamp(0, 1)
        points = perturb(
            network, images, noisy_batch, attack=Attack("pgd", 2), threat=THREAT, seed=5
        )
        start = perturb(
            network, images, noisy_batch, attack=Attack("pgd", 0), threat=THREAT, seed=5
        )
        before, after = (network.loss_sum(x, targets).item() for x in (start, points))
    assert torch.equal(points[~is_image], images[~is_image])
    assert (points - images).abs().max() <= eps + 1e-6
    differing = (points - expected).abs() > 1e-6
    assert differing.float().mean() < 1e-3  # signs of gradients that vanish
    assert after > before
    assert (points != start)[is_image].float().mean() > 0.5


def test_precision_under_attack_is_that_of_the_attacked_images(annotations, monkeypatch):
    """Points that look like snow of severity 3 score as it does."""
    asked = []

    def moved(network, images, batch, *, attack, threat, seed):
        asked.append((str(attack), threat, seed, len(batch.labels)))
        green = torch.tensor([0, 3 * ROW_STEP // 2 / 255, 0])
        return images + green[:, None, None]

    monkeypatch.setattr(evaluation, "perturb", moved)
    measured = evaluate_detector(
        Oracle(annotations), AnswerLoader(annotations), ["pgd-2"], THREAT, {"snow": (3,)},
        world=World(0, 1, torch.device("cpu")), mean=MEAN, std=STD, seed=7, progress=False,
    )  # fmt: skip
    assert asked == [("pgd-2", THREAT, 7, count) for count in (2, 2, 3, 2)]
    assert measured.attacks["pgd-2"]["AP"] == measured.corruptions["snow"][3] < 0.9
    assert set(measured.attacks["pgd-2"]) == set(measured.clean)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What a run that trained a detector leaves behind; its fresh weights find nothing."""
    root = tmp_path_factory.mktemp("detecting")
    data, folder = write_coco(root / "coco", num_images=6), root / "run"
    (folder / "checkpoints").mkdir(parents=True)
    config = TrainConfig(
        method="natural", m=1, data=f"coco:{data}", arch="retinanet_resnet10_fpn_64",
        image_size=32, augment="flip", workers=0, batch_size=4, eval_attacks=("pgd-2",),
        eval_corruptions=("all",),
    )  # fmt: skip
    save_config(config, folder / "config.yaml")
    classes = ["red", "green", "blue"]
    detector = build_detector(config.arch, len(classes))
    state = {"model": detector.state_dict(), "classes": classes}
    torch.save(state, folder / "checkpoints" / "last.pt")
    return folder


def test_a_run_is_evaluated_from_its_folder(run_folder, capsys):
    """Corruptions only where they are asked for: all of them take hours."""
    plain = evaluate_subject(run_folder, num_images=3)
    assert (plain.num_images, list(plain.attacks), plain.corruptions) == (3, ["pgd-2"], {})
    measured = evaluate_subject(
        run_folder, attacks="pgd-1", corruptions="fog-3,snow-1", eps="8/255"
    )
    assert measured.num_images == 6
    assert [list(row) for row in measured.corruptions.values()] == [[1], [3]]
    paths = sorted(run_folder.glob("evaluation-*.json"))
    assert [path.name.split("-eps")[0] for path in paths] == [
        "evaluation-last-pgd-1", "evaluation-last-pgd-2",
    ]  # fmt: skip
    assert "-corruptions2-" in paths[0].name
    record = json.loads(paths[0].read_text())
    assert record["detection"] == json.loads(json.dumps(measured.record()))
    assert (record["clean_accuracy"], record["robust_accuracy"]) == (None, {})
    assert (record["eps"], record["arch"]) == ("8/255", "retinanet_resnet10_fpn_64")
    assert not list(run_folder.glob("corruptions-*"))
    printed = capsys.readouterr().out
    assert "no GPU: evaluating on at most 400 images" in printed
    assert "evaluate: fog: AP" in printed
    assert "over 2 of the 75 pairs of mPC" in printed


def test_an_export_made_again_keeps_the_data_sets_ids(run_folder, tmp_path):
    """A run's folder does not say them, but for its first export."""

    def ids_of(folder):
        return json.loads((folder / "config.json").read_text())["category_ids"]

    assert ids_of(export_run(run_folder)) is None
    run = load_run(run_folder)
    first = run_folder / "export"
    export_detector(run.detector, first, config=run.config, classes=run.classes, record=None,
                    category_ids=[1, 3, 7])  # fmt: skip
    assert ids_of(export_run(run_folder)) == ids_of(first) == [1, 3, 7]
    assert ids_of(export_run(run_folder, tmp_path / "elsewhere")) == [1, 3, 7]


@pytest.mark.parametrize("corruption", ["foq", "fog"])
def test_what_cannot_be_measured_is_told_before_training(run_folder, tmp_path, corruption):
    """In a dry run as well: a misspelt corruption, and images too small for one."""
    pytest.importorskip("imagecorruptions")
    data = write_coco(tmp_path / "coco", num_images=4, sizes=((31, 64), (64, 64)))
    config = dataclasses.replace(
        load_config(run_folder / "config.yaml"), data=f"coco:{data}", batch_size=2,
        eval_corruptions=(corruption,), output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    complaint = {"foq": "did you mean fog", "fog": "000000.jpg has 64 x 31 pixels, and the corr"}
    for start in (dry_run, train):
        with pytest.raises(
            UserError, match=f"--eval-corruptions {corruption}: .*{complaint[corruption]}"
        ):
            start(config)


@pytest.mark.parametrize(
    ("chosen", "complaint"),
    [
        ({"attacks": "pgd-5-2"}, "--attacks pgd-5-2: .*use pgd-5"),
        ({"corruptions": "fogg"}, "--corruptions fogg: .*did you mean fog"),
        ({"preprocessing": "Res224"}, "--preprocessing: a detector sees whole images"),
        ({"norm": "l2"}, "--norm: a run's config says it"),
    ],
)
def test_what_a_detector_does_not_read(run_folder, chosen, complaint):
    with pytest.raises(UserError, match=complaint):
        evaluate_subject(run_folder, **chosen)


def test_classifiers_are_corrupted_elsewhere(tmp_path):
    run = finished_run(tmp_path / "run")
    for subject in (run, nn.Identity()):
        with pytest.raises(UserError, match="--corruptions: .*launch/robustness.py"):
            evaluate_subject(subject, corruptions="all", **({} if subject is run else OTHERS))
    with pytest.raises(UserError, match="--corruptions: an audit does not read it"):
        run_evaluation(EvaluateFlags(str(run), audit=True, corruptions="all"))
