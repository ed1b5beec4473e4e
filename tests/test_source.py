from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from halftone import source as source_module
from halftone.errors import UserError
from halftone.files import sha256
from halftone.source import load_source
from single_file import save_single_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_model_folder, copy)
    return copy


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def reweigh(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_loads_a_folder_whole(tiny_model_folder: Path, tiny_pipeline: StableDiffusionPipeline) -> None:
    found = load_source(tiny_model_folder)
    assert type(found.pipeline) is StableDiffusionPipeline
    assert found.weights_sha256 == sha256(tiny_model_folder / UNET)
    for name, value in tiny_pipeline.unet.state_dict().items():
        assert torch.equal(value, found.pipeline.unet.state_dict()[name])
    assert not any(m.training for m in found.pipeline.unet.modules())


def test_half_precision_variants_are_found(folder: Path) -> None:
    for name in ("unet", "vae"):
        path = folder / name / "diffusion_pytorch_model.safetensors"
        half = {k: v.half() for k, v in load_file(path).items()}
        path.unlink()
        save_file(half, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    found = load_source(folder).pipeline
    assert found.unet.dtype == torch.float32
    assert torch.equal(found.unet.conv_in.weight, found.unet.conv_in.weight.half().float())


def _delete(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def _truncate(name: str, size: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return damage


def _pickle(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).rename((folder / name).with_suffix(".bin"))

    return damage


def _edit(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, **changes)


def _reweigh(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    return lambda folder: reweigh(folder / UNET, change)


def _without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return drop


def _poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv_in.weight"][0, 0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_delete("model_index.json"), "no model_index.json"),
        (_delete("unet"), "component 'unet' is missing"),
        (_delete("tokenizer"), "component 'tokenizer' is missing"),
        (_delete("scheduler/scheduler_config.json"), "cannot be loaded as PNDMScheduler"),
        (_delete("vae/config.json"), "has no config.json"),
        (_delete(UNET), "no .safetensors weights"),
        (_truncate(UNET, 1000), "truncated or not a safetensors file"),
        (_truncate(UNET, 100_000), "truncated or not a safetensors file"),
        (_truncate(UNET, 0), "truncated or not a safetensors file"),
        (_truncate("unet/config.json", 100), "not valid JSON"),
        (_truncate("model_index.json", 100), "not valid JSON"),
        (_pickle(UNET), "only pickled weights"),
        (_reweigh(_without("conv_out.bias")), "1 missing weights, the first is conv_out.bias"),
        (_reweigh(lambda t: t.update(extra=torch.ones(2))), "1 unexpected weights, the first is extra"),
        (_reweigh(lambda t: t.update({"conv_out.bias": torch.ones(5)})), "unet"),
        (_reweigh(_poison), "conv_in.weight holds NaN"),
        (_edit("model_index.json", _class_name="os"), "no pipeline of diffusers"),
        (_edit("model_index.json", _class_name=["pipeline", "Mine"]), "no pipeline of diffusers"),
        (_edit("model_index.json", unet=["os", "system"]), "no class of diffusers"),
        (_edit("model_index.json", unet=["diffusers", "DiffusionPipeline"]), "no class of diffusers"),
        (_edit("model_index.json", unet=["diffusers"]), "must be written as"),
        (_edit("model_index.json", unet=[None, None]), "has 0 denoisers"),
        (_edit("text_encoder/config.json", auto_map={"AutoModel": "mine.Model"}), "'auto_map'"),
        (_edit("unet/config.json", quantization_config={}), "'quantization_config'"),
        (_edit("unet/config.json", in_channels=1 << 40), "no model is that large"),
        (_edit("unet/config.json", layers_per_block=5000), "no model is that large"),
        (_edit("unet/config.json", block_out_channels=[32, 33]), "cannot be loaded as UNet2DConditionModel"),
    ],
)
def test_whatever_is_wrong_with_a_folder_is_said(
    folder: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(folder)
    with pytest.raises(UserError, match=said):
        load_source(folder)


@pytest.mark.parametrize(
    ("path", "options", "said"),
    [
        ("no/such/folder", {}, "no such folder or file"),
        ("/no/such", {}, "no such folder or file"),
        ("weights.safetensors", {}, "no such folder or file"),
        ("owner/name", {}, "add --revision"),
        ("owner/name", {"revision": COMMIT, "config": "x"}, "config folder goes with"),
    ],
)
def test_paths_that_lead_nowhere(path: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_source(path, **options)


def test_a_revision_means_nothing_on_disk(tiny_model_folder: Path) -> None:
    with pytest.raises(UserError, match="revision means nothing"):
        load_source(tiny_model_folder, COMMIT)


def test_hub_id_is_loaded_from_the_snapshot_of_its_commit(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / COMMIT
    shutil.copytree(tiny_model_folder, snapshot)
    asked = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(snapshot)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    found = load_source("owner/name", "main")
    assert (found.revision, found.path, found.folder) == (COMMIT, "owner/name", snapshot)
    assert asked == {"repository": "owner/name", "revision": "main", "use_safetensors": True}


def _hub(kind: type, **attributes: Any) -> Exception:
    fault = kind.__new__(kind)
    Exception.__init__(fault, "raw words of the client")
    return fault


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (_hub(errors.GatedRepoError), "is gated"),
        (_hub(errors.RevisionNotFoundError), "check the revision"),
        (_hub(errors.RepositoryNotFoundError), "was not found"),
        (_hub(errors.LocalEntryNotFoundError), "hub is out of reach"),
        (_hub(errors.OfflineModeIsEnabled), "HF_HUB_OFFLINE"),
        (ConnectionError("down"), "hub is out of reach"),
        (ValueError("something else\nat length"), r"cannot be got from the hub \(something else\)"),
    ],
)
def test_hub_failures_say_which(monkeypatch: pytest.MonkeyPatch, fault: Exception, said: str) -> None:
    def download(*_: Any, **__: Any) -> str:
        try:
            raise fault
        except Exception as cause:
            raise OSError("cannot load model") from cause

    def directly(*_: Any, **__: Any) -> str:
        raise fault

    wraps = not isinstance(fault, ValueError)
    monkeypatch.setattr(DiffusionPipeline, "download", download if wraps else directly)
    with pytest.raises(UserError, match=said):
        load_source("owner/name", COMMIT)


def test_single_file_equals_its_folder(
    tiny_pipeline: StableDiffusionPipeline, tiny_model_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.safetensors"
    save_single_file(tiny_pipeline, path)
    found = load_source(path, config=tiny_model_folder)
    assert found.weights_sha256 == sha256(path)
    assert found.folder is None
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(found.pipeline, part).state_dict(), getattr(tiny_pipeline, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part


def test_single_file_failures(
    tiny_pipeline: StableDiffusionPipeline,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "tiny.safetensors"
    save_single_file(tiny_pipeline, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="truncated"):
        load_source(path, config=tiny_model_folder)
    path.write_bytes(whole)
    reweigh(path, _without("model.diffusion_model.out.2.weight"))
    with pytest.raises(UserError, match="lacks"):
        load_source(path, config=tiny_model_folder)
    with pytest.raises(UserError, match="no such folder"):
        load_source(path, config=tmp_path / "none")
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="can run code"):
        load_source(pickled)
    monkeypatch.setattr(source_module, "_config_from_hub", lambda _: tiny_model_folder)
    path.write_bytes(whole)
    assert load_source(path).pipeline.unet is not None
