"""Reparameterized rows: from the verbs to an artefact, and run from it in both executions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import halftone
from halftone.artefact import artefact_sha256, load, tensors, verify
from halftone.artefact.manifest import write_manifest
from halftone.cli import main
from halftone.denoiser import denoiser_of
from halftone.errors import UserError
from halftone.factors import Balance, LayerBalance, balance, drawn
from halftone.files import read_json
from halftone.plan import Division, Execution, Plan
from halftone.recipes import resolve
from halftone.runtime import integer
from halftone.source import load_source
from halftone.steps.calibrate import calibrate
from halftone.steps.choice import choose
from halftone.steps.record import record
from halftone.steps.reparameterize import reparameterize
from without_text import tiny

PROMPTS = ["a small red star on a plain grey background", "a large blue ring on a plain grey background"]
HOW: dict[str, Any] = {"steps": 3, "guidance": 3.0, "resolution": 16, "budget": "smoke", "batch_size": 2}
TCR = {"reparameterization": "tcr"}
ALL = {**TCR, "reparameterization_layers": "all"}
TENSORS = f"unet/{tensors.FILE}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without text, which is smaller."""
    return tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def artefact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reparameterized") / "artefact"
    how: dict[str, Any] = {"n_prompts": 2, "steps": 2, "budget": "smoke", "batch_size": 2}
    return halftone.quantize(str(model), "static", None, output, bits="w4a8", axes=ALL, **how)


def output_of(pipeline: Any, call: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(call)
    denoiser: Any = denoiser_of(pipeline)
    size = denoiser.config.sample_size
    latents = torch.randn(2, denoiser.config.in_channels, size, size, generator=generator)
    text = {"encoder_hidden_states": torch.randn(2, 20, 32, generator=generator)}
    given = text if hasattr(pipeline, "tokenizer") else {}
    context = getattr(pipeline, "_halftone_context", None)
    with torch.inference_mode():
        if context is None:
            return denoiser(latents, 500, **given).sample
        with context.at(call):
            return denoiser(latents, 500, **given).sample


def executions_agree(folder: Path) -> bool:
    simulated, whole = load(folder), load(folder, execution="integer")
    assert integer.execution_of(denoiser_of(whole)) is Execution.INTEGER
    return all(torch.equal(output_of(whole, call), output_of(simulated, call)) for call in range(2))


def test_the_plan_says_where_every_input_is_divided(artefact: Path) -> None:
    plan = Plan.load(artefact / "plan.json")
    inputs = {site.name: site.division for site in plan.quantized if site.kind == "input"}
    assert set(inputs.values()) == set(Division)
    assert inputs["mid_block.attentions.0.to_q.input"] is Division.FOLDED
    assert inputs["mid_block.attentions.0.to_out.0.input"] is Division.FOLDED
    assert inputs["mid_block.resnets.0.conv1.input"] is Division.QUANTIZE_STEP
    assert not [site for site in plan.sites if site.kind != "input" and site.division]
    assert all(check.passed for check in verify(artefact))


def test_executions_give_the_same_bits_and_nothing_falls_back(artefact: Path) -> None:
    assert executions_agree(artefact)


@pytest.mark.parametrize(
    ("recipe", "axes"),
    [
        ("qdiffusion", ALL),  # halves of shortcuts, learned scales
        ("static", {**TCR, "rounding": "nearest", "relaxing": "auto"}),  # calls that a measurement chooses
        ("minmax", {"reparameterization": "smooth", "reparameterization_layers": "all"}),
    ],
)
def test_other_recipes_compose(model: Path, tmp_path: Path, recipe: str, axes: dict[str, Any]) -> None:
    how: dict[str, Any] = {"n_prompts": 2, "steps": 2, "budget": "smoke", "batch_size": 2}
    made = halftone.quantize(str(model), recipe, None, tmp_path / "q", bits="w4a6", axes=axes, **how)
    assert executions_agree(made)


def test_at_sixteen_bits_it_is_the_model_that_it_was(tiny_model_folder: Path, tmp_path: Path) -> None:
    axes = {**ALL, "time_axis": "per_call"}
    made = halftone.quantize(
        str(tiny_model_folder), "minmax", PROMPTS, tmp_path / "q", bits="w16a16", axes=axes, **HOW
    )
    assert all(call["simulated_to_full"] < 1e-3 for call in read_json(made / "parity.json")["calls"])


def test_groups_are_of_what_was_divided(model: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"n_prompts": 2, "steps": 2, "bits": "w16a16"}
    axes = {**ALL, "time_axis": "per_call", "groups": 4}
    made = halftone.quantize(str(model), "minmax", None, tmp_path / "q", axes=axes, **how)
    assert Plan.load(made / "plan.json").axes.groups == 4
    assert all(call["simulated_to_full"] < 1e-3 for call in read_json(made / "parity.json")["calls"])


def test_convolutions_alone_are_the_default(model: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"n_prompts": 2, "steps": 2, "bits": "w8a8"}
    axes = {**TCR, "time_axis": "dynamic"}
    made = halftone.quantize(str(model), "minmax", None, tmp_path / "conv", axes=axes, **how)
    divided = {s.module_type for s in Plan.load(made / "plan.json").quantized if s.division is not None}
    assert divided == {"Conv2d"}
    wanted = output_of(load_source(model).pipeline)
    assert (output_of(load(made)) - wanted).abs().max() < 0.1 * wanted.abs().max()
    path = made / TENSORS
    state = load_file(path)
    state[tensors.DIVISOR] = torch.ones_like(state[tensors.DIVISOR])
    save_file(state, path, metadata={"format": "pt"})
    write_manifest(made)
    assert (output_of(load(made)) - wanted).abs().max() > 0.1 * wanted.abs().max()


def test_the_verbs_make_the_artefact_that_quantize_makes(
    artefact: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, factors = str(tmp_path / "data.safetensors"), str(tmp_path / "r/factors.safetensors")
    weights, state = str(tmp_path / "weights.safetensors"), str(tmp_path / "state.safetensors")
    sampler = ["--steps", "2", "--batch-size", "2", "--n-prompts", "2"]
    axes = '{"reparameterization": "tcr", "reparameterization_layers": "all"}'
    row = ["--data", data, "--recipe", "static", "--bits", "w4a8", "--axes", axes]
    assert main(["calibration-data", str(model), *sampler, "-o", data]) == 0
    assert main(["reconstruct", str(model), *row, "-o", weights]) == 2
    assert "add --factors" in capsys.readouterr().err
    assert main(["reparameterize", str(model), *row, "--batch-size", "2", "-o", str(tmp_path / "r")]) == 0
    smoke = ["--budget", "smoke", "--factors", factors]
    assert main(["reconstruct", str(model), *row, *smoke, "--batch-size", "32", "-o", weights]) == 0
    assert "times lower than rounded to nearest" in capsys.readouterr().out
    with_weights = ["--factors", factors, "--weights", weights]
    assert main(["calibrate", str(model), *row, *with_weights, "--batch-size", "2", "-o", state]) == 0
    assert main(["analyze", state, "-o", str(tmp_path / "analysis")]) == 0
    made, plan = tmp_path / "artefact", str(tmp_path / "analysis/plan.json")
    assert main(["export", str(model), "--calibration", state, "--plan", plan, "-o", str(made)]) == 0
    assert artefact_sha256(made) == artefact_sha256(artefact)

    other = ["--data", data, "--recipe", "static", "--bits", "w4a6", "--axes", axes]
    assert main(["calibrate", str(model), *other, *with_weights, "-o", state]) == 2
    assert "was made for another" in capsys.readouterr().err
    plain = ["--data", data, "--recipe", "minmax", "--bits", "w4a8"]
    assert main(["calibrate", str(model), *plain, "--factors", factors, "-o", state]) == 2
    assert main(["reparameterize", str(model), *plain, "-o", str(tmp_path / "r")]) == 2
    facts = read_json(tmp_path / "r/imbalance.json")
    assert facts["difference"] < 1e-4
    assert {layer["division"] for layer in facts["layers"]} == {division.value for division in Division}
    before, after = (
        sum(layer[when]["channels"] for layer in facts["layers"]) for when in ("before", "after")
    )
    assert after < before
    assert (tmp_path / "r/imbalance.svg").read_text().startswith("<?xml")


def test_the_plot_holds_the_names_of_its_layers() -> None:
    even = Balance(channels=1.0, calls=1.0)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    facts: dict[str, Any] = {"median_factor": 1.0, "largest_factor": 1.0, "truncated": 0.0}
    layers = tuple(
        LayerBalance(layer=layer, division=Division.FOLDED, before=even, after=even, **facts)
        for layer in ("conv_in", name)
    )
    figure = drawn(layers)
    taken, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(taken.x0, taken.y0) >= 0
    assert taken.x1 <= width
    assert taken.y1 <= height


def test_a_model_in_half_precision_may_differ_by_its_own_rounding(model: Path) -> None:
    source = load_source(model)
    trajectory, known = record(source, 2, steps=2, guidance=None, resolution=None)
    source.pipeline.to(torch.bfloat16)
    found = reparameterize(source, trajectory, known, choose("static", "w4a8", ALL), batch_size=2)
    assert 1e-4 < found.difference < 0.05  # bfloat16 has eight bits


def test_another_scheduler_than_was_recorded_is_refused(model: Path) -> None:
    source = load_source(model)
    trajectory, known = record(source, 2, steps=2, guidance=None, resolution=None)
    source.pipeline.scheduler = type(source.pipeline.scheduler).from_config(
        source.pipeline.scheduler.config, timestep_spacing="leading"
    )
    with pytest.raises(UserError, match="timestep_spacing differs"):
        reparameterize(source, trajectory, known, choose("static", "w4a8", TCR))


def test_imbalance_is_the_largest_over_the_median_and_over_the_smallest() -> None:
    found = balance(torch.tensor([[1.0, 2.0, 8.0], [4.0, 4.0, 4.0]]))
    assert (found.channels, found.calls) == (1.0, 2.0)  # the median of 4 and 1, as torch has it
    assert balance(torch.zeros(2, 3)).channels is None


def test_a_recipe_with_the_axis_needs_factors(model: Path) -> None:
    source = load_source(model)
    trajectory, known = record(source, 2, steps=2, guidance=None, resolution=None, batch_size=2)
    with pytest.raises(UserError, match="run reparameterize"):
        calibrate(source, trajectory, known, choose("minmax", "w8a8", ALL))


def _of_tensors(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / TENSORS)
        change(state)
        save_file(state, folder / TENSORS, metadata={"format": "pt"})

    return damage


def _plain_axes(folder: Path) -> None:
    path = folder / "plan.json"
    path.write_text(path.read_text().replace('"reparameterization": "tcr"', '"reparameterization": "none"'))


def _other_place(folder: Path) -> None:
    path = folder / "plan.json"
    path.write_text(path.read_text().replace(f'"{Division.FOLDED}"', f'"{Division.QUANTIZE_STEP}"', 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_of_tensors(lambda s: s.pop(tensors.DIVISOR)), "lacks activation/divisor"),  # type: ignore[arg-type, return-value]
        (_of_tensors(lambda s: s.update({tensors.DIVISOR: s[tensors.DIVISOR].float()})), "should be float16"),
        (_of_tensors(lambda s: s.update({tensors.DIVISOR: s[tensors.DIVISOR][1:]})), "shape"),
        (_of_tensors(lambda s: s[tensors.DIVISOR].fill_(0)), "not positive"),  # type: ignore[arg-type, return-value]
        (_of_tensors(lambda s: s[tensors.DIVISOR].fill_(torch.nan)), "NaN"),  # type: ignore[arg-type, return-value]
        (_plain_axes, "axes"),
        (_other_place, "activation/divisor has shape"),
    ],
)
def test_damaged_factors_are_refused(
    artefact: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(artefact, folder)
    damage(folder)
    write_manifest(folder)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_what_is_switched_off_takes_its_settings_along() -> None:
    off = {"reparameterization": "none", "rounding": "nearest"}
    found = resolve("tcaq", off)
    assert (found.reparameterization_floor, found.rounds) == (0, 1)
    with pytest.raises(ValueError, match="reparameterization: tcr"):
        resolve("tcaq", {**off, "reparameterization_floor": 0.1})


@pytest.mark.parametrize(
    "axes",
    [
        {"reparameterization_layers": "all"},
        {"reparameterization_limit": 5},
        {"reparameterization_floor": 0.1},
        {"reparameterization_groups": 4},
        {"reparameterization": "smooth", "reparameterization_groups": 4},
        {"reparameterization": "tcr", "smooth_exponent": 0.7},
        {"reparameterization": "tcr", "reparameterization_limit": 0.5},
    ],
)
def test_axes_that_mean_nothing_are_refused(axes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"smooth|reparameter"):
        resolve("static", axes)
