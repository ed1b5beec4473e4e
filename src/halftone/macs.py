"""Multiply-accumulates of one denoiser call, module by module, found without computing anything.

The denoiser is run once on the meta device, where tensors have shapes and no values: SDXL takes two seconds
and no memory. Counted are the products that quantization can touch: Linear, Conv2d, and the two matrix
products inside attention. Norms, activations and softmax are left out (as in DGQ's bit operations).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one call on one latent (classifier-free guidance doubles them).

    `layers`: of each Linear and Conv2d by module name. `attention`: of each attention module, and of *one*
    of its two products (query by key, probabilities by value), which cost the same.
    """

    layers: Mapping[str, int] = field(default_factory=dict)
    attention: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.layers.values()) + 2 * sum(self.attention.values())


def count(denoiser: nn.Module, *, latent_size: int | None = None, text_tokens: int = 77) -> Macs | None:
    """`Macs` of a diffusers denoiser; None where its inputs cannot be told from its config.

    latent_size: height and width of the latents, in latent pixels (default: the config's sample_size).
    text_tokens: length of the text states.
    """
    config: Any = getattr(denoiser, "config", None)
    if config is None:
        return None
    # a full copy on the meta device, so that the caller's weights and hooks stay as they are
    skeleton = _skeleton(denoiser)
    inputs = _inputs(skeleton, config, latent_size, text_tokens)
    if inputs is None:
        return None
    layers: Counter[str] = Counter()
    lengths: dict[str, dict[str, tuple[int, int]]] = {}
    modules = dict(skeleton.named_modules())
    hooks = []
    for name, module in modules.items():
        if isinstance(module, nn.Linear | nn.Conv2d):
            hooks.append(module.register_forward_hook(_layer_hook(name, layers)))
        for part in ("to_q", "to_k"):
            child = getattr(module, part, None)
            if isinstance(child, nn.Linear):
                hooks.append(child.register_forward_hook(_length_hook(name, part, lengths)))
    try:
        with torch.no_grad():
            skeleton(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    attention = {
        name: seen["to_q"][0] * seen["to_k"][0] * seen["to_q"][1]
        for name, seen in lengths.items()
        if len(seen) == 2
    }
    return Macs(dict(layers), attention)


def _skeleton(denoiser: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {
        id(tensor): _meta(tensor)
        for tensor in [*denoiser.parameters(), *denoiser.buffers()]
        if tensor is not None
    }
    return copy.deepcopy(denoiser, memo).to("meta").eval()


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    bare = torch.empty_like(tensor, device="meta")
    return nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare


def _layer_hook(name: str, into: Counter[str]) -> Any:
    def hook(module: nn.Linear | nn.Conv2d, _: Any, output: torch.Tensor) -> None:
        into[name] += output.numel() * math.prod(module.weight.shape[1:])

    return hook


def _length_hook(name: str, part: str, into: dict[str, dict[str, tuple[int, int]]]) -> Any:
    def hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        into.setdefault(name, {})[part] = (output.shape[-2], output.shape[-1])

    return hook


def _inputs(
    skeleton: nn.Module, config: Any, latent_size: int | None, text_tokens: int
) -> dict[str, Any] | None:
    """Inputs of one forward, batch 1, on the meta device; None where they cannot be told."""
    accepted = inspect.signature(skeleton.forward).parameters
    first = next((name for name in ("sample", "hidden_states") if name in accepted), None)
    size = latent_size or config.get("sample_size")
    if first is None or size is None or "timestep" not in accepted or "pooled_projections" in accepted:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    dtype = next(skeleton.parameters()).dtype

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    inputs: dict[str, Any] = {
        first: empty(1, config["in_channels"], height, width),
        "timestep": torch.empty((1,), device="meta", dtype=torch.long),
        "return_dict": False,
    }
    if "encoder_hidden_states" in accepted:
        channels = config.get("caption_channels") or config.get("cross_attention_dim")
        if not isinstance(channels, int):
            return None
        inputs["encoder_hidden_states"] = empty(1, text_tokens, channels)
    if config.get("addition_embed_type") == "text_time":
        # SDXL: pooled text states and six sizes share the input of add_embedding
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {"text_embeds": empty(1, pooled), "time_ids": empty(1, 6)}
    elif "added_cond_kwargs" in accepted:  # PixArt
        inputs["added_cond_kwargs"] = {"resolution": empty(1, 2), "aspect_ratio": empty(1, 1)}
    if (
        "class_labels" in accepted
        and config.get("num_embeds_ada_norm")
        and "encoder_hidden_states" not in inputs
    ):
        inputs["class_labels"] = torch.empty((1,), device="meta", dtype=torch.long)
    return inputs
