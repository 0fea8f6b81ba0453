"""Imports go one way, downwards: launch, bench, tests -> freeadv_fast -> ops -> kernels, _C."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "freeadv_fast"
LONGEST_LAUNCH_SCRIPT = 40

# The house from top to bottom, as ARCHITECTURE.md draws it: imports run downwards only.
FLOORS = (
    "sweep",
    "cli",
    "training",
    "session",
    "evaluation",
    "methods",
    "recipes",
    "data",
    "runs",
    "step",
    "models",
    "config",
    "distributed",
    "ops",
    "errors",
    "toolchain",
)
NUM_DOORS = 18
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
    if path.parent == PACKAGE / "ops":
        pytest.skip("the door itself")
    compiled = {"freeadv_fast.kernels", "freeadv_fast._C", "kernels"}
    if path == PACKAGE / "runs" / "environment.py":
        compiled.remove("freeadv_fast._C")  # it reports how _C was built
    found = {name for name in imported_modules(path) if any(is_within(name, c) for c in compiled)}
    assert not found


def test_what_ops_dispatches_by_has_one_name():
    """Whoever imported it by name would keep the old one where tests and benches set another."""
    dispatched = {f"freeadv_fast.ops.dispatch.{name}" for name in ("backend", "FAST_PATHS")}
    imported = {
        path: imported_modules(path)
        for folder in ("freeadv_fast", "bench", "tests")
        for path in files(folder)
    }
    assert "freeadv_fast.ops.dispatch" in imported[PACKAGE / "ops" / "norms.py"]
    assert not [shown(path) for path, names in imported.items() if names & dispatched]


def floor_of(module: str) -> str:
    """The package, or the module at the top, that a module of ours belongs to."""
    return module.split(".")[1]


def module_name(path: Path) -> str:
    """A file's module; a package's `__init__` goes by the package's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_script(path: Path) -> bool:
    """A `__main__` is a script like those of launch/: it uses the command line, nothing uses it."""
    return path.name == "__main__.py"


def imported_files() -> dict[str, set[str]]:
    """Every module of ours but the scripts and the front door, and the files that it imports."""
    paths = [path for path in files("freeadv_fast") if not is_script(path)]
    modules = {module_name(path) for path in paths}
    graph = {}
    for path in paths:
        if path == PACKAGE / "__init__.py":
            continue
        named = {name for name in ours(path) if not is_compiled(name)}
        # `from a import b` names a and a.b; where a.b is a file, a's own __init__ is not asked.
        files_of = {name for name in named if name in modules}
        parents = {name.rpartition(".")[0] for name in files_of}
        attributes = {name.rpartition(".")[0] for name in named if name not in modules}
        graph[module_name(path)] = {
            name for name in files_of if name not in parents or name in attributes
        }
    return graph


def is_compiled(name: str) -> bool:
    """Whether a module comes from kernels/ or csrc/, to which `ops` is the door."""
    return any(is_within(name, f"freeadv_fast.{built}") for built in ("kernels", "_C"))


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """A path from a node back to itself; empty where there is none."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            cycle = visit(following, [*trail, node])
            if cycle:
                return cycle
        done.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


def test_cycles_are_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_graph_sees_the_house():
    graph = imported_files()
    assert "freeadv_fast.step.learner" in graph["freeadv_fast.methods.free"]
    assert "freeadv_fast.config.fields" in graph["freeadv_fast.config.checks"]
    assert len(graph) > 100


def test_no_file_imports_itself_over_others():
    assert find_cycle(imported_files()) == []


def test_imports_run_downwards():
    order = {floor: level for level, floor in enumerate(FLOORS)}
    upwards = {
        f"{module} -> {name}"
        for module, names in imported_files().items()
        for name in names
        if name != "freeadv_fast"
        and floor_of(module) != floor_of(name)
        and order[floor_of(module)] > order[floor_of(name)]
    }
    assert not upwards


def test_nothing_within_uses_the_front_door():
    users = {module for module, names in imported_files().items() if "freeadv_fast" in names}
    assert not users


def test_the_floors_are_those_on_disk_and_in_the_architecture():
    assert {path.stem for path in tracked_entries() if path.stem != "__init__"} == set(FLOORS)
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    drawn = text.partition("## Floors")[2].split("```")[1].split("\n")
    assert [line.split()[0].rstrip("/") for line in drawn if line[:1].strip()] == list(FLOORS)


def tracked_entries() -> list[Path]:
    """What stands in freeadv_fast/, without what builds leave there."""
    return [
        path
        for path in sorted(PACKAGE.iterdir())
        if path.suffix in ("", ".py") and path.name not in ("__pycache__", "kernels")
    ]


def test_the_house_has_at_most_eighteen_doors():
    assert len([*tracked_entries(), *PACKAGE.glob("py.typed")]) <= NUM_DOORS


@pytest.mark.parametrize(
    "path", [path for path in files("freeadv_fast") if path.name == "__init__.py"], ids=shown
)
def test_packages_hand_names_on_and_define_nothing(path):
    """Docstring, imports, `__all__`, what hands on lazily; the front door has its version."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        assert isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr | ast.If)
        if isinstance(node, ast.Assign) and path.parent != PACKAGE:
            names = [name.id for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)]
            assert names in (["__all__"], ["__getattr__", "__dir__", "__all__"])
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "TYPE_CHECKING"


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
