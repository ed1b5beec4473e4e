"""Models without text: what they are asked for instead of prompts.

Their images are numbered, and nothing but its noise tells one from another. Noise depends on an image's id
and on the seed, so every set of images has ids of its own: what settings are chosen on (validation) starts
from other noise than what is published (test), and both from other noise than calibration, whatever the
seeds are.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from halftone.errors import UserError
from halftone.prompts import prompts_sha256
from halftone.settings import GUIDANCE, PromptSet

# a set holds at most 100,000 images (settings.Tier), so no two of them meet
_FIRST_ID = {
    PromptSet.CALIBRATION: 0,
    PromptSet.VALIDATION: 1_000_000,
    PromptSet.TEST: 2_000_000,
    PromptSet.UNSEEN: 3_000_000,
}


def first_id(images: PromptSet | None) -> int:
    """Id that the noise of a set's image 0 has. None: the images have prompts, whose places count from 0."""
    return 0 if images is None else _FIRST_ID[images]


def numbered(images: PromptSet, count: int) -> list[str]:
    """What stands for the prompts of a set's first `count` images, in captions and in hashes."""
    return [f"{images} image {k}" for k in range(count)]


@cache
def set_of(sha256: str | None, count: int) -> PromptSet | None:
    """The set whose first `count` images have this hash instead of one of prompts; None for prompts."""
    return next((one for one in PromptSet if prompts_sha256(numbered(one, count)) == sha256), None)


def takes_text(pipeline: Any) -> bool:
    """Whether a diffusers pipeline draws what a prompt says."""
    return "prompt" in _takes(pipeline)


def check_text(pipeline: Any, prompted: bool) -> None:
    """Raises UserError for prompts given to a model without text, and for none given to one with."""
    kind = type(pipeline).__name__
    if prompted and not takes_text(pipeline):
        raise UserError(
            f"{kind} takes no prompt: leave --prompts out (in params.yaml: unconditional: true under models)"
        )
    if not prompted and takes_text(pipeline):
        raise UserError(
            f"{kind} draws what a prompt says: give --prompts FILE (in params.yaml: no unconditional: true)"
        )


def check_call(pipeline: Any, resolution: int | None) -> None:
    """Raises UserError where the pipeline needs more than prompts, or takes no resolution and is to draw at
    another than its own."""
    takes = _takes(pipeline)
    kind, given = type(pipeline).__name__, {"self", "prompt"}
    needs = [
        name
        for name, parameter in takes.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and name not in given
    ]
    if needs:
        raise UserError(
            f"{kind} cannot be run without {', '.join(needs)}; this kind of model is not supported"
        )
    side = _own_side(pipeline)
    if resolution is not None and "height" not in takes and side not in (None, resolution):
        raise UserError(f"{kind} draws at {side}x{side} only, not at resolution {resolution}; leave it out")


def guidance_of(pipeline: Any, given: float | None, default: float | None = GUIDANCE) -> float | None:
    """The guidance scale: None for a model without text. Raises UserError where one was given to such."""
    if takes_text(pipeline):
        return default if given is None else given
    if given is not None:
        raise UserError(f"{type(pipeline).__name__} takes no prompt, so guidance means nothing: leave it out")
    return None


def _takes(pipeline: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(pipeline).__call__).parameters)


def _own_side(pipeline: Any) -> int | None:
    """Pixels along a side of what a pixel-space model draws; None where there are latents."""
    denoiser = getattr(pipeline, "unet", None)
    side = getattr(getattr(denoiser, "config", None), "sample_size", None)
    return side if isinstance(side, int) and not hasattr(pipeline, "vae") else None
