"""What is kept of activations, against tensors whose outliers are put in by hand."""

from __future__ import annotations

import pytest
import torch

from halftone.errors import UserError
from halftone.proxy.watch import ActivationWatch, Place, ProbabilityWatch, leaders, overlap, spread


def test_spread_of_the_extremes_by_axis() -> None:
    x = torch.tensor([[1.0, 1, 10, -1], [0, 2, 8, -2], [-1, 1, 12, -1]])  # tokens by channels
    assert spread(x.amin(0), x.amax(0)) == 23
    assert spread(x.amin(1), x.amax(1)) == 5


def test_overlap_is_one_for_the_same_leaders_and_none_for_others() -> None:
    same = torch.zeros(4, 40)
    same[:, [3, 17]] = 1.0
    assert overlap(leaders(same), 4) == 1.0
    other = torch.zeros(4, 40)
    for row in range(4):
        other[row, [2 * row, 2 * row + 1]] = 1.0
    assert overlap(leaders(other), 4) == 0.0
    assert overlap(leaders(same[:1]), 1) is None


def test_overlap_is_the_mean_over_pairs() -> None:
    values = torch.rand(6, 60, generator=torch.Generator().manual_seed(0))
    top = [set(row.topk(3).indices.tolist()) for row in values]
    pairs = [len(a & b) / 3 for i, a in enumerate(top) for b in top[:i]]
    assert overlap(leaders(values), 6) == pytest.approx(sum(pairs) / len(pairs))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("convolution", [False, True])
def test_a_channel_that_stands_out_is_found_and_stays(convolution: bool) -> None:
    watch = ActivationWatch("x", Place(prompts=4), convolution=convolution)
    for call in range(3):
        x = noise(8, 64, 20, seed=call)  # rows, tokens, channels
        x[:, :, 7] += 40
        watch.update(x.transpose(1, 2).unflatten(2, (8, 8)) if convolution else x)
        watch.finish_call()
    assert not watch.flat
    assert watch.channel.over_prompts == [1.0] * 3
    assert watch.channel.over_calls == 1.0
    assert min(watch.channel.spread) > 3 * max(watch.token.spread)
    assert max(p for p in watch.token.over_prompts if p is not None) < 0.5
    assert min(c for c in watch.channel.contrast if c is not None) > 8


def test_batches_add_up_and_only_the_last_rows_count_as_prompts() -> None:
    x = noise(6, 16, 20)
    whole, parts = ActivationWatch("x", Place(prompts=4)), ActivationWatch("x", Place(prompts=2, batches=2))
    whole.update(x)
    whole.finish_call()
    parts.update(x[[0, 2, 3]])
    parts.update(x[[1, 4, 5]])
    parts.finish_call()
    assert whole.ends == parts.ends == [(float(x.min()), float(x.max()))]
    assert whole.channel.spread == parts.channel.spread
    assert whole.channel.over_prompts == parts.channel.over_prompts  # rows 2 to 5


def test_heads_are_channels_beside_each_other() -> None:
    watch = ActivationWatch("x", Place(prompts=2), heads=2)
    x = noise(4, 16, 20)  # (2 rows x 2 heads, tokens, width)
    x[1::2, :, 5] += 30  # of the second head
    watch.update(x)
    assert watch.channel.hi.numel() == 40
    assert int(watch.channel.hi.argmax()) == 25
    assert watch.token.hi.numel() == 16


def test_halves_of_a_concatenation_have_ranges_of_their_own() -> None:
    watch = ActivationWatch("x", Place(), convolution=True, split=3)
    x = torch.cat(
        [torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2), torch.linspace(0, 10, 8).reshape(1, 2, 2, 2)], 1
    )
    watch.update(x)
    watch.finish_call()
    assert watch.halves == [((-1.0, 1.0), (0.0, 10.0))]


def test_peak_is_the_largest_magnitude_over_the_usual_ones() -> None:
    watch = ActivationWatch("x", Place(prompts=2))
    x = noise(2, 100, 100)
    x[0, 5, 5] = -32.9
    watch.update(x)
    watch.finish_call()
    assert watch.peaks[0] == pytest.approx(10, rel=0.1)  # 3.29 deviations are the 99.9th percentile


def test_what_has_no_tokens_has_a_range_only() -> None:
    watch = ActivationWatch("x", Place(prompts=2))
    watch.update(noise(2, 32))
    watch.finish_call()
    assert watch.flat
    assert len(watch.ranges) == 1


def test_values_that_are_not_finite_are_told_with_site_and_call() -> None:
    watch = ActivationWatch("mid_block.conv.input", Place(call=7))
    with pytest.raises(UserError, match=r"mid_block\.conv\.input, call 7: .*NaN"):
        watch.update(torch.tensor([[[1.0, float("nan")]]]))


def test_a_sample_hits_every_channel() -> None:
    x = torch.arange(64.0).repeat(10_000)
    drawn = Place(batches=10).draw(x)
    assert drawn.numel() == 6554
    assert len(drawn.unique()) == 64


def test_probability_of_the_first_token_and_the_largest_of_the_rest() -> None:
    watch = ProbabilityWatch("x", Place(prompts=2), heads=2, cross=True)
    x = torch.full((6, 4, 5), 0.1)  # 3 rows x 2 heads: the first row is the unconditional half
    x[..., 0] = 0.6
    x[2, 1] = torch.tensor([0.2, 0.5, 0.1, 0.1, 0.1])  # the first prompt, one query
    x[:2] = 0.2
    watch.update(x)
    watch.finish_call()
    assert watch.first == [pytest.approx(0.6 - 0.4 / 16)]
    assert watch.remaining == [pytest.approx([0.5, 0.1])]
    assert watch.ranges == [pytest.approx(0.5)]
