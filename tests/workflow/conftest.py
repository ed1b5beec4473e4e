"""One finished run of the stubbed workflow, shared by the tests, and copies of it to change."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from trees import copy_workflow, halftone, with_stub


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A copy in which `halftone run` has made everything, and what it said. Not to be changed: see `copy`."""
    tree = with_stub(copy_workflow(tmp_path_factory.mktemp("workflow") / "finished"))
    said = halftone(tree, "run", "--cores", "2")
    assert said.returncode == 0, said.stderr
    return tree, said


@pytest.fixture
def copy(finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> Callable[[], Path]:
    """Makes copies of the finished one, times and records included."""
    count = iter(range(100))

    def make() -> Path:
        tree = tmp_path / f"tree{next(count)}"
        shutil.copytree(finished[0], tree, symlinks=True)
        return tree

    return make
