"""A growing bank of encoded training scenes, kept on disk in chunks and in memory in half precision.

Chunk k is a function of (autoencoder, seed, k) alone, so a resumed run finds the same bank. Chunks
are made while training goes on: the first steps need not wait for the last chunk.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from halftone.files import writing
from halftone.scenes.autoencoder import to_signal
from halftone.scenes.grammar import TRAINED_PHRASINGS, caption
from halftone.scenes.render import render
from halftone.scenes.splits import sample_training_scene
from halftone.scenes.text_encoder import tokenize

CHUNK = 4096  # scenes
SINGLE = 0.4  # share of scenes with one object


class LatentBank:
    """mean, std: [n, 4, 16, 16] fp16, scaled to unit variance; ids: [n, phrasings, tokens] int16."""

    def __init__(
        self, folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, chunks: int, seed: int
    ) -> None:
        self._folder, self._vae, self._tokenizer = folder, vae, tokenizer
        self._seed, self._most = seed, chunks
        self._chunks: list[dict[str, Tensor]] = []
        while len(self._chunks) < chunks and self._path(len(self._chunks)).exists():
            self._chunks.append(load_file(self._path(len(self._chunks))))
        if not self._chunks:
            self.grow()

    def _path(self, k: int) -> Path:
        return self._folder / f"chunk-{k:03d}.safetensors"

    def __len__(self) -> int:
        return CHUNK * len(self._chunks)

    @property
    def full(self) -> bool:
        return len(self._chunks) >= self._most

    def grow(self) -> None:
        """Renders, encodes and stores one more chunk."""
        k = len(self._chunks)
        chunk = self._encode(np.random.default_rng([self._seed, k]))
        with writing(self._path(k)) as temporary:
            save_file(chunk, temporary)
        self._chunks.append(chunk)

    @torch.no_grad()
    def _encode(self, rng: np.random.Generator) -> dict[str, Tensor]:
        scenes = [sample_training_scene(rng, SINGLE) for _ in range(CHUNK)]
        texts = [caption(s, p) for s in scenes for p in range(len(TRAINED_PHRASINGS))]
        pixels = render(scenes, rng.integers(1 << 40, size=CHUNK))
        means, stds = [], []
        for start in range(0, CHUNK, 64):
            found = self._vae.encode(to_signal(pixels[start : start + 64])).latent_dist
            means.append((found.mean * self._vae.config.scaling_factor).half())
            stds.append((found.std * self._vae.config.scaling_factor).half())
        ids = tokenize(self._tokenizer, texts).view(CHUNK, len(TRAINED_PHRASINGS), -1)
        return {"mean": torch.cat(means), "std": torch.cat(stds), "ids": ids.to(torch.int16)}

    def draw(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [count, 4, 16, 16] float and token ids [count, tokens], uniformly with replacement."""
        rows = torch.randint(len(self), (count,), generator=rng).tolist()
        said = torch.randint(len(TRAINED_PHRASINGS), (count,), generator=rng).tolist()
        picked = [(self._chunks[r // CHUNK], r % CHUNK) for r in rows]
        mean = torch.stack([c["mean"][r] for c, r in picked]).float()
        std = torch.stack([c["std"][r] for c, r in picked]).float()
        ids = torch.stack([c["ids"][r, p] for (c, r), p in zip(picked, said, strict=True)]).long()
        return mean + std * torch.randn(mean.shape, generator=rng), ids
