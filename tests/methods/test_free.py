"""Free training against a slow loop written from the paper, and the arithmetic of its delta."""

import copy

import pytest
import torch
import torch.nn.functional as F

from freeadv_fast.config.threat import Perturbation, ThreatModel
from freeadv_fast.methods.free import Free
from freeadv_fast.methods.natural import Natural
from freeadv_fast.step.learner import Learner, Pixels
from freeadv_fast.step.optim import build_sgd

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
LR, MOMENTUM, DECAY = 0.05, 0.9, 5e-4


def minibatches(sizes, seed=0):
    """Minibatches of random 8x8 images, with the extremes 0 and 255 common in them."""
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        images = torch.randint(-60, 316, (size, 8, 8, 3), generator=generator)
        labels = torch.randint(0, 5, (size,), generator=generator)
        yield images.clamp(0, 255).to(torch.uint8), labels


def build_learner(network, dtype=torch.float32):
    """A learner with a falling learning rate."""
    optimizer = build_sgd(network, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, decay="all")
    pixels = Pixels(torch.tensor(MEAN), torch.tensor(STD), dtype)
    return Learner(network, optimizer, lambda update: LR / (1 + update), pixels)


def slow_free(network, batches, *, m, eps, step, slots):
    """Algorithm 1 as the paper writes it: autograd to delta itself, SGD by hand, fp32 delta.

    Returns the perturbation, (slots, 8, 8, 3), in grey levels.
    """
    delta = torch.zeros(slots, 8, 8, 3)
    momentum = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    update = 0
    for images, labels in batches:
        n = len(images)
        for _ in range(m):
            d = delta[:n].clone().requires_grad_()
            pixels = (images.float() + d).clamp(0, 255) / 255
            x = (pixels - torch.tensor(MEAN)) / torch.tensor(STD)
            x = x.permute(0, 3, 1, 2)
            loss = F.cross_entropy(network(x), labels, reduction="sum") / n
            network.zero_grad()
            loss.backward()
            with torch.no_grad():
                delta[:n] = (delta[:n] + step * d.grad.sign()).clamp(-eps, eps)
                for name, p in network.named_parameters():
                    gradient = p.grad.add(p, alpha=DECAY)
                    momentum[name].mul_(MOMENTUM).add_(gradient)
                    p.add_(momentum[name], alpha=-LR / (1 + update))
            update += 1
    return delta


@pytest.mark.parametrize(("eps", "step"), [(8, 8), (4, 4), (3, 2)])
def test_free_equals_the_slow_loop_bit_for_bit(small_network, eps, step):
    """Weights, running statistics and delta over two epochs with a smaller last minibatch."""
    sizes = [6, 6, 4] * 2
    ours, theirs = small_network(), small_network()
    threat = ThreatModel(Perturbation.parse(f"{eps}/255"), Perturbation.parse(f"{step}/255"))
    free = Free(
        build_learner(ours), threat, m=3, minibatch_shape=(6, 8, 8, 3), device=torch.device("cpu")
    )
    for images, labels in minibatches(sizes):
        free.train_minibatch(images, labels, len(images))
    delta = slow_free(theirs, minibatches(sizes), m=3, eps=eps, step=step, slots=6)
    torch.testing.assert_close(free.delta.float() * free.unit, delta, rtol=0, atol=0)
    assert delta.abs().max() == eps  # the perturbation is at work
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_rows_beyond_a_smaller_minibatch_wait(small_network):
    """Row i belongs to slot i: a minibatch of 4 leaves rows 4 and 5 alone."""
    threat = ThreatModel(Perturbation.parse("8/255"), Perturbation.parse("8/255"))
    free = Free(
        build_learner(small_network()), threat, m=2, minibatch_shape=(6, 8, 8, 3),
        device=torch.device("cpu"),
    )  # fmt: skip
    (images, labels), (fewer, fewer_labels) = minibatches([6, 4])
    free.train_minibatch(images, labels, 6)
    before = free.delta.clone()
    free.train_minibatch(fewer, fewer_labels, 4)
    assert torch.equal(free.delta[4:], before[4:])
    assert not torch.equal(free.delta[:4], before[:4])


def test_delta_is_stored_in_int8_where_that_is_exact():
    """Whole multiples of the step up to 127, and nothing else."""

    def dtype(eps, step):
        return ThreatModel(Perturbation.parse(eps), Perturbation.parse(step)).delta_dtype

    assert dtype("8/255", "8/255") is torch.int8
    assert dtype("5/255", "2.5/255") is torch.int8
    assert dtype("127/255", "1/255") is torch.int8
    assert dtype("128/255", "1/255") is torch.float32
    assert dtype("3/255", "2/255") is torch.float32
    assert dtype("2/255", "4/255") is torch.float32


def test_natural_replay_trains_m_times_on_each_minibatch(small_network):
    """Figure 1's natural training with replay equals ordinary training on repeated minibatches."""
    replayed, repeated = small_network(), small_network()
    natural = Natural(build_learner(replayed), m=3)
    for images, labels in minibatches([6, 5]):
        natural.train_minibatch(images, labels, len(images))
    once = Natural(build_learner(repeated), m=1)
    for images, labels in minibatches([6, 5]):
        for _ in range(3):
            once.train_minibatch(images, labels, len(images))
    for a, b in zip(replayed.parameters(), repeated.parameters(), strict=True):
        assert torch.equal(a, b)


def test_fp16_overflow_skips_weights_and_never_moves_delta_by_a_bad_gradient(small_network):
    """A loss scale too large for fp16: the step is skipped, the scale falls, weights stay."""
    network = small_network()
    before = copy.deepcopy(network.state_dict())
    learner = build_learner(network, torch.float16)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    threat = ThreatModel(Perturbation.parse("8/255"), Perturbation.parse("8/255"))
    free = Free(learner, threat, m=1, minibatch_shape=(6, 8, 8, 3), device=torch.device("cpu"))
    ((images, labels),) = minibatches([6])
    free.train_minibatch(images, labels, 6)
    assert learner.scaler.get_scale() == 2.0**39
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert learner.meters.nonfinite_gradients.item() > 0
    assert not free.delta.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns(small_network, dtype):
    """Ten replays on one minibatch lower the loss and move delta."""
    learner = build_learner(small_network(), dtype)
    learner.lr_at = lambda update: LR
    threat = ThreatModel(Perturbation.parse("2/255"), Perturbation.parse("2/255"))
    free = Free(learner, threat, m=10, minibatch_shape=(6, 8, 8, 3), device=torch.device("cpu"))
    ((images, labels),) = minibatches([6])
    with torch.no_grad():
        before = F.cross_entropy(learner.net(learner.network_input(images).float()), labels)
    free.train_minibatch(images, labels, 6)
    with torch.no_grad():
        after = F.cross_entropy(learner.net(learner.network_input(images).float()), labels)
    assert after < 0.7 * before
    assert free.delta.any()
    assert all(torch.isfinite(p).all() for p in learner.net.parameters())
