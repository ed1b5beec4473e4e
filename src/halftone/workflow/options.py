"""Settings -> the command-line options of each rule.

A rule records its options as one string, in which every value stands beside its name: Snakemake compares
parameters as a set of values, so that two numbers that change places would otherwise go unnoticed.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from halftone.policies import StepSize
from halftone.settings import Components, Model, RowExecution, Scenario, Settings
from halftone.workflow import paths
from halftone.workflow.paths import Rule


def options(settings: Settings, rule: Rule, key: str = "") -> str:
    """Every setting that decides what `rule` makes for a model or scenario, and no other."""
    return shlex.join(_MAKERS[rule](settings, key)) if rule in _MAKERS else ""


def _flags(**values: Any) -> list[str]:
    return [part for name, value in values.items() if value is not None for part in _flag(name, value)]


def _flag(name: str, value: Any) -> list[str]:
    return [f"--{name.replace('_', '-')}", str(value)]


def _source(model: Model) -> list[str]:
    return [model.path, *_flags(revision=model.revision)]


def _sampler(model: Model) -> list[str]:
    return _flags(steps=model.steps, guidance=model.guidance_scale, resolution=model.resolution)


def _recipe(row: Scenario) -> list[str]:
    axes = json.dumps(row.axes, sort_keys=True) if row.axes else None
    return _flags(recipe=row.recipe, bits=row.bits, protocol=row.protocol, axes=axes)


def _calibration_data(settings: Settings, key: str) -> list[str]:
    model, how = settings.models[key], settings.calibration
    flags = _flags(n_prompts=how.n_prompts, batch_size=how.batch_size, seed=settings.seed, name=key)
    return [*_source(model), *_sampler(model), *flags]


def _reparameterize(settings: Settings, key: str) -> list[str]:
    row = settings.scenarios[key]
    flags = _flags(batch_size=settings.calibration.batch_size, name=key)
    return [*_source(settings.models[row.model]), *_recipe(row), *flags]


def _reconstruct(settings: Settings, key: str) -> list[str]:
    row, how = settings.scenarios[key], settings.reconstruction
    flags = _flags(budget=how.budget, batch_size=how.batch_size, seed=settings.seed, name=key)
    return [*_source(settings.models[row.model]), *_recipe(row), *flags]


def _calibrate(settings: Settings, key: str) -> list[str]:
    row = settings.scenarios[key]
    flags = _flags(batch_size=settings.calibration.batch_size, name=key)
    if row.resolved_axes().step_size is StepSize.LEARNED:
        how = settings.reconstruction
        flags += _flags(budget=how.budget, unit_batch_size=how.batch_size)
    return [*_source(settings.models[row.model]), *_recipe(row), *flags]


def _sensitivity(settings: Settings, key: str) -> list[str]:
    return [*_calibrate(settings, key), *_flags(clip=settings.metrics.clip)]


def _analyze(settings: Settings, key: str) -> list[str]:
    return _flags(name=key)


def _export(settings: Settings, key: str) -> list[str]:
    row = settings.scenarios[key]
    flags = _flags(name=key)
    if row.components is not Components.COPY:
        flags += _flags(components=row.components)
    return [*_source(settings.models[row.model]), *flags]


def _sample(settings: Settings, key: str) -> list[str]:
    row, how = settings.scenarios[key], settings.sampling
    model = settings.models[row.model]
    source = [paths.ARTEFACT.format(scenario=key)] if row.quantized else [*_source(model), *_sampler(model)]
    tier = settings.tiers[row.tier]
    seeds = {"seed_a": how.seed_a} if tier.paired else {"seed_a": how.seed_a, "seed_b": how.seed_b}
    image_set = tier.prompts if model.unprompted else None
    flags = _flags(n_images=tier.n_images, image_set=image_set, **seeds, name=key)
    if row.execution is RowExecution.INTEGER:
        flags += _flags(execution=row.execution)
    return [*source, *flags, *(["--paired"] if tier.paired else [])]


def _metrics(settings: Settings, key: str) -> list[str]:
    row, how = settings.scenarios[key], settings.metrics
    artefact = paths.ARTEFACT.format(scenario=key) if row.quantized else None
    return _flags(
        artefact=artefact,
        features=how.features,
        clip=how.clip,
        bootstrap=how.bootstrap,
        real_images=settings.models[row.model].real_images,
        seed=settings.seed,
        model=row.model,
        tier=row.tier,
        name=key,
    )


_MAKERS = {
    Rule.CALIBRATION_DATA: _calibration_data,
    Rule.REPARAMETERIZE: _reparameterize,
    Rule.RECONSTRUCT: _reconstruct,
    Rule.SENSITIVITY: _sensitivity,
    Rule.CALIBRATE: _calibrate,
    Rule.ANALYZE: _analyze,
    Rule.EXPORT: _export,
    Rule.SAMPLE: _sample,
    Rule.METRICS: _metrics,
}
