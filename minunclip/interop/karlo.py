"""diffusers' unCLIP, and so Karlo's published weights (kakaobrain/karlo-v1-alpha), in this package's modules, and back.

The models are the same but for names, and for what is folded into the weights here, so that nothing else needs to know of it: queries, keys and
values lie in one matrix; embeddings come scaled by sqrt(d), and as four tokens in another order; two linear maps after one another are one. What
cannot be folded is a field of the config, with Karlo's name beside it.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from minunclip.config import CLIPConfig, DecoderConfig, DiffusionConfig, DiffusionPriorConfig, TransformerConfig, UNetConfig, UpsamplerConfig
from minunclip.loading import require_tensors
from minunclip.models.clip import CLIP
from minunclip.models.decoder import Decoder
from minunclip.models.diffusion_prior import LATENT_CLIP, DiffusionPrior
from minunclip.models.unet import group_norm
from minunclip.models.upsampler import Upsampler

State = Mapping[str, Tensor]
Layers = dict[str, tuple[str, ...]]  # a layer here, and those there whose weights and biases, one below the other, are its own

FAMILY = "another family, or a shard is missing"
OBJECTIVES = {"epsilon": "epsilon", "sample": "x0"}

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


# ---- names, and what a config must say ----


def _under(here: str, there: str, layers: Layers) -> Layers:
    return {here + ours: tuple(there + name for name in theirs) for ours, theirs in layers.items()}


def _to_theirs(state: State, layers: Layers) -> dict[str, Tensor]:
    """Those layers that there are, with their names."""
    theirs: dict[str, Tensor] = {}
    for layer, names in layers.items():
        for kind in ("weight", "bias"):
            if f"{layer}.{kind}" in state:
                parts = state[f"{layer}.{kind}"].chunk(len(names))
                theirs |= {f"{name}.{kind}": part for name, part in zip(names, parts)}
    return theirs


def _to_ours(state: State, layers: Layers) -> dict[str, Tensor]:
    """The inverse of `_to_theirs`."""
    ours: dict[str, Tensor] = {}
    for layer, names in layers.items():
        for kind in ("weight", "bias"):
            if f"{names[0]}.{kind}" in state:
                parts = [state[f"{name}.{kind}"] for name in names]
                ours[f"{layer}.{kind}"] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return ours


def _require(where: str, config: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    """ValueError unless a config of diffusers' has these values; a field that it does not name has diffusers' default, which is the one needed."""
    for name, value in needed.items():
        if config.get(name, value) != value:
            raise ValueError(f"{where}: {name} is {config[name]!r}, but this package's models have {value!r}: it belongs to another family than Karlo's")


def _process(where: str, scheduler: Mapping[str, Any], sampling_steps: int, clip: float) -> DiffusionConfig:
    """The diffusion process of a config of diffusers' UnCLIPScheduler."""
    _require(where, scheduler, {"_class_name": "UnCLIPScheduler", "beta_schedule": "squaredcos_cap_v2", "clip_sample": True, "clip_sample_range": clip})
    if (prediction := scheduler["prediction_type"]) not in OBJECTIVES:
        raise ValueError(f"{where}: prediction_type is {prediction!r}, must be one of {', '.join(OBJECTIVES)}")
    objective: Any = OBJECTIVES[prediction]
    learned = scheduler["variance_type"] == "learned_range"
    return DiffusionConfig("cosine", objective, learned, "ancestral", sampling_steps, scheduler["num_train_timesteps"])


def _built(kind: type[nn.Module], config: Any) -> nn.Module:
    """A model without numbers: neither memory nor random numbers for weights that are replaced at once."""
    with torch.device("meta"):
        return kind(config)


# ---- the prior ----


def _prior_layers(config: DiffusionPriorConfig) -> Layers:
    layers = dict(PRIOR)
    for i in range(config.transformer.layers):
        layers |= _under(f"transformer.blocks.{i}.", f"transformer_blocks.{i}.", PRIOR_BLOCK)
    return layers


def _prior_to_theirs(state: State, config: DiffusionPriorConfig) -> dict[str, Tensor]:
    theirs = _to_theirs(state, _prior_layers(config))
    theirs["embedding_proj.weight"] = theirs["embedding_proj.weight"] * config.embedding_dim**0.5  # z_t is scaled here, not there
    theirs["positional_embedding"] = torch.cat([state["condition.positions"], state["positions"]])[None]
    theirs["prd_embedding"] = state["final"][None, None]
    return theirs | {"clip_mean": state["mean"][None], "clip_std": state["std"][None]}


def prior_from_diffusers(
    state: State, config: Mapping[str, Any], scheduler: Mapping[str, Any], sampling_steps: int = 25, where: str = "the prior's state dict"
) -> DiffusionPrior:
    """diffusers' PriorTransformer and the UnCLIPScheduler that goes with it, as this package's prior, from state dict and configs.

    What stands for a dropped caption is all zeros, since diffusers reads an empty caption there: see `say_nothing_by_an_empty_caption`.
    ValueError names the first field, key or shape that does not fit, before anything is built.
    """
    fixed = {"added_emb_type": "prd", "additional_embeddings": 4, "encoder_hid_proj_type": "linear", "time_embed_act_fn": "silu"}
    absent = ("norm_in_type", "embedding_proj_norm_type", "time_embed_dim", "embedding_proj_dim", "clip_embed_dim")
    _require(where, config, fixed | dict.fromkeys(absent))
    dim, heads = config["embedding_dim"], config["num_attention_heads"]
    ours = DiffusionPriorConfig(
        embedding_dim=dim,
        text_width=dim,
        context_length=config["num_embeddings"],
        transformer=TransformerConfig(heads * config["attention_head_dim"], config["num_layers"], heads),
        diffusion=_process(where, scheduler, sampling_steps, LATENT_CLIP),
        latent="standardised",
        null_tokens=2,
        candidates=1,
    )
    model = cast(DiffusionPrior, _built(DiffusionPrior, ours))
    require_tensors(where, state, _prior_to_theirs(model.state_dict(), ours), "PriorTransformer", FAMILY)
    tensors = _to_ours(state, _prior_layers(ours))
    tensors["condition.embedding.weight"] = tensors["condition.embedding.weight"] / dim**0.5
    positions, width = state["positional_embedding"][0], ours.transformer.width
    tensors |= {"condition.positions": positions[:-3], "positions": positions[-3:], "final": state["prd_embedding"][0, 0]}
    tensors |= {"condition.null_text": positions.new_zeros(2, width), "condition.null_embedding": positions.new_zeros(width)}
    model.load_state_dict(tensors | {"mean": state["clip_mean"][0], "std": state["clip_std"][0]}, assign=True)
    return model.eval()


# ---- CLIP's text tower ----


def _text_layers(config: CLIPConfig) -> Layers:
    layers = dict(TEXT)
    for i in range(config.text.layers):
        layers |= _under(f"text_transformer.blocks.{i}.", f"text_model.encoder.layers.{i}.", TEXT_BLOCK)
    return layers


def _text_to_theirs(state: State, config: CLIPConfig) -> dict[str, Tensor]:
    return _to_theirs(state, _text_layers(config)) | {"text_model.embeddings.position_embedding.weight": state["text_positions"]}


def text_tower_from_diffusers(state: State, config: Mapping[str, Any], where: str = "the text encoder's state dict") -> CLIP:
    """transformers' CLIPTextModelWithProjection as a CLIP without an image tower, whose z_t keeps its norm, as diffusers' unCLIP wants it.

    ValueError as in `prior_from_diffusers`.
    """
    _require(where, config, {"layer_norm_eps": 1e-5, "intermediate_size": 4 * config["hidden_size"]})
    ours = CLIPConfig(
        image_size=224,  # of the image tower that goes with the text tower of a ViT-L/14; it is not built
        patch_size=14,
        vision=None,
        text=TransformerConfig(config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"], config["hidden_act"]),
        context_length=config["max_position_embeddings"],
        vocabulary_size=config["vocab_size"],
        embedding_dim=config["projection_dim"],
        unit_norm=False,
    )
    model = cast(CLIP, _built(CLIP, ours))
    state = {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}  # no weights
    require_tensors(where, state, _text_to_theirs(model.state_dict(), ours), "CLIPTextModelWithProjection", FAMILY)
    tensors = _to_ours(state, _text_layers(ours)) | {"text_positions": state["text_model.embeddings.position_embedding.weight"]}
    model.load_state_dict(tensors | {"logit_scale": tensors["text_positions"].new_tensor(math.log(1 / 0.07))}, assign=True)
    return model.eval()


# ---- the U-Nets ----


def _unet_layers(config: UNetConfig) -> Layers:
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


def _unet_config(where: str, config: Mapping[str, Any], down: Mapping[str, bool], up: Mapping[str, bool]) -> UNetConfig:
    """From a config of diffusers'; `down` and `up`: the kinds of blocks that there may be, and whether they have attention."""
    fixed = {"act_fn": "silu", "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False, "mid_block_scale_factor": 1}
    _require(where, config, fixed | {"time_embedding_type": "positional", "time_embedding_dim": None})
    widths, kinds, size = config["block_out_channels"], config["down_block_types"], config["sample_size"]
    for name, known in (("down_block_types", down), ("up_block_types", up)):
        if odd := [kind for kind in config[name] if kind not in known]:
            raise ValueError(f"{where}: {name} has {odd[0]!r}, must be of {', '.join(known)}: it belongs to another family than Karlo's")
    attention = [down[kind] for kind in kinds]
    if attention != [up[kind] for kind in reversed(config["up_block_types"])]:
        raise ValueError(f"{where}: up_block_types have attention elsewhere than down_block_types: this package's U-Net cannot")
    for width in widths:
        if width % widths[0]:
            raise ValueError(f"{where}: block_out_channels {list(widths)} must all be multiples of the first")
        if (groups := group_norm(width).num_groups) != config["norm_num_groups"]:
            raise ValueError(f"{where}: norm_num_groups is {config['norm_num_groups']}, but this package gives {width} channels {groups} groups")
    return UNetConfig(
        width=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=config["layers_per_block"],
        attention_at=tuple(size >> level for level, has in enumerate(attention) if has),
        head_channels=config["attention_head_dim"],
        dropout=config.get("dropout", 0.0),
        timestep="scale_shift" if config["resnet_time_scale_shift"] == "scale_shift" else "add",
    )


def _decoder_to_theirs(state: State, config: DecoderConfig, unproject: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the U-Net's, the text projection's). `unproject` (text width, d) takes back what `decoder_from_diffusers` has folded into the caption's map."""
    scale = config.embedding_dim**0.5
    proj = _to_theirs(state, TEXT_PROJ)
    proj["embedding_proj.weight"] = proj["embedding_proj.weight"] @ unproject
    proj["clip_image_embeddings_project_to_time_embeddings.weight"] = proj["clip_image_embeddings_project_to_time_embeddings.weight"] * scale
    for kind, factor in (("weight", scale), ("bias", 1.0)):
        name = f"clip_extra_context_tokens_proj.{kind}"
        proj[name] = rearrange(proj[name], "(tokens c) ... -> (c tokens) ...", tokens=config.context_tokens) * factor
    proj["learned_classifier_free_guidance_embeddings"] = state["null_embedding"] / scale
    return _to_theirs(state, _unet_layers(config.unet)), proj


def decoder_from_diffusers(
    state: State,
    config: Mapping[str, Any],
    text_proj_state: State,
    text_proj_config: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    clip: CLIP,
    sampling_steps: int = 25,
    where: tuple[str, str] = ("the decoder's state dict", "the text projection's state dict"),
) -> Decoder:
    """diffusers' UNet2DConditionModel, UnCLIPTextProjModel and UnCLIPScheduler as this package's decoder; `clip` from `text_tower_from_diffusers`.

    The decoder has `clip`'s text transformer for its own: the same tensors, so it takes no more memory. Dropped captions and ValueError as in
    `prior_from_diffusers`.
    """
    fixed = {"in_channels": 3, "class_embed_type": "identity", "resnet_time_scale_shift": "scale_shift", "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}
    absent = ("cross_attention_norm", "encoder_hid_dim", "addition_embed_type", "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim")
    plain = {"only_cross_attention": False, "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "class_embeddings_concat": False}
    _require(where[0], config, fixed | dict.fromkeys(absent) | plain)
    down = {"ResnetDownsampleBlock2D": False, "SimpleCrossAttnDownBlock2D": True}
    unet = _unet_config(where[0], config, down, {"ResnetUpsampleBlock2D": False, "SimpleCrossAttnUpBlock2D": True})
    dim, tower = clip.config.embedding_dim, clip.config
    _require(where[1], text_proj_config, {"clip_embeddings_dim": dim, "time_embed_dim": 4 * unet.width, "cross_attention_dim": config["cross_attention_dim"]})
    ours = DecoderConfig(
        image_size=config["sample_size"],
        embedding_dim=dim,
        vocabulary_size=tower.vocabulary_size,
        context_length=tower.context_length,
        text=tower.text,
        unet=unet,
        diffusion=_process(where[0], scheduler, sampling_steps, 1.0),
        context_tokens=text_proj_config["clip_extra_context_tokens"],
        text_start="clip",
        context_width=config["cross_attention_dim"],
        null_tokens=2,
    )
    model = cast(Decoder, _built(Decoder, ours))
    expected = _decoder_to_theirs(model.state_dict(), ours, torch.empty(tower.text.width, dim, device="meta"))
    require_tensors(where[0], state, expected[0], "UNet2DConditionModel", FAMILY)
    require_tensors(where[1], text_proj_state, expected[1], "UnCLIPTextProjModel", FAMILY)
    tensors = _to_ours(state, _unet_layers(unet)) | _to_ours(text_proj_state, TEXT_PROJ)
    scale = dim**0.5
    tensors["embedding_to_vector.weight"] = tensors["embedding_to_vector.weight"] / scale
    for kind, factor in (("weight", scale), ("bias", 1.0)):
        name = f"embedding_to_tokens.{kind}"
        tensors[name] = rearrange(tensors[name], "(c tokens) ... -> (tokens c) ...", tokens=ours.context_tokens) / factor
    # their vector comes of z_t, which is the text projection of the output at the end token, ours of that output: two linear maps are one
    tensors["caption_to_vector.weight"] = tensors["caption_to_vector.weight"] @ clip.text_projection.weight.detach()
    null = text_proj_state["learned_classifier_free_guidance_embeddings"]
    tensors |= {"null_embedding": null * scale, "null_caption": null.new_zeros(tower.text.width), "null_tokens": null.new_zeros(2, ours.context_width or 0)}
    for name, tensor in clip.state_dict().items():
        renamed = name.replace("text_positions", "positions").replace("text_final_norm", "text_norm")
        if renamed.startswith(("token_embedding", "positions", "text_transformer", "text_norm")):
            tensors[renamed] = tensor
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def upsampler_from_diffusers(
    first: State,
    last: State,
    config: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    low_size: int,
    sampling_steps: int = 7,
    where: tuple[str, str] = ("the first upsampler's state dict", "the last upsampler's state dict"),
) -> Upsampler:
    """diffusers' two UNet2DModels, for all steps and for the last one, of one config, as this package's upsampler. ValueError as in `prior_from_diffusers`."""
    _require(where[0], config, {"in_channels": 6, "add_attention": False, "class_embed_type": None, "num_class_embeds": None})
    ours = UpsamplerConfig(
        low_size=low_size,
        high_size=config["sample_size"],
        degradation="none",
        unet=_unet_config(where[0], config, {"ResnetDownsampleBlock2D": False}, {"ResnetUpsampleBlock2D": False}),
        diffusion=_process(where[0], scheduler, sampling_steps, 1.0),
        clamp=False,
        last_step=True,
    )
    model = cast(Upsampler, _built(Upsampler, ours))
    layers, tensors = _unet_layers(ours.unet), dict[str, Tensor]()
    for state, name, prefix in zip((first, last), where, ("", "last.")):
        require_tensors(name, state, _to_theirs(model.state_dict(), layers), "UNet2DModel", FAMILY)
        tensors |= {prefix + key: tensor for key, tensor in _to_ours(state, layers).items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()
