"""The one definition of the configuration (params.yaml and the overlays in experiments/).

Snakemake validates its `config` here and gets every rule's settings from here, DVC reads the same
params.yaml, and `halftone schema` prints the JSON Schema. Torch-free, so that the workflow parses fast.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    model_validator,
)

from halftone.axes import Axes
from halftone.errors import UserError
from halftone.quantizers.bits import Bits
from halftone.recipes import FULL_PRECISION, resolve

GUIDANCE, CLASS_GUIDANCE = 7.5, 4.0
RENDERS = "scenes"  # real images that are rendered as they are needed


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Protocol(StrEnum):
    """Which sites a scenario quantizes: the same for every recipe, or those of the recipe's authors."""

    EQUAL = "equal"
    PAPER = "paper"


class RowExecution(StrEnum):
    """What runs a quantized row: fake quantization in float, or integer kernels on the CPU."""

    SIMULATED = "simulated"
    INTEGER = "integer"


class Components(StrEnum):
    """What becomes of the models beside the denoiser (text encoders, autoencoder) in an artefact: copied,
    referenced by hub id and commit, or stored with weights of 8 bits, which compute in float.
    """

    COPY = "copy"
    REFERENCE = "reference"
    INT8 = "int8"


class PromptSet(StrEnum):
    CALIBRATION = "calibration"
    VALIDATION = "validation"
    TEST = "test"
    UNSEEN = "unseen"


class PromptFormat(StrEnum):
    """How a fetched file holds prompts: one a line, as COCO's captions in JSON, or in a column of a table."""

    LINES = "lines"
    COCO = "coco"
    PARQUET = "parquet"


class Budget(StrEnum):
    """How much block reconstruction may cost, as a share of the published schedule."""

    SMOKE = "smoke"
    FAST = "fast"
    STANDARD = "standard"
    PUBLISHED = "published"


class Model(_Section):
    path: str = Field(description="diffusers folder, hub id, or single .safetensors file")
    revision: str | None = Field(None, description="hub revision; needed for a hub id")
    steps: StrictInt = Field(25, ge=1, le=1000, description="inference steps of the sampler")
    guidance: float = Field(
        GUIDANCE,
        ge=0,
        le=50,
        description=f"classifier-free guidance scale; {CLASS_GUIDANCE:g} by default if class_conditional",
    )
    resolution: StrictInt = Field(
        64, ge=8, le=4096, multiple_of=8, description="image height and width, in pixels"
    )
    unconditional: bool = Field(
        False, description="draws without a prompt: its images are numbered, and guidance does not apply"
    )
    class_conditional: bool = Field(
        False,
        description="draws what a class label says: its images are numbered, and have classes at random",
    )
    real_images: str | None = Field(
        None,
        description="what fid_to_real compares with: a folder or zip of images, or `scenes`: renders at "
        "32x32, for a model without text (captions of scenes have their renders anyway)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        if self.unconditional and self.class_conditional:
            raise ValueError("unconditional and class_conditional exclude each other; remove one")
        if self.unconditional and "guidance" in self.model_fields_set:
            raise ValueError("guidance does not apply to an unconditional model; remove it")
        if self.real_images == RENDERS and not self.unprompted:
            raise ValueError("captions of scenes have their renders anyway; remove real_images")
        return self

    @property
    def guidance_scale(self) -> float | None:
        """None for an unconditional model."""
        if self.class_conditional and "guidance" not in self.model_fields_set:
            return CLASS_GUIDANCE
        return None if self.unconditional else self.guidance

    @property
    def unprompted(self) -> bool:
        """Whether it draws without a prompt."""
        return self.unconditional or self.class_conditional


class Tier(_Section):
    prompts: PromptSet = Field(
        description="prompt set that images are sampled for; of a model without text, the set of noise"
    )
    n_images: StrictInt = Field(ge=1, le=100_000, description="images per row and seed set")
    paired: bool = Field(
        False, description="seed set A only, and the latents of every call: paired figures, no distances"
    )


class PromptSource(_Section):
    url: str = Field(description="https://, file:// or hub:OWNER/DATASET@COMMIT/FILE")
    sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="of the file fetched; without it nothing is drawn"
    )
    format: PromptFormat = PromptFormat.LINES
    member: str | None = Field(None, description="the file in a zip that holds the prompts")
    column: str | None = Field(None, description="of a parquet file; default Prompt")
    count: StrictInt = Field(5000, ge=1, le=1_000_000, description="prompts drawn from the file")
    seed: StrictInt = Field(0, ge=0, description="of the draw")


class Calibration(_Section):
    n_prompts: StrictInt = Field(
        16, ge=1, le=10_000, description="calibration prompts used, from the top of the file; or images"
    )
    batch_size: StrictInt = Field(16, ge=1, le=4096, description="prompts per denoiser call")


class Reconstruction(_Section):
    budget: Budget = Field(Budget.FAST, description="iterations as a share of the published schedule")
    batch_size: StrictInt = Field(32, ge=1, le=4096, description="samples per iteration")
    cache_mib: StrictInt = Field(
        2048, ge=16, description="memory for a unit's cached inputs and outputs; more spills to disk"
    )

    def facts(self) -> dict[str, Any]:
        """What a result depends on, as plain values: not where its data lie meanwhile."""
        return self.model_dump(mode="json", exclude={"cache_mib"})


class Sampling(_Section):
    shard_size: StrictInt = Field(256, ge=1, description="images per job; larger rows are sampled in shards")
    seed_a: StrictInt = Field(1, ge=0, description="seed set A: the reference noise")
    seed_b: StrictInt = Field(
        2, ge=0, description="seed set B: disjoint noise, for unpaired figures and the floor"
    )


class Metrics(_Section):
    features: str = Field(
        "scenes", pattern=r"^(scenes|inception)$", description="feature network of FID and KID"
    )
    clip: str = Field("scenes", description="`scenes`, or an open_clip model as ARCHITECTURE/WEIGHTS")
    bootstrap: StrictInt = Field(1000, ge=100, le=100_000, description="resamples of paired intervals")
    image_reward_python: str | None = Field(
        None, description="interpreter of an environment with image-reward, for `snakemake image_reward`"
    )


def _bits(text: str | None) -> str | None:
    return None if text is None else str(Bits.parse(text))


class Scenario(_Section):
    model: str
    recipe: str
    bits: Annotated[str | None, AfterValidator(_bits)] = Field(None, description="w4a8, w4a4s8 or w4a4b8")
    protocol: Protocol = Protocol.EQUAL
    tier: str
    axes: dict[str, Any] = Field(default_factory=dict, description="axes of the recipe to override")
    execution: RowExecution = Field(
        RowExecution.SIMULATED, description="what samples its images: simulated, or integer, on the CPU"
    )
    components: Components = Field(
        Components.COPY, description="text encoder and VAE in the artefact: copy, reference (hub id), or int8"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        if self.recipe == FULL_PRECISION:
            if self.bits or self.axes:
                raise ValueError("the full-precision row takes no bits and no axes")
            if "execution" in self.model_fields_set:
                raise ValueError("the full-precision row takes no execution; it is float")
            if "components" in self.model_fields_set:
                raise ValueError("the full-precision row takes no components; it has no artefact")
        else:
            resolve(self.recipe, self.axes)
            if self.bits is None:
                raise ValueError("bits are missing: write for example bits: w4a8")
        return self

    @property
    def quantized(self) -> bool:
        return self.recipe != FULL_PRECISION

    def resolved_axes(self) -> Axes:
        return resolve(self.recipe, self.axes)


class Settings(_Section):
    seed: StrictInt = Field(0, ge=0, description="seed of everything that is not image noise")
    tier: str = Field(description="which rows the default target builds")
    models: dict[str, Model] = Field(min_length=1)
    prompts: dict[PromptSet, str] = Field(
        default_factory=dict, description="prompt files; none for models without text"
    )
    prompt_sources: dict[str, PromptSource] = Field(
        default_factory=dict,
        description="prompts of others, by the name of the file data/prompts/fetched/NAME.txt they make",
    )
    tiers: dict[str, Tier]
    calibration: Calibration = Calibration()
    reconstruction: Reconstruction = Reconstruction()
    sampling: Sampling = Sampling()
    metrics: Metrics = Metrics()
    scenarios: dict[str, Scenario] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        for name in [*self.models, *self.tiers, *self.scenarios, *self.prompt_sources]:
            if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
                raise ValueError(f"id {name!r}: use lower-case letters, digits, '-' and '_' only")
        if self.tier not in self.tiers:
            raise ValueError(f"tier {self.tier!r} is not among tiers: {', '.join(self.tiers)}")
        for name, scenario in self.scenarios.items():
            if scenario.model not in self.models:
                raise ValueError(f"scenarios.{name}.model {scenario.model!r} is not among models")
            if scenario.tier not in self.tiers:
                raise ValueError(f"scenarios.{name}.tier {scenario.tier!r} is not among tiers")
        if not self.rows():
            filled = ", ".join(dict.fromkeys(s.tier for s in self.scenarios.values()))
            raise ValueError(f"tier {self.tier!r} has no scenario; tiers with scenarios: {filled}")
        self._check_prompts()
        for model, tier_name in {(s.model, s.tier) for s in self.scenarios.values()}:
            rows = [s for s in self.scenarios.values() if (s.model, s.tier) == (model, tier_name)]
            if sum(not s.quantized for s in rows) != 1:
                raise ValueError(
                    f"tier {tier_name!r} needs exactly one scenario with recipe fp for model {model!r}"
                )
        return self

    def _check_prompts(self) -> None:
        """Every prompt set that a model with text is to draw must have its file."""
        if PromptSet.CALIBRATION not in self.prompts and not all(m.unprompted for m in self.models.values()):
            raise ValueError("prompts.calibration is missing: name the file of calibration prompts")
        unprompted = {s.tier for s in self.scenarios.values() if self.models[s.model].unprompted}
        prompted = {s.tier for s in self.scenarios.values() if not self.models[s.model].unprompted}
        for name, tier in self.tiers.items():
            if tier.prompts not in self.prompts and name not in unprompted - prompted:
                raise ValueError(f"tiers.{name}.prompts: prompts.{tier.prompts} names no file")

    def prompt_file(self, model: str, prompts: PromptSet) -> str | None:
        """The file of a prompt set; None for a model without text."""
        return None if self.models[model].unprompted else self.prompts[prompts]

    def rows(self, tier: str | None = None) -> list[str]:
        """Scenario ids of a tier (the selected one by default), in the order of the file."""
        return [name for name, s in self.scenarios.items() if s.tier == (tier or self.tier)]

    def reference(self, scenario: str) -> str:
        """Id of the full-precision scenario that `scenario` is measured against."""
        mine = self.scenarios[scenario]
        return next(
            name
            for name, s in self.scenarios.items()
            if not s.quantized and (s.model, s.tier) == (mine.model, mine.tier)
        )

    def shards(self, scenario: str) -> int:
        n_images = self.tiers[self.scenarios[scenario].tier].n_images
        return -(-n_images // self.sampling.shard_size)


def validate(config: Mapping[str, Any], source: str = "params.yaml") -> Settings:
    """Settings from a plain mapping. Raises UserError: one line naming the file, the key and the remedy."""
    try:
        return Settings.model_validate(dict(config))
    except ValidationError as fault:
        raise UserError("; ".join(_explain(source, error) for error in fault.errors()[:3])) from None


def _explain(source: str, error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"] if part != "[key]")
    where = f"{source}: {key}" if key else source
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key; remove it or check its spelling"
    if error["type"] == "missing":
        return f"{where}: missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) or given is None else ""
    return f"{where}: {message}{shown}"
