"""Integer execution of a whole denoiser, from an artefact on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halftone
from halftone import artefact
from halftone.denoiser import denoiser_of
from halftone.errors import UserError
from halftone.layers import QuantizedLayer
from halftone.plan import Execution, Granularity, GroupPlan
from halftone.recipes import resolve
from halftone.runtime import choose, integer
from halftone.runtime.choose import Decision, Kernel
from halftone.runtime.layers import CodedLayer, IntegerAttnProcessor, IntegerLayer
from halftone.source import load_source
from quantized import GUIDANCE, PROMPTS, RESOLUTION, STEPS, Calibrated, calibrated, shared_artefact


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> tuple[Calibrated, Path]:
    return shared_artefact(tmp_path_factory, tiny_model_folder)


def call(pipeline: Any, index: int) -> Tensor:
    """The denoiser's output for a fixed input at one calibrated call."""
    generator = torch.Generator().manual_seed(index)
    denoiser = denoiser_of(pipeline)
    latents, text = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (20, 32)))
    with torch.inference_mode(), pipeline._halftone_context.at(index):
        return denoiser(latents, 500, encoder_hidden_states=text).sample


def close(found: Tensor, wanted: Tensor) -> bool:
    """Layers agree to float32; a value at a tie may take the next code, and a network carries that on."""
    return bool((found - wanted).pow(2).mean() <= 1e-2 * wanted.pow(2).mean())


def differences(pipeline: Any, simulated: Any, index: int) -> dict[str, float]:
    """Largest difference of the outputs of each integer layer and the simulated one for the same input, as a
    share of the largest output, in one call."""
    others = dict(denoiser_of(simulated).named_modules())
    found: dict[str, float] = {}

    def compare(name: str, args: Any, output: Tensor) -> None:
        with simulated._halftone_context.at(index):
            wanted = others[name](*args)
        found[name] = float((output - wanted).abs().max() / wanted.abs().max())

    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: compare(name, args, output))
        for name, module in denoiser_of(pipeline).named_modules()
        if isinstance(module, CodedLayer)
    ]
    call(pipeline, index)
    for hook in hooks:
        hook.remove()
    return found


def image(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
    size = {"height": RESOLUTION, "width": RESOLUTION}
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(3)
        return pipeline(PROMPTS[0], **size, **arguments, generator=generator).images


def test_an_integer_pipeline_gives_the_bits_of_the_simulated_one(made: tuple[Calibrated, Path]) -> None:
    simulated = halftone.load(made[1])
    pipeline = halftone.load(made[1], execution="integer")
    for index in range(2):
        assert torch.equal(call(pipeline, index), call(simulated, index))
    assert torch.equal(image(pipeline), image(simulated))


def test_nothing_quantized_is_in_memory_as_float(made: tuple[Calibrated, Path]) -> None:
    denoiser = denoiser_of(halftone.load(made[1], execution="integer"))
    modules = list(denoiser.modules())
    assert not [m for m in modules if isinstance(m, QuantizedLayer)]
    layers = [m for m in modules if isinstance(m, IntegerLayer)]
    assert len(layers) == sum(site.kind == "weight" for site in made[0].plan.quantized)
    assert all(layer.codes.dtype == torch.uint8 for layer in layers)
    floats = {name for name, _ in denoiser.named_parameters()}
    for site in made[0].plan.quantized:
        assert f"{site.module}.weight" not in floats
    products = [site for site in made[0].plan.quantized if site.kind == "probabilities"]
    assert sum(isinstance(m, IntegerAttnProcessor) for m in modules) == len(products)


def test_int8_and_reference_agree_layer_by_layer(made: tuple[Calibrated, Path]) -> None:
    pipeline = halftone.load(made[1], execution="integer")
    exact = halftone.load(made[1], execution="integer")
    for layer in denoiser_of(exact).modules():
        if isinstance(layer, IntegerLayer):
            layer.make, layer._products = integer._PRODUCTS[Kernel.REFERENCE], []
    seen: dict[str, Tensor] = {}
    pairs = zip(denoiser_of(pipeline).named_modules(), denoiser_of(exact).modules(), strict=True)
    compared = 0
    hooks = []
    for (name, fast), slow in pairs:
        if not isinstance(fast, IntegerLayer):
            continue
        assert isinstance(slow, IntegerLayer)

        def check(
            module: nn.Module, args: Any, output: Tensor, name: str = name, slow: IntegerLayer = slow
        ) -> None:
            nonlocal compared
            with pipeline._halftone_context.at(1), exact._halftone_context.at(1):
                wanted = slow(*args)
                assert isinstance(module, IntegerLayer)
                for product, oracle, (codes, affine) in zip(
                    module.products(), slow.products(), module.encoded(*args), strict=True
                ):
                    found = product.accumulate(codes, affine).double()
                    assert torch.equal(found, oracle.accumulate(codes, affine)), name
            assert (output - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
            seen[name] = output
            compared += 1

        hooks.append(fast.register_forward_hook(check))
    call(pipeline, 1)
    assert compared == len(seen) == len(hooks) > 40


@pytest.mark.parametrize(("bits", "recipe"), [("w8a10s8", "static"), ("w10a6", "minmax")])
def test_other_widths(bits: str, recipe: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    found = calibrated(tiny_model_folder, tmp_path / "state.safetensors", bits, recipe)
    artefact.write(tmp_path / "made", found.state, found.plan, load_source(tiny_model_folder))
    simulated = halftone.load(tmp_path / "made")
    pipeline = halftone.load(tmp_path / "made", execution="integer")
    wanted = call(simulated, 2)
    if bits.startswith("w8"):
        assert torch.equal(call(pipeline, 2), wanted)
    else:  # weights of 10 bits are summed in float64
        assert close(call(pipeline, 2), wanted)


def test_split_shortcuts_are_two_products(tmp_path: Path, tiny_model_folder: Path) -> None:
    found = calibrated(tiny_model_folder, tmp_path / "state.safetensors", recipe="qdiffusion")
    artefact.write(tmp_path / "made", found.state, found.plan, load_source(tiny_model_folder))
    pipeline = halftone.load(tmp_path / "made", execution="integer")
    split = [m for m in denoiser_of(pipeline).modules() if isinstance(m, IntegerLayer) and m.parts.split]
    assert torch.equal(call(pipeline, 0), call(halftone.load(tmp_path / "made"), 0))
    assert split
    assert all(len(layer.products()) == 2 for layer in split)


def test_aligned_groups_of_channels_are_a_product_each(tmp_path: Path, tiny_model_folder: Path) -> None:
    axes: dict[str, Any] = {"groups": 4, "group_layout": "aligned", "group_axis": "channel"}
    found = calibrated(tiny_model_folder, tmp_path / "state.safetensors", **axes, relaxing={"calls": [1]})
    artefact.write(tmp_path / "made", found.state, found.plan, load_source(tiny_model_folder))
    pipeline = halftone.load(tmp_path / "made", execution="integer")
    simulated = halftone.load(tmp_path / "made")
    modules = dict(denoiser_of(pipeline).named_modules())
    layers = {name: m for name, m in modules.items() if isinstance(m, IntegerLayer)}
    for index in range(2):  # relaxed codes of 10 bits the second time
        apart = differences(pipeline, simulated, index)
        assert apart.keys() == layers.keys()
        assert set(apart.values()) == {0.0}
        # q, k and v in groups are another matter: simulated, they are dequantized
        assert close(call(pipeline, index), call(simulated, index))
    counts = {len(layer.products()) for layer in layers.values()}
    assert counts == {1, 2, 4}, "16 channels a group at least; vectors stay whole"
    assert layers["mid_block.resnets.0.conv1"].parts.ends
    assert integer.execution_of(denoiser_of(pipeline)) is Execution.INTEGER
    decisions = choose.choose(found.plan, denoiser_of(load_source(tiny_model_folder).pipeline))
    assert not choose.fallbacks(decisions)


def test_groups_that_no_kernel_runs_are_listed(tiny_model_folder: Path, tmp_path: Path) -> None:
    found = calibrated(tiny_model_folder, tmp_path / "state.safetensors", groups=4, group_axis="channel")
    artefact.write(tmp_path / "made", found.state, found.plan, load_source(tiny_model_folder))
    pipeline = halftone.load(tmp_path / "made", execution="integer")
    assert close(call(pipeline, 0), call(halftone.load(tmp_path / "made"), 0))
    decisions = choose.choose(found.plan, denoiser_of(load_source(tiny_model_folder).pipeline))
    ((reason, listed),) = choose.fallbacks(decisions).items()
    assert reason == "simulated: no integer kernel for free groups of channels"
    assert set(listed) == set(integer.simulated_modules(denoiser_of(pipeline)))
    others = {name for name in decisions if name not in listed}
    assert "time_embedding.linear_1" in others
    # layers of vectors, which are not grouped, and attentions, whose groups any kernel takes
    assert all("time_emb" in name or name.endswith(("attn1", "attn2")) for name in others)


@pytest.mark.parametrize(
    ("axes", "groups", "reason"),
    [
        ({}, {"positions": 16, "position_calls": (0, 1, 2, 3, 4)}, None),
        ({}, {"positions": 16, "channels": 32, "position_calls": (0, 3)}, "free groups of channels at some"),
        ({}, {"channels": 32}, "free groups of channels"),
        ({}, None, "only calibration can tell"),
        ({"group_axis": "position"}, None, None),
        ({"group_axis": "channel"}, None, "free groups of channels"),
        ({"group_layout": "aligned"}, None, None),
        ({"group_layout": "aligned"}, {"positions": 16, "position_calls": (0,)}, None),
    ],
)
def test_which_groups_run_in_integers(
    axes: dict[str, str],
    groups: dict[str, Any] | None,
    reason: str | None,
    made: tuple[Calibrated, Path],
    tiny_model_folder: Path,
) -> None:
    plan = made[0].plan
    found = None if groups is None else GroupPlan(most=4, **groups)
    changed = {"granularity": Granularity.GROUP, "groups": found}
    kinds = ("input", "query", "key", "value")
    sites = tuple(s.model_copy(update=changed) if s.bits and s.kind in kinds else s for s in plan.sites)
    resolved = resolve("static", {"groups": 4, **axes})
    plan = plan.model_copy(update={"axes": resolved, "sites": sites})
    decisions = choose.choose(plan, denoiser_of(load_source(tiny_model_folder).pipeline))
    layers = {site.module for site in plan.quantized if site.kind == "input"}
    fallbacks = {name: d.reason for name, d in decisions.items() if d.reason is not None}
    assert fallbacks.keys() == (set() if reason is None else layers), "attentions take any groups"
    assert all(reason in found for found in fallbacks.values() if reason is not None and found is not None)


def test_positions_of_a_convolution_with_groups_stay_simulated(made: tuple[Calibrated, Path]) -> None:
    changed = {"granularity": Granularity.GROUP, "module": "conv"}
    pair = [s for s in made[0].plan.quantized if s.module == "mid_block.resnets.0.conv1"]
    sites = tuple(s.model_copy(update=changed if s.kind == "input" else {"module": "conv"}) for s in pair)
    axes = resolve("static", {"groups": 4, "group_axis": "position"})
    plan = made[0].plan.model_copy(update={"axes": axes, "sites": sites})
    denoiser = nn.ModuleDict({"conv": nn.Conv2d(64, 64, 3, groups=4)})
    (decision,) = choose.choose(plan, denoiser).values()
    assert decision == Decision(Kernel.SIMULATED, "a grouped input of a convolution that has groups itself")


def test_dynamic_ranges_stay_simulated_and_say_so(tmp_path: Path, tiny_model_folder: Path) -> None:
    found = calibrated(tiny_model_folder, tmp_path / "state.safetensors", time_axis="dynamic")
    artefact.write(tmp_path / "made", found.state, found.plan, load_source(tiny_model_folder))
    pipeline = halftone.load(tmp_path / "made", execution="integer")
    assert torch.equal(call(pipeline, 0), call(halftone.load(tmp_path / "made"), 0))
    decisions = choose.choose(found.plan, denoiser_of(load_source(tiny_model_folder).pipeline))
    assert {d.kernel for d in decisions.values()} == {Kernel.SIMULATED}
    assert choose.executed(found.plan, decisions).execution is Execution.SIMULATED
    assert all("dynamic" in reason for reason in choose.fallbacks(decisions))


def test_a_site_of_an_unknown_kind_is_simulated(
    made: tuple[Calibrated, Path], tiny_model_folder: Path
) -> None:
    plan = made[0].plan
    odd = [
        s.model_copy(update={"granularity": Granularity.ROW}) if s.kind == "query" else s for s in plan.sites
    ]
    changed = plan.model_copy(update={"sites": tuple(odd)})
    decisions = choose.choose(changed, denoiser_of(load_source(tiny_model_folder).pipeline))
    resolved = choose.executed(changed, decisions)
    assert {s.execution for s in resolved.quantized if s.kind == "key"} == {Execution.SIMULATED}
    assert {s.execution for s in resolved.quantized if s.kind == "weight"} == {Execution.INTEGER}
    assert all("query" in (s.fallback or "") for s in resolved.quantized if s.kind == "value")
    assert resolved.execution is Execution.SIMULATED
    whole = choose.executed(plan, choose.choose(plan, denoiser_of(load_source(tiny_model_folder).pipeline)))
    assert whole.execution is Execution.INTEGER


def test_scales_survive_a_cast_and_products_a_copy(made: tuple[Calibrated, Path]) -> None:
    pipeline = halftone.load(made[1], execution="integer")
    before = call(pipeline, 0)
    denoiser = denoiser_of(pipeline)
    again = copy.deepcopy(next(m for m in denoiser.modules() if isinstance(m, IntegerLayer)))
    assert again.products()
    pipeline.to(torch.bfloat16)
    layer = next(m for m in denoiser.modules() if isinstance(m, IntegerLayer))
    assert layer.weight_scale.dtype == layer.input.scale.dtype == torch.float32
    pipeline.to(torch.float32)
    assert torch.allclose(call(pipeline, 0), before, atol=0.1 * float(before.abs().max()))


def test_refusals(made: tuple[Calibrated, Path]) -> None:
    with pytest.raises(UserError, match="runs simulated or integer"):
        halftone.load(made[1], execution="float")
    with pytest.raises(UserError, match="runs on the CPU"):
        halftone.load(made[1], execution="integer", device="cuda")
