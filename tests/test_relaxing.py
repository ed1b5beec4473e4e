"""Relaxed calls: which they are, and that their bits reach the artefact, the simulation and the integers."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import halftone
from halftone import artefact
from halftone.analysis import resolve as plan_of
from halftone.artefact.manifest import write_manifest
from halftone.axes import Axes
from halftone.calls import CallContext
from halftone.cli import main
from halftone.denoiser import Site, SiteKind, denoiser_of
from halftone.errors import UserError
from halftone.passes.relax import relax_shared
from halftone.passes.state import CalibrationState, SiteParameters
from halftone.plan import Execution, Plan
from halftone.quantizers.affine import AffineParams, dequantize, quantize
from halftone.quantizers.bits import Bits
from halftone.recipes import resolve
from halftone.relaxing import Calls, Interval, Relaxation, Relaxing, Share, relaxed_calls
from halftone.runtime import integer
from halftone.runtime.layers import IntegerLayer
from halftone.runtime.operands import Weight
from halftone.runtime.reference import ReferenceProduct
from halftone.settings import Protocol
from halftone.site_quantizer import Mode, SiteQuantizer, set_mode
from halftone.skeleton import skeleton_of
from halftone.source import load_source
from quantized import Calibrated, calibrated

RELAXED = (1, 3)


@pytest.mark.parametrize(
    ("relaxing", "n_calls", "first", "last"),
    [
        (Interval.NEAR_X0, 51, 40, 50),
        (Interval.NEAR_XT, 50, 0, 10),
        (Share(share=(0.95, 1.0)), 51, 48, 50),
        (Share(share=(0.8, 1.0)), 50, 40, 49),
        (Share(share=(0.29, 0.29)), 100, 29, 29),
    ],
)
def test_intervals_hold_both_ends(relaxing: Relaxing, n_calls: int, first: int, last: int) -> None:
    assert relaxed_calls(relaxing, n_calls) == tuple(range(first, last + 1))


def test_average_bits_of_the_published_intervals() -> None:
    sd, sdxl = (
        Relaxation(relaxed_calls(interval, n), 10).average(8, n)
        for interval, n in ((Interval.NEAR_X0, 51), (Interval.NEAR_XT, 50))
    )
    assert sd == pytest.approx(8.431372549)
    assert sdxl == pytest.approx(8.44)
    assert Relaxation((0,), 10).average(16, 4) == 16  # relaxing takes no bits away


@pytest.mark.parametrize(
    ("relaxing", "found"),
    [
        ("near_x0", Interval.NEAR_X0),
        ({"share": [0.5, 1]}, Share(share=(0.5, 1.0))),
        ({"calls": [1, 4]}, Calls(calls=(1, 4))),
    ],
)
def test_the_axis_is_typed_and_survives_json(relaxing: Any, found: Relaxing) -> None:
    axes = resolve("static", {"relaxing": relaxing})
    assert axes.relaxing == found
    assert Axes.model_validate_json(axes.model_dump_json()) == axes


@pytest.mark.parametrize(
    "relaxing", ["late", {"share": [0.9, 0.1]}, {"share": [0, 2]}, {"calls": [4, 1]}, {"calls": []}, [0, 1]]
)
def test_an_axis_that_names_no_calls_is_refused(relaxing: Any) -> None:
    with pytest.raises(ValueError, match="relaxing"):
        resolve("static", {"relaxing": relaxing})


def test_dynamic_parameters_and_calls_that_are_not_made_are_refused() -> None:
    with pytest.raises(ValueError, match="needs stored parameters"):
        resolve("static", {"time_axis": "dynamic", "relaxing": "near_x0"})
    with pytest.raises(UserError, match="call 7 is named, but a run makes 5 calls"):
        relaxed_calls(Calls(calls=(7,)), 5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> tuple[Calibrated, Path]:
    home = tmp_path_factory.mktemp("relaxed")
    axes = {"relaxing": {"calls": list(RELAXED)}, "shortcut": "split"}
    found = calibrated(tiny_model_folder, home / "state.safetensors", "w4a6", **axes)
    artefact.write(home / "made", found.state, found.plan, load_source(tiny_model_folder))
    return found, home / "made"


def output(pipeline: Any, context: Any, call: int) -> Tensor:
    generator = torch.Generator().manual_seed(call)
    latents, text = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (20, 32)))
    with torch.inference_mode(), context.at(call):
        return denoiser_of(pipeline)(latents, 500, encoder_hidden_states=text).sample


def test_more_codes_for_the_same_range(made: tuple[Calibrated, Path]) -> None:
    for quantizer in made[0].quantizers.values():
        assert quantizer.widths == [10 if call in RELAXED else 6 for call in range(5)]
    state, _ = CalibrationState.load(made[0].state)
    assert state.relaxed_calls == RELAXED
    for name, site in state.activations.items():
        if ".time_emb" in name or site.scale.ndim > 1:
            continue
        span = (site.hi.clamp(min=0) - site.lo.clamp(max=0)).flatten()
        steps = torch.tensor([1023.0 if call in RELAXED else 63.0 for call in range(5)])
        if name.endswith(".probabilities"):
            span = site.hi
        torch.testing.assert_close(site.scale.flatten() * steps, span, rtol=1e-4, atol=1e-6)


def test_the_plan_knows_and_counts_them(made: tuple[Calibrated, Path]) -> None:
    plan = Plan.load(made[1] / "plan.json")
    assert plan.relaxed_calls == RELAXED
    assert plan.columns()["avg_act_bits"] == pytest.approx(6 + 4 * 2 / 5)
    plain = plan.model_copy(update={"relaxed_calls": ()})
    assert plain.columns()["avg_act_bits"] == 6


def test_bit_operations_are_the_mean_over_the_calls(tiny_model_folder: Path) -> None:
    skeleton = skeleton_of(load_source(tiny_model_folder).pipeline, 16)

    def bops(bits: str, relaxing: Any) -> int:
        plan = plan_of(
            skeleton,
            recipe="static",
            axes=resolve("static", {"relaxing": relaxing}),
            bits=Bits.parse(bits),
            protocol=Protocol.EQUAL,
            calls=5,
        )
        assert plan.bit_operations is not None
        return plan.bit_operations.quantized

    narrow, wide = bops("w4a6", "none"), bops("w4a10", "none")
    assert bops("w4a6", {"calls": list(RELAXED)}) == round((3 * narrow + 2 * wide) / 5)


def test_the_artefact_computes_what_was_calibrated(made: tuple[Calibrated, Path]) -> None:
    found, folder = made
    pipeline = halftone.load(folder)
    set_mode(found.quantizers, Mode.QUANTIZE)
    for call in range(5):
        wanted = output(found.pipeline, found.context, call)
        assert torch.equal(output(pipeline, pipeline._halftone_context, call), wanted)
    set_mode(found.quantizers, Mode.OFF)


def test_in_integers_a_relaxed_call_is_exact(made: tuple[Calibrated, Path]) -> None:
    pipeline, simulated = halftone.load(made[1], execution="integer"), halftone.load(made[1])
    assert integer.execution_of(denoiser_of(pipeline)) is Execution.INTEGER
    seen = set()

    def check(layer: Any, args: Any, _: Tensor) -> None:
        codes_of_parts = layer.parts.cut(layer.codes, 1)
        parts = zip(layer.products(), layer.encoded(*args), codes_of_parts, strict=True)
        for half, (product, (codes, affine), whole) in enumerate(parts):
            weight = Weight(whole, layer.weight_scale[half], layer.weight_zero_point[half])
            exact = ReferenceProduct(weight, layer.geometry).accumulate(codes, affine)
            assert torch.equal(product.accumulate(codes, affine).double(), exact)
            seen.add((type(product).__name__, affine.bits, codes.dtype))

    for module in denoiser_of(pipeline).modules():
        if isinstance(module, IntegerLayer):
            module.register_forward_hook(check)
    for call in (0, 1):
        found = output(pipeline, pipeline._halftone_context, call)
        wanted = output(simulated, simulated._halftone_context, call)
        assert torch.equal(found, wanted)
    assert seen == {("Int8Product", 6, torch.uint8), ("Int8Product", 10, torch.int32)}


def test_plan_and_info_say_which_calls_and_how(
    made: tuple[Calibrated, Path], tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "calls 1, 3 of 5: activations of 10 bits, 7.600 on average" in artefact.info(made[1])["relaxed"]
    arguments = ["plan", str(tiny_model_folder), "--recipe", "pcr", "--bits", "w4a8", "--steps", "25"]
    assert main(arguments) == 0
    assert "relaxed  calls 20 to 25 of 26: activations of 10 bits, 8.462" in capsys.readouterr().out
    assert main([*arguments, "--axes", '{"relaxing": "auto"}']) == 0
    assert "relaxed  calls that halftone sensitivity chooses" in capsys.readouterr().out


def test_with_another_step_count_bits_go_with_the_noise_level(made: tuple[Calibrated, Path]) -> None:
    pipeline = halftone.load(made[1])
    context = pipeline._halftone_context
    seen: list[tuple[int, int]] = []
    layer = denoiser_of(pipeline).mid_block.resnets[0].conv1
    site = layer.input
    assert isinstance(site, SiteQuantizer)
    layer.register_forward_hook(lambda *_: seen.append((context.slot, site.params().bits)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline("a star", num_inference_steps=9, height=16, width=16, output_type="latent")
    assert len(seen) == 10
    assert {bits for slot, bits in seen if slot in RELAXED} == {10}
    assert {bits for slot, bits in seen if slot not in RELAXED} == {6}


def test_a_plan_that_relaxes_other_calls_is_refused(made: tuple[Calibrated, Path], tmp_path: Path) -> None:
    shutil.copytree(made[1], tmp_path / "copy")
    path = tmp_path / "copy" / "plan.json"
    plan = json.loads(path.read_text())
    for calls in ([0, 1], [3, 1], [1, 3, 9]):
        path.write_text(json.dumps({**plan, "relaxed_calls": calls}))
        write_manifest(tmp_path / "copy")
        with pytest.raises(UserError, match="relaxed_calls are not those"):
            halftone.load(tmp_path / "copy")


def test_shared_parameters_are_widened_at_the_relaxed_calls() -> None:
    site = Site("layer", SiteKind.INPUT, "Linear", None, None)
    quantizer = SiteQuantizer(site, 8, 1, CallContext())
    shared = AffineParams(torch.tensor([0.02]), torch.tensor([100.0]), 8)
    quantizer.set_parameters(shared.scale, shared.zero_point)
    seen = torch.zeros(3)
    found = relax_shared(
        {"s": SiteParameters(shared.scale, shared.zero_point, seen, seen)},
        {"s": quantizer},
        Relaxation((2,), 10),
        3,
    )["s"]
    assert found.scale.tolist() == pytest.approx([0.02, 0.02, 0.02 * 255 / 1023])
    wide = AffineParams(found.scale[2], found.zero_point[2], 10)
    x = torch.linspace(-2, 3.1, 500)
    error = (dequantize(quantize(x, wide), wide) - x).abs().max()
    assert error <= wide.scale * 0.51
