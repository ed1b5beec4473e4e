"""Halftone: post-training quantization of diffusion models, to integers that run.

`halftone.load(artefact)` returns an ordinary diffusers pipeline; `halftone.quantize(pipe, recipe, prompts)`
makes an artefact from one. Both import torch only when called.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "quantize"]


def load(artefact: Any, **options: Any) -> Any:
    """See `halftone.artefact.load`."""
    from halftone.artefact import load as _load

    return _load(artefact, **options)


def quantize(*args: Any, **options: Any) -> Any:
    """See `halftone.chain.quantize`."""
    from halftone.chain import quantize as _quantize

    return _quantize(*args, **options)
