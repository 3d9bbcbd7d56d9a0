import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minunclip.config import PRESETS, TINY, DecoderConfig
from minunclip.loading import MODELS, config_from_json, load_model, load_weights
from minunclip.training import save_model


def as_json(config: object) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(tmp_path, MODELS["upsampler1"][0](TINY.upsampler1), as_json(TINY.upsampler1))
    return tmp_path


def refusal(folder: Path) -> str:
    """The message with which the model in `folder` is refused: one line."""
    with pytest.raises(ValueError) as caught:
        load_model("upsampler1", folder)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stage", MODELS)
def test_every_config_survives_json(stage: str, preset: str) -> None:
    config = (PRESETS[preset].models | PRESETS[preset].baselines)[stage]
    assert config_from_json(MODELS[stage][1], as_json(config), "here") == config


@pytest.mark.parametrize("stage", MODELS)
def test_a_saved_model_comes_back_bit_for_bit(stage: str, tmp_path: Path) -> None:
    config = (TINY.models | TINY.baselines)[stage]
    model = MODELS[stage][0](config)
    save_model(tmp_path, model, as_json(config))
    loaded = load_model(stage, tmp_path)
    assert not loaded.training and loaded.config == config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def _missing(tensors: dict) -> str:
    tensors.pop(key := list(tensors)[3])
    return f"lacks '{key}'"


def _extra(tensors: dict) -> str:
    tensors["somebody.else"] = torch.zeros(1)
    return "has 'somebody.else'"


def _shape(tensors: dict) -> str:
    key = next(k for k, v in tensors.items() if v.ndim == 1)
    tensors[key] = torch.zeros(len(tensors[key]) + 1)
    return f"'{key}' has shape ({len(tensors[key])},), but the config asks for ({len(tensors[key]) - 1},)"


def _infinite(tensors: dict) -> str:
    key = list(tensors)[-1]
    tensors[key].view(-1)[0] = float("inf")
    return f"'{key}' has values that are not finite"


@pytest.mark.parametrize("spoil", [_missing, _extra, _shape, _infinite])
def test_wrong_weights_are_refused_by_name_and_change_nothing(folder: Path, spoil) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    expected = spoil(tensors)
    save_file(tensors, path)
    message = refusal(folder)
    assert str(path) in message and expected in message
    model = MODELS["upsampler1"][0](TINY.upsampler1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError):
        load_weights(model, path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_part_that_may_be_missing_stays_as_it_is_and_all_else_is_filled(tmp_path: Path) -> None:
    plain = MODELS["decoder"][0](dataclasses.replace(TINY.decoder, unet=dataclasses.replace(TINY.decoder.unet, fine=0)))
    save_model(tmp_path, plain, {})
    fine = MODELS["decoder"][0](TINY.decoder)
    before = {key: value.clone() for key, value in fine.state_dict().items()}
    with pytest.raises(ValueError, match="lacks 'unet.refinement"):
        load_weights(fine, tmp_path / "model.safetensors")
    load_weights(fine, tmp_path / "model.safetensors", may_lack="unet.refinement.")
    for key, value in fine.state_dict().items():
        assert torch.equal(value, before[key] if "refinement" in key else plain.state_dict()[key])
    part = load_file(tmp_path / "model.safetensors") | {"unet.refinement.conv_in.bias": before["unet.refinement.conv_in.bias"]}
    save_file(part, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks 'unet.refinement"):  # all of it, or none
        load_weights(fine, tmp_path / "model.safetensors", may_lack="unet.refinement.")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_cut_off_file_is_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is not a whole safetensors file" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"{folder / name} is missing" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "\xff"])
def test_a_config_that_is_not_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "is not JSON" in refusal(folder)


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda c: c.pop("low_size"), "missing field 'low_size'"),
        (lambda c: c.update(colour=1), "unknown field 'colour'"),
        (lambda c: c["unet"].update(depth=1), "a UNetConfig: unknown field 'depth'"),
        (lambda c: c["unet"].update(blocks="two"), "field 'blocks' of UNetConfig must be a whole number, not 'two'"),
        (lambda c: c["unet"].update(blocks=1.5), "field 'blocks' of UNetConfig must be a whole number, not 1.5"),
        (lambda c: c["unet"].update(multipliers=2), "field 'multipliers' of UNetConfig must be a list"),
        (lambda c: c["unet"].update(multipliers=[1, None]), "field 'multipliers' of UNetConfig must be a list"),
        (lambda c: c["unet"].update(dropout=None), "field 'dropout' of UNetConfig must be a number"),
        (lambda c: c["diffusion"].update(learned_variance="no"), "field 'learned_variance' of DiffusionConfig must be true or false"),
        (lambda c: c["diffusion"].update(objective="velocity"), "field 'objective' is 'velocity', must be one of epsilon, x0, v"),
        (lambda c: c.update(degradation=7), "field 'degradation' is 7, must be one of blur, bsr"),
        (lambda c: c.update(unet=[]), "does not describe a UNetConfig"),
    ],
)
def test_a_wrong_config_names_its_field(folder: Path, change, expected: str) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    message = refusal(folder)
    assert str(path) in message and expected in message


def test_whole_numbers_are_numbers() -> None:
    values = as_json(TINY.decoder) | {"caption_drop": 1}
    assert config_from_json(DecoderConfig, values, "here").caption_drop == 1


def test_loading_draws_no_random_numbers(folder: Path) -> None:
    before = torch.get_rng_state()
    load_model("upsampler1", folder)
    assert torch.equal(torch.get_rng_state(), before)
