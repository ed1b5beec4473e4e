"""The source files that a rule's result depends on, and their hash.

dvc.yaml lists them among a stage's deps: DVC compares the files themselves, Snakemake a hash of them among
the rule's parameters. `halftone code` writes the lists from what the verbs import; a test fails when they are
behind.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml

from halftone.imports import closure, has_code, hash_of
from halftone.workflow.paths import Rule

SOURCE = "src/"
PACKAGE = "halftone"
# what no import tells
FURTHER = {Rule.REPORT: ("halftone/report/page.html.j2",)}


@cache
def listed(root: Path, rule: Rule) -> tuple[str, ...]:
    """The source files and folders among the stage's deps, as dvc.yaml names them."""
    stage = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"][rule]
    return tuple(dep for dep in stage.get("do", stage)["deps"] if dep.startswith(SOURCE))


def files(root: Path, rule: Rule) -> list[Path]:
    """Every file that the list covers, sorted; what Python compiles is left out, here and in .dvcignore."""
    found: set[Path] = set()
    for entry in listed(root, rule):
        path = root / entry
        found |= set(_contents(path)) if path.is_dir() else {path}
    return sorted(found)


def code_hash(root: Path, rule: Rule) -> str:
    """Changes exactly when DVC would see a changed source file."""
    return hash_of(root, [file.relative_to(root).as_posix() for file in files(root, rule)])


@cache
def verb_hash(root: Path, verb: str) -> str:
    """The same of the files that a verb imports, for rules that DVC does not know."""
    return hash_of(root, [SOURCE + name for name in closure(root / SOURCE, f"{PACKAGE}/cli/{verb}.py")])


def needed(root: Path, rule: Rule) -> list[str]:
    """What the list should be: the files that the rule's verb imports, a folder where all of it is meant."""
    source = root / SOURCE
    wanted = closure(source, f"{PACKAGE}/cli/{rule}.py") | set(FURTHER.get(rule, ()))
    entries: set[str] = set()
    for name in wanted:
        folder = Path(name).parent
        inside = [
            file.relative_to(source).as_posix() for file in _contents(source / folder) if has_code(file)
        ]
        whole = folder.as_posix() != PACKAGE and len(inside) > 2 and wanted.issuperset(inside)
        entries.add(f"{SOURCE}{folder.as_posix() if whole else name}")
    return sorted(entries)


def rewritten(root: Path) -> str:
    """The text of dvc.yaml with every stage's list as it should be."""
    lines: list[str] = []
    rule: Rule | None = None
    for line in (root / "dvc.yaml").read_text(encoding="utf-8").splitlines():
        name = line.strip().removesuffix(":")
        if line == f"  {name}:" and name in set(Rule):
            rule = Rule(name)
        if not line.strip().startswith(f"- {SOURCE}"):
            lines.append(line)
        elif not lines[-1].strip().startswith(f"- {SOURCE}"):
            assert rule is not None
            indent = line[: len(line) - len(line.lstrip())]
            lines += [f"{indent}- {entry}" for entry in needed(root, rule)]
    return "\n".join(lines) + "\n"


def _contents(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"]
