"""Python files of the package as text with names: what a definition uses, where it begins and ends."""

import ast
import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Function", "SourceFile", "Used", "first_line", "read_source", "targets_of", "torch_names"]

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class SourceFile:
    """One file of the package."""

    name: str
    data: bytes
    starts: tuple[int, ...]
    """Offset of every line's first byte; one more for the end."""
    doc: str
    definitions: dict[str, ast.stmt]
    imports: dict[str, tuple[str, str | None]]
    """For each imported name its module, and its name there; None for the module itself."""

    def span(self, node: ast.expr) -> tuple[int, int]:
        """Return where an expression begins and ends, in bytes."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def line(self, number: int) -> bytes:
        """Return a line, counted from 1; empty past the end."""
        return self.data[self.starts[number - 1] : self.starts[number]] if number < len(self.starts) else b""

    def extent(self, node: ast.stmt) -> tuple[int, int]:
        """Return where a definition begins, with decorators and the comment above, and ends, with the text below."""
        first, last = first_line(node), node.end_lineno or 0
        while first > 1 and self.line(first - 1).startswith(b"#"):
            first -= 1
        if isinstance(node, ast.Assign | ast.AnnAssign) and self.line(last + 1).startswith(b'"""'):
            last += 1
            while not self.line(last).rstrip().endswith(b'"""'):
                last += 1
        return self.starts[first - 1], self.starts[last]


class Used(ast.NodeVisitor):
    """The names and attributes that code uses when it runs, and the names in its annotations, which are never read."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.in_annotations: set[str] = set()

    def visit_Name(self, node: ast.Name) -> None:
        self.names.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.attributes.add(node.attr)
        self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        self._annotation(node.annotation)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._annotation(node.annotation)
        for part in (node.target, node.value):
            if part is not None:
                self.visit(part)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._annotation(node.returns)
        for part in (*node.decorator_list, node.args, *node.body):
            self.visit(part)

    def visit_Import(self, node: ast.Import) -> None:
        roots = {alias.name.partition(".")[0] for alias in node.names}
        assert "kallm" not in roots, f"an import inside a definition cannot be bundled: {ast.unparse(node)}"

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        root = (node.module or "").partition(".")[0]
        assert root != "kallm", f"an import inside a definition cannot be bundled: {ast.unparse(node)}"

    def _annotation(self, node: ast.expr | None) -> None:
        if node is not None:
            self.in_annotations |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


@cache
def read_source(name: str) -> SourceFile:
    file = importlib.import_module(name).__file__
    assert file is not None
    data = Path(file).read_bytes()
    tree = ast.parse(data)
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    definitions: dict[str, ast.stmt] = {}
    imports: dict[str, tuple[str, str | None]] = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            imports |= {alias.asname or alias.name.partition(".")[0]: (alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imports |= {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}
        else:
            definitions |= dict.fromkeys(targets_of(node), node)
    return SourceFile(name, data, tuple(starts), ast.get_docstring(tree) or "", definitions, imports)


def first_line(node: ast.stmt) -> int:
    """Return a statement's first line, decorators included."""
    return min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])


def targets_of(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines."""
    if isinstance(node, ast.ClassDef | Function):
        return [node.name]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
    return []


def torch_names(module: str, name: str) -> frozenset[str]:
    """Return what a class has from torch's own: a method of such a name is called by torch."""
    kind = getattr(importlib.import_module(module), name)
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] == "torch"]
    return frozenset(attribute for base in bases for attribute in vars(base))
