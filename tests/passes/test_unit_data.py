"""What units are learned on: the order they run in, the samples, and the cache of inputs and outputs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halftone.errors import UserError
from halftone.passes.samples import choose_samples
from halftone.passes.unit_data import UnitData, Weights, capture
from halftone.passes.unit_trace import leaves, trace, with_leaves
from halftone.trajectory import Half, Sample, Trajectory, sample_inputs


def make_trajectory(calls: int = 4, prompts: int = 3) -> Trajectory:
    random = torch.Generator().manual_seed(0)
    return Trajectory(
        latents=torch.randn(calls, prompts, 2, 3, 3, generator=random),
        timesteps=torch.linspace(900, 100, calls),
        noise_levels=torch.linspace(9, 1, calls),
        conditions={"encoder_hidden_states": torch.randn(prompts, 5, 4, generator=random)},
        unconditions={"encoder_hidden_states": torch.zeros(1, 5, 4)},
        guided=True,
    )


class Block(nn.Module):
    """Called with tensors by row and by call, positions, None and a dict, positionally and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2, 2)
        self.text = nn.Linear(4, 2)

    def forward(
        self, x: Tensor, embedding: Tensor, positions: Tensor, mask: None = None, text: Any = None
    ) -> tuple[Tensor, Tensor]:
        x.add_(embedding[:, None] + positions)  # a block may write into its input
        return self.mix(x), self.text(text["states"])


class Denoiser(nn.Module):
    """Runs `last` before `first`, though registered after it; `unused` never."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = Block()
        self.last = nn.Linear(2, 2)
        self.unused = nn.Linear(2, 2)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool
    ) -> Any:
        assert return_dict is False
        x = self.last(sample.flatten(2).transpose(1, 2))
        positions = torch.arange(18.0).reshape(9, 2)
        x, text = self.first(
            x, timestep[:, None] / 1000, positions, mask=None, text={"states": encoder_hidden_states}
        )
        return (x + text.mean(),)


def signatures(denoiser: nn.Module, units: list[str], trajectory: Trajectory) -> Any:
    rows = [sample_inputs(trajectory, [Sample(0, 0), Sample(1, 1)][:count]) for count in (1, 2)]
    return trace(denoiser, units, *rows)


def test_units_come_in_the_order_in_which_they_run() -> None:
    found = signatures(Denoiser(), ["first", "last", "unused"], make_trajectory())
    assert [signature.unit for signature in found] == ["last", "first"]


def test_rows_are_told_from_other_arguments() -> None:
    _, block = signatures(Denoiser(), ["first", "last"], make_trajectory())
    kinds = dict(zip(["x", "embedding", "positions", "mask", "text"], block.by_row, strict=True))
    assert kinds == {"x": True, "embedding": True, "positions": False, "mask": False, "text": True}
    inputs, outputs = 9 * 2 + 1 + 5 * 4, 9 * 2 + 5 * 2
    assert block.bytes_per_row == 4 * (inputs + outputs)
    assert block.macs == 9 * 2 * 2 + 5 * 4 * 2


def test_unit_that_runs_twice_is_refused() -> None:
    class Twice(Denoiser):
        def forward(self, sample: Tensor, timestep: Tensor, **rest: Any) -> Any:
            return (self.last(self.last(sample.flatten(2).transpose(1, 2))),)

    with pytest.raises(UserError, match="last: runs 2 times"):
        signatures(Twice(), ["last"], make_trajectory())


def test_unit_that_mixes_samples_is_refused() -> None:
    class Mixing(Denoiser):
        def forward(self, sample: Tensor, timestep: Tensor, **rest: Any) -> Any:
            return (self.last(sample.flatten(2).transpose(1, 2).flatten(0, 1)),)

    with pytest.raises(UserError, match="last: its inputs and outputs do not have one row per sample"):
        signatures(Mixing(), ["last"], make_trajectory())


def test_trees_are_rebuilt() -> None:
    tree = ((1, [2, None]), {"a": {"b": 3}})
    assert leaves(tree) == [1, 2, None, 3]
    assert with_leaves(tree, "wxyz") == (("w", ("x", "y")), {"a": {"b": "z"}})


def captured(
    denoiser: nn.Module, unit: int, folder: Path, *, rounded: bool = False, limit_mib: int = 16
) -> tuple[UnitData, list[Sample]]:
    trajectory = make_trajectory()
    samples = choose_samples(trajectory, 7, 0)
    weights = Weights(denoiser, ["last"])
    weights.rounded = {"last": torch.zeros(2, 2)}
    data = capture(
        denoiser,
        signatures(denoiser, ["first", "last"], trajectory)[unit],
        trajectory,
        samples,
        prefix=(lambda: weights.in_use(weights.rounded)) if rounded else None,
        limit_mib=limit_mib,
        chunk=3,
        folder=folder,
    )
    return data, samples


@pytest.mark.parametrize("rounded", [False, True])
def test_inputs_are_those_of_the_prefix_and_outputs_those_of_full_precision(
    tmp_path: Path, rounded: bool
) -> None:
    denoiser = Denoiser()
    before = denoiser.last.weight.detach().clone()
    data, samples = captured(denoiser, 1, tmp_path, rounded=rounded)
    rows = [5, 0, 6]
    (args, kwargs), targets = data.batch(rows)

    given = sample_inputs(make_trajectory(), [samples[row] for row in rows])
    states = given["sample"].flatten(2).transpose(1, 2)
    with torch.no_grad():
        x = denoiser.last(states)
        prefix = denoiser.last.bias.expand_as(x) if rounded else x
        embedding = given["timestep"][:, None] / 1000
        wanted = denoiser.first(
            x.clone(), embedding, args[2], text={"states": given["encoder_hidden_states"]}
        )
    assert torch.allclose(args[0], prefix, atol=1e-6)
    assert torch.equal(kwargs["text"]["states"], given["encoder_hidden_states"])
    assert kwargs["mask"] is None
    assert [target.shape for target in targets] == [(3, 9, 2), (3, 5, 2)]
    for target, value in zip(targets, wanted, strict=True):
        assert torch.allclose(target, value, atol=1e-5)
    assert torch.equal(denoiser.last.weight, before)


def test_cache_beyond_its_limit_is_mapped_from_disk(tmp_path: Path) -> None:
    memory, _ = captured(Denoiser(), 1, tmp_path / "a")
    disk, _ = captured(Denoiser(), 1, tmp_path / "b", limit_mib=0)

    assert (memory.spilled, disk.spilled) == (False, True)
    assert not (tmp_path / "a").exists()
    assert len(list((tmp_path / "b").iterdir())) == 3  # 7 samples, 3 at a time
    near, far = (
        [*leaves(arguments), *targets]
        for arguments, targets in (memory.batch(range(7)), disk.batch(range(7)))
    )
    tensors = [pair for pair in zip(near, far, strict=True) if isinstance(pair[0], Tensor)]
    assert len(tensors) > 2
    assert all(torch.equal(*pair) for pair in tensors)


def test_values_that_are_not_finite_name_the_unit(tmp_path: Path) -> None:
    denoiser = Denoiser()
    denoiser.first.mix.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="first: its inputs or outputs are not finite"):
        captured(denoiser, 1, tmp_path)


@pytest.mark.parametrize(("count", "per_call"), [(8, {2}), (10, {2, 3}), (2, {1}), (1000, {6})])
def test_samples_are_spread_evenly_over_calls(count: int, per_call: set[int]) -> None:
    samples = choose_samples(make_trajectory(), count, 0)
    assert len(samples) == len(set(samples)) == min(count, 24)
    assert set(Counter(sample.call for sample in samples).values()) == per_call
    assert samples == sorted(samples)
    if count >= 8:
        assert {sample.half for sample in samples} == set(Half)


def test_samples_depend_on_the_seed() -> None:
    trajectory = make_trajectory()
    assert choose_samples(trajectory, 8, 1) == choose_samples(trajectory, 8, 1)
    assert choose_samples(trajectory, 8, 1) != choose_samples(trajectory, 8, 2)
