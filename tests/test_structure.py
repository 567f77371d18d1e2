"""The shape of the package: who imports whom, and what is public."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import learndrop_ext

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "learndrop_ext"

#: In the order the data flows. A module or package imports only what stands before it, and its own siblings.
FLOW = (
    *(
        "_C",
        "kernels",
        "warn",
        "distributed",
        "rng",
        "cudnn",
        "preserve",
        "ops",
        "forward",
        "rows",
        "decide",
        "width",
        "data",
        "guards",
    ),
    *("history", "ledger", "checks", "checkpoint", "scheduler", "lightning", "huggingface", "app"),
)
#: The scheduler's state is saved and restored in a file of its own, which knows the scheduler by its type.
FOR_TYPES = {"checkpoint": {"scheduler"}}
WANTS_AN_EXTRA = {"lightning", "huggingface"}  # imported by its own tests
BUILT = {"_C", "kernels"}  # learndrop_ext.kernels is mapped to kernels/ at the top of the tree


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def modules() -> list[Path]:
    return [path for path in files() if path != PACKAGE / "__init__.py"]


def place(path: Path) -> str:
    """The entry of FLOW that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, those for types only included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = "learndrop_ext.kernels" if path.parent.name == "kernels" else ""
            base = home if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def calls(path: Path) -> set[str]:
    """Names of the functions and classes that a file calls."""
    called = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return {node.id for node in called if isinstance(node, ast.Name)}


def test_the_flow_names_exactly_what_is_there() -> None:
    assert {place(path) for path in modules()} | BUILT == set(FLOW)


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_a_package_imports_only_what_stands_before_it(path: Path) -> None:
    home = place(path)
    allowed = {*FLOW[: FLOW.index(home)], *([home] if path.parent != PACKAGE else [])}
    imported = {
        name.split(".")[1] for name in imports(path) if name.startswith("learndrop_ext.") and name.split(".")[1] in FLOW
    }
    assert imported <= allowed | FOR_TYPES.get(home, set())


def test_modules_of_a_package_do_not_import_each_other_in_circles() -> None:
    names = {module_name(path): path for path in modules() if path.name != "__init__.py"}
    for_types = {
        f"learndrop_ext.{name}": {f"learndrop_ext.{of}" for of in others} for name, others in FOR_TYPES.items()
    }
    edges = {name: (imports(path) & names.keys()) - {name} - for_types.get(name, set()) for name, path in names.items()}
    done: set[str] = set()
    while ready := {name for name in edges if name not in done and edges[name] <= done}:
        done |= ready
    assert done == edges.keys()


def test_only_the_scheduler_drops_layers() -> None:
    users = {module_name(path) for path in modules() if place(path) != "forward" and "Bypass" in calls(path)}
    assert users == {"learndrop_ext.scheduler"}
    for stem in ("cli", "report"):
        assert "learndrop_ext.decide.policy" not in imports(PACKAGE / "app" / f"{stem}.py")


def test_only_ops_sees_the_compiled_extension_and_the_triton_kernels() -> None:
    for path in modules():
        kernels = {f"learndrop_ext.kernels.{name}" for name in ("delta_norms", "digests", "filter_norms")}
        sees = {"learndrop_ext._C", "triton", *kernels} & imports(path)
        assert not sees or place(path) == "ops", path


def test_kernels_know_nothing_of_the_package() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        known = {name for name in imports(path) if name.split(".")[0] == "learndrop_ext"}
        assert all(name.startswith("learndrop_ext.kernels") for name in known), path
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1), path


def test_kernels_refuse_to_be_a_top_level_package() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import kernels"
    run = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "ImportError" in run.stderr
    assert "learndrop_ext.kernels" in run.stderr


def test_every_public_name_resolves_and_has_a_docstring() -> None:
    assert sorted(learndrop_ext.__all__) == learndrop_ext.__all__
    for name in learndrop_ext.__all__:
        value = getattr(learndrop_ext, name)
        if callable(value) and name != "Policy":
            assert value.__doc__, name
    for path in modules():
        if path.stem in WANTS_AN_EXTRA:
            continue
        module = importlib.import_module(module_name(path))
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), (path, name)


def test_no_block_of_ten_lines_stands_twice() -> None:
    """Ten lines in a row, imports and blank lines aside."""
    first: dict[tuple[str, ...], str] = {}
    twice = []
    for path in sorted(path for folder in ("learndrop_ext", "kernels", "csrc") for path in (ROOT / folder).rglob("*")):
        if path.suffix not in (".py", ".cpp", ".cu", ".h", ".cuh"):
            continue
        lines = [(number, line.strip()) for number, line in enumerate(path.read_text().splitlines(), 1)]
        lines = [
            (number, line) for number, line in lines if line and not line.startswith(("import ", "from ", "#include "))
        ]
        for i in range(len(lines) - 9):
            place = f"{path.relative_to(ROOT)}:{lines[i][0]}"
            block = tuple(line for _, line in lines[i : i + 10])
            if first.setdefault(block, place) != place:
                twice.append((first[block], place))
    assert twice == []


def test_width_is_a_small_package() -> None:
    """At most 900 lines, docstrings, comments and blank lines included."""
    count = sum(len(path.read_text().splitlines()) for path in (PACKAGE / "width").glob("*.py"))
    assert 500 < count <= 900


def test_tests_mirror_the_tree() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.glob("test_*.py"))}
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == packages | {"kernels", "promises"}


def test_there_are_no_drawers() -> None:
    assert not {path.stem for path in modules()} & {"utils", "common", "base", "helpers", "misc"}
