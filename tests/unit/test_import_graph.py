"""Imports go one way, downwards: launch, bench, tests -> freeadv_fast -> ops -> kernels, _C."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "freeadv_fast"
LONGEST_LAUNCH_SCRIPT = 40

# Lower modules, and the modules of ours that each may import.
FOUNDATION = {
    "errors": set(),
    "config/threat": {"freeadv_fast.errors"},
    "config/method_names": set(),
    "config/phases": {"freeadv_fast.errors"},
    "config/schedule": {"freeadv_fast.errors"},
    "toolchain": set(),
}
NOT_FOR_METHODS = {"data", "runs", "distributed", "evaluation", "session", "cli"}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, anywhere in it.

    `from a import b` counts as a and as a.b, for b may be a module.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(path, node)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def absolute_base(path: Path, node: ast.ImportFrom) -> str:
    """The module that a from-import names, relative dots resolved."""
    if not node.level:
        return node.module or ""
    folders = path.relative_to(ROOT).parts[: -node.level]
    folders = ("freeadv_fast", *folders) if folders[0] == "kernels" else folders
    return ".".join([*folders, *([node.module] if node.module else [])])


def ours(path: Path) -> set[str]:
    return {name for name in imported_modules(path) if name.split(".")[0] == "freeadv_fast"}


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_relative_imports_are_resolved():
    node = ast.parse("from .ops import x").body[0]
    assert absolute_base(PACKAGE / "methods" / "free.py", node) == "freeadv_fast.methods.ops"
    assert absolute_base(ROOT / "kernels" / "a.py", node) == "freeadv_fast.kernels.ops"


@pytest.mark.parametrize("path", files("freeadv_fast/methods"), ids=shown)
def test_methods_know_no_data_logging_or_processes(path):
    forbidden = {f"freeadv_fast.{name}" for name in NOT_FOR_METHODS} | {"torch.distributed"}
    found = {name for name in imported_modules(path) if any(is_within(name, f) for f in forbidden)}
    assert not found


@pytest.mark.parametrize("path", files("kernels"), ids=shown)
def test_kernels_import_nothing_of_ours(path):
    assert not {name for name in ours(path) if not is_within(name, "freeadv_fast.kernels")}


@pytest.mark.parametrize("path", files("freeadv_fast"), ids=shown)
def test_ops_is_the_only_door_to_compiled_code(path):
    if path.name == "ops.py":
        pytest.skip("the door itself")
    compiled = {"freeadv_fast.kernels", "freeadv_fast._C", "kernels"}
    if path == PACKAGE / "runs" / "environment.py":
        compiled.remove("freeadv_fast._C")  # it reports how _C was built
    found = {name for name in imported_modules(path) if any(is_within(name, c) for c in compiled)}
    assert not found


@pytest.mark.parametrize("module", FOUNDATION)
def test_foundation_imports_nothing_above_it(module):
    allowed = FOUNDATION[module]
    found = {
        name
        for name in ours(PACKAGE / f"{module}.py")
        if not any(is_within(name, a) for a in allowed)
    }
    assert not found


@pytest.mark.parametrize("path", files("freeadv_fast") + files("kernels"), ids=shown)
def test_package_imports_no_script_or_test(path):
    top_levels = {name.split(".")[0] for name in imported_modules(path)}
    assert not top_levels & {"launch", "bench", "tests", "pytest", "foolbox"}


@pytest.mark.parametrize("path", files("launch"), ids=shown)
def test_launch_scripts_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_LAUNCH_SCRIPT


def test_no_file_is_a_drawer():
    """A file that is called utils says that nobody knew what it is about."""
    names = {path.name for folder in ("freeadv_fast", "kernels") for path in files(folder)}
    assert not names & {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
