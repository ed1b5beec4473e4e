"""The temporal block: the layers of a U-Net that depend on the timestep alone (TFMQ-DM).

The time embedding and the projections of it in every residual block. Their inputs are a finite set, one per
call of the schedule, so they are reconstructed on all of it, apart from the blocks they feed: an error of the
time embedding makes a call resemble another call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from halftone.denoiser import modules_in_order
from halftone.errors import UserError
from halftone.passes.unit_data import UnitData
from halftone.passes.unit_trace import Signature
from halftone.trajectory import Trajectory

NAME = "temporal block"


class TemporalBlock(nn.Module):
    """Sinusoids of the timestep (n, channels) -> the projected embedding of every residual block.

    Holds the denoiser's own modules. Raises UserError for a denoiser that has no such block.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        kind = type(denoiser).__name__
        embedding = getattr(denoiser, "time_embedding", None)
        self.names = ["time_embedding.linear_1", "time_embedding.linear_2"]
        blocks: list[Any] = []
        for name, module in modules_in_order(denoiser):
            if getattr(module, "time_emb_proj", None) is not None:
                blocks.append(module)
                self.names.append(f"{name}.time_emb_proj")
        if embedding is None or not blocks or getattr(denoiser, "add_embedding", None) is not None:
            raise UserError(
                f"temporal_block apart: the layers of this {kind} do not depend on the timestep alone; "
                "choose temporal_block joint"
            )
        self.embedding = embedding
        self.activations = nn.ModuleList(block.nonlinearity for block in blocks)
        self.projections = nn.ModuleList(block.time_emb_proj for block in blocks)

    def forward(self, sinusoids: Tensor) -> tuple[Tensor, ...]:
        embedded = self.embedding(sinusoids)
        pairs = zip(self.activations, self.projections, strict=True)
        return tuple(projection(activation(embedded)) for activation, projection in pairs)

    def weight_names(self, layers: Iterable[str]) -> dict[str, str]:
        """Name of a layer's weight in this module -> name of the layer in the denoiser."""
        heads = [f"embedding.{name.removeprefix('time_embedding.')}" for name in self.names[:2]]
        heads += [f"projections.{place}" for place in range(len(self.projections))]
        inside = dict(zip(self.names, heads, strict=True))
        found = {}
        for layer in layers:
            wrapped = hasattr(self.get_submodule(inside[layer]), "layer")
            found[f"{inside[layer]}.{'layer.' if wrapped else ''}weight"] = layer
        return found

    @torch.no_grad()
    def data(self, denoiser: nn.Module, trajectory: Trajectory) -> UnitData:
        """One row per call: what the block is given, and what it should return."""
        first = next(denoiser.parameters())
        times: Any = denoiser.time_proj
        sinusoids = times(trajectory.timesteps.to(first.device)).to(first.dtype)
        rows = [sinusoids, *self(sinusoids)]
        count = len(sinusoids)
        signature = self.signature(sinusoids)
        return UnitData(signature, count, count, [rows], False, first.device, first.dtype)

    def signature(self, sinusoids: Tensor) -> Signature:
        macs = sum(p.numel() for p in self.parameters() if p.ndim > 1)
        return Signature(NAME, ((sinusoids[:1],), {}), (True,), 4 * macs, macs)
