"""Sites and blocks of the denoisers that Halftone is made for."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel, UNet2DModel

from halftone.denoiser import (
    BlockKind,
    SiteKind,
    blocks,
    concat_shortcuts,
    denoiser_of,
    modules_in_order,
    sites,
)
from halftone.errors import UserError
from halftone.policies import Shortcut
from halftone.settings import Protocol

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SD1: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module")
def sd1() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**SD1)


@pytest.fixture(scope="module")
def sdxl() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL)


def test_sites_of_stable_diffusion_1(sd1: UNet2DConditionModel) -> None:
    found = sites(sd1)
    layers = Counter(site.module_type for site in found if site.kind is SiteKind.WEIGHT)
    assert layers == {"Linear": 184, "Conv2d": 98}
    quantized = Counter(site.kind for site in found if site.quantized)
    assert quantized[SiteKind.PROBABILITIES] == 32
    assert sum(quantized[kind] for kind in (SiteKind.QUERY, SiteKind.KEY, SiteKind.VALUE)) == 96
    assert quantized[SiteKind.INPUT] == quantized[SiteKind.WEIGHT] == 280
    assert {site.module for site in found if not site.quantized} == {"conv_in", "conv_out"}
    assert all(site.float_reason for site in found if site.module == "conv_in")
    assert len({site.name for site in found}) == len(found)


def test_sites_of_sdxl(sdxl: UNet2DConditionModel) -> None:
    layers = Counter(site.module_type for site in sites(sdxl) if site.kind is SiteKind.WEIGHT)
    assert layers == {"Linear": 743, "Conv2d": 51}
    assert "add_embedding.linear_1.input" in {site.name for site in sites(sdxl)}


@pytest.mark.parametrize(
    ("recipe", "conv_in", "attention"),
    [("pcr", False, False), ("dgq", False, True), ("qdiffusion", True, True)],
)
def test_protocol_paper_takes_the_sites_of_the_authors(
    sd1: UNet2DConditionModel, recipe: str, conv_in: bool, attention: bool
) -> None:
    quantized = {site.name for site in sites(sd1, Protocol.PAPER, recipe) if site.quantized}
    assert ("conv_in.weight" in quantized) is conv_in
    assert ("mid_block.attentions.0.transformer_blocks.0.attn1.probabilities" in quantized) is attention
    with pytest.raises(UserError, match="minmax"):
        sites(sd1, Protocol.PAPER, "minmax")


def test_concatenated_shortcuts_split_where_the_skip_begins(
    sd1: UNet2DConditionModel, sdxl: UNet2DConditionModel
) -> None:
    splits = [1280, 1280, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320]
    found = concat_shortcuts(sd1)
    assert list(found.values()) == splits
    assert list(found)[6] == "up_blocks.2.resnets.0.conv_shortcut"
    assert list(concat_shortcuts(sdxl).values()) == [1280, 1280, 1280, 1280, 640, 640, 640, 320, 320]


def test_blocks_cover_every_layer_once(sd1: UNet2DConditionModel, sdxl: UNet2DConditionModel) -> None:
    for denoiser, resnets, transformers in ((sd1, 22, 16), (sdxl, 17, 70)):
        found = blocks(denoiser)
        kinds = Counter(block.kind for block in found)
        assert (kinds[BlockKind.RESNET], kinds[BlockKind.TRANSFORMER]) == (resnets, transformers)
        layers = [name for block in found for name in block.layers]
        quantized = [s.module for s in sites(denoiser) if s.quantized and s.kind is SiteKind.WEIGHT]
        assert sorted(layers) == sorted(quantized)
        assert len(layers) == len(set(layers))
    both_ends = [block.name for block in blocks(sd1, boundary=True)]
    assert both_ends[-1] == "conv_out"
    assert "conv_in" in both_ends


@pytest.mark.parametrize("kind", ["conditional", "unconditional"])
def test_order_is_that_of_the_forward_pass(
    kind: str, tiny_pipeline: Any, tiny_unconditional: UNet2DModel
) -> None:
    if kind == "conditional":
        denoiser = copy.deepcopy(tiny_pipeline.unet)
        inputs: dict[str, Any] = {"encoder_hidden_states": torch.zeros(1, 5, 32)}
    else:
        denoiser, inputs = tiny_unconditional, {}
    ran: list[str] = []
    wanted = [block.name for block in blocks(denoiser, boundary=True)]
    for name in wanted:
        denoiser.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        denoiser(torch.zeros(1, denoiser.config.in_channels, 8, 8), 1, **inputs)
    assert wanted == ran


def test_unconditional_and_transformer_denoisers(tiny_unconditional: UNet2DModel) -> None:
    found = sites(tiny_unconditional)
    assert sum(site.kind is SiteKind.PROBABILITIES for site in found) == 4  # one down, one middle, two up
    with torch.device("meta"):
        pixart = PixArtTransformer2DModel(num_layers=2)
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    assert {s.module for s in sites(pixart) if not s.quantized} == {"pos_embed.proj", "proj_out"}
    assert sum(site.kind is SiteKind.PROBABILITIES and site.quantized for site in sites(pixart)) == 4
    assert [block.kind for block in blocks(pixart)].count(BlockKind.TRANSFORMER) == 2
    joint = [site for site in sites(flux) if site.kind is SiteKind.PROBABILITIES]
    assert len(joint) == 2
    assert all("FluxAttnProcessor" in (site.float_reason or "") for site in joint)


@pytest.mark.parametrize("by_resnets", [False, True])
def test_shortcuts_of_an_unconditional_unet_split_where_it_concatenates(
    by_resnets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    resnet = "resnet" if by_resnets else "conv"
    denoiser = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16, 24),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"),
        downsample_type=resnet,
        upsample_type=resnet,
    )
    joined: list[int] = []
    original = torch.cat

    def cat(parts: Any, dim: int = 0) -> torch.Tensor:
        if dim == 1 and parts[0].ndim == 4:
            joined.append(parts[0].shape[1])
        return original(parts, dim)

    monkeypatch.setattr(torch, "cat", cat)
    with torch.no_grad():
        denoiser(torch.zeros(1, 3, 8, 8), 1)
    assert list(concat_shortcuts(denoiser).values()) == joined == [24, 24, 24, 16, 16, 8]


def test_shortcuts_that_cannot_be_told_are_refused() -> None:
    kinds = {"down_block_types": ("KDownBlock2D",) * 2, "up_block_types": ("KUpBlock2D",) * 2}
    with torch.device("meta"):
        denoiser = UNet2DModel(block_out_channels=(64, 64), attention_head_dim=8, **kinds)
    with pytest.raises(UserError, match="axis shortcut to whole"):
        sites(denoiser, shortcut=Shortcut.SPLIT)


def test_attention_that_stands_alone_is_one_unit(tiny_unconditional: UNet2DModel) -> None:
    alone = [block for block in blocks(tiny_unconditional) if block.kind is BlockKind.ATTENTION]
    assert [block.name for block in alone] == [
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    ]
    assert [name.rpartition("attentions.0.")[2] for name in alone[0].layers] == [
        *("to_q", "to_k", "to_v", "to_out.0")
    ]


def test_a_pipeline_without_a_denoiser_is_refused() -> None:
    with pytest.raises(UserError, match="neither unet nor transformer"):
        denoiser_of(object())


def test_layers_are_leaves(tiny_pipeline: Any) -> None:
    names = [name for name, _ in modules_in_order(tiny_pipeline.unet)]
    assert len(names) == len(set(names)) == len(list(tiny_pipeline.unet.named_modules())) - 1
