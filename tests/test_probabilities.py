"""Attention probabilities with octaves for codes, dynamic scales, and a start token that stays in float."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from pydantic import ValidationError

import halftone
from halftone import artefact
from halftone.attention import QuantizedAttnProcessor
from halftone.axes import Axes
from halftone.calls import CallContext
from halftone.denoiser import Site, SiteKind, sites
from halftone.errors import UserError
from halftone.layers import wrap
from halftone.plan import Plan, describe, describe_start_token
from halftone.policies import Probabilities, Scope, StartToken
from halftone.probability_quantizer import Form, ProbabilityQuantizer
from halftone.quantizers.bits import Bits
from halftone.recipes import resolve
from halftone.runtime.integer import simulated_modules
from halftone.runtime.layers import IntegerAttnProcessor
from halftone.runtime.operands import BAND, Operand
from halftone.runtime.whole_attention import WholeAttnProcessor, _probabilities, by_bands
from halftone.site_quantizer import Mode, SiteQuantizer, set_mode
from halftone.source import load_source
from halftone.start_token import has_start_token, kept_apart
from halftone.trajectory import run_arguments
from quantized import GUIDANCE, RESOLUTION, STEPS, Calibrated, calibrated

WORKED = torch.tensor([[[0.90, 0.06, 0.03, 0.01], [0.20, 0.40, 0.30, 0.10]]])
VALUE = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
LOG2, UNIFORM = Probabilities.LOG2, Probabilities.UNIFORM


def quantizer(form: Form, bits: int = 2, heads: int = 1, start: bool = True) -> ProbabilityQuantizer:
    site = Site("attn2", SiteKind.PROBABILITIES, "Attention", start=start)
    made = ProbabilityQuantizer(site, bits, 1, CallContext(), form, heads)
    made.mode = Mode.QUANTIZE
    return made


@pytest.mark.parametrize(
    ("form", "bits", "expected"),
    [
        (Form(LOG2, Scope.TENSOR), 2, [[0.9, 0.05, 0.05, 0.05], [0.2, 0.4, 0.4, 0.1]]),
        (Form(LOG2, Scope.TENSOR), 3, [[0.9, 0.05, 0.025, 0.0125], [0.2, 0.4, 0.4, 0.1]]),
        (Form(UNIFORM, Scope.TENSOR), 2, [[0.9, 0.0, 0.0, 0.0], [0.2, 0.4, 0.4 * 2 / 3, 0.4 / 3]]),
    ],
)
def test_attention_without_its_start_column(form: Form, bits: int, expected: list[list[float]]) -> None:
    processor = QuantizedAttnProcessor(probabilities=quantizer(form, bits))
    found = processor._but_start(processor.probabilities, WORKED, 2)  # type: ignore[arg-type]
    torch.testing.assert_close(found[0], torch.tensor(expected))
    assert torch.equal(found[..., 0], WORKED[..., 0]), "and no width changes the start column"
    torch.testing.assert_close(processor.mix(WORKED, VALUE), torch.tensor([expected]) @ VALUE)
    assert (found.sum(-1) - 1).abs().max() > 0.04, "rows are not brought back to a sum of 1"


def test_a_static_scale_is_the_largest_value_and_a_dynamic_one_follows_the_tensor() -> None:
    static, dynamic = quantizer(Form(LOG2)), quantizer(Form(LOG2, Scope.TENSOR))
    scale, zero_point = static.fitted(torch.tensor(0.0), torch.tensor(0.8), 2)
    assert scale == 0.8
    static.set_parameters(scale[None], zero_point[None])
    x = WORKED[..., 1:] / 4
    assert static(x).unique().tolist() == pytest.approx([0.1])
    assert dynamic(x).unique().tolist() == pytest.approx([0.0125, 0.025, 0.1])
    with pytest.raises(UserError, match=r"attn2\.probabilities: .*NaN"):
        dynamic(x * torch.nan)
    with pytest.raises(RuntimeError, match="not set"):
        quantizer(Form(LOG2))(x)


@pytest.mark.parametrize("scope", Scope)
def test_scopes(scope: Scope) -> None:
    """Two samples of two heads; the scale is the largest of the tensor, the sample or the head."""
    top = torch.tensor([0.1, 0.2, 0.4, 0.8])
    x = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(0)) * top[:, None, None] / 2
    x[:, 1, 2] = top
    params = quantizer(Form(LOG2, scope), heads=2).at_hand(x)
    tops = {Scope.TENSOR: [0.8], Scope.SAMPLE: [0.2, 0.2, 0.8, 0.8], Scope.HEAD: [0.1, 0.2, 0.4, 0.8]}
    assert params.scale.flatten().tolist() == pytest.approx(tops[scope])


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("form", [Form(LOG2), Form(LOG2, Scope.HEAD), Form(UNIFORM, Scope.SAMPLE)])
def test_products_of_whole_numbers(form: Form, bits: int) -> None:
    """What the plain processor computes of dequantized tensors; in integers the same to the bit."""
    context, generator = CallContext(), torch.Generator().manual_seed(0)
    parts: list[Any] = []
    for kind in (SiteKind.QUERY, SiteKind.KEY, SiteKind.VALUE):
        site = Site("m", kind, "Attention", start=kind is SiteKind.KEY)
        made = SiteQuantizer(site, 8, 1, context)
        made.set_parameters(torch.tensor([0.02]), torch.tensor([120.0]))
        parts.append(made)
    parts.append(quantizer(form, bits, heads=2))
    parts[-1].context = context
    parts[-1].set_parameters(torch.tensor([0.5]), torch.tensor([0.0]))
    set_mode(parts, Mode.QUANTIZE)
    attn = Attention(query_dim=8, heads=2, dim_head=4)
    query, key, value = (torch.randn(4, n, 4, generator=generator) for n in (40, 21, 21))
    with torch.no_grad():
        wanted = QuantizedAttnProcessor(*parts).attend(attn, query * 4, key, value, None)
        found = WholeAttnProcessor(*parts).attend(attn, query * 4, key, value, None)
        whole = WholeAttnProcessor(*parts)
        weights = whole.weights(attn, query * 4, key, None)
        exact = [whole.mix(weights.double(), value.double()).float()]
        exact.append(IntegerAttnProcessor(*parts).mix(weights, value))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exact[0], found, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(one, found) for one in exact[1:])


def test_every_band_of_octaves_is_exact() -> None:
    """Values from 1 down to 2^-120 of the scale: whole steps within a band, whatever lies in others."""
    exponents = torch.arange(120).reshape(1, 2, 60)
    x = torch.ldexp(torch.full((1, 2, 60), 0.3), -exponents)
    one = quantizer(Form(LOG2, Scope.TENSOR), 8)
    operand = _probabilities(x, one)
    assert torch.equal(operand.steps, torch.ldexp(torch.ones(1, 2, 60), BAND - 1 - exponents))
    value = torch.randint(-128, 128, (1, 60, 3), generator=torch.Generator().manual_seed(0)).float()
    right = Operand(value, torch.tensor(1.0), 128, 128.0 * 60)
    rows = [[0] * 3, [0] * 3]
    for query in range(2):
        for key in range(60):
            for k in range(3):  # whole numbers without an end, in units of 2^-119
                rows[query][k] += int(value[0, key, k]) << (119 - int(exponents[0, query, key]))
    wanted = torch.tensor(rows, dtype=torch.float64)[None] * 2.0 ** (BAND - 1 - 119)
    found = by_bands(operand, right)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-7, atol=0)


def only_probabilities(pipeline: Any, form: Form) -> list[SiteQuantizer]:
    """Wrap the pipeline's denoiser with 4-bit probabilities, start tokens apart."""
    found = [s for s in sites(pipeline.unet, start_token=True) if s.kind is SiteKind.PROBABILITIES]
    quantizers = wrap(pipeline.unet, found, Bits(8, 8, 4), 1, CallContext(), probabilities=form)
    return list(quantizers.values())


def images(pipeline: Any, ids: list[int]) -> Any:
    prompts = ["a large red star", "a blue ring", "a small green cross"]
    how: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "resolution": RESOLUTION, "seed": 3}
    arguments = run_arguments(pipeline, ids, [prompts[i] for i in ids], **how)
    with torch.inference_mode():
        return np.asarray(pipeline(**arguments, output_type="np").images)


@pytest.mark.parametrize("scope", Scope)
def test_permuted_prompts_give_permuted_images(fresh_pipeline: Any, scope: Scope) -> None:
    """Bit for bit, where no scale is shared by a batch; with one of the whole tensor an image depends on the
    others beside it, as in DGQ's code."""
    set_mode(only_probabilities(fresh_pipeline, Form(LOG2, scope)), Mode.QUANTIZE)
    order = [2, 0, 1]
    whole = images(fresh_pipeline, [0, 1, 2])
    assert np.array_equal(images(fresh_pipeline, order), whole[order])
    # as many in the batch: kernels for another number round otherwise, which may take a value to another code
    beside_another = images(fresh_pipeline, [0, 1, 1])
    assert np.array_equal(beside_another[:2], whole[:2]) == (scope is not Scope.TENSOR)


def test_off_with_a_start_token_apart_is_full_precision(fresh_pipeline: Any) -> None:
    fresh_pipeline.unet.set_attn_processor(AttnProcessor())
    plain = images(fresh_pipeline, [0, 1])
    quantizers = only_probabilities(fresh_pipeline, Form(LOG2, Scope.SAMPLE))
    assert np.array_equal(images(fresh_pipeline, [0, 1]), plain)
    set_mode(quantizers, Mode.QUANTIZE)
    assert not np.array_equal(images(fresh_pipeline, [0, 1]), plain)


def tokenizer(start: int | None, ids: list[int]) -> Any:
    def read(text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=ids)

    read.bos_token_id = start  # type: ignore[attr-defined]
    return read


def test_which_encoders_have_a_start_token(tiny_pipeline: Any, tiny_unconditional: Any) -> None:
    clip, t5, gpt = tokenizer(7, [7, 1, 2]), tokenizer(None, [1, 2]), tokenizer(7, [1, 7])
    assert has_start_token([tiny_pipeline.tokenizer])
    assert has_start_token([clip, clip])
    assert not any(map(has_start_token, ([t5], [gpt], [clip, t5], [])))
    assert kept_apart(Axes(start_token=StartToken.APART), lambda: [clip])
    assert not kept_apart(Axes(), lambda: pytest.fail("nobody has to read a tokenizer"))
    starts = {s.module for s in sites(tiny_pipeline.unet, start_token=True) if s.start}
    assert starts
    assert all(name.endswith("attn2") for name in starts), "self-attention has none"
    assert not any(s.start for s in sites(tiny_unconditional, start_token=True))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"time_axis": "dynamic", "start_token": "apart"}, "start_token: time_axis dynamic"),
        ({"time_axis": "dynamic", "probabilities": "log2"}, "probabilities: time_axis dynamic"),
        ({"time_axis": "dynamic", "probabilities_scale": "dynamic"}, "probabilities_scale: time_axis"),
        ({"probabilities_scope": "head"}, "write probabilities_scale: dynamic"),
        ({"probabilities": "log3"}, "probabilities"),
    ],
)
def test_axes_that_make_no_sense(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        resolve("minmax", axes)


def test_neutral_choices_are_not_written() -> None:
    """Plans of recipes that leave attention alone keep their bytes, and artefacts their hashes."""
    names = {"probabilities", "start_token", "probabilities_scale", "probabilities_scope"}
    assert not names & Axes().model_dump(mode="json").keys()
    axes = resolve("static", {"probabilities": "log2", "start_token": "apart"})
    assert axes.model_dump(mode="json")["probabilities"] == "log2"
    assert Axes.model_validate(axes.model_dump(mode="json")) == axes


DGQ = {"probabilities": "log2", "probabilities_scale": "dynamic", "start_token": "apart"}
RECIPES: dict[str, dict[str, Any]] = {
    "dynamic": DGQ,
    "static": {"probabilities": "log2", "start_token": "apart", "relaxing": {"calls": [1, 3]}},
    "shared": {
        "time_axis": "shared",
        "step_size": "learned",
        "probabilities": "log2",
        "relaxing": {"calls": [2]},
    },
    "heads": {**DGQ, "probabilities": "uniform", "probabilities_scope": "head", "relaxing": "near_x0"},
    "groups": {
        **DGQ,
        "groups": 4,
        "calibration_inputs": "progressive",
        "calibrate_last": False,
        "relaxing": "near_x0",
    },
}


def run_of(found: Calibrated) -> Any:
    set_mode(found.quantizers, Mode.QUANTIZE)
    found.context.attach(found.pipeline.unet, found.pipeline)
    try:
        return images(found.pipeline, [0, 1])
    finally:
        found.context.detach()
        set_mode(found.quantizers, Mode.OFF)


@pytest.mark.parametrize("name", ["dynamic", "static", "heads"])
def test_an_artefact_computes_what_was_calibrated(name: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    found = calibrated(tiny_model_folder, tmp_path / "state.safetensors", "w4a4", **RECIPES[name])
    folder = tmp_path / "artefact"
    artefact.write(folder, found.state, found.plan, load_source(tiny_model_folder))
    simulated = images(halftone.load(folder), [0, 1])
    assert np.array_equal(simulated, run_of(found))
    assert all(check.passed for check in artefact.verify(folder))
    pipeline = halftone.load(folder, execution="integer")
    assert np.array_equal(images(pipeline, [0, 1]), simulated), "the same bits in integers"
    assert not simulated_modules(pipeline.unet)
    facts = artefact.info(folder)
    assert not facts["integer"]["fallbacks"]
    kinds = {describe(site) for site in found.plan.quantized if site.kind == "probabilities"}
    assert {how for kind, how, _ in facts["sites"] if kind == "probabilities"} == kinds


@pytest.mark.parametrize("name", ["shared", "groups"])
def test_the_whole_chain(name: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "steps": 3,
        "guidance": 3.0,
        "resolution": 16,
        "batch_size": 2,
        "bits": "w4a4",
        "budget": "smoke",
    }
    axes = {"rounding": "nearest", "weight_range": "minmax", **RECIPES[name]}
    prompts = ["a small red star", "a large blue ring"]
    folder = halftone.quantize(str(tiny_model_folder), "static", prompts, tmp_path / "out", axes=axes, **how)
    assert all(check.passed for check in artefact.verify(folder))
    plan = Plan.load(folder / "plan.json")
    assert plan.axes == resolve("static", axes)
    assert (describe_start_token(plan) is None) == (name == "shared")


def test_the_plan_says_it(tiny_model_folder: Path, tmp_path: Path) -> None:
    found = calibrated(tiny_model_folder, tmp_path / "state.safetensors", "w4a4", **DGQ)
    said = {site.name: describe(site) for site in found.plan.sites}
    cross = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    assert said[f"{cross}.probabilities"] == "4-bit log2, per sample, dynamic, start column apart"
    assert said[f"{cross}.key"] == "4-bit affine, per tensor, per call, start row apart"
    assert said[cross.replace("attn2", "attn1") + ".probabilities"] == "4-bit log2, per sample, dynamic"
    stored = [site for site in found.plan.quantized if site.kind == "probabilities"]
    assert {site.parameters for site in stored} == {0}
    assert {type(found.quantizers[site.name]) for site in stored} == {ProbabilityQuantizer}
    found.plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    for old, new in (
        ('"quantizer": "log2"', '"quantizer": "affine, zero point 0"'),
        ('"granularity": "per sample"', '"granularity": "per head"'),
        ('"start_token": "apart"', '"start_token": "joint"'),
        ('"start_apart": true', '"start_apart": false'),
    ):
        assert old in text
        (tmp_path / "plan.json").write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match="not a plan"):
            Plan.load(tmp_path / "plan.json")
