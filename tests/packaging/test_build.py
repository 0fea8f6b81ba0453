"""The wheel holds what it should, on machines with and without compilers."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from freeadv_fast import toolchain
from freeadv_fast.runs.environment import build_info

ROOT = Path(__file__).resolve().parents[2]
COPIED = [
    "LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml", "setup.py",
    "bench", "csrc", "freeadv_fast", "kernels", "launch", "tests",
]  # fmt: skip
BUILD = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]

can_compile = pytest.mark.skipif(
    bool(toolchain.missing_packages()), reason="needs a compiler and Python.h"
)


@pytest.fixture
def clean_copy(tmp_path):
    """The sources as git has them: nothing compiled, no caches."""
    copy = tmp_path / "copy"
    copy.mkdir()
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "build", "*.egg-info", "results")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def without_tools(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine whose PATH holds no compiler."""
    (tmp_path / "empty").mkdir(exist_ok=True)
    dropped = ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "FREEADV_FAST_EXTENSION")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PATH": str(tmp_path / "empty")}


def fake_cuda_home(folder: Path, release: str) -> Path:
    """A toolkit whose nvcc knows its version and compiles nothing."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f"#!/bin/sh\ncase $1 in -V|--version) echo 'release {release}, V{release}.1';; "
        "*) exit 1;; esac\n"
    )
    nvcc.chmod(0o755)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    return folder


def ask_setup(copy: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What setup.py decides, without building."""
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_wheel_without_a_compiler(clean_copy, tmp_path):
    """It is built, names the missing packages, holds our packages only, and runs elsewhere."""
    command = [*BUILD, "--wheel-dir", str(tmp_path), str(clean_copy)]
    done = subprocess.run(
        command, env=without_tools(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [
        line for line in (done.stdout + done.stderr).splitlines() if "building without" in line
    ]
    assert lines
    assert all("g++" in line and "apt install" in line for line in lines)

    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"freeadv_fast"}
    for folder, source in (("freeadv_fast", "freeadv_fast"), ("freeadv_fast/kernels", "kernels")):
        expected = {
            f"{folder}/{path.relative_to(ROOT / source)}" for path in (ROOT / source).rglob("*.py")
        }
        assert expected <= set(names)
    templates = {path.name for path in (ROOT / "freeadv_fast").rglob("templates/*")}
    assert templates <= {Path(name).name for name in names}

    # A virtual environment of its own that sees the other packages of this one.
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "parent.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    ask = (
        "import json, freeadv_fast, freeadv_fast.kernels as k; "
        "from freeadv_fast.runs.environment import build_info; "
        "print(json.dumps([freeadv_fast.__file__, k.__file__, build_info()]))"
    )
    elsewhere = tmp_path / "empty"
    answer = subprocess.run(
        [python, "-c", ask], cwd=elsewhere, capture_output=True, text=True, check=True
    )
    package, kernels, info = json.loads(answer.stdout)
    assert Path(package).is_relative_to(site)
    assert Path(kernels) == site / "freeadv_fast" / "kernels" / "__init__.py"
    assert info["extension"] is None
    assert "freeadv_fast._C" in info["why"]


@pytest.mark.slow
@can_compile
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch")
def test_cuda_sources_that_do_not_compile_leave_the_cpp_part(clean_copy, tmp_path):
    # An entry point without PyTorch's headers and nothing else, to save 5 s and more a source;
    # shuffle_exchange.cpp stays and shows that it compiles without CUDA.
    for source in (clean_copy / "csrc").glob("*.cpp"):
        if source.name != "shuffle_exchange.cpp":
            source.write_text("")
    (clean_copy / "csrc" / "build_info.cpp").write_text(
        "#include <Python.h>\nPyMODINIT_FUNC PyInit__C(void) { return nullptr; }\n"
    )
    home = fake_cuda_home(tmp_path / "cuda", torch.version.cuda)
    environment = {**os.environ, "CUDA_HOME": str(home), "FREEADV_FAST_EXTENSION": "auto"}
    command = [*BUILD, "--wheel-dir", str(tmp_path), str(clean_copy)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "building without CUDA: its sources did not compile" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    assert "freeadv_fast/_C.abi3.so" in zipfile.ZipFile(wheel).namelist()


@can_compile
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch")
def test_another_nvcc_major_version_means_no_cuda(clean_copy, tmp_path):
    home = fake_cuda_home(tmp_path / "cuda", "11.8")
    environment = {**os.environ, "CUDA_HOME": str(home), "FREEADV_FAST_EXTENSION": "auto"}
    done = ask_setup(clean_copy, environment)
    assert done.returncode == 0, done.stderr
    assert f"nvcc 11.8 does not fit torch's CUDA {torch.version.cuda}" in done.stdout


def test_an_extension_that_was_asked_for_is_not_left_out(clean_copy, tmp_path):
    environment = {**without_tools(tmp_path), "FREEADV_FAST_EXTENSION": "cpp"}
    done = ask_setup(clean_copy, environment)
    assert done.returncode != 0
    assert "FREEADV_FAST_EXTENSION=cpp, but install g++" in done.stderr


def test_without_torch_the_build_says_what_to_do(clean_copy, tmp_path):
    """As under pip's build isolation, which hides the installed torch."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('No module named torch')\n")
    environment = {**os.environ, "PYTHONPATH": str(hidden)}
    environment.pop("FREEADV_FAST_EXTENSION", None)
    done = ask_setup(clean_copy, environment)
    assert done.returncode == 0, done.stderr
    expected = "apt install" if toolchain.missing_packages() else "--no-build-isolation"
    assert expected in done.stdout


def test_the_extension_is_built_wherever_it_can_be():
    info = build_info()
    if toolchain.missing_packages():
        assert info["extension"] is None
        assert all(name in info["why"] for name in toolchain.missing_packages())
        return
    assert info["extension"] == "_C.abi3.so", info
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert info["cxx_standard"] >= 17
    assert torch.__version__.startswith(info["torch"])
    cuda_home = toolchain.find_cuda_home()
    nvcc = toolchain.nvcc_version(cuda_home) if cuda_home else None
    if nvcc and torch.version.cuda and nvcc.split(".")[0] == torch.version.cuda.split(".")[0]:
        assert info["cuda"].split(".")[0] == nvcc.split(".")[0]
        assert info["cuda_architectures"]
    else:
        assert info["cuda"] is None
        assert info["cuda_architectures"] == []


def test_kernels_is_not_a_top_level_package():
    command = [sys.executable, "-c", "import kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "freeadv_fast.kernels" in done.stderr
