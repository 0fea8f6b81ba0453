"""AutoAttack against its package, over ranks, after kills, and on networks that it refuses."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import sys
import threading

import pytest
import torch
from fixed_batches import FixedLoader, finished_run, fixed_val_loader
from torch import nn

from freeadv_fast.config.attack import Attack, doubt_about_steps, passes
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import L2ThreatModel, Perturbation, ThreatModel
from freeadv_fast.distributed.world import World
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation import evaluate as evaluation
from freeadv_fast.evaluation import images
from freeadv_fast.evaluation.accuracy import accuracy_table, attack_columns
from freeadv_fast.evaluation.autoattack import package, progress
from freeadv_fast.evaluation.autoattack.ledger import Ledger, digest_of, forget
from freeadv_fast.evaluation.autoattack.package import (
    Queried,
    one_noise,
    refuse_unfit,
    standard,
)
from freeadv_fast.evaluation.evaluate import Evaluation, evaluate
from freeadv_fast.evaluation.subject import evaluate as evaluate_run
from freeadv_fast.models.normalize import unit_images
from freeadv_fast.session.prepare import prepare

pyautoattack = pytest.importorskip("pyautoattack")

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
CPU = torch.device("cpu")


def ball(eps, kind=ThreatModel):
    return kind(Perturbation.parse(eps), Perturbation.parse("1/255"))


def shortened(whole):
    """The package's object with fewer steps and queries."""
    whole.apgd.n_iter, whole.apgd_targeted.n_iter = 1, 2
    whole.fab.n_iter, whole.square.n_queries = 2, 8
    return whole


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(package, "standard", lambda *a, **k: shortened(standard(*a, **k)))


class Small(nn.Module):
    """Its classes' regions bend, so that attacks differ."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3, 2), nn.Linear(54, 5)

    def forward(self, images):
        return 4 * self.last(self.first(images * 12 - 3).sin().flatten(1))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Small().eval()


class Shares:
    """One rank's share of a loader, dealt as `data.stream.Stream` deals."""

    def __init__(self, whole, rank, size):
        self.classes, self.num_images = whole.classes, whole.num_images
        self.num_batches = whole.num_batches
        self.batches = [
            b._replace(
                images=b.images[rank::size], labels=b.labels[rank::size],
                indices=b.indices[rank::size],
            )
            for b in whole.batches
        ]  # fmt: skip

    def epoch(self, epoch, start=0):
        yield from self.batches[start:]


def labelled(network, sizes, num_wrong=2):
    """Images under the network's own guesses, but for the first few."""
    loader = FixedLoader(sizes)
    for batch in loader.batches:
        with torch.no_grad():
            batch.labels.copy_(network(batch.images.permute(0, 3, 1, 2) / 255).argmax(1))
    loader.batches[0].labels[:num_wrong].add_(1).remainder_(5)
    return loader


def measure(network, loader, threat, world, *names, **options):
    options = {"world": world, "mean": MEAN, "std": STD, "seed": 7} | options
    return evaluate(network, loader, names or ("autoattack",), threat, **options)


def ledgers_in(folder):
    return sorted(folder.glob("autoattack-*.jsonl"))


def standing_rows(folder, part):
    """Rows of the images that stand a part, by the ledgers of a folder."""
    lines = [line for path in ledgers_in(folder) for line in path.read_text().splitlines() if line]
    records = [json.loads(line) for line in lines if line.endswith("}")]
    records = [record for record in records if record["part"] == part]
    return sorted(int(key.split("-")[0]) for record in records for key in record["stand"])


def direct(network, threat):
    """The package itself, as its users build it."""
    norm = "L2" if isinstance(threat, L2ThreatModel) else "Linf"
    whole = shortened(pyautoattack.AutoAttack(network, norm=norm, eps=float(threat.eps), seed=7))
    whole.apgd_targeted.n_target_classes = whole.fab.n_target_classes = 4
    whole.fab.targeted = True
    return whole


@pytest.mark.parametrize(("kind", "eps"), [(ThreatModel, "2/255"), (L2ThreatModel, "18/255")])
def test_points_are_those_that_the_package_finds_for_an_image_alone(kind, eps, network):
    (batch,) = labelled(network, [4], num_wrong=1).batches
    x, y = unit_images(batch.images).contiguous(), batch.labels
    whole = direct(network, ball(eps, kind))
    for name in ("apgd", "apgd_targeted", "fab", "square"):
        perturb = getattr(whole, name).perturb
        alone = torch.cat([perturb(x[i : i + 1], y[i : i + 1]) for i in range(4)])
        with one_noise():
            together = perturb(x, y)
        assert torch.allclose(together, alone, atol=1e-6), name
        assert (together != x).flatten(1).any(1).sum() >= (name == "apgd"), name
    whole.apgd.n_iter = 1
    assert not torch.allclose(whole.apgd.attack_single_run(x, y)[0][1:], alone[1:], atol=1e-6)


def test_the_images_fall_that_fall_in_the_package(network, short, world, tmp_path):
    """Called directly, image by image; here they go together, and those that stand are joined."""
    loader, threat = labelled(network, [5, 3], num_wrong=1), ball("2/255")
    found = measure(network, loader, threat, world, folder=tmp_path)
    x = torch.cat([unit_images(batch.images) for batch in loader.batches]).contiguous()
    y = torch.cat([batch.labels for batch in loader.batches])
    _, guesses = direct(network, threat).run_standard_evaluation(x, y, batch_size=1)
    assert standing_rows(tmp_path, "square") == (guesses == y).nonzero().squeeze(1).tolist()
    parts = found.attack_parts["autoattack"]
    assert list(parts) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    shares = list(parts.values())
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[3] < shares[0] < found.clean_accuracy == 7 / 8
    assert found.robust_accuracy == {"autoattack": shares[3]}
    assert (found.seed, found.num_images) == (7, 8)


def test_the_standard_version_is_the_packages(network):
    ours = standard(Queried(network, print), ball("8/255"), num_classes=10, seed=0, device=CPU)
    theirs = pyautoattack.AutoAttack(network, eps=8 / 255, seed=0)
    for name in ("apgd", "apgd_targeted", "fab", "square"):
        values = [
            {k: v for k, v in vars(getattr(whole, name)).items() if isinstance(v, int | float)}
            for whole in (ours, theirs)
        ]
        assert values[0] | {"targeted": True} == values[1] | {"targeted": True}
    assert (ours.square.n_queries, ours.fab.n_target_classes, ours.apgd.n_iter) == (5000, 9, 100)


def test_the_standard_version_on_a_network_without_robustness(network, world):
    """All of it, and of `apgd-ce-N`; every image falls at once, so that it takes no time."""
    loader = labelled(network, [4])
    found = measure(network, loader, ball("32/255"), world, "apgd-ce-20-2", "pgd-20", "autoattack")
    assert list(found.robust_accuracy.items()) == [
        ("apgd-ce-20-2", 0.0), ("pgd-20", 0.0), ("autoattack", 0.0)
    ]  # fmt: skip
    assert list(found.attack_parts) == ["autoattack"]


class Meeting:
    """Where ranks in threads meet. One runs at a time, for torch's seed is all threads'."""

    def __init__(self, size):
        self.baton, self.barrier = threading.Lock(), threading.Barrier(size, timeout=60)
        self.values = [None] * size

    def exchange(self, rank, value):
        self.values[rank] = value
        self.baton.release()
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        self.baton.acquire()
        return values


@dataclasses.dataclass(frozen=True)
class ThreadWorld(World):
    meeting: Meeting | None = None

    def sum_(self, tensor):
        return tensor.copy_(sum(self.meeting.exchange(self.rank, tensor.clone())))

    def max_on_host(self, values):
        return [
            max(column) for column in zip(*self.meeting.exchange(self.rank, values), strict=True)
        ]

    def on_main(self, work):
        return self.meeting.exchange(self.rank, work() if self.is_main else None)[0]

    def together(self, work):
        value = error = None
        try:
            value = work()
        except UserError as raised:
            error = raised
        errors = [each for each in self.meeting.exchange(self.rank, error) if each]
        if errors:
            raise errors[0]
        return value


def over_ranks(size, work):
    """What `work(world)` returns or raises on each of some ranks."""
    meeting, results = Meeting(size), [None] * size

    def run(rank):
        with meeting.baton:
            try:
                results[rank] = work(ThreadWorld(rank, size, CPU, meeting=meeting))
            except UserError as error:
                results[rank] = error
            except BaseException:
                meeting.barrier.abort()
                raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_ranks_find_what_one_finds(network, short, world, tmp_path, monkeypatch):
    """And one rank goes on where two were."""
    # Ranks in threads share what is the process's: the last to leave would leave it changed.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(evaluation, "packaged_at_once", lambda batch: 3)
    loader, threat = labelled(network, [5, 3, 1], num_wrong=1), ball("2/255")
    alone = measure(network, loader, threat, world)

    def on_a_rank(own):
        share = Shares(loader, own.rank, own.size)
        return measure(copy.deepcopy(network), share, threat, own, folder=tmp_path)

    both = over_ranks(2, on_a_rank)
    assert [found.attack_parts for found in both] == [alone.attack_parts] * 2
    assert all(found.ledgers for found in both)
    assert len(list(tmp_path.glob("autoattack-*-rank1.*"))) == 2  # a ledger and a log
    monkeypatch.setattr(Ledger, "add", lambda *_: pytest.fail("attacked again"))
    again = measure(network, loader, threat, world, folder=tmp_path)
    assert again.attack_parts == alone.attack_parts
    forget(again.ledgers)
    assert not ledgers_in(tmp_path)
    assert len(list(tmp_path.glob("autoattack-*.log"))) == 2


def test_a_killed_evaluation_goes_on_at_its_last_batch(
    network, short, world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluation, "packaged_at_once", lambda batch: 3)
    loader, threat = labelled(network, [5, 3], num_wrong=1), ball("2/255")
    add, calls = Ledger.add, []

    def counted(ledger, *record):
        calls.append(record)
        if len(calls) == num_lived:
            with ledger.path.open("a") as file:
                file.write('\n{"attack": "autoattack", "part": "fab-t", "sta')
            raise KeyboardInterrupt
        add(ledger, *record)

    monkeypatch.setattr(Ledger, "add", counted)
    num_lived = -1
    one_go = measure(network, loader, threat, world, folder=tmp_path / "one")
    num_batches, num_lived = len(calls), 5
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        measure(network, loader, threat, world, folder=tmp_path / "two")
    assert "going on" not in capsys.readouterr().out
    resumed = measure(network, loader, threat, world, folder=tmp_path / "two")
    (ledger,) = ledgers_in(tmp_path / "two")
    named = f"{ledger.parent}/{ledger.name.replace('rank0', '*')}"
    said = f"AutoAttack: going on where an earlier start ended; delete {named} to begin anew"
    assert said in capsys.readouterr().out
    assert resumed.attack_parts == one_go.attack_parts
    assert len(calls) == num_batches + 1  # one batch was lost
    rows = [standing_rows(tmp_path / name, "square") for name in ("one", "two")]
    assert rows[0] == rows[1] != []


def test_other_weights_balls_seeds_and_images_are_not_mixed(network, short, world, tmp_path):
    loader = labelled(network, [6])

    def num_ledgers(network, loader, eps, **options):
        measure(network, loader, ball(eps), world, "apgd-ce-1", folder=tmp_path, **options)
        return len(ledgers_in(tmp_path)), sum(len(p.read_text()) for p in ledgers_in(tmp_path))

    count, size = num_ledgers(network, loader, "1/255")
    assert count == 1
    assert num_ledgers(network, loader, "2/255")[0] == 2
    assert num_ledgers(network, loader, "1/255", seed=8)[0] == 3
    other = copy.deepcopy(network)
    other.last.bias.data[0] += 1e-3
    count, before = num_ledgers(other, loader, "1/255")
    assert count == 4
    assert num_ledgers(network, loader, "1/255") == (4, before)  # nothing was attacked again
    loader.batches[0].images[3, 0, 0, 0] ^= 1
    assert num_ledgers(network, loader, "1/255")[1] > before  # one image was


def test_a_small_evaluation_keeps_what_a_killed_large_one_found(network, world, tmp_path):
    few, many, options = labelled(network, [3]), labelled(network, [3, 3]), {"folder": tmp_path}
    attack, threat = "apgd-ce-1", ball("1/255")
    measure(network, many, threat, world, attack, **options)  # killed before it was written
    assert measure(network, few, threat, world, attack, **options).ledgers == ()
    found = measure(network, many, threat, world, attack, **options)
    assert list(found.ledgers) == ledgers_in(tmp_path)
    assert [found.log] == [path.name for path in tmp_path.glob("*.log")]
    assert measure(network, many, threat, world, "apgd-ce-2", **options).ledgers == ()
    assert measure(network, many, threat, world, attack).log is None
    assert measure(network, many, threat, world, "pgd-1", **options).log is None


def test_extra_state_that_is_no_tensor_has_a_digest_too(network):
    digests = [digest_of(network, ball("1/255"), 0, "package")]
    network.get_extra_state, network.set_extra_state = lambda: {"any": object}, lambda _: None
    digests.append(digest_of(network, ball("1/255"), 0, "package"))
    network.first.bias.data[0] += 1
    digests.append(digest_of(network, ball("1/255"), 0, "package"))
    assert digests[0] == digests[1] != digests[2]


def test_a_clone_that_pip_knows_nothing_of_has_no_version(monkeypatch):
    def unknown(name):
        raise package.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(package.importlib.metadata, "version", unknown)
    assert package.package_version() == "pyautoattack, unknown version"


def test_short_memory_makes_smaller_batches_that_change_nothing(network, short, world, monkeypatch):
    loader, threat = labelled(network, [5, 3]), ball("2/255")
    at_once, sizes, call = measure(network, loader, threat, world), [], Queried.__call__

    def forward(queried, images):
        if len(images) > 3:
            raise torch.OutOfMemoryError
        sizes.append(len(images))
        return call(queried, images)

    monkeypatch.setattr(Queried, "__call__", forward)
    assert measure(network, loader, threat, world).attack_parts == at_once.attack_parts
    assert max(sizes) <= 3


def test_the_network_is_examined_where_memory_was_short_at_first(
    network, world, tmp_path, monkeypatch, capsys
):
    call = Queried.__call__

    def forward(queried, images):
        if len(images) > 3:
            raise torch.OutOfMemoryError
        return call(queried, images)

    monkeypatch.setattr(Queried, "__call__", forward)
    noisy = Ending(network, lambda z: z + torch.randn(len(z), 5))
    measure(noisy, labelled(network, [5]), ball("1/255"), world, "apgd-ce-1")
    assert "it seems to be a randomized defense" in capsys.readouterr().out


def test_nothing_is_left_changed(network, short, world):
    state, tracer = torch.get_rng_state(), sys.gettrace()
    modes = [module.training for module in network.train().modules()]
    measure(network, labelled(network, [3]), ball("1/255"), world)
    assert torch.equal(torch.get_rng_state(), state)
    assert sys.gettrace() is tracer
    assert [module.training for module in network.modules()] == modes
    assert sys.modules["pyautoattack.square"].torch is torch
    assert not torch.backends.cudnn.deterministic


class Ending(nn.Module):
    """A network whose outputs are changed."""

    def __init__(self, network, ending):
        super().__init__()
        self.network, self.ending = network, ending

    def forward(self, images):
        return self.ending(self.network(images))


def test_probabilities_are_refused_and_their_logarithms_are_logits(network, short, world):
    loader, threat = labelled(network, [5]), ball("2/255")
    with pytest.raises(UserError, match="^--attacks: the network returns probabilities, not logi"):
        measure(Ending(network, lambda z: z.softmax(1)), loader, threat, world)
    logarithms = measure(Ending(network, lambda z: z.log_softmax(1)), loader, threat, world)
    assert logarithms.attack_parts == measure(network, loader, threat, world).attack_parts


def test_warnings_are_said_once_and_kept(network, short, world, tmp_path, capsys):
    noisy = Ending(network, lambda z: z + torch.randn(len(z), 5))
    measure(noisy, labelled(network, [4, 4]), ball("1/255"), world, folder=tmp_path)
    said = capsys.readouterr().out
    assert said.count("AutoAttack warns: it seems to be a randomized defense!") == 1
    assert "AutoAttack: targeted attacks take all 4 other classes, not 9" in said
    (path,) = tmp_path.glob("autoattack-*.log")
    kept = path.read_text()
    for part in (
        f"autoattack of pyautoattack {package.package_version().split()[1]}: 8 images, 5 classes, "
        "Linf eps 1/255, seed 7",
        "WARNING it seems to be a randomized defense!",
        "apgd-t - ",
        "max Linf perturbation: 0.00392",
        "robust accuracy after SQUARE: ",
    ):
        assert part in kept


def test_no_package_and_too_few_classes_are_said_first(network, world, monkeypatch):
    few = "^--attacks autoattack: its targeted losses need 4 classes, the data have 3; use apgd-ce"
    with pytest.raises(UserError, match=few):
        measure(network, FixedLoader([3], num_classes=3), ball("1/255"), world, "autoattack")
    refuse_unfit([Attack.parse("apgd-ce-9"), Attack.parse("pgd-3")], 2, "--attacks")
    monkeypatch.setattr(package, "PACKAGES", ("no_such_package",))
    monkeypatch.setattr(network, "forward", lambda _: pytest.fail("attacked"))
    missing = r'--attacks apgd-ce-9: needs the AutoAttack package; pip install "pyautoattack>=0\.2"'
    with pytest.raises(UserError, match=missing):
        measure(network, FixedLoader([3]), ball("1/255"), world, "pgd-3", "apgd-ce-9")
    refuse_unfit([Attack.parse("pgd-3")], 2, "--attacks")


def test_training_does_not_begin_with_an_attack_that_cannot_be_made(small_images, tmp_path, world):
    config = TrainConfig(
        data=str(small_images), arch="test_resnet", image_size=16, m=2, batch_size=8, workers=0,
        eval_attacks="autoattack", output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    with pytest.raises(UserError, match="^--eval-attacks autoattack: its targeted losses need 4"):
        prepare(config, world)
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_the_log_and_drops_the_ledger(tmp_path, monkeypatch, short, capsys):
    monkeypatch.setattr(images, "build_val_loader", fixed_val_loader)
    folder = finished_run(tmp_path / "run")
    found = evaluate_run(folder, attacks="autoattack", eps="0.4", num_images=4)
    (path,) = folder.glob("evaluation-last-autoattack-*.json")
    record = json.loads(path.read_text())
    assert record["attack_parts"] == found.attack_parts
    assert (record["seed"], record["num_eval_images"]) == (0, 4)
    assert len(list(folder.glob("autoattack-*.log"))) == 1
    assert not ledgers_in(folder)
    assert "autoattack, seed 0: of 4 images" in capsys.readouterr().out


def test_names_of_attacks_without_a_step():
    ensemble, adaptive = Attack.parse("autoattack"), Attack.parse("apgd-ce-50-2")
    assert (str(ensemble), str(adaptive)) == ("autoattack", "apgd-ce-50-2")
    assert (adaptive.steps, adaptive.restarts, adaptive.has_step) == (50, 2, False)
    assert passes(("pgd-50-10",)) < passes(("autoattack",)) == 6900
    assert passes(("apgd-ce-50-2", "pgd-3")) == 103
    assert doubt_about_steps([ensemble, adaptive], ball("32/255")) == []
    (line,) = doubt_about_steps([ensemble, Attack.parse("pgd-2")], ball("32/255"))
    assert line.startswith("too weak: pgd-2 in steps of 1/255")


@pytest.mark.parametrize(
    ("text", "near"),
    [("autoatack", "autoattack"), ("AA", "autoattack"), ("auto-attack", "autoattack"),
     ("square", "autoattack"), ("pdg-20", "pgd-20"), ("pgd20-5", "pgd-20-5"), ("pgd", "pgd-50"),
     ("apgd-50", "apgd-ce-50"), ("apgd-ce", "apgd-ce-100"), ("CW-7", "cw-7"), ("fgsm", None)],
)  # fmt: skip
def test_the_nearest_name_is_named(text, near):
    with pytest.raises(UserError) as caught:
        Attack.parse(text, "--attacks")
    question = f"did you mean {near}? " if near else ""
    assert f"--attacks {text}: no such attack; {question}write pgd-50" in str(caught.value)


def test_tables_of_attacks_without_a_step():
    measured = Evaluation(
        0.9, None, {"autoattack": 0.25, "apgd-ce-50": 0.5}, 400, 400, 1.0,
        {"autoattack": {"apgd-ce": 0.5, "apgd-t": 0.25, "fab-t": 0.25, "square": 0.25}}, 3,
    )  # fmt: skip
    assert accuracy_table(measured, "1/255").splitlines()[2:] == [
        "none            -  -            -     400     90.0%  86.7-92.6%",
        "autoattack      -  -            -     400     25.0%  21.0-29.5%",
        "apgd-ce-50     50  -            1     400     50.0%  45.1-54.9%",
        "autoattack, seed 3: of 400 images 50.0% stand apgd-ce, 25.0% stand apgd-t, 25.0% stand "
        "fab-t, 25.0% stand square",
    ]
    assert attack_columns("pgd-5-2", "1/255")["step"] == "1/255"


def test_the_time_left_is_said_after_a_batch_and_every_minute(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = progress.Progress("evaluate", 500, is_shown=True)
    shown.expect("apgd-ce, 500 of 500 images stand", 7200)
    for clock[0], made in ((1.0, 1), (2.0, 1)):
        shown.count(made)
    shown.batch_is_done()
    shown.batch_is_done()
    said = capsys.readouterr().out
    assert said == "AutoAttack: attacking 500 images: at most 1 h 59 min left\n"
    shown.expect("square, 100 of 500 images stand", 118)
    clock[0] = 61.0
    shown.count(0)
    clock[0] = 62.0
    shown.count(60)
    assert capsys.readouterr().out == (
        "AutoAttack: square, 100 of 500 images stand, at most 58 s left\n"
    )
    with contextlib.closing(shown.bar):
        assert shown.seconds_left == 58
