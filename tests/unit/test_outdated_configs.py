"""A saved config of an earlier version is read, and what is taken otherwise is said."""

from __future__ import annotations

import pytest
from fixed_batches import finished_run, fixed_val_loader

from freeadv_fast import training
from freeadv_fast.cli import run_training
from freeadv_fast.config.file import config_from_dict, load_config
from freeadv_fast.evaluation import images
from freeadv_fast.evaluation.subject import evaluate


@pytest.fixture
def outdated(tmp_path, monkeypatch):
    """A finished run whose attacks stood still."""
    monkeypatch.setattr(images, "build_val_loader", fixed_val_loader)
    folder = finished_run(tmp_path / "run")
    text = (folder / "config.yaml").read_text()
    assert "eval_step: 1/255\n" in text
    (folder / "config.yaml").write_text(text.replace("eval_step: 1/255\n", "eval_step: '0'\n"))
    return folder


def test_a_step_of_0_is_one_that_was_left_out(outdated):
    assert str(load_config(outdated / "config.yaml").eval_step) == "1/255"
    unset = config_from_dict({"eps": "8/255"}).eval_step
    assert config_from_dict({"eps": "8/255", "eval_step": 0}).eval_step == unset
    assert str(config_from_dict({"eps": "8/255", "eval_step": "3/255"}).eval_step) == "3/255"


def test_an_evaluation_says_what_is_taken(outdated, capsys):
    line = f"{outdated}/config.yaml: eval_step 0 lets attacks stand still; 1/255 is taken instead"
    evaluate(outdated, num_images=5)
    assert line in capsys.readouterr().out.splitlines()
    evaluate(outdated, num_images=5, step="2/255")
    assert "eval_step 0" not in capsys.readouterr().out


def test_a_resumed_run_says_so_too(outdated, capsys, monkeypatch):
    monkeypatch.setattr(training, "read_result", lambda *_: None)
    assert run_training("free", "imagenet", ["--resume", str(outdated)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{outdated}/config.yaml: eval_step 0 lets attacks stand still; 1/255")
    assert f"{outdated} is finished" in said
