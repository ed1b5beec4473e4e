"""The unconditional model: its training, what it exports, and the one that ships."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline
from torch import Tensor

from halftone.errors import UserError
from halftone.scenes import realism, train_uncond, uncond
from halftone.scenes.train_uncond import CHECKPOINT, Plan, Trainer
from halftone.scenes.training import load_checkpoint

SHIPPED = Path(__file__).parents[2] / "data/models/scenes-uncond"
TINY = Plan(images=96, batch=8, widths=(8, 16, 16), first_save=32, sheet=2, sheet_steps=2)


class Killed(Exception):
    """Stands for a kill: nothing is written after it."""


class Stopped(Trainer):
    """Sends itself SIGTERM, or is killed, after the step in which it has seen ``after`` images."""

    def __init__(self, work: Path, plan: Plan, after: int, kill: bool) -> None:
        super().__init__(work, plan)
        self.after, self.kill = after, kill

    def step(self) -> Tensor:
        loss = super().step()
        if self.images == self.after:
            if self.kill:
                raise Killed
            signal.raise_signal(signal.SIGTERM)
        return loss


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of a tiny training that was never stopped."""
    work = tmp_path_factory.mktemp("uncond")
    Trainer(work, TINY).run()
    return work


def test_training_lowers_its_loss(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, Plan(images=320, batch=8, widths=(8, 16, 16), peak=3e-3))
    losses = [float(trainer.step()) for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


@pytest.mark.parametrize("kill", [False, True])
def test_a_stopped_run_ends_at_the_weights_of_an_unbroken_one(
    trained: Path, tmp_path: Path, kill: bool
) -> None:
    first = Stopped(tmp_path, TINY, after=48, kill=kill)
    if kill:
        with pytest.raises(Killed):
            first.run()
    else:
        first.run()
    second = Trainer(tmp_path, TINY)
    assert second.images == (32 if kill else 48)  # the last checkpoint, or one written on the way out
    second.run()
    expected, found = (load_checkpoint(work / CHECKPOINT) for work in (trained, tmp_path))
    assert expected[1] == found[1]
    for part, tensors in expected[0].items():
        assert all(torch.equal(t, found[0][part][name]) for name, t in tensors.items()), part


def test_training_shows_pictures_on_the_way(trained: Path) -> None:
    assert [p.name for p in sorted((trained / "sheets").iterdir())] == [
        "images-0000032.png",
        "images-0000096.png",
    ]


def test_an_export_is_a_diffusers_folder_in_half_precision(trained: Path, tmp_path: Path) -> None:
    pipe, images = train_uncond.checkpoint_pipeline(trained)
    assert images == TINY.images
    folder = tmp_path / "model"
    uncond.save(pipe, folder)
    half = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(half, DDIMPipeline)
    assert len(list(folder.rglob("*.safetensors"))) == 1
    drawn = uncond.sample(uncond.load(folder), 3, steps=2)
    assert drawn.shape == (3, 32, 32, 3)
    assert drawn.dtype == np.uint8


def test_a_folder_without_a_model_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_index\.json: no such file"):
        uncond.load(tmp_path)


def test_halving_averages_and_doubling_repeats() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(2, 64, 64, 3), dtype=np.uint8)
    halved = uncond.halve(pixels)
    corner = pixels[1, 2:4, 6:8, 2].astype(float).mean()
    assert abs(float(halved[1, 1, 3, 2]) - corner) <= 0.5
    assert np.array_equal(uncond.halve(uncond.double(halved)), halved)


def test_the_blind_list_is_half_renders_and_its_key_says_which() -> None:
    generated, renders = (np.full((60, 32, 32, 3), level, np.uint8) for level in (0, 255))
    pictures, key = realism.blind_list(generated, renders, seed=3)
    assert [bool(p[0, 0, 0]) for p in pictures] == key
    assert sum(key) == 50
    assert len(key) == 100
    assert key != sorted(key)


def test_renders_are_no_farther_from_renders_than_the_floor() -> None:
    rng = np.random.default_rng(0)
    features = [torch.from_numpy(rng.normal(size=(200, 4))) for _ in range(3)]
    found = realism.distance_figures(features[0], features[1], features[2], seed=0)
    far = realism.distance_figures(features[0] + 1, features[1], features[2], seed=0)
    for name in ("frechet", "kernel"):
        assert found[f"{name}_excess"]["lo"] < 0 < found[f"{name}_excess"]["hi"]
        assert far[f"{name}_excess"]["lo"] > 0
        assert far[f"{name}_floor"] == found[f"{name}_floor"]


def _stands_out(picture: np.ndarray) -> bool:
    """At least 20 of 1,024 pixels are far from the median of the frame."""
    frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]).astype(float)
    off = np.abs(picture.astype(float) - np.median(frame, axis=0)).max(axis=-1)
    return bool((off > 50).sum() >= 20)


@pytest.mark.skipif(not SHIPPED.exists(), reason="data/models/scenes-uncond is not there")
def test_the_shipped_model_draws_objects() -> None:
    pipe = uncond.load(SHIPPED)
    assert sum(p.numel() for p in pipe.unet.parameters()) <= 1_500_000
    assert sum(f.stat().st_size for f in SHIPPED.rglob("*") if f.is_file()) <= 3 << 20
    drawn = uncond.sample(pipe, 8, seed=100, steps=25)
    assert sum(_stands_out(picture) for picture in drawn) >= 6
    assert len({picture.tobytes() for picture in drawn}) == 8
