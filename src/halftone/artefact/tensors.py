"""quantized.safetensors: what the denoiser of an artefact is made of, at the size it is worth.

| key | dtype | shape |
| --- | --- | --- |
| codes/MODULE | uint8 | packed bytes (`halftone.quantizers.packing`), row-major |
| weight/scale | float32 | (output channels of all quantized weights,) |
| weight/zero_point | uint8, else int16 or int32 | (output channels of all quantized weights,) |
| activation/scale | float32 | (parameters of all activation sites,) |
| activation/zero_point | uint8, else int16 or int32 | (parameters of all activation sites,) |
| float/NAME | float16, else bfloat16, else float32 | as the parameter or buffer NAME of the denoiser |
| timesteps, noise_levels | float64 | (calls,) |

Scales and zero points of all sites lie in one table each, in the order of the plan: a key costs a hundred
bytes. An activation site takes one entry per call, one where its parameters are shared over the calls (one
per call all the same where calls are relaxed), and none where they are dynamic. A split site takes two where
another takes one: for each output channel, or each call, that of the first half and that of the second.
A float tensor takes the smallest type that holds each of its values exactly. Which keys there are and how
long they are follows from the plan and the denoiser's configuration; reading refuses any other set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from halftone.components import first_line
from halftone.errors import UserError
from halftone.layers import WeightCodes
from halftone.plan import Plan, SitePlan
from halftone.quantizers import halves
from halftone.quantizers.bits import Bits
from halftone.quantizers.packing import pack, packed_size, unpack

FILE = "quantized.safetensors"
_WHOLE = (torch.uint8, torch.int16, torch.int32)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_NAMES = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool}
_NAMES |= {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Contents:
    """What a quantized denoiser consists of, unpacked.

    weights: codes and parameters by module; activations: (scale, zero_point) float32 by site name;
    floats: every other entry of the denoiser's state dict, float32 where floating point.
    """

    weights: dict[str, WeightCodes]
    activations: dict[str, tuple[Tensor, Tensor]]
    floats: dict[str, Tensor]
    timesteps: Tensor
    noise_levels: Tensor


def weight_sites(plan: Plan) -> list[SitePlan]:
    return [site for site in plan.quantized if site.kind == "weight"]


def activation_sites(plan: Plan) -> list[SitePlan]:
    return [site for site in plan.quantized if site.kind != "weight"]


def save(path: Path, contents: Contents, plan: Plan) -> None:
    """Write the file, the same bytes for the same contents. Raises UserError for what cannot be stored."""
    tensors: dict[str, Tensor] = {}
    bits = Bits.parse(plan.bits)
    for module, weight in contents.weights.items():
        try:
            tensors[f"codes/{module}"] = pack(weight.codes, bits.weight)
        except ValueError as fault:
            raise UserError(f"weight of {module}: {fault}; run halftone calibrate again") from None
    weights = [_compact(contents.weights[site.module][1:], site, 1) for site in weight_sites(plan)]
    activations = [_compact(contents.activations[site.name], site, 2) for site in activation_sites(plan)]
    for group, pairs in (
        ("weight", weights),
        ("activation", activations),
    ):
        tensors[f"{group}/scale"] = _table([scale for scale, _ in pairs]).float()
        tensors[f"{group}/zero_point"] = _whole(_table([zero_point for _, zero_point in pairs]), group)
    for name, value in contents.floats.items():
        tensors[f"float/{name}"] = _smallest(value)
    tensors["timesteps"] = contents.timesteps.double()
    tensors["noise_levels"] = contents.noise_levels.double()
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{name} holds NaN or infinity; run halftone calibrate again")
    # one key only: safetensors writes several in no fixed order
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})


def load(path: Path, plan: Plan, denoiser: nn.Module) -> Contents:
    """Read the file of the denoiser that `plan` and `denoiser` (on the meta device) describe.

    Every key, dtype and shape is checked against these before a tensor is read, then the values: scales
    positive, everything finite. Raises UserError naming the key.
    """
    try:
        with safe_open(path, framework="pt") as file:
            expected = expected_tensors(plan, denoiser)
            _check_keys(path, set(file.keys()), expected)
            for name, (dtypes, shape) in expected.items():
                piece = file.get_slice(name)
                found, dtype = tuple(piece.get_shape()), _NAMES.get(piece.get_dtype())
                if dtype not in dtypes:
                    wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
                    raise UserError(f"{path}: {name} is {piece.get_dtype()}, it should be {wanted}")
                if found != shape:
                    raise UserError(f"{path}: {name} has shape {found}, it should be {shape}")
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as fault:
        raise UserError(f"{path}: not sound ({first_line(fault)}); get the artefact again") from None
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{path}: {name} holds NaN or infinity")
        if name in ("weight/scale", "activation/scale") and not (value > 0).all():
            raise UserError(f"{path}: {name} holds a scale that is not positive")
    return _unpacked(path, plan, denoiser, tensors)


def expected_tensors(
    plan: Plan, denoiser: nn.Module
) -> dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]:
    """Key -> (dtypes allowed, shape) of a plan's denoiser. Raises UserError where the two do not fit."""
    state = denoiser.state_dict()
    bits = Bits.parse(plan.bits)
    expected: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {}
    quantized = set()
    for site in weight_sites(plan):
        weight = state.get(f"{site.module}.weight")
        if weight is None or site.bits != bits.weight or site.elements != weight.numel():
            raise UserError(
                f"plan: the weight of {site.module[:200]} is not one of the denoiser's, or of other size"
            )
        quantized.add(f"{site.module}.weight")
        expected[f"codes/{site.module}"] = (torch.uint8,), (packed_size(weight.numel(), bits.weight),)
        if site.parameters != weight.shape[0] * _halves(site):
            raise UserError(
                f"plan: {site.name[:200]} has {site.parameters} parameters, not {weight.shape[0]}"
            )
    for site in activation_sites(plan):
        if site.parameters != plan.slots * _halves(site):
            raise UserError(
                f"plan: {site.name[:200]} has {site.parameters} parameters for {plan.calls} calls"
            )
    for group, sites in (("weight", weight_sites(plan)), ("activation", activation_sites(plan))):
        entries = sum(site.parameters for site in sites)
        expected[f"{group}/scale"] = (torch.float32,), (entries,)
        expected[f"{group}/zero_point"] = _WHOLE, (entries,)
    for name, value in state.items():
        if name not in quantized:
            dtypes = _FLOATS if value.is_floating_point() else (value.dtype,)
            expected[f"float/{name}"] = dtypes, tuple(value.shape)
    for name in ("timesteps", "noise_levels"):
        expected[name] = (torch.float64,), (plan.calls,)
    return expected


def _check_keys(path: Path, found: set[str], expected: Iterable[str]) -> None:
    wanted = set(expected)
    for problem, names in (("lacks", wanted - found), ("has the unknown", found - wanted)):
        if names:
            raise UserError(
                f"{path}: {problem} {min(names)[:200]} ({len(names)} in all); get the artefact again"
            )


def _unpacked(path: Path, plan: Plan, denoiser: nn.Module, tensors: Mapping[str, Tensor]) -> Contents:
    bits = Bits.parse(plan.bits)
    shapes = {name: tuple(value.shape) for name, value in denoiser.state_dict().items()}
    weights = {}
    for site, scale, zero_point in _split(weight_sites(plan), "weight", tensors):
        shape = shapes[f"{site.module}.weight"]
        try:
            codes = unpack(tensors[f"codes/{site.module}"], bits.weight, shape)
        except ValueError as fault:
            raise UserError(f"{path}: codes/{site.module}: {fault}") from None
        weights[site.module] = WeightCodes(
            codes, *(_per_channel(value, site, shape) for value in (scale, zero_point))
        )
    activations = {}
    for site, scale, zero_point in _split(activation_sites(plan), "activation", tensors):
        shape = shapes.get(f"{site.module}.weight", ())
        activations[site.name] = (
            _per_call(scale, site, shape),
            _per_call(zero_point, site, shape),
        )
    floats: dict[str, Any] = {
        name.removeprefix("float/"): value.float() if value.is_floating_point() else value
        for name, value in tensors.items()
        if name.startswith("float/")
    }
    return Contents(weights, activations, floats, tensors["timesteps"], tensors["noise_levels"])


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
    """Entries of an activation, in memory: (slots,), or (slots, 1, channels, ...) where it is split, for the
    input of a layer whose weight has this shape."""
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


def _smallest(value: Tensor) -> Tensor:
    """The same values in the smallest of float16, bfloat16, float32 that holds each of them exactly."""
    if not value.is_floating_point():
        return value
    value = value.float()
    return next(value.to(dtype) for dtype in _FLOATS if torch.equal(value.to(dtype).float(), value))


def float_bytes(path: Path) -> int:
    """Bytes of the tensors that stayed in float."""
    with safe_open(path, framework="pt") as file:
        pieces = [file.get_slice(name) for name in set(file.keys()) if name.startswith("float/")]
        return sum(prod(p.get_shape()) * _NAMES[p.get_dtype()].itemsize for p in pieces)
