"""The text encoder, and its first training: on text alone, to know what stands where.

A causal CLIP text model, so the start token carries no prompt. It learns attributes bound to their
objects before it ever sees an image: each noun must name its own object's size and colour, and the
tokens from the end onwards must name, for every place of the picture, the object that stands there.
The last tokens, which no caption of the grammar reaches, are given one place each: cross-attention
can then ask for what stands where a pixel lies, and need not work it out of one token that holds all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from halftone.files import writing
from halftone.scenes.grammar import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    TRAINED_PHRASINGS,
    Relation,
    Scene,
    SceneObject,
    caption,
)
from halftone.scenes.splits import sample_training_scene
from halftone.scenes.tokenizer import MAX_LENGTH
from halftone.scenes.training import Log, adamw, set_rate, warmed_cosine

WIDTH, LAYERS, HEADS = 128, 4, 4
PEAK_RATE = 1e-3
PLACES = ("centre", *Relation)  # where an object can stand; one alone stands at the centre
PLACE_TOKENS = slice(MAX_LENGTH - len(PLACES), MAX_LENGTH)  # token k names what stands at PLACES[k]
_OBJECT_CLASSES = (len(SIZES) + 1, len(COLOURS) + 1, len(SHAPES) + 1)  # class 0: nothing there
_GROUND_CLASSES = (len(BACKGROUNDS), len(TEXTURES))


def build(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """n texts -> ids [n, MAX_LENGTH], int64, padded with end tokens."""
    found = tokenizer(list(texts), padding="max_length", max_length=MAX_LENGTH, truncation=True)
    return torch.tensor(found["input_ids"])


def _codes(obj: SceneObject) -> tuple[int, int, int]:
    return SIZES.index(obj.size) + 1, COLOURS.index(obj.colour) + 1, SHAPES.index(obj.shape) + 1


def scene_targets(scene: Scene) -> list[int]:
    """Size, colour and shape at each of ``PLACES`` (0: nothing), then background and texture."""
    at = dict.fromkeys(PLACES, (0, 0, 0))
    if scene.second is None or scene.relation is None:
        at["centre"] = _codes(scene.first)
    else:
        at[scene.relation], at[scene.relation.converse] = _codes(scene.first), _codes(scene.second)
    ground = [BACKGROUNDS.index(scene.background), TEXTURES.index(scene.texture)]
    return [code for place in PLACES for code in at[place]] + ground


class Heads(nn.Module):
    """Linear read-outs used in this training only: of the whole scene, of a noun's object, and of
    the object at a place token's place."""

    def __init__(self) -> None:
        super().__init__()
        self.scene_classes = _OBJECT_CLASSES * len(PLACES) + _GROUND_CLASSES
        self.scene = nn.Linear(WIDTH, sum(self.scene_classes))
        self.noun = nn.Linear(WIDTH, sum(_OBJECT_CLASSES))
        self.place = nn.Linear(WIDTH, sum(_OBJECT_CLASSES))

    def scene_logits(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return self.scene(hidden).split(self.scene_classes, dim=-1)

    def noun_logits(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return self.noun(hidden).split(_OBJECT_CLASSES, dim=-1)

    def place_logits(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return self.place(hidden).split(_OBJECT_CLASSES, dim=-1)


def _summed(logits: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    """Mean over rows of the summed cross-entropies; logits k [n, classes k], targets [n, k]."""
    return torch.stack([F.cross_entropy(z, targets[:, k]) for k, z in enumerate(logits)]).sum()


def _noun_targets(scenes: Sequence[Scene]) -> Tensor:
    """[number of nouns in all captions, 3], in the order in which captions name the objects."""
    return torch.tensor([_codes(obj) for scene in scenes for obj in scene.objects])


def text_loss(
    heads: Heads, hidden: Tensor, ids: Tensor, scenes: Sequence[Scene], nouns: Tensor, end: int
) -> Tensor:
    """What the hidden states [n, MAX_LENGTH, WIDTH] of the scenes' captions must name, summed."""
    rows, whole = torch.arange(len(ids)), torch.tensor([scene_targets(s) for s in scenes])
    first_end = (ids == end).int().argmax(dim=1)
    somewhere = first_end + ((MAX_LENGTH - first_end) * torch.rand(len(ids))).long()  # any closing token
    places = whole[:, : 3 * len(PLACES)].reshape(-1, 3)
    loss = _summed(heads.scene_logits(hidden[rows, first_end]), whole)
    loss = loss + _summed(heads.scene_logits(hidden[rows, somewhere]), whole)
    loss = loss + _summed(heads.noun_logits(hidden[torch.isin(ids, nouns)]), _noun_targets(scenes))
    return loss + _summed(heads.place_logits(hidden[:, PLACE_TOKENS].flatten(0, 1)), places)


@torch.no_grad()
def whole_scene_right(heads: Heads, hidden: Tensor, ids: Tensor, scenes: Sequence[Scene], end: int) -> float:
    """Share of captions whose whole scene is read rightly both at the end token and at the place tokens."""
    whole = torch.tensor([scene_targets(s) for s in scenes])
    first_end = (ids == end).int().argmax(dim=1)
    at_end = heads.scene_logits(hidden[torch.arange(len(ids)), first_end])
    right = torch.stack([z.argmax(-1) == whole[:, k] for k, z in enumerate(at_end)]).all(dim=0)
    at_places = torch.stack([z.argmax(-1) for z in heads.place_logits(hidden[:, PLACE_TOKENS])], dim=-1)
    right &= (at_places.flatten(1) == whole[:, : 3 * len(PLACES)]).all(dim=1)
    return right.float().mean().item()


def train(
    folder: Path, work: Path, tokenizer: CLIPTokenizer, steps: int, batch: int = 96, seed: int = 2
) -> None:
    """Trains and writes a transformers folder. Short, so not resumable; refreshed on the way."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model, heads = build(tokenizer), Heads()
    optimizer = adamw([([*model.parameters(), *heads.parameters()], PEAK_RATE)], decay=0.01)
    nouns = torch.tensor(tokenizer.convert_tokens_to_ids([f"{s}</w>" for s in SHAPES]))
    log, started = Log(work / "text_encoder.jsonl"), time.monotonic()
    for step in range(steps):
        scenes = [sample_training_scene(rng, single=0.2) for _ in range(batch)]
        texts = [caption(s, int(rng.integers(len(TRAINED_PHRASINGS)))) for s in scenes]
        ids = tokenize(tokenizer, texts)
        hidden = model(ids).last_hidden_state
        loss = text_loss(heads, hidden, ids, scenes, nouns, tokenizer.eos_token_id)
        set_rate(optimizer, warmed_cosine(step / steps, 0.05))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(steps // 40, 1) == 0 or step == steps - 1:
            right = whole_scene_right(heads, hidden, ids, scenes, tokenizer.eos_token_id)
            seconds = time.monotonic() - started
            log.write(step=step, loss=loss.item(), whole_scene_right=right, seconds=seconds)
            with writing(folder) as temporary:
                model.save_pretrained(temporary)
