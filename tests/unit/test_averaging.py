"""The average of the weights against one computed slowly, in float64, from every update's."""

import copy

import pytest
import torch

import slow_steps as slow
from freeadv_fast.config.budget import Budget
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.errors import UserError
from freeadv_fast.methods.build import build_method
from freeadv_fast.session.network import build_learner
from freeadv_fast.step.averaging import WeightAverage

DECAY, BATCH = 0.8, 6
METHODS = {
    "natural": {},
    "free": {"m": 3},
    "pgd": {"attack_steps": 2},
    "fast-advprop": {"p_adv": 0.5, "aux_bn_group": 2, "shuffle": False},
}


def trainer(method, network, world, **fields):
    """A method as a run builds it, with an average."""
    usual = {"m": 1, "batch_size": BATCH, "image_size": 8, "lr": slow.LR, "ema": DECAY}
    config = TrainConfig(method=method, **usual | fields)
    learner = build_learner(network, config, world, Budget.of(config, [8]))
    return build_method(config, learner, world.device, 5)


def watched(learner):
    """The network's tensors after each update, in float64."""
    seen, real = [], learner.update

    def update(step, *inputs):
        real(step, *inputs)
        seen.append({k: v.double().clone() for k, v in learner.network.state_dict().items()})

    learner.update = update
    return seen


def slow_mean(states):
    """The mean of states, of which the one s updates ago has the weight decay^s."""
    weights = [DECAY ** (len(states) - 1 - s) for s in range(len(states))]
    return {
        name: sum(w * state[name] for w, state in zip(weights, states, strict=True)) / sum(weights)
        for name in states[0]
    }


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_weighted_mean_of_all_updates(method, parts, small_network, world):
    """Weights and running statistics, auxiliary ones too; replays and parts count as updates do."""
    if method == "fast-advprop" and parts > 1:
        pytest.skip("not in parts")
    trained = trainer(method, small_network(), world, accumulate=parts, **METHODS[method])
    states = watched(trained.learner)
    for images, labels in slow.minibatches([BATCH * parts] * 3):
        trained.train_minibatch(images, labels, BATCH * parts)
        mean, average = slow_mean(states), trained.learner.average.state_dict()
        assert average["updates"] == len(states) == trained.learner.updates
        assert average["model"].keys() == mean.keys()
        for name, value in average["model"].items():
            if value.is_floating_point():
                torch.testing.assert_close(value.double(), mean[name], rtol=1e-6, atol=1e-7)
            else:
                assert value == states[-1][name]
    assert len(states) == 3 * METHODS[method].get("m", 1)
    assert ("1.aux_bn.running_mean" in mean) == (method == "fast-advprop")


def test_the_first_update_leaves_no_trace_of_the_start(small_network, world):
    """To the last bit; before it the average is the weights as they are."""
    trained = trainer("natural", small_network(), world)
    average, network = trained.learner.average, trained.learner.network
    assert torch.equal(average.state_dict()["model"]["0.weight"], network[0].weight)
    ((images, labels),) = slow.minibatches([BATCH])
    trained.train_minibatch(images, labels, BATCH)
    for name, value in network.state_dict().items():
        assert torch.equal(average.state_dict()["model"][name], value)


def test_training_does_not_feel_it_and_the_host_reads_nothing(small_network, world):
    averaged, plain = (trainer("free", small_network(), world, ema=ema) for ema in (0.9, None))
    slow.assert_never_reads(averaged)
    slow.assert_never_reads(plain)
    slow.assert_equal_networks(averaged.learner.network, plain.learner.network, tolerance=0)
    assert plain.learner.average is None
    kinds = averaged.learner.changing_tensors()
    assert kinds.keys() - plain.learner.changing_tensors().keys() == {"averages"}


def test_a_skipped_update_counts_with_the_weights_as_they_are(small_network, world):
    trained = trainer("natural", small_network(), world)
    states = watched(trained.learner)
    trained.learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number, (images, labels) in enumerate(slow.minibatches([BATCH] * 3)):
        if number > 0:
            trained.learner.scaler.update((float("inf"), 2.0**10)[number - 1])
        trained.train_minibatch(images, labels, BATCH)
    assert trained.learner.meters.skipped_updates == 1
    assert torch.equal(states[0]["0.weight"], states[1]["0.weight"])
    average = trained.learner.average.state_dict()
    assert average["updates"] == 3
    torch.testing.assert_close(
        average["model"]["0.weight"].double(), slow_mean(states)["0.weight"], rtol=1e-6, atol=1e-7
    )


def test_it_goes_on_from_its_state_bit_for_bit(small_network):
    """With another rank's statistics in it, which the rank's own replace."""
    network = small_network()
    average = WeightAverage(network, DECAY)

    def move(network, average):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.1)
        network[1].running_mean.add_(1)
        average.begin_update()
        average.update()

    move(network, average)
    move(network, average)
    saved = copy.deepcopy(average.state_dict())
    own = {name: value.clone() for name, value in average.statistics.items()}
    assert own.keys() == {f"{n}.running_{what}" for n in (1, 4) for what in ("mean", "var")}
    saved["model"]["1.running_mean"].zero_()
    twin = copy.deepcopy(network)
    other = WeightAverage(twin, DECAY)
    other.load_state_dict(saved)
    assert not other.statistics["1.running_mean"].any()
    other.load_statistics(own)
    move(network, average)
    move(twin, other)
    for name, value in average.state_dict()["model"].items():
        assert torch.equal(other.state_dict()["model"][name], value)
    average.restart()
    assert average.updates == 0
    assert torch.equal(average.state_dict()["model"]["0.weight"], network[0].weight)


def test_a_buffer_that_a_module_replaces_is_averaged_as_well(small_network):
    """And one in half precision is the network's own of the moment: its average would not move."""
    network = small_network()
    network.register_buffer("center", torch.zeros(2))
    network.register_buffer("narrow", torch.zeros(2, dtype=torch.float16))
    network.register_buffer("scratch", torch.zeros(2), persistent=False)
    average = WeightAverage(network, 0.5)
    for value in (1.0, 4.0):
        network.center, network.narrow = torch.full((2,), value), torch.full((2,), value).half()
        average.begin_update()
        average.update()
    model = average.state_dict()["model"]
    assert model["center"].tolist() == pytest.approx([3.0, 3.0])  # (1 * 0.5 + 4) / 1.5
    assert model["narrow"].tolist() == [4.0, 4.0]
    assert model.keys() == network.state_dict().keys()


@pytest.mark.parametrize("value", [0, 1, -0.5, 1.5, float("nan")])
def test_a_factor_that_averages_nothing_is_refused(value):
    with pytest.raises(UserError, match=rf"--ema {value}: must be above 0 and below 1"):
        TrainConfig(ema=value)
