"""Prompts of others: a file fetched once, checked against its hash, and prompts drawn from it.

What is drawn depends on the bytes of the file, the count and the seed alone, so a prompt file that was made
here is named by them.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from halftone.errors import UserError
from halftone.files import sha256, write_text, writing
from halftone.progress import Progress
from halftone.prompts import holds_control
from halftone.settings import PromptFormat, PromptSource

_CHUNK = 1 << 20
_HUB = "hub:"
_SCHEMES = ("https://", "http://", "file://", _HUB)


def fetch(source: PromptSource, output: Path, cache: Path) -> int:
    """Write the prompts drawn from `source` to `output`, one a line; returns how many the source offered.

    cache: folder that keeps the fetched file, so that it is fetched once. One prompt per image of a COCO
    caption file (our choice: five captions of one image are not five prompts), every other one once; lines
    that a prompt file may not hold are left out. Raises UserError where the file cannot be had, is another
    than its hash says, or holds too few prompts.
    """
    path = _checked(source, cache)
    texts = list(dict.fromkeys(" ".join(text.split()) for text in _texts(path, source)))
    offered = [text for text in texts if text and not holds_control(text)]
    if len(offered) < source.count:
        raise UserError(
            f"{source.url}: holds {len(offered)} prompts, {source.count} were asked for; ask for fewer"
        )
    drawn = random.Random(source.seed).sample(offered, source.count)
    write_text(output, "".join(f"{text}\n" for text in drawn))
    return len(offered)


def _checked(source: PromptSource, cache: Path) -> Path:
    """The file of a source, with the bytes that its hash promises."""
    if not source.url.startswith(_SCHEMES):
        raise UserError(f"{source.url}: must start with one of {', '.join(_SCHEMES)}")
    path = cache / (source.sha256 or hashlib.sha256(source.url.encode()).hexdigest())
    if source.sha256 is not None and path.exists() and sha256(path) == source.sha256:
        return path
    with writing(path) as temporary:
        _download(source.url, temporary)
        found = sha256(temporary)
        if source.sha256 is None:
            raise UserError(f"{source.url}: sha256 is missing; what was fetched has sha256 {found}: pin it")
        if found != source.sha256:
            raise UserError(
                f"{source.url}: has sha256 {found}, not {source.sha256}; the file has changed, so look at it "
                "before you pin its new hash"
            )
    return path


def _download(url: str, path: Path) -> None:
    try:
        if url.startswith(_HUB):
            _from_hub(url.removeprefix(_HUB), path)
            return
        # only the schemes above: no other handler of urllib is reached
        with urllib.request.urlopen(url, timeout=60) as response, path.open("wb") as file:
            _copy(response, file, int(response.headers.get("Content-Length") or 0), url)
    except (urllib.error.URLError, TimeoutError, OSError) as fault:
        raise UserError(
            f"{url}: cannot be fetched ({str(fault)[:200]}); with the file at hand write url: file:///PATH, "
            "or name a prompt file under prompts"
        ) from None


def _copy(response: IO[bytes], file: IO[bytes], size: int, url: str) -> None:
    progress = Progress(f"fetch {url.rpartition('/')[2]}", size) if size else None
    while chunk := response.read(_CHUNK):
        file.write(chunk)
        if progress is not None:
            progress.advance(len(chunk))


def _from_hub(name: str, path: Path) -> None:
    """`OWNER/DATASET@COMMIT/FILE`."""
    from huggingface_hub import hf_hub_download

    dataset, at, rest = name.partition("@")
    revision, slash, file = rest.partition("/")
    if not (at and slash and dataset.count("/") == 1):
        raise UserError(f"{_HUB}{name}: write {_HUB}OWNER/DATASET@COMMIT/FILE")
    with tempfile.TemporaryDirectory() as folder:
        found = hf_hub_download(dataset, file, repo_type="dataset", revision=revision, local_dir=folder)
        shutil.copyfile(found, path)


def _texts(path: Path, source: PromptSource) -> Iterator[str]:
    try:
        if source.member is None:
            with path.open("rb") as file:
                yield from _READERS[source.format](file, source)
        else:
            # read in place by its name: nothing is unpacked to a path of the archive's choosing
            with zipfile.ZipFile(path) as archive, archive.open(source.member) as file:
                yield from _READERS[source.format](file, source)
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError) as fault:
        where = source.url if source.member is None else f"{source.url}, {source.member}"
        raise UserError(f"{where}: cannot be read as {source.format} ({str(fault)[:200]})") from None


def _lines(file: IO[bytes], source: PromptSource) -> Iterator[str]:
    yield from file.read().decode("utf-8").splitlines()


def _coco(file: IO[bytes], source: PromptSource) -> Iterator[str]:
    seen: set[Any] = set()
    # in the order of the captions' ids, whatever that of the file
    for caption in sorted(json.load(file)["annotations"], key=lambda one: one["id"]):
        if caption["image_id"] not in seen:
            seen.add(caption["image_id"])
            yield caption["caption"]


def _parquet(file: IO[bytes], source: PromptSource) -> Iterator[str]:
    import pyarrow.parquet as parquet

    column = source.column or "Prompt"
    yield from (str(value) for value in parquet.read_table(file, columns=[column])[column].to_pylist())


_READERS = {PromptFormat.LINES: _lines, PromptFormat.COCO: _coco, PromptFormat.PARQUET: _parquet}
