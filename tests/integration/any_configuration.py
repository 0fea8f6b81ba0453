"""Configurations drawn at random over all fields, and what becomes of each.

Fields are drawn one by one from what their types allow, mostly values that can be meant, sometimes
ones that cannot. Shared by test_any_configuration.py and bench/configurations.py.
"""

import contextlib
import shutil
import signal
import typing
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import freeadv_fast as ff
from freeadv_fast.config.method_names import METHODS
from freeadv_fast.config.read import field_types
from freeadv_fast.errors import UserError

LIMIT_SECONDS = 60

ARCHS = ("test_resnet", "timm/test_efficientnet", "test_convnext", "timm/test_vit", "test_byobnet")
DISTANCES = ("1/255", "4/255", "8/255", "16/255", "2.5/255", "0.03", 8 / 255)
SCHEDULES = (
    "every:30", "at:1,2", "steps:3,5", "linear:0.4", "onecycle:0.3", "onecycle-epochs:0.3",
    "piecewise:0=0,1=1,6=0.1", "constant",
)  # fmt: skip
PHASES = ("none", "0-1:16:8,1-2:24:6", "0-2:16:8", "0-1:16:8")
ATTACKS = ("pgd-1", "cw-2", "pgd-1-2", "pgd-1,cw-1")

# What a field is usually drawn from, by name; what is not here follows from its type.
USUAL = {
    "arch": st.sampled_from(ARCHS),
    "data": st.sampled_from(["folder", "folder", "folder", "digits", "synthetic:5"]),
    "image_size": st.integers(16, 40),
    "resize_size": st.none() | st.integers(0, 60),
    "batch_size": st.integers(2, 20),
    "bn_group": st.none() | st.integers(2, 8),
    "aux_bn_group": st.integers(2, 6),
    "m": st.integers(1, 3),
    "attack_steps": st.integers(1, 3),
    "yopo_inner": st.integers(1, 3),
    "workers": st.integers(0, 2),
    "crop_padding": st.integers(0, 6),
    "holdout_images": st.none() | st.integers(0, 30),
    "guard_images": st.none() | st.integers(1, 8),
    "guard_every": st.none() | st.integers(0, 3),
    "steps": st.none() | st.integers(1, 5),
    "epochs": st.sampled_from([1, 2, 2.5, 4]),
    "eval_attacks": st.sampled_from(ATTACKS),
    "eval_images": st.integers(1, 6),
    "eval_corruptions": st.sampled_from([(), ("none",), ("fog-3",)]),
    "schedule": st.sampled_from(SCHEDULES),
    "phases": st.sampled_from(PHASES),
    "phase_data": st.sampled_from([(), (), ("folder",), ("folder", "folder")]),
    "lr": st.floats(0.0001, 0.2),
    "momentum": st.floats(0, 0.99),
    "ema": st.none() | st.sampled_from([0.5, 0.9995]),
    "weight_decay": st.floats(0, 0.01),
    "p_adv": st.floats(0.1, 0.9),
    "checkpoint_every": st.sampled_from([0, 1, 600]),
    "log_every": st.integers(1, 5),
    "seed": st.integers(0, 2**63 - 1),
    "mix_alpha": st.none() | st.floats(0.1, 2),
    "label_smoothing": st.sampled_from([0, 0.1, 0.4]),
    "awp": st.sampled_from([0, 0.01]),
    "max_bad_fraction": st.floats(0, 0.5),
    "reg_lambda": st.none() | st.floats(0, 10),
    "reg_every": st.integers(1, 3),
    "attack_warmup": st.sampled_from([0, 0.5, 2]),
    "optimizer": st.sampled_from(["sgd", "sgd", "sgd-foreach", "apex-sgd", "lalr"]),
    "accumulate": st.integers(1, 3),
    "warmup_epochs": st.sampled_from([0, 0.5, 1]),
    "lalr_min": st.floats(0, 1),
    "lalr_max": st.floats(0.5, 10),
    "dat_clean_weight": st.floats(0, 2),
    "unlabelled": st.sampled_from([None, "file"]),
    "unlabelled_fraction": st.floats(0, 0.95),
}
# Never drawn: where the run goes, and what ends it.
FIXED = {"recipe", "output_dir", "resume", "max_passes", "init_from"}
# What nobody can mean, for any field.
ODD = st.sampled_from(
    [None, -1, 0, 1, 1.5, float("nan"), float("inf"), 10**12, "", "x", True, (), []]
)


def usual(name, hint):
    """What a field may be set to by somebody who means it."""
    if name in USUAL:
        return USUAL[name]
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    if hint is bool:
        return st.booleans()
    if "Perturbation" in str(hint):
        return st.sampled_from(DISTANCES)
    assert hint is float, name
    return st.floats(0.1, 3)


@st.composite
def configurations(draw):
    """Some fields of a run: the method, most often values that fit, sometimes one that does not."""
    hints = {name: hint for name, hint in field_types().items() if name not in FIXED}
    names = draw(st.lists(st.sampled_from(sorted(hints)), max_size=12, unique=True))
    chosen = {name: draw(usual(name, hints[name])) for name in names}
    chosen["method"] = draw(st.sampled_from(METHODS))
    if chosen.get("unlabelled") and draw(st.booleans()):  # else most of them are refused
        chosen |= {"image_size": 16, "augment": "none", "phases": "none"}
    if draw(st.integers(0, 4)) == 0:
        chosen[draw(st.sampled_from(sorted(hints)))] = draw(ODD)
    return chosen


BASE = {
    "m": 1, "data": "folder", "image_size": 16, "arch": "test_resnet", "batch_size": 12,
    "aux_bn_group": 2, "workers": 1, "epochs": 2, "schedule": "constant", "lr": 0.01,
    "holdout_images": 12, "eval_attacks": "pgd-1", "eval_images": 4, "log_every": 1,
}  # fmt: skip


@contextlib.contextmanager
def within(seconds):
    """Raises where the block takes longer."""

    def ring(signum, frame):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def train_two_minibatches(chosen, folder, output):
    """Trains; the result, or the line that refuses the configuration."""
    fields = BASE | chosen
    for name in ("data", "phase_data"):
        value = fields.get(name)
        if value == "folder":
            fields[name] = str(folder)
        elif isinstance(value, tuple):
            fields[name] = tuple(str(folder) for _ in value)
    if fields.get("unlabelled") == "file":
        fields["unlabelled"] = str(Path(output).with_name("unlabelled.npz"))
    batch = fields["batch_size"] if isinstance(fields["batch_size"], int) else 1
    limit = max(1, batch + 1)  # over with the second minibatch, whatever one costs
    try:
        return ff.train(ff.TrainConfig(**fields, max_passes=limit, output_dir=output))
    except UserError as refusal:
        return str(refusal)


def try_configurations(number, folder, root):
    """Trains or sees refused so many configurations.

    Args:
        number: How many. folder: Images of three classes. root: An empty folder for the runs.

    Returns:
        The passes of those that trained, and the lines of those that were refused.
    """
    trained, refused = [], []
    pixels = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    np.savez(Path(root, "unlabelled.npz"), image=pixels, label=np.arange(60) % 3)

    @settings(
        max_examples=number, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(configurations())
    def check(chosen):
        output = Path(root, "run")
        shutil.rmtree(output, ignore_errors=True)
        with within(LIMIT_SECONDS):
            outcome = train_two_minibatches(chosen, folder, output)
        if isinstance(outcome, str):
            assert outcome
            assert "\n" not in outcome
            refused.append(outcome)
        else:
            assert 0 <= outcome.clean_accuracy <= 1
            assert Path(output, "result.json").exists()
            trained.append(outcome.passes)

    check()
    return trained, refused
