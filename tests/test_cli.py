"""The command line: what it refuses, in how many words, with which exit code, and before loading anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from halftone import cli
from halftone.cli import main
from halftone.errors import UserError
from halftone.workflow.paths import Rule

ROOT = Path(__file__).parents[1]
VERBS = [name for verbs in cli.VERBS.values() for name in verbs]
RECIPE = ["--recipe", "minmax", "--bits", "w4a8"]


def test_every_rule_has_the_verb_of_its_name() -> None:
    assert {rule.replace("_", "-") for rule in Rule} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_option_with_its_range_or_default(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--help"]) == 0
    text = re.sub(r"[\s│╭╮╰╯─]+", " ", capsys.readouterr().out)
    options = set(re.findall(r"--[a-z][a-z-]+", text)) - {"--help"}
    for option in ("--steps", "--guidance", "--batch-size", "--n-images", "--bootstrap"):
        if option in options:
            after = text.split(option, 1)[1].split(" --")[0]
            assert "range" in after, option
            assert "default" in after.lower(), option


def test_top_level_help_lists_the_verbs_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)
    assert main(["--version"]) == 0
    assert re.fullmatch(r"halftone \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "prompts.txt").write_text("a red cube\na blue ring\n")
    (tmp_path / "bad.txt").write_text("a red cube\na red cube\n")
    (tmp_path / "data.safetensors").write_text("x")
    return tmp_path


DATA = ["--data", "data.safetensors", "-o", "out"]
SAMPLE = ["sample", "model", "--prompts", "prompts.txt", "-o", "out"]
MISTAKES: list[tuple[list[str], str]] = [
    (["calibration-data", "gone", "--prompts", "prompts.txt", "-o", "out"], "gone: no such folder or file"),
    (["calibration-data", "own/er/x", "--prompts", "prompts.txt", "-o", "out"], "no such folder or file"),
    (["calibration-data", "owner/name", "--prompts", "prompts.txt", "-o", "out"], "add --revision"),
    (["calibration-data", "model", "--prompts", "gone.txt", "-o", "out"], "gone.txt: no such prompt file"),
    (["calibration-data", "model", "--prompts", "bad.txt", "-o", "out"], "line 2 repeats line 1"),
    (
        ["calibration-data", "model", "--prompts", "prompts.txt", "-o", "out"],
        "holds 2 prompts, 16 were asked",
    ),
    (
        [*["calibration-data", "model", "--prompts", "prompts.txt", "--resolution", "12", "-o", "out"]],
        "a multiple of 8",
    ),
    (["reconstruct", "model", *RECIPE, *DATA], "rounds weights to nearest: nothing to reconstruct"),
    (["calibrate", "model", "--recipe", "static", "--bits", "w4a8", *DATA], "add --weights"),
    (["calibrate", "model", *RECIPE, "--weights", "x", *DATA], "leave --weights out"),
    (
        ["calibrate", "model", *RECIPE, "--data", "gone", "-o", "out"],
        "make it with `halftone calibration-data`",
    ),
    (["calibrate", "model", "--recipe", "nothing", "--bits", "w4a8", *DATA], "recipe 'nothing' is unknown"),
    (["calibrate", "model", "--recipe", "minmax", "--bits", "4", *DATA], "write them as w4a8"),
    (["calibrate", "model", "--recipe", "minmax", "--bits", "w99a8", *DATA], "must lie in 2..16"),
    (["calibrate", "model", *RECIPE, "--axes", "{", *DATA], "--axes: not JSON"),
    (["calibrate", "model", *RECIPE, "--axes", "[]", *DATA], "--axes: must be a JSON object"),
    (["calibrate", "model", *RECIPE, "--axes", '{"nope": 1}', *DATA], "nope: no such axis; choose from"),
    (["calibrate", "model", *RECIPE, "--axes", '{"time_axis": "x"}', *DATA], "--axes: time_axis"),
    (["analyze", "gone", "-o", "out"], "gone: no such file; make it with `halftone calibrate`"),
    ([*SAMPLE, "--shard", "2-of-2"], "write it as 0-of-4"),
    ([*SAMPLE, "--shard", "half"], "write it as 0-of-4"),
    ([*SAMPLE, "--seed-a", "2"], "both 2; they must differ"),
    ([*SAMPLE, "--n-images", "3"], "holds 2 prompts, 3 were asked for"),
    (
        ["metrics", "--images", "a.zip", "--reference", "b.zip", "--prompts", "prompts.txt", "-o", "out"],
        "a.zip: no such file",
    ),
    (
        [
            "metrics",
            "--images",
            "a.zip",
            "--reference",
            "b.zip",
            "--prompts",
            "prompts.txt",
            "--features",
            "vgg",
            "-o",
            "out",
        ],
        "--features vgg",
    ),
    (["verify", "gone"], "gone: no such file"),
    (["info", "gone"], "gone: no such file"),
    (["evaluate", "gone", "--prompts", "prompts.txt"], "gone: no such file"),
    (["calibrate", "model", *RECIPE, "--axes", '{"rounds": 2}', *DATA], "--axes: rounds: nothing is learned"),
    (["plan", "model", "--recipe", "fp"], "recipe fp quantizes nothing: choose one of minmax"),
    (["compare", "one", "two"], "one: no artefact, and no figures of this name (results/metrics/one.json)"),
    (["compare", "model", "two"], "two: no artefact, and no figures"),
    (["plan"], "give a model, or --workflow"),
    (["plan", "model", "--workflow"], "not both"),
    (["plan", "--workflow"], "params.yaml: no such file"),
    (["run"], "params.yaml: no such file; run from the folder"),
    (["run", "headline"], "experiments/headline.yaml: no such overlay; known are none"),
    (["stage", "nothing"], "no rule 'nothing'"),
    (["report", "--summary", "gone.csv", "-o", "out"], "gone.csv: no such file"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: " ".join(value)[:60])
def test_a_mistake_is_one_line_and_exit_code_2(
    files: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("halftone: ")
    assert said.count("\n") == 1
    assert message in said
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["nothing"],
        ["sample"],
        [*SAMPLE, "--n-images", "0"],
        [*SAMPLE, "--guidance", "99"],
        ["quantize", "--recipe"],
    ],
)
def test_usage_errors_are_exit_code_2(
    files: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(words) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_mistakes_are_found_before_torch_is_loaded(files: Path) -> None:
    script = (
        "import json, sys\n"
        "from halftone.cli import main\n"
        "codes = [main(words) for words in json.loads(sys.argv[1])]\n"
        "heavy = {'torch', 'diffusers', 'mlflow', 'snakemake', 'matplotlib'} & set(sys.modules)\n"
        "print(json.dumps([codes, sorted(heavy)]))\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", script, json.dumps([words for words, _ in MISTAKES])],
        cwd=files,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(said.stdout.splitlines()[-1]) == [[2] * len(MISTAKES), []]


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (UserError("settings: wrong;\nput right"), 2, "halftone: settings: wrong; put right\n"),
        (KeyboardInterrupt(), 130, "halftone: interrupted\n"),
        (
            MemoryError(),
            2,
            "halftone: out of memory: lower --batch-size (in params.yaml",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "halftone: out of memory: lower"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            2,
            "halftone: out of memory",
        ),
    ],
)
def test_exit_codes(capsys: pytest.CaptureFixture[str], fault: BaseException, code: int, words: str) -> None:
    def verb(batch_size: int = 1) -> None:
        raise fault

    with pytest.raises(typer.Exit) as left:
        cli.guarded(verb)(batch_size=2)
    assert left.value.exit_code == code
    assert capsys.readouterr().err.startswith(words)


@pytest.mark.parametrize("fault", [RuntimeError("shapes do not match"), ValueError("x"), AssertionError()])
def test_our_own_faults_keep_their_traceback(fault: Exception) -> None:
    def verb(batch_size: int = 1) -> None:
        raise fault

    with pytest.raises(type(fault)):
        cli.guarded(verb)(batch_size=2)


def test_a_fault_of_ours_ends_with_exit_code_1(files: Path) -> None:
    (files / "params.yaml").write_text("tier: demo\n")
    broken = "import halftone.workflow.config as config\nconfig.settings = lambda *_: 1 / 0\n"
    script = f"{broken}from halftone.cli import main\nmain(['prune'])"
    said = subprocess.run(
        [sys.executable, "-c", script],
        cwd=files,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 1
    assert "ZeroDivisionError" in said.stderr


def test_schema_has_ranges_defaults_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema: dict[str, Any] = json.loads(capsys.readouterr().out)
    steps = schema["$defs"]["Model"]["properties"]["steps"]
    assert (steps["minimum"], steps["maximum"], steps["default"]) == (1, 1000, 25)
    assert {"minmax", "static"} <= set(schema["$defs"]["Axes"]["presets"])


def test_plan_of_the_workflow_counts_jobs_time_and_disk(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["plan", "--workflow"]) == 0
    text = capsys.readouterr().out
    assert "16 jobs" in text
    assert "MiB of disk" in text
    assert main(["plan", "--workflow", "--overlay", "headline"]) == 0
    assert "scenes-t2i_static_w4a4_headline" in capsys.readouterr().out


def test_plan_of_the_workflow_invents_nothing_of_a_model_that_is_absent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    overlay = tmp_path / "absent.yaml"
    overlay.write_text("models: {scenes-t2i: {path: data/models/absent}}")
    assert main(["plan", "--workflow", "--overlay", str(overlay)]) == 2
    assert "data/models/absent" in capsys.readouterr().err


def test_plan_of_a_model_lists_sites_sizes_and_reasons(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tiny_model_folder), *RECIPE, "-o", str(tmp_path / "plan.json")]) == 0
    text = capsys.readouterr().out
    assert "4-bit affine, per channel" in text
    assert "in float, first or last layer" in text
    assert "times less" in text
    assert json.loads((tmp_path / "plan.json").read_text())["bits"] == "w4a8"
