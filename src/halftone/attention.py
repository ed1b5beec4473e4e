"""Attention whose q, k, v and probabilities exist as tensors, with a quantizer at each."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from halftone.errors import UserError
from halftone.text_memory import TextMemory


class QuantizedAttnProcessor(nn.Module):
    """Processor of a diffusers `Attention` that computes softmax(q kᵀ / √d) v step by step, self and cross.

    q, k, v pass their quantizers as (batch * heads, tokens, head width), the probabilities as (batch * heads,
    query tokens, key tokens). The softmax is taken in float32. Without quantizers, or with all of them off,
    float32 results are bit for bit those of diffusers' `AttnProcessor`. Where the site of the
    probabilities leaves a start token out, its key and its column pass by their quantizers (DGQ).
    """

    materialises_probabilities = True

    def __init__(
        self,
        query: nn.Module | None = None,
        key: nn.Module | None = None,
        value: nn.Module | None = None,
        probabilities: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.probabilities = query, key, value, probabilities
        self.start_apart = bool(getattr(getattr(probabilities, "site", None), "start", False))
        self.memory = TextMemory()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """`forward`, under a signature that diffusers can read: it drops what a processor does not name."""
        found: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return found

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(batch, tokens, channels) or (batch, channels, height, width), and the same out."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        keys_from = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, n_keys, _ = keys_from.shape
        mask: Any = attention_mask
        mask = attn.prepare_attention_mask(mask, n_keys, batch)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            keys_from = hidden_states
        elif attn.norm_cross:
            keys_from = attn.norm_encoder_hidden_states(encoder_hidden_states)

        query = self._heads(attn, attn.to_q(hidden_states), attn.norm_q)
        if encoder_hidden_states is None:
            key, value = attn.to_k(keys_from), attn.to_v(keys_from)
        else:
            key = self.memory.project("key", attn.to_k, keys_from)
            value = self.memory.project("value", attn.to_v, keys_from)
        key, value = self._heads(attn, key, attn.norm_k), self._heads(attn, value, None)
        hidden_states = attn.batch_to_head_dim(self.attend(attn, query, key, value, mask))
        for module in attn.to_out:  # projection, dropout
            hidden_states = module(hidden_states)
        if image_shape is not None:
            hidden_states = hidden_states.transpose(-1, -2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def attend(
        self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention of one head and sample a row: (batch * heads, tokens, head width), and the same out."""
        return self.mix(self.weights(attn, query, key, mask), value)

    def weights(self, attn: Attention, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """Probabilities of q and k before their own quantizer: (batch * heads, query tokens, key tokens)."""
        if self.query is not None:
            query = self.query(query)
        if self.key is not None:
            key = self._but_start(self.key, key, 1)
        return _probabilities(attn, query, key, mask).to(query.dtype)

    def mix(self, probabilities: Tensor, value: Tensor) -> Tensor:
        """Probabilities x v, each after its quantizer."""
        if self.value is not None:
            value = self.value(value)
        if self.probabilities is not None:
            probabilities = self._but_start(self.probabilities, probabilities, 2)
        return torch.bmm(probabilities, value)

    def _but_start(self, quantizer: nn.Module, x: Tensor, axis: int) -> Tensor:
        """A tensor after its quantizer; of the tokens along `axis`, a start token stays as it is."""
        if not self.start_apart:
            return quantizer(x)
        first, rest = x.split([1, x.shape[axis] - 1], axis)
        return torch.cat([first, quantizer(rest)], axis)

    @staticmethod
    def _heads(attn: Attention, x: Tensor, norm: nn.Module | None) -> Tensor:
        x = x.view(x.shape[0], x.shape[1], attn.heads, -1).transpose(1, 2)
        return (x if norm is None else norm(x)).flatten(0, 1)


def _probabilities(attn: Attention, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    if attn.upcast_attention:
        query, key = query.float(), key.float()
    shape = query.shape[0], query.shape[1], key.shape[1]
    start = torch.empty(shape, dtype=query.dtype, device=query.device) if mask is None else mask
    scores = torch.baddbmm(start, query, key.transpose(1, 2), beta=int(mask is not None), alpha=attn.scale)
    return scores.softmax(dim=-1, dtype=torch.float32)


def install(attention: Attention, processor: QuantizedAttnProcessor) -> None:
    """Make `processor` the attention's own. Another one would silently leave its sites in float, so until the
    replaced one is put back, all others are refused with a UserError."""
    replaced = attention.processor
    attention.set_processor(processor)
    attention.set_processor = _Fixed(attention, replaced)


class _Fixed:
    """Stands in for `Attention.set_processor`."""

    def __init__(self, attention: Attention, replaced: Any) -> None:
        self.attention, self.replaced = attention, replaced

    def __call__(self, processor: Any) -> None:
        if processor is not self.replaced:
            raise UserError(
                f"{type(processor).__name__} cannot replace the attention processor of a quantized denoiser: "
                "its probabilities would stay in float; leave out attention slicing, xformers and the like"
            )
        del self.attention.set_processor
        self.attention.set_processor(processor)
