"""A scenario's row: what is measured, what is left out, and that every figure can be computed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from halftone.columns import NAMES
from halftone.errors import UserError
from halftone.evaluate import distances
from halftone.evaluate.features import FeatureNetwork, Images, channels_first
from halftone.evaluate.images import ImageSet
from halftone.evaluate.metrics import Measurement, Measurer, write
from halftone.evaluate.statistics import SAME
from halftone.report.summary import read_rows
from halftone.scenes.grammar import caption, sample_scene
from halftone.scenes.render import render
from halftone.settings import Metrics

SETTINGS = Metrics(features="scenes", clip="scenes", bootstrap=200)
IDENTITY = {
    "model": "m",
    "scenario": "m_r_w4a8_t",
    "recipe": "r",
    "tier": "t",
    "execution": "simulated",
    "seed": 0,
}
FP = {**IDENTITY, "scenario": "m_fp_t", "recipe": "fp", "execution": "float"}


class Averages(FeatureNetwork):
    """Twelve features: the mean colour of each quarter."""

    name = "averages"

    def features(self, images: Images) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(channels_first(images).float() / 64, 2).flatten(1)

    def perceptual(self, images: Images, reference: Images) -> torch.Tensor:
        return (self.features(images) - self.features(reference)).abs().mean(1)


class Brightness:
    """Stands for a CLIP: the mean of an image's levels, whatever the prompt."""

    name = "brightness"

    def cosines(self, images: Images, prompts: list[str]) -> torch.Tensor:
        return torch.from_numpy(images.mean((1, 2, 3)) / 255).float()


def measurer(seed: int = 0) -> Measurer:
    return Measurer(SETTINGS, seed, network=Averages(), clip=Brightness())  # type: ignore[arg-type]


def noisy(images: Images, levels: float, seed: int = 0) -> Images:
    drawn = images + np.random.default_rng(seed).normal(0, levels, images.shape)
    return np.clip(np.rint(drawn), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def scenes() -> tuple[ImageSet, list[str]]:
    """24 renders in two seed sets."""
    rng = np.random.default_rng(0)
    drawn = [sample_scene(rng, 0.25) for _ in range(24)]
    prompts = [caption(s, k % 3) for k, s in enumerate(drawn)]
    return ImageSet(render(drawn, np.arange(24)), render(drawn, np.arange(24) + 1000)), prompts


@pytest.fixture(scope="module")
def many() -> tuple[ImageSet, list[str]]:
    """500 small pictures of nothing, each prompt with its own mean colour."""
    rng = np.random.default_rng(1)
    colours = rng.integers(60, 200, (500, 1, 1, 3))
    a, b = (noisy(np.broadcast_to(colours, (500, 16, 16, 3)).astype(np.uint8), 12, seed) for seed in (1, 2))
    return ImageSet(a, b), [f"prompt {k}" for k in range(500)]


@pytest.fixture(scope="module")
def damaged(many: tuple[ImageSet, list[str]]) -> Measurement:
    whole, prompts = many
    worse = ImageSet(noisy(whole.a // 2, 30, 3), noisy(whole.b // 2, 30, 4))
    return measurer().measure(worse, whole, prompts, IDENTITY)


def test_full_precision_gives_its_row_and_the_floor(many: tuple[ImageSet, list[str]]) -> None:
    whole, prompts = many
    own, floor = measurer().measure(whole, whole, prompts, FP).rows
    assert (own["recipe"], own["scenario"]) == ("fp", "m_fp_t")
    assert (floor["recipe"], floor["scenario"]) == ("fp-floor", "m_fp_t-floor")
    assert (own["fid_to_fp"], own["kid_to_fp"], own["lpips"], own["psnr"], own["ssim"]) == (0, 0, 0, 100, 1)
    assert floor["fid_to_fp"] == floor["fid_to_fp_unpaired"] == own["fid_to_fp_unpaired"] > 0
    assert floor["fid_to_fp_lo"] < floor["fid_to_fp"] < floor["fid_to_fp_hi"]
    assert floor["lpips"] is floor["psnr"] is None  # images on other noise have no pairs
    expected = distances.frechet(Averages().features(whole.b), Averages().features(whole.a))
    assert floor["fid_to_fp"] == pytest.approx(expected, rel=1e-5)


def test_damage_is_seen_in_every_figure(damaged: Measurement, many: tuple[ImageSet, list[str]]) -> None:
    whole, prompts = many
    (row,) = damaged.rows
    floor = measurer().measure(whole, whole, prompts, FP).rows[1]
    assert row["fid_to_fp"] > 10 * floor["fid_to_fp"]
    assert row["fid_to_fp_unpaired"] > 10 * floor["fid_to_fp"]
    assert row["psnr"] < 30
    assert row["psnr_lo"] < row["psnr"] < row["psnr_hi"]
    assert "fid_excess" in damaged.verdict
    excess = damaged.differences["fid_excess"]
    assert excess.value == pytest.approx(row["fid_to_fp_unpaired"] - floor["fid_to_fp"], rel=1e-4)
    assert excess.value > 10 * excess.error
    alone = row["fid_to_fp_unpaired_hi"] - row["fid_to_fp_unpaired_lo"]
    assert (
        3.5 * excess.error < alone < excess.hi - excess.lo
    )  # differences hold together: wider than one alone


def test_figures_that_do_not_apply_are_left_out(damaged: Measurement) -> None:
    row = damaged.rows[0]
    assert tuple(row) == NAMES
    assert row["alignment"] is row["abstain_rate"] is row["fid_to_real"] is row["inception_score"] is None
    assert row["n_images"] == 500
    assert row["features"] == "averages"


def test_an_unharmed_model_is_not_distinguishable(many: tuple[ImageSet, list[str]]) -> None:
    whole, prompts = many
    same = ImageSet(noisy(whole.a, 0.6, 5), noisy(whole.b, 0.6, 6))
    found = measurer().measure(same, whole, prompts, IDENTITY)
    assert found.rows[0]["psnr"] > 45
    assert found.verdict == SAME


def test_few_images_get_the_kernel_distance_only(scenes: tuple[ImageSet, list[str]]) -> None:
    whole, prompts = scenes
    found = measurer().measure(ImageSet(noisy(whole.a, 40), noisy(whole.b, 40, 1)), whole, prompts, IDENTITY)
    row = found.rows[0]
    assert not [name for name in NAMES if name.startswith("fid_") and row[name] is not None]
    assert row["kid_to_fp"] is not None
    assert set(found.differences) == {"kid_excess", "alignment", "clip_score"}


def test_paired_rows_have_errors_per_call_and_no_distances(scenes: tuple[ImageSet, list[str]]) -> None:
    whole, prompts = scenes
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(24, 3, 4, 2, 2)).astype(np.float16)
    worse = latents * np.array([1, 1.5, 2], np.float16)[None, :, None, None, None]
    flipped = whole.a.copy()
    flipped[:6] = whole.a[6:12]
    reference = ImageSet(whole.a, None, latents)
    found = measurer().measure(ImageSet(flipped, None, worse), reference, prompts, IDENTITY)
    row = found.rows[0]
    assert [round(estimate.value, 3) for estimate in found.latent_error] == [0, 0.5, 1]
    assert row["latent_error"] == pytest.approx(1, abs=1e-3)
    assert row["alignment_flips"] == 0.25
    assert row["kid_to_fp"] is None
    assert set(found.differences) == {"alignment", "clip_score"}
    own = measurer().measure(reference, reference, prompts, FP)
    assert len(own.rows) == 1, "no floor without other noise"


def test_alignment_is_that_of_seed_set_a(scenes: tuple[ImageSet, list[str]]) -> None:
    whole, prompts = scenes
    wrong = ImageSet(whole.a[::-1].copy(), whole.b)
    own = measurer().measure(whole, whole, prompts, FP).rows[0]
    row = measurer().measure(wrong, whole, prompts, IDENTITY).rows[0]
    assert (own["alignment"], own["alignment_objects"], own["abstain_rate"]) == (1, 1, 0)
    assert row["alignment"] < 0.2
    assert row["alignment_lo"] <= row["alignment"] <= row["alignment_hi"]


def test_every_figure_can_be_computed_again(
    damaged: Measurement, many: tuple[ImageSet, list[str]], tmp_path: Path
) -> None:
    whole, prompts = many
    fp = measurer().measure(whole, whole, prompts, FP)
    write(damaged, tmp_path / "r.json", "{}")
    write(fp, tmp_path / "fp.json", "{}")
    kept, base = load_file(tmp_path / "r.safetensors"), load_file(tmp_path / "fp.safetensors")
    row = read_rows(tmp_path / "r.json")[0]
    for name in ("clip_score", "lpips", "psnr", "ssim"):
        assert float(kept[name].double().mean()) == pytest.approx(row[name], rel=1e-5)
    assert distances.frechet(kept["features_a"], base["features_a"]) == pytest.approx(
        row["fid_to_fp"], rel=1e-4
    )
    assert distances.frechet(kept["features_b"], base["features_a"]) == pytest.approx(
        row["fid_to_fp_unpaired"], rel=1e-4
    )
    assert distances.kernel(kept["features_a"], base["features_a"]) == pytest.approx(
        row["kid_to_fp"], rel=1e-4
    )


def test_the_same_images_give_the_same_bytes(scenes: tuple[ImageSet, list[str]], tmp_path: Path) -> None:
    whole, prompts = scenes
    worse = ImageSet(noisy(whole.a, 20), noisy(whole.b, 20))
    for name in ("one", "two"):
        write(measurer().measure(worse, whole, prompts, IDENTITY), tmp_path / name / "r.json", '{"a": 1}')
    for kind in ("json", "safetensors"):
        assert (tmp_path / f"one/r.{kind}").read_bytes() == (tmp_path / f"two/r.{kind}").read_bytes()
    content: dict[str, Any] = json.loads((tmp_path / "one/r.json").read_text())
    assert content["clip"] == "brightness"
    assert content["provenance"] == {"a": 1}


def test_what_does_not_belong_together_is_refused(scenes: tuple[ImageSet, list[str]]) -> None:
    whole, prompts = scenes
    with pytest.raises(UserError, match="do not belong together; sample both again"):
        measurer().measure(whole, whole, prompts[:-1], IDENTITY)
    with pytest.raises(ValueError, match="not columns of the summary: colour"):
        measurer().measure(whole, whole, prompts, {**IDENTITY, "colour": 1})
    with pytest.raises(ValueError, match="seed sets differ"):
        ImageSet(whole.a, whole.b[:-1])


def test_without_prompts_the_distances_remain(many: tuple[ImageSet, list[str]]) -> None:
    whole, _ = many
    worse = ImageSet(noisy(whole.a // 2, 30, 3), noisy(whole.b // 2, 30, 4))
    found = measurer().measure(worse, whole, None, IDENTITY, real_images=whole.b)
    (row,) = found.rows
    expected = distances.frechet(Averages().features(worse.a), Averages().features(whole.b))
    assert row["fid_to_real"] == pytest.approx(expected, rel=1e-5)
    assert row["fid_to_real_lo"] < row["fid_to_real"] < row["fid_to_real_hi"]
    assert row["clip_score"] is row["alignment"] is None
    assert (list(found.differences), found.clip) == (["fid_excess"], None)
    assert found.verdict == "differs from full precision in fid_excess"
