"""CLIP's published weights in this package's CLIP: OpenAI's own (and open_clip's) and Hugging Face's state dicts.

The models are the same but for names, and for three things that are folded into the weights here, so that nothing else needs to know of them:
queries, keys and values lie in one matrix; pictures come in [-1, 1] instead of normalised by channel means, which a linear map of patches can take
over; and the constant that this leaves goes into the positions. The activation is a field of the config.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from minunclip.config import Activation, CLIPConfig, TransformerConfig
from minunclip.loading import read_json, read_published, require_tensors
from minunclip.models.clip import CLIP

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # what OpenAI's CLIP subtracts from pictures in [0, 1], and divides by
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_CHANNELS = 64  # of nearly every published CLIP: a state dict does not say, a config does

# OpenAI's names, as patterns, and ours
OPENAI = {
    r"visual\.conv1\.weight": "patch_embedding.weight",
    r"visual\.class_embedding": "class_token",
    r"visual\.positional_embedding": "image_positions",
    r"visual\.ln_pre\.(\w+)": r"image_pre_norm.\1",
    r"visual\.ln_post\.(\w+)": r"image_post_norm.\1",
    r"visual\.proj": "image_projection.weight",
    r"token_embedding\.weight": "token_embedding.weight",
    r"positional_embedding": "text_positions",
    r"ln_final\.(\w+)": r"text_final_norm.\1",
    r"text_projection": "text_projection.weight",
    r"logit_scale": "logit_scale",
}
OPENAI_BLOCK = {
    r"ln_1\.(\w+)": r"norm1.\1",
    r"ln_2\.(\w+)": r"norm2.\1",
    r"attn\.in_proj_(\w+)": r"attention.to_qkv.\1",
    r"attn\.out_proj\.(\w+)": r"attention.to_out.\1",
    r"mlp\.c_fc\.(\w+)": r"mlp.0.\1",
    r"mlp\.c_proj\.(\w+)": r"mlp.2.\1",
}
HUGGING_FACE = {
    r"vision_model\.embeddings\.patch_embedding\.weight": "visual.conv1.weight",
    r"vision_model\.embeddings\.class_embedding": "visual.class_embedding",
    r"vision_model\.embeddings\.position_embedding\.weight": "visual.positional_embedding",
    r"vision_model\.pre_layrnorm\.(\w+)": r"visual.ln_pre.\1",
    r"vision_model\.post_layernorm\.(\w+)": r"visual.ln_post.\1",
    r"visual_projection\.weight": "visual.proj",
    r"text_model\.embeddings\.token_embedding\.weight": "token_embedding.weight",
    r"text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"text_model\.final_layer_norm\.(\w+)": r"ln_final.\1",
    r"text_projection\.weight": "text_projection",
    r"logit_scale": "logit_scale",
    r"text_model\.encoder\.layers\.(\d+)\.(.+)": r"transformer.resblocks.\1.\2",
    r"vision_model\.encoder\.layers\.(\d+)\.(.+)": r"visual.transformer.resblocks.\1.\2",
}
HUGGING_FACE_BLOCK = {
    r"layer_norm(\d)\.(\w+)": r"ln_\1.\2",
    r"self_attn\.out_proj\.(\w+)": r"attn.out_proj.\1",
    r"mlp\.fc1\.(\w+)": r"mlp.c_fc.\1",
    r"mlp\.fc2\.(\w+)": r"mlp.c_proj.\1",
}
IGNORED = (r".*position_ids", r"input_resolution", r"context_length", r"vocab_size", r"attn_mask")  # no weights


def _renamed(name: str, table: Mapping[str, str], where: str) -> str:
    for pattern, new in table.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(new)
    raise ValueError(f"{where}: no CLIP with a vision transformer has {name!r}: these are weights of another model")


def _openai_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's state dict with OpenAI's names and shapes: one matrix for queries, keys and values, projections that multiply from the left."""
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if "self_attn.k_proj" in name or "self_attn.v_proj" in name:
            continue  # taken with its query
        new = name
        if "self_attn.q_proj" in name:
            parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
            if lost := [part for part in parts if part not in state]:
                raise ValueError(f"the state dict has nothing for {lost[0]!r}: a shard or a file is missing")
            tensor = torch.cat([state[part] for part in parts])
            new = name.replace("self_attn.q_proj.", "attn.in_proj_")
        new = _renamed(new, HUGGING_FACE, "Hugging Face state dict")
        if (block := re.fullmatch(r"(.*resblocks\.\d+\.)(.+)", new)) and "in_proj" not in new:
            new = block[1] + _renamed(block[2], HUGGING_FACE_BLOCK, "Hugging Face state dict")
        named[new] = tensor.T if new in ("visual.proj", "text_projection") else tensor
    return named


def clip_from_state_dict(
    state: Mapping[str, Tensor],
    activation: str = "quick_gelu",
    head_channels: int = HEAD_CHANNELS,
    image_head_channels: int | None = None,
    mean: Sequence[float] = IMAGE_MEAN,
    std: Sequence[float] = IMAGE_STD,
) -> CLIP:
    """A CLIP of OpenAI's, open_clip's or Hugging Face's as this package's: same embeddings, for pictures in [-1, 1]; captions by `Tokenizer.from_clip`.

    All of it is read off the state dict but for the activation (open_clip's own models have "gelu"), the channels a head (the image tower's, if they are
    others), and the channels' mean and deviation by which pictures in [0, 1] were normalised. ValueError names the first key that does not belong, is
    missing, or has another shape. Load the file with safetensors: a pickle can run anything.
    """
    given = {name: tensor for name, tensor in state.items() if not any(re.fullmatch(pattern, name) for pattern in IGNORED)}
    if any(name.startswith("vision_model.") for name in given):
        given = _openai_names(given)
    ours: dict[str, Tensor] = {}
    for name, tensor in given.items():
        if block := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name):
            stack = "image_transformer" if block[1] else "text_transformer"
            ours[f"{stack}.blocks.{block[2]}.{_renamed(block[3], OPENAI_BLOCK, 'state dict')}"] = tensor
        else:
            ours[_renamed(name, OPENAI, "state dict")] = tensor
    try:
        patches, positions, words = ours["patch_embedding.weight"], ours["image_positions"], ours["token_embedding.weight"]
        context, embedding_dim = ours["text_positions"].shape[0], ours["image_projection.weight"].shape[1]
        side = patches.shape[2]
    except KeyError as missing:
        raise ValueError(f"the state dict has nothing for {missing}: these are not all the weights of a CLIP with a vision transformer") from None
    except IndexError:
        raise ValueError(
            "the state dict has patches or projections with too few dimensions: these are no weights of a CLIP with a vision transformer"
        ) from None
    if activation not in get_args(Activation):
        raise ValueError(
            f"no CLIP with the activation {activation!r} can be read: its numbers would be others; it must be one of {', '.join(get_args(Activation))}"
        )

    # (x + 1) / 2 - mean, over std: a factor for each channel, and a constant, which every patch gets with its position
    numbers = [isinstance(values, list | tuple) and [type(value) in (float, int) for value in values] == [True] * 3 for values in (mean, std)]
    if not all(numbers) or min(std) <= 0:
        raise ValueError(f"pictures cannot be normalised by a mean of {mean} and a deviation of {std}: three numbers each, the second above 0")
    middle, spread = (torch.tensor(values, dtype=patches.dtype)[None, :, None, None] for values in (mean, std))
    constant = (patches * (0.5 - middle) / spread).sum(dim=(1, 2, 3))
    ours["image_positions"] = torch.cat([positions[:1], positions[1:] + constant])
    ours["patch_embedding.weight"] = (patches / (2 * spread)).flatten(1)
    for projection in ("image_projection.weight", "text_projection.weight"):
        if projection in ours:
            ours[projection] = ours[projection].T

    def tower(name: str, width: int, head_channels: int) -> TransformerConfig:
        layers = len({key.split(".")[2] for key in ours if key.startswith(f"{name}.blocks.")})
        if not isinstance(head_channels, int) or head_channels < 1 or width % head_channels:
            raise ValueError(f"a width of {width} is no multiple of {head_channels!r} channels a head: say how many with head_channels or image_head_channels")
        return TransformerConfig(width, layers, width // head_channels, activation)  # type: ignore[arg-type]

    config = CLIPConfig(
        image_size=side * round((len(positions) - 1) ** 0.5),
        patch_size=side,
        vision=tower("image_transformer", patches.shape[0], head_channels if image_head_channels is None else image_head_channels),
        text=tower("text_transformer", words.shape[1], head_channels),
        context_length=context,
        vocabulary_size=words.shape[0],
        embedding_dim=embedding_dim,
    )
    model = CLIP(config).to(patches.dtype)
    require_tensors("the state dict", ours, model.state_dict(), "CLIP", "another model, or a shard is missing")
    model.load_state_dict(ours)
    return model.eval()


def _channels(tower: Mapping[str, Any], width: str, usual_width: int, heads: str, usual_heads: int) -> int:
    """Channels a head of a tower, from its part of a config. ValueError where it says no whole numbers above 0."""
    sizes = tower.get(width, usual_width), tower.get(heads, usual_heads)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"the config's {width} and {heads} are {sizes[0]!r} and {sizes[1]!r}: they must be whole numbers above 0")
    if sizes[0] % sizes[1]:
        raise ValueError(f"the config's {width}, {sizes[0]}, is no multiple of its {heads}, {sizes[1]}: the file was changed, or belongs to another model")
    return int(sizes[0]) // int(sizes[1])


def clip_from_folder(path: Path) -> CLIP:
    """A published CLIP from a folder as the Hub has it, Hugging Face's or open_clip's, or from a .safetensors file or the index of its shards.

    A `config.json` (and `preprocessor_config.json`) or `open_clip_config.json` beside the weights says what they do not; without one it is taken for
    OpenAI's own. ValueError as in `clip_from_state_dict`, or with the file that is missing.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / "open_clip_config.json").is_file():
        whole = read_json(folder / "open_clip_config.json")
        config, pictures = whole.get("model_cfg") or {}, dict(whole.get("preprocess_cfg") or {})
        pictures = {key: [value] * 3 if isinstance(value, float) else value for key, value in pictures.items()}  # one for all channels
        text, vision = config.get("text_cfg") or {}, config.get("vision_cfg") or {}
        options = {
            "activation": "quick_gelu" if config.get("quick_gelu") else "gelu",
            "head_channels": _channels(text, "width", 512, "heads", 8),
            "image_head_channels": vision.get("head_width", HEAD_CHANNELS),
            "mean": pictures.get("mean") or IMAGE_MEAN,
            "std": pictures.get("std") or IMAGE_STD,
        }
    elif (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        if config.get("model_type") != "clip":
            raise ValueError(f"{folder / 'config.json'} is of a {config.get('model_type')!r}, not of a 'clip': give the folder of a CLIP")
        text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
        acts = [tower.get("hidden_act", "quick_gelu") for tower in (text, vision)]
        if acts[0] != acts[1]:
            raise ValueError(f"{folder / 'config.json'} has the hidden_act {acts[0]!r} for captions, {acts[1]!r} for pictures: this package has one for both")
        beside = folder / "preprocessor_config.json"
        pictures = read_json(beside) if beside.is_file() else {}
        pictures |= {} if pictures.get("do_normalize", True) else {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
        options = {
            "activation": acts[0],
            "head_channels": _channels(text, "hidden_size", 512, "num_attention_heads", 8),
            "image_head_channels": _channels(vision, "hidden_size", 768, "num_attention_heads", 12),
            "mean": pictures.get("image_mean") or IMAGE_MEAN,
            "std": pictures.get("image_std") or IMAGE_STD,
        }
    else:
        options = {}
    return clip_from_state_dict(read_published(path), **options)
