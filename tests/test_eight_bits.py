import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minunclip.config import TINY
from minunclip.eight_bits import SCALE, from_rows, to_rows
from minunclip.loading import config_to_json, load_model
from minunclip.models.decoder import Decoder
from minunclip.training import save_model


@given(st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 30.0]), st.sampled_from([(3, 5), (4, 2, 3, 3), (1, 1, 7)]))
def test_every_weight_comes_back_within_half_a_step_of_its_row(seed, size, shape):
    rows = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    packed = to_rows({"rows": rows, "bias": rows[0]}, {"rows"})
    assert packed["rows"].dtype == torch.int8 and packed["bias"].dtype == torch.float16
    back = from_rows(packed)
    assert back["rows"].shape == shape and set(back) == {"rows", "bias"}
    step = rows.flatten(1).abs().amax(dim=1, keepdim=True) / 127
    error = (back["rows"].float() - rows).flatten(1).abs()
    assert (error <= 0.5 * step + 2**-10 * rows.flatten(1).abs() + 127 * 2**-24).all()  # and the rounding to float16, of weight and of scale


def test_rows_of_zeros_stay_zeros_and_packing_again_changes_nothing():
    rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    rows[2] = 0
    once = from_rows(to_rows({"w": rows}, {"w"}))["w"]
    assert (once[2] == 0).all()
    twice = from_rows(to_rows({"w": once}, {"w"}))["w"]
    torch.testing.assert_close(twice, once, rtol=2**-9, atol=0)


def test_a_model_takes_a_quarter_of_float32_and_loads_as_any_other(tmp_path):
    torch.manual_seed(0)
    model = Decoder(TINY.decoder)
    save_model(tmp_path / "whole", model, config_to_json(model.config))
    save_model(tmp_path / "packed", model, config_to_json(model.config), torch.int8)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "packed")]
    assert sizes[1] < 0.4 * sizes[0]
    loaded = load_model("decoder", tmp_path / "packed")
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert theirs.dtype == torch.float32
        assert (ours - theirs).abs().max() <= 0.005 * ours.abs().max() + 1e-7, name


@pytest.mark.parametrize("fault", ["rows are gone", "another number of rows", "rows are no whole numbers", "the scale is gone"])
def test_a_scale_without_its_rows_is_refused(tmp_path, fault):
    model = Decoder(TINY.decoder)
    save_model(tmp_path, model, config_to_json(model.config), torch.int8)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "embedding_to_vector.weight"
    if fault == "rows are gone":
        del tensors[name]
    elif fault == "the scale is gone":
        del tensors[name + SCALE]
    elif fault == "another number of rows":
        tensors[name + SCALE] = tensors[name + SCALE][1:].clone()
    else:
        tensors[name] = tensors[name].half()
    save_file(tensors, path)
    said = f"'{name}' has eight bits, and no scale" if fault == "the scale is gone" else f"'{name}/scale' does not belong to eight-bit rows"
    with pytest.raises(ValueError, match=f"{path}: {said}: copy the file again"):
        load_model("decoder", tmp_path)
