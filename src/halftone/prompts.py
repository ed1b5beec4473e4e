"""Prompt files: UTF-8 text, one prompt a line. A prompt's id is its place in the file, counted from 0."""

from __future__ import annotations

import hashlib
import inspect
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halftone.errors import UserError

_NO_LIMIT = 1_000_000  # tokenizers without a limit say so with an absurdly large number
_CONTROL = {"Cc", "Zl", "Zp"}  # control characters, and separators that other tools read as line ends


def read_prompts(path: Path | str) -> list[str]:
    """The prompts of a file, in its order, without surrounding blanks.

    Raises UserError, naming the line, for anything that would silently change which prompt is which: text
    that is not UTF-8, an empty file, blank or repeated lines, control characters.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such prompt file") from None
    except OSError as fault:
        raise UserError(f"{path}: cannot be read as a prompt file ({fault.strerror})") from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as fault:
        at = content[: fault.start].count(b"\n") + 1
        raise UserError(
            f"{path}: byte {fault.start} (line {at}) is not UTF-8; save the file as UTF-8"
        ) from None
    if text.startswith("\ufeff"):
        raise UserError(f"{path}: starts with a byte order mark; save the file as UTF-8 without one")
    if not text.strip():
        raise UserError(f"{path}: holds no prompts; write one prompt a line")
    prompts: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        prompt = line.strip()
        if not prompt:
            raise UserError(f"{path}: line {number} is blank; remove it, since a prompt's id is its line")
        if holds_control(prompt):
            raise UserError(f"{path}: line {number} holds a control character; remove it")
        if prompt in seen:
            raise UserError(f"{path}: line {number} repeats line {seen[prompt]}; remove one of them")
        seen[prompt] = number
        prompts.append(prompt)
    return prompts


def holds_control(prompt: str) -> bool:
    """Whether a text holds characters that some tool reads as the end of a line, or that nobody sees."""
    return any(unicodedata.category(letter) in _CONTROL for letter in prompt)


def prompts_sha256(prompts: Sequence[str]) -> str:
    """SHA-256 of the prompts, one a line: of the whole file where that is how it is written."""
    return hashlib.sha256("".join(f"{prompt}\n" for prompt in prompts).encode()).hexdigest()


def token_limit(pipeline: Any, tokenizer: Any) -> int | None:
    """Most tokens of a prompt, start and end included, that the pipeline conditions on; None without a limit.

    T5 tokenizers allow more than their pipeline keeps (`max_sequence_length` of its `__call__`).
    """
    limit = int(tokenizer.model_max_length)
    if "T5" in type(tokenizer).__name__:
        kept = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
        if kept is not None and isinstance(kept.default, int):
            limit = min(limit, kept.default)
    return limit if limit < _NO_LIMIT else None


def check_lengths(
    prompts: Sequence[str], pipeline: Any, where: Path | str = "prompts", first: int = 0
) -> None:
    """Refuse prompts that the pipeline's tokenizers would cut. `first` is the id of `prompts[0]`.

    Raises UserError naming the line, its tokens and the limit.
    """
    for name, tokenizer in pipeline.components.items():
        if not name.startswith("tokenizer") or tokenizer is None:
            continue
        limit = token_limit(pipeline, tokenizer)
        if limit is None:
            continue
        for place, prompt in enumerate(prompts, start=first):
            tokens = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
            if tokens > limit:
                raise UserError(
                    f"{where}: line {place + 1} has {tokens} tokens, {name} takes {limit}; shorten it"
                )
