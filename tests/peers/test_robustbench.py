"""RobustBench's own loader and parser, in their environment, take what we export for them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from freeadv_fast.config.attack import Attack
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.models.zoo import build_model
from freeadv_fast.runs.export.claims import Claim, Claims
from freeadv_fast.runs.export.robustbench import export_robustbench, submission_of
from freeadv_fast.runs.log import RunFolder
from freeadv_fast.runs.saved import SavedRun

pytestmark = pytest.mark.peers
NAME = "Doe2026Free_Net"
WNIDS = [f"n{number:08d}" for number in range(1000)]


def trained(arch, num_classes, image_size):
    """A network whose batch norms have seen images, as training leaves it."""
    torch.manual_seed(0)
    model = build_model(arch, num_classes, image_size=image_size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ("data", "arch", "norm", "eps", "shown"),
    [
        ("cifar10:data", "preact-resnet18", "linf", "8/255", "8/255"),
        ("cifar10:data", "preact-resnet18-gradalign", "linf", "8/255", "8/255"),
        ("cifar10:data", "cifar-resnet18", "linf", "8/255", "8/255"),
        ("cifar10:data", "wrn-28-10", "linf", "8/255", "8/255"),
        ("cifar10:data", "resnet18", "linf", "8/255", "8/255"),
        ("cifar10:data", "preact-resnet18", "l2", "127.5/255", "0.5"),
        ("cifar100:data", "wrn-34-10", "linf", "8/255", "8/255"),
        ("/imagenet", "resnet50", "linf", "4/255", "4/255"),
        ("/imagenet", "timm/resnet18", "linf", "4/255", "4/255"),
    ],
)
def test_they_load_our_network_and_read_our_numbers(
    robustbench, tmp_path, data, arch, norm, eps, shown
):
    dataset = {"cifar10:data": "cifar10", "cifar100:data": "cifar100"}.get(data, "imagenet")
    classes = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}[dataset]
    size = 224 if dataset == "imagenet" else 32
    config = TrainConfig(
        data=data, arch=arch, norm=norm, eps=eps, image_size=size, method="pgd", m=1,
        normalization="imagenet" if dataset == "imagenet" else "cifar10",
    )  # fmt: skip
    model = trained(arch, classes, size)
    run = SavedRun(RunFolder(tmp_path), config, tmp_path / "last.pt", WNIDS[:classes], model)
    claims = Claims(
        clean=[Claim(None, 0.8334, 10_000)],
        robust=[Claim(Attack.parse("autoattack"), 0.43216, 10_000)],
    )
    lines = export_robustbench(submission_of(NAME, run, claims))
    assert lines[0] == f"wrote {tmp_path / 'export-robustbench' / NAME}"
    pixels = torch.rand(3, 3, size, size)
    torch.save(pixels, tmp_path / "pixels.pt")
    theirs = robustbench_says(robustbench, tmp_path, dataset, {"linf": "Linf"}.get(norm, "L2"))
    with torch.no_grad():
        logits = run.network(pixels)
    assert theirs["labels"] == logits.argmax(1).tolist()
    torch.testing.assert_close(torch.tensor(theirs["logits"]), logits, rtol=1e-4, atol=1e-4)
    assert "<sub>83.34%</sub> | <sub>43.22%</sub>" in theirs["table"]
    assert " & 83.34 & 43.22 & N & " in theirs["latex"]
    folder = tmp_path / "export-robustbench" / NAME
    assert f"- **eps**: {shown}\n" in (folder / "issue.md").read_text()


def robustbench_says(python, run_folder, dataset, norm):
    """What `robustbench_side.py` prints of a submission."""
    script = Path(__file__).with_name("robustbench_side.py")
    folder, images = run_folder / "export-robustbench" / NAME, run_folder / "pixels.pt"
    command = [str(v) for v in (python, script, folder, NAME, dataset, norm, images)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
