"""Some definitions of the package, and all that they need, as the text of one module that needs no package.

Nothing is written anew: each definition stands there as in its own file, comments included. Left out is what cannot be
reached: methods that override nothing of torch's and that no code kept calls by name, and entries of registries that
are not wanted. Two private names that would meet in one module get their file's name in front.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter

from kallm.saving.sourcefile import Function, SourceFile, Used, first_line, read_source, targets_of, torch_names

__all__ = ["Origin", "bundle"]

Origin = tuple[str, str]
"""A module and the name of what it defines or exports."""

_PACKAGE = "kallm"
_SHAPES = "jaxtyping"
_ALLOWED = {"torch", "transformers"}
_Edit = tuple[int, int, bytes]


@dataclass(frozen=True)
class _Kept:
    """What is kept of a definition: the nodes that live, and the edits that take the others out."""

    nodes: list[ast.AST]
    edits: list[_Edit]


def bundle(
    roots: Iterable[Origin],
    *,
    substitutes: Mapping[Origin, Origin],
    registries: Mapping[str, Iterable[str]],
    extra_imports: Mapping[str, Origin] | None = None,
) -> str:
    """Return the text: imports, then the definitions file by file, each file after those that it imports.

    Args:
        roots: what is wanted.
        substitutes: for things of this package or of others, what stands in.
        registries: for the names of module-level dicts, the keys that are wanted.
        extra_imports: what the text imports besides, by the name that it gets.
    """
    wanted = {name: set(keys) for name, keys in registries.items()}
    called: set[str] = set()
    roots = list(roots)
    while True:
        gathered = _Gathering(substitutes, wanted, called)
        gathered.imports |= extra_imports or {}
        for root in roots:
            gathered.add(root)
        if gathered.attributes <= called:
            return gathered.render()
        called |= gathered.attributes


class _Gathering:
    """The definitions that are reached from some roots when only some attributes are ever called."""

    def __init__(self, substitutes: Mapping[Origin, Origin], wanted: dict[str, set[str]], called: set[str]) -> None:
        self.substitutes, self.wanted, self.called = substitutes, wanted, called
        self.kept: dict[tuple[str, int], _Kept] = {}
        """By module and first line."""
        self.names: dict[str, dict[str, str]] = defaultdict(dict)
        """For each module, the names of what it defines that are kept: first as they are, then as they are written."""
        self.needs: dict[str, set[str]] = defaultdict(set)
        """For each module, those that what is kept of it needs."""
        self.imports: dict[str, tuple[str, str | None]] = {}
        self.attributes: set[str] = set()

    def add(self, origin: Origin) -> None:
        """Keep what an origin names, and all that it needs."""
        module, name = self._resolve(origin)
        if name is None or name in self.names[module]:
            return
        source = read_source(module)
        node = source.definitions[name]
        for other in targets_of(node):
            self.names[module][other] = other
        kept = self._keep(source, node)
        self.kept[module, node.lineno] = kept
        for part in kept.nodes:
            used = Used()
            used.visit(part)
            self.attributes |= used.attributes
            for each in sorted(used.names):
                self._follow(source, each)
            for each in sorted(used.in_annotations - used.names):
                self._import(source, each)

    def _resolve(self, origin: Origin) -> tuple[str, str | None]:
        """Follow an origin to the module of the package that defines it; None for what another package defines."""
        module, name = self.substitutes.get(origin, origin)
        if module.partition(".")[0] != _PACKAGE:
            return module, None
        source = read_source(module)
        if name in source.definitions:
            return module, name
        from_module, from_name = source.imports[name]
        assert from_name is not None, f"{module} imports a module of the package whole: {name}"
        return self._resolve((from_module, from_name))

    def _follow(self, source: SourceFile, name: str) -> None:
        if name in source.definitions:
            self.add((source.name, name))
        elif name in source.imports:
            module, original = source.imports[name]
            if (module, original or "") in self.substitutes or module.partition(".")[0] == _PACKAGE:
                assert original == name, f"{source.name} imports {module} in a way that cannot be bundled"
                self.needs[source.name].add(self._resolve((module, original))[0])
                self.add((module, original))
            else:
                self._import(source, name)

    def _import(self, source: SourceFile, name: str) -> None:
        module, original = source.imports.get(name, (_PACKAGE, None))
        root = module.partition(".")[0]
        if root in (_PACKAGE, _SHAPES) or (module, original or "") in self.substitutes:
            return
        assert root in _ALLOWED or root in sys.stdlib_module_names, f"{source.name} needs {module}"
        assert self.imports.setdefault(name, (module, original)) == (module, original), f"two things are named {name}"

    def _keep(self, source: SourceFile, node: ast.stmt) -> _Kept:
        if isinstance(node, ast.ClassDef):
            return self._keep_class(source, node)
        (name, *_) = targets_of(node)
        value = getattr(node, "value", None)
        if name in self.wanted and isinstance(value, ast.Dict):
            return self._keep_entries(source, node, value, self.wanted[name])
        return _Kept([node], [])

    def _keep_class(self, source: SourceFile, node: ast.ClassDef) -> _Kept:
        nodes: list[ast.AST] = [*node.bases, *node.decorator_list]
        edits: list[_Edit] = []
        inherited = torch_names(source.name, node.name)
        end = first_line(node.body[0]) - 1
        for part in node.body:
            if not isinstance(part, Function) or self._is_alive(part.name, inherited):
                nodes.append(part)
            else:
                edits.append((source.starts[end], source.starts[part.end_lineno or 0], b""))
            end = part.end_lineno or 0
        if len(edits) == len(node.body):
            edits[-1] = (*edits[-1][:2], b"    pass\n")
        return _Kept(nodes, edits)

    def _is_alive(self, method: str, inherited: frozenset[str]) -> bool:
        return method.startswith("__") or method in inherited or method in self.called

    def _keep_entries(self, source: SourceFile, node: ast.stmt, value: ast.Dict, keys: set[str]) -> _Kept:
        nodes: list[ast.AST] = []
        lines = []
        for key, entry in zip(value.keys, value.values, strict=True):
            if isinstance(key, ast.Constant) and key.value in keys:
                nodes.append(entry)
                lines.append(b"    " + source.data[source.span(key)[0] : source.span(entry)[1]] + b",\n")
        return _Kept(nodes, [(*source.span(value), b"{\n" + b"".join(lines) + b"}")])

    def render(self) -> str:
        """Return the text."""
        self._part_names()
        parts = [self._render_imports()]
        for module in TopologicalSorter({name: self.needs[name] for name in sorted(self.names)}).static_order():
            source = read_source(module)
            file = "/".join(module.split("."))
            parts.append("\n".join(f"# {line}".rstrip() for line in (f"From {file}.py", "", *source.doc.splitlines())))
            parts += [self._render(source, line) for name, line in sorted(self.kept) if name == module]
        return "\n\n\n".join(parts) + "\n"

    def _part_names(self) -> None:
        """Give the names that several files define their file's name in front."""
        owners = defaultdict(list)
        for module, names in self.names.items():
            for name in names:
                owners[name].append(module)
        for name, modules in owners.items():
            for module in modules if len(modules) > 1 else ():
                self.names[module][name] = f"_{module.rpartition('.')[2]}_{name.lstrip('_')}"

    def _render(self, source: SourceFile, line: int) -> str:
        node = next(each for each in source.definitions.values() if each.lineno == line)
        begin, end = source.extent(node)
        edits = list(self.kept[source.name, line].edits)
        new = self.names[source.name]
        for each in ast.walk(node):
            if isinstance(each, ast.Name) and new.get(each.id, each.id) != each.id:
                edits.append((*source.span(each), new[each.id].encode()))
        (name, *_) = targets_of(node)
        text = _edited(source.data[begin:end], begin, edits).decode()
        if new[name] != name and isinstance(node, ast.ClassDef | Function):
            text = text.replace(f" {name}(", f" {new[name]}(", 1)
        return text.strip("\n")

    def _render_imports(self) -> str:
        lines, plain = defaultdict(list), []
        for name, (module, original) in self.imports.items():
            if original is None:
                plain.append(f"import {module}" + ("" if name == module.partition(".")[0] else f" as {name}"))
            else:
                lines[module].append(original if name == original else f"{original} as {name}")
        written = sorted(plain)
        written += [f"from {module} import {', '.join(sorted(lines[module]))}" for module in sorted(lines)]
        ours = [line for line in written if line.split()[1].partition(".")[0] in _ALLOWED]
        return "\n".join([*(line for line in written if line not in ours), "", *ours])


def _edited(data: bytes, begin: int, edits: list[_Edit]) -> bytes:
    """Apply edits, given by offsets in the file, to the part of it that starts at ``begin``."""
    done: list[_Edit] = []
    for start, end, new in sorted(edits, key=lambda edit: (edit[0], -edit[1])):
        if not any(other[0] <= start and end <= other[1] for other in done):
            done.append((start, end, new))
    for start, end, new in reversed(done):
        data = data[: start - begin] + new + data[end - begin :]
    return data
