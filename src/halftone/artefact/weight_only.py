"""int8.safetensors: a component of the pipeline with weights of 8 bits, dequantized once when it is loaded.

| key | dtype | shape |
| --- | --- | --- |
| codes/NAME | int8 | as the weight NAME: of a Linear, Conv2d, ConvTranspose2d or Embedding |
| scale | bfloat16 | (output channels of all of these, in the order of their sorted names,) |
| float/NAME | float16, else bfloat16, else float32 | as the entry NAME of the component's state dict |

A weight is `scale[c] * code`, symmetric, `c` its output channel, or the row of an embedding. A scale has the
eight significant bits of bfloat16, so that the products are exact in float32 and storing what was loaded
gives the same codes and scales again (our choice). Activations stay in float. A tensor with two names, such
as tied embeddings, is stored under the first. Which keys there are follows from the component's
configuration; reading refuses any other set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halftone.artefact import strict
from halftone.components import Entry, check_finite, empty_component, quiet, small_json, without_place
from halftone.files import write_json
from halftone.quantizers.affine import AffineParams, dequantize, fit_symmetric, quantize
from halftone.quantizers.granularity import PerChannel, reduce_minmax

FILE = "int8.safetensors"
BITS = 8
_CHANNELS_FIRST, _CHANNELS_SECOND = (nn.Linear, nn.Conv2d, nn.Embedding), (nn.ConvTranspose2d,)
_CODES, _SCALE = "codes/", "scale"


def save(folder: Path, name: str, module: nn.Module) -> None:
    """Write config.json and int8.safetensors of component `name` under `folder`; the module stays as it is.

    Raises UserError for NaN or infinity.
    """
    check_finite(module, name)
    (folder / name).mkdir()
    _write_config(folder / name, module)
    chosen, first = _weights(module), _first_names(module)
    tensors: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        if first.get(key, key) != key:
            continue
        if key in chosen:
            weight = value.cpu()
            params = _fit(weight, chosen[key])
            tensors[f"{_CODES}{key}"] = quantize(weight, params).to(torch.int8)
            scales[key] = params.scale.flatten()
        else:
            tensors[f"{strict.FLOAT}{key}"] = strict.smallest(value.cpu())
    if scales:
        tensors[_SCALE] = torch.cat([scales[key] for key in sorted(scales)]).bfloat16()
    strict.write(folder / name / FILE, tensors)


def _write_config(home: Path, module: Any) -> None:
    """config.json of a diffusers or transformers model, without the place where it was read."""
    with quiet():
        (module.save_config if hasattr(module, "save_config") else module.config.save_pretrained)(home)
    write_json(home / "config.json", without_place(small_json(home / "config.json")))


def load(folder: Path, entry: Entry, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The component under `folder`, in evaluation mode, its weights dequantized to `dtype`.

    What the class keeps in float32 where the rest is in 16 bits stays so. Raises UserError naming the cause
    for whatever is not as the configuration says.
    """
    module = empty_component(folder, entry, dtype)
    chosen, first = _weights(module), _first_names(module)
    state = {name: value for name, value in module.state_dict().items() if first.get(name, name) == name}
    positive = [_SCALE] if chosen else []
    tensors = strict.read(folder / entry.name / FILE, _expected(state, chosen), positive)
    found: dict[str, Tensor] = dict(_dequantized(tensors, state, chosen))
    found |= {name: tensors[f"{strict.FLOAT}{name}"] for name in state if name not in found}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    values: dict[str, Tensor] = {}
    for name, value in found.items():
        if value.is_floating_point():
            value = value.to(torch.float32 if _keeps_float32(module, name, dtype) else dtype)
        values[name] = nn.Parameter(value) if name in parameters else value
    whole = {name: values[first.get(name, name)] for name in module.state_dict()}
    module.load_state_dict(whole, strict=True, assign=True)
    return module


def _expected(state: dict[str, Tensor], chosen: dict[str, int]) -> strict.Expected:
    expected: strict.Expected = {}
    for name, value in state.items():
        if name in chosen:
            expected[f"{_CODES}{name}"] = (torch.int8,), tuple(value.shape)
        else:
            expected[f"{strict.FLOAT}{name}"] = strict.types_of(value), tuple(value.shape)
    if chosen:
        channels = sum(state[name].shape[axis] for name, axis in chosen.items())
        expected[_SCALE] = (torch.bfloat16,), (channels,)
    return expected


def _dequantized(
    tensors: dict[str, Tensor], state: dict[str, Tensor], chosen: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    names = sorted(chosen)
    sizes = [state[name].shape[chosen[name]] for name in names]
    scales = tensors[_SCALE].float().split(sizes) if names else ()
    for name, scale in zip(names, scales, strict=True):
        codes = tensors[f"{_CODES}{name}"]
        shape = [1] * codes.ndim
        shape[chosen[name]] = -1
        scale = scale.reshape(shape)
        yield name, dequantize(codes, AffineParams(scale, torch.zeros_like(scale), BITS, signed=True))


def _fit(weight: Tensor, axis: int) -> AffineParams:
    """Symmetric parameters per index of `axis`, scales in bfloat16: no code is clamped by their rounding."""
    lo, hi = reduce_minmax(weight.float(), PerChannel(axis))
    params = fit_symmetric(torch.maximum(-lo, hi), BITS)
    return replace(params, scale=params.scale.bfloat16().float())


def _weights(module: nn.Module) -> dict[str, int]:
    """Name in the state dict -> axis of the output channels, of every weight that is stored in 8 bits."""
    first = _first_names(module)
    found: dict[str, int] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        if not isinstance(layer, _CHANNELS_FIRST + _CHANNELS_SECOND):
            continue
        key = f"{name}.weight" if name else "weight"
        if layer.weight.is_floating_point() and layer.weight.numel() and first.get(key) == key:
            found[key] = 1 if isinstance(layer, _CHANNELS_SECOND) else 0
    return found


def _first_names(module: nn.Module) -> dict[str, str]:
    """Every parameter's name -> the first name of the same tensor."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(value), name)
        for name, value in module.named_parameters(remove_duplicate=False)
    }


def _keeps_float32(module: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether the class asks for float32 where the rest is in 16 bits, as from_pretrained reads it."""
    kept = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return dtype.itemsize == 2 and not kept.isdisjoint(name.split("."))
