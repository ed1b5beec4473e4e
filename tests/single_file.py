"""A Stable Diffusion pipeline as the single file of other tools, with its weights' original names."""

from __future__ import annotations

import re
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = [
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"to_([qkv])", r"\1"),
]


def save_single_file(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """For U-Nets of one layer per block."""
    state: dict[str, Tensor] = {}
    for name, value in pipeline.unet.state_dict().items():
        state[f"model.diffusion_model.{_unet_name(name)}"] = value
    levels = len(pipeline.vae.config.block_out_channels)
    for name, value in pipeline.vae.state_dict().items():
        attention = ".attentions." in name and "group_norm" not in name and name.endswith("weight")
        state[f"first_stage_model.{_vae_name(name, levels)}"] = (
            value[:, :, None, None] if attention else value
        )
    for name, value in pipeline.text_encoder.state_dict().items():
        inner = name if name.startswith("text_model.") else f"text_model.{name}"
        state[f"cond_stage_model.transformer.{inner}"] = value
    save_file({name: value.contiguous().clone() for name, value in state.items()}, path)


def _unet_name(name: str) -> str:
    for ours, theirs in _TOP.items():
        if name.startswith(f"{ours}."):
            name = name.replace(ours, theirs, 1)
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
        side, block, kind, place, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        first = 2 * block + place
        home = f"input_blocks.{first + 1}" if side == "down" else f"output_blocks.{first}"
        if kind == "downsamplers":
            name = f"input_blocks.{2 * (block + 1)}.0.{rest.replace('conv', 'op')}"
        elif kind == "upsamplers":
            name = f"output_blocks.{2 * block + 1}.2.{rest}"
        else:
            name = f"{home}.{int(kind == 'attentions')}.{rest}"
    if ".transformer_blocks." not in name:
        parts = name.split(".")
        name = ".".join(_RESNET.get(part, part) for part in parts)
    return name


def _vae_name(name: str, levels: int) -> str:
    if found := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets\.(\d+)|upsamplers\.0)\.(.*)", name):
        level = levels - 1 - int(found[1])
        name = f"decoder.up.{level}." + (f"block.{found[3]}" if found[3] else "upsample") + f".{found[4]}"
    for ours, theirs in _VAE:
        name = re.sub(ours, theirs, name)
    return name
