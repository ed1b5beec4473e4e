"""The side rule `fetch_prompts`: a prompt file drawn from a source that the settings name. DVC sees the file
as any other under data/prompts."""

from __future__ import annotations

import shlex

from halftone.settings import Settings

FETCHED = "data/prompts/fetched/{source}.txt"


def options(settings: Settings, key: str) -> str:
    """Everything that decides which prompts are drawn."""
    source = settings.prompt_sources[key]
    named = {name: value for name, value in source.model_dump(mode="json").items() if value is not None}
    url = str(named.pop("url"))
    return shlex.join([url, *(part for name, value in named.items() for part in (f"--{name}", str(value)))])
