"""Reading models from folders: `config.json` and `model.safetensors`, strictly. No pickle is ever read here."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

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
from minunclip.eight_bits import from_rows
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


def config_to_json(config: Any) -> dict[str, Any]:
    """A config dataclass as `config.json` has it: what `config_from_json` reads."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_json(kind: type, values: Any, where: str) -> Any:
    """A (nested) config dataclass from what `json.load` gave; ValueError names an unknown field, or a missing one that has no default."""
    hints = get_type_hints(kind)
    got = set(values) if isinstance(values, dict) else set()
    needed = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    odd = sorted((got - hints.keys()) | (needed - got))
    if odd or not isinstance(values, dict):
        raise ValueError(f"{where} does not describe a {kind.__name__}: {'unknown' if odd and odd[0] in got else 'missing'} field {odd[0]!r}")
    fields: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if type(None) in get_args(hint):  # an optional field
            if value is None:
                fields[name] = None
                continue
            hint = get_args(hint)[0]
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


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_tensors(path: Path, remedy: str = "run `make weights`, or copy the folder again") -> dict[str, Tensor]:
    """A safetensors file, whole. ValueError otherwise; `remedy` says what to do if it is not there."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {remedy}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({str(error).splitlines()[0]}): copy it again") from None


def read_json(path: Path, remedy: str = "run `make weights`, or copy the folder again") -> dict[str, Any]:
    """The object that a JSON file holds. ValueError if it holds none; `remedy` says what to do if it is not there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {remedy}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not JSON: copy the folder again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object, but a {type(found).__name__}: copy the folder again")
    return found


def read_published(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of the shards that an index names, or of a folder with either, as the Hub has them.

    ValueError names what is missing.
    """
    if path.is_dir():
        names = [f"{stem}.safetensors{end}" for stem in ("model", "diffusion_pytorch_model", "open_clip_model") for end in ("", ".index.json")]
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path} has none of {', '.join(names)}: download one of them into it (a .bin or .pt file is a pickle, which can run anything)")
        path = found[0]
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise ValueError(f"{path} is a pickle, which can run anything, and is not read: take the .safetensors file of the same weights")
    if path.suffix != ".json":
        return read_tensors(path, "give a folder or a .safetensors file")
    index = read_json(path, "give a folder or a .safetensors file")
    shard_of = index.get("weight_map")
    if not isinstance(shard_of, dict) or any(not isinstance(shard, str) or Path(shard).name != shard for shard in shard_of.values()):
        raise ValueError(f"{path} is no index of shards: it must have a weight_map from keys to files beside it")
    shards = {shard: read_tensors(path.parent / shard, "a shard is missing, download it too") for shard in sorted(set(shard_of.values()))}
    for key, shard in shard_of.items():
        if key not in shards[shard]:
            raise ValueError(f"{path.parent / shard} lacks {key!r}, which the index has there: copy it again")
    return {key: shards[shard][key] for key, shard in shard_of.items()}


def require_tensors(where: object, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], family: str, cause: str = "another model or preset") -> None:
    """ValueError, with the first key and both shapes, unless `tensors` have the names and shapes of `expected`, and finite values."""
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors:
            raise ValueError(f"{where} lacks {key!r} of shape {tuple(expected[key].shape)}: it belongs to {cause}")
        if key not in expected:
            raise ValueError(f"{where} has {key!r} of shape {tuple(tensors[key].shape)}, which a {family} does not know: it belongs to {cause}")
        if tensors[key].shape != expected[key].shape:
            shapes = f"{tuple(tensors[key].shape)}, but the config asks for {tuple(expected[key].shape)}"
            raise ValueError(f"{where}: {key!r} has shape {shapes}: it belongs to {cause}")
        if tensors[key].is_floating_point() and not tensors[key].is_meta and not torch.isfinite(tensors[key]).all():
            raise ValueError(f"{where}: {key!r} has values that are not finite: the training diverged or half precision overflowed")


def load_weights(model: nn.Module, path: Path, may_lack: str | None = None) -> None:
    """Fills a model from a safetensors file. ValueError, before anything is changed, names the first key or shape that does not fit.

    Keys that begin with `may_lack` may all be missing: that part of the model stays as it is.
    """
    tensors = read_tensors(path)
    try:
        tensors = from_rows(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    expected = model.state_dict()
    if may_lack is not None and not any(key.startswith(may_lack) for key in tensors):
        tensors |= {key: tensor for key, tensor in expected.items() if key.startswith(may_lack)}
    require_tensors(path, tensors, expected, type(model).__name__)
    model.load_state_dict(tensors)


def load_model(stage: str, folder: Path) -> nn.Module:
    """The model of a stage from its folder, float32, in eval mode."""
    model_class, config_class = MODELS[stage]
    path = folder / "config.json"
    config = config_from_json(config_class, read_json(path), str(path))
    with torch.random.fork_rng(devices=[]):  # a training that loads CLIP in the middle of a step must draw the same noise as one that has it
        try:
            model = model_class(config)
        except (ArithmeticError, RuntimeError, AssertionError, MemoryError) as error:
            raise ValueError(f"{path}: no model can be made with these sizes ({str(error).splitlines()[0]})") from None
    load_weights(model, folder / "model.safetensors")
    return model.eval()
