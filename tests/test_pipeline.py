import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minunclip.cli import main
from minunclip.config import BASELINES, STAGES, TINY
from minunclip.data.world import to_tensor
from minunclip.loading import config_to_json, load_model
from minunclip.models.upsampler import Upsampler
from minunclip.pipeline import UnCLIP
from minunclip.runs import Run
from minunclip.training import read_log, save_model

CAPTIONS = ["a red circle above a blue square", "", "three tiny stars", "zwölf 🐘 elephants"]


@pytest.mark.parametrize("prior", ["diffusion", "autoregressive"])
def test_a_picture_depends_on_its_seed_alone_not_on_its_batch(tiny_weights: Path, prior) -> None:
    model = UnCLIP.from_pretrained(tiny_weights)
    together = model.generate(CAPTIONS, prior, [5, 6, 7, 8])
    assert {side: pictures.shape for side, pictures in together.pictures.items()} == {n: (4, n, n, 3) for n in (16, 32, 64)}
    assert together.candidates.shape == (4, 2 if prior == "diffusion" else 1)
    for i, caption in enumerate(CAPTIONS):
        alone = model.generate([caption], prior, 5 + i)
        assert np.abs(alone.pictures[64][0].astype(int) - together.pictures[64][i]).max() <= 1
    other = model.generate(CAPTIONS[:1], prior, np.int64(99))
    assert (other.pictures[64][0] != together.pictures[64][0]).any()


def test_small_sizes_stop_early_and_others_are_refused(tiny_weights: Path) -> None:
    model = UnCLIP.from_pretrained(tiny_weights)
    assert set(model.generate(["a star"], size=32).pictures) == {16, 32}
    with pytest.raises(ValueError, match="size 17 is not one of 16, 32, 64"):
        model.generate(["a star"], size=17)


def test_one_string_is_no_list_of_captions(tiny_weights: Path) -> None:
    with pytest.raises(ValueError, match="got one string, 'a star': give a list"):
        UnCLIP.from_pretrained(tiny_weights).generate("a star")


def test_saved_in_half_precision_it_draws_nearly_the_same(tiny_weights: Path, tmp_path: Path) -> None:
    model = UnCLIP.from_pretrained(tiny_weights)
    model.save_pretrained(tmp_path / "copy")
    copy = UnCLIP.from_pretrained(tmp_path / "copy")
    a, b = (m.generate(["a star"], seed=1).pictures[64] for m in (model, copy))
    assert np.array_equal(a, b)  # the packed weights were float16 already


def test_weights_whose_first_upsampler_is_karlos_enlarge_once(tiny_weights: Path, tmp_path: Path) -> None:
    model = UnCLIP.from_pretrained(tiny_weights)
    model.models["upsampler1"] = Upsampler(replace(TINY.upsampler1, last_step=True))
    del model.models["upsampler2"]
    model.save_pretrained(tmp_path)
    assert UnCLIP.from_pretrained(tmp_path).sizes == (16, 32)


def damage_truncate(folder: Path) -> str:
    path = folder / "decoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return "decoder/model.safetensors is not a whole safetensors file"


def damage_missing(folder: Path) -> str:
    (folder / "prior" / "model.safetensors").unlink()
    return "prior/model.safetensors is missing"


def damage_stage(folder: Path) -> str:
    shutil.rmtree(folder / "upsampler2")
    return "upsampler2/config.json is missing: run `make weights`"


def damage_width(folder: Path) -> str:
    path = folder / "clip" / "config.json"
    config = json.loads(path.read_text())
    config["embedding_dim"] = 48
    path.write_text(json.dumps(config))
    return "has shape"


def damage_field(folder: Path) -> str:
    path = folder / "upsampler2" / "config.json"
    config = json.loads(path.read_text())
    del config["degradation"]
    path.write_text(json.dumps(config))
    return "missing field 'degradation'"


def damage_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("not json")
    return "is not a tokenizer"


@pytest.mark.parametrize("damage", [damage_truncate, damage_missing, damage_stage, damage_width, damage_field, damage_tokenizer])
def test_damaged_weights_get_one_line_and_nothing_is_written(tiny_weights: Path, tmp_path: Path, capsys, damage) -> None:
    shutil.copytree(tiny_weights, tmp_path / "weights")
    message = damage(tmp_path / "weights")
    assert main(["sample", "a star", "--weights", str(tmp_path / "weights"), "--out", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


@pytest.mark.slow
def test_the_command_writes_a_picture_that_says_how_it_was_made(tiny_weights: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minunclip.cli", "sample", "a blue elephant", "--seed", "7", "--weights", str(tiny_weights), "--out", "picture.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "elephant" in done.stderr
    picture = Image.open(tmp_path / "picture.png")
    assert picture.size == (64, 64) and picture.text["prompt"] == "a blue elephant" and picture.text["seed"] == "7"


def test_several_pictures_stand_beside_a_grid(tiny_weights: Path, tmp_path: Path, capsys) -> None:
    assert main(["sample", "a star", "a ring", "--count", "2", "--weights", str(tiny_weights), "--out", str(tmp_path / "p.png")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p-0.png", "p-1.png", "p-2.png", "p-3.png", "p.png"]
    assert Image.open(tmp_path / "p.png").size == (4 * 64, 64)


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--out", "/no/such/folder/x.png"]])
def test_bad_options_end_with_exit_code_2(tiny_weights: Path, capsys, arguments) -> None:
    assert main(["sample", "a star", "--weights", str(tiny_weights), *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_stage_leaves_a_log_with_validation(tiny_run: Path, tiny_weights: Path) -> None:
    for stage in ("clip", "prior", "ar-prior", "decoder", "upsampler1", "upsampler2"):
        last = read_log(tiny_run / stage / "log.jsonl")[-1]
        assert last["step"] == 12 and np.isfinite(last["validation_loss"])
        assert f"{last['loss']:.6g}" in (tiny_weights / stage / "card.md").read_text()
    assert len(list((tiny_run / "data").glob("world-*/image-embeddings-*.npy"))) == 1


def test_embeddings_are_computed_once_for_each_clip(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("data", "clip"):
        shutil.copytree(tiny_run / part, tmp_path / part, ignore=shutil.ignore_patterns("image-embeddings-*"))
    computed, embed = [], Run._embed
    monkeypatch.setattr(Run, "_embed", lambda run, pictures: (computed.append(len(pictures)), embed(run, pictures))[1])

    def kept() -> np.ndarray:
        return np.array(Run(TINY, tmp_path, torch.device("cpu")).image_embeddings)

    first = kept()
    assert sum(computed) == len(first) == TINY.world.training_scenes
    assert np.array_equal(kept(), first) and sum(computed) == len(first)  # read, not computed
    clip = load_model("clip", tmp_path / "clip")
    before = set((tmp_path / "data").glob("world-*/image-embeddings-*.npy"))
    for parameter in clip.parameters():
        parameter.data.mul_(1.1)
    save_model(tmp_path / "clip", clip, config_to_json(clip.config))
    other = kept()
    assert sum(computed) == 2 * len(first) and np.abs(other - first).max() > 0.01
    after = set((tmp_path / "data").glob("world-*/image-embeddings-*.npy"))
    assert len(before) == 1 and len(after) == 2 and before < after  # and the older CLIP's are still there
    pictures = to_tensor(np.load(next(iter(after)).with_name("pictures.npy"))[:8])
    with torch.no_grad():
        np.testing.assert_allclose(other[:8], clip.encode_image(pictures), atol=1e-5)


@pytest.mark.slow
def test_info_lists_presets_and_weights(tiny_weights: Path, capsys) -> None:
    assert main(["info", "--weights", str(tiny_weights)]) == 0
    text = capsys.readouterr().out
    assert "decoder 3,563.17 M" in text and text.count("model.safetensors: ") == len(STAGES + BASELINES) and "not there" not in text
