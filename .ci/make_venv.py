"""Makes .venv: the environment that `make run`, `make test` and `make lint` share.

Standard library only, no root, no ensurepip needed. Run it as often as you like: it does nothing
when .venv is up to date, and it repairs or replaces what it finds otherwise.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import fcntl
import hashlib
import html.parser
import importlib.util
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "freeadv_fast.stamp"  # what the finished environment was made from
UNFINISHED = VENV / "freeadv_fast.unfinished"  # there while pip works; left behind by a kill
CONSTRAINTS = ROOT / "constraints.txt"
DALI = "nvidia-dali-cuda130"
# Its own requirement, opencv-python, asks for libGL, which a bare machine does not have.
CORRUPTIONS = "imagecorruptions-imaug"
# Bytes that a new environment takes (seen: 5.8 GB), and what pip downloads for its largest step.
VENV_BYTES, DOWNLOAD_BYTES = 6 * 10**9, 3 * 10**9
# What compiles the extension and must be there before the package itself.
BUILD_REQUIREMENTS = ["setuptools", "wheel", "ninja", "torch"]
UV = "uv==0.13.9"
# uv reads neither pip.conf nor PIP_*: what pip is told by these, uv is told by those.
UV_VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
}
# What changes nothing, or nothing that pip, which goes over the packages again, would not mend.
NO_MATTER = {
    "break-system-packages", "cache-dir", "constraint", "default-timeout",
    "disable-pip-version-check", "find-links", "log", "no-cache-dir", "no-color", "no-input",
    "prefer-binary", "progress-bar", "quiet", "require-virtualenv", "retries",
    "root-user-action", "timeout", "user", "verbose",
}  # fmt: skip
# Imported once, these leave the byte code of what training, tests and exports import: 92 of 221 MB
# of sources, in 36 s of a core instead of 85.
IMPORTED = [
    "torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.run", "torch.export",
    "torch.onnx", "torch.utils.cpp_extension", "torch.utils.tensorboard", "torchvision", "timm",
    "nvidia.dali.fn", "triton", "sklearn.datasets", "scipy.stats", "matplotlib.pyplot", "jinja2",
    "tyro", "yaml", "safetensors.torch", "onnx", "onnxruntime", "onnxscript", "pyautoattack",
    "foolbox", "faster_coco_eval", "pycocotools.coco", "numba", "skimage", "cv2", "hypothesis",
    "xdist", "pytest",
]  # fmt: skip


def main() -> None:
    """Brings .venv up to date."""
    if sys.version_info < (3, 11):  # noqa: UP036 - python3 may be any on this machine
        raise SystemExit(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
    os.chdir(ROOT)
    clean_environment()
    with Path(__file__).open() as lock:
        # Two makes may start at once; the second then finds the work done.
        fcntl.flock(lock, fcntl.LOCK_EX)
        key = fingerprint()
        if STAMP.is_file() and STAMP.read_text() == key and is_healthy() and is_complete():
            return
        started = time.monotonic()
        if not is_healthy():
            remove_environment()
            check_space()
            say(f"making {VENV.name} with Python {sys.version.split()[0]}")
            VENV.mkdir()
            UNFINISHED.touch()
            make_environment()
        install()
        STAMP.write_text(key)
        say(f"{VENV.name} is ready after {time.monotonic() - started:.0f} s")


def clean_environment() -> None:
    """Takes out of the environment what would make pip or Python leave .venv."""
    for name in ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"):
        os.environ.pop(name, None)
    os.environ["PIP_USER"] = "0"
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    # ninja, installed a moment ago, is found by the build of the extension.
    os.environ["PATH"] = f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def fingerprint() -> str:
    """Hash of all that the environment depends on: this path, Python, the compilers, our files."""
    toolchain = load_toolchain()
    facts: list[object] = [
        str(ROOT),
        sys.version,
        sys.base_prefix,
        toolchain.find_cxx(),
        toolchain.has_python_headers(),
        str(toolchain.find_cuda_home()),
        os.environ.get("FREEADV_FAST_EXTENSION"),
        os.environ.get("TORCH_CUDA_ARCH_LIST"),
    ]
    files = [ROOT / name for name in ("setup.py", "pyproject.toml", "constraints.txt")]
    files += [Path(__file__), ROOT / "freeadv_fast/toolchain.py", ROOT / "freeadv_fast/__init__.py"]
    for path in files + sorted((ROOT / "csrc").iterdir()):
        facts += [path.name, hashlib.sha256(path.read_bytes()).hexdigest()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def load_toolchain():
    """freeadv_fast/toolchain.py, which needs no installed package."""
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "freeadv_fast/toolchain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_healthy() -> bool:
    """Whether .venv is a whole environment of this Python at this place, with a working pip."""
    if not PYTHON.exists() or UNFINISHED.exists() or not is_at_home():
        return False
    ask = "import sys, pip; print(sys.version, sys.prefix)"
    done = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.strip() == f"{sys.version} {VENV}"


def is_at_home() -> bool:
    """Whether .venv was made here: its scripts hold absolute paths and do not survive a move."""
    script = VENV / "bin" / "torchrun"
    if not script.is_file():
        return True
    # "#!PATH", or, when PATH is long or has spaces, "#!/bin/sh" and a line that starts PATH.
    here = rf"(^#!|[\s\"]){re.escape(str(VENV / 'bin'))}/python"
    return re.search(here, script.read_text(errors="replace")) is not None


def is_complete() -> bool:
    """Whether the packages that matter are found, without importing them."""
    ask = (
        "from importlib.util import find_spec; import pytest; "
        f"assert find_spec('torch') and find_spec('freeadv_fast').origin.startswith({str(ROOT)!r})"
    )
    command = [PYTHON, "-I", "-c", ask]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def check_space() -> None:
    """Ends here, and not in the middle of pip, where a disk is too full for a new environment."""
    downloads = Path(tempfile.gettempdir())
    needed = {ROOT: VENV_BYTES, downloads: DOWNLOAD_BYTES}
    if ROOT.stat().st_dev == downloads.stat().st_dev:
        needed = {ROOT: VENV_BYTES + DOWNLOAD_BYTES}
    for folder, size in needed.items():
        free = shutil.disk_usage(folder).free
        if free < size:
            raise SystemExit(
                f"error: {folder} has {free / 1e9:.1f} GB free and making {VENV.name} takes "
                f"{size / 1e9:.0f} GB there; free some, or set TMPDIR to a folder on another disk"
            )


def make_environment() -> None:
    """An environment with pip, by ensurepip where Python has it (Debian splits it off)."""
    # Not sys.executable: in an activated shell that is the very .venv that was just removed.
    venv = [sys._base_executable, "-m", "venv"]
    if importlib.util.find_spec("ensurepip"):
        if subprocess.run([*venv, VENV], capture_output=True, check=False).returncode == 0:
            return
        say("ensurepip does not work here")
    run([*venv, "--clear", "--without-pip", VENV])
    UNFINISHED.touch()
    with tempfile.TemporaryDirectory() as folder:
        wheel = fetch_pip(Path(folder))
        # A wheel is a zip file, and pip can run from its own.
        run([PYTHON, f"{wheel}/pip", "install", "--quiet", "--no-index", wheel])


def install() -> None:
    """Installs the pinned packages, then this checkout on top of them, editable."""
    UNFINISHED.touch()
    # pip would compile all 12,800 files on one core, in 59 s; `compiled_packages` does some.
    pip = [PYTHON, "-m", "pip", "install", "--no-compile", "--constraint", CONSTRAINTS]
    if not sys.stdout.isatty():
        pip.append("--quiet")
    say("installing torch with its CUDA libraries; the first time takes minutes")
    # pip goes over the same list again: it finds all there, or installs what uv could not.
    install_with_uv(pip)
    run([*pip, "--only-binary", ":all:", *BUILD_REQUIREMENTS])
    say(f"installing {DALI}, the fast JPEG loader")
    if subprocess.run([*pip, "--only-binary", ":all:", DALI], check=False).returncode != 0:
        say(f"{DALI} cannot be installed here; torchvision's loader is used instead")
    say("building freeadv_fast and installing what it needs")
    os.environ["PYTHONWARNINGS"] = "ignore"  # setuptools warns whoever installs editable
    with compiled_packages():
        run([*pip, "--no-build-isolation", "--editable", f"{ROOT}[dev]"])
    run([*pip, "--no-deps", CORRUPTIONS])
    write_torchrun()
    say(describe_extension())
    UNFINISHED.unlink()


def install_with_uv(pip: list[str | Path]) -> None:
    """Installs everything but the checkout with uv, in 46 s where pip takes 170, or nothing.

    uv downloads and unpacks many packages at a time. It is left alone where pip is told what uv
    cannot be told, and whatever uv cannot do is pip's: no failure of uv ends this script.
    """
    variables = uv_variables()
    if variables is None:
        return
    if subprocess.run([*pip, "--only-binary", ":all:", UV], check=False).returncode != 0:
        return
    uv = [VENV / "bin" / "uv", "pip", "install", "--python", PYTHON, "--constraint", CONSTRAINTS]
    if not sys.stdout.isatty():
        uv.append("--quiet")
    listed = ["--requirements", "pyproject.toml", "--extra", "dev", *BUILD_REQUIREMENTS]
    for extra in ([DALI], []):  # there are machines without DALI
        command = [*uv, "--only-binary", ":all:", *listed, *extra]
        if subprocess.run(command, check=False, env=os.environ | variables).returncode == 0:
            return
    say("uv could not install the packages; pip does")


def uv_variables() -> dict[str, str] | None:
    """pip's settings as uv's, or None where one of them has no like there."""
    # As pip does, uv takes the best of all indexes; its files are links to its cache's, which must
    # be on the same disk for that. What the user tells uv wins.
    variables = {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_CACHE_DIR": str(ROOT / ".cache" / "uv"),
        "UV_LINK_MODE": "hardlink",
    }
    for name, value in pip_settings().items():
        if name in UV_VARIABLES:
            variables[UV_VARIABLES[name]] = value
        elif name not in NO_MATTER:
            say(f"pip installs everything, for uv has nothing like its setting {name}")
            return None
    return {name: value for name, value in variables.items() if name not in os.environ}


def pip_settings() -> dict[str, str]:
    """What pip.conf and PIP_* tell `pip install`, by the names of pip's flags."""
    command = [PYTHON, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.partition(".")
        if section in found:
            found[section][name] = " ".join(ast.literal_eval(value).split())
    return found["global"] | found["install"] | found[":env:"]


@contextlib.contextmanager
def compiled_packages() -> Iterator[None]:
    """Compiles the packages that are imported here, beside the build of the extension.

    Not left to the first import: with PYTHONDONTWRITEBYTECODE set every process would do it again.
    """
    lines = [f"with suppress(Exception): import {name}" for name in IMPORTED]
    command = [PYTHON, "-c", "\n".join(["from contextlib import suppress", *lines])]
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=variables, **silent) as compiler:
        try:
            yield
        except BaseException:
            compiler.kill()
            raise


def write_torchrun() -> None:
    """Lets ``torchrun launch/imagenet_free.py --m 4`` through.

    torch's own script lets argparse take --m, though it stands behind the script's name, for an
    ambiguous abbreviation of --module and --max-restarts (seen with Python 3.11, 3.12.1, 3.13.0).
    Elsewhere `torchrun ... -- launch/imagenet_free.py --m 4` does the same. And SIGUSR1, the
    signal of a cluster's time limit, would end torchrun and leave its workers behind.

    A signal, or a rank that ends with a line of its own, ends torchrun with its status: torch's
    script would print forty lines of traceback of its own below that line.
    """
    script = f"""#!{PYTHON}
import os
import sys
from functools import partial

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
run.ArgumentParser = partial(run.ArgumentParser, allow_abbrev=False)
try:
    sys.exit(run.main())
except SignalException as stopped:
    sys.exit(128 + stopped.sigval)
except ChildFailedError as failed:
    rank, failure = failed.get_first_failure()
    code = failure.exitcode
    if code < 0:
        print(f"torchrun: rank {{rank}} was ended by signal {{-code}}", file=sys.stderr)
    sys.exit(code if code >= 0 else 128 - code)
"""
    (VENV / "bin" / "torchrun").write_text(script)


def describe_extension() -> str:
    """One line about freeadv_fast._C."""
    ask = (
        "import json; from freeadv_fast.runs.environment import build_info; "
        "print(json.dumps(build_info()))"
    )
    done = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"error: freeadv_fast does not import:\n{done.stderr}")
    info = json.loads(done.stdout)
    if info["extension"] is None:
        return f"no compiled extension, everything else works: {info['why']}"
    cuda = f"CUDA {info['cuda']}" if info["cuda"] else "no CUDA"
    return f"compiled extension: {info['compiler']}, {cuda}"


def fetch_pip(folder: Path) -> Path:
    """Downloads the newest pip wheel from the package index and checks its hash."""
    index = os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple"
    page = f"{index.rstrip('/')}/pip/"
    wheels = {}
    for link in list_links(page):
        url, _, fragment = link.partition("#")
        name = urllib.parse.unquote(url.rsplit("/", 1)[-1])
        # Final releases only: a pre-release has letters in its version.
        match = re.fullmatch(r"pip-(\d+(?:\.\d+)*)-py3-none-any\.whl", name)
        if match and fragment.startswith("sha256="):
            version = tuple(int(part) for part in match[1].split("."))
            wheels[version] = (name, url, fragment.removeprefix("sha256="))
    if not wheels:
        raise SystemExit(f"error: no pip wheel with a sha256 is listed by {without_secrets(page)}")
    name, url, sha256 = wheels[max(wheels)]
    say(f"fetching {name}")
    content = fetch(url)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SystemExit(f"error: {name} does not have the sha256 that the index lists")
    wheel = folder / name
    wheel.write_bytes(content)
    return wheel


class Anchors(html.parser.HTMLParser):
    """The links of a PEP 503 index page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keeps the target of every <a>."""
        href = dict(attrs).get("href")
        if tag == "a" and href:
            self.links.append(href)


def list_links(page: str) -> list[str]:
    """The files of an index page, PEP 691 (JSON) or PEP 503 (HTML), as absolute url#sha256=..."""
    content = fetch(page, accept="application/vnd.pypi.simple.v1+json, text/html;q=0.5")
    if content.lstrip().startswith(b"{"):
        files = json.loads(content)["files"]
        links = [f"{f['url']}#sha256={f['hashes'].get('sha256', '')}" for f in files]
    else:
        anchors = Anchors()
        anchors.feed(content.decode())
        links = anchors.links
    return [urllib.parse.urljoin(page, link) for link in links]


def fetch(url: str, accept: str = "*/*") -> bytes:
    """Reads a URL; a name and password in it are sent as HTTP basic authentication."""
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(without_secrets(url), headers={"Accept": accept})
    if parts.username:
        secret = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}")
        token = base64.b64encode(secret.encode()).decode()
        request.add_header("Authorization", f"Basic {token}")
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or None)
    try:
        with urllib.request.urlopen(request, timeout=60, context=context) as response:
            return response.read()
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise SystemExit(
            f"error: {without_secrets(url)} cannot be read ({reason}); set PIP_INDEX_URL to an "
            "index that this machine reaches, or install python3-venv and ca-certificates"
        ) from None


def without_secrets(url: str) -> str:
    """The URL without the name and password that it may carry."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def run(command: list[str | Path]) -> None:
    """Runs a command; its failure ends this script with its own message above."""
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        # pip undid what it could not finish, so the environment may be used again.
        UNFINISHED.unlink(missing_ok=True)
        raise SystemExit(f"error: exit status {status} from {' '.join(map(str, command))}")


def remove_environment() -> None:
    """Removes .venv at once: it is moved away first, for a half-deleted one looks healthy."""
    doomed = ROOT / "build" / "removed-venv"
    shutil.rmtree(doomed, ignore_errors=True)
    if VENV.is_dir() and not VENV.is_symlink():
        doomed.parent.mkdir(exist_ok=True)
        VENV.rename(doomed)
        shutil.rmtree(doomed)
    else:
        VENV.unlink(missing_ok=True)


def say(line: str) -> None:
    """One line of progress."""
    print(f"make_venv: {line}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
