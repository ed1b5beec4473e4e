"""The verb `metrics`: from the shards of one scenario and of full precision to its file of figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchmetrics

import halftone
from halftone.artefact import artefact_sha256, tensors
from halftone.artefact.load import describe
from halftone.errors import UserError
from halftone.evaluate.images import check_belong, read_images
from halftone.evaluate.metrics import Measurement, Measurer, write
from halftone.evaluate.real import read_real
from halftone.plan import MIB
from halftone.prompts import prompts_sha256, read_prompts
from halftone.settings import Metrics
from halftone.shards import ShardIndex
from halftone.unconditional import numbered


def measure_files(
    shards: Sequence[Path],
    reference: Sequence[Path],
    prompts: Path | None,
    output: Path,
    *,
    settings: Metrics,
    seed: int,
    model: str,
    tier: str,
    name: str,
    artefact: Path | None = None,
    real_images: str | None = None,
) -> Measurement:
    """Measures scenario `name` and writes `output` (JSON) and the per-image data beside it.

    shards, reference: zips of the scenario and of full precision (the same for the full-precision scenario).
    prompts: None for images of a model without text. artefact: the folder that the images were sampled from;
    its plan gives bits and sizes. real_images: as for `read_real`. Raises UserError for images that do not
    belong to the prompts, to full precision's images, or to the artefact.
    """
    images, index = read_images(shards)
    whole, base = (images, index) if list(shards) == list(reference) else read_images(reference)
    texts = texts_of(prompts, index)
    check_belong(index, base, prompts_sha256(texts))
    identity = {"model": model, "scenario": name, "tier": tier, **_identity(index, artefact), "seed": seed}
    measurer = Measurer(settings, seed)
    measurement = measurer.measure(
        images,
        whole,
        None if index.image_set is not None else texts[: index.n_images],
        identity,
        read_real(real_images, images.a, index.image_set),
    )
    made_by = {
        "halftone": halftone.__version__,
        "torch": torch.__version__,
        "torchmetrics": torchmetrics.__version__,
    }
    provenance = {
        "images": index.model_dump(mode="json", exclude={"shard", "first", "count"}),
        "settings": settings.model_dump(mode="json"),
        "real_images": real_images,
        "seed": seed,
        "versions": made_by,
    }
    write(measurement, output, json.dumps(provenance, sort_keys=True))
    return measurement


def texts_of(prompts: Path | None, index: ShardIndex) -> list[str]:
    """The lines of the prompt file, or what stands for them where the model takes no text."""
    if index.image_set is not None:
        if prompts is not None:
            raise UserError(f"{prompts}: the images were sampled without prompts; leave --prompts out")
        return numbered(index.image_set, index.n_images)
    if prompts is None:
        raise UserError("the images were sampled for prompts: name their file with --prompts")
    return read_prompts(prompts)


def _identity(index: ShardIndex, folder: Path | None) -> dict[str, Any]:
    """The columns that say which model in which form drew the images."""
    columns: dict[str, Any] = {
        "recipe": index.recipe,
        "execution": index.execution.value,
        "prompts_sha256": index.prompts_sha256,
        "artefact_sha256": index.artefact_sha256,
    }
    if index.artefact_sha256 is None:
        return columns
    if folder is None:
        raise UserError("the images come from an artefact; give its folder, which holds their plan")
    if artefact_sha256(folder) != index.artefact_sha256:
        raise UserError(f"{folder}: not the artefact that the images were sampled from; sample again")
    described = describe(folder)
    stored = described.manifest.files[f"{described.index.denoiser.name}/{tensors.FILE}"].size
    return {
        **described.plan.columns(),
        **columns,
        "protocol": described.plan.protocol.value,
        "size_mib": round(stored / MIB, 3),
    }
