"""Attention probabilities whose codes are octaves, or whose scale comes from the tensor (DGQ).

Rows of probabilities are never brought back to a sum of 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from halftone.axes import Axes
from halftone.calls import CallContext
from halftone.denoiser import Site
from halftone.errors import UserError
from halftone.policies import Probabilities, ProbabilitiesScale, Scope
from halftone.quantizers.affine import AffineParams, fake_quantize, fit_non_negative, quantize
from halftone.quantizers.log2 import Log2Params, fake_quantize_log2, fit_log2, quantize_log2
from halftone.relaxing import Relaxation
from halftone.site_quantizer import SiteQuantizer

ProbabilityParams = AffineParams | Log2Params


@dataclass(frozen=True)
class Form:
    """How probabilities are quantized. scope: what shares a dynamic scale, None where scales are stored."""

    codes: Probabilities = Probabilities.UNIFORM
    scope: Scope | None = None

    @classmethod
    def of(cls, axes: Axes) -> Form:
        dynamic = axes.probabilities_scale is ProbabilitiesScale.DYNAMIC
        return cls(axes.probabilities, axes.probabilities_scope if dynamic else None)


PLAIN = Form()
"""Even steps of a stored scale: what `SiteQuantizer` does by itself."""


class ProbabilityQuantizer(SiteQuantizer):
    """Quantizer of probabilities (samples * heads, queries, keys), of the rows of one head after another's.

    A stored log2 scale is the largest value seen (TCAQ-DM's summaries: assumed; DGQ's code searches quantiles
    of its first batch instead); its zero points are 0 and mean nothing.
    """

    def __init__(
        self,
        site: Site,
        bits: int,
        n_calls: int,
        context: CallContext,
        form: Form,
        heads: int,
        relaxation: Relaxation | None = None,
    ) -> None:
        dynamic = form.scope is not None
        super().__init__(site, bits, n_calls, context, dynamic=dynamic, relaxation=relaxation)
        self.form, self.heads = form, heads
        self.chosen: list[bool] | None = None
        """Whether codes are octaves, by call; None where no choice was made."""

    @property
    def log2(self) -> bool:
        """Whether the present call's codes are octaves. Raises RuntimeError where that is not yet chosen."""
        if self.form.codes is not Probabilities.ADAPTIVE:
            return self.form.codes is Probabilities.LOG2
        if self.chosen is None:
            raise RuntimeError(f"{self.site.name}: asked to quantize, but its codes are not chosen")
        return self.chosen[self.context.slot]

    def choose(self, log2: Tensor) -> None:
        """Octaves or even steps at every call, bool (calls,). Raises ValueError for another number of
        calls."""
        if len(log2) != len(self.widths):
            raise ValueError(f"{self.site.name}: {len(log2)} choices for {len(self.widths)} calls")
        self.chosen = log2.bool().tolist()

    def candidates(self, x: Tensor, call: int) -> tuple[AffineParams, Log2Params]:
        """Both kinds for this tensor at a call, with the largest value at hand for a scale: of what a dynamic
        one is of, else of the tensor (our choice: a stored scale is not known before all is seen)."""
        largest, bits = self._largest(x, self.form.scope or Scope.TENSOR), self.width(call)
        return fit_non_negative(largest, bits), fit_log2(largest, bits)

    @property
    def learnable(self) -> bool:
        return not self.dynamic and self.form.codes is not Probabilities.LOG2

    def quantized(self, x: Tensor) -> Tensor:
        params = self.at_hand(x)
        return fake_quantize_log2(x, params) if isinstance(params, Log2Params) else fake_quantize(x, params)

    def codes(self, x: Tensor) -> Tensor:
        """Codes of `x`, int32."""
        params = self.at_hand(x)
        return quantize_log2(x, params) if isinstance(params, Log2Params) else quantize(x, params)

    def at_hand(self, x: Tensor) -> ProbabilityParams:
        """What quantizes this tensor at the present call: of the tensor, stored otherwise.

        Raises UserError where a dynamic one meets NaN or infinity, RuntimeError where nothing is stored.
        """
        bits = self.width(self.context.slot)
        if self.form.scope is not None:
            try:
                largest = self._largest(x, self.form.scope)
                return fit_log2(largest, bits) if self.log2 else fit_non_negative(largest, bits)
            except ValueError as fault:
                raise UserError(f"{self.site.name}: {fault}; run the model in float32") from None
        params = self.params()
        if params.scale.isnan().any():
            raise RuntimeError(f"{self.site.name}: asked to quantize, but parameters are not set")
        return Log2Params(params.scale, bits) if self.log2 else params

    def _largest(self, x: Tensor, scope: Scope) -> Tensor:
        """Largest values, (1, 1, 1) or (samples * heads, 1, 1)."""
        rows = x.detach().amax(-1).amax(-1)
        if scope is Scope.TENSOR:
            return rows.amax().reshape(1, 1, 1)
        if scope is Scope.SAMPLE:
            rows = rows.view(-1, self.heads).amax(1).repeat_interleave(self.heads)
        return rows.reshape(-1, 1, 1)

    def fitted(self, lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """As of every quantizer; before a choice is made, those of even steps."""
        if self.form.codes is not Probabilities.LOG2:
            return super().fitted(lo, hi, bits)
        scale = fit_log2(hi, bits).scale
        return scale, scale.new_zeros(scale.shape)
