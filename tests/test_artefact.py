"""Writing, reading and describing artefacts; what happens to damaged ones is in test_artefact_tampering."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import halftone
from halftone import artefact
from halftone.artefact import Components, strict, tensors
from halftone.artefact.manifest import write_manifest
from halftone.denoiser import sites
from halftone.errors import UserError
from halftone.layers import WeightCodes, quantized_layers
from halftone.planner import make_plan
from halftone.quantizers.bits import Bits
from halftone.recipes import resolve
from halftone.settings import Protocol
from halftone.site_quantizer import Mode, Parameters, set_mode
from halftone.source import Source, load_source
from halftone.trajectory import run_arguments
from quantized import GUIDANCE, RESOLUTION, STEPS, Calibrated, calibrated, shared_artefact

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def done(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    return shared_artefact(tmp_path_factory, tiny_model_folder)[0]


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artefact(tmp_path_factory, tiny_model_folder)[1]


@pytest.fixture(scope="module")
def source(tiny_model_folder: Path) -> Source:
    return load_source(tiny_model_folder)


def images(pipeline: Any, steps: int = STEPS) -> Any:
    arguments = run_arguments(
        pipeline,
        [0, 1],
        ["a large red star", "a blue ring"],
        steps=steps,
        guidance=GUIDANCE,
        resolution=RESOLUTION,
        seed=3,
    )
    with torch.inference_mode():
        return np.asarray(pipeline(**arguments, output_type="np").images)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_loaded_artefact_computes_bit_for_bit_what_was_calibrated(
    done: Calibrated, folder: Path, tiny_pipeline: StableDiffusionPipeline
) -> None:
    loaded = halftone.load(folder)
    assert type(loaded).__name__ == "StableDiffusionPipeline"
    assert isinstance(loaded, StableDiffusionPipeline)
    found = images(loaded)
    set_mode(done.quantizers, Mode.QUANTIZE)
    done.context.attach(done.pipeline.unet, done.pipeline)
    try:
        assert np.array_equal(found, images(done.pipeline))
    finally:
        done.context.detach()
        set_mode(done.quantizers, Mode.OFF)
    assert np.abs(found - images(tiny_pipeline)).max() > 1e-3  # and that is not full precision
    assert np.array_equal(found, images(loaded)), "a second run starts at call 0 again"


def test_every_activation_site_uses_the_parameters_of_its_call(done: Calibrated, folder: Path) -> None:
    loaded = artefact.load(folder)
    quantizers = {m.site.name: m for m in loaded.unet.modules() if hasattr(m, "non_negative")}
    assert quantizers.keys() == done.quantizers.keys()
    for name, ours in quantizers.items():
        theirs = done.quantizers[name]
        assert ours.mode is Mode.QUANTIZE
        assert ours.bits == theirs.bits
        assert ours.n_calls == STEPS + 1
        assert torch.equal(ours.scale, theirs.scale)
        assert torch.equal(ours.zero_point, theirs.zero_point)


def test_another_schedule_warns_and_runs(folder: Path) -> None:
    loaded = artefact.load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        images(loaded)
    with pytest.warns(UserWarning, match="not the calibrated one"):
        images(loaded, steps=STEPS + 3)
    other = artefact.load(folder, scheduler=DDIMScheduler.from_config(loaded.scheduler.config))
    with pytest.warns(UserWarning, match="not the calibrated one"):
        images(other)


def test_the_same_calibration_gives_the_same_bytes(
    done: Calibrated, source: Source, folder: Path, tmp_path: Path
) -> None:
    artefact.write(tmp_path / "again", done.state, done.plan, source)
    assert files(tmp_path / "again") == files(folder)
    artefact.write(tmp_path / "again", done.state, done.plan, source)  # over an artefact
    assert files(tmp_path / "again") == files(folder)
    assert not [p for p in tmp_path.iterdir() if p.name != "again"]


def test_no_full_precision_weight_is_stored_or_needed(
    done: Calibrated, folder: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    with safe_open(folder / "unet" / tensors.FILE, framework="pt") as file:
        keys = set(file.keys())
        sizes = {key: file.get_slice(key).get_shape() for key in keys}
    originals = load_file(tiny_model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    for module in quantized_layers(done.pipeline.unet):
        assert f"float/{module}.weight" not in keys
        assert sizes[f"codes/{module}"] == [-(-originals[f"{module}.weight"].numel() // 2)]
    assert {key.removeprefix("float/") for key in keys if key.startswith("float/conv_")} >= {
        f"conv_{end}.{part}" for end in ("in", "out") for part in ("weight", "bias")
    }
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone)
    assert not list(alone.rglob("diffusion_pytorch_model*"))[1:], "only the VAE's"
    artefact.load(alone)


def test_float_tensors_take_the_smallest_type_that_holds_them() -> None:
    thin = torch.tensor([1.0, 0.5, -3.25])
    wide = torch.tensor([1e30, 1.0])
    full = torch.tensor([0.1, 1.0])
    for value, dtype in ((thin, torch.float16), (wide.bfloat16(), torch.bfloat16), (full, torch.float32)):
        stored = strict.smallest(value)
        assert stored.dtype is dtype
        assert torch.equal(stored.float(), value.float())


def test_a_w4_denoiser_costs_its_bits(tmp_path: Path) -> None:
    """The shape of the embedded model, 26 calls: codes, scales, zero points, tables and header."""
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=8,
        norm_num_groups=8,
    ).half()
    calls, options = 26, {"recipe": "static", "protocol": Protocol.EQUAL}
    found = sites(unet)
    plan = make_plan(unet, found, resolve("static"), Bits.parse("w4a8"), calls=calls, **options)  # type: ignore[arg-type]
    state = unet.state_dict()
    weights = {
        site.module: WeightCodes(
            torch.zeros(state[f"{site.module}.weight"].shape, dtype=torch.uint8),
            torch.ones(site.parameters),
            torch.full((site.parameters,), 7.0),
        )
        for site in tensors.weight_sites(plan)
    }
    table = Parameters(torch.ones(calls), torch.full((calls,), 128.0))
    activations = {site.name: table for site in tensors.activation_sites(plan)}
    floats = {name: v for name, v in state.items() if name.removesuffix(".weight") not in weights}
    floats |= {name: v for name, v in state.items() if name.endswith(".bias")}
    noise = torch.arange(1.0, calls + 1)
    path = tmp_path / tensors.FILE
    tensors.save(path, tensors.Contents(weights, activations, floats, noise, noise), plan)
    codes = sum(site.elements or 0 for site in tensors.weight_sites(plan)) // 2
    ideal = codes + 2 * sum(v.numel() for v in floats.values())
    assert path.stat().st_size <= 1.06 * ideal
    read = tensors.load(path, plan, unet)
    assert read.floats.keys() == floats.keys()
    assert all(torch.equal(read.floats[name], floats[name].float()) for name in floats)


@pytest.mark.parametrize(
    ("bits", "recipe", "axes"),
    [
        ("w8a8", "minmax", {}),
        ("w4a4s8b8", "static", {}),
        ("w3a6s8", "static", {}),
        ("w4a8", "minmax", {"shortcut": "split"}),
        ("w4a6", "static", {"shortcut": "split"}),
        ("w8a8", "minmax", {"time_axis": "dynamic"}),
        ("w4a6", "static", {"groups": 4, "relaxing": {"calls": [1]}, "start_token": "apart"}),
        ("w8a8", "minmax", {"groups": 3, "group_axis": "position"}),
        ("w4a6", "static", {"groups": 2, "group_layout": "aligned"}),
        ("w4a6", "static", {"groups": 2, "legacy_lookup": True}),
    ],
)
def test_other_widths_and_ways_to_share_parameters(
    tiny_model_folder: Path, source: Source, tmp_path: Path, bits: str, recipe: str, axes: dict[str, str]
) -> None:
    found = calibrated(tiny_model_folder, tmp_path / "state.safetensors", bits, recipe, **axes)
    artefact.write(tmp_path / "out", found.state, found.plan, source)
    loaded = artefact.load(tmp_path / "out")
    set_mode(found.quantizers, Mode.QUANTIZE)
    found.context.attach(found.pipeline.unet, found.pipeline)
    assert np.array_equal(images(loaded), images(found.pipeline))


def test_info_and_verify(folder: Path) -> None:
    facts = artefact.info(folder)
    json.dumps(facts, allow_nan=False)
    assert facts["recipe"] == "static"
    assert (facts["weight_bits"], facts["act_bits"]) == (4, 8)
    assert facts["denoiser_calls"] == STEPS + 1
    assert facts["pipeline"] == "StableDiffusionPipeline"
    assert facts["provenance"]["steps"] == STEPS
    assert facts["provenance"]["scheduler"]["class"] == "PNDMScheduler"
    assert facts["size_mib"] == pytest.approx(sum(len(b) for b in files(folder).values()) / 2**20, rel=0.01)
    assert any("conv_in.weight" in names for names in facts["float"].values())
    checks = artefact.verify(folder)
    assert all(check.passed for check in checks)
    assert {"manifest", "tensors", "loads", "vae", "unet/quantized.safetensors"} <= {c.name for c in checks}


def test_identity_is_that_of_the_images_not_of_the_provenance(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert artefact.artefact_sha256(other) == artefact.artefact_sha256(folder)
    path = other / "provenance.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    write_manifest(other)
    assert artefact.artefact_sha256(other) == artefact.artefact_sha256(folder)
    path = other / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("scaled_linear", "linear"))
    write_manifest(other)
    assert artefact.artefact_sha256(other) != artefact.artefact_sha256(folder)


def test_components_can_be_referenced_on_the_hub(
    done: Calibrated, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="not on the hub at a commit"):
        artefact.write(tmp_path / "local", done.state, done.plan, source, Components.REFERENCE)
    assert source.folder is not None
    snapshot = tmp_path / COMMIT
    shutil.copytree(source.folder, snapshot)
    hosted = replace(source, path="owner/name", revision=COMMIT, folder=snapshot)
    folder = tmp_path / "referenced"
    artefact.write(folder, done.state, done.plan, hosted, Components.REFERENCE)
    assert not (folder / "vae").exists()
    assert (folder / "scheduler").is_dir()
    assert artefact.info(folder)["components"]["vae"]["from"] == f"owner/name@{COMMIT}"
    asked = []

    def fetch(repository: str, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, tuple(allow_patterns)))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    loaded = artefact.load(folder)
    assert torch.equal(loaded.vae.post_quant_conv.weight, source.pipeline.vae.post_quant_conv.weight)
    assert ("owner/name", COMMIT, ("vae/config.json", "vae/diffusion_pytorch_model.safetensors")) in asked
    path = snapshot / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["post_quant_conv.bias"] += 1
    save_file(weights, path)
    with pytest.raises(UserError, match="is not the file the artefact was made with"):
        artefact.load(folder)
    asked.clear()
    assert artefact.load(folder, vae=source.pipeline.vae).vae is source.pipeline.vae, "one's own instead"
    assert not [a for a in asked if any("vae" in pattern for pattern in a[2])]


def test_a_pipeline_without_a_folder_is_written_too(
    done: Calibrated, source: Source, folder: Path, tmp_path: Path
) -> None:
    artefact.write(tmp_path / "out", done.state, done.plan, replace(source, folder=None))
    assert np.array_equal(images(artefact.load(tmp_path / "out")), images(artefact.load(folder)))
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert "_name_or_path" not in index
    assert str(tmp_path) not in "".join(str(b) for n, b in files(tmp_path / "out").items() if "json" in n)


def test_refuses_parts_that_do_not_belong_together(
    done: Calibrated, source: Source, tmp_path: Path, folder: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="was made for other weights"):
        artefact.write(out, done.state, done.plan, replace(source, weights_sha256="0" * 64))
    with pytest.raises(UserError, match="bits is w4a8, the plan's w8a8"):
        artefact.write(out, done.state, done.plan.model_copy(update={"bits": "w8a8"}), source)
    fewer = done.plan.sites[:2] + done.plan.sites[4:]
    with pytest.raises(UserError, match="has, against the plan"):
        artefact.write(out, done.state, done.plan.model_copy(update={"sites": fewer}), source)
    with pytest.raises(UserError, match="no such file"):
        artefact.write(out, tmp_path / "none", done.plan, source)
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not an artefact"):
        artefact.write(out, done.state, done.plan, source)
    assert (out / "thesis.tex").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1, "nothing half-written is left"


def test_values_that_cannot_be_stored_are_refused(done: Calibrated, source: Source, tmp_path: Path) -> None:
    for key, value in (
        ("activation/conv_norm_out.input/scale", None),
        ("activation/mid_block.resnets.0.conv1.input/scale", torch.nan),
        ("activation/mid_block.resnets.0.conv1.input/zero_point", 0.5),
        ("weight/mid_block.resnets.0.conv1/codes", 16),
    ):
        state = load_file(done.state)
        if value is None:
            state[key] = torch.ones(1)
        else:
            state[key].view(-1)[0] = value
        with safe_open(done.state, framework="pt") as file:
            metadata = file.metadata()
        save_file(state, tmp_path / "state.safetensors", metadata=metadata)
        with pytest.raises(UserError):
            artefact.write(tmp_path / "out", tmp_path / "state.safetensors", done.plan, source)
        assert not (tmp_path / "out").exists()


def test_the_calibrated_weights_are_those_of_the_source(
    done: Calibrated, folder: Path, tiny_pipeline: StableDiffusionPipeline
) -> None:
    """Against the definition of the format, with nothing of ours but the plan's order: unpack by hand."""
    stored = load_file(folder / "unet" / tensors.FILE)
    place = 0
    for site in tensors.weight_sites(done.plan):
        weight = tiny_pipeline.unet.get_submodule(site.module).weight.detach()
        packed = stored[f"codes/{site.module}"].numpy()
        codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[: weight.numel()]
        rows = slice(place, place + weight.shape[0])
        scale, zero = (stored[f"weight/{part}"][rows].double().numpy() for part in ("scale", "zero_point"))
        values = (codes.reshape(weight.shape[0], -1) - zero[:, None]) * scale[:, None]
        off = np.abs(values - weight.reshape(weight.shape[0], -1).double().numpy())
        assert (off <= 0.5001 * scale[:, None]).all(), site.module
        place += weight.shape[0]
