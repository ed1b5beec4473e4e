"""Verbs for people without a workflow: `plan` before anything is spent, `quantize` from model to artefact."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from halftone import tracking
from halftone.cli import options
from halftone.errors import UserError
from halftone.settings import Budget, Components, Protocol

MODEL_HELP = "Diffusers folder, .safetensors file, or hub id (with --revision); none with --workflow."


def quantize(
    model: options.ModelArgument,
    recipe: options.Recipe,
    bits: options.BitsOption,
    output: options.Output,
    prompts: options.Prompts = None,
    revision: options.Revision = None,
    axes: options.AxesOption = None,
    protocol: options.ProtocolOption = Protocol.EQUAL,
    n_prompts: Annotated[
        int, typer.Option(min=1, max=10_000, help="Prompts used, from the top of the file; or images.")
    ] = options.CALIBRATION.n_prompts,
    steps: options.Steps = 25,
    guidance: options.Guidance = None,
    resolution: options.Resolution = None,
    budget: Annotated[Budget, typer.Option(help="Iterations of block reconstruction.")] = Budget.FAST,
    batch_size: options.BatchSize = options.CALIBRATION.batch_size,
    seed: options.Seed = 0,
    components: options.ComponentsOption = Components.COPY,
) -> None:
    """Quantize a model and write the artefact: the whole chain in one process."""
    started = time.time()
    options.model(model, revision)
    options.resolution(resolution)
    resolved, width = options.axes(recipe, axes), options.bits(bits)
    texts = options.calibration(prompts, n_prompts)

    from halftone import chain
    from halftone.artefact import info

    chain.quantize(
        model,
        recipe,
        None if isinstance(texts, int) else texts,
        output,
        bits=width,
        axes=resolved,
        protocol=protocol,
        revision=revision,
        n_prompts=n_prompts,
        steps=steps,
        guidance=guidance,
        resolution=resolution,
        budget=budget,
        batch_size=batch_size,
        seed=seed,
        components=components,
    )
    facts = info(output)
    print(f"{output}: {facts['weight_mib']} MiB of weights instead of {facts['original_weight_mib']} MiB")
    tracking.log(
        tracking.Record(
            "quantize",
            output.name,
            output,
            params={"model": model, "recipe": recipe, "bits": bits, "steps": steps, "guidance": guidance},
            metrics={"weight_mib": facts["weight_mib"], "size_mib": facts["size_mib"]},
            files=(output / "plan.json",),
            started=started,
        )
    )


def plan(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    recipe: options.Recipe = "minmax",
    bits: options.BitsOption = "w4a8",
    revision: options.Revision = None,
    axes: options.AxesOption = None,
    protocol: options.ProtocolOption = Protocol.EQUAL,
    steps: options.Steps = 25,
    resolution: options.Resolution = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the plan as JSON.", show_default=False)
    ] = None,
    workflow: Annotated[
        bool, typer.Option("--workflow", help="Instead: the jobs of params.yaml, with time and disk.")
    ] = False,
    overlay: Annotated[
        list[str] | None,
        typer.Option(help="With --workflow: lay experiments/NAME.yaml over params.yaml.", show_default=False),
    ] = None,
) -> None:
    """Say what would be done, before anything is spent: sites, what stays in float and why, sizes; of the
    workflow its jobs, their time and disk."""
    if workflow:
        if model is not None:
            raise UserError("plan: give a model, or --workflow, not both")
        _plan_workflow(overlay or [])
        return
    if model is None:
        raise UserError("plan: give a model, or --workflow for the jobs of params.yaml")
    options.model(model, revision)
    options.resolution(resolution)
    resolved, width = options.axes(recipe, axes), options.bits(bits)

    from halftone.analysis import resolve
    from halftone.plan import describe_relaxing, describe_start_token
    from halftone.runtime import choose
    from halftone.skeleton import read_skeleton

    skeleton = read_skeleton(model, revision, resolution)
    calls = skeleton.calls(steps)
    found = resolve(skeleton, recipe=recipe, axes=resolved, bits=width, protocol=protocol, calls=calls)
    if output is not None:
        found.save(output)
    print(f"{found.denoiser} of {model}: {recipe} {width}, protocol {protocol}, {calls} calls an image\n")
    for kind, how, number in found.counts():
        print(f"{number:6}  {kind:14} {how}")
    for reason, names in found.float_list():
        print(f"\nin float, {reason}:")
        for name in names:
            print(f"        {name}")
    sizes = found.sizes
    instead = f"instead of {sizes.original_mib:.1f} MiB, {sizes.ratio:.2f} times less"
    print(f"\nweights  {sizes.weight_mib:.1f} MiB {instead}")
    if found.bit_operations is not None:
        print(f"a call   {found.bit_operations.ratio:.1f} times fewer bit operations")
    if (relaxed := describe_relaxing(found)) is not None:
        print(f"relaxed  {relaxed}")
    if (start := describe_start_token(found)) is not None:
        print(f"start token {start}")
    print(f"run by   {found.execution} execution")
    decisions = choose.choose(found, skeleton.denoiser)
    for line in options.kernels(choose.kernels(decisions), choose.fallbacks(decisions)):
        print(line)


def _plan_workflow(overlays: list[str]) -> None:
    from halftone import estimate
    from halftone.progress import clock
    from halftone.workflow import config, models

    settings = config.settings([config.overlay(name) for name in overlays])
    for row in settings.rows():  # sizes and times of a model that is not there would be invented
        models.files(settings.models[settings.scenarios[row].model])
    jobs = estimate.jobs(settings, gpu=Path("/dev/nvidia0").exists())
    width = max(len(job.key) for job in jobs)
    for job in jobs:
        known = "" if estimate.measured(job.rule, job.key) is None else "  (measured)"
        print(f"{job.rule:18} {job.key:{width}} {clock(job.seconds):>9}{known}")
    total = sum(job.seconds for job in jobs)
    print(f"\n{len(jobs)} jobs, {clock(total)} of work on one core; jobs beside each other on more")
    print(f"about {estimate.disk_mib(settings):.0f} MiB of disk for results")
