"""The feature network of FID, KID and feature LPIPS on scenes: 64 features of a 64x64 picture.

A small convolutional network, trained on renders to tell with linear heads both what is shown (the
attributes of every object, the arrangement, the ground) and how it is damaged (the strength of every
kind of corruption). A network that learned attributes alone would not see noise. The features are
the input of the heads, standardized on clean renders.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from halftone.errors import UserError
from halftone.files import read_json, write_json, writing
from halftone.progress import Progress
from halftone.scenes.corruptions import CORRUPTIONS, Corruption, corrupt
from halftone.scenes.grammar import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Relation,
    Scene,
    SceneObject,
    sample_scene,
)
from halftone.scenes.render import SIDE, Pixels, render
from halftone.scenes.training import (
    adamw,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    save_checkpoint,
    set_rate,
    warmed_cosine,
)

FOLDER = Path("data/models/scenes-metrics")
WEIGHTS, CONFIG = "feature_net.safetensors", "feature_net.json"
FEATURES = 64
WIDTHS = (32, 64, 96)
PEAK_RATE = 3e-3
CHUNK = 2048  # images rendered at a time
SAVE_EVERY = 4  # chunks between checkpoints
BATCH = 64
DAMAGED = 0.7  # share of training images that are damaged, half of them in two ways
# heads: (name, classes); an object's first class is "absent" where it may be
_OBJECT_HEADS = (("shape", 1 + len(SHAPES)), ("colour", 1 + len(COLOURS)), ("size", 1 + len(SIZES)))
HEADS = (
    *((f"{name}{slot}", count) for slot in (0, 1) for name, count in _OBJECT_HEADS),
    ("arrangement", 3),
    ("background", len(BACKGROUNDS)),
    ("texture", len(TEXTURES)),
)
_LEADING = (Relation.LEFT, Relation.ABOVE)


class _Stage(nn.Sequential):
    """A residual-free pair of convolutions; the first halves the side."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(),
        )


class FeatureNet(nn.Module):
    """uint8 [n, 3, h, w] -> float32 [n, 64]; other sides than 64 are resized bilinearly first."""

    offset: Tensor
    spread: Tensor
    num_features = FEATURES  # read by torchmetrics

    def __init__(self) -> None:
        super().__init__()
        kernels = (4, 3, 3)
        self.stages = nn.ModuleList(
            _Stage(i, o, k) for i, o, k in zip((3, *WIDTHS), WIDTHS, kernels, strict=False)
        )
        self.pool = nn.AvgPool2d(2)
        self.project = nn.Linear(WIDTHS[-1] * 16, FEATURES)
        self.register_buffer("offset", torch.zeros(FEATURES))
        self.register_buffer("spread", torch.ones(FEATURES))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Activations after each stage, from fine to coarse: [n, c, 32, 32], [n, c, 16, 16], [n, c, 8, 8]."""
        x = images.float()
        if x.shape[-2:] != (SIDE, SIDE):
            x = functional.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        x = (x / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        maps = []
        for stage in self.stages:
            maps.append(x := stage(x))
        return maps

    def embed(self, images: Tensor) -> Tensor:
        """Features before they are standardized: what the heads read."""
        return self.project(self.pool(self.maps(images)[-1]).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return (self.embed(images) - self.offset) / self.spread


class Heads(nn.Module):
    """Linear in the features: class scores of ``HEADS`` and strengths of ``CORRUPTIONS``. Training only."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Linear(FEATURES, sum(count for _, count in HEADS))
        self.strengths = nn.Linear(FEATURES, len(CORRUPTIONS))

    def forward(self, features: Tensor) -> tuple[list[Tensor], Tensor]:
        return list(self.classes(features).split([c for _, c in HEADS], dim=1)), self.strengths(features)


def targets(scenes: Sequence[Scene]) -> NDArray[np.int64]:
    """[n, heads]: class indices, objects in the order left to right or top to bottom."""
    rows = np.zeros((len(scenes), len(HEADS)), np.int64)
    for row, scene in zip(rows, scenes, strict=True):
        objects: list[SceneObject] = list(scene.objects)
        arrangement = 0
        if scene.relation is not None:
            arrangement = 1 if scene.relation in (Relation.LEFT, Relation.RIGHT) else 2
            if scene.relation not in _LEADING:
                objects.reverse()
        for slot, thing in enumerate(objects):
            row[3 * slot : 3 * slot + 3] = (
                1 + SHAPES.index(thing.shape),
                1 + COLOURS.index(thing.colour),
                1 + SIZES.index(thing.size),
            )
        row[6:] = (arrangement, BACKGROUNDS.index(scene.background), TEXTURES.index(scene.texture))
    return rows


def damage(images: Pixels, rng: np.random.Generator) -> tuple[Pixels, NDArray[np.float32]]:
    """Images with none, one or two kinds of damage, and the strengths [n, kinds]."""
    n = len(images)
    strengths = np.zeros((n, len(CORRUPTIONS)), np.float32)
    times = (rng.random(n) < DAMAGED).astype(int) * (1 + (rng.random(n) < 0.5))
    for k in range(n):
        kinds = rng.choice(len(CORRUPTIONS), times[k], replace=False)
        strengths[k, kinds] = rng.random(times[k])
    for kind in (Corruption.DELETION, *(c for c in CORRUPTIONS if c != Corruption.DELETION)):
        images = corrupt(images, kind, strengths[:, CORRUPTIONS.index(kind)], rng.integers(1 << 40, size=n))
    return images, strengths


def to_tensor(images: Pixels) -> Tensor:
    """uint8 [n, h, w, 3] -> uint8 [n, 3, h, w]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous()


def _chunk(seed: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, classes and strengths of one chunk, a function of (seed, number) alone."""
    rng = np.random.default_rng([seed, number])
    scenes = [sample_scene(rng, 0.4) for _ in range(CHUNK)]
    images, strengths = damage(render(scenes, rng.integers(1 << 40, size=CHUNK)), rng)
    return to_tensor(images), torch.from_numpy(targets(scenes)), torch.from_numpy(strengths)


def _losses(
    scores: list[Tensor], strengths: Tensor, classes: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    named = torch.stack([functional.cross_entropy(s, classes[:, k]) for k, s in enumerate(scores)])
    return named.mean(), functional.mse_loss(strengths, wanted)


def train(folder: Path, work: Path, images: int, seed: int = 11) -> dict[str, float]:
    """Trains on fresh renders and writes ``folder``; resumes from the checkpoint in ``work``.

    Returns the figures that go into the configuration file.
    """
    torch.manual_seed(seed)
    model, heads = FeatureNet(), Heads()
    both = nn.ModuleDict({"net": model, "heads": heads})
    optimizer = adamw([(list(both.parameters()), PEAK_RATE)], decay=0.02)
    chunks, start = -(-images // CHUNK), 0
    checkpoint = work / "feature_net.checkpoint.safetensors"
    if checkpoint.exists():
        parts, facts = load_checkpoint(checkpoint)
        both.load_state_dict(parts["model"])
        load_optimizer(optimizer, parts["optimizer"])
        start = int(facts["chunks"])
    progress = Progress("feature network", chunks * CHUNK)
    progress.done = start * CHUNK
    spent = time.process_time()
    for number in range(start, chunks):
        pixels, classes, strengths = _chunk(seed, number)
        both.train()
        total = torch.zeros(2)
        for at in range(0, CHUNK, BATCH):
            set_rate(optimizer, warmed_cosine((number + at / CHUNK) / chunks, 0.03))
            part = slice(at, at + BATCH)
            scores, found = heads(model.embed(pixels[part]))
            loss = torch.stack(_losses(scores, found, classes[part], strengths[part]))
            optimizer.zero_grad(set_to_none=True)
            (loss[0] + 8 * loss[1]).backward()
            torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
            optimizer.step()
            total += loss.detach() * BATCH / CHUNK
        if (number + 1) % SAVE_EVERY == 0 or number == chunks - 1:
            state = {"model": both.state_dict(), "optimizer": optimizer_tensors(optimizer)}
            save_checkpoint(checkpoint, state, {"chunks": number + 1})
        seconds = time.process_time() - spent
        note = f"classes {total[0]:.3f}, strengths {total[1]:.4f}, {seconds:.0f} s of processor"
        progress.advance(CHUNK, note)
    both.eval()
    standardize(model, seed)
    figures = evaluate(model, heads, seed)
    save(model, folder, {"images": chunks * CHUNK, "seed": seed, **figures})
    return figures


@torch.no_grad()
def standardize(model: FeatureNet, seed: int) -> None:
    """Sets offset and spread so that features of clean renders have mean 0 and standard deviation 1."""
    rng = np.random.default_rng([seed, 1, 0])
    scenes = [sample_scene(rng, 0.25) for _ in range(CHUNK)]
    features = model.embed(to_tensor(render(scenes, rng.integers(1 << 40, size=CHUNK))))
    model.offset.copy_(features.mean(0))
    model.spread.copy_(features.std(0))


@torch.no_grad()
def evaluate(model: FeatureNet, heads: Heads, seed: int) -> dict[str, float]:
    """Accuracy of every head on clean renders, and the mean absolute error of each strength."""
    rng = np.random.default_rng([seed, 2, 0])
    scenes = [sample_scene(rng, 0.25) for _ in range(CHUNK)]
    clean = render(scenes, rng.integers(1 << 40, size=CHUNK))
    classes = torch.from_numpy(targets(scenes))
    scores, _ = heads(model.embed(to_tensor(clean)))
    figures = {
        f"accuracy_{name}": float((s.argmax(1) == classes[:, k]).float().mean())
        for k, ((name, _), s) in enumerate(zip(HEADS, scores, strict=True))
    }
    damaged, wanted = damage(clean, rng)
    _, strengths = heads(model.embed(to_tensor(damaged)))
    errors = (strengths - torch.from_numpy(wanted)).abs().mean(0)
    figures |= {f"error_{kind}": float(e) for kind, e in zip(CORRUPTIONS, errors, strict=True)}
    return {name: round(value, 4) for name, value in figures.items()}


def save(model: FeatureNet, folder: Path, figures: dict[str, float]) -> None:
    """Weights in fp16 and the configuration; batch statistics and vectors stay fp32 (they are small)."""
    tensors = {
        name: t.half() if t.ndim > 1 else t.float()
        for name, t in model.state_dict().items()
        if t.is_floating_point()
    }
    with writing(folder / WEIGHTS) as temporary:
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary)
    write_json(
        folder / CONFIG, {"features": FEATURES, "widths": list(WIDTHS), "side": SIDE, "training": figures}
    )


def load(folder: Path = FOLDER) -> FeatureNet:
    """The trained network, in evaluation mode. UserError when it is missing or of another shape."""
    if not (folder / WEIGHTS).exists():
        raise UserError(
            f"{folder / WEIGHTS}: no such file; run: python -m halftone.scenes.feature_net {folder}"
        )
    config = read_json(folder / CONFIG)
    if (config.get("features"), config.get("widths")) != (FEATURES, list(WIDTHS)):
        raise UserError(f"{folder / CONFIG}: describes another network; train it again with this version")
    model = FeatureNet()
    tensors = {name: t.float() for name, t in load_file(folder / WEIGHTS).items()}
    counters = {n: t for n, t in model.state_dict().items() if not t.is_floating_point()}
    try:
        model.load_state_dict({**counters, **tensors})
    except RuntimeError:
        raise UserError(f"{folder / WEIGHTS}: tensors do not fit {CONFIG}; fetch or train it again") from None
    return model.eval().requires_grad_(False)


def main(
    folder: Annotated[Path, typer.Argument(help="where the network goes")] = FOLDER,
    work: Annotated[Path, typer.Option(help="where checkpoints go")] = Path("build/feature-net"),
    images: Annotated[int, typer.Option(min=1, help="training images")] = 80_000,
    seed: Annotated[int, typer.Option(min=0)] = 11,
) -> None:
    """Train the feature network of the scenes metrics."""
    for name, value in train(folder, work, images, seed).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    typer.run(main)
