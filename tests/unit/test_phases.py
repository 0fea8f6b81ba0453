"""Phases of a run: what users write, what it means in minibatches, what is refused."""

import dataclasses
import shutil

import pytest

from freeadv_fast.cli import run as cli
from freeadv_fast.cli.flags import parse
from freeadv_fast.cli.resolve import resolve
from freeadv_fast.config.budget import Budget
from freeadv_fast.config.file import load_config
from freeadv_fast.config.phases import Phase, Phases
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.build import build_phase_loaders
from freeadv_fast.errors import UserError
from freeadv_fast.recipes.catalogue import RECIPES
from freeadv_fast.runs.log import save_config

WONG = RECIPES["imagenet-rn50-fgsm-rs-eps2"]
THREE = "0-4:16:36,4-7:24:24,7-10:32:20"


def three_phases(**changes):
    """Free training, m = 2: 16, 24 and 32 px over ten epochs' budget."""
    fields = {"m": 2, "epochs": 10, "phases": Phases.parse(THREE), "eps": "8/255"} | changes
    fields["eps"] = TrainConfig().eps.parse(fields["eps"])
    return TrainConfig(**fields)


def test_what_is_written_is_what_is_read():
    """Epochs, side and batch; fractions of an epoch are allowed."""
    phases = Phases.parse("0-0.5:128:512,0.5-2:224:64")
    assert phases[1] == Phase(0.5, 2.0, 224, 64)
    assert str(phases) == "0-0.5:128:512,0.5-2:224:64"
    assert Phases.parse(str(WONG.phases)) == WONG.phases
    assert Phases.parse("none") == Phases()
    assert not Phases.parse("none")


def test_the_last_phase_is_what_the_run_is_evaluated_and_saved_as(tmp_path):
    """Image and batch size of the config follow it, and survive the file."""
    config = three_phases()
    assert (config.image_size, config.batch_size) == (32, 20)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_each_phase_is_a_config_of_its_own():
    """Side, batch, folder; --resize-size belongs to the last phase, and its proportion to all."""
    config = three_phases(resize_size=48, phase_data=("a", "b", "c"), data="c")
    found = [(c.image_size, c.batch_size, c.data, c.resize_size) for c in config.phase_configs]
    assert found == [(16, 36, "a", 24), (24, 24, "b", 36), (32, 20, "c", 48)]
    assert not any(phase.phases or phase.phase_data for phase in config.phase_configs)
    as_stored = three_phases(resize_size=0)
    assert [c.evaluation_resize for c in as_stored.phase_configs] == [18, 27, 0]
    assert as_stored.phase_configs[0].data == "digits"
    plain = TrainConfig()
    assert plain.phase_configs == (plain,)


@pytest.mark.parametrize(("m", "ends"), [(1, (4, 7, 10)), (2, (2, 4, 5)), (3, (2, 3, 4))])
def test_boundaries_are_rounded_up_to_data_epochs(m, ends):
    """ceil(boundary / m), the last one the run's own data epochs."""
    config = three_phases(m=m)
    assert config.phase_ends == ends
    assert config.data_epochs == ends[-1]


def test_a_budget_counts_minibatches_phase_by_phase():
    """m = 2 over 108 images: 2 x 3, 2 x 5 and 1 x 6 minibatches, twice as many updates."""
    budget = Budget.of(three_phases(), [3, 5, 6])
    assert [span.epochs for span in budget.spans] == [range(0, 2), range(2, 4), range(4, 5)]
    assert [span.updates for span in budget.spans] == [range(0, 12), range(12, 32), range(32, 44)]
    assert (budget.data_epochs, budget.total_updates) == (5, 44)
    assert [budget.phase_of(epoch) for epoch in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [epoch for epoch in range(6) if budget.begins_phase(epoch)] == [2, 4]
    places = {0: 0, 3: 0.5, 6: 1, 12: 2, 13: 2.1, 22: 3, 32: 4, 35: 4.25, 44: 5}
    for update, place in places.items():
        assert budget.data_epochs_before(update) == pytest.approx(place, abs=1e-12)
        if place == int(place):
            assert budget.data_epochs_before(update) == place


def test_wong_et_als_recipe():
    """1,281,167 images without 1000: 2501, 5716 and 10,002 minibatches an epoch, 79,308 in all."""
    assert str(WONG.threat.step) == "2.5/255"
    assert str(RECIPES["imagenet-rn50-fgsm-rs-eps4"].threat.step) == "5/255"
    assert (WONG.image_size, WONG.evaluation_resize) == (288, 0)
    budget = Budget.of(WONG, [2501, 5716, 10_002])
    assert budget.total_updates == 6 * 2501 + 6 * 5716 + 3 * 10_002 == 79_308

    def rate(update):
        return WONG.lr * WONG.schedule.factor(
            update,
            total_updates=budget.total_updates,
            data_epochs_before=budget.data_epochs_before,
            cost=WONG.cost,
        )

    # lr_values of configs_fast_2px_phase*.yml at the end of epochs 1, 6, 12 and 15.
    ends = [2501, 6 * 2501, 6 * 2501 + 6 * 5716, 79_308]
    assert [rate(end - 1) for end in ends] == pytest.approx([0.4, 0.04, 0.004, 0.0004])
    assert rate(0) == pytest.approx(0.4 / 2501)
    assert rate(6 * 2501) == pytest.approx(0.04 - 0.036 / 6 / 5716)


@pytest.mark.parametrize(
    ("m", "expected"),
    [
        (1, {0: 1 / 12, 11: 1.0, 12: 1 - 0.9 / 15, 26: 0.1, 44: 0.01}),
        (2, {0: 1 / 12, 11: 1.0, 12: 0.94, 32: 0.065, 43: 0.01}),
    ],
)
def test_a_piecewise_rate_follows_the_data_through_the_phases(m, expected):
    """Knots at epochs of the natural budget; each phase has its own updates in an epoch."""
    config = three_phases(m=m, epochs=10)
    schedule = config.schedule.parse("piecewise:0=0,4=1,7=0.1,10=0.01")
    budget = Budget.of(config, [3, 5, 6])
    for update, factor in expected.items():
        found = schedule.factor(
            update,
            total_updates=budget.total_updates,
            data_epochs_before=budget.data_epochs_before,
            cost=config.cost,
        )
        assert found == pytest.approx(factor)


def test_ranks_share_a_recipes_batches_and_not_typed_ones(monkeypatch):
    """512, 224 and 128 over 4 ranks; a typed batch is a rank's."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    config, remarks = resolve(WONG, {"data"})
    assert str(config.phases) == "0-6:128:128,6-12:224:56,12-15:288:32"
    assert config.batch_size == 32
    assert any(str(config.phases) in remark for remark in remarks)
    assert resolve(WONG, {"data", "phases"})[0].phases == WONG.phases


def test_phases_on_the_command_line():
    """Typed ones win over the recipe's, and none turns them off."""
    run = parse(["--phases", THREE, "--epochs", "10"], "free", "imagenet")[0].run
    assert (str(run.phases), run.image_size) == (THREE, 32)
    off = ["--data", "/x", "--phases", "none", "--image-size", "160"]
    run = parse(off, "fgsm-rs", "imagenet")[0].run
    assert (len(run.phases), run.image_size, run.batch_size) == (0, 160, 128)
    folders = ["--data", "/c", "--phase-data", "/a,/b,/c"]
    assert parse(folders, "fgsm-rs", "imagenet")[0].run.phase_data == ("/a", "/b", "/c")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--phases 0-4:16", "--phases 0-4:16: write epochs:side:batch of each phase, such as 0-6:"),
        ("--phases 0-1.2.3:16:8", "write epochs:side:batch"),
        ("--phases 0-4:16:36,5-10:24:24", "5-10:24:24 must begin at epoch 4, where the one before"),
        ("--phases 0-4:16:36,3-10:24:24", "3-10:24:24 must begin at epoch 4, where the one before"),
        ("--phases 1-10:16:36", "1-10:16:36 must begin at epoch 0"),
        ("--phases 0-0:16:36,0-10:16:36", "0-0:16:36 ends before it begins"),
        ("--phases 0-4:16:36,4-7:24:24", "end at epoch 7, the run at --epochs 10; they must be"),
        ("--phases 0-10:4:36", "images of 0-10:4:36 must have at least 8 pixels"),
        ("--phases 0-10:16:1", "batch norm needs at least 2 images in 0-10:16:1"),
        ("--phases 0-9:16:36,9-10:32:20 --m 4", "--phases 9-10:32:20: pays for no pass over the"),
        (f"--phases {THREE} --steps 100", "--steps 100: phases are epochs; add --steps None"),
        (f"--phases {THREE} --image-size 32", "--image-size: each of the --phases has its own"),
        (f"--phases {THREE} --batch-size 32", "--batch-size: each of the --phases has its own"),
        (f"--phases {THREE} --phase-data a,b", "--phase-data a,b: 2 folders for 3 --phases"),
        ("--phase-data a", "--phase-data a: 1 folders for 0 --phases; name one for each"),
        (f"--phases {THREE} --resize-size 24", "--resize-size 24: smaller than --image-size 32"),
        (
            "--method fast-advprop --phases 0-5:16:80,5-10:32:20",
            "--phases 5-10:32:20: --aux-bn-group 8: larger than the 4 adversarial",
        ),
    ],
)
def test_phases_that_do_not_fit(line, message):
    """One line that names the flag."""
    with pytest.raises(UserError) as caught:
        parse([*line.split(), "--epochs", "10"], "free", "imagenet")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def copy_of(folder, target):
    """A copy of an image folder, to be changed."""
    return shutil.copytree(folder, target)


def data_error(config, world):
    """What is said about the data of a run."""
    with pytest.raises(UserError) as caught:
        build_phase_loaders(config, world)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_that_do_not_fit(small_images, tmp_path, world):
    """Missing, of other classes, of other images; a batch larger than the set."""
    data = str(small_images)
    short, other = copy_of(data, tmp_path / "short"), copy_of(data, tmp_path / "other")
    next((short / "train" / "class1").iterdir()).unlink()
    (other / "train" / "class2").rename(other / "train" / "kind2")
    config = three_phases(data=data, holdout_images=6)

    def error(first):
        folders = (str(first), data, data)
        return data_error(dataclasses.replace(config, phase_data=folders), world)

    absent = tmp_path / "absent"
    assert error(absent) == f"--phase-data: --data {absent}: no such folder"
    assert error(short).startswith(
        f"--phase-data {short}: its 113 training images are not the 114 of {data}"
    )
    assert error(other) == f"--phase-data {other}: its 3 classes are not the 3 of {data}"
    large = dataclasses.replace(config, phases=Phases.parse("0-4:16:36,4-10:24:109"))
    assert data_error(large, world).startswith(
        "--phases 4-10:24:109: --batch-size 109: larger than a rank's share of the training images"
    )


def test_phases_hold_out_the_same_images_and_share_the_validation_images(
    small_images, tmp_path, world
):
    """Held-out images at each phase's size, validation at the last one's."""
    small = copy_of(small_images, tmp_path / "small")
    folders = (str(small), str(small_images), str(small_images))
    config = three_phases(data=str(small_images), phase_data=folders, holdout_images=6)
    phases = build_phase_loaders(config, world)
    held = [next(iter(loaders.holdout.epoch(0))) for loaders in phases]
    assert [tuple(batch.images.shape) for batch in held] == [
        (6, side, side, 3) for side in (16, 24, 32)
    ]
    assert all(batch.indices.equal(held[0].indices) for batch in held)
    assert [loaders.train.num_batches for loaders in phases] == [3, 5, 6]
    shapes = {tuple(next(iter(loaders.val.epoch(0))).images.shape) for loaders in phases}
    assert shapes == {(18, 32, 32, 3)}
    assert phases[1].train.index is phases[2].train.index  # one list of 1.3 million names


def test_a_network_that_cannot_take_a_phases_images(small_images, tmp_path, capsys):
    """The last phase is large enough for its poolings, the first is not."""
    flags = ["--data", str(small_images), "--arch", "squeezenet1_1", "--bn-group", "None"]
    flags += ["--phases", "0-4:16:36,4-10:64:20", "--epochs", "10"]
    flags += ["--output-dir", str(tmp_path / "run")]
    assert cli.run_training("free", "imagenet", flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: --phases 0-4:16:36: --image-size 16: squeezenet1_1 cannot take it"
    )
    assert error.count("\n") == 1


def test_dry_run_prints_every_phase(small_images, capsys):
    """Batch, epochs, minibatches and the first minibatch of each."""
    flags = ["--data", str(small_images), "--arch", "test_resnet", "--phases", THREE, "--m", "2"]
    flags += ["--epochs", "10", "--holdout-images", "6", "--workers", "0", "--dry-run"]
    assert cli.run_training("free", "imagenet", flags) == 0
    out = capsys.readouterr().out
    for line in (
        "36 = 1 rank x 36, then 24 = 1 rank x 24, then 20 = 1 rank x 20",
        "phase 4-7:24:24:  2 data epochs x 5 minibatches x m 2 = 20 updates",
        "minibatch   images (36, 16, 16, 3) torch.uint8",
        "            images (24, 24, 24, 3) torch.uint8",
        "            images (20, 32, 32, 3) torch.uint8",
    ):
        assert line in out
