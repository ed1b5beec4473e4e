"""The figures of one scenario: its row of results/summary.csv, measured on its images and full precision's.

Per-image figures (CLIP score, alignment, perceptual distance, PSNR, SSIM) are those of seed set A. Paired
distances compare recipe(A) with fp(A), unpaired ones recipe(B) with fp(A). Below 500 images no Fréchet
distance is given, only the kernel one; without seed set B no distance but the latents' error instead. Without
prompts (a model without text) there is no CLIP score and no alignment. The
full-precision scenario gives two rows: its own, whose paired distances are nothing by definition, and, with
seed set B, the floor, fp(B) against fp(A).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from halftone.columns import NAMES
from halftone.errors import UserError
from halftone.evaluate import alignment, paired, real
from halftone.evaluate.comparison import FEWEST_FOR_FRECHET, NOTHING, Comparison, Seen, Values
from halftone.evaluate.features import FeatureNetwork, Images, open_network
from halftone.evaluate.images import ImageSet
from halftone.evaluate.statistics import Estimate, verdict
from halftone.files import write_json, writing
from halftone.recipes import FULL_PRECISION
from halftone.scenes.grammar import Scene
from halftone.settings import Metrics

FLOOR = "fp-floor"
DIGITS = 6  # significant digits of a figure: fewer than differ between machines' arithmetic

Row = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """`rows`: one, or two for full precision. `differences`: to full precision, with joint intervals.

    `tensors`: per-image values and features, from which every figure can be computed again.
    """

    rows: tuple[Row, ...]
    verdict: str
    clip: str | None
    differences: dict[str, Estimate]
    tensors: dict[str, Tensor]
    latent_error: tuple[Estimate, ...] = ()
    """After every call."""


class Measurer:
    """Holds the networks and the settings, and measures scenario after scenario.

    network, clip: what `settings` name, unless given. Raises UserError when their weights cannot be had.
    """

    def __init__(
        self,
        settings: Metrics,
        seed: int = 0,
        network: FeatureNetwork | None = None,
        clip: alignment.Clip | None = None,
    ) -> None:
        self._settings, self._seed = settings, seed
        self._network = network or open_network(settings.features)
        self._given_clip = clip

    @cached_property
    def _clip(self) -> alignment.Clip:
        return self._given_clip or alignment.open_clip_model(self._settings.clip)

    def measure(
        self,
        images: ImageSet,
        reference: ImageSet,
        prompts: Sequence[str] | None,
        identity: Mapping[str, Any],
        real_images: Images | None = None,
    ) -> Measurement:
        """Measures `images` against full precision's `reference`, both for `prompts` in order.

        prompts: None for a model without text. real_images: as many, of the same size; by default the renders
        of prompts that are captions of scenes. identity: columns that are not measured here (model, scenario,
        recipe, bits, hashes, sizes).
        Raises UserError when counts or shapes do not fit, ValueError for an unknown column.
        """
        count, shape = len(images.a), list(images.a.shape)
        if shape != list(reference.a.shape) or (prompts is not None and len(prompts) != count):
            asked = "" if prompts is None else f" and {len(prompts)} prompts"
            both = f"images {shape}, full precision {list(reference.a.shape)}"
            raise UserError(
                f"{identity.get('scenario')}: {both}{asked} do not belong together; sample both again"
            )
        scenes = None if prompts is None else alignment.scenes_of(images.a, prompts)
        if real_images is None and scenes is not None:
            real_images = real.renders(scenes)
        wanted = None if real_images is None else self._network.features(real_images)
        clip = None if prompts is None else self._clip.name
        comparison = Comparison(count, wanted, self._settings.bootstrap, self._seed)
        shared = {**identity, "n_images": count, "features": self._network.name}
        fp = self._look(reference.a, prompts, scenes)
        if identity["recipe"] == FULL_PRECISION:
            other = None if reference.b is None else self._look(reference.b, prompts, scenes)
            return self._full_precision(reference.a, fp, other, comparison, shared, clip)
        seen, pairs = self._look(images.a, prompts, scenes), self._pair(images.a, reference.a)
        if "alignment" in seen.values:
            pairs["alignment_flips"] = np.abs(seen.values["alignment"] - fp.values["alignment"])
        errors = _latent_errors(images, reference)
        figures = comparison.own(seen) | comparison.means(pairs)
        figures["fid_to_fp"] = comparison.frechet((seen.features, fp.features))
        other_features = floor = None
        if images.b is not None and reference.b is not None:
            other_features, floor = self._network.features(images.b), self._network.features(reference.b)
            figures["kid_to_fp"] = comparison.kernel((seen.features, fp.features))
            figures["fid_to_fp_unpaired"] = comparison.frechet(
                (other_features, fp.features), base=(floor, fp.features)
            )
        per_call = comparison.means({str(k): errors[:, k] for k in range(errors.shape[1])})
        latent_error = tuple(estimate for estimate in per_call.values() if estimate is not None)
        if latent_error:
            figures["latent_error"] = latent_error[-1]
            pairs["latent_error"] = errors[:, -1]
        if wanted is not None:
            figures["fid_to_real"] = comparison.frechet((seen.features, wanted), base=(fp.features, wanted))
        differences = comparison.differences(seen, fp, other_features, floor)
        return Measurement(
            (_row(shared, figures),),
            verdict(differences),
            clip,
            differences,
            _tensors(seen, pairs, other_features, None),
            latent_error,
        )

    def _full_precision(
        self,
        images: Images,
        fp: Seen,
        other: Seen | None,
        comparison: Comparison,
        shared: Mapping[str, Any],
        clip: str | None,
    ) -> Measurement:
        """Its own row, and the floor: the same model on other noise, where there is any."""
        pairs = self._pair(images, images)
        if other is None:
            row = _row(shared, comparison.own(fp) | comparison.means(pairs))
            tensors = _tensors(fp, pairs, None, comparison.real)
            return Measurement((row,), "is full precision", clip, {}, tensors)
        apart = comparison.frechet((other.features, fp.features))
        own = comparison.own(fp) | comparison.means(pairs)
        own |= {"kid_to_fp": NOTHING, "fid_to_fp_unpaired": apart}
        own |= {"fid_to_fp": NOTHING if comparison.count >= FEWEST_FOR_FRECHET else None}
        floor = comparison.own(other) | {"fid_to_fp": apart, "fid_to_fp_unpaired": apart}
        floor["kid_to_fp"] = comparison.kernel((other.features, fp.features))
        named = {**shared, "recipe": FLOOR, "scenario": f"{shared['scenario']}-floor"}
        rows = (_row(shared, own), _row(named, floor))
        tensors = _tensors(fp, pairs, other.features, comparison.real)
        return Measurement(rows, "is full precision", clip, {}, tensors)

    def _look(self, images: Images, prompts: Sequence[str] | None, scenes: list[Scene] | None) -> Seen:
        values: dict[str, Values] = {}
        if prompts is not None:
            values["clip_score"] = _values(alignment.clip_scores(self._clip.cosines(images, prompts)))
        if scenes is not None:
            checked = alignment.check(images, scenes)
            values["alignment_objects"] = checked.objects.astype(np.float64)
            values["alignment"] = checked.everything.astype(np.float64)
            values["abstain_rate"] = checked.abstained.astype(np.float64)
        return Seen(self._network.features(images), values, self._network.logits(images))

    def _pair(self, images: Images, reference: Images) -> dict[str, Values]:
        return {
            "lpips": _values(self._network.perceptual(images, reference)),
            "psnr": _values(paired.psnr(images, reference)),
            "ssim": _values(paired.ssim(images, reference)),
        }


def _latent_errors(images: ImageSet, reference: ImageSet) -> Values:
    """|latents - full precision's| / |full precision's|, by prompt and call [n, calls]; none: [n, 0]."""
    if images.latents is None or reference.latents is None:
        return np.zeros((len(images.a), 0))
    ours, theirs = (
        x.reshape(*x.shape[:2], -1).astype(np.float64) for x in (images.latents, reference.latents)
    )
    found: Values = np.linalg.norm(ours - theirs, axis=2) / np.linalg.norm(theirs, axis=2)
    return found


def _values(tensor: Tensor) -> Values:
    return tensor.double().numpy()


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _row(identity: Mapping[str, Any], figures: Mapping[str, Estimate | None]) -> Row:
    """A row of the summary; columns that do not apply are None. ValueError for a column it does not have."""
    row: Row = dict(identity)
    for name, estimate in figures.items():
        if estimate is None:
            continue
        row[name] = _rounded(estimate.value)
        if f"{name}_lo" in NAMES:
            row |= {f"{name}_lo": _rounded(estimate.lo), f"{name}_hi": _rounded(estimate.hi)}
    if unknown := set(row) - set(NAMES):
        raise ValueError(f"not columns of the summary: {', '.join(sorted(unknown))}")
    return {name: row.get(name) for name in NAMES}


def _tensors(
    seen: Seen, pairs: Mapping[str, Values], features_b: Tensor | None, real: Tensor | None
) -> dict[str, Tensor]:
    """Per-image data by name, float32; verdicts of the checker as 0 and 1."""
    tensors = {name: torch.from_numpy(v).float() for name, v in {**seen.values, **pairs}.items()}
    tensors["features_a"] = seen.features
    if features_b is not None:
        tensors["features_b"] = features_b
    if real is not None:
        tensors["features_real"] = real
    if seen.logits is not None:
        tensors["logits"] = seen.logits
    return tensors


def write(measurement: Measurement, path: Path, provenance: str) -> None:
    """`path` (JSON) and, beside it, the per-image data (.safetensors). provenance: a JSON string."""
    with writing(path.with_suffix(".safetensors")) as temporary:
        tensors = {name: t.contiguous() for name, t in measurement.tensors.items()}
        save_file(tensors, temporary, metadata={"halftone": provenance})
    differences = {
        name: {k: _rounded(v) for k, v in vars(estimate).items()}
        for name, estimate in measurement.differences.items()
    }
    write_json(
        path,
        {
            "rows": list(measurement.rows),
            "differences": differences,
            "latent_error": [{k: _rounded(v) for k, v in vars(e).items()} for e in measurement.latent_error],
            "verdict": measurement.verdict,
            "clip": measurement.clip,
            "provenance": json.loads(provenance),
        },
    )
