"""Labels of grouped sites in an artefact: the group of every index of an axis of channels or positions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from halftone.errors import UserError
from halftone.plan import Granularity, GroupPlan, Plan, SitePlan, label_bits, label_bytes
from halftone.policies import GroupLayout
from halftone.quantizers.groups import NO_INDEX, Axis, Grouping
from halftone.quantizers.layout import layout_of
from halftone.quantizers.packing import pack, unpack


def check(site: SitePlan, plan: Plan, denoiser: nn.Module) -> None:
    """Raises UserError where what the plan says of a site's groups contradicts itself or the denoiser."""
    groups, name = site.groups, site.name[:200]
    if (groups is None) == (site.granularity is Granularity.GROUP):
        raise UserError(f"plan: {name} contradicts itself on groups")
    if groups is None:
        return
    places, calls = range(plan.partitions), groups.position_calls
    sound = list(calls) == sorted(set(calls)) and all(call in places for call in calls)
    sound &= groups.most <= plan.axes.groups and site.kind in ("input", "query", "key", "value")
    sound &= (groups.positions is not None) == bool(calls)
    sound &= (groups.channels is not None) == (len(calls) < len(places))
    sound &= groups.channels in (None, *_channels(site, plan, denoiser))
    if not sound:
        raise UserError(f"plan: {name} contradicts itself on groups")


def _channels(site: SitePlan, plan: Plan, denoiser: nn.Module) -> list[int]:
    """Numbers of channels that a site may have."""
    module = denoiser.get_submodule(site.module)
    if site.kind != "input":
        width = getattr(getattr(module, f"to_{site.kind[0]}", None), "weight", torch.zeros(0, 0)).shape[0]
        return [width // max(1, int(getattr(module, "heads", 1)))]
    layout = layout_of(module)
    channels = int(getattr(module, "in_channels", 0) or getattr(module, "in_features", 0))
    if layout is None:
        return []
    aligned = plan.axes.group_layout is GroupLayout.ALIGNED
    return [channels * (1 if aligned or layout.window is None else layout.window.taps)]


def packed_labels(site: SitePlan, plan: Plan) -> int:
    """Bytes of a site's labels."""
    return label_bytes(_of(site), plan.partitions)


def pack_labels(groups: Grouping | None, site: SitePlan, plan: Plan) -> Tensor:
    """Bytes of a site's labels. Raises UserError where they are not those that the plan speaks of."""
    planned = _of(site)
    bits = label_bits(planned.most)
    rows = [] if groups is None else [labels for _, labels in groups.rows()]
    lengths = [planned.length(at) for at in range(plan.partitions)]
    if [len(row) for row in rows] != lengths:
        raise UserError(f"{site.name}: its groups are not those of the plan; run halftone analyze again")
    return pack(torch.cat(rows), bits) if bits else torch.empty(0, dtype=torch.uint8)


def unpack_all(
    path: Path, sites: Iterable[SitePlan], plan: Plan, packed: Tensor | None
) -> dict[str, Grouping]:
    """Groups by site. Raises UserError for labels that no group has, and bits that should be unused."""
    found: dict[str, Grouping] = {}
    start = 0
    for site in sites:
        assert packed is not None
        planned, size = _of(site), packed_labels(site, plan)
        lengths = [planned.length(at) for at in range(plan.partitions)]
        bits = label_bits(planned.most)
        labels = torch.zeros(sum(lengths), dtype=torch.uint8)
        try:
            if bits:
                labels = unpack(packed[start : start + size], bits, (sum(lengths),))
        except ValueError as fault:
            raise UserError(f"{path}: groups of {site.name}: {fault}") from None
        start += size
        if int(labels.max()) + 1 != planned.most:
            raise UserError(f"{path}: groups of {site.name}: there are {planned.most}, labels differ")
        rows = [
            functional.pad(row, (0, max(lengths) - len(row)), value=NO_INDEX) for row in labels.split(lengths)
        ]
        axes = [
            Axis.POSITION if at in planned.position_calls else Axis.CHANNEL for at in range(plan.partitions)
        ]
        found[site.name] = Grouping(torch.tensor(axes, dtype=torch.uint8), torch.stack(rows))
    return found


def _of(site: SitePlan) -> GroupPlan:
    assert site.groups is not None
    return site.groups
