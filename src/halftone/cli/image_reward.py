"""`halftone image-reward`: a row and full precision, judged by a model of human preference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halftone.cli import options
from halftone.errors import UserError


def verb(
    images: options.RowImages,
    reference: options.ReferenceImages,
    output: options.Output,
    prompts: options.Prompts = None,
    python: Annotated[
        Path | None,
        typer.Option(help="Interpreter of an environment with image-reward.", show_default=False),
    ] = None,
    bootstrap: Annotated[
        int, typer.Option(min=100, max=100_000, help="Resamples of paired intervals.")
    ] = options.METRICS.bootstrap,
    seed: options.Seed = 0,
) -> None:
    """Mean ImageReward of a row and of full precision, and their paired difference."""
    if python is None:
        raise UserError(
            "--python is missing: make an environment (python -m venv DIR; DIR/bin/pip install image-reward) "
            "and name DIR/bin/python (in params.yaml: metrics.image_reward_python)"
        )
    if prompts is None:
        raise UserError("--prompts is missing: ImageReward judges images by their prompts")
    texts = options.prompts(prompts, None)
    for path in [*images, *reference]:
        options.existing(path, "sample")

    from halftone.evaluate.image_reward import compare
    from halftone.files import write_json

    found = compare(images, reference, texts, python, resamples=bootstrap, seed=seed)
    write_json(output, found)
    for name in ("reward", "reward_fp", "difference"):
        one = found[name]
        print(f"{name:12} {one['value']:+.3f} ({one['lo']:+.3f} to {one['hi']:+.3f})")
