"""Prompts of others are fetched where a row reads them, checked, and drawn again when the draw changes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from trees import copy_workflow, edit, snakemake, with_stub

FETCHED = "data/prompts/fetched/others.txt"


@pytest.mark.slow
def test_a_row_reads_fetched_prompts(tmp_path: Path) -> None:
    tree = with_stub(copy_workflow(tmp_path / "tree"))
    content = "".join(f"a red star and {n} rings\n" for n in range(100))
    (tmp_path / "others.txt").write_text(content)
    pin = hashlib.sha256(content.encode()).hexdigest()
    url = (tmp_path / "others.txt").as_uri()
    edit(tree, "validation: data/prompts/validation.txt", f"validation: {FETCHED}")
    sources = f"prompt_sources:\n  others: {{url: '{url}', sha256: {pin}, count: 64}}\n\ntiers:\n"
    edit(tree, "\ntiers:\n", f"\n{sources}")
    said = snakemake(tree, FETCHED)
    assert said.returncode == 0, said.stderr
    planned = snakemake(tree, "--dry-run")
    assert "fetch_prompts" not in planned.stdout
    assert FETCHED in planned.stdout
    edit(tree, "count: 64", "count: 65")
    assert "fetch_prompts" in snakemake(tree, "--dry-run").stdout
