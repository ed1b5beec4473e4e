"""Configuration files, read and merged as Snakemake does: each overlay's values replace those before it, leaf
by leaf.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from halftone.errors import UserError
from halftone.settings import Settings, validate

PARAMS = Path("params.yaml")
OVERLAYS = Path("experiments")


def _parsed(text: str) -> Any:
    """What YAML holds. Raises UserError for a key that a mapping has already: YAML would keep the last alone,
    and rows would be lost."""
    loader = yaml.SafeLoader(text)
    whole = loader.get_single_node()
    todo, seen = [whole], set()
    while todo:
        node = todo.pop()
        if node is None or id(node) in seen:  # an alias stands for the same node
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            said = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in said:
                    line = key.start_mark.line + 1
                    raise UserError(f"line {line}: {key.value!r} is said twice; leave one out")
                said |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
                todo.append(value)
    return None if whole is None else loader.construct_document(whole)


def read(path: Path | str) -> dict[str, Any]:
    """One YAML mapping. Raises UserError."""
    path = Path(path)
    try:
        config = _parsed(path.read_text(encoding="utf-8"))
    except UserError as fault:
        raise UserError(f"{path}, {fault}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the folder that holds {PARAMS}") from None
    except UnicodeDecodeError as fault:
        raise UserError(f"{path}: not UTF-8 text (byte {fault.start}); save it as UTF-8") from None
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from None
    except yaml.YAMLError as fault:
        raise UserError(f"{path}: not valid YAML: {fault}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold a mapping of settings")
    return config


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `over` put in."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def settings(overlays: Iterable[Path | str] = (), base: Path | str = PARAMS) -> Settings:
    """Settings of params.yaml with overlays applied. Raises UserError."""
    files = [Path(base), *map(Path, overlays)]
    config: dict[str, Any] = {}
    for file in files:
        config = merge(config, read(file))
    return validate(config, " + ".join(map(str, files)))


def overlay(name: str) -> Path:
    """`headline` -> experiments/headline.yaml; a path is kept.

    Raises UserError for a file that is not there.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = OVERLAYS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in OVERLAYS.glob("*.yaml"))) or "none"
        raise UserError(f"{path}: no such overlay; known are {known}, or give the path of a YAML file")
    return path
