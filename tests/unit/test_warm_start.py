"""Free training's perturbation between minibatches of different shapes."""

import pytest
import recorded_training
import torch
import torch.nn.functional as F
from torch import nn

import slow_steps as slow
from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.methods.free import Free
from freeadv_fast.step.graphs import GraphRunner
from freeadv_fast.step.warm_start import WarmStart


def pooling_network():
    """Takes images of any size."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


def images_of(height, width, count=3):
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("size", [(8, 5), (4, 10), (3, 3), (13, 17)])
def test_another_shape_takes_each_pixel_from_the_nearest(dtype, size):
    """As torch's own nearest interpolation."""
    delta = torch.randint(-4, 5, (3, 6, 10, 3)).to(dtype)
    carried = WarmStart(delta.clone())
    carried.carry_to(images_of(*size))
    expected = F.interpolate(delta.float().permute(0, 3, 1, 2), size, mode="nearest")
    assert carried.delta.dtype is dtype
    assert torch.equal(carried.delta.float(), expected.permute(0, 2, 3, 1))


def test_a_shape_that_comes_again_has_the_same_tensor():
    """A recorded update writes to it; what it held before does not come back."""
    carried = WarmStart(torch.ones(2, 4, 4, 3))
    first = carried.delta
    carried.carry_to(images_of(4, 6))
    other = carried.delta
    other.fill_(2)
    carried.carry_to(images_of(4, 4))
    assert carried.delta is first
    assert (first == 2).all()
    carried.carry_to(images_of(4, 6))
    assert carried.delta is other


def test_a_saved_perturbation_of_another_shape_goes_on():
    saved = torch.randn(2, 5, 7, 3)
    carried = WarmStart(torch.zeros(2, 4, 4, 3))
    carried.load(saved)
    assert torch.equal(carried.delta, saved)
    assert carried.delta is not saved
    carried.carry_to(images_of(4, 4))
    assert carried.delta.shape == (2, 4, 4, 3)


def test_free_training_carries_its_perturbation_over():
    """From 8 x 8 to 8 x 12: where the second minibatch starts is where the first one ended."""
    learner = slow.build_learner(pooling_network().double())
    threat = ThreatModel(Perturbation.parse("8/255"), Perturbation.parse("4/255"))
    method = Free(learner, threat, m=1, minibatch_shape=(4, 8, 8, 3), device=torch.device("cpu"))
    labels = torch.tensor([0, 1, 2, 3])
    method.train_minibatch(images_of(8, 8, 4), labels, 4)
    ended = method.delta.clone()
    assert ended.abs().sum() > 0
    seen, network_input = [], learner.network_input

    def noting(images, delta, unit):
        seen.append(delta.clone())
        return network_input(images, delta, unit)

    learner.network_input = noting
    method.train_minibatch(images_of(8, 12, 4), labels, 4)
    columns = torch.tensor([0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7])
    assert torch.equal(seen[0], ended[:, :, columns])
    state = {"delta": method.state_dict()["delta"].clone()}
    assert state["delta"].shape == (4, 8, 12, 3)
    again = Free(learner, threat, m=1, minibatch_shape=(4, 8, 8, 3), device=torch.device("cpu"))
    again.load_state_dict(state)
    assert torch.equal(again.delta, method.delta)


def test_recordings_of_several_shapes_share_one_perturbation():
    """Each launch writes to the tensor of its shape, into which the last one's was carried."""
    torch.manual_seed(0)
    networks, results = [pooling_network() for _ in range(2)], []
    networks[1].load_state_dict(networks[0].state_dict())
    generator = torch.Generator().manual_seed(1)
    sizes = [(8, 8), (8, 12), (8, 8), (8, 12), (8, 8)]
    batches = [
        torch.randint(0, 256, (6, *size, 3), generator=generator).to(torch.uint8) for size in sizes
    ]
    recorder = recorded_training.Recorder()
    for network, is_recorded in zip(networks, (False, True), strict=True):
        learner = recorded_training.build_learner(network)
        method = recorded_training.build_method("free", learner)
        if is_recorded:
            recorder.learner = learner
            learner.record_with(GraphRunner(print, recorder, warm_up=1))
        for images in batches:
            method.train_minibatch(images, torch.arange(6) % 5, 6)
        results.append((torch.cat([p.flatten() for p in network.parameters()]), method.delta))
    assert recorder.num_recordings == 2
    assert recorder.num_launches > 10
    for eager, recorded in zip(*results, strict=True):
        assert torch.equal(eager, recorded)
    assert results[0][1].any()
