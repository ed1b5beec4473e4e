"""The metric CLIP of scenes: open_clip's own model class, small, and never the conditioner.

Trained contrastively on renders, with hard negatives: captions that differ from the right one in one
attribute, or in what belongs to which object. Both towers also name the scene's attributes through
linear heads, which are dropped afterwards. The folder it writes is one that open_clip reads by itself
(``local-dir:``), so that the metrics load it as they load any published CLIP.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from halftone.files import write_json, writing
from halftone.progress import Progress
from halftone.scenes.corruptions import Corruption, corrupt
from halftone.scenes.feature_net import FOLDER as METRICS_FOLDER
from halftone.scenes.feature_net import HEADS, targets, to_tensor
from halftone.scenes.grammar import (
    BACKGROUNDS,
    COLOURS,
    PHRASINGS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    caption,
    sample_scene,
    vocabulary,
)
from halftone.scenes.render import SIDE, render
from halftone.scenes.tokenizer import write_tokenizer
from halftone.scenes.training import (
    adamw,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    save_checkpoint,
    set_rate,
    warmed_cosine,
)

FOLDER = METRICS_FOLDER / "clip"
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
EMBED = 64
CONTEXT = 20  # tokens: the longest caption has 19
MEAN = (0.5, 0.5, 0.5)
VISION = {"layers": [1, 2, 2, 1], "width": 12, "head_width": 32, "image_size": SIDE}
TEXT = {"context_length": CONTEXT, "width": 80, "heads": 4, "layers": 2, "hf_tokenizer_name": "scenes"}
PEAK_RATE = 2e-3
CHUNK = 2048
SAVE_EVERY = 4  # chunks between checkpoints
BATCH = 128
NEGATIVES = 3  # hard negatives of each picture
AUXILIARY = 0.5  # weight of naming the attributes


def config(vocabulary_size: int) -> dict[str, Any]:
    """What open_clip reads to build the model and its preprocessing."""
    model = {"embed_dim": EMBED, "vision_cfg": VISION, "text_cfg": {**TEXT, "vocab_size": vocabulary_size}}
    return {
        "model_cfg": model,
        "preprocess_cfg": {"mean": list(MEAN), "std": list(MEAN), "interpolation": "bicubic"},
    }


def build(vocabulary_size: int) -> nn.Module:
    from open_clip.model import CLIP

    return CLIP(**config(vocabulary_size)["model_cfg"], output_dict=True)


def _single_changes(scene: Scene) -> list[Scene]:
    """Every scene that differs in one attribute of one object, in the relation, or in the ground."""
    changed = [replace(scene, background=b) for b in BACKGROUNDS if b != scene.background]
    changed += [replace(scene, texture=t) for t in TEXTURES if t != scene.texture]
    for slot in ("first", "second")[: len(scene.objects)]:
        thing = getattr(scene, slot)
        variants = [replace(thing, shape=s) for s in SHAPES] + [replace(thing, colour=c) for c in COLOURS]
        variants += [replace(thing, size=s) for s in SIZES]
        changed += [replace(scene, **{slot: v}) for v in variants if v not in scene.objects]
    if scene.relation is not None:
        changed += [replace(scene, relation=r) for r in RELATIONS if r != scene.relation]
    return changed


def swaps(scene: Scene) -> dict[str, Scene]:
    """What belongs to which object, exchanged: colours, sizes, shapes, and the objects' places."""
    if scene.second is None or scene.relation is None:
        return {}
    a, b = scene.first, scene.second
    exchanged = {
        "colours": (replace(a, colour=b.colour), replace(b, colour=a.colour)),
        "sizes": (replace(a, size=b.size), replace(b, size=a.size)),
        "shapes": (replace(a, shape=b.shape), replace(b, shape=a.shape)),
    }
    found = {
        name: replace(scene, first=x, second=y) for name, (x, y) in exchanged.items() if (x, y) != (a, b)
    }
    return {**found, "places": replace(scene, relation=scene.relation.converse)}


def hard_negatives(scene: Scene, rng: np.random.Generator) -> list[Scene]:
    """``NEGATIVES`` different wrong scenes: exchanges first, then single changes."""
    exchanged = list(swaps(scene).values())
    kept = [exchanged[k] for k in rng.permutation(len(exchanged))[: NEGATIVES - 1]]
    single = _single_changes(scene)
    kept += [single[k] for k in rng.permutation(len(single))[:NEGATIVES]]
    return kept[:NEGATIVES]


class Words:
    """Token ids of captions, word by word: every word of the grammar is one token."""

    def __init__(self, tokenizer: Any) -> None:
        self.ids = {word: tokenizer(word, add_special_tokens=False).input_ids[0] for word in vocabulary()}
        self.start, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """[n, CONTEXT], padded with the end token."""
        ids = np.full((len(captions), CONTEXT), self.end, np.int64)
        for row, text in zip(ids, captions, strict=True):
            words = [self.ids[word] for word in text.split()]
            row[: len(words) + 1] = [self.start, *words]
        return torch.from_numpy(ids)


def _soften(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A little blur, noise and colour on half of the pictures: generated ones are not as clean as renders."""
    for kind, most in ((Corruption.BLUR, 0.5), (Corruption.NOISE, 0.3), (Corruption.COLOUR, 0.3)):
        strengths = most * rng.random(len(images)) * (rng.random(len(images)) < 0.5)
        images = corrupt(images, kind, strengths, rng.integers(1 << 40, size=len(images)))
    return images


def _chunk(words: Words, seed: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, tokens [n, 1 + NEGATIVES, CONTEXT] (the right one first) and classes."""
    rng = np.random.default_rng([seed, number])
    scenes = [sample_scene(rng, 0.3) for _ in range(CHUNK)]
    images = _soften(render(scenes, rng.integers(1 << 40, size=CHUNK)), rng)
    said = [
        caption(s, int(rng.integers(len(PHRASINGS))))
        for scene in scenes
        for s in (scene, *hard_negatives(scene, rng))
    ]
    return to_tensor(images), words(said).view(CHUNK, -1, CONTEXT), torch.from_numpy(targets(scenes))


def normalize(images: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] -> what the image tower reads, as ``preprocess_cfg`` says."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _contrast(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """image [b, e] and text [b, 1 + k, e], both unit vectors. A picture chooses among the captions of the
    batch and its own hard negatives, a caption among the pictures of the batch."""
    own = torch.arange(len(image))
    across = scale * image @ text[:, 0].T
    hard = scale * (image[:, None] * text[:, 1:]).sum(-1)
    return (
        functional.cross_entropy(torch.cat([across, hard], 1), own) + functional.cross_entropy(across.T, own)
    ) / 2


def _naming(scores: Tensor, classes: Tensor) -> Tensor:
    parts = scores.split([count for _, count in HEADS], dim=1)
    return torch.stack([functional.cross_entropy(s, classes[:, k]) for k, s in enumerate(parts)]).mean()


def _steps(both: nn.ModuleDict, chunk: tuple[Tensor, Tensor, Tensor]) -> Iterator[Tensor]:
    """The loss of every batch of a chunk."""
    model: Any = both["clip"]
    for images, tokens, classes in zip(*(part.split(BATCH) for part in chunk), strict=True):
        image = model.encode_image(normalize(images))
        text = model.encode_text(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        scale = model.logit_scale.exp().clamp(max=100)
        contrast = _contrast(functional.normalize(image, dim=-1), functional.normalize(text, dim=-1), scale)
        named = _naming(both["image"](image), classes) + _naming(both["text"](text[:, 0]), classes)
        yield contrast + AUXILIARY * named


def train(folder: Path, work: Path, images: int, seed: int = 23) -> dict[str, float]:
    """Trains on fresh renders and writes ``folder``; resumes from the checkpoint in ``work``.

    Returns the figures that go into ``training.json``.
    """
    torch.manual_seed(seed)
    tokenizer = write_tokenizer(folder)
    words, classes = Words(tokenizer), sum(count for _, count in HEADS)
    model = build(len(tokenizer))
    both = nn.ModuleDict(
        {"clip": model, "image": nn.Linear(EMBED, classes), "text": nn.Linear(EMBED, classes)}
    )
    optimizer = adamw([(list(both.parameters()), PEAK_RATE)], decay=0.05)
    chunks, start = -(-images // CHUNK), 0
    checkpoint = work / "metric_clip.checkpoint.safetensors"
    if checkpoint.exists():
        parts, facts = load_checkpoint(checkpoint)
        both.load_state_dict(parts["model"])
        load_optimizer(optimizer, parts["optimizer"])
        start = int(facts["chunks"])
    progress = Progress("metric CLIP", chunks * CHUNK)
    progress.done = start * CHUNK
    spent = time.process_time()
    for number in range(start, chunks):
        both.train()
        chunk, total = _chunk(words, seed, number), 0.0
        for k, loss in enumerate(_steps(both, chunk)):
            set_rate(optimizer, warmed_cosine((number + k * BATCH / CHUNK) / chunks, 0.05))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
            optimizer.step()
            total += float(loss.detach()) * BATCH / CHUNK
        if (number + 1) % SAVE_EVERY == 0 or number == chunks - 1:
            state = {"model": both.state_dict(), "optimizer": optimizer_tensors(optimizer)}
            save_checkpoint(checkpoint, state, {"chunks": number + 1})
        progress.advance(CHUNK, f"loss {total:.3f}, {time.process_time() - spent:.0f} s of processor")
    model.eval()
    figures = evaluate(model, words, seed)
    save(model, len(tokenizer), folder, {"images": chunks * CHUNK, "seed": seed, **figures})
    return figures


@torch.no_grad()
def evaluate(model: Any, words: Words, seed: int, count: int = 512) -> dict[str, float]:
    """How often the right caption beats an exchange of each kind, and beats every single change."""
    rng = np.random.default_rng([seed, 1, 0])
    scenes = [sample_scene(rng, 0.25) for _ in range(count)]
    image = model.encode_image(
        normalize(to_tensor(render(scenes, rng.integers(1 << 40, size=count)))), normalize=True
    )
    wins: dict[str, list[float]] = {}
    for row, scene in zip(image, scenes, strict=True):
        single, exchanged = _single_changes(scene), swaps(scene)
        said = [caption(s, int(rng.integers(len(PHRASINGS)))) for s in (scene, *exchanged.values(), *single)]
        cosines = model.encode_text(words(said), normalize=True) @ row
        for k, name in enumerate(exchanged):
            wins.setdefault(f"beats_{name}", []).append(float(cosines[0] > cosines[1 + k]))
        wins.setdefault("beats_single", []).append(
            float((cosines[0] > cosines[1 + len(exchanged) :]).float().mean())
        )
    return {name: round(float(np.mean(values)), 4) for name, values in wins.items()}


def save(model: nn.Module, vocabulary_size: int, folder: Path, figures: dict[str, float]) -> None:
    """Weights (matrices in fp16), open_clip's configuration, and how it was trained."""
    tensors = {n: t.half() if t.ndim > 1 else t for n, t in model.state_dict().items()}
    with writing(folder / WEIGHTS) as temporary:
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, temporary)
    write_json(folder / CONFIG, config(vocabulary_size))
    write_json(folder / "training.json", figures)


def main(
    folder: Annotated[Path, typer.Argument(help="where the model goes")] = FOLDER,
    work: Annotated[Path, typer.Option(help="where checkpoints go")] = Path("build/metric-clip"),
    images: Annotated[int, typer.Option(min=1, help="training images")] = 80_000,
    seed: Annotated[int, typer.Option(min=0)] = 23,
) -> None:
    """Train the metric CLIP of scenes."""
    for name, value in train(folder, work, images, seed).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    typer.run(main)
