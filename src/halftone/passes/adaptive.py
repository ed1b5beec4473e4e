"""Uniform or log2 codes for one layer's attention probabilities, chosen from what calibration shows of them
(TCAQ-DM, DAQ): once for every call, or for a group of calls.

The paper weighs a power law against an alternative that it does not name, on values that it does not say how
many of. Here the law is `halftone.passes.power_law`'s, on a random part of what is quantized: without a start
token that stays apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halftone.axes import Axes
from halftone.passes.checkpoint import seed_of
from halftone.passes.power_law import likelihood_ratio
from halftone.policies import Selector
from halftone.probability_quantizer import ProbabilityQuantizer
from halftone.quantizers.affine import fake_quantize
from halftone.quantizers.log2 import fake_quantize_log2

DRAWN = 16_384
"""Values drawn of every tensor."""
MOST = 100_000
"""Values that laws are fitted to."""


class Chooser:
    """What has been seen of one layer's probabilities in the group at hand."""

    def __init__(self, axes: Axes, quantizer: ProbabilityQuantizer) -> None:
        self.axes, self.quantizer = axes, quantizer
        self._values: list[Tensor] = []
        self._errors = torch.zeros(2, dtype=torch.float64)
        self._place = (-1, 0)  # call, tensors of it seen: what a draw depends on

    def update(self, x: Tensor, value: Tensor | None, call: int) -> None:
        """x: probabilities (rows, queries, keys); value: the last of its keys' (rows, keys, width)."""
        if self.axes.adaptive_selector is Selector.LIKELIHOOD_RATIO:
            self._draw(x, call)
            return
        assert value is not None
        x, value = x.detach().float(), value[:, value.shape[1] - x.shape[2] :].float()
        even, octaves = self.quantizer.candidates(x, call)
        for place, tried in enumerate((fake_quantize(x, even), fake_quantize_log2(x, octaves))):
            self._errors[place] += torch.bmm(tried - x, value).double().square().sum().cpu()

    def _draw(self, x: Tensor, call: int) -> None:
        self._place = (call, self._place[1] + 1 if call == self._place[0] else 0)
        flat = x.detach().reshape(-1)
        if flat.numel() > DRAWN:
            text = f"{self.quantizer.site.name} {self._place}"
            generator = torch.Generator().manual_seed(seed_of("probabilities", 0, text))
            flat = flat[torch.randint(flat.numel(), (DRAWN,), generator=generator).to(flat.device)]
        self._values.append(flat.float().cpu())

    def log2(self) -> bool:
        """Whether log2 codes serve what was seen; of what favours neither, uniform ones."""
        if self.axes.adaptive_selector is Selector.OUTPUT_ERROR:
            return bool(self._errors[1] < self._errors[0])
        values = torch.cat(self._values)
        values = values[:: -(-values.numel() // MOST)]
        values = values[values > 0]
        smallest = None
        if self.axes.adaptive_xmin is not None and values.numel():
            smallest = float(values.quantile(self.axes.adaptive_xmin))
        return likelihood_ratio(values, smallest, self.axes.adaptive_alternative) > 0

    def state(self) -> dict[str, Tensor]:
        return {"values": torch.cat([torch.zeros(0), *self._values]), "errors": self._errors}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._values, self._errors = [state["values"]], state["errors"]
