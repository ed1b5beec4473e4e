"""Safetensors files that hold exactly the tensors expected: any other key, type or shape is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from halftone.components import first_line
from halftone.errors import UserError

Expected = dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]  # key -> (types allowed, shape)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FLOAT = "float/"  # before the name of a state dict's entry that stayed in float
_NAMES = {"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
_NAMES |= {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_NAMES |= {"BOOL": torch.bool}


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """The same bytes for the same tensors."""
    # one key of metadata only: safetensors writes several in no fixed order
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})


def read(path: Path, expected: Expected, positive: Iterable[str] = ()) -> dict[str, Tensor]:
    """All tensors of a file; keys, types and shapes are checked before any is read.

    positive: keys of scales. Raises UserError naming the key for any other set of keys, a wrong type or
    shape, NaN or infinity, and a scale that is not positive.
    """
    try:
        with safe_open(path, framework="pt") as file:
            _check_keys(path, set(file.keys()), expected)
            for name, (dtypes, shape) in expected.items():
                piece = file.get_slice(name)
                found, dtype = tuple(piece.get_shape()), _NAMES.get(piece.get_dtype())
                if dtype not in dtypes:
                    wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
                    raise UserError(f"{path}: {name} is {piece.get_dtype()}, it should be {wanted}")
                if found != shape:
                    raise UserError(f"{path}: {name} has shape {found}, it should be {shape}")
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as fault:
        raise UserError(f"{path}: not sound ({first_line(fault)}); get the artefact again") from None
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{path}: {name} holds NaN or infinity")
    for name in positive:
        if not (tensors[name] > 0).all():
            raise UserError(f"{path}: {name} holds a scale that is not positive")
    return tensors


def _check_keys(path: Path, found: set[str], expected: Iterable[str]) -> None:
    wanted = set(expected)
    for problem, names in (("lacks", wanted - found), ("has the unknown", found - wanted)):
        if names:
            raise UserError(
                f"{path}: {problem} {min(names)[:200]} ({len(names)} in all); get the artefact again"
            )


def smallest(value: Tensor) -> Tensor:
    """The same values in the smallest of float16, bfloat16, float32 that holds each of them exactly."""
    if not value.is_floating_point():
        return value
    value = value.float()
    return next(value.to(dtype) for dtype in FLOATS if torch.equal(value.to(dtype).float(), value))


def types_of(value: Tensor) -> tuple[torch.dtype, ...]:
    """The types in which `smallest` may have stored an entry like this one."""
    return FLOATS if value.is_floating_point() else (value.dtype,)


def float_names(path: Path) -> list[str]:
    """The entries of a state dict that stayed in float, sorted."""
    with safe_open(path, framework="pt") as file:
        return sorted(name.removeprefix(FLOAT) for name in set(file.keys()) if name.startswith(FLOAT))


def float_bytes(path: Path) -> int:
    """Bytes of the tensors that stayed in float."""
    with safe_open(path, framework="pt") as file:
        pieces = [file.get_slice(name) for name in set(file.keys()) if name.startswith(FLOAT)]
        return sum(prod(p.get_shape()) * _NAMES[p.get_dtype()].itemsize for p in pieces)
