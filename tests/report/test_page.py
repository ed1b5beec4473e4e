"""The page: self-contained, escaped, the same bytes again, and honest about what it compares."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import FP, MINMAX, STATIC, N, images_of, row, write_images, write_results

from halftone.errors import UserError
from halftone.evaluate.statistics import SAME, Estimate, verdict
from halftone.files import read_json, write_json, write_text
from halftone.prompts import prompts_sha256
from halftone.report.evidence import gather
from halftone.report.evidence import verdict as in_words
from halftone.report.page import render, write_report
from halftone.report.summary import check_comparable, read_csv, summarize
from halftone.report.table import name_of
from halftone.settings import PromptSet
from halftone.unconditional import numbered


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    @property
    def sources(self) -> list[str]:
        return [attrs["src"] or "" for tag, attrs in self.tags if tag == "img"]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_results(tmp_path)


@pytest.fixture
def page(results: Path, tmp_path: Path) -> Page:
    write_report(results / "summary.csv", tmp_path / "report.html", prompts=[tmp_path / "prompts.txt"])
    return Page((tmp_path / "report.html").read_text())


def test_nothing_is_fetched_and_nothing_runs(page: Page, tmp_path: Path) -> None:
    html = (tmp_path / "report.html").read_text()
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed"}
    assert "@import" not in html
    assert "url(" not in html
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "action"):
            assert re.match(r"#|data:image/", attributes.get(name) or "#")
    assert len(page.sources) == 5  # a grid, the worst of two recipes, two plots of ranges
    anchors = {attributes.get("id") for _, attributes in page.tags}
    assert all(a["href"][1:] in anchors for tag, a in page.tags if tag == "a" and a.get("href"))


def test_prompts_and_reasons_are_escaped(page: Page, tmp_path: Path) -> None:
    assert "b" not in {tag for tag, attributes in page.tags if "ring" in str(attributes)}
    alts = [attributes["alt"] or "" for tag, attributes in page.tags if tag == "img"]
    assert any("<b>a ring</b> & a star" in alt for alt in alts)  # as text, after parsing
    assert "first or last <layer>" in page.text
    assert "layer" not in {tag for tag, _ in page.tags}


def test_the_same_bytes_again(results: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(results / "summary.csv", tmp_path / f"{name}.html", grid=tmp_path / f"{name}.png")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert str(tmp_path) not in (tmp_path / "a.html").read_text()


def test_the_table_says_what_is_known(page: Page) -> None:
    assert "minmax w4a8" in page.text
    assert "simulated execution" in page.text
    assert "60.0 %" in page.text
    assert "50.0 to 70.0 %" in page.text
    words = "minmax w4a8, tier demo : 4 times smaller; 60.0 % of images as the prompt says against 90.0 %"
    assert words in page.text
    assert "differs from full precision in KID, alignment" in page.text
    assert "not distinguishable from full precision" in page.text
    assert "alignment −30 points (−40 to −20)" in page.text
    assert "halftone quantize models/m --recipe minmax --bits w4a8" in page.text
    assert page.text.count("code commit f00") == 1  # shared by the two recipes


def test_errors_per_call_are_drawn_where_a_row_has_them(results: Path, tmp_path: Path) -> None:
    rows = read_csv(results / "summary.csv")
    assert "after every call" not in render(rows, gather(rows, results))
    path = results / "metrics" / f"{STATIC}.json"
    measured = read_json(path)
    errors = [{"value": 0.1 * k, "error": 0.01, "lo": 0.09 * k, "hi": 0.11 * k} for k in (1, 2, 3)]
    write_json(path, {**measured, "latent_error": errors})
    found = gather(rows, results)
    assert [one["value"] for one in found[STATIC].latent_error] == [0.1, 0.2, pytest.approx(0.3)]
    assert "error of the latents of each row after every call" in render(rows, found)


def test_rows_of_one_recipe_are_told_apart(results: Path, tmp_path: Path) -> None:
    again = row("m_static-shared_w4a8_demo", "static", kid_to_fp=(0.1, 0.0, 0.2))
    write_json(results / "metrics" / "again.json", {"rows": [again]})
    summarize(sorted((results / "metrics").glob("*.json")), results / "summary.csv")
    write_report(results / "summary.csv", tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text()).text
    assert "static w4a8 (static-shared), tier demo" in text
    assert "static w4a8 (static), tier demo" in text
    assert "minmax w4a8, tier demo" in text


def test_frechet_distances_of_few_images_are_not_shown(results: Path, page: Page, tmp_path: Path) -> None:
    headings = [tag for tag in page.pieces if tag.startswith("FID")]
    assert not headings
    assert "Fréchet distances are left out" in page.text
    for path in (results / "metrics").glob("*.json"):
        content = read_json(path)
        for line in content["rows"]:
            line["n_images"] = 500
        write_json(path, content)
    summarize(sorted((results / "metrics").glob("*.json")), tmp_path / "large.csv")
    html = render(read_csv(tmp_path / "large.csv"), {})
    assert "FID to full precision, same noise" in Page(html).text


def test_tiers_and_models_have_tables_of_their_own(results: Path, tmp_path: Path) -> None:
    other = row("m_static_w4a6_head", "static", kid_to_fp=(0.1, 0.0, 0.2)) | {"tier": "head", "n_images": 600}
    write_json(results / "metrics" / "other.json", {"rows": [other]})
    summarize(sorted((results / "metrics").glob("*.json")), results / "summary.csv")
    write_report(results / "summary.csv", tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    tables = [
        attributes
        for tag, attributes in page.tags
        if tag == "table" and attributes.get("class") == "headline"
    ]
    assert len(tables) == 2
    assert "m, tier head" in page.text


def test_the_grid_holds_the_images_of_every_row(results: Path, page: Page) -> None:
    sheet = Image.open(io.BytesIO(base64.b64decode(page.sources[0].split(",")[1])))
    pixels = np.asarray(sheet.convert("RGB"))
    step = 192 + 10
    top = sheet.height - N * step
    for column, (strength, seed_set) in enumerate(((0, 0), (50, 0), (5, 0), (0, 1))):
        for prompt in range(N):
            y, x = top + prompt * step, 300 + column * step
            assert np.array_equal(
                pixels[y : y + 192 : 12, x : x + 192 : 12], images_of(strength)[seed_set, prompt]
            )


def test_the_worst_are_those_of_greatest_lpips(results: Path) -> None:
    found = gather(read_csv(results / "summary.csv"), results)
    assert found[MINMAX].worst == [5, 4, 3, 2]
    assert found[FP].worst == []
    assert set(found[FP].others) == set(range(N))


def test_figures_alone_make_a_page(results: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    (results / "summary.csv").rename(tmp_path / "alone" / "summary.csv")
    write_report(tmp_path / "alone" / "summary.csv", tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert page.sources == []
    assert "60.0 %" in page.text
    with pytest.raises(UserError, match="no images"):
        write_report(tmp_path / "alone" / "summary.csv", tmp_path / "report.html", grid=tmp_path / "grid.png")


def test_images_of_another_artefact_are_refused(results: Path, tmp_path: Path) -> None:
    write_images(results / "sample" / STATIC, 5, "static", "ef" * 32)
    with pytest.raises(UserError, match="not sampled from the artefact of the summary"):
        write_report(results / "summary.csv", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_damaged_results_are_named(results: Path, tmp_path: Path) -> None:
    write_text(results / "analyze" / STATIC / "plan.json", "{}")
    with pytest.raises(UserError, match=r"plan\.json: not a plan"):
        write_report(results / "summary.csv", tmp_path / "report.html")


def test_the_verdict_is_the_one_of_the_statistics() -> None:
    def said(low: float, high: float) -> str:
        return verdict({"kid_excess": Estimate((low + high) / 2, 0.1, low, high)})

    assert in_words({"verdict": said(-1, 1)}).title == SAME
    assert in_words({"verdict": said(-1, 1)}).kind == "same"
    assert in_words({"verdict": said(0.5, 1)}).kind == "differs"
    assert in_words({}).kind == ""


def test_the_page_needs_no_torch() -> None:
    code = "import sys, halftone.report.page; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": "src"}, check=False).returncode == 0
    )


def test_two_models_share_no_table(results: Path) -> None:
    rows = read_csv(results / "summary.csv")
    plain = prompts_sha256(numbered(PromptSet.VALIDATION, 1000))
    changes = {"model": "plain", "n_images": 1000, "prompts_sha256": plain, "alignment": None}
    changes |= {"alignment_lo": None, "alignment_hi": None, "clip_score": None, "fid_to_real": 1.25}
    others = [{**row, **changes, "scenario": f"plain-{row['scenario']}"} for row in rows]
    check_comparable([*rows, *others])  # never compared, so they may differ in everything
    tables = re.findall(r"<table.*?</table>", render([*rows, *others], {}), flags=re.DOTALL)
    of_text = [table for table in tables if "m_fp_demo<" in table.replace("plain-m_fp_demo", "")]
    assert len(tables) == 4
    assert len(of_text) == 1
    assert not any("plain-m_" in table for table in of_text)
    heads = [re.findall(r"<th[^>]*>([^<]+)", table) for table in tables[:2]]
    assert "alignment" in " ".join(heads[0])
    assert "alignment" not in " ".join(heads[1])
    assert "FID to real images" in " ".join(heads[1])


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        (["m_base_w4a4_demo", "m_tcaq_w4a4_demo"], ["base", "tcaq"]),
        (["m_base_demo", "m_base_more_demo"], ["m_base_demo", "more"]),
        (["one", "two"], ["one", "two"]),
    ],
)
def test_rows_that_would_share_a_name_are_told_apart_by_their_ids(ids: list[str], names: list[str]) -> None:
    rows = [row(scenario, "tcaq") for scenario in ids]
    assert [name_of(each, rows) for each in rows] == [f"tcaq w4a8 ({name})" for name in names]
    assert name_of(rows[0], rows[:1]) == "tcaq w4a8"
