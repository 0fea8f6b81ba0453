"""What a session settles before training: the attack's warm-up, the exchange's least share."""

import dataclasses

import pytest
from torch import nn

from freeadv_fast.config.budget import Budget
from freeadv_fast.errors import UserError
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.session.network import build_learner
from freeadv_fast.session.prepare import refuse_empty_exchange


def test_the_attack_grows_over_its_epochs(world):
    """SVHN's rows: from nothing to its full length over 5 epochs of 10 updates."""
    config = RECIPES["svhn-preact18-fgsm-eps8"]
    learner = build_learner(nn.Linear(3, 2), config, world, Budget.of(config, [10]))
    scales = [learner.attack_scale_at(update) for update in (0, 10, 25, 50, 149)]
    assert scales == pytest.approx([0, 0.2, 0.5, 1, 1])
    config = RECIPES["cifar10-preact18-fgsm-eps8"]
    learner = build_learner(nn.Linear(3, 2), config, world, Budget.of(config, [10]))
    assert learner.attack_scale == 1


def test_a_rank_sends_every_other_one_an_image(world):
    """80 images hold 16 adversarial ones: enough for 16 ranks, not for 17."""
    config = dataclasses.replace(RECIPES["imagenet-rn50-fast-advprop"], batch_size=80)
    refuse_empty_exchange(config, dataclasses.replace(world, size=16))
    with pytest.raises(UserError, match="--batch-size 80: 16 adversarial images a rank"):
        refuse_empty_exchange(config, dataclasses.replace(world, size=17))
    still = dataclasses.replace(config, shuffle=False)
    refuse_empty_exchange(still, dataclasses.replace(world, size=17))
