"""manifest.json: size and SHA-256 of every file of an artefact. Written last, checked first.

Every byte of an artefact is covered: a file's by its hash, the manifest's own by having exactly one way to be
written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from halftone.errors import UserError
from halftone.files import sha256, write_text

MANIFEST = "manifest.json"
PROVENANCE, PARITY = "provenance.json", "parity.json"
FORMAT = "halftone artefact"
VERSION = 1
_LARGEST_MANIFEST = 1 << 20
_LARGEST_JSON = 64 << 20
_STRAY = ("README.md", "LICENSE", "LICENSE.md")  # what a hub adds at the top; hidden files are let be as well


class File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size: int = Field(ge=0, lt=1 << 53)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: str = Field(pattern=f"^{FORMAT}$")
    version: int
    files: dict[str, File]

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.size for file in self.files.values())


def is_artefact(folder: Path | str) -> bool:
    """Whether the folder says that it is an artefact; its contents are not looked at."""
    try:
        return f'"format": "{FORMAT}"' in _manifest_text(Path(folder))
    except UserError:
        return False


def artefact_sha256(folder: Path | str) -> str:
    """Identity of an artefact: of all that its images depend on, which is every file but two.

    The provenance names the commit of the code; another that writes the same tensors makes no new one. Parity
    was measured on some machine, and no image depends on it.
    """
    manifest = read_manifest(Path(folder))
    rest = {name: file for name, file in manifest.files.items() if name not in (PROVENANCE, PARITY)}
    return hashlib.sha256(_text(manifest.model_copy(update={"files": rest})).encode()).hexdigest()


def write_manifest(folder: Path) -> Manifest:
    """Describe every file under `folder`, and write manifest.json."""
    paths = {name: folder / name for name in _files(folder)}
    files = {name: File(size=path.stat().st_size, sha256=sha256(path)) for name, path in paths.items()}
    manifest = Manifest(format=FORMAT, version=VERSION, files=files)
    write_text(folder / MANIFEST, _text(manifest))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest, checked in itself, with every path in it inside the folder. Raises UserError."""
    path = folder / MANIFEST
    text = _manifest_text(folder)
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON; the artefact is damaged, get it again") from None
    if isinstance(content, dict) and isinstance(content.get("version"), int) and content["version"] > VERSION:
        raise UserError(f"{path}: format version {content['version']}; this halftone reads up to {VERSION}")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as fault:
        error = fault.errors()[0]
        where = ".".join(str(part) for part in error["loc"])[:200]
        raise UserError(f"{path}: {where}: {error['msg']}; the artefact is damaged, get it again") from None
    for name in manifest.files:
        _check_path(path, name)
    if manifest.version != VERSION or text != _text(manifest):
        raise UserError(f"{path}: not as halftone writes it; the artefact is damaged, get it again")
    return manifest


def check_file(folder: Path, name: str, expected: File) -> None:
    """Raises UserError unless the file is there, is a plain file, and has the size and hash expected."""
    path = folder / name
    for part in (path, *path.parents):
        if part == folder:
            break
        if part.is_symlink():
            raise UserError(f"{part}: is a symbolic link; copy the artefact with its files in place of links")
    if not path.is_file():
        raise UserError(f"{path}: is missing; the artefact is incomplete, get it again")
    size = path.stat().st_size
    if size != expected.size:
        raise UserError(
            f"{path}: has {size} bytes, the manifest says {expected.size}; get the artefact again"
        )
    if path.suffix == ".json" and size > _LARGEST_JSON:
        raise UserError(f"{path}: {size} bytes of JSON are too many; this is no artefact of halftone")
    if sha256(path) != expected.sha256:
        raise UserError(f"{path}: its SHA-256 is not that of the manifest; get the artefact again")


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises UserError unless the folder holds exactly the files of the manifest, byte for byte."""
    for name, expected in manifest.files.items():
        check_file(folder, name, expected)
    check_no_strays(folder, manifest)


def check_no_strays(folder: Path, manifest: Manifest) -> None:
    """Raises UserError for a file that the manifest does not name: a library might read it."""
    for name in _files(folder):
        if name not in manifest.files and name not in _STRAY and not name.startswith("."):
            raise UserError(f"{folder / name}: is not in the manifest; remove it")


def _manifest_text(folder: Path) -> str:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of an artefact")
    if not path.is_file() or path.is_symlink():
        raise UserError(f"{folder}: has no {MANIFEST}: not an artefact, or one that was not finished")
    if path.stat().st_size > _LARGEST_MANIFEST:
        raise UserError(f"{path}: {path.stat().st_size} bytes are too many; this is no artefact of halftone")
    try:
        return path.read_bytes().decode("ascii")
    except UnicodeDecodeError as fault:
        raise UserError(
            f"{path}: byte {fault.start} is not ASCII; the artefact is damaged, get it again"
        ) from None


def _text(manifest: Manifest) -> str:
    return json.dumps(manifest.model_dump(), indent=2, sort_keys=True) + "\n"


def _check_path(manifest: Path, name: str) -> None:
    """Only plain relative paths: no `..`, root, drive or backslash, nothing hidden, not the manifest."""
    parts = PurePosixPath(name).parts
    plain = parts and name == "/".join(parts) and name.isascii() and name.isprintable() and name != MANIFEST
    if (
        not plain
        or any(c in name for c in '\\:*?"<>|')
        or any(part.startswith(".") or part == "/" for part in parts)
    ):
        raise UserError(
            f"{manifest}: {name[:200]!r} is not a plain path inside the artefact; do not trust it"
        )


def _files(folder: Path) -> Iterator[str]:
    """Relative names of all files and links under `folder`, sorted, without the manifest."""
    names = []
    for root, folders, files in os.walk(folder):
        here = Path(root)
        links = [name for name in folders if (here / name).is_symlink()]
        names += [(here / name).relative_to(folder).as_posix() for name in files + links]
    yield from sorted(name for name in names if name != MANIFEST)
