"""Environments of other projects, whose pins do not live beside ours.

Built once, in ``.cache/peers`` of the checkout: a virtual environment with the project and what it
pins, and below them, through a .pth file, the packages of our own environment, torch among them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "peers"
# RobustBench of PyPI, all that it imports and we do not have. It says `import autoattack`, which on
# PyPI is called pyautoattack.
ROBUSTBENCH = (
    "robustbench==1.1.1", "timm==1.0.9", "gdown==5.1.0", "geotorch==0.4.0", "torchdiffeq==0.2.5",
    "pandas==2.3.3", "pytz", "beautifulsoup4", "soupsieve", "pyautoattack==0.2.0",
)  # fmt: skip


def build(folder: Path, packages: tuple[str, ...]) -> Path:
    """Makes an environment, or finds it made; returns its site-packages."""
    site = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    made = folder / "made"
    if made.exists() and made.read_text() == "\n".join(packages):
        return site
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, *packages], check=True)
    # After pip, which would count our packages as its own.
    (site / "ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    made.write_text("\n".join(packages))
    return site


@pytest.fixture(scope="session")
def robustbench():
    """The python of RobustBench's environment."""
    folder = CACHE / "robustbench"
    site = build(folder, ROBUSTBENCH)
    alias = site / "autoattack"
    if not alias.exists():
        alias.symlink_to(site / "pyautoattack")
    return folder / "bin" / "python"
