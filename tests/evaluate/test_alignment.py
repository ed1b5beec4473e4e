"""CLIP scores and the checker on whole sets of images."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch

from halftone.errors import UserError
from halftone.evaluate import alignment
from halftone.scenes.grammar import parse, sample_scene
from halftone.scenes.render import render


def test_scale_of_clip_scores() -> None:
    """Below zero counts as zero; a cosine of 0.31 is 31."""
    assert alignment.clip_scores(torch.tensor([-0.2, 0.31])).tolist() == pytest.approx([0.0, 31.0])


class Fake:
    """An open_clip model whose embeddings are given: the brightness of the image, and the word 'bright'."""

    def eval(self) -> Fake:
        return self

    def encode_image(self, pixels: torch.Tensor, normalize: bool) -> torch.Tensor:
        assert normalize
        bright = pixels.mean((1, 2, 3))
        return torch.nn.functional.normalize(torch.stack([bright, 1 - bright], 1), dim=-1)

    def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
        assert normalize
        return torch.stack([tokens, 1 - tokens], 1).float()


def test_each_image_is_compared_with_its_own_prompt() -> None:
    from torchvision.transforms import ToTensor

    clip = alignment.Clip(
        "fake", Fake(), ToTensor(), lambda texts: torch.tensor(["bright" in t for t in texts]).long()
    )
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[0] = 255
    prompts = ["a bright image", "a bright image", "a dark image"]
    assert clip.cosines(images, prompts).tolist() == pytest.approx([1, 0, 1])
    assert clip.cosines(images[:1], prompts[:1]).tolist() == pytest.approx([1])
    with pytest.raises(ValueError, match="3 images for 1 prompts"):
        clip.cosines(images, prompts[:1])


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("no-such-model", "is no open_clip model"),
        ("no-such-model/openai", "is no open_clip model"),
        ("ViT-B-32", "is no open_clip model"),
        ("ViT-B-32/no-such-weights", "choose one of openai"),
    ],
)
def test_unknown_clips_are_refused_with_what_to_write(setting: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        alignment.open_clip_model(setting)


def test_weights_that_cannot_be_had_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip reports a failed download as RuntimeError."""

    def offline(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Failed to download weights for tag 'openai'")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", offline)
    with pytest.raises(UserError, match=r"metrics.clip: ViT-B-32/openai: cannot load.*metrics.clip: scenes"):
        alignment.open_clip_model("ViT-B-32/openai")


def test_checks_every_image_against_its_own_scene() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, 0.0) for _ in range(6)]
    images = render(scenes, np.arange(6))
    right = alignment.check(images, scenes)
    assert right.objects.tolist() == right.everything.tolist() == [1] * 6
    assert right.abstained.tolist() == [0] * 6
    turned = alignment.check(images, scenes[1:] + scenes[:1])
    assert turned.everything.sum() == 0


def test_scenes_of_prompts() -> None:
    images = np.zeros((2, 64, 64, 3), np.uint8)
    said = "a small red star on a plain grey background"
    assert alignment.scenes_of(images, [said, said]) == [parse(said)] * 2
    assert alignment.scenes_of(images, [said, "a photograph of a cat"]) is None
    assert alignment.scenes_of(images[:, :32, :32], [said, said]) is None
