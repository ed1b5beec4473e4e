"""The proxy card: all findings about one model, as JSON, as Markdown, and as a plot of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from halftone import device
from halftone.denoiser import denoiser_of
from halftone.errors import UserError
from halftone.files import write_json, write_text
from halftone.prompts import prompts_sha256
from halftone.provenance import Provenance
from halftone.proxy.accumulation import accumulation
from halftone.proxy.activations import outliers, range_drift, shortcut_halves
from halftone.proxy.attention import power_law, prompt_maximum, start_token
from halftone.proxy.finding import Finding, Verdict
from halftone.proxy.plots import svg
from halftone.proxy.walk import walk
from halftone.source import Source
from halftone.steps.choice import check_same_model
from halftone.trajectory import Trajectory
from halftone.unconditional import set_of

JSON, MARKDOWN = "card.json", "card.md"


class Card(BaseModel):
    """What was measured on which model, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str
    model_sha256: str
    denoiser: str
    scheduler: str
    steps: int
    calls: int
    guidance: float | None
    resolution: int | None
    n_prompts: int
    prompts_sha256: str
    seed: int
    bits: str
    findings: tuple[Finding, ...]

    def save(self, folder: Path) -> list[Path]:
        """Write card.json, card.md and the plots; returns them. What an earlier card left goes."""
        for old in folder.glob("proxy-*.svg"):
            old.unlink()
        plots = {figure(finding): text for finding in self.findings if (text := svg(finding)) is not None}
        for name, text in plots.items():
            write_text(folder / name, text)
        write_json(folder / JSON, self.model_dump(mode="json"))
        write_text(folder / MARKDOWN, markdown(self))
        return [folder / name for name in (JSON, MARKDOWN, *plots)]

    def figures(self) -> dict[str, float]:
        """The figures that decide, by a short name, for tables of runs."""
        return {
            finding.key if place == 0 else f"{finding.key}_{place + 1}": test.figure
            for finding in self.findings
            for place, test in enumerate(finding.tests)
            if test.figure is not None
        }


def make_card(
    source: Source,
    trajectory: Trajectory,
    known: Provenance,
    prompts: Sequence[str],
    *,
    name: str,
    bits: str,
    batch_size: int,
) -> Card:
    """Measure everything. trajectory: the model's own, in full precision, of these prompts.

    Raises UserError where the trajectory is another model's or of other prompts.
    """
    check_same_model(source, known)
    if known.prompts_sha256 != prompts_sha256(prompts):
        raise UserError(
            f"the trajectory was recorded with other prompts than these {len(prompts)}; "
            "give what calibration-data was given"
        )
    source.pipeline.to(device.best())
    seen = walk(denoiser_of(source.pipeline), trajectory, batch_size=batch_size)
    found = (
        range_drift(seen),
        outliers(seen),
        start_token(seen),
        prompt_maximum(seen),
        shortcut_halves(seen),
        power_law(seen),
        accumulation(source, trajectory, known, prompts, bits=bits, batch_size=batch_size),
    )
    return Card(
        name=name,
        model_sha256=known.model_sha256,
        denoiser=known.denoiser_class,
        scheduler=str(known.scheduler["class"]),
        steps=known.steps,
        calls=trajectory.n_calls,
        guidance=known.guidance,
        resolution=known.resolution,
        n_prompts=trajectory.n_prompts,
        prompts_sha256=known.prompts_sha256,
        seed=known.seed,
        bits=bits,
        findings=found,
    )


def figure(finding: Finding) -> str:
    """Name of the plot's file."""
    return f"proxy-{finding.key}.svg"


def markdown(card: Card, plots: str = "") -> str:
    """The card for people. plots: what their names begin with, seen from the card."""
    asked = "prompts" if set_of(card.prompts_sha256, card.n_prompts) is None else "images"
    guidance = f", guidance {card.guidance:g}" if card.guidance and card.guidance > 1 else ""
    lines = [
        f"# Proxy card of {card.name}",
        "",
        "Is what each published method addresses present in this model? Every threshold was set before "
        "anything was measured. Where a phenomenon is absent, the method's claim cannot be tested on this "
        "model, whatever its rows in a table say.",
        "",
        f"{card.denoiser}, weights {card.model_sha256[:12]}; {card.scheduler}, {card.steps} steps "
        f"({card.calls} calls){guidance}; {card.n_prompts} {asked} ({card.prompts_sha256[:12]}), seed "
        f"{card.seed}. Measured on the full-precision trajectory, at every activation that is quantized "
        "under protocol `equal`.",
        "",
        "| phenomenon | addressed by | figure | threshold | verdict |",
        "| --- | --- | --- | --- | --- |",
        *(_row(finding) for finding in card.findings),
    ]
    for finding in card.findings:
        lines += ["", *_section(finding, plots)]
    return "\n".join(lines) + "\n"


def _row(finding: Finding) -> str:
    figures = ", ".join(_number(test.figure) for test in finding.tests)
    thresholds = ", ".join(_number(test.threshold) for test in finding.tests)
    verdict = f"**{finding.verdict}**" if finding.verdict is Verdict.PRESENT else str(finding.verdict)
    return f"| {finding.title} | {', '.join(finding.methods)} | {figures} | {thresholds} | {verdict} |"


def _section(finding: Finding, plots: str) -> list[str]:
    lines = [f"## {finding.title}: {finding.verdict}", ""]
    for test in finding.tests:
        lines.append(
            f"- {_capital(test.measure)}: **{_number(test.figure)}**, threshold {_number(test.threshold)} "
            f"({test.reason})."
        )
    further: dict[str, Any] = {name: value for name, value in finding.further.items() if value is not None}
    if further:
        listed = "; ".join(f"{name} {_number(value)}" for name, value in further.items())
        lines += ["", f"Also: {listed}."]
    if finding.note:
        lines += ["", finding.note]
    lines += ["", f"{', '.join(finding.methods)}: {finding.consequence}. {finding.claim}"]
    if finding.verdict is not Verdict.NOT_APPLICABLE:
        lines += ["", f"![{finding.title}]({plots}{figure(finding)})"]
    return lines


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
