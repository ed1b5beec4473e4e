"""A model without text, from its folder to a row of figures, by the verbs."""

from __future__ import annotations

import itertools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    StableVideoDiffusionPipeline,
    UNet2DModel,
    VQModel,
)
from PIL import Image

import halftone
from halftone.artefact import info
from halftone.cli import main
from halftone.columns import DISTRIBUTION
from halftone.denoiser import denoiser_of
from halftone.errors import UserError
from halftone.evaluate.real import read_real
from halftone.files import read_json
from halftone.passes.rollout import roll, runs_of, teacher_forced
from halftone.propagation import propagation
from halftone.report.summary import read_csv
from halftone.sampling import load_subject, sample
from halftone.settings import PromptSet
from halftone.shards import SeedSet, read_shard
from halftone.source import load_source
from halftone.steps.record import record
from halftone.unconditional import (
    check_call,
    check_text,
    first_id,
    guidance_of,
    numbered,
    set_of,
    usual_guidance,
)
from without_text import tiny

COUNT = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def artefact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("artefact") / "q"
    how: dict[str, Any] = {"n_prompts": 2, "steps": 2, "budget": "smoke", "bits": "w4a8"}
    return halftone.quantize(str(model), "qdiffusion", None, output, **how)


@pytest.fixture(scope="module")
def results(model: Path, artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, figures, table and page, as the rules would leave them."""
    home = tmp_path_factory.mktemp("results")
    zips = {row: home / "sample" / row / "0-of-1.zip" for row in ("fp", "q")}
    sources = {"fp": [str(model), "--steps", "2"], "q": [str(artefact)]}
    for row, source in sources.items():
        asked = ["--n-images", str(COUNT), "--image-set", "test", "-o", str(zips[row])]
        assert main(["sample", *source, *asked]) == 0
        of = [] if row == "fp" else ["--artefact", str(artefact)]
        pair = ["--images", str(zips[row]), "--reference", str(zips["fp"]), "--real-images", "scenes"]
        assert main(["metrics", *pair, *of, "-o", str(home / "metrics" / f"{row}.json")]) == 0
    figures = [str(home / "metrics" / f"{row}.json") for row in zips]
    assert main(["summary", *figures, "-o", str(home / "summary.csv")]) == 0
    assert main(["report", "--summary", str(home / "summary.csv"), "-o", str(home / "report.html")]) == 0
    return home


def test_it_is_calibrated_without_prompts_and_guidance(artefact: Path, model: Path) -> None:
    known = info(artefact)["provenance"]
    assert (known["guidance"], known["n_prompts"], known["model_path"]) == (None, 2, str(model))
    assert set_of(known["prompts_sha256"], 2) is PromptSet.CALIBRATION
    drawn = halftone.load(artefact)(batch_size=1, num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 32, 32, 3)


def test_figures_without_text_are_there_and_those_with_are_empty(results: Path) -> None:
    fp, floor, row = read_csv(results / "summary.csv")
    assert (fp["recipe"], floor["recipe"], row["recipe"]) == ("fp", "fp-floor", "qdiffusion")
    assert row["prompts_sha256"] == fp["prompts_sha256"]
    for one in (fp, floor, row):
        figures = ("clip_score", "alignment", "alignment_objects", "abstain_rate", "alignment_flips")
        assert all(one[name] is None for name in figures)
    assert 0 < row["lpips"] < 1
    assert row["psnr"] < fp["psnr"]
    assert row["kid_to_fp"] is not None
    known = read_json(results / "metrics/q.json")
    assert list(known["differences"]) == ["kid_excess"]
    assert known["clip"] is None


def test_its_images_are_compared_without_prompts(
    results: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    full, row = (str(results / f"sample/{name}/0-of-1.zip") for name in ("fp", "q"))
    assert main(["compare", row, full, "--full", full]) == 0
    said = capsys.readouterr().out
    assert "0 of 5 images identical" in said
    assert "lpips" in said
    (tmp_path / "prompts.txt").write_text("a red star\n")
    assert main(["compare", row, full, "--full", full, "--prompts", str(tmp_path / "prompts.txt")]) == 2
    assert "sampled without prompts" in capsys.readouterr().err


def test_the_page_speaks_of_images_not_of_prompts(results: Path) -> None:
    page = (results / "report.html").read_text()
    assert "test noise, without prompts" in page
    assert "test image 4" in page
    assert "guidance" not in page
    assert "CLIP score" not in page
    assert "Same noise." in page


def test_no_two_sets_share_noise() -> None:
    most = 100_000  # images of a tier
    ids = [range(first_id(one), first_id(one) + most) for one in PromptSet]
    assert all(a.stop <= b.start for a, b in itertools.pairwise(ids))
    hashes = {tuple(numbered(one, 3)) for one in PromptSet}
    assert len(hashes) == len(PromptSet)


def test_an_image_is_the_one_of_its_set_and_number(results: Path, model: Path) -> None:
    shard = read_shard(results / "sample/fp/0-of-1.zip")
    assert shard.index.image_set is PromptSet.TEST
    subject = load_subject(model, steps=2)
    texts = numbered(PromptSet.TEST, COUNT)
    (again,) = sample(subject, texts, [3], shard.index.seeds[SeedSet.A], image_set=PromptSet.TEST)
    (other,) = sample(subject, texts, [3], shard.index.seeds[SeedSet.A], image_set=PromptSet.VALIDATION)
    assert np.array_equal(shard.image(SeedSet.A, 3), again)
    assert not np.array_equal(again, other)


def test_paired_figures_need_no_text_and_give_no_verdict(artefact: Path, model: Path, tmp_path: Path) -> None:
    for row, source in {"fp": [str(model), "--steps", "2"], "q": [str(artefact)]}.items():
        assert (
            main(["sample", *source, "--n-images", "2", "--paired", "-o", str(tmp_path / f"{row}.zip")]) == 0
        )
    pair = ["--images", str(tmp_path / "q.zip"), "--reference", str(tmp_path / "fp.zip")]
    assert main(["metrics", *pair, "--artefact", str(artefact), "-o", str(tmp_path / "q.json")]) == 0
    found = read_json(tmp_path / "q.json")
    assert (found["verdict"], found["differences"]) == ("", {})
    assert found["rows"][0]["latent_error"] == pytest.approx(found["latent_error"][-1]["value"])
    assert all(found["rows"][0][name] is None for name in DISTRIBUTION)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "MODEL", "--steps", "2", "-n", "2", "--guidance", "3"], "guidance means nothing"),
        (["sample", "MODEL", "--steps", "2", "--prompts", "prompts.txt"], "takes no prompt"),
        (["sample", "MODEL", "--steps", "2"], "--n-images"),
        (["sample", "MODEL", "--prompts", "prompts.txt", "--image-set", "test"], "--image-set is for"),
        (["sample", "TEXT", "--steps", "2", "--guidance", "2", "-n", "2"], "give --prompts FILE"),
        (["calibration-data", "TEXT"], "give --prompts FILE"),
        (["calibration-data", "MODEL", "--guidance", "1"], "guidance means nothing"),
        (["calibration-data", "MODEL", "--steps", "2", "--resolution", "64"], "draws at 32x32 only"),
    ],
)
def test_a_mistaken_request_gets_one_line(
    model: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red star\n")
    named = {"MODEL": str(model), "TEXT": str(tiny_model_folder), "-n": "--n-images"}
    assert main([*(named.get(word, word) for word in words), "-o", "out"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said
    assert not Path("out").exists()


def test_error_travels_from_the_noise_that_was_recorded(artefact: Path, model: Path) -> None:
    """The pipeline draws it itself, from generators that every run has to find as they were."""
    source = load_source(model)
    trajectory, known = record(source, 2, steps=2, guidance=None, resolution=None)
    runs = runs_of(source.pipeline, trajectory, known, 2)
    outputs = teacher_forced(denoiser_of(source.pipeline), trajectory, runs)
    for _ in range(2):
        given: list[torch.Tensor] = []

        def answer(call: int, batch: int, inputs: Any, given: list[torch.Tensor] = given) -> torch.Tensor:
            given.append(inputs["sample"])
            return outputs[call][batch]

        roll(source.pipeline, trajectory, runs, answer)
        torch.testing.assert_close(torch.stack(given), trajectory.latents)
    found = propagation(source, trajectory, known, {"q": artefact}, batch_size=2).artefacts[0]
    assert found.free_running[0] == pytest.approx(found.teacher_forced[0], rel=1e-3)
    assert found.free_running[0] < 0.5  # 1.4 from other noise


def test_prompts_given_to_metrics_are_refused(results: Path, tmp_path: Path) -> None:
    images = str(results / "sample/fp/0-of-1.zip")
    (tmp_path / "prompts.txt").write_text("a red star\n")
    words = ["metrics", "--images", images, "--reference", images, "--prompts", str(tmp_path / "prompts.txt")]
    assert main([*words, "-o", str(tmp_path / "x.json")]) == 2


def test_a_pipeline_that_needs_more_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be run without image"):
        check_call(StableVideoDiffusionPipeline.__new__(StableVideoDiffusionPipeline), {}, None)


@pytest.mark.parametrize("verb", ["plan", "quantize"])
def test_classes_that_a_pipeline_does_not_hand_on_are_refused(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    widths: dict[str, Any] = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    denoiser = UNet2DModel(8, **widths, **blocks, num_class_embeds=10)
    DDPMPipeline(denoiser, DDPMScheduler()).save_pretrained(tmp_path / "model")
    words = [verb, str(tmp_path / "model"), "--recipe", "minmax", "--bits", "w8a8"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 2
    assert "DDPMPipeline cannot be run without class_labels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_latent_diffusion_without_text_goes_the_same_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    widths: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    coder = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    vqvae = VQModel(3, 3, **widths, **coder, num_vq_embeddings=16)
    unet = UNet2DModel(8, 3, 3, **widths, **blocks)
    LDMPipeline(vqvae, unet, DDIMScheduler()).save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "model"), "--steps", "2", "--n-prompts", "2", "--budget", "smoke"]
    words += ["--recipe", "tcaq", "--bits", "w6a6b8", "--axes", '{"rounds": 2}', "-o", str(tmp_path / "q")]
    assert main(["quantize", *words, "--resolution", "8"]) == 2  # that of the latents
    assert main(["quantize", *words, "--resolution", "16"]) == 0
    row = ["sample", str(tmp_path / "q"), "--n-images", "1", "-o", str(tmp_path / "q.zip")]
    assert main(row) == 0
    index = read_shard(tmp_path / "q.zip").index
    assert (index.height, index.width) == (16, 16)


def test_guidance_belongs_to_text(tiny_pipeline: Any) -> None:
    assert usual_guidance(tiny_pipeline) == 7.5
    assert guidance_of(tiny_pipeline, None, 7.5) == 7.5
    assert guidance_of(tiny_pipeline, 2.0, 7.5) == 2.0
    check_text(tiny_pipeline, True)


LIKE = np.zeros((3, 32, 32, 3), np.uint8)


def test_renders_stand_for_real_images_and_every_set_has_its_own() -> None:
    drawn = read_real("scenes", LIKE, PromptSet.VALIDATION)
    other = read_real("scenes", LIKE, PromptSet.TEST)
    assert drawn is not None
    assert other is not None
    assert drawn.shape == LIKE.shape
    assert np.array_equal(drawn, read_real("scenes", LIKE, PromptSet.VALIDATION))
    assert not np.array_equal(drawn, other)
    assert read_real(None, LIKE, PromptSet.TEST) is None


def test_ones_own_real_images_come_from_a_folder_or_a_zip(tmp_path: Path) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    for k in range(4):
        Image.fromarray(np.full((32, 32, 3), 40 * k, np.uint8)).save(folder / f"{k}.png")
    with zipfile.ZipFile(tmp_path / "real.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    for given in (folder, tmp_path / "real.zip"):
        found = read_real(str(given), LIKE, None)
        assert found is not None
        assert found[:, 0, 0, 0].tolist() == [0, 40, 80]
    with pytest.raises(UserError, match="holds 4 images"):
        read_real(str(folder), np.zeros((5, 32, 32, 3), np.uint8), None)
    with pytest.raises(UserError, match=r"0\.png is 32x32"):
        read_real(str(folder), np.zeros((3, 16, 16, 3), np.uint8), None)
    with pytest.raises(UserError, match="no such folder or zip"):
        read_real(str(tmp_path / "gone"), LIKE, None)
    (folder / "0.png").write_text("no image")
    with pytest.raises(UserError, match="not an image"):
        read_real(str(folder), LIKE, None)
    with pytest.raises(UserError, match="for a model without text"):
        read_real("scenes", LIKE, None)
