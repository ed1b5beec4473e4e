"""`--factors` of the verbs that work on a reparameterized denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halftone.axes import Axes
from halftone.cli import options
from halftone.errors import UserError
from halftone.policies import Reparameterization

if TYPE_CHECKING:
    from torch import Tensor

    from halftone.provenance import Provenance

Given = Annotated[
    Path | None,
    typer.Option(
        "--factors", help="factors.safetensors, for a recipe with reparameterization.", show_default=False
    ),
]


def check(factors: Path | None, recipe: str, axes: Axes) -> None:
    """Raises UserError for factors that the recipe needs and has not, or has and needs not."""
    needed = axes.reparameterization is not Reparameterization.NONE
    if needed and factors is None:
        raise UserError(
            f"recipe {recipe} with reparameterization: add --factors, made with `halftone reparameterize`"
        )
    if factors is not None and not needed:
        raise UserError(f"recipe {recipe} reparameterizes nothing: leave --factors out")


def read(factors: Path | None, chosen: Provenance) -> dict[str, Tensor] | None:
    """Factors by module, if any. Raises UserError for those of another row."""
    from halftone.factors import load

    if factors is None:
        return None
    found, made_for = load(options.existing(factors, "reparameterize"))
    options.same_row(factors, made_for, chosen, "reparameterize")
    return found
