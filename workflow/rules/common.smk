import os
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

# Jobs and this file use the code of *this* checkout, also in a `dvc exp run --temp` copy, where an editable install
# would still point at the main one. (current_basedir, not basedir: the latter is the importer's under `module:`.)
ROOT = Path(str(workflow.current_basedir)).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from halftone import tracking
from halftone.errors import UserError
from halftone.settings import PromptSet, validate
from halftone.workflow import models, prune, records, sources
from halftone.workflow.config import read as read_config
from halftone.workflow.options import options
from halftone.workflow.paths import (
    ANALYSIS,
    ARTEFACT,
    CALIBRATE,
    CALIBRATION_DATA,
    FEATURES,
    GRID,
    IMBALANCE,
    IMBALANCE_PLOT,
    MANIFEST,
    METRICS,
    PLAN,
    RANGES,
    RECONSTRUCT,
    REPARAMETERIZE,
    REPARAMETERIZE_FOLDER,
    REPORT,
    SCRATCH,
    SENSITIVITY,
    SENSITIVITY_FOLDER,
    SENSITIVITY_PLOT,
    UNITS,
    SHARD,
    STATISTICS,
    SUMMARY,
    TIMINGS,
    outputs,
    reconstructed,
    relaxed_by_measure,
    reparameterized,
)
from halftone.workflow.paths import Rule as Step

CONFIG_FILES = [
    "params.yaml",
    *(os.path.relpath(f) for f in workflow.config_settings.configfiles),
]
try:
    for file in CONFIG_FILES:  # Snakemake passes over a key said twice
        read_config(file)
    SETTINGS = validate(config, " + ".join(CONFIG_FILES))
except UserError as fault:
    raise WorkflowError(str(fault)) from None

ROWS = SETTINGS.rows()
QUANTIZED = [row for row in ROWS if SETTINGS.scenarios[row].quantized]
HALFTONE = f"{shlex.quote(sys.executable)} -m halftone"
# one constant, not {threads}: Snakemake scales threads down to --cores, and sums depend on their number
THREADS = 1
# On a machine with a GPU one such job runs at a time (profile: resources gpu=1); without one, as many as cores.
GPU = int(Path("/dev/nvidia0").exists())

os.environ.setdefault(tracking.URI, tracking.default_uri())
shell.prefix(
    f"export PYTHONPATH={shlex.quote(str(ROOT / 'src'))} OMP_NUM_THREADS={THREADS}"
    " DO_NOT_TRACK=1 MLFLOW_DISABLE_TELEMETRY=true HF_HUB_DISABLE_TELEMETRY=1; "
)


wildcard_constraints:
    model="|".join(SETTINGS.models),
    scenario="|".join(SETTINGS.scenarios),
    shard=r"\d+-of-\d+",
    source="|".join(SETTINGS.prompt_sources) or "none",


def step(rule):
    """What makes a rule run again: its options, and the code behind it."""
    code = sources.code_hash(ROOT, Step(rule))

    def settings(wildcards):
        key = wildcards.get("scenario") or wildcards.get("model") or ""
        return options(SETTINGS, Step(rule), key)

    return {"options": settings, "code": code}


def model_of(wildcards):
    name = wildcards.get("model") or SETTINGS.scenarios[wildcards.scenario].model
    return SETTINGS.models[name]


def model_files(wildcards):
    try:
        return models.files(model_of(wildcards))
    except UserError as fault:
        raise WorkflowError(str(fault)) from None


def data_of(wildcards):
    return CALIBRATION_DATA.format(model=SETTINGS.scenarios[wildcards.scenario].model)


def weights_of(wildcards):
    """Reconstructed weights, for the recipes that learn their rounding."""
    return (
        RECONSTRUCT.format(**wildcards)
        if reconstructed(SETTINGS, wildcards.scenario)
        else []
    )


def factors_of(wildcards):
    """Factors of the channels, for the rows that reparameterize."""
    chosen = reparameterized(SETTINGS, wildcards.scenario)
    return [REPARAMETERIZE.format(**wildcards)] if chosen else []


def sensitivity_of(wildcards):
    """The measured choice of calls to relax, for the rows that wait for it."""
    chosen = relaxed_by_measure(SETTINGS, wildcards.scenario)
    return [SENSITIVITY.format(**wildcards)] if chosen else []


def source_of(wildcards):
    """What images are sampled from: the artefact, known by its manifest of hashes; the model itself for full precision."""
    if SETTINGS.scenarios[wildcards.scenario].quantized:
        return MANIFEST.format(**wildcards)
    return model_files(wildcards)


def artefact_of(wildcards):
    return (
        MANIFEST.format(**wildcards)
        if SETTINGS.scenarios[wildcards.scenario].quantized
        else []
    )


def prompts_of(scenario):
    """The prompt file of a row; none for a model without text."""
    row = SETTINGS.scenarios[scenario]
    return prompt_files(row.model, SETTINGS.tiers[row.tier].prompts)


def prompt_files(model, prompts):
    path = SETTINGS.prompt_file(model, prompts)
    return [] if path is None else [path]


def real_images_of(wildcards):
    try:
        return models.real_files(model_of(wildcards))
    except UserError as fault:
        raise WorkflowError(str(fault)) from None


def images_of(wildcards):
    return outputs(SETTINGS, Step.SAMPLE, wildcards.scenario)


def reference_of(wildcards):
    """Full-precision images of the same model, prompts and noise."""
    return outputs(SETTINGS, Step.SAMPLE, SETTINGS.reference(wildcards.scenario))


def each(flag, files):
    """An option that is repeated for every file."""
    return " ".join(f"{flag} {shlex.quote(str(file))}" for file in files)


def before_first_job():
    tracking.prepare()
    gone = prune.removed(CONFIG_FILES, SETTINGS)
    for path in prune.prune(gone):
        print(f"removed {path}: its scenario or model is no longer configured")


# Snakemake trusts results that it has no record of, so a setting changed after `dvc pull` would go unnoticed. DVC's own
# stages are exempt (DVC has decided by content and has removed what it wants rebuilt), and so is `halftone trust`.
trusting = {"--touch", "--forceall"} <= set(sys.argv)
if workflow.is_main_process and "DVC_STAGE" not in os.environ and not trusting:
    try:
        records.check(SETTINGS)
    except UserError as fault:
        raise WorkflowError(str(fault)) from None
