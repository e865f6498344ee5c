"""A hash of the source code that a run executes, so that results of other code are never taken for its own.

The hash covers the module of the run's class and, transitively, every module of normwise that it imports. It
ignores comments, docstrings, formatting, imports from normwise and the paths of files, so documenting, moving
or renaming a module leaves it as it is. It is cautious: a change in any function of an imported module
changes it.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

import normwise

__all__ = ["source_hash"]

# The engine only starts runs, and a data set is identified by its fingerprint.
_IGNORED = ("lab/engine/", "lab/data/fetch.py", "lab/data/debian.py", "lab/data/source.py")


@lru_cache
def source_hash(cls: type, root: Path = Path(normwise.__file__).parent) -> str:
    """Return 16 hexadecimal digits that depend on the source code that a run of this class executes.

    Args:
        cls: The class of the run.
        root: Folder of the package whose modules count.

    Raises:
        ValueError: The class was defined interactively, so its source code is not in a file.
    """
    file = getattr(sys.modules[cls.__module__], "__file__", None)
    if file is None:
        raise ValueError(f"{cls.__name__} was defined interactively: define the class of a run in a module")
    pending, seen = [Path(file)], set[Path]()
    while pending:
        path = pending.pop()
        if path not in seen:
            seen.add(path)
            pending += _analysed(path, root)[1]
    digests = sorted({_analysed(path, root)[0] for path in seen})
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


@cache
def _analysed(path: Path, root: Path) -> tuple[str, list[Path]]:
    """Return the hash of a module's own code, and the files of the package that it imports."""
    normalized = _Normalized(root.name)
    tree = normalized.visit(ast.parse(path.read_bytes()))
    names = [*normalized.imported, *_attributes(tree, normalized.aliases, root)]
    imported = [file for name in names if (file := _file(name, root)) is not None]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest(), imported


class _Normalized(ast.NodeTransformer):
    """Removes what a run does not execute: docstrings, imports from the package, ``__all__``.

    Attributes:
        imported: The dotted names that the removed imports import.
        aliases: The names that they give to the package itself.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.imported: list[str] = []
        self.aliases: set[str] = set()

    def generic_visit(self, node: ast.AST) -> ast.AST:
        return node if isinstance(node, ast.expr) else super().generic_visit(node)  # holds no statement

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else node

    def visit_Import(self, node: ast.Import) -> ast.AST | None:
        mine = [alias for alias in node.names if alias.name.partition(".")[0] == self.package]
        self.imported += [alias.name for alias in mine]
        self.aliases |= {alias.asname or alias.name for alias in mine if alias.name == self.package}
        return None if mine else node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        if (node.module or "").partition(".")[0] != self.package:
            return node
        self.imported += [f"{node.module}.{alias.name}" for alias in node.names]
        return None

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        public = isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
        return None if public else node


def _attributes(tree: ast.Module, aliases: set[str], root: Path) -> Iterator[str]:
    """Yield the dotted names that a module uses as ``nw.NAME``."""
    for node in ast.walk(tree) if aliases else ():
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            yield _public(root).get(node.attr, f"{root.name}.{node.attr}")


@lru_cache
def _public(root: Path) -> dict[str, str]:
    """Return where the public names of the package are defined, as its module ``_public`` imports them."""
    path = root / "_public.py"
    tree = ast.parse(path.read_bytes() if path.exists() else b"")
    return {
        alias.name: f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def _file(name: str, root: Path) -> Path | None:
    """Return the file that defines a dotted name: a module, or the module that contains it."""
    parts = name.split(".")[1:]
    for place in (parts, parts[:-1]):
        for file in (root.joinpath(*place).with_suffix(".py"), root.joinpath(*place, "__init__.py")):
            if place and file.exists():
                relative = file.relative_to(root).as_posix()
                return None if relative.startswith(_IGNORED) else file
    return None
