"""ImageReward of a row and of full precision: what a model of human preference thinks of either.

Its package wants other versions of our libraries, so it runs in an environment of its own, named by the
interpreter of it. (PCR reports user preference; ImageReward stands in for people where there are none.)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from halftone.errors import UserError
from halftone.evaluate import image_reward_worker
from halftone.evaluate.features import Images
from halftone.evaluate.images import check_belong, read_images
from halftone.evaluate.statistics import Floats, bootstrap
from halftone.prompts import prompts_sha256

MODEL = "ImageReward-v1.0"
_TOLD = 500  # characters of the other program's last words


def compare(
    images: Sequence[Path],
    reference: Sequence[Path],
    prompts: Sequence[str],
    python: Path,
    *,
    model: str = MODEL,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean reward of both rows' images of seed set A and of the difference, intervals of 95 % over prompts.

    images, reference: zips of the row and of full precision. python: interpreter of an environment that holds
    image-reward. Raises UserError where the rows do not belong together, or the other program fails.
    """
    (row, index), (full, other) = read_images(images), read_images(reference)
    check_belong(index, other, prompts_sha256(prompts))
    count = len(row.a)
    if count > len(prompts):
        raise UserError(f"{images[0]}: {count} images, but {len(prompts)} prompts; give the file sampled for")
    scores = _scores([*row.a, *full.a], [*prompts[:count], *prompts[:count]], python, model)
    ours, theirs = scores[:count], scores[count:]
    found = {"reward": ours, "reward_fp": theirs, "difference": ours - theirs}
    estimates = {name: bootstrap(value, resamples=resamples, seed=seed) for name, value in found.items()}
    return {
        **{name: {"value": e.value, "lo": e.lo, "hi": e.hi} for name, e in estimates.items()},
        "model": model,
        "n_images": count,
        "prompts_sha256": prompts_sha256(prompts),
        "seed": seed,
        "artefact_sha256": index.artefact_sha256,
        "per_image": {name: value.tolist() for name, value in found.items()},
    }


def _scores(images: Sequence[Images], prompts: Sequence[str], python: Path, model: str) -> Floats:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = []
        for k, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            Image.fromarray(image).save(folder / f"{k}.png")
            pairs.append((prompt, str(folder / f"{k}.png")))
        request, answer = folder / "request.json", folder / "scores.json"
        request.write_text(json.dumps({"model": model, "pairs": pairs}), encoding="utf-8")
        worker = Path(image_reward_worker.__file__)
        _run(python, [str(worker), str(request), str(answer)])
        scores = np.array(json.loads(answer.read_text(encoding="utf-8")), dtype=np.float64)
    if scores.shape != (len(prompts),) or not np.isfinite(scores).all():
        raise UserError(f"{python}: ImageReward gave no score for some images")
    return scores


def _run(python: Path, words: Sequence[str]) -> None:
    """Another interpreter's script, isolated: neither our packages nor our paths reach it."""
    last = ""
    try:
        with subprocess.Popen(
            [str(python), "-I", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as running:
            assert running.stderr is not None
            for line in running.stderr:  # its progress among it
                sys.stderr.write(line)
                last = line.strip() or last
    except OSError as fault:
        raise UserError(f"{python}: cannot be run ({fault.strerror}); name an interpreter") from None
    if running.returncode:
        raise UserError(
            f"{python}: ImageReward failed ({last[-_TOLD:]}); install image-reward and its weights there"
        )
