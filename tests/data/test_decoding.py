"""Where training images are decoded: the move between two places, and what decides it.

Two DALI pipelines on the CPU stand for the two places, which give the same pixels bit for bit.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from freeadv_fast.data import build
from freeadv_fast.data.build import build_loaders
from freeadv_fast.data.decoding import Choice, place_for
from freeadv_fast.data.folder import AHEAD, TIMED, FolderLoader, build_decoder
from freeadv_fast.data.index import index_images
from freeadv_fast.data.stream import Stream
from freeadv_fast.session.decoding import WATCHED, Decoding

dali = pytest.importorskip("freeadv_fast.data.folder_dali")

NUM_BATCHES = 24


class NotingDecoder(dali.DaliDecoder):
    """Notes the rows of the plans that it is given."""

    def __init__(self, index, **options):
        super().__init__(index, **options)
        self.rows = []

    def decode(self, plans):
        return super().decode(self._noted(plans))

    def _noted(self, plans):
        for plan in plans:
            self.rows.append(plan.rows.tolist())
            yield plan


@pytest.fixture
def two_places(monkeypatch):
    """Loaders begin with one decoder on the CPU and may go on with another one there."""

    def noting(backend, index, config, device, *_):
        return NotingDecoder(
            index,
            image_size=config.image_size,
            batch_size=config.batch_size,
            num_workers=config.workers,
            device=device,
        )

    monkeypatch.setattr(build, "available_backend", lambda: "dali")
    monkeypatch.setattr(build, "build_decoder", noting)
    monkeypatch.setattr(build, "first_decoder", noting)


@pytest.fixture
def train_loader(two_places, build_tree, config, world_of):
    """Makes training loaders of 24 minibatches of two images."""
    tree = build_tree(train=16)

    def make(**options):
        return build_loaders(config(tree, **({"batch_size": 2} | options)), world_of()).train

    return make


def assert_same(left, right):
    assert len(left) == len(right)
    for mine, other in zip(left, right, strict=True):
        assert torch.equal(mine.indices, other.indices)
        assert torch.equal(mine.images, other.images)


def images_of(rows):
    return [row for plan in rows for row in plan]


def indices_of(batches):
    return [index for batch in batches for index in batch.indices.tolist()]


def wait_until_still(decoder):
    """Waits until the thread that runs ahead has run as far as it does."""
    seen, deadline = -1, time.monotonic() + 20
    while seen != len(decoder.rows):
        assert time.monotonic() < deadline
        seen = len(decoder.rows)
        time.sleep(0.1)


@pytest.mark.parametrize("parts", [{}, {"accumulate": 2}])
def test_no_image_is_lost_or_repeated_where_the_place_changes(train_loader, parts):
    whole = list(train_loader(**parts).epoch(1))
    loader = train_loader(**parts)
    batches = loader.epoch(1)
    taken = [next(batches) for _ in range(3)]
    wait_until_still(loader.decoder)
    assert 0 < len(images_of(loader.decoder.rows)) < len(indices_of(whole[: 3 + AHEAD]))
    loader.move(1, 3 + AHEAD)
    assert_same([*taken, *batches], whole)
    assert images_of(loader.decoder.rows) == indices_of(whole[: 3 + AHEAD])
    assert images_of(loader.later.rows) == indices_of(whole[3 + AHEAD :])


def test_a_move_too_late_loses_nothing_either(train_loader):
    whole = list(train_loader().epoch(0))
    loader = train_loader()
    batches = loader.epoch(0)
    taken = [next(batches) for _ in range(5)]
    loader.move(0, 0)
    assert_same([*taken, *batches], whole)
    assert images_of(loader.decoder.rows + loader.later.rows) == indices_of(whole)
    assert loader.later.rows


def test_the_place_is_that_of_the_position(train_loader):
    """Resumed behind it, rewound before it, and where it lies behind an epoch's end."""
    loader = train_loader()
    whole = list(loader.epoch(1))
    loader.decoder.rows = []
    loader.move(1, 4)
    assert_same(list(loader.epoch(1, 4)), whole[4:])
    assert (loader.decoder.rows, len(loader.later.rows)) == ([], NUM_BATCHES - 4)
    list(loader.epoch(0))
    assert len(loader.decoder.rows) == NUM_BATCHES
    loader.move(0, NUM_BATCHES + 1)
    loader.decoder.rows, loader.later.rows = [], []
    list(loader.epoch(0))
    list(loader.epoch(1))
    assert len(loader.decoder.rows) == len(loader.later.rows) == NUM_BATCHES


def test_the_next_epoch_is_decoded_behind_the_last_minibatch(train_loader):
    """As far ahead as within an epoch, by the same pipeline; an epoch alone stays within itself."""
    loader = train_loader()
    first, second = list(loader.epoch(0)), list(loader.epoch(1))
    for last, ahead in ((0, 0), (1, AHEAD)):
        loader.decoder.rows = []
        stream = loader.epochs(0, 0, last)
        taken = [next(stream) for _ in range(NUM_BATCHES)]
        wait_until_still(loader.decoder)
        assert_same(taken, first)
        beyond = loader.decoder.rows[NUM_BATCHES:]
        assert (len(beyond) > 1) == (last == 1)
        assert len(beyond) < max(ahead, 1)
        assert images_of(beyond) == indices_of(second)[: 2 * len(beyond)]
        assert_same(list(stream), second * last)


def test_one_pipeline_is_kept(train_loader, monkeypatch):
    """Through all epochs and for the next ones; not that of a timing beside it."""
    built, real = [], dali._PlanPipeline

    def build(decoder):
        built.append(real(decoder))
        return built[-1]

    monkeypatch.setattr(dali, "_PlanPipeline", build)
    loader = train_loader()
    stream = loader.epochs(0, 0, 2)
    taken = [next(stream) for _ in range(NUM_BATCHES + 1)]
    loader.decoding_rate(1)
    assert len(built) == 2
    assert loader.decoder._idle is None
    assert len([*taken, *stream]) == 3 * NUM_BATCHES
    assert loader.decoder._idle is built[0]
    list(loader.epoch(0))
    assert len(built) == 2


def test_a_decoder_is_timed_beside_an_epoch(train_loader):
    """As many minibatches as are timed may be more than an epoch has."""
    whole = list(train_loader().epoch(0))
    loader = train_loader()
    batches = loader.epoch(0)
    taken = [next(batches)]
    started = time.perf_counter()
    rate = loader.decoding_rate(1)
    seconds = time.perf_counter() - started
    assert rate > TIMED * 2 / seconds
    assert_same([*taken, *batches], whole)
    assert train_loader(batch_size=32).decoding_rate(0) > 0  # two minibatches an epoch


def test_evaluations_stay_where_they_are(two_places, build_tree, config, world_of):
    loaders = build_loaders(config(build_tree(), holdout_images=9), world_of())
    assert loaders.train.later is loaders.holdout.decoder is loaders.guard.decoder
    assert {loaders.holdout.later, loaders.guard.later, loaders.val.later} == {None}
    assert "training images are decoded on the CPU instead" in "\n".join(loaders.lines)


def test_a_processor_alone_has_no_choice(build_tree, config, world_of):
    loader = build_loaders(config(build_tree()), world_of()).train
    decoding = Decoding([loader], world_of(), 1, begin=pytest.fail)
    with decoding.watching(0, next(loader.epoch(0)), is_steady=True):
        pass
    assert (loader.later, decoding.decide(0, 0, 1), decoding.record(0)) == (None, [], None)


@pytest.mark.parametrize(
    ("decoded", "asked", "place"),
    [(5600, 2330, "CPU"), (900, 1000, "CPU"), (899, 1000, "GPU"), (8765, 9090, "CPU")],
)
def test_threads_decode_unless_training_waits_longer_for_them(decoded, asked, place):
    assert place_for(decoded, asked) == place


def test_a_choice_in_words():
    cpu = Choice("CPU", 14, 1, 5600, 2330, 16, 0, 20)
    assert str(cpu) == "on the CPU: 14 threads decode 5,600 images/s, training asks for 2,330"
    few = Choice("GPU", 4, 1, 1600, 2330, 16, 0, 20)
    assert str(few) == (
        "on the GPU: 4 threads decode 1,600 images/s on the CPU, training asks for 2,330 "
        "(--workers 6 may do)"
    )
    nearly = Choice("CPU", 14, 1, 8765, 9090, 16, 0, 20)
    assert str(nearly).endswith("training asks for 9,090 (--workers 15 may do)")
    gpu = Choice("GPU", 1, 4, 400, 9380, 16, 0, 20)
    assert str(gpu) == (
        "on the GPU: each rank's 1 thread decodes 400 images/s on the CPU, training asks for 9,380"
    )


class Stretch:
    """A span of a length that is given."""

    def __init__(self, seconds):
        self.seconds = seconds

    def end(self):
        """Nothing to do."""


def decided(loader, world, spans, threads=1):
    """A run's decoding after as many minibatches as it watches, and its lines."""
    left = iter(spans)
    decoding = Decoding([loader], world, threads, begin=lambda: Stretch(next(left)))
    lines = []
    for number, batch in enumerate(loader.epoch(0), start=1):
        with decoding.watching(0, batch, is_steady=number > 2):
            pass
        lines += decoding.decide(0, 0, number)
    assert next(left, None) is None
    return decoding, lines


def test_a_run_decides_once_and_goes_on_so(train_loader, world_of):
    """One minibatch of eight took seconds, for an algorithm was searched; it does not count."""
    whole = list(train_loader().epoch(0))
    loader = train_loader()
    decoding, (line,) = decided(loader, world_of(), [1e-6] * 7 + [9.0])
    assert line.startswith("decoding    on the GPU: 1 thread decodes ")
    assert line.endswith("on the CPU, training asks for 2,000,000")
    since = 2 + WATCHED + AHEAD
    assert loader.moves_at == (0, since)
    # Those that were timed are in `decoder.rows` as well.
    assert images_of(loader.later.rows) == indices_of(whole[since:])
    record = decoding.record(0)
    assert (record["place"], record["asked_images_per_second"]) == ("GPU", 2_000_000)

    resumed = train_loader()
    again = Decoding([resumed], world_of(), 1, begin=pytest.fail)
    again.load_state_dict(decoding.state_dict())
    assert (resumed.moves_at, again.lines(0)) == ((0, since), [line])
    with again.watching(0, whole[0], is_steady=True):
        pass
    other = train_loader()
    anew = Decoding([other], world_of(), 2)
    anew.load_state_dict(decoding.state_dict())
    assert (other.moves_at, anew.lines(0), anew.record(0)) == (None, [], None)


def test_a_place_is_left_where_the_queue_ends_in_the_next_epoch(train_loader, world_of):
    """Decided at an epoch's end, when plans of the next one are drawn: each has one decoder."""
    whole = [*train_loader().epoch(0), *train_loader().epoch(1)]
    loader, decided_at = train_loader(), NUM_BATCHES - 2
    decoding = Decoding([loader], world_of(), 1, begin=lambda: Stretch(1e-6))
    taken = []
    for number, batch in enumerate(loader.epochs(0, 0, 1), start=1):
        taken.append(batch)
        with decoding.watching(0, batch, is_steady=number > decided_at - WATCHED):
            pass
        if number == decided_at:
            wait_until_still(loader.decoder)
            (_line,) = decoding.decide(0, 0, number)
    assert loader.moves_at == (1, AHEAD - 2)
    assert_same(taken, whole)
    assert images_of(loader.later.rows) == indices_of(whole[decided_at + AHEAD :])


def test_a_run_whose_threads_suffice_stays_on_the_cpu(train_loader, world_of):
    loader = train_loader()
    decoding, (line,) = decided(loader, world_of(), [1.0] * WATCHED)
    assert "on the CPU: 1 thread decodes" in line
    assert line.endswith("training asks for 2")
    assert (loader.moves_at, loader.later.rows) == (None, [])
    assert decoding.record(0)["place"] == "CPU"


def test_unlabelled_images_are_not_decoded(train_loader, world_of):
    """Half of these minibatches are pixels of --unlabelled: rows below 0."""
    loader = train_loader()
    decoding = Decoding([loader], world_of(), 1, begin=lambda: Stretch(1.0))
    for number, batch in zip(range(1, WATCHED + 1), loader.epoch(0), strict=False):
        mixed = batch._replace(indices=torch.cat([batch.indices, ~batch.indices]))
        with decoding.watching(0, mixed, is_steady=True):
            pass
        decoding.decide(0, 0, number)
    assert decoding.record(0)["asked_images_per_second"] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_both_places_show_the_same_on_a_gpu(real_images, config):
    """The CPU's windows are those of a run without a GPU; chroma is upsampled in two ways."""
    settings = config(str(real_images), image_size=96, batch_size=8)
    index = index_images(str(real_images / "train"), 0, pytest.fail)
    stream = Stream(np.arange(len(index.files)), 8, rank=0, world_size=1, seed=0)
    seen = {}
    for name, device, place in [
        ("processor", "cpu", "CPU"), ("CPU", "cuda", "CPU"), ("GPU", "cuda", "GPU"),
    ]:  # fmt: skip
        device = torch.device(device)
        decoder = build_decoder("dali", index, settings, device, place=place)
        loader = FolderLoader(index, stream, decoder, settings, device)
        batches = list(loader.epoch(0))
        assert {batch.images.device.type for batch in batches} == {device.type}
        seen[name] = torch.cat([batch.images for batch in batches]).cpu().float()
    rounding = (seen["CPU"] - seen["processor"]).abs()
    assert rounding.mean() < 0.5
    assert rounding.max() <= 4
    difference = (seen["GPU"] - seen["CPU"]).abs()
    assert difference.mean() < 1.0
    mirrored = (seen["GPU"].flip(2) - seen["CPU"]).abs()
    assert (difference.mean((1, 2, 3)) < mirrored.mean((1, 2, 3))).all()
