"""Copies of the workflow in which the command line is a stub, so that a whole run takes seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STUB = Path(__file__).with_name("stub_cli.py")
SKIPPED = shutil.ignore_patterns("__pycache__", "*.egg-info")


def environment(tree: Path) -> dict[str, str]:
    """Of commands in a copy: its own source, this interpreter's programs, no settings of the developer's."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "DVC", "SNAKEMAKE", "HALFTONE"))
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        **kept,
        "PYTHONPATH": str(tree / "src"),
        "PATH": path,
        "DVC_NO_ANALYTICS": "1",
        "OMP_NUM_THREADS": "1",
    }


def halftone(tree: Path, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return run(tree, [sys.executable, "-m", "halftone", *words], **options)


def snakemake(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    profile = ["--workflow-profile", "workflow/profiles/default"]
    return run(tree, [sys.executable, "-m", "snakemake", *profile, *words])


def dvc(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(tree, [sys.executable, "-m", "dvc", *words])


def run(tree: Path, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        command, cwd=tree, env=environment(tree), capture_output=True, text=True, check=False, **options
    )


def copy_workflow(tree: Path) -> Path:
    """Everything that the workflow consists of, in a Git and DVC repository of its own."""
    tree.mkdir(parents=True)
    for name in ("Snakefile", "dvc.yaml", "params.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, tree / name)
    for name in ("workflow", "experiments", "src", "data/prompts"):
        shutil.copytree(ROOT / name, tree / name, ignore=SKIPPED)
    (tree / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, tree / ".dvc" / name)
    run(tree, ["git", "init", "-q", "."])
    return tree


def with_stub(tree: Path) -> Path:
    """Put the stub in front of the command line, and something like models beside the prompts."""
    package = tree / "src/halftone/cli"
    (package / "__init__.py").rename(package / "real.py")
    shutil.copy(STUB, package / "__init__.py")
    for file in (
        "scenes-t2i/model_index.json",
        "scenes-t2i/unet/weights.safetensors",
        "scenes-metrics/net.safetensors",
    ):
        path = tree / "data/models" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{file}\n")
    # the store of runs is tested for itself; here its creation would take longer than everything else
    (tree / "mlflow.db").touch()
    return tree


def edit(tree: Path, old: str, new: str, file: str = "params.yaml") -> None:
    text = (tree / file).read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
    (tree / file).write_text(text.replace(old, new))
