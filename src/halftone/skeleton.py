"""A model without its weights: what `plan` and `analyze` need, in a second and without the memory.

The denoiser is built on the meta device from its configuration; the folder also gives the schedule, the size
of the latents and the length of the text states.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from halftone.components import (
    Index,
    config_of,
    explain_load,
    load_component,
    read_index,
    small_json,
    weight_files,
)
from halftone.denoiser import denoiser_of
from halftone.errors import UserError
from halftone.prompts import token_limit
from halftone.source import load_source
from halftone.start_token import tokenizers_of
from halftone.unconditional import check_kind

_CLIP_TOKENS = 77


@dataclass(frozen=True)
class Skeleton:
    """A denoiser (possibly on the meta device), its scheduler, and the shapes of what it is given.

    latent_size: height and width of the latents, None for the denoiser's own. text_tokens: length of the text
    states. float_bits: width of the weights in the model's file, or that their values need. tokenizers: those
    of its texts, read when they are asked for.
    """

    denoiser: nn.Module
    scheduler: Any
    latent_size: int | None
    text_tokens: int
    float_bits: int
    tokenizers: Callable[[], list[Any]]

    def calls(self, steps: int) -> int:
        """Denoiser calls of a sampling run of `steps` inference steps."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps)
        return len(scheduler.timesteps)


def skeleton_of(pipeline: Any, resolution: int | None = None) -> Skeleton:
    """The skeleton of a pipeline that is loaded already; its weights stay where they are.

    Raises UserError for a kind that is not supported.
    """
    vae = getattr(pipeline, "vae", None)
    tokenizer = getattr(pipeline, "tokenizer", None)
    tokens = token_limit(pipeline, tokenizer) if tokenizer is not None else None
    size = _latent_size({} if vae is None else vae.config, resolution)
    denoiser = denoiser_of(pipeline)
    check_kind(type(pipeline), getattr(denoiser, "config", {}))
    return Skeleton(
        denoiser,
        pipeline.scheduler,
        size,
        tokens or _CLIP_TOKENS,
        _needed_bits(denoiser),
        partial(tokenizers_of, pipeline),
    )


def read_skeleton(path: str, revision: str | None = None, resolution: int | None = None) -> Skeleton:
    """The skeleton of the model at `path` (as for `load_source`); a single file has to be loaded whole.

    Raises UserError where the model is not there or cannot be told.
    """
    folder: Path | None = Path(path)
    if not Path(path).is_dir():
        folder = None if Path(path).is_file() else _cached(path, revision)
    if folder is None:
        return skeleton_of(load_source(path, revision).pipeline, resolution)
    index = read_index(folder)
    check_kind(index.pipeline_class, config_of(folder, index.denoiser.name))
    denoiser = _on_meta(folder, index)
    size = _latent_size(config_of(folder, "vae") if (folder / "vae").is_dir() else {}, resolution)
    width = _stored_bits(folder, index)
    tokenizers = partial(_tokenizers, folder, index)
    return Skeleton(denoiser, _scheduler(folder, index), size, _text_tokens(folder), width, tokenizers)


def _latent_size(vae_config: Mapping[str, Any], resolution: int | None) -> int | None:
    widths = vae_config.get("block_out_channels")
    return resolution // 2 ** (len(widths) - 1) if widths and resolution else None


def _on_meta(folder: Path, index: Index) -> nn.Module:
    kind: Any = index.denoiser.kind
    config = config_of(folder, index.denoiser.name)
    with explain_load(folder / index.denoiser.name, kind), torch.device("meta"):
        return kind.from_config(config).eval()


def _scheduler(folder: Path, index: Index) -> Any:
    if "scheduler" not in index.entries:
        raise UserError(f"{folder}: the pipeline names no scheduler; the folder is incomplete")
    kind: Any = index.entries["scheduler"].kind
    with explain_load(folder / "scheduler", kind):
        return kind.from_pretrained(folder / "scheduler", local_files_only=True)


def _tokenizers(folder: Path, index: Index) -> list[Any]:
    named = [entry for name, entry in index.entries.items() if name.startswith("tokenizer")]
    return [load_component(folder, entry) for entry in named]


def _stored_bits(folder: Path, index: Index) -> int:
    """Width of the floats in the denoiser's files, by most values."""
    counts: Counter[str] = Counter()
    for path in weight_files(folder, index.denoiser.name)[0]:
        with safe_open(path, framework="pt") as file:
            for piece in map(file.get_slice, file.keys()):
                counts[piece.get_dtype()] += math.prod(piece.get_shape())
    return 16 if counts["F16"] + counts["BF16"] > counts["F32"] + counts["F64"] else 32


def _needed_bits(denoiser: nn.Module) -> int:
    """16 where the weights have been at 16 bits: a model loaded in float32 from a file of half the size."""
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(weight.to(dtype).float(), weight.float()) for weight in denoiser.parameters()):
            return 16
    return 32


def _text_tokens(folder: Path) -> int:
    config = folder / "text_encoder" / "config.json"
    tokens = small_json(config).get("max_position_embeddings") if config.is_file() else None
    return tokens if isinstance(tokens, int) else _CLIP_TOKENS


def _cached(repository: str, revision: str | None) -> Path | None:
    """Where the hub client keeps a repository that has been used before; None if it does not."""
    from huggingface_hub import snapshot_download

    with _quiet(), contextlib.suppress(Exception):
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
