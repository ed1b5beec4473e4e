"""The columns of results/summary.csv, in order, and what each says: the one list of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Better(StrEnum):
    """Which direction of a figure is the good one."""

    HIGHER = "higher"
    LOWER = "lower"


@dataclass(frozen=True)
class Column:
    """A column, with `_lo` and `_hi` beside it where it has an interval."""

    name: str
    says: str
    better: Better | None = None
    interval: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, f"{self.name}_lo", f"{self.name}_hi") if self.interval else (self.name,)


def _figure(name: str, better: Better, says: str, interval: bool = True) -> Column:
    return Column(name, says, better, interval)


_UP, _DOWN = Better.HIGHER, Better.LOWER

COLUMNS = (
    Column("model", "id of the model"),
    Column("scenario", "id of the row: model, recipe, bits and tier"),
    Column("recipe", "how it was quantized; fp is full precision, fp-floor the same model on other noise"),
    Column("protocol", "equal: the same sites for every recipe; paper: those its authors quantize"),
    Column("tier", "which prompts or noise, how many images; rows of different tiers are never compared"),
    Column("execution", "float, simulated (fake quantization in float) or integer (integer kernels)"),
    Column("weight_bits", "width of the quantized weights"),
    Column("act_bits", "width of the quantized activations"),
    Column("softmax_bits", "width of the attention probabilities"),
    Column("boundary_bits", "width of the first and the last layer, where it is one of their own"),
    Column("avg_act_bits", "mean width of the quantized activation sites, each counted once per call"),
    Column("float_sites", "sites left in float"),
    Column("n_images", "images of the row, per seed set"),
    _figure("fid_to_fp", _DOWN, "Fréchet distance to full precision on the same prompts and noise"),
    _figure("fid_to_fp_unpaired", _DOWN, "the same on other noise; fp-floor is full precision on that noise"),
    _figure("kid_to_fp", _DOWN, "kernel distance to full precision, unbiased at few images"),
    _figure("fid_to_real", _DOWN, "Fréchet distance to real images"),
    _figure("inception_score", _UP, "Inception score; with Inception features only"),
    _figure("clip_score", _UP, "100 x cosine of image and prompt in a CLIP that is not the conditioner"),
    _figure("alignment_objects", _UP, "share of images in which every object has its shape and colour"),
    _figure("alignment", _UP, "the same, and every size and relation as the prompt says"),
    Column("abstain_rate", "share of images that the checker could not read; counted as wrong", _DOWN),
    _figure("lpips", _DOWN, "perceptual distance to the full-precision image of the same prompt and noise"),
    _figure("psnr", _UP, "peak signal-to-noise ratio to the full-precision image, in dB"),
    _figure("ssim", _UP, "structural similarity to the full-precision image"),
    _figure("alignment_flips", _DOWN, "share of images whose alignment is another than full precision's"),
    _figure("latent_error", _DOWN, "distance of the final latents to full precision's, over their norm"),
    Column("size_mib", "the denoiser as stored in the artefact, in MiB", _DOWN),
    Column("weight_mib", "the denoiser counted: packed bits, scales, what stays in float; in MiB", _DOWN),
    Column("bops", "bit operations of one call on one latent: 2 x multiply-accumulates x bits x bits", _DOWN),
    Column("denoiser_calls", "calls of the denoiser in one sampling run"),
    Column("quantize_seconds", "wall time from the reference trajectory to the artefact", _DOWN),
    Column("sample_seconds", "wall time of sampling all images of both seed sets", _DOWN),
    Column("peak_mib", "largest resident memory of any step of the row, in MiB", _DOWN),
    Column("seed", "seed of everything that is not image noise"),
    Column("prompts_sha256", "hash of the prompts, or of what stands for them in a model without text"),
    Column("features", "feature network of the distribution distances"),
    Column("artefact_sha256", "hash of the artefact that the images were sampled from"),
)

NAMES: tuple[str, ...] = tuple(name for column in COLUMNS for name in column.names)

# distances between distributions of features: only rows of equal images, prompts and features compare
DISTRIBUTION = ("fid_to_fp", "fid_to_fp_unpaired", "kid_to_fp", "fid_to_real", "inception_score")


def blank(value: Any) -> bool:
    """Whether a cell holds nothing."""
    return value is None or value == ""
