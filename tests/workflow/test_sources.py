"""The code deps in dvc.yaml, which Snakemake hashes too, are what the verbs import, no more and no less."""

from __future__ import annotations

from pathlib import Path

from trees import ROOT

from halftone.imports import closure
from halftone.workflow import sources
from halftone.workflow.paths import Rule


def test_the_lists_in_dvc_yaml_are_what_the_verbs_import() -> None:
    behind = sources.rewritten(ROOT) != (ROOT / "dvc.yaml").read_text()
    assert not behind, "imports have changed: run `make code` and commit dvc.yaml"


def test_a_rule_depends_on_its_own_steps_only() -> None:
    found = {
        rule: {f.relative_to(ROOT / "src/halftone").as_posix() for f in sources.files(ROOT, rule)}
        for rule in Rule
    }
    assert "passes/reconstruct.py" in found[Rule.RECONSTRUCT]
    assert "passes/reconstruct.py" not in found[Rule.CALIBRATE]
    assert "sampling.py" in found[Rule.SAMPLE]
    assert "sampling.py" not in found[Rule.CALIBRATION_DATA]
    assert "evaluate/metrics.py" in found[Rule.METRICS]
    assert "evaluate/metrics.py" not in found[Rule.SUMMARY]
    assert "report/page.html.j2" in found[Rule.REPORT]


def test_imports_are_followed_also_inside_functions(tmp_path: Path) -> None:
    package = tmp_path / "halftone"
    (package / "deep").mkdir(parents=True)
    for name, text in {
        "__init__.py": "x = 1",
        "start.py": "def f():\n    from halftone import one\n",
        "one.py": "import halftone.deep.two",
        "other.py": "x = 1",
        "deep/__init__.py": '"""Only words."""',
        "deep/two.py": "import json",
    }.items():
        (package / name).write_text(text)
    found = closure(tmp_path, "halftone/start.py")
    assert found == {"halftone/start.py", "halftone/one.py", "halftone/deep/two.py"}


def test_the_hash_follows_the_listed_files_alone(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "dvc.yaml").write_text("stages: {analyze: {do: {deps: [results/x, src/a.py]}}}")
    (tmp_path / "src/a.py").write_text("1")
    before = sources.code_hash(tmp_path, Rule.ANALYZE)
    (tmp_path / "src/b.py").write_text("1")
    assert sources.code_hash(tmp_path, Rule.ANALYZE) == before
    (tmp_path / "src/a.py").write_text("2")
    assert sources.code_hash(tmp_path, Rule.ANALYZE) != before
