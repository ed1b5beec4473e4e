"""Which of our source files a module depends on: what it imports, and so on, also inside functions."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1]

# these cannot change what a job writes: messages, MLflow, and the reading of options, which are recorded
HARMLESS = {
    "halftone/__init__.py",
    "halftone/cli/__init__.py",
    "halftone/cli/options.py",
    "halftone/errors.py",
    "halftone/progress.py",
    "halftone/settings.py",
    "halftone/tracking.py",
}


def closure(source: Path, start: str) -> set[str]:
    """Files under `source`, relative to it, that the file `start` imports, directly or not, and itself."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += sorted(_imported(source, name) - found)
    return {name for name in found - HARMLESS if has_code(source / name)}


@cache
def code_hash(start: str) -> str:
    """Changes with the code of the running package's file `start` and of all that it imports."""
    return hash_of(SOURCE, closure(SOURCE, start))


def hash_of(folder: Path, names: Iterable[str]) -> str:
    """Of files, named from a folder, and their contents."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0".encode() + (folder / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def _imported(source: Path, name: str) -> set[str]:
    if name in HARMLESS:
        return set()
    wanted: set[str] = set()
    for node in ast.walk(ast.parse((source / name).read_text())):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            wanted |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {module for module in wanted if module.split(".")[0] == "halftone"}
    parents = {
        ".".join(parts[:k])
        for module in ours
        for parts in [module.split(".")]
        for k in range(1, len(parts) + 1)
    }
    return {file for module in parents if (file := _file(source, module))}


def _file(source: Path, module: str) -> str | None:
    for name in (f"{module.replace('.', '/')}.py", f"{module.replace('.', '/')}/__init__.py"):
        if (source / name).is_file():
            return name
    return None


@cache
def has_code(file: Path) -> bool:
    """Whether there is more than a docstring; of a file that is not Python, always."""
    if file.suffix != ".py":
        return True
    body = ast.parse(file.read_text()).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)
