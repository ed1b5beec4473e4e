"""Sites and blocks of any diffusers denoiser, found by module type and name.

Nothing here changes a denoiser; `halftone.layers.wrap` puts quantizers at the sites.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import nn

from halftone.calls import CallContext
from halftone.errors import UserError
from halftone.policies import Shortcut
from halftone.quantizers.bits import Bits
from halftone.settings import Protocol

__all__ = [
    "Block",
    "BlockKind",
    "CallContext",
    "Site",
    "SiteKind",
    "attends_plainly",
    "blocks",
    "concat_shortcuts",
    "denoiser_of",
    "modules_in_order",
    "sites",
]


class SiteKind(StrEnum):
    """Which tensor of a module is quantized."""

    WEIGHT = "weight"
    INPUT = "input"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    PROBABILITIES = "probabilities"


ATTENTION_KINDS = (SiteKind.QUERY, SiteKind.KEY, SiteKind.VALUE, SiteKind.PROBABILITIES)
START_KINDS = (SiteKind.KEY, SiteKind.PROBABILITIES)  # where a start token can stay apart


@dataclass(frozen=True)
class Site:
    """A tensor that gets quantized, or that stays in float for the reason given."""

    module: str
    kind: SiteKind
    module_type: str
    float_reason: str | None = None
    split: int | None = None
    """Channels of the first of two halves of the contracted axis that have parameters of their own."""
    start: bool = False
    """Whether the first key token, a start token, stays in float and the site is the other tokens'."""

    @property
    def name(self) -> str:
        """Unique in a denoiser: `down_blocks.0.resnets.0.conv1.input`."""
        return f"{self.module}.{self.kind}"

    @property
    def quantized(self) -> bool:
        return self.float_reason is None


def width_at(module: str, kind: SiteKind, bits: Bits) -> int:
    """Bits of a quantized site of a module."""
    if bits.boundary is not None and is_boundary(module):
        return bits.boundary
    if kind is SiteKind.WEIGHT:
        return bits.weight
    return bits.softmax if kind is SiteKind.PROBABILITIES else bits.activation


class BlockKind(StrEnum):
    RESNET = "resnet"
    TRANSFORMER = "transformer"
    ATTENTION = "attention"
    LAYER = "layer"


@dataclass(frozen=True)
class Block:
    """A unit of reconstruction, with the names of the Linear and Conv2d layers in it, in forward order."""

    name: str
    kind: BlockKind
    layers: tuple[str, ...]


@dataclass(frozen=True)
class _AuthorsSites:
    """What a method's authors quantize beyond the layers themselves."""

    boundary: bool  # first and last layer
    attention: bool  # q, k, v and probabilities


# Protocol `paper`; sources: the official code of each method.
_PAPER = {
    "pcr": _AuthorsSites(boundary=False, attention=False),
    "dgq": _AuthorsSites(boundary=False, attention=True),
    "qdiffusion": _AuthorsSites(boundary=True, attention=True),
}
_EQUAL = _AuthorsSites(boundary=False, attention=True)

# The first layer reads the latents, the last one writes the prediction; by exact name. Transformers embed
# patches instead of convolving: theirs count as conv_in and conv_out (our choice, the papers know U-Nets
# only).
_BOUNDARY = {"conv_in", "conv_out", "pos_embed.proj", "x_embedder", "proj_out", "proj_out_1", "proj_out_2"}
# Attention whose arithmetic is softmax(q kᵀ) v and nothing else, so that our processor can stand in for it.
_PLAIN_PROCESSORS = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
_STAGES = ["time_proj", "time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj", "conv_in"]
_STAGES += ["down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out"]


def denoiser_of(pipeline: Any) -> nn.Module:
    """The network a diffusers pipeline denoises with: its `unet` or `transformer`. Raises UserError."""
    for name in ("unet", "transformer"):
        module = getattr(pipeline, name, None)
        if isinstance(module, nn.Module):
            return module
    raise UserError(
        f"pipeline {type(pipeline).__name__} has neither unet nor transformer: choose a diffusion pipeline"
    )


def is_boundary(module: str) -> bool:
    """Whether it is the first layer or the last one."""
    return module in _BOUNDARY


def is_layer(module: nn.Module) -> bool:
    """Linear or Conv2d, plain or wrapped by `halftone.layers.QuantizedLayer`."""
    return isinstance(getattr(module, "layer", module), nn.Linear | nn.Conv2d)


def layer_type(module: nn.Module) -> str:
    return type(getattr(module, "layer", module)).__name__


def modules_in_order(denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
    """`named_modules` in forward order; layers, wrapped or not, are leaves.

    Modules register in forward order except in diffusers' U-Nets, where up_blocks come before mid_block and,
    within a block, all attentions before all resnets: these run as resnets.0, attentions.0, resnets.1, and
    so on.
    """

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        yield name, module
        if not is_layer(module):
            for child_name, child in module.named_children():
                yield from walk(f"{name}.{child_name}" if name else child_name, child)

    found = list(walk("", denoiser))[1:]
    if not hasattr(denoiser, "down_blocks"):
        return found
    registered = {name: place for place, (name, _) in enumerate(found)}

    def order(item: tuple[str, nn.Module]) -> tuple[int, ...]:
        parts = item[0].split(".")
        stage = _STAGES.index(parts[0]) if parts[0] in _STAGES else -1
        at = 1 if parts[0] == "mid_block" else 2  # where the list of a block is named
        block = int(parts[1]) if at == 2 and len(parts) > 1 and parts[1].isdigit() else 0
        pair, attention = -1, 0
        if stage >= _STAGES.index("down_blocks") and len(parts) > at:
            inner = parts[at]
            if inner in ("resnets", "attentions"):
                pair = int(parts[at + 1]) if len(parts) > at + 1 else -1
                attention = int(inner == "attentions")
            else:
                pair = len(found)  # downsamplers and upsamplers come last
        return stage, block, pair, attention, registered[item[0]]

    return sorted(found, key=order)


def _authors(protocol: Protocol, recipe: str) -> _AuthorsSites:
    if protocol is Protocol.EQUAL:
        return _EQUAL
    if recipe not in _PAPER:
        raise UserError(f"protocol paper: no paper says which sites {recipe} quantizes; use protocol equal")
    return _PAPER[recipe]


def sites(
    denoiser: nn.Module,
    protocol: Protocol = Protocol.EQUAL,
    recipe: str = "minmax",
    shortcut: Shortcut = Shortcut.WHOLE,
    start_token: bool = False,
    *,
    bits: Bits | None = None,
) -> list[Site]:
    """Every site of a denoiser in forward order, also those that stay in float, with the reason.

    A layer has its input and its weight; attention has q, k, v and the probabilities, after its projections.
    Protocol `equal` is one list for every recipe: all Linear and Conv2d but the first and the last, q, k, v
    and probabilities. With `shortcut` split, input and weight of shortcut convolutions that read a
    concatenation say where it falls apart. With `start_token` keys and probabilities of cross-attention leave
    the first token out (see `halftone.start_token`). With `bits` that have a width for the first and the
    last layer, these are quantized whatever the protocol. Raises UserError where protocol `paper` knows no
    authors for the recipe.
    """
    authors = _authors(protocol, recipe)
    boundary_too = authors.boundary or (bits is not None and bits.boundary is not None)
    halves = concat_shortcuts(denoiser) if shortcut is Shortcut.SPLIT else {}
    found: list[Site] = []
    for name, module in modules_in_order(denoiser):
        if not is_layer(module):
            continue
        boundary = is_boundary(name) and not boundary_too
        reason = f"first or last layer stays in float (protocol {protocol})" if boundary else None
        split = None if reason else halves.get(name)
        kinds = SiteKind.INPUT, SiteKind.WEIGHT
        found += [Site(name, kind, layer_type(module), reason, split) for kind in kinds]
        parent, _, last = name.rpartition(".")
        if last == "to_v":  # the last of the three projections
            attention = denoiser.get_submodule(parent)
            reason = _attention_reason(attention, authors)
            apart = start_token and reason is None and bool(getattr(attention, "is_cross_attention", False))
            found += [
                Site(parent, kind, type(attention).__name__, reason, start=apart and kind in START_KINDS)
                for kind in ATTENTION_KINDS
            ]
    return found


def _attention_reason(attention: nn.Module, authors: _AuthorsSites) -> str | None:
    if not authors.attention:
        return "the method's authors leave attention in float (protocol paper)"
    if attends_plainly(attention):
        return None
    processor = getattr(attention, "processor", None)
    kind = type(attention if processor is None else processor).__name__
    return f"attention of kind {kind} is not taken apart"


def attends_plainly(attention: nn.Module) -> bool:
    """Whether a module's arithmetic is softmax(q kᵀ) v and nothing else."""
    processor = getattr(attention, "processor", None)
    plain = isinstance(processor, _PLAIN_PROCESSORS) or getattr(
        processor, "materialises_probabilities", False
    )
    return isinstance(attention, Attention) and plain


def blocks(denoiser: nn.Module, *, boundary: bool = False) -> list[Block]:
    """Units of reconstruction in forward order: residual blocks, transformer blocks, attention that stands
    alone (in unconditional U-Nets), remaining single layers.

    Every Linear and Conv2d belongs to exactly one; the first and last layer only with `boundary`. (BRECQ; the
    units of PCR, DGQ and Q-Diffusion.)
    """
    found: list[tuple[str, BlockKind, list[str]]] = []
    for name, module in modules_in_order(denoiser):
        inside = bool(found) and found[-1][1] is not BlockKind.LAYER and name.startswith(found[-1][0] + ".")
        if is_layer(module):
            if inside:
                found[-1][2].append(name)
            elif boundary or not is_boundary(name):
                found.append((name, BlockKind.LAYER, [name]))
        elif not inside and (kind := _block_kind(module)) is not None:
            found.append((name, kind, []))
    return [Block(name, kind, tuple(layers)) for name, kind, layers in found if layers]


def _block_kind(module: nn.Module) -> BlockKind | None:
    kind = type(module).__name__
    if kind == "ResnetBlock2D":
        return BlockKind.RESNET
    if isinstance(module, Attention):
        return BlockKind.ATTENTION
    # BasicTransformerBlock, JointTransformerBlock, FluxSingleTransformerBlock, ...
    return BlockKind.TRANSFORMER if kind.endswith("TransformerBlock") else None


def concat_shortcuts(denoiser: nn.Module) -> dict[str, int]:
    """Shortcut convolutions of a U-Net whose input is `cat([hidden, skip])` -> channels of `hidden`.

    The split of Q-Diffusion ("shortcut split") falls there. Empty for a transformer. Raises UserError for a
    U-Net of other blocks than diffusers' ResnetBlock2D, whose skips cannot be told.
    """
    if not hasattr(denoiser, "up_blocks"):
        return {}
    unknown = UserError(
        f"{type(denoiser).__name__}: cannot tell which shortcuts read a concatenation, its blocks are of "
        "another kind; set the axis shortcut to whole"
    )
    if not hasattr(denoiser, "conv_in"):
        raise unknown

    def out_channels(module: nn.Module) -> int:
        layer: Any = getattr(module, "layer", module)
        return int(layer.out_channels)

    skips = [out_channels(denoiser.get_submodule("conv_in"))]
    found: dict[str, int] = {}
    for name, module in modules_in_order(denoiser):
        down, up = name.startswith("down_blocks."), name.startswith("up_blocks.")
        if type(module).__name__ == "ResnetBlock2D":
            if down:
                skips.append(out_channels(module))
            elif up and ".resnets." in name:  # not one that scales up, which reads no skip
                if not skips:
                    raise unknown
                hidden = int(module.in_channels) - skips.pop()
                if getattr(module, "conv_shortcut", None) is not None:
                    found[f"{name}.conv_shortcut"] = hidden
        elif down and type(module).__name__ == "Downsample2D" and not name.endswith(".downsample"):
            # a residual block that scales down holds one of that name, and is counted itself
            skips.append(out_channels(module))
    if skips:
        raise unknown
    return found
