"""The shape of the package: who imports whom, what is public, one file in one sitting."""

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
HOME = {"learndrop_ext": "learndrop_ext", "kernels": "learndrop_ext.kernels"}

#: In the order the data flows: a file imports only what stands before it.
FLOW: list[str] = [
    *("config", "distributed", "randomness", "row_ops_reference", "ops", "models", "image_files", "image_set"),
    *("datasets", "graph", "layers", "deltas", "scores", "policy", "costs", "batches"),
    *("tier_ops", "disk", "tiers", "host_rows", "tiered_rows", "batch_memory", "cache", "drop", "fill", "loader"),
    *("history", "rows", "scheduler", "plots", "report", "runs", "cli"),
]


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file of the package imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = HOME[path.parent.name] if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.glob("*.py")) if path.stem != "__init__"]


def test_every_file_has_its_place_in_the_flow() -> None:
    assert {path.stem for path in files()} <= set(FLOW)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_a_file_imports_only_what_stands_before_it(path: Path) -> None:
    later = set(FLOW[FLOW.index(path.stem) :])
    imported = {name.split(".")[1] for name in imports(path) if name.startswith("learndrop_ext.")}
    assert not imported & later


def test_only_the_scheduler_knows_all_of_the_flow() -> None:
    users = {path.stem for path in files() if "learndrop_ext.drop" in imports(path)}
    assert users == {"scheduler"}
    for stem in ("cli", "report"):
        assert "learndrop_ext.policy" not in imports(PACKAGE / f"{stem}.py")


def test_only_ops_sees_the_compiled_extension_and_the_triton_kernels() -> None:
    for path in files():
        sees = {"learndrop_ext._C", "learndrop_ext.kernels.delta_norms", "triton"} & imports(path)
        assert not sees or path.stem in ("ops", "tier_ops"), path


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
    for path in files():
        module = importlib.import_module(f"learndrop_ext.{path.stem}")
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), (path, name)


def test_files_are_read_in_one_sitting() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("learndrop_ext", "kernels", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh")
        for lines in [len(path.read_text().splitlines())]
        if lines > 400
    }
    assert long == {}


def test_there_are_no_drawers() -> None:
    assert not {path.stem for path in files()} & {"utils", "common", "base", "helpers", "misc"}
