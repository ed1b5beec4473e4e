"""The choices on each axis of a recipe, by the names that the settings use. See `halftone.axes`."""

from __future__ import annotations

from enum import StrEnum


class Range(StrEnum):
    """How a range (lo, hi) is estimated from the values seen."""

    MINMAX = "minmax"
    MOVING_AVERAGE = "moving_average"
    PERCENTILE = "percentile"
    LP = "lp"


class TimeAxis(StrEnum):
    """Activation parameters shared over all calls, kept per call, or taken from each tensor as it comes."""

    SHARED = "shared"
    PER_CALL = "per_call"
    DYNAMIC = "dynamic"


class Rounding(StrEnum):
    """How weights are rounded: to nearest, or learned by block reconstruction (AdaRound/BRECQ)."""

    NEAREST = "nearest"
    ADAROUND = "adaround"


class CalibrationCalls(StrEnum):
    """Calls of the trajectory that calibration data are taken from.

    `uniform`: every second one (Q-Diffusion: evenly spaced timesteps, as many samples of each). `normal`:
    timesteps drawn from a clamped normal distribution (PTQ4DM, NDTC).
    """

    ALL = "all"
    UNIFORM = "uniform"
    NORMAL = "normal"


class CalibrationInputs(StrEnum):
    """What a call's parameters are fitted to: the reference trajectory, or what the quantized calls before it
    hand on (PCR)."""

    REFERENCE = "reference"
    PROGRESSIVE = "progressive"


class Shortcut(StrEnum):
    """Input and weight of a shortcut convolution that reads cat([hidden, skip]): one range, or one for
    each half (Q-Diffusion)."""

    WHOLE = "whole"
    SPLIT = "split"


class GroupAxis(StrEnum):
    """Axis of an activation whose indices are grouped: the one whose extremes differ more, or a fixed one."""

    AUTO = "auto"
    CHANNEL = "channel"
    POSITION = "position"


class GroupLayout(StrEnum):
    """Any partition, one for each call (DGQ), or one that integer kernels can run.

    `aligned` (ours): contiguous after a permutation of the axis that all calls share, cut at multiples of 64
    indices (of 16 where the axis has fewer than 512).
    """

    FREE = "free"
    ALIGNED = "aligned"


class StepSize(StrEnum):
    """Scales of activations as fitted to their ranges, or learned block by block afterwards (BRECQ)."""

    FITTED = "fitted"
    LEARNED = "learned"


class TemporalBlock(StrEnum):
    """Layers that depend on the timestep alone: learned with the blocks they feed, or apart (TFMQ-DM)."""

    JOINT = "joint"
    APART = "apart"


class UnitInput(StrEnum):
    """Inputs a unit is reconstructed on: those of the quantized prefix, or of the full-precision model."""

    QUANTIZED_PREFIX = "quantized_prefix"
    FULL_PRECISION = "full_precision"


class Probabilities(StrEnum):
    """Codes of attention probabilities: evenly spaced from zero, or octaves below a scale (DGQ), or one of
    the two, chosen for every layer and call (TCAQ-DM, DAQ)."""

    UNIFORM = "uniform"
    LOG2 = "log2"
    ADAPTIVE = "adaptive"


class Alternative(StrEnum):
    """What a power law is weighed against. The paper does not say; the choice decides much, and against a
    lognormal a power law hardly ever wins."""

    EXPONENTIAL = "exponential"
    HALF_NORMAL = "half_normal"
    LOGNORMAL = "lognormal"


class Selector(StrEnum):
    """How codes are chosen: log2 where a power law fits the probabilities better (DAQ), or where it disturbs
    their product with the values less (our choice: both are tried)."""

    LIKELIHOOD_RATIO = "likelihood_ratio"
    OUTPUT_ERROR = "output_error"


class StartToken(StrEnum):
    """The start token of cross-attention: quantized with the others; or its probability and its key stay in
    float, and the scales of both are those of the other tokens (DGQ). Its value is quantized either way."""

    JOINT = "joint"
    APART = "apart"


class ProbabilitiesScale(StrEnum):
    """Scale of attention probabilities: fitted like other activations', or the largest value of the
    probabilities at hand (DGQ)."""

    STATIC = "static"
    DYNAMIC = "dynamic"


class Scope(StrEnum):
    """What shares a dynamic scale.

    DGQ's code takes one maximum of the whole tensor, so that an image depends on the others in its batch; of
    a sample (the halves of guidance are two), or a head of one, it depends on nothing else (our choice).
    """

    TENSOR = "tensor"
    SAMPLE = "sample"
    HEAD = "head"


class Reparameterization(StrEnum):
    """Range moved from the channels of activations to the input channels of weights, the layer's output kept.

    `tcr`: every channel shrinks towards the quietest, one factor for all calls (TCAQ-DM, TCR). `smooth`: the
    range is shared out between activation and weight (SmoothQuant).
    """

    NONE = "none"
    TCR = "tcr"
    SMOOTH = "smooth"


class ReparameterizedLayers(StrEnum):
    """Layers whose input is reparameterized: convolutions (TCAQ-DM), those but the first and the last layer
    (our choice, the paper is silent), or Linear ones too."""

    CONVOLUTIONS = "convolutions"
    INNER_CONVOLUTIONS = "inner_convolutions"
    ALL = "all"


class Correction(StrEnum):
    """What is taken off the denoiser's output at every call.

    `mean`: by how much its channels are off on average over positions and images, as the quantized model
    samples (PTQD's correction of the mean; its factor and its variance are left out). `drift`: with it, what
    leads the mean of the latents back to full precision's, for a sampler that clips makes drift of noise too
    (our choice).
    """

    NONE = "none"
    MEAN = "mean"
    DRIFT = "drift"
