"""The quantizer of one activation site: simulated execution, with parameters per call, shared or dynamic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from halftone.calls import CallContext
from halftone.denoiser import Site, SiteKind
from halftone.errors import UserError
from halftone.quantizers.affine import AffineParams, fake_quantize, fit_affine, fit_non_negative
from halftone.quantizers.granularity import Granularity, PerChannel, reduce_minmax
from halftone.quantizers.groups import Axis, Grouping
from halftone.quantizers.layout import Layout
from halftone.quantizers.ranges import PER_TENSOR
from halftone.relaxing import Relaxation


class Mode(StrEnum):
    """What a site quantizer does with a tensor: nothing, show it to its observer, quantize it, or both."""

    OFF = "off"
    OBSERVE = "observe"
    QUANTIZE = "quantize"
    OBSERVE_QUANTIZED = "observe and quantize"


class Observer(Protocol):
    """Anything that sees a site's tensors, such as the estimators of `halftone.quantizers.ranges`."""

    def update(self, x: Tensor) -> None: ...


class Parameters(NamedTuple):
    """Of one activation site: scale and zero point as its quantizer holds them, and its groups, if any."""

    scale: Tensor
    zero_point: Tensor
    groups: Grouping | None = None


class SiteQuantizer(nn.Module):
    """The quantizer of one activation site, with parameters per call or shared over the calls.

    `widths`: bits of every slot; all are `bits` unless calls are relaxed. `scale` and `zero_point` are
    float32 of shape (n_calls, ...) or (1, ...): entry `context.slot` (or 0) broadcasts against the tensor.
    They are NaN until set, and stay float32 when the model is cast. A `dynamic` quantizer has none: it takes
    those of every row (index of the first axis: a sample, or a head of one) from the row itself, so a row
    depends on no other. Where `groups` are set, scale and zero point are (n_calls, groups), one for each
    group of indices of one axis of the tensor, which `layout` finds. `soft_params`, when set, is called at
    every forward for the parameters to use instead, with gradients (step-size learning). `divisor`, when set,
    divides the tensor first, whatever the mode: a factor per channel that the weight has been multiplied by
    (reparameterization).
    """

    scale: Tensor
    zero_point: Tensor
    divisor: Tensor | None

    def __init__(
        self,
        site: Site,
        bits: int,
        n_calls: int,
        context: CallContext,
        granularity: Granularity = PER_TENSOR,
        dynamic: bool = False,
        relaxation: Relaxation | None = None,
        layout: Layout | None = None,
    ) -> None:
        super().__init__()
        self.site, self.bits, self.context = site, bits, context
        self.widths = [bits] * n_calls if relaxation is None else relaxation.widths(bits, n_calls)
        self.granularity, self.dynamic = granularity, dynamic
        self.non_negative = site.kind is SiteKind.PROBABILITIES
        self.layout = layout
        self.groups: Grouping | None = None
        self.mode = Mode.OFF
        self.observer: Observer | None = None
        self.soft_params: Callable[[], AffineParams] | None = None
        self.register_buffer("scale", torch.full((n_calls,), torch.nan))
        self.register_buffer("zero_point", torch.full((n_calls,), torch.nan))
        self.register_buffer("divisor", None)
        self._fast: list[tuple[Tensor, float, float] | None] = []
        self._by_index: dict[int, AffineParams] = {}

    @property
    def n_calls(self) -> int:
        """Number of parameter slots; 1 where they are shared."""
        return self.scale.shape[0]

    def set_parameters(self, scale: Tensor, zero_point: Tensor, groups: Grouping | None = None) -> None:
        """Parameters of every call at once, (n_calls, ...) or (1, ...); with groups (n_calls, groups)."""
        if scale.shape != zero_point.shape or scale.shape[0] not in (1, self.n_calls):
            raise ValueError(
                f"{self.site.name}: scale {tuple(scale.shape)} and zero point {tuple(zero_point.shape)} "
                f"do not fit {self.n_calls} calls"
            )
        if groups is not None:
            self._check_groups(groups, scale)
            groups = Grouping(*(part.clone() for part in groups))
        device = self.scale.device
        # copies: `set_call` writes into them
        self.scale = scale.detach().to(device, torch.float32, copy=True)
        self.zero_point = zero_point.detach().to(device, torch.float32, copy=True)
        self.groups = groups
        self._forget()

    def divided(self, x: Tensor) -> Tensor:
        """The tensor as it is quantized: divided by its factors, where it has any; of its own dtype."""
        return x if self.divisor is None else (x / self.divisor).to(x.dtype)

    def set_call(self, call: int, params: AffineParams, groups: Grouping | None = None) -> None:
        """Parameters of one call (of all, where they are shared). groups: one row, for a site that has groups
        at every call; where one partition serves all calls it stays."""
        slot = call if self.n_calls > 1 else 0
        if self.scale[slot].shape != params.scale.shape:
            if params.scale.shape != params.zero_point.shape:
                raise ValueError(f"{self.site.name}: scale and zero point differ in shape")
            room = self.scale.new_full((self.n_calls, *params.scale.shape), torch.nan)
            self.scale, self.zero_point = room, room.clone()
        self.scale[slot] = params.scale.to(self.scale.device)
        self.zero_point[slot] = params.zero_point.to(self.scale.device)
        if groups is not None:
            assert self.groups is not None
            if len(self.groups.axis) > 1:
                self.groups.axis[slot], self.groups.labels[slot] = groups.axis[0], groups.labels[0]
        self._forget()

    def params(self, slot: int | None = None) -> AffineParams:
        """Parameters in use, or those of a slot."""
        slot = self.context.slot if slot is None else slot
        slot = slot if self.n_calls > 1 else 0
        return AffineParams(self.scale[slot], self.zero_point[slot], self.widths[slot])

    def width(self, call: int) -> int:
        """Bits at a call."""
        return self.widths[call if self.n_calls > 1 else 0]

    def forward(self, x: Tensor) -> Tensor:
        """x, of its own shape and dtype. Raises RuntimeError when quantizing without parameters."""
        x = self.divided(x)
        if not self.observe(x):
            return x
        return self.quantized(x)

    def quantized(self, x: Tensor) -> Tensor:
        """Values of the codes of `x`, in its dtype, whatever the mode."""
        if self.soft_params is not None:
            return fake_quantize(x, self.soft_params())
        if self.dynamic:
            return fake_quantize(x, self.params_of(x))
        if not self._fast:
            self._prepare()
        if self.groups is not None:
            assert self.layout is not None
            params = self.index_params(self.layout.positions(x))
            return fake_quantize(self.layout.rows(x), params).reshape(x.shape)
        fast = self._fast[self.context.slot if len(self._fast) > 1 else 0]
        if fast is None or (x.requires_grad and torch.is_grad_enabled()):
            return fake_quantize(x, self.params())
        # `fake_quantize` for one parameter: the same values, without reading the zero point back from the
        # device
        scale, low, high = fast
        values = x.detach().float().div(scale).round_().clamp_(low, high).mul_(scale)
        return values.to(x.dtype)

    def fitted(self, lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a range at a width, as they are stored."""
        params = fit_non_negative(hi, bits) if self.non_negative else fit_affine(lo, hi, bits)
        return params.scale, params.zero_point

    @property
    def learnable(self) -> bool:
        """Whether the site has stored scales of even steps, which step-size learning can move."""
        return not self.dynamic

    def observe(self, x: Tensor) -> bool:
        """Show a tensor to the observer, as the mode has it; whether the tensor is then to be quantized."""
        if self.mode is Mode.OFF:
            return False
        if self.mode is not Mode.QUANTIZE:
            if self.observer is None:
                raise RuntimeError(f"{self.site.name}: asked to observe, but no observer was set")
            self.observer.update(x)
        return self.mode is not Mode.OBSERVE

    @property
    def unfolds(self) -> bool:
        """Whether the layer must unfold its input at the present call, and quantize it then."""
        if self.groups is None or self.layout is None:
            return False
        axis, labels = self.groups.row(self.context.slot)
        return self.layout.unfolded(axis, len(labels))

    def index_params(self, positions: int) -> AffineParams:
        """Of every index of the grouped axis at the present call, in a shape that broadcasts against rows.

        Raises UserError where groups of positions were fitted to another number of them.
        """
        assert self.groups is not None
        assert self.layout is not None
        slot = self.context.slot if self.n_calls > 1 else 0
        if slot not in self._by_index:
            if not self._fast:
                self._prepare()
            axis, labels = self.groups.row(slot)
            params = self.params(slot)
            scale, zero_point = (
                self.layout.along(axis, each[labels]) for each in (params.scale, params.zero_point)
            )
            self._by_index[slot] = AffineParams(scale, zero_point, params.bits)
        found = self._by_index[slot]
        axis, count = (
            Axis(int(self.groups.axis[slot if len(self.groups.axis) > 1 else 0])),
            found.scale.numel(),
        )
        if axis is Axis.POSITION and count != positions:
            raise UserError(
                f"{self.site.name}: its {count} positions are grouped, and here are {positions}; "
                "use the resolution and text length of the calibration, or calibrate for these"
            )
        return found

    def params_of(self, x: Tensor) -> AffineParams:
        """Parameters of a dynamic quantizer for this tensor, one per row.

        Raises UserError where the tensor holds NaN or infinite values.
        """
        try:
            lo, hi = reduce_minmax(x, PerChannel(0))
        except ValueError as fault:
            raise UserError(f"{self.site.name}: {fault}; run the model in float32") from None
        if self.non_negative:
            return fit_non_negative(hi, self.bits)
        return fit_affine(lo, hi, self.bits)

    def _prepare(self) -> None:
        if self.scale.isnan().any() or self.zero_point.isnan().any():
            raise RuntimeError(
                f"{self.site.name}: asked to quantize, but parameters are not set for every call"
            )
        if self.scale.ndim > 1:
            self._fast = [None] * self.n_calls
            return
        slots = (self.params(slot) for slot in range(self.n_calls))
        offsets = self.zero_point.tolist()
        self._fast = [(p.scale, p.low - z, p.high - z) for p, z in zip(slots, offsets, strict=True)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SiteQuantizer:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None:
                self._buffers[name] = buffer.to(moved.device)
        self._forget()
        return self

    def _forget(self) -> None:
        self._fast, self._by_index = [], {}

    def _check_groups(self, groups: Grouping, scale: Tensor) -> None:
        rows = len(groups.axis)
        sound = self.layout is not None and scale.ndim == 2 and rows == len(groups.labels)
        if not sound or rows not in (1, self.n_calls):
            raise ValueError(
                f"{self.site.name}: groups of {rows} calls do not fit scales {tuple(scale.shape)}"
            )


def set_mode(quantizers: Mapping[str, SiteQuantizer] | Iterable[SiteQuantizer], mode: Mode) -> None:
    """Put all of them into one mode."""
    for quantizer in quantizers.values() if isinstance(quantizers, Mapping) else quantizers:
        quantizer.mode = mode


def set_divisors(quantizers: Mapping[str, SiteQuantizer], divisors: Mapping[str, Tensor]) -> None:
    """Factors (channels,) by module that the quantizers of these layers' inputs divide by.

    Raises KeyError for a layer whose input is not quantized.
    """
    for module, factors in divisors.items():
        quantizer = quantizers[f"{module}.{SiteKind.INPUT}"]
        along = (-1, 1, 1) if quantizer.site.module_type == "Conv2d" else (-1,)
        quantizer.divisor = factors.to(quantizer.scale.device, torch.float32).reshape(along)
