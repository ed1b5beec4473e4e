"""Models without text: what they are asked for instead of prompts.

Their images are numbered, and nothing but its noise, and the class that a class-conditional model is told,
tells one from another. Noise depends on an image's id and on the seed, its class on its id, so every set of
images has ids of its own: what settings are chosen on (validation) starts from other noise than what is
published (test), and both from other noise than calibration, whatever the seeds are.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from halftone.errors import UserError
from halftone.prompts import prompts_sha256
from halftone.settings import CLASS_GUIDANCE, GUIDANCE, PromptSet

LABELS = "class_labels"
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


def takes_classes(pipeline: Any) -> bool:
    """Whether a diffusers pipeline draws the class that a label says."""
    label = _takes(pipeline).get(LABELS)
    return label is not None and label.default is label.empty


def classes_of(denoiser: Mapping[str, Any], ids: Sequence[int]) -> list[int]:
    """The labels of images: drawn by their ids, each class as likely as another. denoiser: its configuration.
    Raises UserError where that does not say how many there are."""
    count = denoiser.get("num_embeds_ada_norm") or denoiser.get("num_class_embeds")
    if not isinstance(count, int):
        raise UserError(f"{denoiser.get('_class_name')}: does not say how many classes it knows")
    drawn = (hashlib.sha256(f"halftone class {k}".encode()).digest() for k in ids)
    return [int.from_bytes(one[:8], "little") % count for one in drawn]


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


def check_kind(kind: type, denoiser: Mapping[str, Any]) -> None:
    """Raises UserError where a pipeline of this class, with a denoiser of this configuration, needs more than
    prompts, classes or a number of images."""
    takes, given = _parameters(kind), {"self", "prompt", LABELS}
    needs = [
        name
        for name, parameter in takes.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and name not in given
    ]
    if denoiser.get("num_class_embeds") and not takes.keys() & {LABELS, "prompt"}:
        needs = [f"{LABELS}, which its denoiser needs and it does not hand on"]
    if needs:
        raise UserError(
            f"{kind.__name__} cannot be run without {', '.join(needs)}; this kind of model is not supported"
        )


def check_call(pipeline: Any, denoiser: Mapping[str, Any], resolution: int | None) -> None:
    """Raises UserError as `check_kind`, and where the pipeline takes no resolution and is to draw at another
    than its own."""
    check_kind(type(pipeline), denoiser)
    side = _own_side(pipeline, denoiser)
    if resolution is not None and "height" not in _takes(pipeline) and side not in (None, resolution):
        kind = type(pipeline).__name__
        raise UserError(f"{kind} draws at {side}x{side} only, not at resolution {resolution}; leave it out")


def usual_guidance(pipeline: Any) -> float | None:
    """The guidance scale where none is asked for; None of a model without text and classes."""
    if takes_text(pipeline):
        return GUIDANCE
    return CLASS_GUIDANCE if takes_classes(pipeline) else None


def guidance_of(pipeline: Any, given: float | None, default: float | None) -> float | None:
    """The guidance scale: None for a model without text and classes. Raises UserError where one was given to
    such."""
    if usual_guidance(pipeline) is not None:
        return default if given is None else given
    if given is not None:
        raise UserError(
            f"{type(pipeline).__name__} takes neither prompt nor class, so guidance means nothing: leave it "
            "out (in params.yaml: unconditional: true under models)"
        )
    return None


def _takes(pipeline: Any) -> dict[str, inspect.Parameter]:
    return _parameters(type(pipeline))


def _parameters(kind: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(kind.__call__).parameters)


def _own_side(pipeline: Any, denoiser: Mapping[str, Any]) -> int | None:
    """Pixels along a side of what a model without a choice of sizes draws; None where that is not known."""
    side = denoiser.get("sample_size")
    decoder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    if isinstance(side, int) and decoder is not None:
        side *= 2 ** (len(decoder.config.block_out_channels) - 1)
    return side if isinstance(side, int) else None
