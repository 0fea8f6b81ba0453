"""Counts against a slow loop, one image at a time; ranks; what evaluation leaves as it was."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fixed_batches import FixedLoader, finished_run, fixed_val_loader
from torch import nn

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.file import load_config
from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.data.loader import Batch
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation import evaluate as evaluation
from freeadv_fast.evaluation import images
from freeadv_fast.evaluation.attacks import batches_of
from freeadv_fast.evaluation.evaluate import (
    count_images,
    evaluate,
    exact_arithmetic,
    images_at_once,
)
from freeadv_fast.evaluation.subject import evaluate as evaluate_run
from freeadv_fast.runs.export.again import export_run
from freeadv_fast.runs.log import save_config
from freeadv_fast.runs.saved import load_run

MEAN, STD = (0.5, 0.4, 0.6), (0.2, 0.25, 0.3)
THREAT = ThreatModel(Perturbation.parse("2/255"), Perturbation.parse("1/255"))


@pytest.fixture
def network(small_network):
    """In training mode, one layer frozen in eval mode: evaluation must give both back."""
    network = small_network()
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.uniform_(0.2, 0.4)
    network[1].eval()
    return network


def label_by_network(loader, network):
    """Makes most labels the network's own guesses, so that attacks have something to break."""
    inner = nn.Sequential(*network).eval()
    for batch in loader.batches:
        x = batch.images.permute(0, 3, 1, 2) / 255
        x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        with torch.no_grad():
            guesses = inner(x).argmax(1)
        batch.labels[1::2] = guesses[1::2]
    network.train()
    network[1].eval()
    return loader


def slow_counts(network, loader, attack, seed):
    """Algorithm from the definition, image by image: [images, top-1, standing]."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    eps, step = float(THREAT.eps), float(THREAT.step)
    total = torch.zeros(3, dtype=torch.int64)
    modes = [module.training for module in network.modules()]
    network.eval()
    for batch in loader.batches:
        if len(batch.labels) == 0:
            continue
        images = batch.images.permute(0, 3, 1, 2).float() / 255
        generator = torch.Generator().manual_seed(
            (seed * 2654435761 + int(batch.indices[0])) % 2**32
        )
        noise = [
            torch.empty_like(images).uniform_(-eps, eps, generator=generator)
            for _ in range(attack.restarts)
        ]
        for row, (image, label) in enumerate(zip(images, batch.labels, strict=True)):

            def logits_of(x):
                return network(((x - mean) / std)[None])

            is_right = logits_of(image).argmax().item() == label.item()
            total += torch.tensor([1, is_right, 0])
            for draw in noise:
                x = (image + draw[row]).clamp(0, 1)
                for _ in range(attack.steps):
                    x = x.detach().requires_grad_()
                    logits = logits_of(x)
                    if attack.loss == "pgd":
                        loss = F.cross_entropy(logits, label[None])
                    else:
                        others = torch.cat([logits[0, :label], logits[0, label + 1 :]])
                        loss = -(logits[0, label] - others.max()).clamp_min(0)
                    loss.backward()
                    x = x.detach() + step * x.grad.sign()
                    x = torch.minimum(torch.maximum(x, image - eps), image + eps).clamp(0, 1)
                is_right = is_right and logits_of(x).argmax().item() == label.item()
            total[2] += is_right
    for module, was_training in zip(network.modules(), modes, strict=True):
        module.training = was_training
    return total


@pytest.mark.parametrize(
    ("name", "at_once"), [("pgd-4", None), ("pgd-3-3", None), ("cw-4-2", None), ("pgd-3-3", 2)]
)
def test_counts_equal_a_slow_loop(network, world, name, at_once, monkeypatch):
    """With `at_once` as on a GPU: eight images or more in a pool, starts by minibatch as ever."""
    monkeypatch.setattr(evaluation, "images_at_once", lambda batch: at_once)
    loader = label_by_network(FixedLoader([7, 5, 0, 1]), network)
    attack = Attack.parse(name)
    result = evaluate(network, loader, [name], THREAT, world=world, mean=MEAN, std=STD, seed=3)
    num_images, top1, standing = slow_counts(network, loader, attack, seed=3).tolist()
    assert 0 < standing < top1 < num_images == result.num_images == 13
    assert result.clean_accuracy == top1 / 13
    assert result.robust_accuracy == {name: standing / 13}
    assert result.clean_top5 is None
    assert result.seconds > 0


def test_batches_have_few_sizes():
    """What is left over comes in the smallest fraction that holds it, filled up with its first."""
    rows = torch.arange(29) * 10
    batches = list(batches_of(rows, 12))
    assert [len(part) for part, _ in batches] == [12, 12, 6]
    assert [count for _, count in batches] == [12, 12, 5]
    assert batches[-1][0].tolist() == [240, 250, 260, 270, 280, 240]
    assert torch.equal(torch.cat([part[:count] for part, count in batches]), rows)
    assert [len(part) for part, _ in batches_of(rows[:1], 12)] == [3]
    assert [len(part) for part, _ in batches_of(rows[:1], 64)] == [8]
    assert [part.tolist() for part, _ in batches_of(rows[:3], None)] == [[0, 10, 20]]
    assert not list(batches_of(rows[:0], None)) + list(batches_of(rows[:0], 12))


@pytest.mark.parametrize(
    ("gib", "side", "num_images"), [(140, 32, 1024), (80, 32, 512), (11, 32, 128), (140, 224, 128)]
)
def test_a_gpu_attacks_what_its_memory_holds(monkeypatch, gib, side, num_images):
    device = SimpleNamespace(type="cuda")
    card = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    images = SimpleNamespace(device=device, shape=(128, side, side, 3))
    assert images_at_once(SimpleNamespace(images=images)) == num_images


def test_short_memory_makes_smaller_batches(network, monkeypatch):
    """Down to the minibatch's own size, for which there is no remedy here."""
    monkeypatch.setattr(evaluation, "images_at_once", lambda batch: 12)
    batches, sizes = FixedLoader([4, 4, 4]).batches, []

    def short(most):
        def forward(images):
            sizes.append(len(images))
            if len(images) > most:
                raise torch.OutOfMemoryError
            return network.eval()(images)

        return forward

    counts = count_images(short(6), batches, [Attack.parse("pgd-1")], THREAT, seed=0)
    assert counts[0] == 12
    assert sizes[:3] == [12, 6, 6]
    sizes.clear()
    with pytest.raises(torch.OutOfMemoryError):
        count_images(short(2), batches, [], THREAT, seed=0)
    assert sizes == [12, 6, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["pgd-4-2", "cw-3"])
def test_joined_minibatches_count_as_each_alone(network, monkeypatch, name):
    """On a GPU as well: the same random starts, in batches of 8, 4, 2 and 1."""
    batches = [
        Batch(batch.images.cuda(), batch.labels.cuda(), batch.global_size, batch.indices)
        for batch in label_by_network(FixedLoader([7, 5, 9]), network).batches
    ]
    network.cuda().eval()
    monkeypatch.setattr(evaluation, "images_at_once", lambda batch: 8)

    def count(some):
        return count_images(network, some, [Attack.parse(name)], THREAT, seed=3).tolist()

    with exact_arithmetic(torch.device("cuda")):
        joined = count(batches)
        alone = [sum(column) for column in zip(*(count([b]) for b in batches), strict=True)]
    assert joined[:3] == alone[:3]
    assert abs(joined[3] - alone[3]) <= 1


@dataclasses.dataclass(frozen=True)
class FakeWorld(World):
    """One of two ranks; the other's counts are added by hand."""

    others: list = dataclasses.field(default_factory=list)
    seen: list = dataclasses.field(default_factory=list)

    def together(self, work):
        return work()

    def sum_(self, tensor):
        self.seen.append(tensor.clone())
        for other in self.others:
            tensor += other
        return tensor


def test_two_ranks_sum_their_counts(network):
    cpu = torch.device("cpu")
    loaders = [
        label_by_network(FixedLoader([3, 4]), network),
        label_by_network(FixedLoader([3, 2], first_index=50), network),
    ]
    one = FakeWorld(1, 2, cpu)
    evaluate(network, loaders[1], ["pgd-3"], THREAT, world=one, mean=MEAN, std=STD)
    zero = FakeWorld(0, 2, cpu, others=one.seen)
    result = evaluate(network, loaders[0], ["pgd-3"], THREAT, world=zero, mean=MEAN, std=STD)
    expected = sum(slow_counts(network, x, Attack("pgd", 3), seed=0) for x in loaders).tolist()
    assert result.num_images == expected[0] == 12
    assert result.clean_accuracy == expected[1] / 12
    assert result.robust_accuracy["pgd-3"] == expected[2] / 12


def test_top5_counts_the_five_largest(world):
    class Ranks(nn.Module):
        """Logits fall with the class's index: class k is the (k+1)-th guess."""

        def forward(self, images):
            return -torch.arange(8.0).repeat(len(images), 1) + images.mean() * 0

    loader = FixedLoader([8], num_classes=8)
    loader.batches[0].labels.copy_(torch.arange(8))
    result = evaluate(Ranks(), loader, [], THREAT, world=world, mean=MEAN, std=STD)
    assert (result.clean_accuracy, result.clean_top5) == (1 / 8, 5 / 8)
    assert result.robust_accuracy == {}


def test_nothing_is_left_changed(network, world):
    before = {key: value.clone() for key, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    network[0].weight.requires_grad_(False)
    asking = [p.requires_grad for p in network.parameters()]
    torch.backends.cudnn.allow_tf32 = True
    seen = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x):
            seen.append(
                (torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu"), x.dtype)
            )
            assert not any(p.requires_grad for p in network.parameters())
            return self.inner(x)

    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        evaluate(Watched(), FixedLoader([4]), ["pgd-2"], THREAT, world=world, mean=MEAN, std=STD)
    assert set(seen) == {(False, False, torch.float32)}
    assert torch.backends.cudnn.allow_tf32
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert [p.requires_grad for p in network.parameters()] == asking
    assert any(asking)


def test_starts_are_a_function_of_seed_and_first_index(world):
    class Watched(nn.Module):
        """Always right, so that every image is attacked; remembers the points it saw."""

        def __init__(self):
            super().__init__()
            self.points = []

        def forward(self, x):
            self.points.append(x.detach().clone())
            return torch.tensor([1.0, 0.0]) + 0 * x.mean((1, 2, 3))[:, None]

    def start(seed, first_index, attack):
        network, loader = Watched(), FixedLoader([6], first_index=0)
        loader.batches[0].labels.zero_()
        loader.batches[0].indices.add_(first_index)
        evaluate(network, loader, [attack], THREAT, world=world, mean=MEAN, std=STD, seed=seed)
        return network.points[1]  # the first is the clean image

    first = start(1, 0, "pgd-1")
    assert torch.equal(first, start(1, 0, "pgd-1"))
    assert torch.equal(first, start(1, 0, "cw-1-2"))
    assert not torch.equal(first, start(2, 0, "pgd-1"))
    assert not torch.equal(first, start(1, 6, "pgd-1"))


def test_no_images_is_an_error(network, world):
    with pytest.raises(ValueError, match="no images to evaluate"):
        evaluate(network, FixedLoader([]), [], THREAT, world=world, mean=MEAN, std=STD)


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A finished run of a small network on fixed batches."""
    monkeypatch.setattr(images, "build_val_loader", fixed_val_loader)
    return finished_run(tmp_path / "run")


def test_a_run_is_evaluated_from_its_folder(run_folder, capsys):
    first = evaluate_run(run_folder, attacks=["pgd-2"], num_images=9)
    assert (first.num_images, list(first.robust_accuracy)) == (9, ["pgd-2"])
    assert first.clean_top5 is not None
    evaluate_run(run_folder, attacks=["cw-1-2", "pgd-1"], eps="8/255", step="2/255", num_images=5)
    assert (run_folder / "result.json").read_text() == "kept"
    names = sorted(path.name for path in run_folder.glob("evaluation-*"))
    assert names == [
        "evaluation-last-cw-1-2_pgd-1-eps8-step2-n5.json",
        "evaluation-last-pgd-2-eps4-step1-n9.json",
    ]
    record = json.loads((run_folder / names[0]).read_text())
    assert (record["eps"], record["attack_step"], record["num_eval_images"]) == (
        "8/255",
        "2/255",
        5,
    )
    assert set(record["robust_accuracy"]) == {"cw-1-2", "pgd-1"}
    assert "top-5" in capsys.readouterr().out


def test_a_step_that_was_not_chosen_grows_with_eps(run_folder, capsys):
    """Twenty steps made for a small ball would not cross a large one: a robust-looking network."""
    evaluate_run(run_folder, attacks=["pgd-1"], eps="16/255", num_images=5)
    (path,) = run_folder.glob("evaluation-*")
    record = json.loads(path.read_text())
    assert (record["eps"], record["attack_step"]) == ("16/255", "4/255")  # the run's: 4 and 1
    assert "for --eps 16/255: --step 4/255" in capsys.readouterr().out


def test_weights_of_another_run_go_by_their_path(run_folder, tmp_path):
    """Their accuracies are not the run's, whose last.pt has the same name."""
    other = finished_run(tmp_path / "other") / "checkpoints" / "last.pt"
    evaluate_run(run_folder, attacks=[], num_images=3)
    evaluate_run(run_folder, attacks=[], num_images=3, checkpoint=str(other))
    own, foreign = sorted(run_folder.glob("evaluation-*"), key=lambda path: len(path.name))
    assert json.loads(own.read_text())["checkpoint"] == "last.pt"
    assert json.loads(own.read_text())["norm"] == "linf"
    assert json.loads(foreign.read_text())["checkpoint"] == str(other)
    assert foreign.name.startswith(own.stem + "-")


def test_runs_in_one_folder_have_files_of_their_own(run_folder, tmp_path):
    for folder in (run_folder, finished_run(tmp_path / "a" / "run")):
        for _ in range(2):  # the same one again is the same file
            evaluate_run(folder, attacks=[], num_images=3, output_dir=tmp_path / "all")
    assert len(list((tmp_path / "all").iterdir())) == 2


def test_without_a_gpu_an_unlimited_run_is_evaluated_in_part(run_folder, monkeypatch, capsys):
    """One PGD-20 on at most 400 images, unless chosen, and a line that says how to choose."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load_config(run_folder / "config.yaml")
    dear = dataclasses.replace(config, eval_attacks=("pgd-10", "pgd-50"))
    save_config(dear, run_folder / "config.yaml")
    measured = evaluate_run(run_folder)
    assert (measured.num_images, list(measured.robust_accuracy)) == (400, ["pgd-20"])
    assert "--attacks chooses others" in capsys.readouterr().out


def test_a_run_is_exported_again(run_folder):
    (run_folder / "result.json").unlink()
    assert export_run(run_folder) == run_folder / "export"
    assert (run_folder / "export" / "model.safetensors").is_file()


def test_what_is_not_a_run_is_refused(run_folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^RUN .*nothing: not a run's folder; it has no config"):
        load_run(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"--checkpoint .*x\.pt: no such file"):
        load_run(run_folder, str(tmp_path / "x.pt"))
    with pytest.raises(UserError, match="--attacks fgsm: no such attack"):
        evaluate_run(run_folder, attacks=["fgsm"])
    with pytest.raises(UserError, match="--step 2: larger than the whole pixel range"):
        evaluate_run(run_folder, step="2")
    monkeypatch.setattr(images, "build_val_loader", lambda *_: FixedLoader([3], num_classes=5))
    with pytest.raises(UserError, match="--data digits: its 5 classes are not the 6 that"):
        evaluate_run(run_folder)
