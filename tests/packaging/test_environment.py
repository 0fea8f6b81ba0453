"""What env.json records, and how the machine's tools are found."""

import json
import subprocess
import sys
import sysconfig

import pytest

from freeadv_fast import toolchain
from freeadv_fast.runs.environment import environment, git_state
from freeadv_fast.toolchain import has_nvidia_apex


def test_environment_is_json_and_has_what_a_resume_compares():
    record = environment(ranks=3)
    assert json.loads(json.dumps(record)) == record
    assert record["ranks"] == 3
    assert record["threads"] == 1
    assert {"versions", "hardware", "git", "build", "apex", "command"} <= set(record)
    assert record["versions"]["torch"]
    assert record["hardware"]["cores"] >= 1


def make_package(folder, *parts):
    """Packages that fail when they are imported."""
    for part in parts:
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "__init__.py").write_text("raise RuntimeError('imported')\n")


def test_unrelated_apex_is_not_nvidias(tmp_path, monkeypatch):
    make_package(tmp_path, "apex", "apex/lib")
    monkeypatch.syspath_prepend(tmp_path)
    assert not has_nvidia_apex()


def test_nvidias_apex_is_found_without_importing_it(tmp_path, monkeypatch):
    make_package(tmp_path, "apex", "apex/optimizers")
    monkeypatch.syspath_prepend(tmp_path)
    assert has_nvidia_apex()


def test_git_state(tmp_path):
    assert git_state(tmp_path) is None

    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        subprocess.run(command, check=True, capture_output=True)

    git("init")
    (tmp_path / "a").touch()
    git("add", "a")
    git("commit", "-m", "a")
    clean = git_state(tmp_path)
    (tmp_path / "b").touch()
    assert clean["dirty"] is False
    assert git_state(tmp_path) == {"commit": clean["commit"], "dirty": True}


def test_missing_tools_are_named_as_debian_packages(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert toolchain.missing_packages() == ["g++", "python3-dev"]
    (tmp_path / "Python.h").touch()
    (tmp_path / "g++").touch(mode=0o755)
    assert toolchain.missing_packages() == []


@pytest.mark.parametrize("how", ["link", "wrapper"])
def test_the_toolkit_behind_an_nvcc_elsewhere_is_found(how, tmp_path, monkeypatch):
    home = tmp_path / "toolkit"
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho '#$ _HERE_={nvcc.parent}' >&2\n")
    nvcc.chmod(0o755)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    path = tmp_path / "path"
    path.mkdir()
    if how == "link":
        (path / "nvcc").symlink_to(nvcc)
    else:
        (path / "nvcc").write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
        (path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert toolchain.find_cuda_home() == home


def test_the_extension_can_be_imported_before_torch():
    if environment()["build"]["extension"] is None:
        pytest.skip("the extension was not built")
    code = "import freeadv_fast._C, sys; print('torch' in sys.modules); import torch"
    command = [sys.executable, "-c", code + "; print(torch.ops.freeadv_fast.build_info()[0])"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "{"], done.stderr
