"""Where a factor per channel can go: the layers that read one tensor, and what before them takes its inverse.

Multiplying the input channels of a weight by r and dividing the layer's input by r changes no output. The
division costs nothing where the module before is linear in each of its output channels: it is folded there.
Elsewhere the quantizer of the layer's input divides, so that a code is round(x / r / scale) + zero point.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from halftone.axes import Axes
from halftone.denoiser import Site, SiteKind, attends_plainly, is_boundary, is_layer, modules_in_order
from halftone.errors import UserError
from halftone.plan import Division
from halftone.policies import Reparameterization, ReparameterizedLayers


@dataclass(frozen=True)
class Shared:
    """Layers that read one tensor and so share its factors. producer: the norm or layer that takes their
    inverse, None where the quantize step divides."""

    layers: tuple[str, ...]
    producer: str | None = None

    @property
    def division(self) -> Division:
        return Division.QUANTIZE_STEP if self.producer is None else Division.FOLDED


def reparameterized_layers(denoiser: nn.Module, sites: Iterable[Site], axes: Axes) -> tuple[Shared, ...]:
    """The layers that a recipe reparameterizes, in forward order; none where it does not.

    `denoiser` may be wrapped, and lie on the meta device. A producer takes factors only where all the layers
    that read it take part. Grouped convolutions are left as they are. Raises UserError where the recipe
    reparameterizes and there is no layer for it.
    """
    if axes.reparameterization is Reparameterization.NONE:
        return ()
    which = axes.reparameterization_layers
    taking = [
        site.module
        for site in sites
        if site.kind is SiteKind.WEIGHT and site.quantized and _takes(denoiser, site.module, which)
    ]
    found: dict[str, Shared] = {name: Shared((name,)) for name in taking}
    for producer, layers in _folds(denoiser):
        if found.keys() >= set(layers):
            found |= dict.fromkeys(layers, Shared(layers, producer))
    if not found:
        raise UserError(
            f"reparameterization {axes.reparameterization}: this {type(denoiser).__name__} has no layer for "
            f"it with reparameterization_layers {which}; choose all, or reparameterization none"
        )
    return tuple(dict.fromkeys(found.values()))


def divisions(shared: Iterable[Shared]) -> dict[str, Division]:
    """Where each layer's input is divided, by module name."""
    return {layer: one.division for one in shared for layer in one.layers}


@contextlib.contextmanager
def reparameterized(
    denoiser: nn.Module, shared: Iterable[Shared], factors: Mapping[str, Tensor]
) -> Iterator[None]:
    """The denoiser with weights times their factors, and what can be folded divided by them; afterwards as it
    was.

    factors: (input channels,) float32 by module. What the quantize step divides by is not applied here: see
    `divisors`. The denoiser must not be wrapped yet.
    """
    changed: list[tuple[Any, str, nn.Parameter]] = []

    def change(module: Any, name: str, by: Tensor, axis: int, divide: bool) -> None:
        before = getattr(module, name, None)
        if before is None:
            return
        changed.append((module, name, before))
        shape = [1] * before.ndim
        shape[axis] = -1
        along = by.to(before.device).reshape(shape)
        value = before.detach().float() / along if divide else before.detach().float() * along
        setattr(module, name, nn.Parameter(value.to(before.dtype), requires_grad=before.requires_grad))

    try:
        for one in shared:
            factor = factors[one.layers[0]].float()
            for layer in one.layers:
                change(denoiser.get_submodule(layer), "weight", factor, 1, divide=False)
            if one.producer is not None:
                producer: Any = denoiser.get_submodule(one.producer)
                rows = producer.weight.shape[0] - len(factor)  # of a gate, which stay
                by = torch.cat([factor, factor.new_ones(rows)])
                change(producer, "weight", by, 0, divide=True)
                change(producer, "bias", by, 0, divide=True)
        yield
    finally:
        for module, name, before in reversed(changed):
            setattr(module, name, before)


def divisors(shared: Iterable[Shared], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors of the layers whose input the quantize step divides, by module."""
    return {name: factors[name] for one in shared if one.producer is None for name in one.layers}


def _takes(denoiser: nn.Module, name: str, which: ReparameterizedLayers) -> bool:
    module = denoiser.get_submodule(name)
    layer = getattr(module, "layer", module)
    if which is ReparameterizedLayers.INNER_CONVOLUTIONS and is_boundary(name):
        return False
    return layer.groups == 1 if isinstance(layer, nn.Conv2d) else which is ReparameterizedLayers.ALL


def _folds(denoiser: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Producer and all the layers that read it, for every fold that is exact, found by module type."""
    for name, module in modules_in_order(denoiser):
        if type(module).__name__ == "Transformer2DModel":
            if isinstance(getattr(module, "norm", None), nn.GroupNorm) and module.norm.affine:
                yield f"{name}.norm", (f"{name}.proj_in",)
        elif type(module).__name__ == "BasicTransformerBlock":
            yield from _of_block(name, module)
        elif isinstance(module, Attention):
            yield from _of_attention(name, module)
        elif type(module).__name__ == "FeedForward":
            act, last = module.net[0], module.net[2]
            gated = isinstance(act, GEGLU | SwiGLU) and is_layer(act.proj) and is_layer(last)
            if gated:  # half of the rows times a function of the other half
                yield f"{name}.net.0.proj", (f"{name}.net.2",)


def _of_block(name: str, block: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The norms of a transformer block, where nothing shifts or scales what they give."""
    if block.norm_type != "layer_norm" or block.pos_embed is not None:
        return
    if _affine(block.norm1) and not block.only_cross_attention:
        yield f"{name}.norm1", tuple(f"{name}.attn1.to_{part}" for part in "qkv")
    if block.attn2 is not None and _affine(block.norm2) and block.attn2.is_cross_attention:
        yield f"{name}.norm2", (f"{name}.attn2.to_q",)
    if _affine(block.norm3) and isinstance(block.ff.net[0], GEGLU | SwiGLU):
        yield f"{name}.norm3", (f"{name}.ff.net.0.proj",)


def _of_attention(name: str, attention: Attention) -> Iterator[tuple[str, tuple[str, ...]]]:
    if not attends_plainly(attention) or attention.added_kv_proj_dim is not None:
        return
    alone = attention.group_norm is not None and not attention.is_cross_attention
    if alone and attention.spatial_norm is None and attention.group_norm.affine:
        yield f"{name}.group_norm", tuple(f"{name}.to_{part}" for part in "qkv")
    last: Any = attention.to_out[0]
    if is_layer(last) and attention.to_v.weight.shape[0] == last.weight.shape[1]:
        yield f"{name}.to_v", (f"{name}.to_out.0",)


def _affine(norm: Any) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.elementwise_affine
