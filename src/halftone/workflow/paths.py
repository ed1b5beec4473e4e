"""Where every rule writes. One definition, for the Snakefile, for DVC's stages, and for finding stale files.

A rule's files lie under `results/{rule}/`, named by the scenario (or the model) alone, so that no DVC out
contains another. Ids hold no dots, so the first part of a name up to its first dot is the id.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from halftone.settings import Settings

RESULTS = Path("results")
LOGS = Path("logs")
TIMINGS = LOGS / "benchmark"
SCRATCH = Path("scratch")
UNITS = SCRATCH / "units"

CALIBRATION_DATA = "results/calibration_data/{model}.safetensors"
REPARAMETERIZE_FOLDER = "results/reparameterize/{scenario}"
REPARAMETERIZE = "results/reparameterize/{scenario}/factors.safetensors"
IMBALANCE = "results/reparameterize/{scenario}/imbalance.json"
IMBALANCE_PLOT = "results/reparameterize/{scenario}/imbalance.svg"
RECONSTRUCT = "results/reconstruct/{scenario}/weights.safetensors"
SENSITIVITY_FOLDER = "results/sensitivity/{scenario}"
SENSITIVITY = "results/sensitivity/{scenario}/sensitivity.json"
SENSITIVITY_PLOT = "results/sensitivity/{scenario}/sensitivity.svg"
CALIBRATE = "results/calibrate/{scenario}/state.safetensors"
ANALYSIS = "results/analyze/{scenario}"
PLAN = "results/analyze/{scenario}/plan.json"
STATISTICS = "results/analyze/{scenario}/statistics.json"
RANGES = "results/analyze/{scenario}/ranges.svg"
ARTEFACT = "results/export/{scenario}"
MANIFEST = "results/export/{scenario}/manifest.json"
SHARD = "results/sample/{scenario}/{shard}.zip"
METRICS = "results/metrics/{scenario}.json"
FEATURES = "results/metrics/{scenario}.safetensors"
SUMMARY = "results/summary.csv"
REPORT = "results/report.html"
GRID = "results/grid.png"


class Rule(StrEnum):
    """The rules, in the order of the pipeline."""

    CALIBRATION_DATA = "calibration_data"
    REPARAMETERIZE = "reparameterize"
    RECONSTRUCT = "reconstruct"
    SENSITIVITY = "sensitivity"
    CALIBRATE = "calibrate"
    ANALYZE = "analyze"
    EXPORT = "export"
    SAMPLE = "sample"
    METRICS = "metrics"
    SUMMARY = "summary"
    REPORT = "report"

    @property
    def per_model(self) -> bool:
        return self is Rule.CALIBRATION_DATA

    @property
    def per_scenario(self) -> bool:
        return self not in (Rule.CALIBRATION_DATA, Rule.SUMMARY, Rule.REPORT)


_OUTPUTS = {
    Rule.CALIBRATION_DATA: (CALIBRATION_DATA,),
    Rule.REPARAMETERIZE: (REPARAMETERIZE, IMBALANCE, IMBALANCE_PLOT),
    Rule.RECONSTRUCT: (RECONSTRUCT,),
    Rule.SENSITIVITY: (SENSITIVITY, SENSITIVITY_PLOT),
    Rule.CALIBRATE: (CALIBRATE,),
    Rule.ANALYZE: (PLAN, STATISTICS, RANGES),
    Rule.EXPORT: (MANIFEST,),
    Rule.SAMPLE: (SHARD,),
    Rule.METRICS: (METRICS, FEATURES),
    Rule.SUMMARY: (SUMMARY,),
    Rule.REPORT: (REPORT, GRID),
}


def shards(settings: Settings, scenario: str) -> list[str]:
    """`0-of-2`, `1-of-2` for a scenario of two shards."""
    count = settings.shards(scenario)
    return [f"{index}-of-{count}" for index in range(count)]


def applies(settings: Settings, rule: Rule, scenario: str) -> bool:
    """Whether a scenario goes through a rule: full precision is only sampled and measured."""
    row = settings.scenarios[scenario]
    if not row.quantized:
        return rule in (Rule.SAMPLE, Rule.METRICS)
    if rule is Rule.REPARAMETERIZE:
        return reparameterized(settings, scenario)
    if rule is Rule.SENSITIVITY:
        return relaxed_by_measure(settings, scenario)
    return rule is not Rule.RECONSTRUCT or reconstructed(settings, scenario)


def reconstructed(settings: Settings, scenario: str) -> bool:
    """Whether the scenario's weights are rounded by block reconstruction."""
    from halftone.policies import Rounding

    row = settings.scenarios[scenario]
    return row.quantized and row.resolved_axes().rounding is not Rounding.NEAREST


def reparameterized(settings: Settings, scenario: str) -> bool:
    """Whether range is moved from the scenario's activations to its weights."""
    from halftone.policies import Reparameterization

    row = settings.scenarios[scenario]
    return row.quantized and row.resolved_axes().reparameterization is not Reparameterization.NONE


def relaxed_by_measure(settings: Settings, scenario: str) -> bool:
    """Whether the calls that the scenario relaxes are chosen by measurement."""
    from halftone.relaxing import Interval

    row = settings.scenarios[scenario]
    return row.quantized and row.resolved_axes().relaxing == Interval.AUTO


def outputs(settings: Settings, rule: Rule, key: str = "") -> list[str]:
    """The files that a rule declares as its outputs for one scenario (or model); none where it does not
    apply.
    """
    if rule.per_scenario and not applies(settings, rule, key):
        return []
    wanted = shards(settings, key) if rule is Rule.SAMPLE else [""]
    return [
        pattern.format(model=key, scenario=key, shard=shard) for shard in wanted for pattern in _OUTPUTS[rule]
    ]


def folder(rule: Rule, key: str) -> Path | None:
    """The folder that holds a rule's files for one scenario, where it has one of its own."""
    first = _OUTPUTS[rule][0].format(model=key, scenario=key, shard="0-of-1")
    parent = Path(first).parent
    return parent if parent.name == key else None


def every_output(settings: Settings) -> list[str]:
    """All declared outputs of all models and scenarios, whatever their tier."""
    found = [o for model in settings.models for o in outputs(settings, Rule.CALIBRATION_DATA, model)]
    for rule in Rule:
        if rule.per_scenario:
            found += [o for scenario in settings.scenarios for o in outputs(settings, rule, scenario)]
    return [*found, SUMMARY, REPORT, GRID]
