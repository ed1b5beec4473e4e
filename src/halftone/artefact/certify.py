"""The parity certificate of an artefact that is being written: what was stored, run in both executions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from halftone.artefact import tensors
from halftone.artefact.load import Description, context_of, empty_denoiser
from halftone.errors import UserError
from halftone.runtime import integer, simulated
from halftone.runtime.parity import Built, Parity, failures, measure
from halftone.trajectory import Trajectory


def certify(
    written: Description, stored: tensors.Contents, full: nn.Module, trajectory: Trajectory
) -> Parity:
    """Parity of the artefact, on the CPU, against `full`, the denoiser it was made from, where that lies.

    What lies outside its bound is printed, and counted in the certificate. Raises UserError for the
    trajectory of another schedule.
    """
    if not torch.equal(trajectory.timesteps.double(), stored.timesteps.double()):
        raise UserError("the trajectory has other timesteps than the calibration; run calibrate again")

    def built(build: Any) -> Built:
        denoiser, context = empty_denoiser(written), context_of(stored, written.plan)
        parts = {
            "weights": stored.weights,
            "activations": stored.activations,
            "floats": stored.floats,
            "divisors": stored.divisors,
            "choices": stored.choices,
        }
        build(denoiser, written.plan, **parts, context=context)
        return Built(denoiser, context)

    found = measure(
        full, built(simulated.build), built(integer.build), built(integer.build_exact), trajectory
    )
    for line in failures(found):
        print(f"parity: {line}")
    return found
