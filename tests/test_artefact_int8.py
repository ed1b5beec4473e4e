"""Text encoder and autoencoder with int8 weights: what is stored, what is loaded, what is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, T5Config, T5EncoderModel

import halftone
from halftone import artefact
from halftone.artefact import Components, load, weight_only
from halftone.artefact.manifest import write_manifest
from halftone.cli import main
from halftone.components import Entry
from halftone.errors import UserError
from halftone.source import load_source
from quantized import shared_artefact

PROMPT = "a large red star"
HOW: dict[str, Any] = {"guidance_scale": 3.0, "output_type": "np"}
PARTS = ("text_encoder", "vae")


@pytest.fixture(scope="module")
def whole(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    done, _ = shared_artefact(tmp_path_factory, tiny_model_folder)
    folder = tmp_path_factory.mktemp("int8") / "artefact"
    artefact.write(folder, done.state, done.plan, load_source(tiny_model_folder), Components.INT8)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(whole, tmp_path / "artefact")


def run(pipeline: Any, **more: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipeline(PROMPT, generator=generator, **{**HOW, "num_inference_steps": 2, **more}).images


def layers(module: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Layers whose weights should be int8, with the axis of their output channels."""
    kinds = {nn.Linear: 0, nn.Conv2d: 0, nn.Embedding: 0, nn.ConvTranspose2d: 1}
    return {name: (m, kinds[type(m)]) for name, m in module.named_modules() if type(m) in kinds}


class Transposed(nn.Module):
    """Neither the text encoder nor the autoencoder has one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(6, 4, 2)


def check_within_half_a_step(before: nn.Module, after: nn.Module) -> None:
    found = layers(before)
    for name, (layer, axis) in found.items():
        old, new = layer.weight.detach(), after.get_submodule(name).weight.detach()
        rest = [k for k in range(old.ndim) if k != axis]
        step = old.abs().amax(rest, keepdim=True) / 127
        # a scale has eight significant bits, so a step may be 1/256 longer
        assert ((old - new).abs() <= 0.502 * step).all(), name
        assert (new / step).round().abs().max() >= 126, name
        assert not torch.equal(old, new), name
    weights = {f"{name}.weight" for name in found}
    theirs = after.state_dict()
    for name, value in before.state_dict().items():
        assert name in weights or torch.equal(theirs[name], value), name


def test_every_weight_comes_back_within_half_a_step(
    whole: Path, tiny_pipeline: StableDiffusionPipeline
) -> None:
    loaded = load(whole)
    for part in PARTS:
        before = getattr(tiny_pipeline, part)
        assert type(getattr(loaded, part)) is type(before)
        check_within_half_a_step(before, getattr(loaded, part))
        stored = load_file(whole / part / weight_only.FILE)
        codes = {key for key in stored if key.startswith("codes/")}
        assert codes == {f"codes/{name}.weight" for name in layers(before)}
        assert all(stored[key].dtype == torch.int8 for key in codes)
        assert {key for key in stored if key not in codes} >= {"scale"}


def test_a_transposed_convolution_has_its_output_channels_on_the_second_axis() -> None:
    torch.manual_seed(0)
    module = Transposed()
    module.up.weight.data *= torch.logspace(0, 3, 4)[None, :, None, None]
    assert weight_only._weights(module) == {"up.weight": 1}
    weight = module.up.weight.detach()
    params = weight_only._fit(weight, 1)
    assert params.scale.shape == (1, 4, 1, 1)
    again = nn.Module()
    again.up = nn.ConvTranspose2d(6, 4, 2)
    again.up.weight = nn.Parameter(weight_only.dequantize(weight_only.quantize(weight, params), params))
    again.up.bias = module.up.bias
    check_within_half_a_step(module, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_storing_what_was_loaded_gives_the_same_integers(
    whole: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    loaded = load(whole, dtype=dtype)
    for part in PARTS:
        module = getattr(loaded, part)
        assert {value.dtype for value in module.parameters()} == {dtype}
        weight_only.save(tmp_path, part, module)
        before, after = (load_file(home / part / weight_only.FILE) for home in (whole, tmp_path))
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert torch.equal(after[key], value.to(dtype) if key.startswith("float/") else value), key
        if dtype == torch.float32:
            name = f"{part}/{weight_only.FILE}"
            assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
        again = weight_only.load(tmp_path, Entry(part, type(module)), dtype)
        state = again.state_dict()
        assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())


def test_it_computes_nearly_what_the_float_parts_do(
    whole: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two hundredths: a weight is off by at most 1/254 of its row's largest, and errors mostly cancel."""
    copied = load(shared_artefact(tmp_path_factory, tiny_model_folder)[1])
    loaded = load(whole)
    tokens = loaded.tokenizer([PROMPT], padding="max_length", return_tensors="pt").input_ids
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for compute in (
            lambda p: p.text_encoder(tokens).last_hidden_state,
            lambda p: p.vae.decode(latents).sample,
            lambda p: p.vae.encode(p.vae.decode(latents).sample).latent_dist.mean,
        ):
            wanted, found = compute(copied), compute(loaded)
            off = (found - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt()
            assert 0 < off < 0.02


def test_tied_embeddings_and_parts_in_float32_stay_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    before = T5EncoderModel(config).eval()
    weight_only.save(tmp_path, "text_encoder_2", before)
    keys = load_file(tmp_path / "text_encoder_2" / weight_only.FILE).keys()
    assert "codes/shared.weight" in keys
    assert "codes/encoder.embed_tokens.weight" not in keys
    entry = Entry("text_encoder_2", T5EncoderModel)
    loaded: Any = weight_only.load(tmp_path, entry)
    assert loaded.shared.weight is loaded.encoder.embed_tokens.weight
    check_within_half_a_step(before, loaded)
    half: Any = weight_only.load(tmp_path, entry, torch.float16)
    before.save_pretrained(tmp_path / "plain")
    theirs = T5EncoderModel.from_pretrained(tmp_path / "plain", dtype=torch.float16)
    ours = {name: value.dtype for name, value in half.named_parameters()}
    assert ours == {name: value.dtype for name, value in theirs.named_parameters()}
    assert set(ours.values()) == {torch.float16, torch.float32}


def test_it_is_half_of_16_bits_and_info_says_so(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = artefact.info(whole)
    facts = known["components"]
    assert {name: part["stored"] for name, part in facts.items()} == {
        "unet": "quantized",
        "vae": "int8",
        "text_encoder": "int8",
        "tokenizer": "copy",
        "scheduler": "copy",
    }
    assert any(name.endswith("final_layer_norm.weight") for name in facts["text_encoder"]["float"])
    assert not any(name.endswith("proj.weight") for name in facts["text_encoder"]["float"])
    assert sum(part["size_mib"] for part in facts.values()) <= known["size_mib"]
    assert main(["info", str(whole)]) == 0
    assert re.search(r"^vae +int8, [\d.]+ MiB, \d+ tensors in float$", capsys.readouterr().out, re.MULTILINE)
    # of a model large enough that a file's header is little
    torch.manual_seed(0)
    config = T5Config(vocab_size=500, d_model=256, d_kv=64, d_ff=512, num_layers=1, num_heads=4)
    model = T5EncoderModel(config)
    weight_only.save(tmp_path, "text_encoder", model)
    size = (tmp_path / "text_encoder" / weight_only.FILE).stat().st_size
    assert size < 0.52 * sum(2 * value.numel() for value in model.parameters())


def test_the_same_input_gives_the_same_bytes(whole: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    source = load_source(tiny_model_folder)
    for part in PARTS:
        weight_only.save(tmp_path, part, getattr(source.pipeline, part))
        for path in (tmp_path / part).iterdir():
            assert path.read_bytes() == (whole / part / path.name).read_bytes()
    source.pipeline.vae.post_quant_conv.bias.data[0] = torch.nan
    with pytest.raises(UserError, match=r"vae: post_quant_conv\.bias holds NaN"):
        weight_only.save(tmp_path / "nan", "vae", source.pipeline.vae)


@pytest.mark.filterwarnings("ignore:this schedule is not the calibrated one")
def test_a_loaded_pipeline_is_an_ordinary_one(whole: Path, tmp_path: Path) -> None:
    pipeline = halftone.load(whole)
    seen = []

    def note(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, values["latents"].shape))
        return values

    plain = run(pipeline)
    assert np.array_equal(run(pipeline, callback_on_step_end=note), plain)
    assert seen == [(step, (1, 4, 8, 8)) for step in range(3)]
    picture = torch.zeros(1, 3, 16, 16)
    for other in (
        AutoPipelineForImage2Image.from_pipe(pipeline),
        StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False),
    ):
        other.set_progress_bar_config(disable=True)
        drawn = run(other, image=picture, strength=0.5, num_inference_steps=4)
        assert drawn.shape == plain.shape
        assert np.isfinite(drawn).all()
        assert np.abs(drawn - plain).max() > 1e-3
    assert np.array_equal(run(pipeline), plain), "as if the others had never been"
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    assert np.isfinite(run(pipeline)).all()

    pipeline.text_encoder.save_pretrained(tmp_path / "text_encoder")
    again = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    theirs = again.state_dict()
    assert all(torch.equal(theirs[k], v) for k, v in pipeline.text_encoder.state_dict().items())
    pipeline.vae.save_pretrained(tmp_path / "vae")
    again = type(pipeline.vae).from_pretrained(tmp_path / "vae").state_dict()
    assert all(torch.equal(again[k], v) for k, v in pipeline.vae.state_dict().items())
    for part in (pipeline, pipeline.unet):
        with pytest.raises(UserError, match="its denoiser is quantized") as said:
            part.save_pretrained(tmp_path / "saved")
        assert "\n" not in str(said.value)
    assert not (tmp_path / "saved").exists()


def test_a_loaded_pipeline_moves(whole: Path) -> None:
    pipeline = load(whole)
    plain = run(pipeline, num_inference_steps=4)
    pipeline.to("cpu", torch.bfloat16)
    for part in ("unet", *PARTS):
        assert getattr(pipeline, part).dtype == torch.bfloat16
    moved = run(pipeline, num_inference_steps=4)
    assert 0 < np.abs(moved - plain).mean() < 0.1
    direct = load(whole, dtype=torch.bfloat16)
    for part in PARTS:
        state = getattr(direct, part).state_dict()
        found = getattr(pipeline, part).state_dict()
        assert all(torch.equal(found[k], v) for k, v in state.items()), "rounded once, whenever it is"
    scales = [value for name, value in pipeline.unet.state_dict().items() if name.endswith(".scale")]
    assert scales
    assert all(value.dtype == torch.float32 for value in scales), "the denoiser's parameters stay exact"


Tensors = dict[str, torch.Tensor]
CODES = "codes/post_quant_conv.weight"
HOSTILE: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing codes": (lambda t: t.pop(CODES), f"lacks {CODES}"),
    "missing scales": (lambda t: t.pop("scale"), "lacks scale"),
    "missing float": (lambda t: t.pop("float/post_quant_conv.bias"), "lacks float/post_quant_conv.bias"),
    "unknown key": (lambda t: t.update(extra=torch.ones(1)), "has the unknown extra"),
    "a weight in float": (
        lambda t: t.update({"float/post_quant_conv.weight": t.pop(CODES).half()}),
        f"lacks {CODES}",
    ),
    "unsigned codes": (lambda t: t.update({CODES: t[CODES].to(torch.uint8)}), "is U8, it should be int8"),
    "codes in float": (lambda t: t.update({CODES: t[CODES].half()}), "is F16, it should be int8"),
    "flat codes": (lambda t: t.update({CODES: t[CODES].flatten()}), "has shape"),
    "a scale too many": (lambda t: t.update(scale=torch.cat([t["scale"], t["scale"][:1]])), "has shape"),
    "scales in float32": (lambda t: t.update(scale=t["scale"].float()), "is F32, it should be bfloat16"),
    "scale of zero": (lambda t: t["scale"].__setitem__(0, 0), "not positive"),
    "negative scale": (lambda t: t["scale"].__setitem__(-1, -1), "not positive"),
    "NaN scale": (lambda t: t["scale"].__setitem__(0, torch.nan), "scale holds NaN"),
    "infinite float": (lambda t: t["float/post_quant_conv.bias"].fill_(torch.inf), "holds NaN or infinity"),
    "float in double": (
        lambda t: t.update({"float/post_quant_conv.bias": t["float/post_quant_conv.bias"].double()}),
        "is F64",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tensors(whole: Path, tmp_path: Path, case: str) -> None:
    damage, said = HOSTILE[case]
    shutil.copytree(whole / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / weight_only.FILE
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=said) as found:
        weight_only.load(tmp_path, Entry("vae", AutoencoderKL))
    assert "\n" not in str(found.value)


def test_bytes_that_are_no_tensors_are_refused(whole: Path, tmp_path: Path) -> None:
    """Flipped, one at a time, in the header: refused, or the same tensors after all; cut short: refused."""
    shutil.copytree(whole / "vae", tmp_path / "vae")
    path, entry = tmp_path / "vae" / weight_only.FILE, Entry("vae", AutoencoderKL)
    content = path.read_bytes()
    sound = weight_only.load(tmp_path, entry).state_dict()
    header = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for place in [*range(8), *range(8, header, header // 40)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = weight_only.load(tmp_path, entry).state_dict()
        except UserError:
            refused += 1
            continue
        assert found.keys() == sound.keys(), place
    assert refused > 30
    for damaged in (b"", content[:-1], content[: header - 1], b"\x80\x04 a pickle."):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not sound"):
            weight_only.load(tmp_path, entry)


def test_verify_looks_into_them(folder: Path) -> None:
    path = folder / "vae" / weight_only.FILE
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"int8\.safetensors: its SHA-256"):
        load(folder)
    tensors = load_file(path)
    tensors["scale"][0] = -1
    save_file(tensors, path)
    write_manifest(folder)
    with pytest.raises(UserError, match="not positive"):
        load(folder)
    assert [check.name for check in artefact.verify(folder) if not check.passed] == ["vae"]


def test_files_without_a_place_are_refused(folder: Path, tiny_model_folder: Path) -> None:
    for name in ("vae/model.safetensors", "vae/extra.json", "scheduler/int8.safetensors"):
        (folder / name).write_bytes(b"x")
        write_manifest(folder)
        with pytest.raises(UserError, match="has no place"):
            load(folder)
        (folder / name).unlink()
    (folder / "vae" / "config.json").unlink()
    write_manifest(folder)
    with pytest.raises(UserError, match=r"'vae' has no config\.json"):
        load(folder)


def test_the_command_writes_them(
    whole: Path, tiny_model_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    done = shared_artefact(tmp_path_factory, tiny_model_folder)[0]
    words = ["export", str(tiny_model_folder), "--calibration", str(done.state), "-o", str(tmp_path / "a")]
    plan = tmp_path / "plan.json"
    done.plan.save(plan)
    assert main([*words, "--plan", str(plan), "--components", "int8"]) == 0
    assert artefact.artefact_sha256(tmp_path / "a") == artefact.artefact_sha256(whole)
