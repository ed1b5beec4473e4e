"""Reparameterized denoisers give the outputs they gave, wherever the factors' inverse goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from halftone.axes import Axes
from halftone.calls import CallContext
from halftone.denoiser import Site, SiteKind, sites
from halftone.errors import UserError
from halftone.folding import Shared, divisors, reparameterized, reparameterized_layers
from halftone.layers import QuantizedLayer
from halftone.plan import Division
from halftone.policies import Reparameterization, ReparameterizedLayers
from halftone.quantizers.bits import Bits
from halftone.steps.choice import Choice
from halftone.steps.wrapped import wrapped

ALL = Axes(reparameterization=Reparameterization.TCR, reparameterization_layers=ReparameterizedLayers.ALL)
CONVOLUTIONS = Axes(reparameterization=Reparameterization.TCR)
INNER = CONVOLUTIONS.model_copy(
    update={"reparameterization_layers": ReparameterizedLayers.INNER_CONVOLUTIONS}
)
Call = Callable[[], Tensor]


TEXT: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


def conditional() -> tuple[nn.Module, Call]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TEXT).eval()
    return unet, lambda: unet(NOISE[:, :4], 500, encoder_hidden_states=STATES)[0]


def linear_projections() -> tuple[nn.Module, Call]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TEXT, use_linear_projection=True).eval()
    return unet, lambda: unet(NOISE[:, :4], 500, encoder_hidden_states=STATES)[0]


def unconditional() -> tuple[nn.Module, Call]:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    return unet, lambda: unet(NOISE[:, :3], 500)[0]


def transformer() -> tuple[nn.Module, Call]:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=4,
    ).eval()
    labels = torch.tensor([1, 2])
    return model, lambda: model(NOISE[:, :4], timestep=torch.tensor([500, 500]), class_labels=labels)[0]


NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
STATES = 3 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4))
MODELS = [conditional, linear_projections, unconditional, transformer]


def drawn(denoiser: nn.Module, shared: tuple[Shared, ...]) -> dict[str, Tensor]:
    """Factors of 1 to 10, the same for layers that share them."""
    generator = torch.Generator().manual_seed(7)
    found: dict[str, Tensor] = {}
    for one in shared:
        weight: Any = denoiser.get_submodule(one.layers[0]).weight
        factor = 1 + 9 * torch.rand(weight.shape[1], generator=generator)
        found |= dict.fromkeys(one.layers, factor)
    return found


def randomised(denoiser: nn.Module) -> None:
    """Norms and biases start as ones and zeros, which would hide what is not folded."""
    generator = torch.Generator().manual_seed(9)
    for parameter in denoiser.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.5 * torch.rand(parameter.shape, generator=generator)


def found_sites(denoiser: nn.Module) -> list[Site]:
    return sites(denoiser)


def close(after: Tensor, before: Tensor) -> bool:
    return bool((after - before).abs().max() <= 1e-4 * before.abs().max())


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("axes", [ALL, CONVOLUTIONS], ids=["all", "convolutions"])
@torch.no_grad()
def test_the_whole_denoiser_gives_what_it_gave(
    make: Callable[[], tuple[nn.Module, Call]], axes: Axes
) -> None:
    denoiser, call = make()
    randomised(denoiser)
    found, state = found_sites(denoiser), {k: v.clone() for k, v in denoiser.state_dict().items()}
    choice = Choice("minmax", axes, Bits.parse("w8a8"))
    if make is transformer and axes is CONVOLUTIONS:  # it has none but at its ends
        with pytest.raises(UserError, match="choose all"):
            reparameterized_layers(denoiser, found, axes)
        return
    factors = drawn(denoiser, reparameterized_layers(denoiser, found, axes))
    before = call()
    with wrapped(denoiser, found, choice, CallContext(), 1, factors=factors):
        assert close(call(), before)
        changed = [
            name for name, m in denoiser.named_modules()
            if isinstance(m, QuantizedLayer) and not torch.equal(m.weight, state[f"{name}.weight"])
        ]  # fmt: skip
        assert set(changed) >= set(factors)
    assert torch.equal(call(), before)
    assert all(torch.equal(value, state[name]) for name, value in denoiser.state_dict().items())


@pytest.mark.parametrize(
    ("make", "producer", "layers"),
    [
        (conditional, "down_blocks.0.attentions.0.norm", ["down_blocks.0.attentions.0.proj_in"]),
        (linear_projections, "down_blocks.0.attentions.0.norm", ["down_blocks.0.attentions.0.proj_in"]),
        (conditional, "BLOCK.norm1", ["BLOCK.attn1.to_q", "BLOCK.attn1.to_k", "BLOCK.attn1.to_v"]),
        (conditional, "BLOCK.norm2", ["BLOCK.attn2.to_q"]),
        (conditional, "BLOCK.norm3", ["BLOCK.ff.net.0.proj"]),
        (conditional, "BLOCK.attn1.to_v", ["BLOCK.attn1.to_out.0"]),
        (conditional, "BLOCK.attn2.to_v", ["BLOCK.attn2.to_out.0"]),
        (conditional, "BLOCK.ff.net.0.proj", ["BLOCK.ff.net.2"]),
        (
            unconditional,
            "mid_block.attentions.0.group_norm",
            [f"mid_block.attentions.0.to_{x}" for x in "qkv"],
        ),
        (unconditional, "mid_block.attentions.0.to_v", ["mid_block.attentions.0.to_out.0"]),
        (transformer, "transformer_blocks.0.attn1.to_v", ["transformer_blocks.0.attn1.to_out.0"]),
    ],
)
@torch.no_grad()
def test_every_kind_of_fold_is_exact_by_itself(
    make: Callable[[], tuple[nn.Module, Call]], producer: str, layers: list[str]
) -> None:
    denoiser, call = make()
    randomised(denoiser)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    wanted = Shared(tuple(x.replace("BLOCK", block) for x in layers), producer.replace("BLOCK", block))
    assert wanted in reparameterized_layers(denoiser, found_sites(denoiser), ALL)
    before = call()
    with reparameterized(denoiser, [wanted], drawn(denoiser, (wanted,))):
        assert close(call(), before)
    with reparameterized(denoiser, [Shared(wanted.layers)], drawn(denoiser, (wanted,))):
        assert not close(call(), before)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (conditional, "down_blocks.0.resnets.0.conv1"),
        (conditional, "down_blocks.0.resnets.0.conv2"),
        (conditional, "down_blocks.0.resnets.0.time_emb_proj"),
        (conditional, "up_blocks.0.resnets.0.conv_shortcut"),
        (conditional, "down_blocks.0.attentions.0.proj_out"),
        (conditional, "down_blocks.0.downsamplers.0.conv"),
        (conditional, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"),
        (conditional, "time_embedding.linear_2"),
        (transformer, "transformer_blocks.0.attn1.to_q"),
        (transformer, "transformer_blocks.0.ff.net.2"),
    ],
)
def test_what_cannot_be_folded_is_divided_in_the_quantize_step(
    make: Callable[[], tuple[nn.Module, Call]], name: str
) -> None:
    denoiser, _ = make()
    shared = reparameterized_layers(denoiser, found_sites(denoiser), ALL)
    (one,) = [one for one in shared if name in one.layers]
    assert one.division is Division.QUANTIZE_STEP
    assert name in divisors(shared, drawn(denoiser, shared))


def test_inner_convolutions_are_all_but_the_first_and_the_last_layer() -> None:
    denoiser, _ = conditional()
    found = sites(denoiser, bits=Bits.parse("w4a4b8"))
    names = {
        which: {layer for one in reparameterized_layers(denoiser, found, axes) for layer in one.layers}
        for which, axes in {"every": CONVOLUTIONS, "inner": INNER}.items()
    }
    assert names["every"] - names["inner"] == {"conv_in", "conv_out"}
    assert names["inner"] < names["every"]


def test_a_producer_is_left_alone_unless_all_that_read_it_take_part() -> None:
    denoiser, _ = conditional()
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
    fewer = [
        Site(s.module, s.kind, s.module_type, "stays in float") if s.module == key else s
        for s in found_sites(denoiser)
    ]
    shared = reparameterized_layers(denoiser, fewer, ALL)
    query = key.replace("to_k", "to_q")
    assert Shared((query,)) in shared
    assert not any(key in one.layers for one in shared)
    layers = [name for one in reparameterized_layers(denoiser, fewer, CONVOLUTIONS) for name in one.layers]
    assert all(isinstance(denoiser.get_submodule(name), nn.Conv2d) for name in layers)
    assert reparameterized_layers(denoiser, fewer, Axes()) == ()


def test_what_nobody_quantizes_is_not_reparameterized() -> None:
    denoiser, _ = conditional()
    layers = {
        name for one in reparameterized_layers(denoiser, found_sites(denoiser), ALL) for name in one.layers
    }
    quantized = {s.module for s in found_sites(denoiser) if s.kind is SiteKind.WEIGHT and s.quantized}
    assert layers == quantized
    assert "conv_in" not in layers


def test_factors_of_other_layers_are_refused() -> None:
    denoiser, _ = conditional()
    found = found_sites(denoiser)
    choice = Choice("minmax", ALL, Bits.parse("w8a8"))
    with (
        pytest.raises(UserError, match="run reparameterize"),
        wrapped(denoiser, found, choice, CallContext(), 1, factors={"conv_out": torch.ones(32)}),
    ):
        pass
