"""`halftone fetch-prompts`: prompts of others, from a file that is checked against its hash."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halftone.cli import options
from halftone.settings import PromptFormat, PromptSource


def verb(
    url: Annotated[
        str,
        typer.Argument(help="https://, file:// or hub:OWNER/DATASET@COMMIT/FILE.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The prompt file to write.", show_default=False)
    ],
    sha256: Annotated[
        str | None,
        typer.Option(help="Of the file; without it, it is fetched, and its hash told.", show_default=False),
    ] = None,
    format: Annotated[PromptFormat, typer.Option(help="How the file holds prompts.")] = PromptFormat.LINES,
    member: Annotated[
        str | None, typer.Option(help="The file in a zip that holds them.", show_default=False)
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Of a parquet file; default Prompt.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=1_000_000, help="Prompts drawn.")] = 5000,
    seed: options.Seed = 0,
    cache: Annotated[Path, typer.Option(help="Folder that keeps the fetched file.")] = Path(
        "scratch/prompts"
    ),
) -> None:
    """Draw prompts from a file on the web or a hub, once its hash is what it should be."""
    from pydantic import ValidationError

    from halftone.errors import UserError
    from halftone.prompt_sources import fetch

    try:
        source = PromptSource(
            url=url, sha256=sha256, format=format, member=member, column=column, count=count, seed=seed
        )
    except ValidationError as fault:
        raise UserError(f"--{fault.errors()[0]['loc'][0]}: {fault.errors()[0]['msg']}") from None
    offered = fetch(source, output, cache)
    print(f"{output}: {count} of {offered} prompts")
