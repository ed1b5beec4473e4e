"""Does a text start with a token that carries no prompt, so that cross-attention may keep it apart?

CLIP's tokenizers put one first, of every prompt and of the empty one; T5's put none. Where a denoiser reads
several texts side by side (SDXL), all of them must.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from halftone.axes import Axes
from halftone.policies import StartToken


def tokenizers_of(pipeline: Any) -> list[Any]:
    """Those of a diffusers pipeline; none where it takes no text."""
    named = pipeline.components.items()
    return [part for name, part in named if name.startswith("tokenizer") and part is not None]


def has_start_token(tokenizers: Iterable[Any]) -> bool:
    """Whether there are tokenizers, and each puts its start token first."""
    found = [_puts_first(tokenizer) for tokenizer in tokenizers]
    return bool(found) and all(found)


def kept_apart(axes: Axes, tokenizers: Callable[[], Iterable[Any]]) -> bool:
    """Whether the axes keep a start token apart and there is one. The tokenizers are asked for only then."""
    return axes.start_token is StartToken.APART and has_start_token(tokenizers())


def _puts_first(tokenizer: Any) -> bool:
    start = getattr(tokenizer, "bos_token_id", None)
    return start is not None and list(tokenizer("a").input_ids)[:1] == [start]
