"""Imports go one way, and what a cluster's small pods run needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "kallm"
ROOMS = [
    "errors", "store", "progress", "receipt", "kan", "model", "saving", "data", "train", "engine", "evaluate",
    "results", "report", "study", "run", "cluster", "options", "commands", "cli",
]  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Return the rooms of kallm that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("kallm.")}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_only_upwards(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    below = {other for other in imports_of(path) if ROOMS.index(other) > ROOMS.index(room)}
    assert not below, f"{path} of room {room} imports from below: {below}"


def test_the_check_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from kallm.run.local import run_cells\n")
    assert imports_of(file) == {"run"}


@pytest.mark.parametrize(
    "module",
    ["kallm", "kallm.cli", "kallm.results.table", "kallm.results.status", "kallm.results.render", "kallm.study.plan",
     "kallm.kan.spec", "kallm.store.opening", "kallm.store.commit", "kallm.data.bbh", "kallm.evaluate.suites"],
)  # fmt: skip
def test_no_torch_is_imported(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_check_for_torch_can_fail() -> None:
    code = "import sys, kallm.model.trunk; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1


def test_public_names_are_sorted_and_there() -> None:
    import importlib

    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
        if path.name in ("__init__.py", "__main__.py") and name != "kallm":
            continue
        module = importlib.import_module(name)
        assert list(module.__all__) == sorted(module.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n)), (
            name
        )
        assert all(hasattr(module, public) for public in module.__all__), name
