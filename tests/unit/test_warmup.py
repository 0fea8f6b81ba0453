"""The learning rate's warm-up: the authors' own numbers, and the schedule that follows it."""

import dataclasses

import pytest
import torch

from freeadv_fast.config.budget import Budget
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.data.agreement import open_together
from freeadv_fast.data.build import deal_images
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.session.network import learning_rates


def rates(config, num_batches):
    """The rate of every update of a run."""
    budget = Budget.of(config, [num_batches])
    lr_at = learning_rates(config, budget)
    return [lr_at(update) for update in range(budget.total_updates)]


def rates_of_authors(num_batches, epochs, lr, milestones):
    """Zhang et al.'s main.py: a rate an update for 5 epochs, then one an epoch from its own 0."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    warm_up = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / (5 * num_batches)
    )
    found = []
    for _ in range(5 * num_batches):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warm_up.step()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    drops = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)
    for _ in range(epochs):
        found += [optimizer.param_groups[0]["lr"]] * num_batches
        optimizer.step()
        drops.step()
    return found


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_recipe_has_the_rates_of_the_authors_code(accumulate, small_images, world):
    """114 images in minibatches of 7: 17 updates an epoch, or 5 of four minibatches each."""
    config = dataclasses.replace(
        RECIPES["cifar10-preact18-dat-pgd"], data=str(small_images), image_size=16,
        augment="random-resized-crop", batch_size=7, accumulate=accumulate, holdout_images=0,
        bn_group=None, workers=0,
    )  # fmt: skip
    (loaders,) = deal_images(config, world, open_together(config, world))
    num_batches = {1: 17, 4: 5}[accumulate]
    assert loaders.train.num_batches == num_batches
    found = rates(config, num_batches)
    assert found == pytest.approx(rates_of_authors(num_batches, 100, 0.01, [75, 90, 95]), rel=1e-12)
    assert found[0] == 0.01 / (5 * num_batches)
    assert found[5 * num_batches - 1] == found[5 * num_batches] == 0.01


def test_replays_warm_up_over_as_many_updates_as_natural_training():
    """5 epochs of 10 minibatches are 50 updates, in 1.25 passes over the data at m 4."""
    config = TrainConfig(
        m=4, epochs=20, lr=0.8, warmup_epochs=5, schedule=Schedule.parse("constant")
    )
    found = rates(config, 10)
    assert len(found) == 5 * 10 * 4
    assert found[:50] == [0.8 * (update + 1) / 50 for update in range(50)]
    assert found[50:] == [0.8] * 150


@pytest.mark.parametrize(
    "schedule",
    ["every:6", "at:6,12", "steps:40,100", "linear:0.3", "piecewise:0=0.1,4=1,20=0.5", "constant"],
)
@pytest.mark.parametrize(("m", "warmup_epochs"), [(1, 3), (4, 8)])
def test_a_schedule_begins_where_the_warm_up_ends(schedule, m, warmup_epochs):
    """As it would in a run without one that is shorter by those epochs."""
    plain = TrainConfig(m=m, epochs=24, lr=0.1, schedule=Schedule.parse(schedule))
    warm = dataclasses.replace(plain, epochs=24 + warmup_epochs, warmup_epochs=warmup_epochs)
    expected, found = rates(plain, 7), rates(warm, 7)
    first = 7 * warmup_epochs
    assert len(found) == first + len(expected)
    assert found[:first] == [0.1 * (update + 1) / first for update in range(first)]
    exactness = 1e-12 if schedule.startswith("piecewise") else 0
    assert found[first:] == pytest.approx(expected, rel=exactness, abs=0)


@pytest.mark.parametrize("schedule", ["every:30", "at:30,60"])
@pytest.mark.parametrize("m", [3, 6, 7])
def test_drops_come_at_the_same_update_after_a_warm_up_of_part_of_a_pass(schedule, m):
    """5 / 7 of a pass and 8 passes are 8.714..., and that less 5 / 7 is 7.999... in fp64."""
    plain = TrainConfig(m=m, epochs=90, lr=0.1, schedule=Schedule.parse(schedule))
    warm = dataclasses.replace(plain, epochs=95, warmup_epochs=5)
    for num_batches in (1, 3, 7, 10, 13):
        expected, found = rates(plain, num_batches), rates(warm, num_batches)[5 * num_batches :]
        shared = min(len(expected), len(found))
        assert found[:shared] == expected[:shared]


@pytest.mark.parametrize("name", ["imagenet-rn50-free-m4-eps4", "cifar10-preact18-fgsm-rs-30ep"])
def test_without_a_warm_up_nothing_moves(name):
    config = RECIPES[name]
    budget = Budget.of(config, [13])
    assert config.warmup_epochs == 0
    assert rates(config, 13) == [
        config.lr * config.schedule.factor(
            update, total_updates=budget.total_updates,
            data_epochs_before=budget.data_epochs_before, cost=config.cost,
        )
        for update in range(budget.total_updates)
    ]  # fmt: skip
