"""`halftone preference`: blind pairs in a browser, and the preference that comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halftone.cli import options
from halftone.errors import UserError


def verb(
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Two files of `halftone sample`, of the rows to compare.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page to write.", show_default=False)
    ] = None,
    read: Annotated[
        list[Path] | None,
        typer.Option(help="Choices that the page saved; once for every person.", show_default=False),
    ] = None,
    prompts: options.Prompts = None,
    pairs: Annotated[int, typer.Option(min=1, max=10_000, help="Pairs shown, drawn from the images.")] = 50,
    seed: options.Seed = 0,
) -> None:
    """Make a page of blind pairs of two rows' images; with --read, say which row was preferred.

    The page is one file that opens in any browser and saves the choices as choices.json.
    """
    if read:
        if images or output:
            raise UserError("--read takes the choices alone: leave images and -o out")
        for path in read:
            options.existing(path, "preference")
    elif images is None or len(images) != 2 or output is None:
        raise UserError("give two files of images and -o PAGE, or --read choices.json")
    else:
        for path in images:
            options.existing(path, "sample")

    from halftone.preference import evaluate, page
    from halftone.shards import read_shard

    if read:
        print(evaluate(read))
        return
    assert images is not None
    assert output is not None
    texts = [] if prompts is None else options.prompts(prompts, None)
    first, second = (read_shard(path) for path in images)
    shown = page(first, second, output, prompts=texts, pairs=pairs, seed=seed)
    print(f"{output}: {shown} pairs; open it in a browser, then: halftone preference --read choices.json")
