"""Files of anybody's weights against the modules that wrote them, and their normalisation."""

from __future__ import annotations

import pytest
import torch
import torchvision
from foreign_files import (
    BARE,
    MEAN,
    NORMALIZED,
    SIDE,
    STD,
    TINY,
    madry,
    own_checkpoint,
    prefixed,
    tiny,
)
from torch import nn

from freeadv_fast.config.presets import PIXEL_STATISTICS
from freeadv_fast.evaluation.candidate import find_candidate
from freeadv_fast.models import zoo
from freeadv_fast.models.wide_resnet import WideResNet


def loaded(path, data="/imagenet", *, num_classes=3, side=SIDE, **options):
    """The network of a file, and the lines that are said of it."""
    given = {"arch": None, "mean": None, "std": None, "model": None} | options
    candidate = find_candidate(str(path), data=data, **given)
    return candidate.build(num_classes, side), list(candidate.lines)


def logits_agree(network, original, mean, std, side=SIDE):
    """Whether a network of pixels is the original behind its normalisation."""
    pixels = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (mean, std))
    with torch.no_grad():
        expected = original((pixels - mean) / std)
        return torch.allclose(network(pixels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [*NORMALIZED, *BARE])
def test_a_file_is_the_module_that_wrote_it(tmp_path, layout):
    original, path = tiny(), tmp_path / "weights.pt"
    torch.save((NORMALIZED | BARE)[layout](dict(original.state_dict())), path)
    typed = {} if layout in NORMALIZED else {"mean": "0.47,0.45,0.38", "std": STD}
    network, lines = loaded(path, arch=TINY, **typed)
    assert logits_agree(network, original, MEAN, STD)
    (line,) = lines
    whose = "--mean and --std" if typed else "the file's own "
    assert line.startswith(f"normalisation: {whose}")
    assert line.endswith("(mean 0.47, 0.45, 0.38; std 0.26, 0.25, 0.24)")


def test_the_file_wins_over_what_was_typed(tmp_path):
    original, path = tiny(), tmp_path / "weights.pt"
    torch.save(NORMALIZED["RobustBench"](dict(original.state_dict())), path)
    network, lines = loaded(path, arch=TINY, mean=(0, 0, 0), std=(1, 1, 1))
    assert logits_agree(network, original, MEAN, STD)
    assert lines[1] == "--mean and --std are not read: the file says it"


def cifar_resnet50():
    """pytorch-cifar's ResNet-50, which MadryLab trains: torchvision's, and the names there."""
    network = torchvision.models.resnet50(num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    names = {
        key: key.replace("downsample", "shortcut").replace("fc.", "linear.")
        for key in network.state_dict()
    }
    weights = {names[key]: value for key, value in network.state_dict().items()}
    return network.eval(), weights


def test_madrylab_s_network_of_cifar(tmp_path):
    original, weights = cifar_resnet50()
    torch.save(madry(weights), tmp_path / "weights.pt")
    network, _ = loaded(
        tmp_path / "weights.pt", "cifar10:x", arch="cifar-resnet50", num_classes=10, side=32
    )
    assert logits_agree(network, original, MEAN, STD, 32)


def test_a_stage_of_trades_that_no_image_passes_is_left_out(tmp_path, monkeypatch):
    narrow = {"wrn-34-10": lambda n: WideResNet(n, depth=10, widen_factor=1)}
    monkeypatch.setattr(zoo, "OWN_NETWORKS", zoo.OWN_NETWORKS | narrow)
    original = narrow["wrn-34-10"](10).eval()
    weights = original.state_dict()
    unused = prefixed({"layer.0.conv1.weight": torch.rand(16, 16, 3, 3)}, "sub_block1.")
    torch.save(weights | unused, tmp_path / "weights.pt")
    network, lines = loaded(
        tmp_path / "weights.pt", "cifar10:x", arch="wrn-34-10", num_classes=10, side=32
    )
    assert logits_agree(network, original, *PIXEL_STATISTICS["cifar10"], 32)
    assert lines[0].startswith("normalisation: cifar10's (mean 0.4914")


@pytest.mark.parametrize(
    ("arch", "data", "statistics", "source"),
    [
        (TINY, "/imagenet", ((0.5,) * 3, (0.5,) * 3), "timm's for timm/test_resnet"),
        ("resnet18", "/imagenet", PIXEL_STATISTICS["imagenet"], "ImageNet's, as torchvision's"),
        (TINY, "cifar100:x", PIXEL_STATISTICS["cifar100"], "cifar100's"),
    ],
)
def test_without_a_word_the_usual_normalisation_is_taken_and_told(
    tmp_path, arch, data, statistics, source
):
    original = tiny() if arch == TINY else torchvision.models.resnet18(num_classes=3).eval()
    torch.save(original.state_dict(), tmp_path / "weights.pt")
    network, (line,) = loaded(tmp_path / "weights.pt", data, arch=arch)
    assert logits_agree(network, original, *statistics)
    assert line.startswith(f"normalisation: {source}")
    assert line.endswith("; --mean and --std choose another")


@pytest.mark.parametrize("normalization", ["cifar10", "per-image"])
def test_a_checkpoint_of_ours_says_everything_itself(tmp_path, normalization):
    model = own_checkpoint(tmp_path / "last.pt", normalization)
    network, (line,) = loaded(tmp_path / "last.pt")
    assert logits_agree(network, model, *PIXEL_STATISTICS[normalization])
    assert line.startswith(f"normalisation: the run's, {normalization} (mean ")


def test_weights_of_a_module_of_the_user_s_own(tmp_path, small_network):
    original = small_network().eval()
    torch.save(original.state_dict(), tmp_path / "weights.pt")
    given = {"mean": MEAN, "std": STD, "num_classes": 5, "side": 8}
    network, _ = loaded(tmp_path / "weights.pt", model=small_network(), **given)
    assert logits_agree(network, original, MEAN, STD, 8)
