"""Files that are either whole or absent: write to a temporary name beside the target, then rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halftone.errors import UserError

_NO_FOLDER = "a part of the path is a file: choose another folder"
_DISK_FAULTS = {
    errno.ENOSPC: "the disk is full: free some space and run again",
    errno.EDQUOT: "the disk quota is used up: free some space and run again",
    errno.EACCES: "permission denied: choose a folder you may write to, or change its permissions",
    errno.EPERM: "operation not permitted: choose a folder you may write to",
    errno.ENOTDIR: _NO_FOLDER,
    errno.EEXIST: _NO_FOLDER,
    errno.EROFS: "the file system is read-only: choose another folder",
}


@contextlib.contextmanager
def explain_disk_faults(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into a `UserError` that names the path and the remedy."""
    try:
        yield
    except OSError as fault:
        remedy = _DISK_FAULTS.get(fault.errno or 0)
        if remedy is None:
            raise
        raise UserError(f"cannot write {path}: {remedy}") from fault
    except Exception as fault:
        # safetensors reports a failed write as an error type of its own, with the errno in words
        text = str(fault)
        for number, remedy in _DISK_FAULTS.items():
            if f"os error {number}" in text:
                raise UserError(f"cannot write {path}: {remedy}") from fault
        raise


def check_writable(path: Path) -> None:
    """Raises UserError where nothing can be written at `path`, before anything is spent."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".halftone-", dir=path.parent):
            pass
    except OSError as fault:
        remedy = _DISK_FAULTS.get(fault.errno or 0, f"{fault.strerror}; choose another folder")
        raise UserError(f"cannot write {path}: {remedy}") from None


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success rename it over `path`, on failure remove it.

    Works for a file or a folder (whichever the caller creates under the temporary name).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explain_disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if temporary.is_dir() and path.is_dir():
                shutil.rmtree(path)
            _use_plain_permissions(temporary)
            os.replace(temporary, path)
        except BaseException:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
            raise


def _use_plain_permissions(path: Path) -> None:
    """Give files the mode the umask asks for: safetensors makes its own readable by their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~mask)


def write_text(path: Path | str, text: str) -> None:
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Deterministic JSON: sorted keys, two spaces, a closing newline; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise UserError(
            f"{path}: not valid JSON ({fault}); remove it and run the step that makes it"
        ) from None


def sha256(path: Path | str) -> str:
    """SHA-256 of a file, or of a folder: of its sorted relative names and contents, hidden files left out."""
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            relative = file.relative_to(path)
            if not any(part.startswith(".") for part in relative.parts):
                digest.update(f"{relative.as_posix()}\0{sha256(file)}\n".encode())
    else:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
