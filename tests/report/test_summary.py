"""The summary: exactly its columns, timings where there are some, rows that may not stand side by side."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from small_run import FP, MINMAX, STATIC, row, write_results

from halftone.columns import COLUMNS, NAMES
from halftone.errors import UserError
from halftone.files import write_json, write_text
from halftone.report.summary import read_csv, summarize

DESIGNED = """
model scenario recipe protocol tier execution weight_bits act_bits softmax_bits boundary_bits avg_act_bits
float_sites n_images fid_to_fp fid_to_fp_unpaired kid_to_fp fid_to_real inception_score clip_score
alignment_objects alignment abstain_rate lpips psnr ssim alignment_flips latent_error size_mib weight_mib bops
denoiser_calls quantize_seconds sample_seconds peak_mib seed prompts_sha256 features artefact_sha256
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_results(tmp_path)


def save(folder: Path, name: str, *rows: dict) -> Path:
    write_json(folder / f"{name}.json", {"rows": list(rows)})
    return folder / f"{name}.json"


def benchmark(path: Path, seconds: str, peak: str) -> None:
    write_text(path, f"s\th:m:s\tmax_rss\tcpu_time\n{seconds}\t0:00:01\t{peak}\t1.0\n")


def test_the_columns_are_the_designed_ones_in_order(results: Path) -> None:
    with (results / "summary.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert tuple(table[0]) == NAMES
    assert [column.name for column in COLUMNS] == DESIGNED.split()
    assert [line["recipe"] for line in table] == ["fp", "fp-floor", "minmax", "static"]
    assert table[2]["alignment_lo"] == "0.5"
    assert table[2]["psnr"] == ""
    assert table[2]["quantize_seconds"] == ""


def test_a_table_read_back_is_the_one_written(results: Path) -> None:
    rows = read_csv(results / "summary.csv")
    assert rows[2]["kid_to_fp"] == 0.02
    assert rows[2]["n_images"] == 6
    assert rows[2]["artefact_sha256"] == "ab" * 32
    assert rows[0]["psnr"] is None


def test_timings_are_summed_over_rules_and_shards(results: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    for rule, seconds in (("reconstruct", "100"), ("calibrate", "20"), ("export", "3"), ("metrics", "999")):
        benchmark(logs / rule / f"{STATIC}.tsv", seconds, "500")
    benchmark(logs / "calibration_data" / "m.tsv", "10", "-")
    for shard, peak in (("0-of-2", "700.25"), ("1-of-2", "650")):
        benchmark(logs / "sample" / STATIC / f"{shard}.tsv", "30", peak)
    benchmark(logs / "sample" / FP / "0-of-1.tsv", "7", "NA")
    files = [results / "metrics" / f"{name}.json" for name in (FP, STATIC, MINMAX)]
    summarize(files, tmp_path / "summary.csv", logs)
    fp, floor, static, minmax = read_csv(tmp_path / "summary.csv")
    assert (static["quantize_seconds"], static["sample_seconds"], static["peak_mib"]) == (133, 60, 700.2)
    assert (fp["quantize_seconds"], fp["sample_seconds"], fp["peak_mib"]) == (None, 7, None)
    assert floor["sample_seconds"] == 7  # the floor is made of full precision's images
    assert (minmax["quantize_seconds"], minmax["sample_seconds"]) == (10, None)


def test_what_is_no_benchmark_file_is_refused(results: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "logs" / "calibrate" / f"{STATIC}.tsv", "nonsense\n")
    with pytest.raises(UserError, match="not a benchmark file"):
        summarize([results / "metrics" / f"{STATIC}.json"], tmp_path / "s.csv", tmp_path / "logs")
    assert not (tmp_path / "s.csv").exists()


@pytest.mark.parametrize("name", ["n_images", "prompts_sha256", "features"])
def test_distances_that_do_not_compare_are_refused(tmp_path: Path, name: str) -> None:
    one = row("a", "minmax", kid_to_fp=(0.1, 0.0, 0.2))
    other = row("b", "static", kid_to_fp=(0.1, 0.0, 0.2)) | {name: {"n_images": 7}.get(name, "another")}
    files = [save(tmp_path, "a", one), save(tmp_path, "b", other)]
    with pytest.raises(UserError, match=f"tier 'demo': {name} is .* do not compare"):
        summarize(files, tmp_path / "summary.csv")
    for apart in ({"tier": "headline"}, {"model": "other"}):
        save(tmp_path, "b", other | apart)
        summarize(files, tmp_path / "summary.csv")


def test_a_row_without_distances_may_differ(tmp_path: Path) -> None:
    files = [
        save(tmp_path, "a", row("a", "minmax", kid_to_fp=(0.1, 0.0, 0.2))),
        save(tmp_path, "b", row("b", "static", lpips=(0.1, 0.0, 0.2)) | {"n_images": 9}),
    ]
    summarize(files, tmp_path / "summary.csv")
    assert len(read_csv(tmp_path / "summary.csv")) == 2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"speed": 3}, "unknown column 'speed'"),
        ({"model": None}, "lacks model"),
        ({"recipe": ""}, "lacks recipe"),
    ],
)
def test_rows_of_another_shape_are_refused(tmp_path: Path, change: dict, complaint: str) -> None:
    path = save(tmp_path, "a", row("a", "minmax") | change)
    with pytest.raises(UserError, match=rf"a\.json: .*{complaint}"):
        summarize([path], tmp_path / "summary.csv")


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"rows": []})
    with pytest.raises(UserError, match="holds no rows"):
        summarize([tmp_path / "a.json"], tmp_path / "summary.csv")
    with pytest.raises(UserError, match="no such file"):
        summarize([tmp_path / "b.json"], tmp_path / "summary.csv")
    with pytest.raises(UserError, match="no metrics given"):
        summarize([], tmp_path / "summary.csv")


def test_a_row_given_twice_is_refused(tmp_path: Path) -> None:
    files = [save(tmp_path, name, row("a", "minmax")) for name in ("a", "b")]
    with pytest.raises(UserError, match=r"b\.json: minmax of a is also in .*a\.json"):
        summarize(files, tmp_path / "summary.csv")


def test_a_summary_with_a_column_missing_is_refused(results: Path) -> None:
    text = (results / "summary.csv").read_text()
    write_text(results / "summary.csv", text.replace("kid_to_fp_lo", "kid", 1))
    with pytest.raises(UserError, match="lacks the column kid_to_fp_lo"):
        read_csv(results / "summary.csv")
