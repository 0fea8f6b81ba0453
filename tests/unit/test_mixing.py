"""Mixup and CutMix: which pixels come from where, and what the labels weigh."""

import pytest
import torch
import torch.nn.functional as F

from freeadv_fast.step.mixing import MixedLabels, cross_entropy_sum, mix, num_hits


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def example(num=6, size=16):
    """Images of one constant value each, so that a pixel says where it is from."""
    x = torch.arange(num, dtype=torch.float32).view(-1, 1, 1, 1).expand(num, 3, size, size)
    return x.contiguous(memory_format=torch.channels_last), torch.arange(num) % 4


def test_none_returns_what_came():
    x, labels = example()
    same, targets = mix(x, labels, "none")
    assert same is x
    assert targets is labels


def test_mixup_blends_every_pixel_by_the_share():
    x, labels = example()
    for _ in range(20):
        mixed, (own, other, share) = mix(x, labels, "mixup", alpha=1.0)
        partners = ((mixed[:, 0, 0, 0] - share * x[:, 0, 0, 0]) / (1 - share)).round().long()
        assert sorted(partners.tolist()) == list(range(6))
        torch.testing.assert_close(mixed, share * x + (1 - share) * x[partners])
        assert torch.equal(own, labels)
        assert torch.equal(other, labels[partners])
        assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_cutmix_pastes_one_rectangle_and_weighs_by_its_area():
    x, labels = example()
    before, areas = x.clone(), []
    for _ in range(50):
        mixed, (own, other, share) = mix(x, labels, "cutmix")
        pasted = mixed != x
        rows = pasted.any(3).any(1).any(0).nonzero().squeeze(1)
        columns = pasted.any(2).any(1).any(0).nonzero().squeeze(1)
        if len(rows):
            assert rows[-1] - rows[0] + 1 == len(rows)
            box = mixed[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert (box == box[:, :1, :1, :1]).all()
            partners = box[:, 0, 0, 0].long()
            assert torch.equal(other, labels[partners])
            assert 1 - share == pytest.approx(box[0, 0].numel() / 256)
            areas.append(1 - share)
        assert torch.equal(own, labels)
    assert torch.equal(x, before), "the minibatch itself is not pasted into"
    assert len(areas) > 30
    assert max(areas) - min(areas) > 0.3


@pytest.mark.parametrize(("kind", "alpha", "extreme"), [("mixup", 0.2, 0.6), ("mixup", 5.0, 0.02)])
def test_alpha_shapes_the_share(kind, alpha, extreme):
    """Beta(0.2, 0.2) is mostly near 0 or 1, Beta(5, 5) near the middle."""
    x, labels = example()
    shares = torch.tensor([mix(x, labels, kind, alpha)[1].share for _ in range(400)])
    near_the_ends = ((shares < 0.1) | (shares > 0.9)).float().mean()
    assert abs(near_the_ends - extreme) < 0.12
    assert abs(shares.mean() - 0.5) < 0.08


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_loss_and_hits_weigh_both_labels(smoothing):
    logits, own, other = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1] * 5)
    expected = sum(
        0.3 * F.cross_entropy(row, a, label_smoothing=smoothing)
        + 0.7 * F.cross_entropy(row, b, label_smoothing=smoothing)
        for row, a, b in zip(logits, own, other, strict=True)
    )
    mixed = MixedLabels(own, other, 0.3)
    torch.testing.assert_close(cross_entropy_sum(logits, mixed, smoothing), expected)
    guesses = logits.argmax(1)
    hits = 0.3 * (guesses == own).sum() + 0.7 * (guesses == other).sum()
    torch.testing.assert_close(num_hits(logits, mixed), hits)
    assert num_hits(logits, own) == (guesses == own).sum()
