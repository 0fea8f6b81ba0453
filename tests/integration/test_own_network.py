"""A network of the user's own: trained, recorded, exported, evaluated, resumed and handed back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import freeadv_fast as ff
from forked import run_ranks
from freeadv_fast import training
from freeadv_fast.errors import UserError
from freeadv_fast.models.own import adopt, freeze_unused
from freeadv_fast.runs.export.again import export_run
from freeadv_fast.session.signals import Interrupted


class Net(nn.Module):
    """Three classes; a part of it is never used."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(32, num_classes)
        self.spare = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.features(x))


PIXELS = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def seeded(num_classes=3):
    torch.manual_seed(1)
    return Net(num_classes)


@pytest.fixture
def config(small_images, tmp_path):
    return ff.TrainConfig(
        method="free", m=2, data=small_images, workers=1, image_size=16, batch_size=14, epochs=4,
        eps="8/255", holdout_images=30, eval_images=8, eval_attacks="pgd-2", log_every=2, lr=0.05,
        schedule="constant", output_dir=tmp_path / "run",
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"normalization": "per-image", "bn_group": 7}])
def test_from_training_to_a_network_elsewhere(config, changes, capsys):
    own = seeded().eval()
    start = {key: value.clone() for key, value in own.state_dict().items()}
    classes = [type(module) for module in own.modules()]
    result = ff.train(replace(config, **changes), model=own)

    record = json.loads((result.folder / "result.json").read_text())
    assert record["arch"] == result.arch == "custom (Net)"
    assert "arch: custom (Net)" in (result.folder / "config.yaml").read_text()
    assert "left as they are: " in capsys.readouterr().out

    # The module holds the weights that were evaluated; nothing else about it has changed.
    assert [type(module) for module in own.modules()] == classes
    assert not any(module.training for module in own.modules())
    assert all(parameter.requires_grad for parameter in own.parameters())
    assert not torch.equal(own.head.weight, start["head.weight"])
    assert torch.equal(own.spare.weight, start["spare.weight"])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (config.pixel_mean, config.pixel_std))
    with torch.no_grad():
        logits = result.model(PIXELS)
        if not changes:
            torch.testing.assert_close(logits, own((PIXELS - mean) / std))
        for network in (
            ff.load_run(result.folder, model=Net()).network,
            ff.load_export(result.folder / "export", model=Net()),
            ff.load_export(export_run(result.folder, model=Net()), model=Net()),
        ):
            torch.testing.assert_close(network(PIXELS), logits)
    measured = ff.evaluate(result.folder, model=Net(), attacks="pgd-2", checkpoint="last")
    assert measured.clean_accuracy == result.clean_accuracy
    for lines in json.loads((result.folder / "export" / "config.json").read_text())[
        "load"
    ].values():
        assert "your own Net" in "\n".join(lines)


def test_the_lines_of_its_export_work(config, monkeypatch):
    result = ff.train(replace(config, max_passes=60), model=seeded())
    monkeypatch.chdir(result.folder / "export")
    import safetensors.torch

    settings = json.loads(Path("config.json").read_text())
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
    for lines in settings["load"].values():
        names = {"model": Net(), "mean": mean, "std": std, "pixels": PIXELS}
        with torch.no_grad():
            exec("\n".join(lines), names | {"safetensors": safetensors}, names)
            torch.testing.assert_close(names["logits"], result.model(PIXELS))


def test_it_needs_the_network_again(config):
    folder = ff.train(replace(config, max_passes=60), model=seeded()).folder
    for use in (
        lambda: ff.load_run(folder),
        lambda: ff.evaluate(folder),
        lambda: ff.load_export(folder / "export"),
        lambda: ff.train(ff.load_run(folder, model=Net()).config),
    ):
        with pytest.raises(UserError, match=r"custom \(Net\): a network of your own; hand it over"):
            use()
    with pytest.raises(UserError, match="holds the weights of custom"):
        ff.load_export(folder / "export", model=nn.Sequential(nn.Flatten(), nn.Linear(768, 3)))


def test_stopped_and_resumed_it_ends_as_if_nothing_had_happened(config, tmp_path, monkeypatch):
    straight = ff.train(config, model=seeded())
    config = replace(config, output_dir=tmp_path / "stopped")
    own = seeded()

    def interrupt(run, stop):
        if run.progress.minibatch == 3:
            training.save(run)
            raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(training, "obey_requests", interrupt)
        with pytest.raises(Interrupted):
            ff.train(config, model=own)
    assert torch.equal(own.head.weight, seeded().head.weight)  # unchanged until the end
    resumed = ff.train(replace(config, resume=True), model=own)
    assert torch.equal(resumed.model(PIXELS), straight.model(PIXELS))

    again = Net()  # a finished run hands its weights over
    found = ff.train(replace(config, resume=True), model=again)
    assert torch.equal(again.head.weight, own.head.weight)
    assert found.record() == json.loads((resumed.folder / "result.json").read_text())


def half():
    return Net().half()


def returns_a_tuple():
    class Pair(Net):
        def forward(self, x):
            return super().forward(x), x

    return Pair()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.DataParallel(Net()), "is in DataParallel.*hand over model.module"),
        (lambda: torch.compile(Net()), "is compiled; hand over model._orig_mod"),
        (lambda: nn.Sequential(torch.compile(Net())), r"is compiled; hand over model.0._orig_mod"),
        (half, "features.0.weight is float16; hand over model.float()"),
        (returns_a_tuple, r"returns tuple; hand over a module that returns the logits alone"),
        (lambda: Net(5), r"returns \(2, 5\) for two images; the data have 3 classes"),
        (
            lambda: nn.Linear(3, 3),
            r"cannot take images of shape \(2, 3, 16, 16\)|returns \(2, 3, 16",
        ),
        (lambda: Net().requires_grad_(False), "none of its parameters requires a gradient"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_the_start(config, build, message):
    with pytest.raises(UserError, match=message):
        ff.train(config, model=build())
    assert not Path(config.output_dir).exists()


def test_a_network_that_cannot_be_copied_is_refused():
    own = Net()
    own.lock = (lock for lock in ())
    with pytest.raises(UserError, match="model Net: cannot be copied"):
        adopt(own, 3, image_sizes=[16])


def test_unused_parameters_are_found_and_nothing_else_moves():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model = adopt(Net(), 3, image_sizes=[16])
    statistics = model.features[1].running_mean.clone()
    torch.manual_seed(5)
    assert freeze_unused(model, 16) == ["spare.weight", "spare.bias"]
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(model.features[1].running_mean, statistics)


RANKS = """
import sys
sys.path.insert(0, sys.argv[1])
import freeadv_fast as ff
from test_own_network import Net, PIXELS
import torch
torch.set_num_threads(1)
torch.manual_seed(1)
config = ff.TrainConfig(
    method="free", m=2, data=sys.argv[2], workers=1, image_size=16, batch_size=7, epochs=2,
    eps="8/255", holdout_images=30, eval_images=8, eval_attacks="pgd-2", output_dir=sys.argv[3],
)
own = Net()
result = ff.train(config, model=own)
print("hash", float(own.head.weight.double().sum()), float(result.model(PIXELS).double().sum()))
"""


def test_ranks_train_it_with_its_unused_part(small_images, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(RANKS)
    words = Path(__file__).parent, small_images, tmp_path / "run"
    done = run_ranks(2, script, *words, output=tmp_path / "output")
    assert done.returncode == 0, done.stderr
    hashes = [line for line in done.stdout.splitlines() if line.startswith("hash")]
    assert len(hashes) == 2
    assert hashes[0] == hashes[1]
    assert done.stdout.count("left as they are: spare.weight, spare.bias") == 1
