"""What the workflow's jobs will cost: seconds and disk, before anything is spent, and corrected as jobs
finish.

The unit of work is one multiply-accumulate of the denoiser. A model's are estimated from the size of its
weights and of its latents, which is within a factor of two for U-Nets; the speed of the machine is a guess
until jobs have finished. Where a job has run before, its measured time is used instead.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from halftone.passes.schedule import SCHEDULES, STEP_SIZES
from halftone.policies import CalibrationInputs, Correction, StepSize
from halftone.relaxing import WINDOWS
from halftone.settings import Settings
from halftone.workflow.paths import TIMINGS, Rule, applies, outputs

MIB = 2**20
# our measurements on the embedded model and 2 cores; a finished job corrects them
_START_UP = {
    Rule.CALIBRATION_DATA: 9.0,
    Rule.REPARAMETERIZE: 9.0,
    Rule.RECONSTRUCT: 9.0,
    Rule.SENSITIVITY: 9.0,
    Rule.CALIBRATE: 9.0,
    Rule.ANALYZE: 8.0,
    Rule.EXPORT: 8.0,
    Rule.SAMPLE: 9.0,
    Rule.METRICS: 14.0,
    Rule.SUMMARY: 3.0,
    Rule.REPORT: 6.0,
}
_SIMULATED = 1.7  # fake quantization over float, in time
_BACKWARD = 3.0  # forward and backward over forward
_MACS_PER_WEIGHT_AND_PIXEL = 0.15  # SDXL 0.07, SD 1.5 0.1, the embedded model 0.27
_CPU, _GPU = 2.5e10, 2e13  # multiply-accumulates a second
_METRIC_SECONDS_PER_IMAGE = 0.02
_UNKNOWN_PARAMETERS = 900e6  # a hub model that is not here yet: as SD 1.5


@dataclass(frozen=True)
class Job:
    """One job of the workflow and what it is expected to take, in seconds."""

    rule: Rule
    key: str
    seconds: float


def jobs(settings: Settings, *, gpu: bool = False, timings: Path = TIMINGS) -> list[Job]:
    """Every job of the selected tier's rows, in the order of the pipeline."""
    rows = settings.rows()
    found = [
        (Rule.CALIBRATION_DATA, model) for model in dict.fromkeys(settings.scenarios[r].model for r in rows)
    ]
    for rule in Rule:
        if rule.per_scenario:
            for row in rows:
                if applies(settings, rule, row):
                    parts = len(outputs(settings, rule, row)) if rule is Rule.SAMPLE else 1
                    found += [(rule, row)] * parts
    found += [(Rule.SUMMARY, ""), (Rule.REPORT, "")]
    speed = _GPU if gpu else _CPU
    return [
        Job(rule, key, measured(rule, key, timings) or _START_UP[rule] + _work(settings, rule, key, speed))
        for rule, key in found
    ]


def measured(rule: Rule, key: str, timings: Path = TIMINGS) -> float | None:
    """Seconds that the job took last time, by Snakemake's benchmark file; of shards, their mean."""
    home = timings / rule
    files = [home / f"{key}.tsv"] if key else [timings / f"{rule}.tsv"]
    files += sorted((home / key).glob("*.tsv")) if key else []
    seconds = [value for file in files if (value := _seconds(file)) is not None]
    return sum(seconds) / len(seconds) if seconds else None


def _seconds(file: Path) -> float | None:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            lines = list(csv.DictReader(stream, delimiter="\t"))
        return float(lines[-1]["s"])
    except (OSError, IndexError, KeyError, ValueError, TypeError):
        return None


def _work(settings: Settings, rule: Rule, key: str, speed: float) -> float:
    """Seconds of a job beyond its start-up."""
    if rule.per_model:
        name = key
    elif rule.per_scenario:
        name = settings.scenarios[key].model
    else:
        return 0.0
    model = settings.models[name]
    halves = 2 if (model.guidance_scale or 0) > 1 else 1
    macs = denoiser_macs(model.path, model.resolution)
    passes = model.steps * halves * macs
    if rule in (Rule.CALIBRATION_DATA, Rule.REPARAMETERIZE):
        return settings.calibration.n_prompts * passes / speed
    if rule in (Rule.CALIBRATE, Rule.SENSITIVITY):
        observing = settings.calibration.n_prompts * passes * _SIMULATED / speed
        axes = settings.scenarios[key].resolved_axes()
        if axes.calibration_inputs is CalibrationInputs.PROGRESSIVE:
            observing *= 3  # one pass over the reference trajectory, then two calls where that has one
        if rule is Rule.CALIBRATE and axes.correction is not Correction.NONE:
            observing += 2 * settings.calibration.n_prompts * passes * _SIMULATED / speed
        if rule is Rule.SENSITIVITY:  # a window costs half a run, restored and disturbed
            observing += settings.calibration.n_prompts * passes * (3 + WINDOWS) * _SIMULATED / speed
        if axes.step_size is not StepSize.LEARNED:
            return observing
        iterations = STEP_SIZES[settings.reconstruction.budget].iterations
        return observing + _learning(settings, macs, iterations) * _SIMULATED / speed
    if rule is Rule.RECONSTRUCT:
        axes = settings.scenarios[key].resolved_axes()
        rounds = 1 + (axes.rounds - 1) * axes.later_iterations
        learning = _learning(settings, macs, SCHEDULES[settings.reconstruction.budget].iterations * rounds)
        sampling = 2 * (axes.rounds - 1) * settings.calibration.n_prompts * passes * _SIMULATED
        return (learning + sampling) / speed
    row = settings.scenarios[key]
    n_images = settings.tiers[row.tier].n_images
    if rule is Rule.SAMPLE:
        share = n_images / settings.shards(key)
        return 2 * share * passes * (_SIMULATED if row.quantized else 1.0) / speed
    if rule is Rule.METRICS:
        return 2 * n_images * _METRIC_SECONDS_PER_IMAGE
    return 0.0


def _learning(settings: Settings, macs: float, iterations: float) -> float:
    """Multiply-accumulates of learning something unit by unit, capture of the units' data included."""
    schedule = SCHEDULES[settings.reconstruction.budget]
    batch = min(settings.reconstruction.batch_size, schedule.batch_limit)
    return macs * (iterations * batch * _BACKWARD + schedule.samples * 2 * 20)


def denoiser_macs(path: str, resolution: int) -> float:
    """Multiply-accumulates of one call on one latent, roughly."""
    folder = Path(path)
    weights = [file for name in ("unet", "transformer") for file in (folder / name).glob("*.safetensors")]
    if weights:
        parameters = sum(_parameters(file) for file in weights)
    elif folder.is_file():
        parameters = folder.stat().st_size / 2
    else:
        parameters = _UNKNOWN_PARAMETERS
    return _MACS_PER_WEIGHT_AND_PIXEL * parameters * (resolution / latent_factor(folder)) ** 2


def _parameters(file: Path) -> float:
    """Values in a safetensors file; where its header makes no sense, as if they were float32."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, size)))
        half = any(tensor.get("dtype") in ("F16", "BF16") for tensor in header.values())
    except (OSError, ValueError, AttributeError):
        half = False
    return size / (2 if half else 4)


def latent_factor(folder: Path) -> int:
    """How many image pixels a latent pixel stands for, along one side; 1 in pixel space, 8 where it is not
    known.
    """
    try:
        config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        return int(2 ** (len(config["block_out_channels"]) - 1))
    except FileNotFoundError:
        return 1 if (folder / "unet").is_dir() else 8
    except (ValueError, KeyError, OSError):
        return 8


def disk_mib(settings: Settings) -> float:
    """Disk that the selected rows will take, roughly: images, artefacts, calibration states, trajectories."""
    total = 0.0
    for row in settings.rows():
        scenario = settings.scenarios[row]
        model = settings.models[scenario.model]
        image = 3 * model.resolution**2 / 2  # bytes of a PNG, about half the pixels' own
        total += 2 * settings.tiers[scenario.tier].n_images * image
        if scenario.quantized:
            folder = Path(model.path)
            weights = sum(f.stat().st_size for f in folder.rglob("*.safetensors")) if folder.is_dir() else 4e9
            total += 3 * weights  # state, reconstructed weights, artefact with its other components
    for name in {settings.scenarios[row].model for row in settings.rows()}:
        model = settings.models[name]
        latents = 4 * (model.resolution / latent_factor(Path(model.path))) ** 2
        total += settings.calibration.n_prompts * (model.steps + 1) * latents * 4
    return total / MIB


class Remaining:
    """The time left of a run, from what its jobs are expected to take and what finished ones took.

    Jobs of one rule are taken to err alike, and rules without a finished job like the others.
    """

    def __init__(self, expected: Iterable[Job], planned: Mapping[str, int], cores: int) -> None:
        self._by_rule: dict[str, list[Job]] = {}
        for job in expected:
            self._by_rule.setdefault(job.rule, []).append(job)
        self._waiting: dict[str, list[float]] = {}
        for rule, count in planned.items():
            known = self._by_rule.get(rule, [])
            typical = sum(job.seconds for job in known) / len(known) if known else 0.0
            self._waiting[rule] = [typical] * (count if known else 0)
        self._running: dict[int, tuple[str, float, float]] = {}  # job -> rule, expected seconds, start
        self._finished: dict[str, tuple[float, float]] = {}  # rule -> expected, taken
        self.cores = max(1, cores)
        self.total = sum(len(waiting) for waiting in self._waiting.values())
        self.done = 0

    def start(self, job: int, rule: str, key: str, now: float) -> None:
        waiting = self._waiting.get(rule)
        if not waiting:
            return
        waiting.pop()
        known = [j.seconds for j in self._by_rule.get(rule, []) if j.key == key]
        self._running[job] = (rule, known[0] if known else 0.0, now)

    def finish(self, job: int, now: float) -> None:
        if job not in self._running:
            return
        rule, expected, started = self._running.pop(job)
        before = self._finished.get(rule, (0.0, 0.0))
        self._finished[rule] = (before[0] + expected, before[1] + now - started)
        self.done += 1

    def drop(self, job: int) -> None:
        """A job failed; what depends on it will not run, and is not known here."""
        self._running.pop(job, None)

    def seconds(self, now: float) -> float:
        """At least the work left shared by the cores, and at least the chain of the longest job of every rule
        left.
        """
        work = 0.0
        chain: dict[str, float] = {}
        for rule, waiting in self._waiting.items():
            for expected in waiting:
                seconds = expected * self._correction(rule)
                work += seconds
                chain[rule] = max(chain.get(rule, 0.0), seconds)
        for rule, expected, started in self._running.values():
            seconds = max(expected * self._correction(rule) - (now - started), 1.0)
            work += seconds
            chain[rule] = max(chain.get(rule, 0.0), seconds)
        return max(work / self.cores, sum(chain.values()))

    def _correction(self, rule: str) -> float:
        expected, taken = self._finished.get(rule, (0.0, 0.0))
        if not expected:
            expected = sum(pair[0] for pair in self._finished.values())
            taken = sum(pair[1] for pair in self._finished.values())
        return taken / expected if expected else 1.0
