"""Learning-rate schedules against the reference code's own numbers."""

import pytest
import torch

from freeadv_fast.config.budget import Budget
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.errors import UserError
from freeadv_fast.session.network import learning_rates


@pytest.mark.parametrize(
    ("m", "drops"), [(1, (30, 60)), (2, (15, 30)), (4, (8, 16)), (6, (5, 10)), (8, (4, 8))]
)
def test_every_30_drops_where_the_reference_code_drops(m, drops):
    """lr = 0.1 ** (epoch // ceil(30/m)) over ceil(90/m) data epochs; 7 minibatches an epoch."""
    schedule, per_epoch = Schedule.parse("every:30"), 7 * m
    epochs = -(-90 // m)

    def factor(epoch):
        return schedule.factor(
            epoch * per_epoch,
            total_updates=epochs * per_epoch,
            data_epochs_before=lambda update: update / per_epoch,
            cost=m,
        )

    assert factor(drops[0] - 1) == pytest.approx(1)
    assert factor(drops[0]) == pytest.approx(0.1)
    assert factor(drops[1] - 1) == pytest.approx(0.1)
    assert factor(drops[1]) == pytest.approx(0.01)


def test_steps_do_not_scale_with_m():
    """The CIFAR code drops at updates 40,000 and 60,000 whatever m."""
    schedule = Schedule.parse("steps:40000,60000")
    factors = [
        schedule.factor(
            update, total_updates=80_000, data_epochs_before=lambda u: u / (391 * 8), cost=8
        )
        for update in (39_999, 40_000, 59_999, 60_000)
    ]
    assert factors == pytest.approx([1, 0.1, 0.1, 0.01])


def test_linear_rises_and_falls():
    """The peak is where it was asked for; no update has rate 0."""
    schedule = Schedule.parse("linear:0.4")
    factors = [
        schedule.factor(update, total_updates=100, data_epochs_before=lambda u: u / 10, cost=1)
        for update in range(100)
    ]
    assert max(factors) == pytest.approx(1)
    assert factors.index(max(factors)) == 39
    assert min(factors) > 0
    assert factors[69] == pytest.approx(31 / 60)


@pytest.mark.parametrize(
    "text",
    [
        "every",
        "every:0",
        "steps:",
        "linear:1.5",
        "onecycle",
        "onecycle:1",
        "onecycle-epochs:0",
        "constant:3",
        "x",
        "steps:a",
        "at:3=5",
        "piecewise",
        "piecewise:0,0,1,1",
        "piecewise:0=0,1",
        "piecewise:1=0,2=1",
        "piecewise:0=0,2=1,2=0",
        "piecewise:0=0,1=-1",
        "piecewise:0=nan",
        "piecewise:0=0,inf=1",
    ],
)
def test_refuses(text):
    """Anything else, naming the flag."""
    with pytest.raises(UserError, match="--schedule"):
        Schedule.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "every:30",
        "at:30,60,90",
        "steps:40000,60000",
        "linear:0.4",
        "onecycle:0.3",
        "onecycle-epochs:0.3",
        "piecewise:0=0,1=1,6=0.1",
        "constant",
    ],
)
def test_prints_back(text):
    """What a config file holds is what a user writes."""
    assert str(Schedule.parse(text)) == text


@pytest.mark.parametrize(
    ("cost", "milestones", "drops"),
    [(1.2, (30, 60, 90, 100), (25, 50, 75, 83)), (7, (30, 60, 90, 100), (4, 8, 12, 14))],
)
def test_at_drops_at_epochs_of_the_natural_budget(cost, milestones, drops):
    """Fast AdvProp's code: 30, 60, 90, 100 at cost 1.2 are data epochs 25, 50, 75, 83."""
    schedule = Schedule.parse(f"at:{','.join(map(str, milestones))}")
    factors = [
        schedule.factor(epoch * 3, total_updates=300, data_epochs_before=lambda u: u / 3, cost=cost)
        for epoch in range(100)
    ]
    for power, drop in enumerate(drops):
        assert factors[drop - 1] == pytest.approx(0.1**power)
        assert factors[drop] == pytest.approx(0.1 ** (power + 1))


@pytest.mark.parametrize("m", [1, 2])
def test_piecewise_draws_lines_between_epochs_of_the_natural_budget(m):
    """Ten updates an epoch of the budget: the rate at the place where each update ends."""
    schedule = Schedule.parse("piecewise:0=0,1=1,6=0.1,7=0.1")
    factors = [
        schedule.factor(update, total_updates=80, data_epochs_before=lambda u: u / (10 * m), cost=m)
        for update in range(80)
    ]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])  # the first is not 0
    assert factors[10] == pytest.approx(1 - 0.9 / 50)
    assert factors[59] == factors[60] == factors[79] == pytest.approx(0.1)  # the last one stays


@pytest.mark.parametrize(("kind", "per_step"), [("onecycle", 1), ("onecycle-epochs", 3)])
@pytest.mark.parametrize(("share", "total"), [(0.3, 100), (0.25, 7), (0.1, 10), (0.3, 2)])
def test_onecycle_is_torchs(kind, per_step, share, total):
    """Stepped after each update, or after each data epoch of three updates, replays or not."""
    schedule = Schedule.parse(f"{kind}:{share}")
    factors = [
        schedule.factor(
            update,
            total_updates=per_step * total,
            data_epochs_before=lambda u: u / 3,
            cost=4,
        )
        for update in range(per_step * total)
    ]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    if share * total == 1:  # torch divides by zero there
        assert factors[0] == 1
        return
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=total, pct_start=share
    )
    for step in range(total):
        (group,) = optimizer.param_groups
        ours = factors[per_step * step : per_step * (step + 1)]
        assert ours == pytest.approx([group["lr"]] * per_step, rel=1e-9)
        optimizer.step()
        if step < total - 1:
            scheduler.step()


@pytest.mark.parametrize(
    ("enough", "too_little"),
    [
        ({"m": 4, "epochs": 5}, {"m": 4, "epochs": 4}),
        ({"m": 1, "steps": 11}, {"m": 1, "steps": 10}),
        ({"m": 1, "epochs": 3, "warmup_epochs": 1}, {"m": 1, "epochs": 2, "warmup_epochs": 1}),
        ({"m": 2, "epochs": 5, "warmup_epochs": 2}, {"m": 2, "epochs": 4, "warmup_epochs": 2}),
    ],
)
def test_a_cycle_by_epochs_needs_two(enough, too_little):
    """Of ten minibatches each, after the warm-up; the last one trains at next to no rate."""

    def peak(fields):
        config = TrainConfig(lr=0.1, schedule="onecycle-epochs:0.3", **fields)
        budget = Budget.of(config, [10])
        return max(map(learning_rates(config, budget), range(budget.total_updates)))

    assert peak(enough) > 0.07
    with pytest.raises(UserError, match=r"--schedule onecycle-epochs:0.3: .* use onecycle:0.3,"):
        peak(too_little)
