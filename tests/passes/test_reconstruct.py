"""Block reconstruction as a whole, on a tiny conditional U-Net with random weights."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from halftone.axes import Axes
from halftone.denoiser import CallContext, sites
from halftone.errors import UserError
from halftone.layers import wrap
from halftone.passes import reconstruct as reconstruct_module
from halftone.passes.reconstructed import Reconstructed, load
from halftone.passes.schedule import SCHEDULES
from halftone.policies import Range, Rounding, UnitInput
from halftone.quantizers.affine import dequantize
from halftone.quantizers.bits import Bits
from halftone.settings import Budget, Reconstruction
from halftone.trajectory import Trajectory
from reconstruction import reconstruct

AXES = Axes(weight_range=Range.MINMAX, rounding=Rounding.ADAROUND)
BITS = Bits.parse("w4a8")
SMOKE = Reconstruction(budget=Budget.SMOKE, batch_size=4)
RESNET = "down_blocks.1.resnets.0"
TRANSFORMER = "down_blocks.1.attentions.0.transformer_blocks.0"
LAYER = "down_blocks.1.attentions.0.proj_out"


@pytest.fixture
def denoiser() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )


@pytest.fixture
def trajectory() -> Trajectory:
    """Three calls, four prompts, guided."""
    random = torch.Generator().manual_seed(1)
    return Trajectory(
        latents=torch.randn(3, 4, 4, 8, 8, generator=random),
        timesteps=torch.tensor([900, 500, 100]),
        noise_levels=torch.tensor([10.0, 1.0, 0.1]),
        conditions={"encoder_hidden_states": torch.randn(4, 5, 8, generator=random)},
        unconditions={"encoder_hidden_states": torch.randn(1, 5, 8, generator=random)},
        guided=True,
    )


def layers_in(denoiser: torch.nn.Module, *units: str) -> list[str]:
    """Names of the Linear and Conv2d of these units."""
    return [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        and any(name == unit or name.startswith(unit + ".") for unit in units)
    ]


def same(one: Reconstructed, other: Reconstructed) -> bool:
    tensors = [[t for weight in found.weights.values() for t in weight] for found in (one, other)]
    return one.units == other.units and all(torch.equal(*pair) for pair in zip(*tensors, strict=True))


def test_error_at_four_bits_is_lower_than_with_nearest_rounding(
    denoiser: UNet2DConditionModel, trajectory: Trajectory, tmp_path: Path
) -> None:
    modules = layers_in(denoiser, RESNET, TRANSFORMER, LAYER)
    settings = Reconstruction(budget=Budget.FAST, batch_size=16)

    found = reconstruct(denoiser, trajectory, AXES, BITS, settings, 0, tmp_path, modules)

    assert [unit.name for unit in found.units] == [RESNET, TRANSFORMER, LAYER]
    assert statistics.median(unit.ratio for unit in found.units) > 1.5
    assert max(unit.polarisation for unit in found.units) < 0.02


def test_rows_whose_weights_are_learned_alike_share_them(
    denoiser: UNet2DConditionModel, trajectory: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = layers_in(denoiser, RESNET, LAYER)
    shared = tmp_path / "units"

    def run(name: str, axes: Axes, bits: str, how: Reconstruction = SMOKE) -> Reconstructed:
        folder = tmp_path / name
        return reconstruct(
            denoiser, trajectory, axes, Bits.parse(bits), how, 0, folder, modules, shared=shared
        )

    one = run("one", AXES, "w4a8")
    learned: list[object] = []
    original = reconstruct_module._Work._learn
    monkeypatch.setattr(
        reconstruct_module._Work, "_learn", lambda *given: (learned.append(given), original(*given))[1]
    )
    activations = AXES.model_copy(update={"activation_range": Range.LP})
    assert same(one, run("two", activations, "w4a5"))
    assert same(one, run("in less memory", AXES, "w4a8", SMOKE.model_copy(update={"cache_mib": 16})))
    assert not learned
    run("three", AXES, "w3a8")
    assert len(learned) == 2
    assert not any(list((tmp_path / name).glob("unit-*")) for name in ("one", "two", "three"))


def test_the_first_layer_is_learned_at_its_own_width(
    denoiser: UNet2DConditionModel, trajectory: Trajectory, tmp_path: Path
) -> None:
    modules = ["conv_in", LAYER]
    found = reconstruct(denoiser, trajectory, AXES, Bits.parse("w2a8b6"), SMOKE, 0, tmp_path, modules)
    assert int(found.weights[LAYER].codes.max()) == 3
    assert 3 < int(found.weights["conv_in"].codes.max()) <= 63


def test_codes_are_those_that_make_the_error_reported(
    denoiser: UNet2DConditionModel, trajectory: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first layer to run, whose inputs are those of full precision, computed without our hooks."""
    name = "time_embedding.linear_1"
    every_sample = dataclasses.replace(SCHEDULES[Budget.SMOKE], samples=1024)
    monkeypatch.setitem(SCHEDULES, Budget.SMOKE, every_sample)
    found = reconstruct(denoiser, trajectory, AXES, BITS, SMOKE, 0, tmp_path, [name])
    weight = found.weights[name]
    layer = denoiser.get_submodule(name)

    given = torch.cat([denoiser.time_proj(t[None]) for t in trajectory.timesteps])
    with torch.no_grad():
        error = layer.weight - dequantize(weight.codes, weight.params(BITS.weight))
        mse = (given @ error.T).square().mean()

    assert weight.codes.dtype == torch.uint8
    assert found.units[0].mse_after == pytest.approx(float(mse), rel=1e-4)
    assert float((error.abs() / weight.scale).max()) < 1.001  # one step below or above


def test_learning_goes_on_after_an_interruption_bit_for_bit(
    denoiser: UNet2DConditionModel, trajectory: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = layers_in(denoiser, "time_embedding", RESNET, TRANSFORMER, LAYER)
    run = (denoiser, trajectory, AXES, BITS, SMOKE, 0)
    whole = reconstruct(*run, tmp_path / "whole", modules)

    learn, learned = reconstruct_module.learn, []

    def killed_in_the_third(*args: Any) -> Any:
        learned.append(args)
        if len(learned) == 3:
            raise KeyboardInterrupt
        return learn(*args)

    monkeypatch.setattr(reconstruct_module, "learn", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(*run, tmp_path / "parts", modules)
    resumed = reconstruct(*run, tmp_path / "parts", modules)

    assert len(whole.units) == 5
    assert len(learned) == 3 + 3  # two were kept, the third was begun again
    assert same(resumed, whole)
    for name, found in (("a", whole), ("b", resumed)):
        found.save(tmp_path / name, {"halftone": "{}"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert not list((tmp_path / "parts").glob("cache-*"))


def test_units_of_another_reconstruction_are_not_taken_over(
    denoiser: UNet2DConditionModel, trajectory: Trajectory, tmp_path: Path
) -> None:
    modules = [LAYER]
    reconstruct(denoiser, trajectory, AXES, Bits.parse("w3a8"), SMOKE, 0, tmp_path / "used", modules)

    second = reconstruct(denoiser, trajectory, AXES, BITS, SMOKE, 0, tmp_path / "used", modules)

    assert same(second, reconstruct(denoiser, trajectory, AXES, BITS, SMOKE, 0, tmp_path / "new", modules))
    other_seed = reconstruct(denoiser, trajectory, AXES, BITS, SMOKE, 1, tmp_path / "used", modules)
    assert other_seed.units != second.units


def test_denoiser_is_handed_back_as_it_was(
    denoiser: UNet2DConditionModel, trajectory: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser.train()
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    modules = layers_in(denoiser, "time_embedding", LAYER)

    def unchanged() -> bool:
        flags = denoiser.training and all(p.requires_grad for p in denoiser.parameters())
        hooks = any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())
        return (
            flags and not hooks and all(torch.equal(denoiser.state_dict()[k], v) for k, v in before.items())
        )

    reconstruct(denoiser, trajectory, AXES, BITS, SMOKE, 0, tmp_path / "a", modules)
    assert unchanged()

    def fail(*args: Any) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(reconstruct_module, "learn", fail)
    with pytest.raises(RuntimeError, match="stop"):
        reconstruct(denoiser, trajectory, AXES, BITS, SMOKE, 0, tmp_path / "b", modules)
    assert unchanged()


def test_wrapped_denoiser_gives_the_same_codes(
    denoiser: UNet2DConditionModel, trajectory: Trajectory, tmp_path: Path
) -> None:
    denoiser.set_attn_processor(AttnProcessor())  # what a wrapped denoiser computes bit for bit
    modules = layers_in(denoiser, RESNET, LAYER)
    plain = reconstruct(denoiser, trajectory, AXES, BITS, SMOKE, 0, tmp_path / "plain", modules)

    wrap(denoiser, sites(denoiser), BITS, 1, CallContext())
    wrapped = reconstruct(denoiser, trajectory, AXES, BITS, SMOKE, 0, tmp_path / "wrapped", modules)

    assert same(wrapped, plain)


@pytest.mark.parametrize("unit_input", UnitInput)
def test_units_see_the_prefix_their_recipe_asks_for(
    denoiser: UNet2DConditionModel,
    trajectory: Trajectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unit_input: UnitInput,
) -> None:
    axes = AXES.model_copy(update={"unit_input": unit_input})
    seen: list[tuple[Tensor, list[Tensor]]] = []
    learn = reconstruct_module.learn

    def watch(unit: Any, params: Any, data: Any, *rest: Any) -> Any:
        arguments, targets = data.batch(range(data.count))
        seen.append((arguments[0][0], targets))
        return learn(unit, params, data, *rest)

    monkeypatch.setattr(reconstruct_module, "learn", watch)
    modules = layers_in(denoiser, RESNET, LAYER)
    reconstruct(denoiser, trajectory, axes, BITS, SMOKE, 0, tmp_path, modules)

    (_, first_target), (second_input, second_target) = seen
    conv = denoiser.get_submodule(LAYER)
    with torch.no_grad():
        hands_on_full_precision = torch.allclose(conv(second_input), second_target[0], atol=1e-5)
    assert hands_on_full_precision is (unit_input is UnitInput.FULL_PRECISION)
    assert len(first_target) == 1


def test_value_that_is_not_finite_is_the_users_to_know(
    denoiser: UNet2DConditionModel, trajectory: Trajectory, tmp_path: Path
) -> None:
    conv = denoiser.get_submodule(f"{RESNET}.conv1")
    conv.bias.data.fill_(float("inf"))
    with pytest.raises(UserError, match=RESNET):
        reconstruct(denoiser, trajectory, AXES, BITS, SMOKE, 0, tmp_path, [f"{RESNET}.conv1"])


def test_layer_that_never_runs_is_rounded_to_nearest(
    denoiser: UNet2DConditionModel, trajectory: Trajectory, tmp_path: Path
) -> None:
    denoiser.add_module("spare", torch.nn.Linear(2, 2, bias=False))
    denoiser.get_submodule("spare").weight.data = torch.tensor([[1.5, 0.4], [-0.5, 0.25]])

    found = reconstruct(denoiser, trajectory, AXES, BITS, SMOKE, 0, tmp_path, ["spare", LAYER])

    assert [unit.name for unit in found.units] == [LAYER]
    assert found.weights["spare"].codes.tolist() == [[15, 4], [0, 15]]
    assert list(found.weights) == ["spare", LAYER]


def test_result_survives_its_file(
    tmp_path: Path, denoiser: UNet2DConditionModel, trajectory: Trajectory
) -> None:
    found = reconstruct(denoiser, trajectory, AXES, BITS, SMOKE, 0, tmp_path / "c", [LAYER, "conv_out"])
    found.save(tmp_path / "x.safetensors", {"halftone": "provenance"})

    again, metadata = load(tmp_path / "x.safetensors")

    assert metadata == {"halftone": "provenance"}
    assert again.units == found.units
    assert {k: [t.tolist() for t in v] for k, v in again.weights.items()} == {
        k: [t.tolist() for t in v] for k, v in found.weights.items()
    }


def test_file_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors at all")
    with pytest.raises(UserError, match="not a file of reconstructed weights"):
        load(tmp_path / "text.safetensors")
