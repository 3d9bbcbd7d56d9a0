"""What diffusers calls the layers of unCLIP, and this package's models with those names: the one table for both ways.

The export says what a file of theirs must have: `karlo.py` makes it of a model without numbers, and compares names and shapes.
"""

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from minunclip.config import CLIPConfig, DecoderConfig, DiffusionPriorConfig, UNetConfig

State = Mapping[str, Tensor]
Layers = dict[str, tuple[str, ...]]  # a layer here, and those there whose weights and biases, one below the other, are its own

PRIOR: Layers = {
    "condition.text": ("encoder_hidden_states_proj",),
    "condition.embedding": ("embedding_proj",),
    "timestep.0": ("time_embedding.linear_1",),
    "timestep.2": ("time_embedding.linear_2",),
    "noised": ("proj_in",),
    "norm": ("norm_out",),
    "to_embedding": ("proj_to_clip_embeddings",),
}
PRIOR_BLOCK: Layers = {
    "norm1": ("norm1",),
    "attention.to_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention.to_out": ("attn1.to_out.0",),
    "norm2": ("norm3",),
    "mlp.0": ("ff.net.0.proj",),
    "mlp.2": ("ff.net.2",),
}
TEXT: Layers = {
    "token_embedding": ("text_model.embeddings.token_embedding",),
    "text_final_norm": ("text_model.final_layer_norm",),
    "text_projection": ("text_projection",),
}
TEXT_BLOCK: Layers = {
    "norm1": ("layer_norm1",),
    "attention.to_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.to_out": ("self_attn.out_proj",),
    "norm2": ("layer_norm2",),
    "mlp.0": ("mlp.fc1",),
    "mlp.2": ("mlp.fc2",),
}
TEXT_PROJ: Layers = {
    "embedding_to_vector": ("clip_image_embeddings_project_to_time_embeddings",),
    "embedding_to_tokens": ("clip_extra_context_tokens_proj",),
    "caption_to_vector": ("embedding_proj",),
    "text_to_context.0": ("encoder_hidden_states_proj",),
    "text_to_context.1": ("text_encoder_hidden_states_norm",),
}
UNET: Layers = {
    "timestep_mlp.mlp.0": ("time_embedding.linear_1",),
    "timestep_mlp.mlp.2": ("time_embedding.linear_2",),
    "unet.conv_in": ("conv_in",),
    "unet.norm_out": ("conv_norm_out",),
    "unet.conv_out": ("conv_out",),
}
UNET_BLOCK: Layers = {
    "block.norm1": ("norm1",),
    "block.conv1": ("conv1",),
    "block.norm2": ("norm2",),
    "block.conv2": ("conv2",),
    "block.skip": ("conv_shortcut",),
}
UNET_ATTENTION: Layers = {
    "attention.norm": ("group_norm",),
    "attention.to_qkv": ("to_q", "to_k", "to_v"),
    "attention.context_to_kv": ("add_k_proj", "add_v_proj"),
    "attention.to_out": ("to_out.0",),
}


def _under(here: str, there: str, layers: Layers) -> Layers:
    return {here + ours: tuple(there + name for name in theirs) for ours, theirs in layers.items()}


def to_theirs(state: State, layers: Layers) -> dict[str, Tensor]:
    """Those layers that there are, with their names."""
    theirs: dict[str, Tensor] = {}
    for layer, names in layers.items():
        for kind in ("weight", "bias"):
            if f"{layer}.{kind}" in state:
                parts = state[f"{layer}.{kind}"].chunk(len(names))
                theirs |= {f"{name}.{kind}": part for name, part in zip(names, parts)}
    return theirs


def to_ours(state: State, layers: Layers) -> dict[str, Tensor]:
    """The inverse of `to_theirs`."""
    ours: dict[str, Tensor] = {}
    for layer, names in layers.items():
        for kind in ("weight", "bias"):
            if f"{names[0]}.{kind}" in state:
                parts = [state[f"{name}.{kind}"] for name in names]
                ours[f"{layer}.{kind}"] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return ours


def prior_layers(config: DiffusionPriorConfig) -> Layers:
    layers = dict(PRIOR)
    for i in range(config.transformer.layers):
        layers |= _under(f"transformer.blocks.{i}.", f"transformer_blocks.{i}.", PRIOR_BLOCK)
    return layers


def prior_to_theirs(state: State, config: DiffusionPriorConfig) -> dict[str, Tensor]:
    theirs = to_theirs(state, prior_layers(config))
    theirs["embedding_proj.weight"] = theirs["embedding_proj.weight"] * config.embedding_dim**0.5  # z_t is scaled here, not there
    theirs["positional_embedding"] = torch.cat([state["condition.positions"], state["positions"]])[None]
    theirs["prd_embedding"] = state["final"][None, None]
    return theirs | {"clip_mean": state["mean"][None], "clip_std": state["std"][None]}


def text_layers(config: CLIPConfig) -> Layers:
    layers = dict(TEXT)
    for i in range(config.text.layers):
        layers |= _under(f"text_transformer.blocks.{i}.", f"text_model.encoder.layers.{i}.", TEXT_BLOCK)
    return layers


def text_to_theirs(state: State, config: CLIPConfig) -> dict[str, Tensor]:
    return to_theirs(state, text_layers(config)) | {"text_model.embeddings.position_embedding.weight": state["text_positions"]}


def unet_layers(config: UNetConfig) -> Layers:
    """Ours is one list of blocks down and one up; theirs has a list for each level, and another for what resamples."""
    levels, layers = len(config.multipliers), dict(UNET)
    block = UNET_BLOCK | {"block.to_scale_shift" if config.timestep == "scale_shift" else "block.to_shift": ("time_emb_proj",)}

    def add(ours: str, resnet: str, attention: str = "none") -> None:
        layers.update(_under(f"unet.{ours}.", f"{resnet}.", block) | _under(f"unet.{ours}.", f"{attention}.", UNET_ATTENTION))

    for way, blocks, resampler in (("down", config.blocks, "downsamplers"), ("up", config.blocks + 1, "upsamplers")):
        for level in range(levels):
            first = level * (blocks + 1)
            for i in range(blocks):
                add(f"{way}.{first + i}", f"{way}_blocks.{level}.resnets.{i}", f"{way}_blocks.{level}.attentions.{i}")
            if level < levels - 1:
                add(f"{way}.{first + blocks}", f"{way}_blocks.{level}.{resampler}.0")
    add("middle.0", "mid_block.resnets.0", "mid_block.attentions.0")
    add("middle.1", "mid_block.resnets.1")
    return layers


def decoder_to_theirs(state: State, config: DecoderConfig, unproject: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the U-Net's, the text projection's). `unproject` (text width, d) takes back what `decoder_from_diffusers` has folded into the caption's map."""
    scale = config.embedding_dim**0.5
    proj = to_theirs(state, TEXT_PROJ)
    proj["embedding_proj.weight"] = proj["embedding_proj.weight"] @ unproject
    proj["clip_image_embeddings_project_to_time_embeddings.weight"] = proj["clip_image_embeddings_project_to_time_embeddings.weight"] * scale
    for kind, factor in (("weight", scale), ("bias", 1.0)):
        name = f"clip_extra_context_tokens_proj.{kind}"
        proj[name] = rearrange(proj[name], "(tokens c) ... -> (c tokens) ...", tokens=config.context_tokens) * factor
    proj["learned_classifier_free_guidance_embeddings"] = state["null_embedding"] / scale
    return to_theirs(state, unet_layers(config.unet)), proj
