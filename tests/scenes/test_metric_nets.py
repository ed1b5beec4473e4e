"""The networks behind the metrics: what they learn from, that training resumes, and what is shipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from halftone.errors import UserError
from halftone.files import read_json
from halftone.scenes import feature_net, metric_clip
from halftone.scenes.corruptions import CORRUPTIONS, Corruption, corrupt
from halftone.scenes.grammar import Relation, caption, parse, sample_scene, vocabulary
from halftone.scenes.render import render
from halftone.scenes.tokenizer import write_tokenizer

PAIR = parse("a small red star left of a large blue ring on a striped grey background")
MODULES = {"feature_net": feature_net, "metric_clip": metric_clip}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_grow_with_their_strength(kind: Corruption) -> None:
    rng = np.random.default_rng(0)
    images = render([sample_scene(rng) for _ in range(8)], np.arange(8))
    seeds = np.arange(8)
    off = [
        float(np.abs(corrupt(images, kind, s, seeds).astype(int) - images).mean())
        for s in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert off[0] == 0
    assert all(np.diff(off) > 0)
    assert np.array_equal(corrupt(images, kind, 0.5, seeds), corrupt(images, kind, 0.5, seeds))
    mixed = corrupt(images, kind, np.array([0.0] * 4 + [1.0] * 4), seeds)
    assert np.array_equal(mixed[:4], images[:4])
    assert np.array_equal(mixed[4:], corrupt(images, kind, 1.0, seeds)[4:])


def test_targets_depend_on_the_picture_not_on_its_wording() -> None:
    assert PAIR.second is not None
    said = replace(PAIR, relation=Relation.RIGHT, first=PAIR.second, second=PAIR.first)
    first, second = feature_net.targets([PAIR, said])
    assert first.tolist() == second.tolist()
    alone = feature_net.targets([replace(PAIR, relation=None, second=None)])[0]
    assert alone[:3].tolist() == first[:3].tolist()
    assert alone[3:7].tolist() == [0, 0, 0, 0]
    counts = [count for _, count in feature_net.HEADS]
    assert len(counts) == len(first)
    assert all(value < count for value, count in zip(first, counts, strict=True))


def test_swaps_exchange_what_belongs_to_whom() -> None:
    found = metric_clip.swaps(PAIR)
    assert caption(found["colours"]).startswith("a small blue star left of a large red ring")
    assert caption(found["sizes"]).startswith("a large red star left of a small blue ring")
    assert caption(found["shapes"]).startswith("a small red ring left of a large blue star")
    assert found["places"].relation is Relation.RIGHT
    assert all(s.canonical() != PAIR.canonical() for s in found.values())
    assert metric_clip.swaps(replace(PAIR, relation=None, second=None)) == {}


def test_hard_negatives_are_wrong_and_near() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        scene = sample_scene(rng)
        wrong = metric_clip.hard_negatives(scene, rng)
        assert len(wrong) == metric_clip.NEGATIVES
        assert all(w.canonical() != scene.canonical() for w in wrong)
        assert all(len(w.objects) == len(scene.objects) for w in wrong)


def test_words_are_what_the_tokenizer_says(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    words = metric_clip.Words(tokenizer)
    rng = np.random.default_rng(2)
    said = [caption(sample_scene(rng), k % 4) for k in range(20)]
    expected = tokenizer(
        said, padding="max_length", max_length=metric_clip.CONTEXT, return_tensors="pt"
    ).input_ids
    assert torch.equal(words(said), expected)
    assert len(words.ids) == len(vocabulary())


class Killed(Exception):
    pass


def small(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setattr(module, "CHUNK", 32)
    monkeypatch.setattr(module, "BATCH", 16)
    monkeypatch.setattr(module, "SAVE_EVERY", 1)
    if module is metric_clip:
        whole = metric_clip.evaluate
        monkeypatch.setattr(module, "evaluate", lambda *parts: whole(*parts, count=8))


@pytest.mark.parametrize("name", MODULES)
def test_training_resumes_to_the_same_weights(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module: Any = MODULES[name]
    small(monkeypatch, module)
    module.train(tmp_path / "whole", tmp_path / "a", 64, seed=5)
    save = module.save_checkpoint

    def killed(*parts: Any) -> None:
        save(*parts)
        raise Killed

    monkeypatch.setattr(module, "save_checkpoint", killed)
    with pytest.raises(Killed):
        module.train(tmp_path / "resumed", tmp_path / "b", 64, seed=5)
    monkeypatch.setattr(module, "save_checkpoint", save)
    module.train(tmp_path / "resumed", tmp_path / "b", 64, seed=5)
    assert (tmp_path / "whole" / module.WEIGHTS).read_bytes() == (
        tmp_path / "resumed" / module.WEIGHTS
    ).read_bytes()


def test_a_saved_feature_network_loads_strictly(tmp_path: Path) -> None:
    model = feature_net.FeatureNet().eval()
    feature_net.save(model, tmp_path, {"images": 0})
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with torch.no_grad():
        assert torch.allclose(feature_net.load(tmp_path)(images), model(images), atol=5e-3)
    config = tmp_path / feature_net.CONFIG
    config.write_text(config.read_text().replace("64", "32"))
    with pytest.raises(UserError, match="describes another network"):
        feature_net.load(tmp_path)
    with pytest.raises(UserError, match=r"python -m halftone\.scenes\.feature_net"):
        feature_net.load(tmp_path / "nowhere")


def test_what_is_shipped_is_small_and_meets_its_bars() -> None:
    folder = feature_net.FOLDER
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt"}
    assert sum(p.stat().st_size for p in files) <= 3 * 2**20
    weights = [load_file(folder / feature_net.WEIGHTS), load_file(metric_clip.FOLDER / metric_clip.WEIGHTS)]
    assert all(t.dtype == torch.float16 for ts in weights for t in ts.values() if t.ndim > 1)
    seen = read_json(folder / feature_net.CONFIG)["training"]
    assert min(v for k, v in seen.items() if k.startswith("accuracy_")) >= 0.99
    assert max(v for k, v in seen.items() if k.startswith("error_")) <= 0.12
    said = read_json(metric_clip.FOLDER / "training.json")
    assert min(v for k, v in said.items() if k.startswith("beats_")) >= 0.95


def test_the_metric_clip_is_not_the_conditioner() -> None:
    width = read_json(metric_clip.FOLDER / metric_clip.CONFIG)["model_cfg"]["text_cfg"]["width"]
    assert width == metric_clip.TEXT["width"] != 128
