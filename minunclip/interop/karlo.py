"""diffusers' unCLIP, and so Karlo's published weights (kakaobrain/karlo-v1-alpha), in this package's modules; `to_diffusers.py` is the way back.

The models are the same but for names (`names.py`), and for what is folded into the weights here, so that nothing else needs to know of it: queries,
keys and values lie in one matrix; embeddings come scaled by sqrt(d), and as four tokens in another order; two linear maps after one another are
one; an empty caption, which is their way to drop one, is a few constants. What cannot be folded is a field of the config, with Karlo's name beside it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from minunclip.config import CLIPConfig, DecoderConfig, DiffusionConfig, DiffusionPriorConfig, Objective, TransformerConfig, UNetConfig, UpsamplerConfig
from minunclip.data.tokenizer import Tokenizer
from minunclip.interop.names import (
    TEXT_PROJ,
    State,
    decoder_to_theirs,
    prior_layers,
    prior_to_theirs,
    text_layers,
    text_to_theirs,
    to_ours,
    to_theirs,
    unet_layers,
)
from minunclip.loading import read_json, read_published, require_tensors
from minunclip.models.clip import CLIP
from minunclip.models.decoder import Decoder
from minunclip.models.diffusion_prior import LATENT_CLIP, DiffusionPrior
from minunclip.models.unet import group_norm
from minunclip.models.upsampler import Upsampler

Model = TypeVar("Model", bound=nn.Module)

FAMILY = "another family than Karlo's"
OBJECTIVES: dict[str, Objective] = {"epsilon": "epsilon", "sample": "x0"}
PRIOR_STEPS, DECODER_STEPS, UPSAMPLER_STEPS = 25, 25, 7  # of sampling: the defaults of diffusers' pipeline
DOWN_BLOCKS = {"ResnetDownsampleBlock2D": False, "SimpleCrossAttnDownBlock2D": True}  # whether they have attention
UP_BLOCKS = {"ResnetUpsampleBlock2D": False, "SimpleCrossAttnUpBlock2D": True}
REMEDY = "give a folder in diffusers' layout with safetensors, as its `save_pretrained` writes it"


@dataclass(frozen=True)
class Part:
    """A part of a pipeline of diffusers': what to call it in messages, its config as JSON has it, and its weights, if it has any."""

    where: str
    config: Mapping[str, Any]
    state: State = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        if name not in self.config:
            raise ValueError(f"{self.where} has no field {name!r}: it belongs to {FAMILY}")
        return self.config[name]

    def whole(self, name: str) -> int:
        """A field that must be a whole number."""
        if type(value := self[name]) is not int:
            raise ValueError(f"{self.where}: {name} is {value!r}, must be a whole number here: it belongs to {FAMILY}")
        return value

    def require(self, **needed: Any) -> None:
        """ValueError unless the config has these values. A field that it does not name has diffusers' default, which is the one needed."""
        for name, value in needed.items():
            if self.config.get(name, value) != value:
                raise ValueError(f"{self.where}: {name} is {self.config[name]!r}, but this package has {value!r} only: it belongs to {FAMILY}")

    def require_tensors(self, expected: State, kind: str) -> None:
        require_tensors(self.where, self.state, expected, kind, f"{FAMILY}, or a shard is missing")


def _without_numbers(kind: type[Model], config: Any) -> Model:
    """A model that takes neither memory nor random numbers: its weights are put in their place at once."""
    with torch.device("meta"):
        return kind(config)


def _process(scheduler: Part, sampling_steps: int, clip: float) -> DiffusionConfig:
    """The diffusion process of an UnCLIPScheduler."""
    scheduler.require(_class_name="UnCLIPScheduler", beta_schedule="squaredcos_cap_v2", clip_sample=True, clip_sample_range=clip)
    if (prediction := scheduler["prediction_type"]) not in OBJECTIVES:
        raise ValueError(f"{scheduler.where}: prediction_type is {prediction!r}, must be one of {', '.join(OBJECTIVES)}")
    learned = scheduler["variance_type"] == "learned_range"
    return DiffusionConfig("cosine", OBJECTIVES[prediction], learned, "ancestral", sampling_steps, scheduler.whole("num_train_timesteps"))


# ---- model by model. ValueError names the first field, key or shape that does not fit; a model is whole or not at all ----


def prior_from_diffusers(prior: Part, scheduler: Part) -> DiffusionPrior:
    """A PriorTransformer. What stands for a dropped caption is zeros: see `say_nothing_by_an_empty_caption`."""
    prior.require(added_emb_type="prd", additional_embeddings=4, encoder_hid_proj_type="linear", time_embed_act_fn="silu", norm_in_type=None)
    prior.require(embedding_proj_norm_type=None, time_embed_dim=None, embedding_proj_dim=None, clip_embed_dim=None)
    dim, heads = prior.whole("embedding_dim"), prior.whole("num_attention_heads")
    config = DiffusionPriorConfig(
        embedding_dim=dim,
        text_width=dim,
        context_length=prior.whole("num_embeddings"),
        transformer=TransformerConfig(heads * prior.whole("attention_head_dim"), prior.whole("num_layers"), heads),
        diffusion=_process(scheduler, PRIOR_STEPS, LATENT_CLIP),
        latent="standardised",
        null_tokens=2,
        candidates=1,
    )
    model = _without_numbers(DiffusionPrior, config)
    prior.require_tensors(prior_to_theirs(model.state_dict(), config), "PriorTransformer")
    tensors, positions = to_ours(prior.state, prior_layers(config)), prior.state["positional_embedding"][0]
    tensors["condition.embedding.weight"] = tensors["condition.embedding.weight"] / dim**0.5
    tensors |= {"condition.positions": positions[:-3], "positions": positions[-3:], "final": prior.state["prd_embedding"][0, 0]}
    tensors |= {"condition.null_text": torch.zeros_like(positions[:2]), "condition.null_embedding": torch.zeros_like(positions[0])}
    tensors |= {"mean": prior.state["clip_mean"][0], "std": prior.state["clip_std"][0]}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def text_tower_from_diffusers(text_encoder: Part) -> CLIP:
    """transformers' CLIPTextModelWithProjection as a CLIP without an image tower, whose z_t keeps its norm."""
    text_encoder.require(layer_norm_eps=1e-5, intermediate_size=4 * text_encoder.whole("hidden_size"))
    if (activation := text_encoder["hidden_act"]) not in ("gelu", "quick_gelu"):
        raise ValueError(f"{text_encoder.where}: hidden_act is {activation!r}, must be gelu or quick_gelu: it belongs to {FAMILY}")
    layers, heads = text_encoder.whole("num_hidden_layers"), text_encoder.whole("num_attention_heads")
    config = CLIPConfig(
        image_size=224,  # of the image tower that goes with the text tower of a ViT-L/14; it is not built
        patch_size=14,
        vision=None,
        text=TransformerConfig(text_encoder.whole("hidden_size"), layers, heads, activation),
        context_length=text_encoder.whole("max_position_embeddings"),
        vocabulary_size=text_encoder.whole("vocab_size"),
        embedding_dim=text_encoder.whole("projection_dim"),
        unit_norm=False,
    )
    model = _without_numbers(CLIP, config)
    weights = {name: tensor for name, tensor in text_encoder.state.items() if not name.endswith("position_ids")}
    Part(text_encoder.where, text_encoder.config, weights).require_tensors(text_to_theirs(model.state_dict(), config), "CLIPTextModelWithProjection")
    tensors, positions = to_ours(weights, text_layers(config)), weights["text_model.embeddings.position_embedding.weight"]
    tensors |= {"text_positions": positions, "logit_scale": positions.new_tensor(math.log(1 / 0.07))}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _unet_config(unet: Part, image_size: int, kinds: tuple[str, ...]) -> UNetConfig:
    """`kinds`: the blocks that there may be."""
    unet.require(act_fn="silu", norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0, center_input_sample=False, mid_block_scale_factor=1)
    unet.require(time_embedding_type="positional", time_embedding_dim=None)
    for name in ("down_block_types", "up_block_types"):
        if odd := [kind for kind in unet[name] if kind not in kinds]:
            raise ValueError(f"{unet.where}: {name} has {odd[0]!r}, must be of {', '.join(kinds)}: it belongs to {FAMILY}")
    attention, widths = [DOWN_BLOCKS[kind] for kind in unet["down_block_types"]], unet["block_out_channels"]
    if attention != [UP_BLOCKS[kind] for kind in reversed(unet["up_block_types"])]:
        raise ValueError(f"{unet.where}: up_block_types have attention at other levels than down_block_types, which this package's U-Net cannot")
    for width in widths:
        if width % widths[0]:
            raise ValueError(f"{unet.where}: block_out_channels are {list(widths)}, must be multiples of the first: it belongs to {FAMILY}")
        if (groups := group_norm(width).num_groups) != unet["norm_num_groups"]:
            raise ValueError(f"{unet.where}: norm_num_groups is {unet['norm_num_groups']}, but this package gives {width} channels {groups} groups")
    return UNetConfig(
        width=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=unet.whole("layers_per_block"),
        attention_at=tuple(image_size >> level for level, has in enumerate(attention) if has),
        head_channels=unet.whole("attention_head_dim"),
        dropout=float(unet.config.get("dropout", 0)),
        timestep="scale_shift" if unet["resnet_time_scale_shift"] == "scale_shift" else "add",
    )


def decoder_from_diffusers(unet: Part, text_proj: Part, scheduler: Part, clip: CLIP) -> Decoder:
    """A UNet2DConditionModel and an UnCLIPTextProjModel. `clip`, of `text_tower_from_diffusers`, lends its text transformer: the very same tensors.

    Dropped captions as in `prior_from_diffusers`.
    """
    unet.require(in_channels=3, class_embed_type="identity", resnet_time_scale_shift="scale_shift", mid_block_type="UNetMidBlock2DSimpleCrossAttn")
    unet.require(only_cross_attention=False, cross_attention_norm=None, encoder_hid_dim=None, addition_embed_type=None, class_embeddings_concat=False)
    unet.require(resnet_skip_time_act=False, resnet_out_scale_factor=1.0, time_embedding_act_fn=None, timestep_post_act=None, time_cond_proj_dim=None)
    image_size, dim, tower = unet.whole("sample_size"), clip.config.embedding_dim, clip.config
    network, width = _unet_config(unet, image_size, (*DOWN_BLOCKS, *UP_BLOCKS)), unet.whole("cross_attention_dim")
    text_proj.require(clip_embeddings_dim=dim, time_embed_dim=4 * network.width, cross_attention_dim=width)
    config = DecoderConfig(
        image_size=image_size,
        embedding_dim=dim,
        vocabulary_size=tower.vocabulary_size,
        context_length=tower.context_length,
        text=tower.text,
        unet=network,
        diffusion=_process(scheduler, DECODER_STEPS, 1.0),
        context_tokens=text_proj.whole("clip_extra_context_tokens"),
        text_start="clip",
        context_width=width,
        null_tokens=2,
    )
    model = _without_numbers(Decoder, config)
    projection = clip.text_projection.weight.detach()
    expected = decoder_to_theirs(model.state_dict(), config, torch.empty(projection.T.shape, device="meta"))
    unet.require_tensors(expected[0], "UNet2DConditionModel")
    text_proj.require_tensors(expected[1], "UnCLIPTextProjModel")
    tensors, scale = to_ours(unet.state, unet_layers(network)) | to_ours(text_proj.state, TEXT_PROJ), dim**0.5
    tensors["embedding_to_vector.weight"] = tensors["embedding_to_vector.weight"] / scale
    for kind, factor in (("weight", scale), ("bias", 1.0)):
        name = f"embedding_to_tokens.{kind}"
        tensors[name] = rearrange(tensors[name], "(c tokens) ... -> (tokens c) ...", tokens=config.context_tokens) / factor
    # their vector comes of z_t, which is the projection of the output at the end token; ours of that output: two linear maps are one
    first, second = projection, tensors["caption_to_vector.weight"]
    exact = torch.promote_types(first.dtype, torch.float32)
    tensors["caption_to_vector.weight"] = (second.to(exact) @ first.to(exact)).to(second.dtype)
    null = text_proj.state["learned_classifier_free_guidance_embeddings"]
    tensors |= {"null_embedding": null * scale, "null_caption": null.new_zeros(tower.text.width), "null_tokens": null.new_zeros(2, width)}
    for name, tensor in clip.state_dict().items():
        renamed = name.replace("text_positions", "positions").replace("text_final_norm", "text_norm")
        if renamed in model.state_dict() and renamed not in tensors:
            tensors[renamed] = tensor
    model.load_state_dict(tensors, assign=True)
    # not only the same numbers: moved to a GPU, each of the two would have its own
    model.token_embedding, model.positions, model.text_transformer, model.text_norm = (
        clip.token_embedding,
        clip.text_positions,
        clip.text_transformer,
        clip.text_final_norm,
    )
    return model.eval()


def upsampler_from_diffusers(first: Part, last: Part, scheduler: Part, low_size: int) -> Upsampler:
    """Two UNet2DModels alike: for the last step of sampling, and for those before it."""
    high_size = first.whole("sample_size")
    for part in (first, last):
        part.require(in_channels=6, add_attention=False, class_embed_type=None, num_class_embeds=None)
    last.require(**{name: first[name] for name in ("block_out_channels", "layers_per_block", "norm_num_groups", "resnet_time_scale_shift")})
    config = UpsamplerConfig(
        low_size=low_size,
        high_size=high_size,
        degradation="none",
        unet=_unet_config(first, high_size, ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")),
        diffusion=_process(scheduler, UPSAMPLER_STEPS, 1.0),
        clamp=False,
        last_step=True,
    )
    model, layers, tensors = _without_numbers(Upsampler, config), unet_layers(config.unet), dict[str, Tensor]()
    for part, prefix in ((first, ""), (last, "last.")):
        part.require_tensors(to_theirs(model.state_dict(), layers), "UNet2DModel")
        tensors |= {prefix + name: tensor for name, tensor in to_ours(part.state, layers).items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


# ---- all together ----


@torch.no_grad()
def nothing(models: Mapping[str, Any], tokenizer: Tokenizer) -> list[tuple[Tensor, Tensor]]:
    """What stands for a dropped caption in the prior and the decoder, each with what CLIP reads in an empty one."""
    clip, condition, decoder = models["clip"], models["prior"].condition, models["decoder"]
    tokens, mask = tokenizer([""], 2)  # start and end
    encoded, z_t = clip.text_features(tokens.to(condition.positions.device), mask.to(condition.positions.device))
    z_t = condition.latent_scale.scale(z_t[0]).to(encoded.dtype)
    return [
        (condition.null_text, condition.text(encoded[0])),
        (condition.null_embedding, condition.embedding(z_t)),
        (decoder.null_caption, encoded[0, -1]),
        (decoder.null_tokens, decoder.text_to_context(encoded[0])),
    ]


@torch.no_grad()
def say_nothing_by_an_empty_caption(models: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Makes a dropped caption in the prior and the decoder what CLIP reads in an empty one, which is diffusers' way (and GLIDE's)."""
    for parameter, value in nothing(models, tokenizer):
        parameter.copy_(value)


def _read_part(folder: Path, name: str, dtype: torch.dtype) -> Part:
    """A part from its folder, its weights in one file or in shards."""
    path = folder / name
    if name.endswith("_scheduler"):
        return Part(str(path / "scheduler_config.json"), read_json(path / "scheduler_config.json", REMEDY))
    config, state = read_json(path / "config.json", REMEDY), read_published(path)
    return Part(str(path), config, {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()})


def read_folder(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], Tokenizer]:
    """The models by stage, and the tokenizer, of a folder of diffusers' UnCLIPPipeline. ValueError names what is missing or does not fit."""
    Part(str(folder / "model_index.json"), read_json(folder / "model_index.json", REMEDY)).require(_class_name="UnCLIPPipeline")

    def part(name: str) -> Part:
        return _read_part(folder, name, dtype)

    clip = text_tower_from_diffusers(part("text_encoder"))
    decoder = decoder_from_diffusers(part("decoder"), part("text_proj"), part("decoder_scheduler"), clip)
    prior = prior_from_diffusers(part("prior"), part("prior_scheduler"))
    size = decoder.config.image_size
    upsampler = upsampler_from_diffusers(part("super_res_first"), part("super_res_last"), part("super_res_scheduler"), size)
    models = {"clip": clip, "prior": prior, "decoder": decoder, "upsampler1": upsampler}
    try:
        tokenizer = Tokenizer.from_clip(folder / "tokenizer")
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing: {REMEDY}") from None
    say_nothing_by_an_empty_caption(models, tokenizer)
    return models, tokenizer
