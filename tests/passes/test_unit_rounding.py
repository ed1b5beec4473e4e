"""Learned rounding of one unit, on problems small enough to know the answer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halftone.errors import UserError
from halftone.passes.schedule import SCHEDULES, Schedule
from halftone.passes.unit_data import UnitData
from halftone.passes.unit_rounding import Begun, Learned, learn
from halftone.passes.unit_trace import Signature
from halftone.quantizers.adaround import SoftRounding
from halftone.quantizers.affine import AffineParams
from halftone.settings import Budget

WHOLE_STEPS = AffineParams(torch.tensor(1.0), torch.tensor(8.0), 4)
PUBLISHED = SCHEDULES[Budget.PUBLISHED]
QUICK = dataclasses.replace(PUBLISHED, iterations=400, learning_rate=5e-3)


def data_of(module: nn.Module, *inputs: Tensor, chunk: int = 4) -> UnitData:
    """What `module` should return for `inputs`, cached in chunks."""
    rows = len(inputs[0])
    with torch.no_grad():
        tensors = [*inputs, module(*inputs)]
    chunks = [[tensor[start : start + chunk] for tensor in tensors] for start in range(0, rows, chunk)]
    signature = Signature("unit", (tuple(t[:1] for t in inputs), {}), (True,) * len(inputs), 0, 0)
    return UnitData(signature, rows, chunk, chunks, False, torch.device("cpu"), torch.float32)


def linear(*rows: list[float]) -> nn.Linear:
    module = nn.Linear(len(rows[0]), len(rows), bias=False)
    module.weight = nn.Parameter(torch.tensor(rows), requires_grad=False)
    return module


def learn_linear(module: nn.Linear, inputs: Tensor, schedule: Schedule = QUICK, seed: int = 0) -> Learned:
    return learn(module, {"weight": WHOLE_STEPS}, data_of(module, inputs), schedule, 32, seed)


def test_published_schedule_finds_the_best_rounding() -> None:
    schedule = dataclasses.replace(PUBLISHED, iterations=2000)
    learned = learn_linear(linear([0.5, 0.4]), torch.ones(1, 2), schedule)
    assert (learned.codes["weight"] - 8).tolist() == [[1, 0]]
    assert learned.mse_before == pytest.approx(0.81, abs=1e-6)
    assert learned.mse_after == pytest.approx(0.01, abs=1e-6)
    assert not learned.keeps_first


def test_ties_are_broken_and_the_same_way_for_a_seed() -> None:
    module, inputs = linear([0.5, 0.5]), torch.ones(1, 2)
    found = [learn_linear(module, inputs, seed=seed).codes["weight"] - 8 for seed in (3, 3)]
    assert torch.equal(*found)
    assert sorted(found[0][0].tolist()) == [0, 1]


def test_result_depends_on_the_seed_alone() -> None:
    random = torch.Generator().manual_seed(0)
    module = linear(*torch.randn(3, 6, generator=random).tolist())
    inputs = torch.randn(12, 6, generator=random)
    torch.manual_seed(1)
    one = learn_linear(module, inputs)
    torch.manual_seed(2)
    other = learn_linear(module, inputs)
    assert torch.equal(one.codes["weight"], other.codes["weight"])
    assert (one.mse_after, one.polarisation) == (other.mse_after, other.polarisation)


def test_never_worse_than_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SoftRounding, "hard_codes", lambda self: torch.full((1, 2), 15, dtype=torch.int32))
    learned = learn_linear(linear([0.9, 0.2]), torch.eye(2))
    assert learned.keeps_first
    assert learned.mse_after > learned.mse_before
    assert (learned.codes["weight"] - 8).tolist() == [[1, 0]]


def test_choices_that_were_made_move_again_only_if_they_are_softened() -> None:
    module, inputs = linear([0.7, 0.2]), torch.eye(2)
    begun = Begun({"weight": torch.tensor([[8, 9]])}, {"weight": torch.tensor([[-4.0, 4.0]])})  # both wrong
    data = data_of(module, inputs)
    again = dataclasses.replace(QUICK, learning_rate=0.02, warm_up=0.0, beta_start=10.0)
    found = {}
    for softness in (0.0, 0.1):
        schedule = dataclasses.replace(again, softness=softness)
        learned = learn(module, {"weight": WHOLE_STEPS}, data, schedule, 32, 0, begun=begun)
        assert learned.mse_before == pytest.approx((0.7**2 + 0.8**2) / 2, abs=1e-6)
        found[softness] = learned
    assert found[0.0].keeps_first
    assert torch.equal(found[0.0].alpha["weight"], begun.alpha["weight"])
    assert found[0.1].mse_after == pytest.approx((0.3**2 + 0.2**2) / 2, abs=1e-6)
    begun = Begun(found[0.1].codes, found[0.1].alpha)
    no_better = learn(
        module,
        {"weight": WHOLE_STEPS},
        data,
        dataclasses.replace(again, iterations=1, softness=0.4),
        32,
        0,
        begun=begun,
    )
    assert no_better.keeps_first
    assert torch.equal(no_better.alpha["weight"], begun.alpha["weight"])


class Two(nn.Module):
    """Two streams in, two out, as a joint transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear([0.5, 0.4]), linear([0.4, 0.5])

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(y)


def test_both_streams_of_a_unit_count() -> None:
    module, ones = Two(), torch.ones(2, 2)
    with torch.no_grad():
        targets = list(module(ones, ones))
    signature = Signature("unit", ((ones[:1], ones[:1]), {}), (True, True), 0, 0)
    data = UnitData(signature, 2, 2, [[ones, ones, *targets]], False, torch.device("cpu"), torch.float32)
    learned = learn(module, dict.fromkeys(["first.weight", "second.weight"], WHOLE_STEPS), data, QUICK, 2, 0)
    assert (learned.codes["first.weight"] - 8).tolist() == [[1, 0]]
    assert (learned.codes["second.weight"] - 8).tolist() == [[0, 1]]


def test_weights_of_the_unit_stay_and_iterations_are_counted() -> None:
    module = linear([0.5, 0.4])
    steps: list[Any] = []
    schedule = dataclasses.replace(PUBLISHED, iterations=7)
    learn(
        module,
        {"weight": WHOLE_STEPS},
        data_of(module, torch.ones(1, 2)),
        schedule,
        1,
        0,
        lambda: steps.append(1),
    )
    assert len(steps) == 7
    assert module.weight.tolist() == [pytest.approx([0.5, 0.4])]


def test_error_that_is_not_finite_is_named() -> None:
    module = linear([3e38, 3e38])
    params = AffineParams(torch.tensor(3e38), torch.tensor(0.0), 4)
    data = data_of(linear([0.5, 0.4]), torch.ones(1, 2))
    with pytest.raises(UserError, match="unit: its output error is not finite"):
        learn(module, {"weight": params}, data, dataclasses.replace(PUBLISHED, iterations=1), 1, 0)
