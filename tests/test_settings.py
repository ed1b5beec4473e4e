"""params.yaml and its overlays: accepted as shipped, refused in one line that names file and key."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from halftone.errors import UserError
from halftone.settings import PromptSet, Settings, validate
from halftone.workflow import config

ROOT = Path(__file__).parents[1]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
FP, MINMAX, STATIC = PARAMS["scenarios"]


def edited(path: str, value: Any) -> dict[str, Any]:
    result = copy.deepcopy(PARAMS)
    *parents, last = path.split("/")
    node = result
    for key in parents:
        node = node[key]
    if value is None:
        node.pop(last)
    else:
        node[last] = value
    return result


def test_the_shipped_settings_are_valid() -> None:
    settings = config.settings(base=ROOT / "params.yaml")
    assert settings.rows() == [FP, MINMAX, STATIC]
    assert settings.reference(STATIC) == FP
    assert settings.scenarios[STATIC].resolved_axes().rounding == "adaround"


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml")))
def test_every_overlay_is_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = config.settings([config.overlay(name)])
    # ablations share the rows of screening, further methods those of the headline
    assert settings.tier in (name, "screening", "headline")
    assert all(settings.scenarios[row].tier == settings.tier for row in settings.rows())


def test_the_headline_reads_the_test_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = config.settings([config.overlay("headline")])
    assert (settings.tiers["headline"].prompts, settings.tiers["headline"].n_images) == ("test", 1000)
    assert len(settings.rows()) == 1 + 4 * 3  # full precision, and four recipes at three widths
    assert settings.shards(settings.rows()[0]) == 4


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "calibration/n_prompts",
            0,
            "calibration.n_prompts: Input should be greater than or equal to 1 (given: 0)",
        ),
        ("calibration/n_prompts", "many", "calibration.n_prompts"),
        ("calibration/nprompts", 3, "calibration.nprompts: unknown key"),
        ("tier", "other", "tier 'other' is not among tiers: demo"),
        ("tier", None, "tier: missing"),
        ("models", {}, "models"),
        ("models/scenes-t2i/resolution", 63, "models.scenes-t2i.resolution"),
        ("models/scenes-t2i/steps", 0, "models.scenes-t2i.steps"),
        ("prompts/calibration", None, "prompts.calibration is missing"),
        ("prompts/testt", "x", "prompts.testt"),
        ("prompts/validation", None, "tiers.demo.prompts: prompts.validation names no file"),
        (f"scenarios/{STATIC}/bits", "w4", "write them as w4a8"),
        (f"scenarios/{STATIC}/bits", None, "bits are missing"),
        (f"scenarios/{STATIC}/recipe", "magic", "recipe 'magic' is unknown"),
        (f"scenarios/{STATIC}/axes", {"time": "x"}, f"scenarios.{STATIC}"),
        (f"scenarios/{STATIC}/model", "other", "'other' is not among models"),
        (f"scenarios/{STATIC}/tier", "other", "'other' is not among tiers"),
        (f"scenarios/{FP}/bits", "w8a8", "the full-precision row takes no bits"),
        (f"scenarios/{FP}/execution", "integer", "the full-precision row takes no execution"),
        (f"scenarios/{MINMAX}/execution", "float", "should be 'simulated' or 'integer'"),
        (f"scenarios/{FP}/components", "int8", "the full-precision row takes no components"),
        (f"scenarios/{MINMAX}/components", "int4", "should be 'copy', 'reference' or 'int8'"),
        (f"scenarios/{FP}", None, "exactly one scenario with recipe fp"),
        ("scenarios/with.dot", PARAMS["scenarios"][STATIC], "id 'with.dot'"),
        ("metrics/features", "vgg", "metrics.features"),
        ("models/scenes-t2i/unconditional", True, "guidance does not apply to an unconditional model"),
        ("models/scenes-t2i/real_images", "scenes", "captions of scenes have their renders anyway"),
        ("reconstruction/budget", "huge", "reconstruction.budget"),
    ],
)
def test_a_wrong_value_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as fault:
        validate(edited(path, value))
    assert message in str(fault.value)
    assert str(fault.value).startswith("params.yaml: ")
    assert "\n" not in str(fault.value)


def test_a_tier_without_rows_is_refused() -> None:
    empty = edited("tiers/other", PARAMS["tiers"]["demo"])
    empty["tier"] = "other"
    with pytest.raises(UserError, match="tier 'other' has no scenario; tiers with scenarios: demo"):
        validate(empty)


def test_a_model_without_text_needs_no_prompt_files() -> None:
    plain = edited("prompts", None)
    plain["models"]["scenes-t2i"] = {"path": "data/models/plain", "unconditional": True}
    settings = validate(plain)
    assert settings.prompt_file("scenes-t2i", PromptSet.CALIBRATION) is None
    assert settings.models["scenes-t2i"].guidance_scale is None
    # beside a model with text, only the tiers of that one need files
    mixed = edited("models/plain", {"path": "data/models/plain", "unconditional": True})
    mixed["tiers"]["other"] = {"prompts": "test", "n_images": 4}
    mixed["scenarios"]["plain_fp_other"] = {"model": "plain", "recipe": "fp", "tier": "other"}
    del mixed["prompts"]["test"]
    validate(mixed)
    mixed["scenarios"]["t2i_fp_other"] = {"model": "scenes-t2i", "recipe": "fp", "tier": "other"}
    with pytest.raises(UserError, match=r"tiers\.other\.prompts: prompts\.test names no file"):
        validate(mixed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "not valid YAML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"- a", "must hold a mapping"),
        (None, "no such file"),
        (
            b"tier: demo\nmodels:\n  m: {path: a}\n  m: {path: b}\n",
            r"params\.yaml, line 4: 'm' is said twice",
        ),
        (b"tier: demo\ntier: screening\n", r"line 2: 'tier' is said twice"),
    ],
)
def test_a_file_that_is_no_settings_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        config.settings(base=path)


def test_merge_keys_are_no_repetition(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("base: &base {x: 1}\na: {b: {m: &m {<<: *base, x: 2}}}\nn: {<<: *m}\n")
    assert config.read(path)["n"] == {"x": 2}


def test_overlays_replace_leaves_and_keep_the_rest() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": [1, 2]}
    assert config.merge(base, {"a": {"b": 3}, "d": [4], "e": 5}) == {"a": {"b": 3, "c": 2}, "d": [4], "e": 5}
    assert base == {"a": {"b": 1, "c": 2}, "d": [1, 2]}


trees = st.recursive(
    st.integers(), lambda leaf: st.dictionaries(st.sampled_from("abc"), leaf, max_size=3), max_leaves=8
)
mappings = st.dictionaries(st.sampled_from("abc"), trees, max_size=3)


@given(mappings, mappings)
def test_merging_is_what_snakemake_does(base: dict[str, Any], over: dict[str, Any]) -> None:
    from snakemake.utils import update_config

    assume(not clash(base, over))
    theirs = copy.deepcopy(base)
    update_config(theirs, copy.deepcopy(over))
    assert config.merge(base, over) == theirs


def clash(base: Any, over: Any) -> bool:
    """Whether a mapping comes where a plain value was, which Snakemake cannot do."""
    if not isinstance(over, dict):
        return False
    return not isinstance(base, dict) or any(clash(base[key], over[key]) for key in base.keys() & over.keys())


def test_settings_cannot_be_changed_by_accident() -> None:
    settings = Settings.model_validate(PARAMS)
    with pytest.raises(ValueError, match="frozen"):
        settings.calibration.n_prompts = 3  # type: ignore[misc]
