"""Where a file of the pipeline came from: model, schedule, prompts, recipe, versions. The same run, the same
bytes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import halftone
from halftone.axes import Axes
from halftone.errors import UserError
from halftone.prompts import prompts_sha256
from halftone.settings import Budget, Protocol

KEY = "halftone"  # the one metadata key: safetensors writes several in random order


class Provenance(BaseModel):
    """What a safetensors file of the pipeline says of its making; recipe and bits are None before a recipe
    is chosen."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_path: str = Field(description="as the user gave it")
    model_revision: str | None = Field(None, description="commit, of a hub id")
    model_sha256: str = Field(description="of the denoiser's weights")
    pipeline_class: str
    denoiser_class: str
    scheduler: dict[str, Any] = Field(description="class and config")
    steps: int
    guidance: float | None = Field(description="None for a model without text")
    resolution: int | None = Field(None, description="pixels; None for the model's own")
    prompts_sha256: str = Field(description="of calibration prompts, or of what stands for them")
    n_prompts: int
    seed: int
    halftone: str = Field(description="version")
    torch: str = Field(description="version")
    diffusers: str = Field(description="version")
    recipe: str | None = None
    axes: Axes | None = None
    bits: str | None = None
    protocol: Protocol | None = None
    budget: Budget | None = Field(None, description="of block reconstruction, where weights were learned")
    code_commit: str | None = None

    def to_metadata(self) -> dict[str, str]:
        """For a safetensors header; one key, sorted JSON."""
        return {KEY: json.dumps(self.model_dump(mode="json"), sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, where: Path | str = "file") -> Provenance:
        """Raises UserError where the metadata holds no provenance of this version."""
        try:
            return cls.model_validate(json.loads((metadata or {})[KEY]))
        except (KeyError, json.JSONDecodeError, ValidationError):
            raise UserError(
                f"{where}: says nothing of its making; run the step that makes it again"
            ) from None


def describe(
    pipeline: Any,
    *,
    model_path: str,
    model_revision: str | None,
    model_sha256: str,
    prompts: Sequence[str],
    steps: int,
    guidance: float | None,
    resolution: int | None,
    seed: int,
) -> Provenance:
    """Provenance of a reference trajectory."""
    from halftone.denoiser import denoiser_of

    return Provenance(
        model_path=model_path,
        model_revision=model_revision,
        model_sha256=model_sha256,
        pipeline_class=type(pipeline).__name__,
        denoiser_class=type(denoiser_of(pipeline)).__name__,
        scheduler=scheduler_facts(pipeline.scheduler),
        steps=steps,
        guidance=guidance,
        resolution=resolution,
        prompts_sha256=prompts_sha256(prompts),
        n_prompts=len(prompts),
        seed=seed,
        halftone=halftone.__version__,
        torch=torch.__version__,
        diffusers=diffusers.__version__,
    )


def scheduler_facts(scheduler: Any) -> dict[str, Any]:
    """Class and config of a scheduler, as JSON values; diffusers' own bookkeeping (`_...`) is left out."""
    config = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    return {"class": type(scheduler).__name__, "config": json.loads(json.dumps(config, default=_plain))}


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def code_commit() -> str | None:
    """Commit of the source tree this runs from; None where it is no Git checkout."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--verify", "HEAD"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except OSError:
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
