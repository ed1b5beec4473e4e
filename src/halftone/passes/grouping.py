"""Groups of an activation's channels or positions, found in the extremes of every index (DGQ).

For each layer and call (or once, where parameters are shared over the calls): the axis whose extremes differ
more, K-means on its points (min, max), and a range for each cluster. Observed with quantized weights; what
lies upstream is in float with `calibration_inputs: reference` (our choice: the published code quantizes it
layer by layer) and quantized with `progressive`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from halftone.axes import Axes
from halftone.denoiser import SiteKind
from halftone.errors import UserError
from halftone.policies import GroupAxis, GroupLayout
from halftone.quantizers.affine import AffineParams
from halftone.quantizers.groups import (
    NO_INDEX,
    Axis,
    Grouping,
    align,
    cluster,
    fit_groups,
    most_groups,
    spread,
)
from halftone.quantizers.layout import Ends, Layout
from halftone.quantizers.ranges import Estimator
from halftone.site_quantizer import SiteQuantizer

_PARTS = [(f"{axis.name.lower()}_{end}", axis, k) for axis in Axis for k, end in enumerate(("lo", "hi"))]


class IndexExtremes:
    """Estimator of a grouped site: the extremes of every channel and position, running minimum and maximum.

    Averages over batches are no use here: they lose outliers (DGQ). A vector per sample has no positions;
    it is handed to `whole`, whose range is that of the tensor.
    """

    def __init__(self, layout: Layout, whole: Estimator) -> None:
        self.layout, self.whole = layout, whole
        self.ends: dict[Axis, Ends] = {}

    @property
    def grouped(self) -> bool:
        """Whether the site's tensors have axes to group."""
        return bool(self.ends)

    def update(self, x: Tensor) -> None:
        """Raises ValueError for NaN or infinite values, and for another number of positions than before."""
        if x.ndim < 3:
            self.whole.update(x)
            return
        if x.numel() == 0:
            raise ValueError("range: the tensor has no elements")
        found = self.layout.extremes(x.detach())
        if not all(bool(torch.isfinite(bound).all()) for pair in found.values() for bound in pair):
            raise ValueError("range: the tensor holds NaN or infinite values")
        self.ends = merged(self.ends, found) if self.ends else found

    def range(self) -> Ends:
        return self.whole.range()

    def state(self) -> dict[str, Tensor]:
        if not self.ends:
            return {f"whole_{name}": value for name, value in self.whole.state().items()}
        return {name: self.ends[axis][k] for name, axis, k in _PARTS}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if _PARTS[0][0] in state:
            self.ends = ends_of(state)
            return
        whole = {name.removeprefix("whole_"): value for name, value in state.items()}
        if whole:
            self.whole.load_state(whole)


def ends_of(state: Mapping[str, Tensor]) -> dict[Axis, Ends]:
    """What `IndexExtremes.state` kept."""
    return {axis: (state[f"{axis.name.lower()}_lo"], state[f"{axis.name.lower()}_hi"]) for axis in Axis}


def merged(before: Mapping[Axis, Ends], new: Mapping[Axis, Ends]) -> dict[Axis, Ends]:
    for axis in Axis:
        if before[axis][0].shape != new[axis][0].shape:
            raise ValueError(
                f"groups: {new[axis][0].numel()} {axis.name.lower()}s, but {before[axis][0].numel()} before"
            )
    return {
        axis: (torch.minimum(before[axis][0], new[axis][0]), torch.maximum(before[axis][1], new[axis][1]))
        for axis in Axis
    }


class Fitted(NamedTuple):
    """Groups of one site at one call. params: (groups,); axis: uint8 (); labels: uint8 (longest,)."""

    params: AffineParams
    axis: Tensor
    labels: Tensor


def is_grouped(quantizer: SiteQuantizer, axes: Axes) -> bool:
    """Whether a recipe groups a site: layer inputs, q, k and v; never softmax outputs.

    Raises UserError for a convolution whose input cannot be unfolded.
    """
    if axes.groups == 1 or quantizer.site.kind is SiteKind.PROBABILITIES:
        return False
    if quantizer.layout is None:
        raise UserError(
            f"{quantizer.site.name}: groups need a convolution padded with zeros; write groups: 1"
        )
    return True


def estimator(quantizer: SiteQuantizer, axes: Axes, whole: Estimator) -> IndexExtremes:
    """Of a grouped site. Aligned groups take all taps of a channel alike: a group of taps is no group of
    channels, and would have to be unfolded, which integer convolutions do not do."""
    assert quantizer.layout is not None
    aligned = axes.group_layout is GroupLayout.ALIGNED
    return IndexExtremes(quantizer.layout.direct() if aligned else quantizer.layout, whole)


def partition(quantizer: SiteQuantizer, axes: Axes, calls: Sequence[Mapping[Axis, Ends]]) -> Grouping:
    """One row: the axis to group and the group of each of its indices. calls: extremes of every index at the
    calls that the partition is for, on one device."""
    assert quantizer.layout is not None
    aligned = axes.group_layout is GroupLayout.ALIGNED
    ends = dict(calls[0])
    for more in calls[1:]:
        ends = merged(ends, more)
    axis = _axis(axes.group_axis, quantizer.layout, ends, channels_only=aligned)
    lo, hi = ends[axis]
    if aligned:
        all_lo, all_hi = (torch.stack([each[axis][k] for each in calls]) for k in (0, 1))
        found = align(all_lo, all_hi, axes.groups)
    else:
        found = cluster(lo, hi, most_groups(axes.groups, len(lo)))
    longest = max(len(pair[0]) for pair in ends.values())
    labels = functional.pad(found.to(torch.uint8), (0, longest - len(found)), value=NO_INDEX)
    return Grouping(torch.tensor([axis], dtype=torch.uint8), labels[None].cpu())


def fit_site(
    quantizer: SiteQuantizer, axes: Axes, groups: Grouping, ends: Mapping[Axis, Ends], call: int
) -> Fitted:
    """Parameters of every group at a call, from the extremes seen there. groups: one row."""
    axis, labels = groups.row(0)
    lo, hi = (bound.cpu() for bound in ends[axis])
    zero = axes.group_layout is GroupLayout.ALIGNED
    params = fit_groups(lo, hi, labels, axes.groups, quantizer.width(call), include_zero=zero)
    return Fitted(params, groups.axis[0], groups.labels[0])


def _axis(wanted: GroupAxis, layout: Layout, ends: Mapping[Axis, Ends], channels_only: bool) -> Axis:
    if wanted is GroupAxis.CHANNEL or (channels_only and layout.window is not None):
        return Axis.CHANNEL
    if wanted is GroupAxis.POSITION:
        return Axis.POSITION
    other = Axis.POSITION if layout.last is Axis.CHANNEL else Axis.CHANNEL
    return layout.last if spread(*ends[layout.last]) > spread(*ends[other]) else other
