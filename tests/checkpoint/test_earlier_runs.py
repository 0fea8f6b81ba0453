"""Runs of commit c972e9f, before the modules became packages, resume, evaluate and export.

Both were made there by launch/imagenet_free.py on the embedded digits, with --m 2 --epochs 4
--arch timm/test_efficientnet --batch-size 64 --holdout-images 40 --guard-images 16
--eval-images 60 --workers 1; `interrupted` got SIGTERM in its second data epoch (--log-every 5).
"""

import json
import shutil

import pytest
import torch

import freeadv_fast as ff
from freeadv_fast.cli import run_training
from freeadv_fast.config.file import load_config

# What the interrupted run came to when c972e9f itself resumed it, on two AMD EPYC cores.
PASSES, UPDATES, LOSS = 5588, 88, 0.5165
FINISHED_CLEAN = 0.9667


@pytest.fixture
def earlier(repository, tmp_path):
    """A copy of an earlier run's folder by name."""

    def copy(name):
        return shutil.copytree(repository / "tests" / "fixtures" / "runs" / name, tmp_path / name)

    return copy


def test_an_interrupted_run_goes_on_to_its_end(earlier, capsys):
    folder = earlier("interrupted")
    begun = (folder / "log.jsonl").read_text()
    flags = ["--config", str(folder / "config.yaml"), "--output-dir", str(folder), "--resume"]
    assert run_training("free", "imagenet", flags) == 0
    assert "resuming from" in capsys.readouterr().out
    text = (folder / "log.jsonl").read_text()
    assert text.startswith(begun)
    last = json.loads(text.splitlines()[-1])
    assert (last["passes"], last["updates"]) == (PASSES, UPDATES)
    # Another processor sums in another order, and a minibatch decides little.
    assert last["loss"] == pytest.approx(LOSS, abs=0.15)
    result = json.loads((folder / "result.json").read_text())
    assert result["clean_accuracy"] >= 0.85
    assert (folder / "export" / "model.safetensors").stat().st_size > 300_000


def test_a_finished_run_is_evaluated_and_exported(earlier, tmp_path):
    folder = earlier("finished")
    measured = ff.evaluate(folder, attacks="pgd-5")
    assert measured.num_images == 60
    assert measured.clean_accuracy == pytest.approx(FINISHED_CLEAN, abs=0.02)
    assert 0.3 < measured.robust_accuracy["pgd-5"] < 0.95
    from freeadv_fast.runs.export.again import export_run

    exported = ff.load_export(export_run(folder, tmp_path / "export"))
    pixels = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(exported(pixels), ff.load_run(folder).network(pixels))


def test_a_finished_run_says_so_and_knows_its_result(earlier, capsys):
    folder = earlier("finished")
    from dataclasses import replace

    config = replace(load_config(folder / "config.yaml"), output_dir=str(folder), resume=True)
    result = ff.train(config)
    assert "is finished" in capsys.readouterr().out
    record, saved = result.record(), json.loads((folder / "result.json").read_text())
    assert {name: record[name] for name in saved} == saved
    assert all(record[name] in (None, {}) for name in record.keys() - saved.keys())
    assert result.model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_an_earlier_config_is_read_as_it_was(repository):
    config = load_config(repository / "tests" / "fixtures" / "runs" / "finished" / "config.yaml")
    assert (config.recipe, config.m, str(config.eps)) == ("digits-free", 2, "32/255")
    assert str(config.eval_step) == "4/255"
