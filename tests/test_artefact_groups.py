"""Grouped sites in an artefact: what they cost, and what damage to them is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halftone import artefact
from halftone.artefact import tensors
from halftone.artefact.manifest import write_manifest
from halftone.errors import UserError
from halftone.plan import MIB, GroupPlan, Plan, describe, label_bits, label_bytes
from halftone.source import load_source
from quantized import calibrated

LINEAR = "mid_block.attentions.0.transformer_blocks.0.ff.net.2.input"
CONV = "mid_block.resnets.0.conv1.input"
FLAT = "time_embedding.linear_1.input"


@pytest.fixture(scope="module")
def whole(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("grouped")
    found = calibrated(tiny_model_folder, home / "state.safetensors", "w4a6", groups=4)
    artefact.write(home / "artefact", found.state, found.plan, load_source(tiny_model_folder))
    return home / "artefact"


def test_the_plan_sums_up_what_was_found(whole: Path) -> None:
    plan = Plan.load(whole / "plan.json")
    sites = {site.name: site for site in plan.sites}
    conv, linear = sites[CONV].groups, sites[LINEAR].groups
    assert conv is not None
    assert linear is not None
    assert conv.channels in (None, 64 * 9)
    assert conv.positions in (None, 16)
    assert linear.channels in (None, 256)
    assert sites[CONV].parameters == plan.calls * conv.most
    assert sites[FLAT].groups is None
    assert describe(sites[CONV]).startswith("6-bit affine, per group of ")
    assert describe(sites[FLAT]) == "6-bit affine, per tensor, per call"


def test_labels_cost_their_bits(whole: Path) -> None:
    plan, stored = Plan.load(whole / "plan.json"), load_file(whole / "unet" / tensors.FILE)
    grouped = [site for site in plan.sites if site.groups is not None]
    assert stored[tensors.GROUPS].numel() == sum(
        label_bytes(site.groups, plan.calls) for site in grouped if site.groups
    )
    total = sum(
        value.numel() * value.element_size()
        for name, value in stored.items()
        if name.split("/")[0] in ("weight", "activation")
    )
    assert plan.sizes.parameters == total
    assert [label_bits(groups) for groups in (1, 2, 4, 5, 16, 17, 32)] == [0, 2, 2, 3, 4, 5, 5]


def test_storage_of_the_published_figure() -> None:
    """DGQ for SD 1.4 and K = 16: 376 sites, 25 calls, pairs of 8-byte values, labels not counted."""
    groups = GroupPlan(most=16, channels=320)
    pairs = 376 * 25 * groups.most
    assert round(pairs * 2 * 8 / MIB, 2) == 2.29
    assert label_bytes(groups, 25) == 320 * 25 * 4 // 8


Damage = Callable[[Path], None]


def _site(name: str, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "plan.json").read_text())
        site = next(site for site in content["sites"] if site["name"] == name)
        for key, value in changes.items():
            held, _, inner = key.partition("__")
            (site[held] if inner else site)[inner or held] = value
        (folder / "plan.json").write_text(json.dumps(content))

    return damage


def _labels(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "unet" / tensors.FILE
        found = load_file(path)
        changed = change(found.pop(tensors.GROUPS))
        if changed is not None:
            found[tensors.GROUPS] = changed
        save_file(found, path)

    return damage


def _everything_calls(count: int) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "plan.json").read_text())
        before, content["calls"] = content["calls"], count
        for site in content["sites"]:
            if site["kind"] != "weight" and "parameters" in site:
                site["parameters"] = site["parameters"] // before * count
        (folder / "plan.json").write_text(json.dumps(content))

    return damage


HOSTILE: dict[str, tuple[Damage, str]] = {
    "no labels": (_labels(lambda x: None), "lacks activation/groups"),
    "labels too short": (_labels(lambda x: x[:-1]), "has shape"),
    "labels signed": (_labels(lambda x: x.to(torch.int8)), "is I8"),
    "one group in labels of four": (_labels(torch.zeros_like), "labels differ"),
    "more groups than the recipe": (_site(LINEAR, groups__most=8, parameters=40), "contradicts itself"),
    "33 groups": (_site(LINEAR, groups__most=33), "not a plan"),
    "groups of a vector": (_site(FLAT, groups={"most": 4, "channels": 32}), "parameters"),
    "grouped without groups": (_site(FLAT, granularity="per group"), "contradicts itself on groups"),
    "groups without granularity": (_site(LINEAR, granularity="per tensor"), "contradicts itself on groups"),
    "another number of channels": (
        _site(CONV, groups__channels=64, groups__position_calls=[]),
        "contradicts",
    ),
    "calls out of order": (_site(LINEAR, groups__position_calls=[2, 1]), "contradicts"),
    "a call that is not there": (_site(LINEAR, groups__position_calls=[7]), "contradicts"),
    "10^12 positions": (
        _site(LINEAR, groups__positions=10**12, groups__position_calls=[0, 1, 2, 3, 4]),
        "contradicts|has shape",
    ),
    "10^12 calls": (_everything_calls(10**12), "has shape|contradicts"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damage_is_refused(whole: Path, tmp_path: Path, name: str) -> None:
    damage, message = HOSTILE[name]
    folder = tmp_path / "artefact"
    shutil.copytree(whole, folder)
    damage(folder)
    write_manifest(folder)
    with pytest.raises(UserError, match=message):
        artefact.load(folder)
