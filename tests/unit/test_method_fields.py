"""The table of which method reads which field, against what the methods do."""

import dataclasses
import functools

import pytest
import torch

from freeadv_fast.config.budget import Budget
from freeadv_fast.config.method_fields import NEUTRAL, READERS, readers_in_words, reads
from freeadv_fast.config.method_names import ALIGNABLE, METHODS
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.methods.build import build_method
from freeadv_fast.session.guard import History
from freeadv_fast.session.network import build_learner

GUARD = {"guard_every", "guard_images", "on_collapse"}
# What the minibatches are made of: tests/data/test_unlabelled.py, tests/unit/test_accumulate.py.
MINIBATCHES = {"unlabelled", "unlabelled_fraction", "dat_unlabelled", "accumulate"}
# A detector's; test_detection_step looks at it.
OF_BOXES = {"attack_loss"}
BATCH = 8

# Another value for each field, and what else a run must say for it to matter.
CHANGES = {
    "m": (2, {}),
    "step_size": (Perturbation.parse("1/255"), {}),
    "attack_steps": (3, {}),
    "attack_start": ("zero", {}),
    "attack_warmup": (5.0, {}),
    "noise_radius": (1.0, {}),
    "reg_lambda": (30.0, {"reg_adaptive": False}),
    "reg_every": (1, {}),
    "reg_through": ("both", {}),
    "reg_adaptive": (False, {"reg_lambda": 4000.0}),
    "trades_beta": (1.0, {}),
    "awp": (0.1, {}),
    "yopo_inner": (2, {}),
    "dat_attack": ("fgsm", {}),
    "dat_mode": ("train", {}),
    "dat_clean_weight": (0.5, {}),
    "norm": ("l2", {}),
    "p_adv": (0.25, {"decoupled": True}),
    "decoupled": (True, {}),
    "noise_weight": (1.0, {}),
    "adv_weight": (1.0, {}),
    "sync_speed": (False, {}),
    "shuffle": (False, {}),
    "mix": ("mixup", {}),
    "mix_alpha": (3.0, {"mix": "mixup"}),
    "aux_bn_group": (2, {}),
}


class Reversal:
    """Stands for the exchange of images between batch-norm groups."""

    def __init__(self, images, labels, step):
        self.rows = images.flip(0), labels.flip(0)

    def wait(self):
        return self.rows


def trained(method, network, world, fields):
    """The weights after a few minibatches of a run that no check has looked at."""
    config = TrainConfig(
        method=method, m=1, eps="16/255", batch_size=BATCH, image_size=8, resize_size=8, p_adv=0.5,
        attack_steps=2, aux_bn_group=4, lr=0.05, fuse="off", graphs="off", normalization="none",
    )  # fmt: skip
    for name, value in fields.items():
        object.__setattr__(config, name, value)
    torch.manual_seed(0)
    learner = build_learner(network, config, world, Budget.of(config, [8]))
    algorithm = build_method(config, learner, world.device, 5, Reversal)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        images = torch.randint(0, 256, (BATCH, 8, 8, 3), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 5, (BATCH,), generator=generator)
        algorithm.train_minibatch(images, labels, BATCH)
    return torch.cat([value.flatten().double() for value in network.state_dict().values()])


@pytest.mark.parametrize("method", METHODS)
def test_a_field_changes_the_weights_of_the_methods_that_read_it(method, small_network, world):
    @functools.cache
    def weights(fields):
        return trained(method, small_network(), world, dict(fields))

    for name, (value, context) in CHANGES.items():
        try:
            changed = weights(tuple((context | {name: value}).items()))
        except AssertionError:  # of `build_method`: an L2 ball, which two methods can take
            assert name == "norm"
            changed = weights(())
        has_effect = not torch.equal(weights(tuple(context.items())), changed)
        assert has_effect is (method in READERS[name]), name


def test_every_field_of_the_table_is_looked_at():
    assert CHANGES.keys() | GUARD | MINIBATCHES | OF_BOXES == READERS.keys()
    assert READERS.keys() <= {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("method", METHODS)
def test_the_guard_watches_methods_that_seek_robustness(method, small_network, world):
    config = TrainConfig(method=method, m=1, batch_size=8, image_size=8, p_adv=0.5, aux_bn_group=2)
    learner = build_learner(small_network(), config, world, Budget.of(config, [8]))
    algorithm = build_method(config, learner, world.device, 5)
    for name in GUARD:
        assert (method in READERS[name]) is algorithm.seeks_robustness


@pytest.mark.parametrize("method", ALIGNABLE)
def test_a_run_that_may_become_gradalign_reads_its_term(method):
    """elle's weight is elle's own: GradAlign goes on with the default."""
    config = TrainConfig(method=method, m=1, on_collapse="gradalign", reg_lambda=0.7, reg_every=3)
    after = History(collapses=[{"action": "gradalign"}]).method_config(config)
    assert (after.method, after.reg_every, after.reg_through) == ("gradalign", 3, "second")
    assert after.reg_lambda == (None if method == "elle" else 0.7)
    for name in ("reg_lambda", "reg_every", "reg_through"):
        assert reads(method, name, "gradalign")
        assert reads(method, name) is (method in READERS[name])
    assert not reads("natural", "reg_every", "gradalign")


def test_neutral_values_are_what_a_config_says_by_default():
    config = TrainConfig(method="pgd", m=1)
    assert {name: getattr(config, name) for name in NEUTRAL} == NEUTRAL


def test_readers_are_named_in_the_fewest_words():
    assert readers_in_words("trades_beta") == "trades, free-trades"
    assert readers_in_words("step_size") == "every method but natural"
