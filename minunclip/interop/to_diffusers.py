"""This package's unCLIP as diffusers' UnCLIPPipeline, for those whose configs say what diffusers has too: the way back of `karlo.py`."""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from minunclip.config import UNetConfig
from minunclip.data.tokenizer import Tokenizer
from minunclip.interop.karlo import OBJECTIVES, nothing
from minunclip.interop.names import State, decoder_to_theirs, prior_to_theirs, text_to_theirs, to_theirs, unet_layers
from minunclip.models.diffusion_prior import LATENT_CLIP
from minunclip.pipeline import UnCLIP

PIXELS = {"unet.patch_size": 1, "unet.fine": 0}
DDPM = {"diffusion.schedule": "cosine", "diffusion.sampler": "ancestral"}
NEEDED: dict[str, dict[str, Any]] = {
    "clip": {"unit_norm": False},
    "prior": DDPM | {"latent": "standardised", "null_tokens": 2, "candidates": 1, "transformer.activation": "gelu", "diffusion.learned_variance": False},
    "decoder": DDPM | PIXELS | {"text_start": "clip", "null_tokens": 2, "whiten": False, "unet.timestep": "scale_shift", "diffusion.learned_variance": True},
    "upsampler1": DDPM | PIXELS | {"degradation": "none", "clamp": False, "diffusion.learned_variance": False},
}


def _require_theirs(model: UnCLIP) -> None:
    """ValueError for the first thing that diffusers' pipeline does not have."""
    for stage, needed in NEEDED.items():
        for name, value in needed.items():
            if (got := attrgetter(name)(model.models[stage].config)) != value:
                raise ValueError(f"{stage}: diffusers' unCLIP has no {name} of {got!r}: train with {value!r} to export it")
    for stage in ("prior", "decoder", "upsampler1"):
        if (objective := model.models[stage].config.diffusion.objective) not in OBJECTIVES.values():
            raise ValueError(f"{stage}: diffusers' unCLIP cannot predict {objective}: train with one of {', '.join(OBJECTIVES.values())} to export it")
    clip, decoder = model.models["clip"].config, model.models["decoder"].config
    if decoder.context_width is None or not decoder.unet.attention_at:
        raise ValueError("decoder: diffusers' unCLIP projects the caption's tokens for attention: train with a context_width, and attention, to export it")
    if clip.text.width != clip.embedding_dim:
        raise ValueError(f"clip: diffusers' unCLIP needs a text width of embedding_dim, {clip.embedding_dim}, not {clip.text.width}")
    if any(torch.dist(parameter, value) > 1e-2 * value.norm() for parameter, value in nothing(model.models, model.tokenizer)):
        raise ValueError("diffusers' unCLIP drops a caption by an empty one: call interop.say_nothing_by_an_empty_caption, and train a little with it")
    theirs = model.models["clip"].state_dict()
    for name, tensor in model.models["decoder"].state_dict().items():
        renamed = {"positions": "text_positions"}.get(name, name.replace("text_norm", "text_final_norm"))
        if name.startswith(("token_embedding", "positions", "text_transformer", "text_norm")) and not torch.equal(tensor, theirs[renamed]):
            raise ValueError(f"decoder: {name!r} is not CLIP's, and diffusers' unCLIP has one text transformer for both: train with it frozen to export it")


def _unprojected(model: UnCLIP) -> Tensor:
    """(text width, d): what the decoder's map of the caption's output is multiplied with to become one of z_t, its projection."""
    matrix = model.models["decoder"].caption_to_vector.weight.detach().cpu().double()
    projection = model.models["clip"].text_projection.weight.detach().cpu()
    inverse = torch.linalg.pinv(projection.double())
    if torch.dist(matrix @ inverse @ projection.double(), matrix) > 1e-3 * matrix.norm():
        raise ValueError("decoder: caption_to_vector reads what CLIP's text_projection leaves out, and diffusers' unCLIP gives it z_t alone")
    return inverse.to(projection.dtype)


def _numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def _filled(module: Any, state: State) -> Any:
    if (dtype := next(iter(state.values())).dtype) != torch.float32:  # diffusers warns whenever it is asked
        module.to(dtype)
    module.load_state_dict(state)
    return module.eval()


def _unet_fields(model: nn.Module, config: UNetConfig) -> dict[str, Any]:
    """What both kinds of U-Net have in their config. ValueError if its norms have different numbers of groups."""
    groups = {layer.num_groups for layer in model.modules() if isinstance(layer, nn.GroupNorm)}
    if len(groups) > 1:
        raise ValueError(f"diffusers' U-Nets have one number of groups in every norm, not {sorted(groups)}: use widths of 256 or more, in multiples of 32")
    return {
        "block_out_channels": tuple(config.width * multiplier for multiplier in config.multipliers),
        "layers_per_block": config.blocks,
        "norm_num_groups": groups.pop(),
        "dropout": config.dropout,
        "attention_head_dim": config.head_channels,
        "resnet_time_scale_shift": "scale_shift" if config.timestep == "scale_shift" else "default",
    }


def _tokenizer(ours: Tokenizer, context_length: int) -> Any:
    from transformers import CLIPTokenizer

    vocabulary, merges = ours.clip_files()
    fields: dict[str, Any] = {"vocab": vocabulary, "merges": merges, "pad_token": next(iter(vocabulary))}  # token 0 pads, as in Karlo
    return CLIPTokenizer(**fields, model_max_length=context_length)


def to_diffusers(model: UnCLIP) -> Any:
    """An UnCLIPPipeline that draws the same pictures from the same noise, on the CPU; save it with its `save_pretrained`.

    It ends with the first upsampler: diffusers' pipeline enlarges once. Two small things differ: some numbers of steps (27, 31 …, not the default 25
    and 7) round to other timesteps there, and a "!" in a caption is read as padding, as in Karlo's folder. ValueError names the first field that
    diffusers has no counterpart for. Needs the extra [interop].
    """
    try:
        from diffusers import PriorTransformer, UnCLIPPipeline, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
        from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection
    except ImportError as missing:
        raise ValueError(f"to_diffusers needs the extra [interop] ({missing}): pip install transformers diffusers") from None
    tokenizer = _tokenizer(model.tokenizer, model.models["clip"].config.context_length)
    _require_theirs(model)
    clip, prior, decoder, upsampler = (model.models[stage] for stage in ("clip", "prior", "decoder", "upsampler1"))
    tower, ours, network = clip.config, decoder.config, decoder.config.unet

    text_config = CLIPTextConfig(
        vocab_size=tower.vocabulary_size,
        hidden_size=tower.text.width,
        intermediate_size=4 * tower.text.width,
        num_hidden_layers=tower.text.layers,
        num_attention_heads=tower.text.heads,
        max_position_embeddings=tower.context_length,
        hidden_act=tower.text.activation,
        projection_dim=tower.embedding_dim,
        bos_token_id=model.tokenizer.start_token,
        eos_token_id=model.tokenizer.end_token,
        pad_token_id=model.tokenizer.padding,
    )
    their_prior = PriorTransformer(
        num_attention_heads=prior.config.transformer.heads,
        attention_head_dim=prior.config.transformer.width // prior.config.transformer.heads,
        num_layers=prior.config.transformer.layers,
        embedding_dim=prior.config.embedding_dim,
        num_embeddings=prior.config.context_length,
    )
    attention = [ours.image_size >> level in network.attention_at for level in range(len(network.multipliers))]
    unet = UNet2DConditionModel(
        sample_size=ours.image_size,
        in_channels=3,
        out_channels=6 if ours.diffusion.learned_variance else 3,
        down_block_types=tuple("SimpleCrossAttnDownBlock2D" if has else "ResnetDownsampleBlock2D" for has in attention),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=tuple("SimpleCrossAttnUpBlock2D" if has else "ResnetUpsampleBlock2D" for has in reversed(attention)),
        cross_attention_dim=ours.context_width,
        class_embed_type="identity",
        **_unet_fields(decoder, network),
    )
    text_proj = UnCLIPTextProjModel(
        clip_extra_context_tokens=ours.context_tokens,
        clip_embeddings_dim=ours.embedding_dim,
        time_embed_dim=4 * network.width,
        cross_attention_dim=ours.context_width,
    )
    levels = len(upsampler.config.unet.multipliers)
    super_res = [
        _filled(
            UNet2DModel(
                sample_size=upsampler.config.high_size,
                in_channels=6,
                out_channels=3,
                down_block_types=("ResnetDownsampleBlock2D",) * levels,
                up_block_types=("ResnetUpsampleBlock2D",) * levels,
                add_attention=False,
                **_unet_fields(part, part.config.unet),
            ),
            to_theirs(_numbers(part), unet_layers(part.config.unet)),
        )
        for part in (upsampler, upsampler if upsampler.last is None else upsampler.last)
    ]
    predictions = {ours: theirs for theirs, ours in OBJECTIVES.items()}
    schedulers = {
        name: UnCLIPScheduler(
            num_train_timesteps=process.steps,
            variance_type="learned_range" if process.learned_variance else "fixed_small_log",
            prediction_type=predictions[process.objective],
            clip_sample_range=reach,
        )
        for name, process, reach in (
            ("prior_scheduler", prior.config.diffusion, LATENT_CLIP),
            ("decoder_scheduler", ours.diffusion, 1.0),
            ("super_res_scheduler", upsampler.config.diffusion, 1.0),
        )
    }
    unet_state, text_proj_state = decoder_to_theirs(_numbers(decoder), ours, _unprojected(model))
    return UnCLIPPipeline(
        prior=_filled(their_prior, prior_to_theirs(_numbers(prior), prior.config)),
        decoder=_filled(unet, unet_state),
        text_encoder=_filled(CLIPTextModelWithProjection(text_config), text_to_theirs(_numbers(clip), tower)),
        tokenizer=tokenizer,
        text_proj=_filled(text_proj, text_proj_state),
        super_res_first=super_res[0],
        super_res_last=super_res[1],
        **schedulers,
    )
