"""Reading models from folders: `config.json` and `model.safetensors`, strictly. No pickle is ever read here."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from minunclip.baselines.dalle import DALLE, DiscreteVAE
from minunclip.config import (
    AutoregressivePriorConfig,
    CheckerConfig,
    CLIPConfig,
    DALLEConfig,
    DecoderConfig,
    DiffusionPriorConfig,
    DiscreteVAEConfig,
    UpsamplerConfig,
)
from minunclip.data.checker import SceneReader
from minunclip.models.autoregressive_prior import AutoregressivePrior
from minunclip.models.clip import CLIP
from minunclip.models.decoder import Decoder
from minunclip.models.diffusion_prior import DiffusionPrior
from minunclip.models.upsampler import Upsampler

MODELS: dict[str, tuple[type[nn.Module], type]] = {
    "clip": (CLIP, CLIPConfig),
    "prior": (DiffusionPrior, DiffusionPriorConfig),
    "ar-prior": (AutoregressivePrior, AutoregressivePriorConfig),
    "decoder": (Decoder, DecoderConfig),
    "upsampler1": (Upsampler, UpsamplerConfig),
    "upsampler2": (Upsampler, UpsamplerConfig),
    "checker": (SceneReader, CheckerConfig),
    "glide": (Decoder, DecoderConfig),
    "dalle-vae": (DiscreteVAE, DiscreteVAEConfig),
    "dalle": (DALLE, DALLEConfig),
}


def config_from_json(kind: type, values: Any, where: str) -> Any:
    """A (nested) config dataclass from what `json.load` gave; ValueError names an unknown field, or a missing one that has no default."""
    hints = get_type_hints(kind)
    got = set(values) if isinstance(values, dict) else set()
    needed = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    odd = sorted((got - hints.keys()) | (needed - got))
    if odd or not isinstance(values, dict):
        raise ValueError(f"{where} does not describe a {kind.__name__}: {'unknown' if odd and odd[0] in got else 'missing'} field {odd[0]!r}")
    fields = {}
    for name, value in values.items():
        hint = hints[name]
        if hasattr(hint, "__dataclass_fields__"):
            value = config_from_json(hint, value, where)
        elif get_origin(hint) is tuple:
            if not isinstance(value, list) or any(type(number) is not int for number in value):
                raise ValueError(f"{where}: field {name!r} of {kind.__name__} must be a list of whole numbers, not {value!r}")
            value = tuple(value)
        elif hint in (int, float, bool):
            if type(value) is not hint and not (hint is float and type(value) is int):
                what = {int: "a whole number", float: "a number", bool: "true or false"}[hint]
                raise ValueError(f"{where}: field {name!r} of {kind.__name__} must be {what}, not {value!r}")
        elif value not in get_args(hint):
            raise ValueError(f"{where}: field {name!r} is {value!r}, must be one of {', '.join(map(str, get_args(hint)))}")
        fields[name] = value
    return kind(**fields)


def load_weights(model: nn.Module, path: Path) -> None:
    """Fills a model from a safetensors file. ValueError, before anything is changed, names the first key or shape that does not fit."""
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: run `make weights`, or copy the folder again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({str(error).splitlines()[0]}): copy it again") from None
    expected = model.state_dict()
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors:
            raise ValueError(f"{path} lacks {key!r}: it belongs to another model or preset")
        if key not in expected:
            raise ValueError(f"{path} has {key!r}, which a {type(model).__name__} does not know: it belongs to another model or preset")
        if tensors[key].shape != expected[key].shape:
            shapes = f"{tuple(tensors[key].shape)}, but the config asks for {tuple(expected[key].shape)}"
            raise ValueError(f"{path}: {key!r} has shape {shapes}: it belongs to another preset")
        if tensors[key].is_floating_point() and not torch.isfinite(tensors[key]).all():
            raise ValueError(f"{path}: {key!r} has values that are not finite: the training diverged or half precision overflowed")
    model.load_state_dict(tensors)


def load_model(stage: str, folder: Path) -> nn.Module:
    """The model of a stage from its folder, float32, in eval mode."""
    model_class, config_class = MODELS[stage]
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: run `make weights`, or copy the folder again") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON: copy the folder again") from None
    config = config_from_json(config_class, values, str(path))
    with torch.random.fork_rng(devices=[]):  # a training that loads CLIP in the middle of a step must draw the same noise as one that has it
        model = model_class(config)
    load_weights(model, folder / "model.safetensors")
    return model.eval()
