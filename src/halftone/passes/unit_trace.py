"""How the units of a denoiser are called: in which order, with which arguments, at which cost.

A unit is called with whatever its denoiser passes (hidden states, time embedding, text states, masks, ...),
so the arguments are taken as they come: a tree of leaves, some of which have one row per sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halftone.errors import UserError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def leaves(tree: Any) -> list[Any]:
    """Everything in nested tuples, lists and dicts that is none of these, in order."""
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in leaves(part)]
    if isinstance(tree, tuple | list):
        return [leaf for part in tree for leaf in leaves(part)]
    return [tree]


def with_leaves(tree: Any, values: Sequence[Any]) -> Any:
    """`tree` with its leaves replaced, in order, by `values`."""
    remaining = iter(values)

    def rebuild(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: rebuild(part) for key, part in node.items()}
        if isinstance(node, tuple | list):
            return tuple(rebuild(part) for part in node)
        return next(remaining)

    return rebuild(tree)


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors a unit returned: one, or both streams of a joint transformer block."""
    return [leaf for leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@dataclass(frozen=True)
class Signature:
    """How one unit is called, as seen on batches of one and of two rows.

    `arguments` are those of the one-row call; `by_row[k]` says that their leaf k has one row per sample;
    `bytes_per_row` counts cached inputs and outputs in float32; `macs` is multiply-accumulates of Linear
    and Conv2d per row.
    """

    unit: str
    arguments: Arguments
    by_row: tuple[bool, ...]
    bytes_per_row: int
    macs: int


def trace(
    denoiser: nn.Module, units: Iterable[str], one_row: dict[str, Any], two_rows: dict[str, Any]
) -> list[Signature]:
    """Signatures of the units that run, in the order in which they run.

    `one_row` and `two_rows` are keyword arguments of the denoiser. Raises UserError for a unit that cannot be
    reconstructed: one that runs several times in a call of the denoiser, or whose inputs mix the samples.
    """
    seen: dict[str, list[tuple[Arguments, Any]]] = {}
    macs: dict[str, int] = {}
    hooks = []

    def watch(unit: str) -> None:
        def observe(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.setdefault(unit, []).append(((args, kwargs), output))

        def count(layer: nn.Linear | nn.Conv2d, _: Any, output: Tensor) -> None:
            macs[unit] = macs.get(unit, 0) + output.numel() * layer.weight[0].numel()

        module = denoiser.get_submodule(unit)
        hooks.append(module.register_forward_hook(observe, with_kwargs=True))
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        hooks.extend(layer.register_forward_hook(count) for layer in layers)

    for unit in units:
        watch(unit)
    try:
        with torch.no_grad():
            denoiser(**one_row)
            order = list(seen)
            denoiser(**two_rows)
    finally:
        for hook in hooks:
            hook.remove()
    return [_signature(unit, seen[unit], macs.get(unit, 0) // 3) for unit in order]


def _signature(unit: str, calls: list[tuple[Arguments, Any]], macs: int) -> Signature:
    remedy = "choose rounding nearest for this model"
    if len(calls) != 2:
        raise UserError(
            f"{unit}: runs {len(calls) // 2} times in a denoiser call, reconstruction takes one; {remedy}"
        )
    (arguments, output), (of_two, output_of_two) = calls
    by_row = tuple(_has_rows(*pair) for pair in zip(leaves(arguments), leaves(of_two), strict=True))
    outputs = [_has_rows(*pair) for pair in zip(tensors_of(output), tensors_of(output_of_two), strict=True)]
    if None in by_row or not outputs or not all(outputs):
        raise UserError(f"{unit}: its inputs and outputs do not have one row per sample; {remedy}")
    # detached copies: the denoiser may write into its own tensors later
    kept = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves(arguments)]
    rows = [leaf for leaf, has_rows in zip(kept, by_row, strict=True) if has_rows]
    size = 4 * sum(tensor.numel() for tensor in [*rows, *tensors_of(output)])
    return Signature(unit, with_leaves(arguments, kept), tuple(map(bool, by_row)), size, macs)


def _has_rows(one: Any, two: Any) -> bool | None:
    """Whether a leaf, in a batch of one and of two, has one row per sample; None: another number of rows."""
    if not isinstance(one, Tensor) or one.shape == two.shape:
        return False
    return True if (one.shape[0], two.shape[0]) == (1, 2) else None
