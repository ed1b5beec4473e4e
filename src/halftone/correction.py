"""A correction of the denoiser's output: one number for each call and channel, taken off in float."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from halftone.calls import CallContext


def channels_of(denoiser: nn.Module) -> int:
    """Channels of the denoiser's output."""
    config: Any = denoiser.config
    return int(config.get("out_channels") or config["in_channels"])


def correct(denoiser: nn.Module, table: Tensor, context: CallContext) -> None:
    """Have `denoiser` return less by `table` at the context's slot, (calls, output channels), its outputs
    being (rows, output channels, height, width)."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return taken_off(output[0], table[context.slot]), *output[1:]
        return dataclasses.replace(output, sample=taken_off(output.sample, table[context.slot]))

    denoiser.register_forward_hook(hook)


def taken_off(output: Tensor, shift: Tensor) -> Tensor:
    """(rows, channels, height, width) less one number for each channel."""
    return output - shift.to(output).reshape(1, -1, 1, 1)
