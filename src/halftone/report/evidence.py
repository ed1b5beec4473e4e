"""What lies beside a summary and belongs on the page: plans, plots, a few images, provenance.

Read from the folders of the rules under `results/`. All of it is optional: figures alone make a page too. Of
the images only those that are shown are kept, so that memory does not grow with their number.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as default
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from halftone.errors import UserError
from halftone.files import read_json
from halftone.plan import Plan
from halftone.prompts import prompts_sha256, read_prompts
from halftone.recipes import PRESETS
from halftone.report.grids import spread
from halftone.report.summary import FULL_PRECISION_ROWS, Row, groups, source_of
from halftone.report.table import NO_VERDICT, Verdict
from halftone.shards import Pixels, SeedSet, ShardIndex, read_shard, slice_of
from halftone.unconditional import numbered, set_of

GRID_ROWS, WORST = 10, 4
PROMPTS = "CALIBRATION_PROMPTS"  # stands for a file in commands
OWN_FACTS = ("recipe", "axes", "artefact, SHA-256")  # a row's own, even where it is the only row
# of a metrics file: name -> short, long, factor and unit that it is shown with
_DIFFERENCES = {
    "fid_excess": ("FID", "FID over the floor", 1.0, ""),
    "kid_excess": ("KID", "KID over the floor", 1.0, ""),
    "alignment": ("alignment", "alignment", 100.0, " points"),
    "clip_score": ("CLIP score", "CLIP score", 1.0, ""),
}


@dataclass(frozen=True)
class Evidence:
    """What there is about a scenario besides its figures.

    images, others: of seed sets A and B, by prompt id, those to be shown. lpips: of all prompts by id, to
    the full-precision image of the same noise. latent_error: value, lo and hi after every call. facts: of its
    provenance, by name. command: to make the artefact again.
    """

    plan: Plan | None = None
    ranges: str | None = None
    prompts: Mapping[int, str] = default(default_factory=dict)
    images: Mapping[int, Pixels] = default(default_factory=dict)
    others: Mapping[int, Pixels] = default(default_factory=dict)
    lpips: Mapping[int, float] = default(default_factory=dict)
    latent_error: Sequence[Mapping[str, float]] = ()
    facts: Sequence[tuple[str, str]] = ()
    command: str = ""
    verdict: Verdict = NO_VERDICT

    @property
    def worst(self) -> list[int]:
        """Ids of the prompts whose images are farthest from full precision, the farthest first."""
        return sorted(self.lpips, key=lambda prompt: (-self.lpips[prompt], prompt))[:WORST]


def gather(rows: Sequence[Row], results: Path, prompts: Sequence[Path | str] = ()) -> dict[str, Evidence]:
    """The evidence of every row's scenario, by scenario id, from the folders of `results`.

    prompts: files, of which each row takes the one with its hash. Raises UserError for a file that is there
    and damaged, or images that are not those of the row.
    """
    texts = [read_prompts(path) for path in prompts]
    found: dict[str, Evidence] = {}
    for group in groups(rows):
        own = {source_of(row): row for row in group}
        lpips = {scenario: _lpips(results / "metrics" / f"{scenario}.safetensors") for scenario in own}
        quantized = [s for s, row in own.items() if row["recipe"] not in FULL_PRECISION_ROWS]
        worst = {scenario: Evidence(lpips=lpips[scenario]).worst for scenario in quantized}
        for scenario, row in own.items():
            n_images = int(row.get("n_images") or 0)
            wanted = set(spread(n_images, GRID_ROWS))
            full = row["recipe"] in FULL_PRECISION_ROWS
            wanted |= {k for ids in worst.values() for k in ids} if full else set(worst[scenario])
            artefact = str(row.get("artefact_sha256") or "")
            images = _images(results / "sample" / scenario, n_images, wanted, artefact)
            analysis = results / "analyze" / scenario
            plan = Plan.load(analysis / "plan.json") if (analysis / "plan.json").is_file() else None
            known = _json(results / "export" / scenario / "provenance.json")
            measured = _json(results / "metrics" / f"{scenario}.json")
            found[scenario] = Evidence(
                plan=plan,
                ranges=_text(analysis / "ranges.svg"),
                prompts=_prompts(row, texts, n_images),
                images=images.a,
                others=images.b,
                lpips={} if full else lpips[scenario],
                latent_error=() if full else tuple(measured.get("latent_error") or ()),
                facts=_facts(row, images.index, known, measured),
                command=_command(known, scenario),
                verdict=NO_VERDICT if full else verdict(measured),
            )
    return found


def verdict(measured: Mapping[str, Any]) -> Verdict:
    """The verdict of a metrics file, with the differences that it rests on in words."""
    said = str(measured.get("verdict") or "")
    if not said:
        return NO_VERDICT
    why = [
        _difference(name, value)
        for name, value in (measured.get("differences") or {}).items()
        if name in _DIFFERENCES
    ]
    if not said.startswith("differs"):
        return Verdict("same", said, why)
    title, _, names = said.partition(" in ")
    known = [_DIFFERENCES[name][0] if name in _DIFFERENCES else name for name in names.split(", ") if name]
    return Verdict("differs", f"{title} in {', '.join(known)}" if known else title, why)


def _difference(name: str, value: Mapping[str, float]) -> str:
    _, label, scale, unit = _DIFFERENCES[name]
    low, middle, high = (f"{scale * value[key]:+.3g}".replace("-", "−") for key in ("lo", "value", "hi"))
    return f"{label} {middle}{unit} ({low} to {high})"


@dataclass
class _Images:
    a: dict[int, Pixels] = default(default_factory=dict)
    b: dict[int, Pixels] = default(default_factory=dict)
    index: ShardIndex | None = None


def _images(folder: Path, n_images: int, wanted: set[int], artefact: str) -> _Images:
    """The wanted images of a scenario's shards; none where it has no shards."""
    found = _Images()
    for path in sorted(folder.glob("*-of-*.zip")):
        number, _, count = path.stem.partition("-of-")
        ids = wanted & set(slice_of(n_images, int(number), int(count)))
        if not ids:
            continue
        shard = read_shard(path)
        if (shard.index.artefact_sha256 or "") != artefact:
            raise UserError(
                f"{path}: not sampled from the artefact of the summary; run halftone sample again"
            )
        found.index = found.index or shard.index
        for seed_set, images in ((SeedSet.A, found.a), (SeedSet.B, found.b)):
            if seed_set in shard.index.seeds:
                images |= {prompt: shard.image(seed_set, prompt) for prompt in ids}
    return found


def _lpips(path: Path) -> dict[int, float]:
    if not path.is_file():
        return {}
    try:
        with safe_open(str(path), framework="np") as file:
            values = file.get_tensor("lpips").tolist()
    except SafetensorError as fault:
        raise UserError(f"{path}: not per-image figures ({fault}); run halftone metrics again") from None
    return dict(enumerate(values))


def _json(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.is_file() else {}


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _prompts(row: Row, files: Sequence[Sequence[str]], n_images: int) -> dict[int, str]:
    """The prompts whose hash the row carries: of a whole file, or of as many lines as there are images. Of a
    model without text, what stands for them."""
    images = set_of(row.get("prompts_sha256"), n_images)
    if images is not None:
        return dict(enumerate(numbered(images, n_images)))
    for texts in files:
        if row.get("prompts_sha256") in (prompts_sha256(texts), prompts_sha256(texts[:n_images])):
            return dict(enumerate(texts[:n_images]))
    return {}


def _facts(
    row: Row, index: ShardIndex | None, known: Mapping[str, Any], measured: Mapping[str, Any]
) -> list[tuple[str, str]]:
    facts: dict[str, Any] = {}
    if index is not None:
        guidance = "" if index.guidance is None else f", guidance {index.guidance:g}"
        prompted = index.image_set is None
        facts |= {
            "model": index.model,
            "model weights, SHA-256": index.model_sha256,
            "sampler": f"{index.scheduler}, {index.steps} steps{guidance}",
            "images": f"{index.width} x {index.height} pixels, {index.lanes} sampled at once",
            "image seeds": ", ".join(f"set {s.upper()} {seed}" for s, seed in sorted(index.seeds.items())),
            "prompts, SHA-256": index.prompts_sha256 if prompted else None,
            "noise": None if prompted else f"of the {index.image_set} set, which shares none with another",
            "halftone": index.halftone,
            "torch": index.torch,
            "diffusers": index.diffusers,
        }
    facts |= {"feature network": row.get("features"), "CLIP of the score": measured.get("clip")}
    if known:
        axes = known.get("axes") or {}
        prompted = _calibrated_on_prompts(known)
        what = "prompts" if prompted else "images"
        facts |= {
            "calibration": f"{known.get('n_prompts')} {what}, seed {known.get('seed')}",
            "calibration prompts, SHA-256": known.get("prompts_sha256") if prompted else None,
            "code commit": known.get("code_commit"),
            "recipe": f"{known.get('recipe')} {known.get('bits')}, protocol {known.get('protocol')}",
            "axes": ", ".join(f"{name} {value}" for name, value in axes.items()),
        }
    facts |= {"artefact, SHA-256": row.get("artefact_sha256")}
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _calibrated_on_prompts(known: Mapping[str, Any]) -> bool:
    return set_of(known.get("prompts_sha256"), int(known.get("n_prompts") or 0)) is None


def _command(known: Mapping[str, Any], scenario: str) -> str:
    """The command that makes the artefact again without the workflow."""
    if not known.get("recipe") or not known.get("model_path"):
        return ""
    preset = PRESETS.get(known["recipe"])
    axes = known.get("axes")
    is_preset = preset is not None and preset.model_dump(mode="json") == axes
    flags = {
        "revision": known.get("model_revision"),
        "recipe": known["recipe"],
        "bits": known.get("bits"),
        "protocol": known.get("protocol"),
        "axes": None if is_preset else json.dumps(axes),
        "prompts": PROMPTS if _calibrated_on_prompts(known) else None,
        "n-prompts": known.get("n_prompts"),
        "steps": known.get("steps"),
        "guidance": known.get("guidance"),
        "resolution": known.get("resolution"),
        "seed": known.get("seed"),
    }
    parts = ["halftone", "quantize", str(known["model_path"])]
    for name, value in flags.items():
        parts += [] if value is None else [f"--{name}", str(value)]
    return shlex.join([*parts, "-o", scenario])
