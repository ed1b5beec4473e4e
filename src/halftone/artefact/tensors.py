"""quantized.safetensors: what the denoiser of an artefact is made of, at the size it is worth.

| key | dtype | shape |
| --- | --- | --- |
| codes/MODULE | uint8 | packed bytes (`halftone.quantizers.packing`), row-major |
| weight/scale | float32 | (output channels of all quantized weights,) |
| weight/zero_point | uint8, else int16 or int32 | (output channels of all quantized weights,) |
| activation/scale | float32 | (parameters of all activation sites,) |
| activation/zero_point | uint8, else int16 or int32 | (parameters of all activation sites,) |
| activation/divisor | float16 | (channels of all inputs divided in the quantize step,) |
| probabilities/log2 | uint8 | packed bits: calls of all attention probabilities that take either codes |
| activation/groups | uint8 | packed labels of all grouped sites; only where there are any |
| float/NAME | float16, else bfloat16, else float32 | as the parameter or buffer NAME of the denoiser |
| timesteps, noise_levels | float64 | (calls,) |
| correction | float32 | (calls, output channels), taken off the output; only where the plan says so |

Scales and zero points of all sites lie in one table each, in the order of the plan: a key costs a hundred
bytes. An activation site takes one entry per call, one where its parameters are shared over the calls (one
per call all the same where calls are relaxed), and none where they are dynamic. A split site takes two where
another takes one: for each output channel, or each call, that of the first half and that of the second.
`activation/divisor` is there where the plan names inputs that are divided in the quantize step; the factors
of other reparameterized layers are folded into weights and float tensors. A grouped site takes one entry for
each of its groups at each call, and labels: for each call (or once, where one partition serves all) the group
of every index of the axis that the plan names, packed at 2 to 5 bits. A float tensor takes the smallest
type that holds each of its values exactly. Which keys there are and how long they are follows from the plan
and the denoiser's configuration; reading refuses any other set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from halftone.artefact import groups, strict
from halftone.correction import channels_of
from halftone.denoiser import SiteKind, width_at
from halftone.errors import UserError
from halftone.layers import WeightCodes
from halftone.plan import Division, Plan, Quantizer, SitePlan
from halftone.policies import Correction
from halftone.quantizers import halves
from halftone.quantizers.bits import Bits
from halftone.quantizers.packing import pack, packed_size, unpack
from halftone.site_quantizer import Parameters

FILE = "quantized.safetensors"
DIVISOR = "activation/divisor"
CHOICES = "probabilities/log2"
GROUPS = "activation/groups"
CORRECTION = "correction"
_WHOLE = (torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True)
class Contents:
    """What a quantized denoiser consists of, unpacked.

    weights: codes and parameters by module; activations: what quantizers hold, by site name;
    floats: every other entry of the denoiser's state dict, float32 where floating point. divisors:
    (channels,) by module, of the inputs that are divided in the quantize step. choices: of probabilities that
    take uniform or log2 codes, bool (calls,), by site name. correction: of the output, (calls, channels).
    """

    weights: dict[str, WeightCodes]
    activations: dict[str, Parameters]
    floats: dict[str, Tensor]
    timesteps: Tensor
    noise_levels: Tensor
    divisors: dict[str, Tensor] = field(default_factory=dict)
    choices: dict[str, Tensor] = field(default_factory=dict)
    correction: Tensor | None = None


def weight_sites(plan: Plan) -> list[SitePlan]:
    return [site for site in plan.quantized if site.kind == "weight"]


def activation_sites(plan: Plan) -> list[SitePlan]:
    return [site for site in plan.quantized if site.kind != "weight"]


def divided_sites(plan: Plan) -> list[SitePlan]:
    """Inputs that the quantize step divides."""
    return [site for site in plan.quantized if site.division is Division.QUANTIZE_STEP]


def adaptive_sites(plan: Plan) -> list[SitePlan]:
    return [site for site in plan.quantized if site.quantizer is Quantizer.ADAPTIVE]


def save(path: Path, contents: Contents, plan: Plan) -> None:
    """Write the file, the same bytes for the same contents. Raises UserError for what cannot be stored."""
    tensors: dict[str, Tensor] = {}
    for site in weight_sites(plan):
        try:
            tensors[f"codes/{site.module}"] = pack(contents.weights[site.module].codes, site.bits or 0)
        except ValueError as fault:
            raise UserError(f"weight of {site.module}: {fault}; run halftone calibrate again") from None
    weights = [_compact(contents.weights[site.module][1:], site, 1) for site in weight_sites(plan)]
    activations = [_held(contents.activations[site.name], site) for site in activation_sites(plan)]
    for group, pairs in (
        ("weight", weights),
        ("activation", activations),
    ):
        tensors[f"{group}/scale"] = _table([scale for scale, _ in pairs]).float()
        tensors[f"{group}/zero_point"] = _whole(_table([zero_point for _, zero_point in pairs]), group)
    if divided := divided_sites(plan):
        factors = _table([contents.divisors[site.module] for site in divided])
        tensors[DIVISOR] = factors.half()
        if not torch.equal(tensors[DIVISOR].float(), factors):
            raise UserError(
                f"{DIVISOR}: factors that float16 does not hold; run halftone reparameterize again"
            )
    if adaptive := adaptive_sites(plan):
        tensors[CHOICES] = _bits(torch.cat([contents.choices[site.name] for site in adaptive]))
    if grouped := grouped_sites(plan):
        labels = [groups.pack_labels(contents.activations[site.name].groups, site, plan) for site in grouped]
        tensors[GROUPS] = torch.cat(labels)
    for name, value in contents.floats.items():
        tensors[f"{strict.FLOAT}{name}"] = strict.smallest(value)
    tensors["timesteps"] = contents.timesteps.double()
    tensors["noise_levels"] = contents.noise_levels.double()
    if contents.correction is not None:
        tensors[CORRECTION] = contents.correction.float()
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{name} holds NaN or infinity; run halftone calibrate again")
    strict.write(path, tensors)


def load(path: Path, plan: Plan, denoiser: nn.Module) -> Contents:
    """Read the file of the denoiser that `plan` and `denoiser` (on the meta device) describe.

    Every key, dtype and shape is checked against these before a tensor is read, then the values: scales
    positive, everything finite. Raises UserError naming the key.
    """
    expected = expected_tensors(plan, denoiser)
    positive = [key for key in ("weight/scale", "activation/scale", DIVISOR) if key in expected]
    tensors = strict.read(path, expected, positive=positive)
    return _unpacked(path, plan, denoiser, tensors)


def expected_tensors(plan: Plan, denoiser: nn.Module) -> strict.Expected:
    """Key -> (dtypes allowed, shape) of a plan's denoiser. Raises UserError where the two do not fit."""
    state = denoiser.state_dict()
    bits = Bits.parse(plan.bits)
    expected: strict.Expected = {}
    quantized = set()
    for site in weight_sites(plan):
        weight = state.get(f"{site.module}.weight")
        width = width_at(site.module, SiteKind.WEIGHT, bits)
        if weight is None or site.bits != width or site.elements != weight.numel():
            raise UserError(
                f"plan: the weight of {site.module[:200]} is not one of the denoiser's, or of other size"
            )
        quantized.add(f"{site.module}.weight")
        expected[f"codes/{site.module}"] = (torch.uint8,), (packed_size(weight.numel(), width),)
        if site.parameters != weight.shape[0] * _halves(site):
            raise UserError(
                f"plan: {site.name[:200]} has {site.parameters} parameters, not {weight.shape[0]}"
            )
    for site in activation_sites(plan):
        if site.parameters != plan.slots_of(site) * _entries(site):
            raise UserError(
                f"plan: {site.name[:200]} has {site.parameters} parameters for {plan.calls} calls"
            )
        groups.check(site, plan, denoiser)
    for group, sites in (("weight", weight_sites(plan)), ("activation", activation_sites(plan))):
        entries = sum(site.parameters for site in sites)
        expected[f"{group}/scale"] = (torch.float32,), (entries,)
        expected[f"{group}/zero_point"] = _WHOLE, (entries,)
    if divided := divided_sites(plan):
        for site in divided:
            if state.get(f"{site.module}.weight") is None:
                raise UserError(f"plan: {site.name[:200]} is divided, but the denoiser has no such layer")
        channels = sum(state[f"{site.module}.weight"].shape[1] for site in divided)
        expected[DIVISOR] = (torch.float16,), (channels,)
    if grouped := grouped_sites(plan):
        size = sum(groups.packed_labels(site, plan) for site in grouped)
        expected[GROUPS] = (torch.uint8,), (size,)
    for name, value in state.items():
        if name not in quantized:
            expected[f"{strict.FLOAT}{name}"] = strict.types_of(value), tuple(value.shape)
    if adaptive := adaptive_sites(plan):
        expected[CHOICES] = (torch.uint8,), (-(-len(adaptive) * plan.calls // 8),)
    for name in ("timesteps", "noise_levels"):
        expected[name] = (torch.float64,), (plan.calls,)
    if plan.axes.correction is not Correction.NONE:
        expected[CORRECTION] = (torch.float32,), (plan.calls, channels_of(denoiser))
    return expected


def _unpacked(path: Path, plan: Plan, denoiser: nn.Module, tensors: Mapping[str, Tensor]) -> Contents:
    shapes = {name: tuple(value.shape) for name, value in denoiser.state_dict().items()}
    weights = {}
    for site, scale, zero_point in _split(weight_sites(plan), "weight", tensors):
        shape = shapes[f"{site.module}.weight"]
        try:
            codes = unpack(tensors[f"codes/{site.module}"], site.bits or 0, shape)
        except ValueError as fault:
            raise UserError(f"{path}: codes/{site.module}: {fault}") from None
        weights[site.module] = WeightCodes(
            codes, *(_per_channel(value, site, shape) for value in (scale, zero_point))
        )
    labels = groups.unpack_all(path, grouped_sites(plan), plan, tensors.get(GROUPS))
    activations = {}
    for site, scale, zero_point in _split(activation_sites(plan), "activation", tensors):
        shape = shapes.get(f"{site.module}.weight", ())
        activations[site.name] = Parameters(
            _per_call(scale, site, shape),
            _per_call(zero_point, site, shape),
            labels.get(site.name),
        )
    floats: dict[str, Any] = {
        name.removeprefix(strict.FLOAT): value.float() if value.is_floating_point() else value
        for name, value in tensors.items()
        if name.startswith(strict.FLOAT)
    }
    divided = divided_sites(plan)
    sizes = [shapes[f"{site.module}.weight"][1] for site in divided]
    factors = tensors[DIVISOR].float().split(sizes) if divided else ()
    divisors = {site.module: factor for site, factor in zip(divided, factors, strict=True)}
    choices = _choices(path, plan, tensors)
    schedule = tensors["timesteps"], tensors["noise_levels"]
    correction = tensors.get(CORRECTION)
    return Contents(weights, activations, floats, *schedule, divisors, choices, correction)


def _choices(path: Path, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    adaptive = adaptive_sites(plan)
    if not adaptive:
        return {}
    found = torch.from_numpy(np.unpackbits(tensors[CHOICES].numpy(), bitorder="little")).bool()
    count = len(adaptive) * plan.calls
    if found[count:].any():
        raise UserError(f"{path}: {CHOICES}: its unused bits are not zero; get the artefact again")
    rows = found[:count].split(plan.calls)
    return {site.name: row for site, row in zip(adaptive, rows, strict=True)}


def _bits(flags: Tensor) -> Tensor:
    """Flags as a bitstream, the first in the lowest bit."""
    return torch.from_numpy(np.packbits(flags.numpy(), bitorder="little"))


def _split(
    sites: list[SitePlan], group: str, tensors: Mapping[str, Tensor]
) -> list[tuple[SitePlan, Tensor, Tensor]]:
    """A table cut into the sites' own parts, float32."""
    sizes = [site.parameters for site in sites]
    scales, zero_points = (
        tensors[f"{group}/{part}"].float().split(sizes) for part in ("scale", "zero_point")
    )
    return list(zip(sites, scales, zero_points, strict=True))


def _halves(site: SitePlan) -> int:
    return 1 if site.split is None else 2


def _entries(site: SitePlan) -> int:
    """Scales that an activation site holds at a call."""
    return _halves(site) if site.groups is None else site.groups.most


def grouped_sites(plan: Plan) -> list[SitePlan]:
    return [site for site in activation_sites(plan) if site.groups is not None]


def _held(parameters: Parameters, site: SitePlan) -> list[Tensor]:
    """An activation's parameters as they lie in memory -> one entry per half or group."""
    pair = parameters.scale, parameters.zero_point
    if site.groups is not None:
        return [value[:, : site.groups.most] for value in pair]
    return _compact(pair, site, 2)


def _compact(values: Sequence[Tensor], site: SitePlan, axis: int) -> list[Tensor]:
    """Parameters as they lie in memory -> one entry per half."""
    return [value if site.split is None else halves.compact(value, site.split, axis) for value in values]


def _per_channel(values: Tensor, site: SitePlan, shape: tuple[int, ...]) -> Tensor:
    """Entries of a weight of this shape, in memory: (out, 1, ...), or (out, in, ...) where it is split."""
    rest = (1,) * (len(shape) - 2)
    if site.split is None:
        return values.reshape(-1, 1, *rest)
    return halves.expand(values.reshape(-1, 2, *rest), site.split, shape[1])


def _per_call(values: Tensor, site: SitePlan, shape: tuple[int, ...]) -> Tensor:
    """Entries of an activation, in memory: (slots,), (slots, groups), or, for the input of a layer whose
    weight has this shape, (slots, 1, channels, ...) where it is split."""
    if site.groups is not None:
        return values.reshape(-1, site.groups.most)
    if site.split is None:
        return values
    rest = (1,) * (len(shape) - 2)
    return halves.expand(values.reshape(-1, 2, *rest), site.split, shape[1]).unsqueeze(1)


def _table(values: list[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values]) if values else torch.zeros(0)


def _whole(value: Tensor, where: str) -> Tensor:
    """Whole numbers in the smallest of uint8, int16, int32 that holds them all."""
    for dtype in _WHOLE:
        limits = torch.iinfo(dtype)
        if bool((value >= limits.min).all()) and bool((value <= limits.max).all()):
            whole = value.to(dtype)
            if bool((whole == value).all()):
                return whole
    raise UserError(f"{where} sites: zero points are not whole numbers; run halftone calibrate again")
