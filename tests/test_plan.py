"""The plan: every site accounted for, sizes and operations by hand, JSON that comes back the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from halftone.axes import Axes
from halftone.denoiser import SiteKind, sites
from halftone.errors import UserError
from halftone.files import read_json, write_json
from halftone.macs import count
from halftone.plan import Execution, Plan, describe
from halftone.planner import make_plan
from halftone.policies import TimeAxis
from halftone.quantizers.bits import Bits
from halftone.quantizers.packing import packed_size
from halftone.settings import Protocol

CALLS = 4


def plan_of(denoiser: nn.Module, bits: str = "w4a8", axes: Axes | None = None, **options: object) -> Plan:
    settings: dict = {"recipe": "minmax", "protocol": Protocol.EQUAL, "calls": CALLS, **options}
    width = Bits.parse(bits)
    return make_plan(denoiser, sites(denoiser, bits=width), axes or Axes(), width, **settings)


@pytest.fixture(scope="module")
def unet(tiny_pipeline: StableDiffusionPipeline) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(tiny_pipeline.unet.config)


def test_every_site_is_quantized_or_has_a_reason(unet: UNet2DConditionModel) -> None:
    plan = plan_of(unet, "w4a8s6")
    assert [site.name for site in plan.sites] == [site.name for site in sites(unet)]
    assert {site.module for site in plan.left_float} == {"conv_in", "conv_out"}
    assert all(site.float_reason and site.execution is Execution.FLOAT for site in plan.left_float)
    widths = {kind: {site.bits for site in plan.quantized if site.kind == kind} for kind in SiteKind}
    assert widths == {kind: {8} for kind in SiteKind} | {SiteKind.WEIGHT: {4}, SiteKind.PROBABILITIES: {6}}
    assert sum(number for _, _, number in plan.counts()) == len(plan.sites)
    assert sum(len(names) for _, names in plan.float_list()) == len(plan.left_float)


def test_first_and_last_layer_of_a_width_of_their_own(unet: UNet2DConditionModel) -> None:
    plan = plan_of(unet, "w4a6b8", Axes(time_axis=TimeAxis.PER_CALL))
    assert not plan.left_float
    ends = {site.bits for site in plan.sites if site.module in ("conv_in", "conv_out")}
    between = {site.bits for site in plan.sites if site.module not in ("conv_in", "conv_out")}
    assert (ends, between) == ({8}, {4, 6})
    assert plan.columns()["boundary_bits"] == 8
    assert plan_of(unet, "w4a6").columns()["boundary_bits"] is None
    weights = {m: unet.get_submodule(m).weight.numel() for m in ("conv_in", "conv_out")}
    assert plan.sizes.packed == plan_of(unet, "w4a6").sizes.packed + sum(weights.values())


@pytest.mark.parametrize("text", ["w4a4", "w4a4s8", "w4a4b8", "w4a4s8b6"])
def test_widths_are_read_and_said_alike(text: str) -> None:
    assert str(Bits.parse(text)) == text


@pytest.mark.parametrize("text", ["w4a4b1", "w4a4b17", "w4a4b", "w4a4b8s8"])
def test_widths_that_there_are_not(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Bits.parse(text)


def test_sizes_by_hand(unet: UNet2DConditionModel) -> None:
    axes = Axes(time_axis=TimeAxis.PER_CALL)
    plan = plan_of(unet, "w4a8", axes)
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    quantized = [m.weight for n, m in layers.items() if n not in ("conv_in", "conv_out")]
    channels = sum(weight.shape[0] for weight in quantized)
    activations = sum(site.elements is None for site in plan.quantized)
    rest = sum(p.numel() for p in unet.parameters()) - sum(weight.numel() for weight in quantized)
    assert plan.sizes.packed == sum(packed_size(weight.numel(), 4) for weight in quantized)
    assert plan.sizes.parameters == (channels + CALLS * activations) * 5
    assert plan.sizes.left_float == 4 * rest
    half = plan_of(unet, "w4a8", axes, float_bits=16)
    assert half.sizes.original * 2 == plan.sizes.original
    assert half.sizes.ratio < plan.sizes.ratio


@pytest.mark.parametrize("bits", [2, 3, 8, 9, 16])
def test_packed_bytes_are_those_of_the_packer(unet: UNet2DConditionModel, bits: int) -> None:
    plan = plan_of(unet, f"w{bits}a8")
    assert plan.sizes.packed == sum(packed_size(s.elements or 0, bits) for s in plan.quantized if s.elements)


def test_bit_operations_fall_with_either_width(unet: UNet2DConditionModel) -> None:
    macs = count(unet, text_tokens=32)
    assert macs is not None

    def operations(bits: str) -> int:
        found = plan_of(unet, bits, macs=macs).bit_operations
        assert found is not None
        assert found.original == 2 * macs.total * 32 * 32
        return found.quantized

    edges = macs.layers["conv_in"] + macs.layers["conv_out"]
    inner = macs.total - edges
    assert operations("w8a8") == 2 * (inner * 64 + edges * 1024)
    products = sum(macs.attention.values())
    assert operations("w4a8") == 2 * ((inner - 2 * products) * 32 + 2 * products * 64 + edges * 1024)
    assert operations("w8a8s4") == operations("w8a8") - 2 * products * 32
    assert plan_of(unet).bit_operations is None


def test_macs_of_stable_diffusion_are_the_published_ones() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    macs = count(unet)
    assert macs is not None
    assert macs.total == pytest.approx(401.9e9, rel=2e-3)  # DGQ, 823 T bit operations at 32 x 32 bits
    assert sum(macs.layers.values()) == pytest.approx(338.9e9, rel=2e-3)


def test_macs_leave_the_denoiser_as_it_was(tiny_pipeline: StableDiffusionPipeline) -> None:
    unet = tiny_pipeline.unet
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    small, large = count(unet, latent_size=8, text_tokens=32), count(unet, latent_size=16, text_tokens=32)
    assert small is not None
    assert large is not None
    assert small.layers["conv_in"] * 4 == large.layers["conv_in"]
    assert all(not module._forward_hooks for module in unet.modules())
    assert all(
        value.device.type == "cpu" and value.equal(before[n]) for n, value in unet.state_dict().items()
    )


def test_json_comes_back_the_same(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    plan = plan_of(unet, macs=count(unet, text_tokens=32))
    plan.save(tmp_path / "a.json")
    assert Plan.load(tmp_path / "a.json") == plan
    plan_of(unet, macs=count(unet, text_tokens=32)).save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_damaged_plan_is_refused_by_name(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    plan_of(unet).save(tmp_path / "plan.json")
    content = read_json(tmp_path / "plan.json")
    content["sites"][3]["bitz"] = 4
    write_json(tmp_path / "plan.json", content)
    with pytest.raises(UserError, match=r"plan\.json: not a plan \(sites\.3\.bitz"):
        Plan.load(tmp_path / "plan.json")


def test_columns_and_words(unet: UNet2DConditionModel) -> None:
    plan = plan_of(unet, "w4a6s8", Axes(time_axis=TimeAxis.PER_CALL))
    columns = plan.columns()
    assert (columns["weight_bits"], columns["act_bits"], columns["softmax_bits"]) == (4, 6, 8)
    assert 6 < columns["avg_act_bits"] < 6.5
    assert (columns["float_sites"], columns["denoiser_calls"]) == (4, CALLS)
    words = {describe(site) for site in plan.sites}
    assert words == {
        "float",
        "4-bit affine, per channel",
        "6-bit affine, per tensor, per call",
        "8-bit affine, zero point 0, per tensor, per call",
    }
