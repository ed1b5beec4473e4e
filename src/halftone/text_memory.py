"""Text keys and values of cross-attention, computed once per prompt instead of once per call.

The text states are the same at every call of a run, so their keys and values are too, as long as the
projection encodes them with the same parameters: where these are shared over the calls or taken from the
tensor, and where those of every call are equal, as ranges are of something that no call changes. Where they
differ, so do the codes, and the projection runs again: what is reused is exact, or it is not reused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Kept(NamedTuple):
    made_by: tuple[Any, ...]
    text: Tensor
    output: Tensor


class TextMemory:
    """The last output of each projection in one sampling run, with the text and parameters it was made of."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def project(self, name: str, layer: nn.Module, text: Tensor) -> Tensor:
        """`layer(text)`, made anew unless text and parameters are, value by value, those of the last time.

        Always made anew with gradients on, and outside a run of the layer's call context.
        """
        made_by = _parameters(layer)
        if made_by is None or torch.is_grad_enabled():
            return layer(text)
        kept = self._kept.get(name)
        if kept is None or kept.made_by != made_by or not _same(kept.text, text):
            kept = self._kept[name] = _Kept(made_by, text.clone(), layer(text))
        return kept.output


def _parameters(layer: Any) -> tuple[Any, ...] | None:
    """The run, and what a quantized layer's output depends on beside its input; None if that may change."""
    quantizer = getattr(layer, "input", None)
    context = getattr(quantizer, "context", None)
    if quantizer is None or context is None or context.run_number is None or quantizer.mode != "quantize":
        return None
    if getattr(layer, "soft_weight", None) is not None or getattr(quantizer, "soft_params", None) is not None:
        return None
    if quantizer.dynamic:
        return context.run_number, quantizer.bits
    params = quantizer.params()
    axis, labels = (None, None) if quantizer.groups is None else quantizer.groups.row(context.slot)
    groups = None if labels is None else (axis, labels.tolist())
    return context.run_number, params.bits, params.scale.tolist(), params.zero_point.tolist(), groups


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
