"""Results of a small run, as the rules leave them, with figures of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from halftone.files import write_json, write_text
from halftone.plan import BitOperations, Execution, Granularity, Plan, Quantizer, SitePlan, Sizes
from halftone.prompts import prompts_sha256
from halftone.recipes import PRESETS
from halftone.report.summary import summarize
from halftone.settings import Protocol
from halftone.shards import SeedSet, ShardIndex, write_shard

N = 6
PROMPTS = [f"scene {k} with <b>a ring</b> & a star" for k in range(N)]
FP, MINMAX, STATIC = "m_fp_demo", "m_minmax_w4a8_demo", "m_static_w4a8_demo"


def row(scenario: str, recipe: str, **figures: Any) -> dict[str, Any]:
    """A row as `halftone metrics` writes it; a figure given as three numbers has an interval."""
    full = recipe.startswith("fp")
    found: dict[str, Any] = {
        "model": "m",
        "scenario": scenario,
        "recipe": recipe,
        "protocol": "equal",
        "tier": "demo",
        "execution": "float" if full else "simulated",
        "n_images": N,
        "prompts_sha256": prompts_sha256(PROMPTS),
        "features": "scenes",
        "seed": 0,
    }
    if not full:
        found |= {"weight_bits": 4, "act_bits": 8, "softmax_bits": 8, "artefact_sha256": "ab" * 32}
    for name, value in figures.items():
        if isinstance(value, tuple):
            found |= dict(zip((name, f"{name}_lo", f"{name}_hi"), value, strict=True))
        else:
            found[name] = value
    return found


def a_plan(recipe: str) -> Plan:
    site = {"module": "conv1", "module_type": "Conv2d", "execution": Execution.SIMULATED}
    return Plan(
        recipe=recipe,
        bits="w4a8",
        protocol=Protocol.EQUAL,
        axes=PRESETS[recipe],
        denoiser="UNet2DConditionModel",
        calls=26,
        sites=(
            SitePlan(
                name="conv_in.weight",
                module="conv_in",
                kind="weight",
                module_type="Conv2d",
                execution=Execution.FLOAT,
                float_reason="first or last <layer>",
                elements=9,
            ),
            SitePlan(
                name="conv1.weight",
                kind="weight",
                bits=4,
                quantizer=Quantizer.AFFINE,
                granularity=Granularity.CHANNEL,
                parameters=8,
                elements=1 << 20,
                **site,
            ),
        ),
        sizes=Sizes(original=1 << 22, packed=1 << 19, parameters=40, left_float=36),
        bit_operations=BitOperations(quantized=1 << 30, original=1 << 35),
    )


def images_of(strength: int) -> np.ndarray:
    """uint8 [2 seed sets, N, 16, 16, 3], with a damage of `strength`."""
    clean = np.random.default_rng(0).integers(60, 200, (2, N, 16, 16, 3))
    noise = np.random.default_rng(1).integers(-strength, strength + 1, clean.shape)
    return (clean + noise).astype(np.uint8)


def write_images(folder: Path, strength: int, recipe: str, artefact: str | None) -> None:
    for shard, ids in enumerate((range(0, 3), range(3, N))):
        index = ShardIndex(
            shard=shard,
            n_shards=2,
            first=ids[0],
            count=len(ids),
            n_images=N,
            seeds={SeedSet.A: 1, SeedSet.B: 2},
            height=16,
            width=16,
            model="models/m",
            model_sha256="cd" * 32,
            artefact_sha256=artefact,
            execution=Execution.SIMULATED if artefact else Execution.FLOAT,
            recipe=recipe,
            bits="w4a8" if artefact else None,
            prompts_sha256=prompts_sha256(PROMPTS),
            steps=25,
            guidance=6.0,
            lanes=8,
            scheduler="PNDMScheduler",
            halftone="0.1.0",
            torch="2",
            diffusers="0.42",
        )
        images = images_of(strength)
        members = [(s, k, images[place, k]) for place, s in enumerate(sorted(SeedSet)) for k in ids]
        folder.mkdir(parents=True, exist_ok=True)
        write_shard(folder / f"{shard}-of-2.zip", index, members)


def write_results(tmp_path: Path) -> Path:
    """Full precision and two recipes: metrics, images, plans, and the summary; prompts beside them."""
    folder = tmp_path / "results"
    fp = [
        row(
            FP,
            "fp",
            alignment=(0.9, 0.8, 1.0),
            lpips=(0.0, 0.0, 0.0),
            kid_to_fp=(0.0, 0.0, 0.0),
        ),
        row(f"{FP}-floor", "fp-floor", alignment=(0.88, 0.8, 0.97), kid_to_fp=(0.0001, -0.002, 0.002)),
    ]
    write_json(
        folder / "metrics" / f"{FP}.json", {"rows": fp, "verdict": "is full precision", "differences": {}}
    )
    for scenario, recipe, strength, verdict in (
        (MINMAX, "minmax", 50, "differs from full precision in kid_excess, alignment"),
        (STATIC, "static", 5, "not distinguishable from full precision"),
    ):
        figures = {"alignment": (0.6, 0.5, 0.7), "kid_to_fp": (0.02, 0.01, 0.03), "lpips": (0.3, 0.2, 0.4)}
        content = {
            "rows": [row(scenario, recipe, fid_to_fp=(3.0, 2.0, 4.0), weight_mib=1.0, **figures)],
            "verdict": verdict,
            "differences": {"alignment": {"value": -0.3, "error": 0.05, "lo": -0.4, "hi": -0.2}},
            "clip": "scenes",
        }
        write_json(folder / "metrics" / f"{scenario}.json", content)
        lpips = np.linspace(0.1, 0.6, N, dtype=np.float32)
        save_file({"lpips": lpips}, folder / "metrics" / f"{scenario}.safetensors")
        a_plan(recipe).save(folder / "analyze" / scenario / "plan.json")
        write_text(folder / "analyze" / scenario / "ranges.svg", "<svg xmlns='http://www.w3.org/2000/svg'/>")
        known = {
            "recipe": recipe,
            "bits": "w4a8",
            "model_path": "models/m",
            "n_prompts": 4,
            "code_commit": "f00",
        }
        known["axes"] = json.loads(PRESETS[recipe].model_dump_json())
        write_json(folder / "export" / scenario / "provenance.json", known)
        write_images(folder / "sample" / scenario, strength, recipe, "ab" * 32)
    write_images(folder / "sample" / FP, 0, "fp", None)
    write_text(tmp_path / "prompts.txt", "".join(f"{prompt}\n" for prompt in PROMPTS))
    summarize(sorted((folder / "metrics").glob("*.json")), folder / "summary.csv")
    return folder
