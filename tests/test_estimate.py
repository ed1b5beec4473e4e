"""What the workflow is expected to cost, and how that is corrected as jobs finish."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from halftone import estimate
from halftone.estimate import Job, Remaining
from halftone.settings import Settings, validate
from halftone.workflow.paths import Rule

ROOT = Path(__file__).parents[1]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.fixture
def settings() -> Settings:
    return validate(PARAMS)


def seconds(settings: Settings, rule: Rule, timings: Path) -> float:
    return sum(job.seconds for job in estimate.jobs(settings, timings=timings) if job.rule is rule)


def test_the_demo_has_sixteen_jobs(settings: Settings, tmp_path: Path) -> None:
    counts = dict.fromkeys(Rule, 0)
    for job in estimate.jobs(settings, timings=tmp_path):
        counts[job.rule] += 1
    assert list(counts.values()) == [1, 0, 1, 0, 2, 2, 2, 3, 3, 1, 1]


def test_more_images_take_longer_and_shards_share_them(tmp_path: Path) -> None:
    params = copy.deepcopy(PARAMS)
    before = seconds(validate(params), Rule.SAMPLE, tmp_path)
    params["tiers"]["demo"]["n_images"] *= 4
    more = seconds(validate(params), Rule.SAMPLE, tmp_path)
    assert more > 2 * before
    params["sampling"]["shard_size"] = 64
    jobs = [job for job in estimate.jobs(validate(params), timings=tmp_path) if job.rule is Rule.SAMPLE]
    assert len(jobs) == 12


def test_a_gpu_is_faster(settings: Settings, tmp_path: Path) -> None:
    slow, fast = (estimate.jobs(settings, gpu=gpu, timings=tmp_path) for gpu in (False, True))
    assert sum(job.seconds for job in fast) < sum(job.seconds for job in slow)


def test_measured_times_replace_estimates(settings: Settings, tmp_path: Path) -> None:
    row = settings.rows()[1]
    (tmp_path / "sample" / row).mkdir(parents=True)
    for shard, value in (("0-of-2", 10), ("1-of-2", 20)):
        (tmp_path / "sample" / row / f"{shard}.tsv").write_text(f"s\tmax_rss\n{value}\t1\n")
    (tmp_path / "summary.tsv").write_text("s\tmax_rss\n7.5\t1\n")
    found = {(job.rule, job.key): job.seconds for job in estimate.jobs(settings, timings=tmp_path)}
    assert found[Rule.SAMPLE, row] == 15
    assert found[Rule.SUMMARY, ""] == 7.5


@pytest.mark.parametrize("text", ["", "s\n", "nothing\n1\n", "s\nNA\n"])
def test_a_timing_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.tsv").write_text(text)
    assert estimate.measured(Rule.REPORT, "", tmp_path) is None


def test_the_size_of_a_denoiser_is_told_within_a_factor_of_four(tiny_model_folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    from halftone.macs import count

    unet = UNet2DConditionModel.from_pretrained(tiny_model_folder / "unet")
    counted = count(unet, latent_size=8, text_tokens=32)
    assert counted is not None
    assert 0.25 < estimate.denoiser_macs(str(tiny_model_folder), 16) / counted.total < 4


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64])
def test_weights_that_make_no_sense_do_not_stop_an_estimate(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/weights.safetensors").write_bytes(content)
    assert estimate.denoiser_macs(str(tmp_path), 64) >= 0


def test_disk_grows_with_images(settings: Settings) -> None:
    params = copy.deepcopy(PARAMS)
    params["tiers"]["demo"]["n_images"] = 1000
    assert estimate.disk_mib(validate(params)) > estimate.disk_mib(settings) > 0


def test_what_is_left_shrinks_and_learns_from_finished_jobs() -> None:
    jobs = [Job(Rule.SAMPLE, "a", 10.0), Job(Rule.SAMPLE, "b", 10.0), Job(Rule.REPORT, "", 5.0)]
    left = Remaining(jobs, {"sample": 2, "report": 1, "all": 1}, cores=1)
    assert (left.total, left.seconds(0)) == (3, 25)
    left.start(1, "sample", "a", 0)
    assert left.seconds(5) == 20
    left.finish(1, 20)  # took twice as long as expected, and so will the rest
    assert (left.done, left.seconds(20)) == (1, 30)
    left.start(2, "sample", "b", 20)
    left.drop(2)
    assert left.seconds(20) == 10


def test_cores_share_work_but_not_a_chain() -> None:
    jobs = [Job(Rule.SAMPLE, str(k), 10.0) for k in range(4)] + [Job(Rule.REPORT, "", 5.0)]
    left = Remaining(jobs, {"sample": 4, "report": 1}, cores=2)
    assert left.seconds(0) == 22.5
    assert Remaining(jobs, {"sample": 4, "report": 1}, cores=100).seconds(0) == 15
