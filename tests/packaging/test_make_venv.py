"""The parts of .ci/make_venv.py that only a bare machine would run."""

import functools
import hashlib
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "make_venv.py"


@pytest.fixture
def make_venv(tmp_path, monkeypatch):
    """The script as a module that looks at a temporary .venv."""
    spec = importlib.util.spec_from_file_location("make_venv", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "PYTHON", tmp_path / ".venv" / "bin" / "python")
    monkeypatch.setattr(module, "UNFINISHED", tmp_path / ".venv" / "unfinished")
    return module


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on this machine; returns the folder of its page for pip."""
    folder = tmp_path / "index" / "pip"
    folder.mkdir(parents=True)
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "index"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield folder
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def write_page(folder: Path, style: str, content: dict[str, bytes]) -> None:
    """An index page as PEP 503 (HTML) or PEP 691 (JSON) describe it."""
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    if style == "html":
        page = "".join(f'<a href="{n}#sha256={h}">{n}</a>' for n, h in hashes.items())
    else:
        files = [{"filename": n, "url": n, "hashes": {"sha256": h}} for n, h in hashes.items()]
        page = json.dumps({"files": files})
    (folder / "index.html").write_text(page)


@pytest.mark.parametrize("style", ["html", "json"])
def test_the_newest_final_pip_is_fetched(make_venv, index, tmp_path, style):
    content = {
        f"pip-{version}-py3-none-any.whl": version.encode()
        for version in ("9.0.3", "26.3", "26.10", "27.0b1")
    }
    for name, data in content.items():
        (index / name).write_bytes(data)
    write_page(index, style, content)
    wheel = make_venv.fetch_pip(tmp_path)
    assert wheel.name == "pip-26.10-py3-none-any.whl"
    assert wheel.read_bytes() == b"26.10"


def test_a_wheel_with_another_hash_is_refused(make_venv, index, tmp_path):
    name = "pip-26.3-py3-none-any.whl"
    (index / name).write_bytes(b"tampered")
    write_page(index, "html", {name: b"genuine"})
    with pytest.raises(SystemExit, match="does not have the sha256"):
        make_venv.fetch_pip(tmp_path)
    assert not (tmp_path / name).exists()


def test_an_unreachable_index_is_one_line_without_the_password(make_venv, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://name:secret@127.0.0.1:1/simple")
    with pytest.raises(SystemExit, match="PIP_INDEX_URL") as caught:
        make_venv.fetch_pip(tmp_path)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_made_environments_are_not_healthy(make_venv):
    assert not make_venv.is_healthy()
    make_venv.PYTHON.parent.mkdir(parents=True)
    assert not make_venv.is_healthy()
    make_venv.PYTHON.symlink_to("/no/such/python")
    assert not make_venv.is_healthy()
    make_venv.PYTHON.unlink()
    make_venv.PYTHON.symlink_to(sys.executable)
    make_venv.UNFINISHED.touch()
    assert not make_venv.is_healthy()


@pytest.mark.parametrize(
    "script",
    ["#!{}/bin/python\n", '#!/bin/sh\n\'\'\'exec\' "{}/bin/python" "$0" "$@"\n'],
    ids=["plain", "path-with-space"],
)
def test_a_moved_environment_is_not_at_home(make_venv, script):
    torchrun = make_venv.VENV / "bin" / "torchrun"
    torchrun.parent.mkdir(parents=True)
    torchrun.write_text(script.format("/elsewhere/.venv"))
    assert not make_venv.is_at_home()
    torchrun.write_text(script.format(f"/elsewhere{make_venv.VENV}"))
    assert not make_venv.is_at_home()
    torchrun.write_text(script.format(make_venv.VENV))
    assert make_venv.is_at_home()


def test_the_environment_is_made_anew_when_its_sources_change(make_venv, monkeypatch):
    before = make_venv.fingerprint()
    assert make_venv.fingerprint() == before
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "12.0")
    assert make_venv.fingerprint() != before


@pytest.mark.parametrize("same_disk", [True, False])
def test_a_full_disk_is_named_before_anything_is_installed(
    make_venv, tmp_path, monkeypatch, same_disk
):
    """CI once died in the middle of pip with "No space left on device"."""
    disks = {make_venv.ROOT: 1, Path("/downloads"): 1 if same_disk else 2}
    free = {make_venv.ROOT: 6.5e9, Path("/downloads"): 6.5e9 if same_disk else 2.5e9}
    monkeypatch.setattr(make_venv.tempfile, "gettempdir", lambda: "/downloads")
    monkeypatch.setattr(
        make_venv.Path, "stat", lambda path: types.SimpleNamespace(st_dev=disks[path])
    )
    monkeypatch.setattr(
        make_venv.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free[path])
    )
    with pytest.raises(SystemExit) as error:
        make_venv.check_space()
    full, size = (make_venv.ROOT, 9) if same_disk else (Path("/downloads"), 3)
    assert str(error.value).startswith(f"error: {full} has ")
    assert f"takes {size} GB there; free some, or set TMPDIR" in str(error.value)

    free[full] = 9.1e9
    make_venv.check_space()


@pytest.fixture
def pip_is_told(make_venv, monkeypatch):
    """Lets `pip config list` print these lines, and nothing be set for uv."""
    for name in [n for n in os.environ if n.startswith("UV_") or n == "SSL_CERT_FILE"]:
        monkeypatch.delenv(name)

    def tell(*lines):
        listing = types.SimpleNamespace(stdout="".join(f"{line}\n" for line in lines))
        monkeypatch.setattr(make_venv.subprocess, "run", lambda *_, **__: listing)

    return tell


def test_uv_is_told_what_pip_is_told(make_venv, pip_is_told, monkeypatch):
    """The environment wins over [install], that over [global], and over all what uv was told."""
    pip_is_told(
        ":env:.cert='/b.pem'", "install.index-url='https://d/simple'", "global.cert='/a.pem'",
        "global.extra-index-url='\\nhttps://b\\nhttps://c'", "global.index-url='https://a/simple'",
        "global.timeout='9'", "wheel.no-index='1'",
    )  # fmt: skip
    variables = make_venv.uv_variables()
    assert variables["UV_DEFAULT_INDEX"] == "https://d/simple"
    assert variables["UV_INDEX"] == "https://b https://c"
    assert variables["SSL_CERT_FILE"] == "/b.pem"
    assert variables["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://mine")
    assert "UV_DEFAULT_INDEX" not in make_venv.uv_variables()


def test_pip_installs_where_it_is_told_what_uv_cannot_be_told(make_venv, pip_is_told, capsys):
    pip_is_told(":env:.proxy='http://name:secret@proxy'")
    assert make_venv.uv_variables() is None
    said = capsys.readouterr().out
    assert "uv has nothing like its setting proxy" in said
    assert "secret" not in said


def test_no_failure_of_uv_ends_the_script(make_venv, monkeypatch, capsys):
    """There may be no uv for this machine, none of its packages, or no DALI."""
    monkeypatch.setattr(make_venv, "uv_variables", lambda: {})
    for failing, num_commands in (("pip", 1), ("uv", 3), (make_venv.DALI, 3), (None, 2)):
        commands = []

        def run(command, failing=failing, commands=commands, **_):
            commands.append([str(word) for word in command])
            name = Path(command[0]).name
            return types.SimpleNamespace(returncode=int(failing in [name, command[-1]]))

        monkeypatch.setattr(make_venv.subprocess, "run", run)
        make_venv.install_with_uv(["pip"])
        assert len(commands) == num_commands
        assert commands[0][-1] == make_venv.UV
        said = capsys.readouterr().out
        assert ("pip does" in said) == (failing == "uv")


def test_what_cannot_be_imported_holds_up_no_build(make_venv, tmp_path, monkeypatch):
    """Byte code is written although PYTHONDONTWRITEBYTECODE is set."""
    (tmp_path / "there.py").touch()
    monkeypatch.setattr(make_venv, "PYTHON", sys.executable)
    monkeypatch.setattr(make_venv, "IMPORTED", ["not_there", "there"])
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.chdir(tmp_path)
    with make_venv.compiled_packages():
        pass
    assert list((tmp_path / "__pycache__").glob("there.*.pyc"))


ENDS = {
    "sys.exit(2)": (2, ""),
    "os.kill(os.getpid(), 9)": (137, "torchrun: rank 0 was ended by signal 9\n"),
    "os.kill(os.getppid(), signal.SIGINT); time.sleep(60)": (130, ""),
}


@pytest.mark.parametrize("end", ENDS)
def test_torchrun_ends_as_its_ranks_do(make_venv, tmp_path, end):
    """A rank has said in a line why it ends; torch's traceback would bury that line."""
    (make_venv.VENV / "bin").mkdir(parents=True)
    make_venv.write_torchrun()
    worker = tmp_path / "worker.py"
    interrupted = "signal.signal(signal.SIGINT, lambda *_: sys.exit(130))"
    worker.write_text(f"import os, signal, sys, time\n{interrupted}\n{end}\n")
    command = [sys.executable, make_venv.VENV / "bin" / "torchrun", "--standalone", worker]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    status, line = ENDS[end]
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert line in done.stderr
