import hashlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import wraps
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from minunclip import cli, packing
from minunclip.cli import main, slug
from minunclip.config import BASELINES, CPU, PRESETS, STAGES, CheckerConfig
from minunclip.data.checker import SceneReader
from minunclip.data.render import render
from minunclip.data.scenes import sample_scenes
from minunclip.data.tokenizer import Tokenizer
from minunclip.loading import load_model
from minunclip.models.upsampler import Upsampler
from minunclip.packing import EIGHT_BITS
from minunclip.pipeline import UnCLIP, hashes, weights_id
from minunclip.plots import evenly
from minunclip.runs import tile
from minunclip.safety import is_signed, read_facts
from minunclip.training import save_model, write_atomically


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def copy(tiny_weights: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_weights, tmp_path / "weights"))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr with which a command ends."""
    assert main(arguments) == 2
    seen = capsys.readouterr()
    assert seen.err.count("\n") == 1 and seen.out == ""
    return seen.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected"),
        (["paint"], "invalid choice: 'paint'"),
        (["sample"], "required: sample.captions"),
        (["sample", "a star", "--seed", "x"], "Got value: x"),
        (["sample", "a star", "--nope", "1"], "unrecognized arguments: --nope"),
        (["sample", "a star", "--prior", "magic"], "magic"),
        (["sample", "a star", "--out", "picture.jpg"], "must end in .png"),
        (["sample", "a star", "a \udcff star"], r"'a \udcff star' is not UTF-8 text"),
        (["demo", "a \ud83d star", "--out", "out"], r"'a \ud83d star' is not UTF-8 text"),
        (["sample", "a star", "--weights", "no/such/folder"], "is no folder with weights"),
        (["train", "clip", "--preset", "tiny", "--steps", "0"], "at least 1"),
        (["train", "clip", "--preset", "tiny", "--data", "emoji", "--learning_rate", "0", "--out", "run"], "at least 1"),
        (["train", "clip", "--preset", "tiny", "--batch_size", "3", "--out", "run"], "has no room"),
        (["train", "clip", "--preset", "tiny", "--seed", "-1", "--out", "run"], "seed -1 is out of range"),
        (["train", "clip", "--preset", "tiny", "--seed", str(2**70), "--out", "run"], "out of range"),
        (["train", "prior", "--preset", "tiny", "--clip", ".", "--out", "run"], "has no merges.txt"),
        (["data", "preview", "--seed", "-1"], "seed -1 is out of range"),
        (["sample", "a star", "--guidance", ".nan"], "a guidance of nan draws nothing"),
        (["demo", "a star", "--guidance", ".inf"], "a guidance of inf draws nothing"),
        (["evaluate", "--prior_guidance", "2"], "unrecognized arguments"),
        (["train", "prior", "--preset", "tiny", "--out", "run"], "has no trained CLIP"),
        (["train", "prior", "--preset", "tiny", "--out", "run", "--compile", "false", "--track", "false", "--sharded"], "has no trained CLIP"),
        (["data", "preview", "--held_out", "--count", "0"], "count is 0"),
        (["data", "preview", "--count", "0"], "count is 0"),
        (["pack", "no/such/run", "weights"], "config.json is missing"),
    ],
)
def test_bad_input_gets_one_line_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(arguments, capsys)
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("option", "message"), [(["--seed", "-1"], "seed -1 is out of range"), (["--seed", str(2**70)], "out of range"), (["--size", "17"], "size 17")]
)
def test_what_only_the_weights_can_refuse(tiny_weights: Path, tmp_path: Path, capsys, option, message) -> None:
    assert message in refused(["sample", "a star", "--weights", str(tiny_weights), "--out", str(tmp_path / "x.png"), *option], capsys)
    assert files(tmp_path) == set()


def test_the_autoregressive_prior_is_missed_only_when_asked_for(copy: Path, tmp_path: Path, capsys) -> None:
    shutil.rmtree(copy / "ar-prior")
    command = ["sample", "a star", "--size", "16", "--weights", str(copy), "--out", str(tmp_path / "x.png")]
    assert "no autoregressive prior" in refused([*command, "--prior", "autoregressive"], capsys)
    assert main(command) == 0


def test_a_whole_model_of_another_preset_is_named(copy: Path, tmp_path: Path, capsys) -> None:
    command = ["sample", "a star", "--weights", str(copy), "--out", str(tmp_path / "x.png")]
    config = json.loads((copy / "upsampler1" / "config.json").read_text())
    save_model(
        copy / "upsampler1", Upsampler(CPU.upsampler1), config | {"low_size": 32, "high_size": 128, "unet": json.loads(json.dumps(vars(CPU.upsampler1.unet)))}
    )
    assert "upsampler1 enlarges pictures of 32, not of 16" in refused(command, capsys)


def test_a_tokenizer_with_more_tokens_than_the_models_know_is_named(copy: Path, tmp_path: Path, capsys) -> None:
    Tokenizer([(2, 2)] + [(2, i) for i in range(3, 258)]).save(copy / "tokenizer.json")  # 514 tokens
    assert "tokenizer.json has 514 tokens" in refused(["sample", "a star", "--weights", str(copy), "--out", str(tmp_path / "x.png")], capsys)


def test_many_pictures_are_written_as_they_come(tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(cli, "AT_ONCE", 2)
    command = ["sample", "a star", "a ring", "--count", "2", "--size", "16", "--weights", str(tiny_weights), "--out"]
    assert main([*command, str(tmp_path / "x.png"), "--seed", "3"]) == 0
    facts = [read_facts(tmp_path / f"x-{i}.png") for i in range(4)]
    assert [(found["prompt"], found["seed"]) for found in facts] == [("a star", "3"), ("a star", "4"), ("a ring", "3"), ("a ring", "4")]
    before = files(tmp_path)
    capsys.readouterr()
    refused([*command, str(tmp_path / "z.png"), "--seed", str(2**30 - 1)], capsys)  # the second of two is out of range
    assert files(tmp_path) == before
    drawn, generate = [], UnCLIP.generate

    def stopped(self: UnCLIP, *rest: object, **more: object) -> object:
        drawn.append(1)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return generate(self, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(UnCLIP, "generate", stopped)
    assert main([*command, str(tmp_path / "y.png"), "--seed", "3"]) == 130
    assert capsys.readouterr().err == "stopped\n"
    assert (tmp_path / "y-1.png").read_bytes() == (tmp_path / "x-1.png").read_bytes() and not (tmp_path / "y-2.png").exists()


def test_what_stands_in_the_way_is_said_before_anything_is_drawn(tiny_weights: Path, copy: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    weights = ["--weights", str(tiny_weights)]
    assert "give --out the name of a folder" in refused(["demo", "a star", "--out", str(tmp_path / "file"), *weights], capsys)
    assert "give --onnx the name of a folder" in refused(["export", "--onnx", str(tmp_path / "file"), *weights], capsys)
    shutil.rmtree(copy / "ar-prior")
    assert "no autoregressive prior" in refused(["evaluate", "--prior", "autoregressive", "--weights", str(copy)], capsys)
    (tmp_path / "options.yaml").write_bytes(b"guidance: \xff\n")
    assert "--config is not UTF-8" in refused(["sample", "a star", "--config", str(tmp_path / "options.yaml")], capsys)


def test_guidance_and_seed_reach_the_models(tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, generate = [], UnCLIP.generate

    def noted(self: UnCLIP, *rest: object, **more: object) -> object:
        given.append(inspect.signature(generate).bind(self, *rest, **more).arguments)
        return generate(self, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(UnCLIP, "generate", noted)
    weights = ["--weights", str(tiny_weights)]
    assert main(["sample", "a star", "--guidance", "3", "--prior_guidance", "2.5", "--size", "16", *weights, "--out", str(tmp_path / "x.png")]) == 0
    assert main(["demo", "a star", "--seed", "7", "--guidance", "3", *weights, "--out", str(tmp_path / "demo")]) == 0
    assert (given[0]["guidance"], given[0]["prior_guidance"]) == (3, 2.5) and (given[1]["seed"], given[1]["guidance"]) == (7, 3)
    picture = tmp_path / "preview.png"
    assert main(["data", "preview", "--count", "3", "--seed", "5", "--held_out", "--out", str(picture)]) == 0
    assert np.array_equal(np.asarray(Image.open(picture)), tile(render(sample_scenes(3, 5, True), 128)))


def test_strange_captions_are_drawn_and_warned_of(tiny_weights: Path, tmp_path: Path, capsys) -> None:
    command = ["--size", "16", "--weights", str(tiny_weights), "--out", str(tmp_path / "x.png")]
    assert main(["sample", "", *command]) == 0 and capsys.readouterr().err == ""
    assert main(["sample", "a red star " * 40, *command]) == 0
    assert "caption cut to 32 tokens" in capsys.readouterr().err
    assert main(["sample", "a green giraffe", "a green giraffe", *command]) == 0
    assert capsys.readouterr().err == "warning: the models have never seen the word 'giraffe'\n"  # once


def test_a_picture_names_all_the_weights_it_came_from(copy: Path, tmp_path: Path) -> None:
    assert main(["sample", "🐘 star", "--seed", "3", "--size", "16", "--weights", str(copy), "--out", str(tmp_path / "x.png")]) == 0
    facts = Image.open(tmp_path / "x.png").text
    drawn = {"prior": "diffusion", "guidance": "2.0", "prior_guidance": "1.5", "sampler": "dpm, 8 steps"}
    assert facts == {"prompt": "🐘 star", "seed": "3", **drawn, "weights": weights_id(copy)}
    assert hashes(copy)["clip"] == hashlib.sha256((copy / "clip" / "model.safetensors").read_bytes()).hexdigest()
    others = weights_id(copy, without=["clip"])
    (copy / "clip" / "model.safetensors").write_bytes(b"other")
    assert weights_id(copy) != facts["weights"] and weights_id(copy, without=["clip"]) == others


def test_a_signature_and_a_list_of_what_is_not_drawn(copy, tmp_path, capsys) -> None:
    given = ["sample", "a star", "--weights", str(copy), "--out", str(tmp_path / "a.png")]
    assert main([*given, "--signature"]) == 0 and is_signed(np.asarray(Image.open(tmp_path / "a.png")))
    assert main(given) == 0 and not is_signed(np.asarray(Image.open(tmp_path / "a.png")))
    capsys.readouterr()
    (tmp_path / "terms.txt").write_text("heart\nstar\n")
    (tmp_path / "a.png").unlink()
    assert "asks for 'star'" in refused([*given, "--blocklist", str(tmp_path / "terms.txt")], capsys)
    assert "none.txt" in refused([*given, "--blocklist", str(tmp_path / "none.txt")], capsys)
    assert not (tmp_path / "a.png").exists()
    (tmp_path / "terms.txt").write_text("heart\n")
    assert main([*given, "--blocklist", str(tmp_path / "terms.txt")]) == 0


def test_count_gives_each_caption_the_same_seeds(tiny_weights: Path, tmp_path: Path) -> None:
    command = ["--size", "16", "--weights", str(tiny_weights), "--seed", "4", "--out"]
    assert main(["sample", "a ring", "a star", "--count", "2", *command, str(tmp_path / "many.png")]) == 0
    assert main(["sample", "a star", *command, str(tmp_path / "one.png")]) == 0
    several, one = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("many-2.png", "one.png"))
    assert abs(several - one).max() <= 1


@pytest.mark.parametrize("prompt", ["", "❤️ 🟥 ein rotes Herz", "赤い円の上に青い四角", "a red circle " * 60])
def test_the_demo_takes_any_caption(tiny_weights: Path, tmp_path: Path, prompt: str) -> None:
    assert main(["demo", prompt, "--weights", str(tiny_weights), "--out", str(tmp_path)]) == 0
    name = slug(prompt)
    assert files(tmp_path) == {f"{name}.png", f"{name}-stages.png"}
    assert {read_facts(tmp_path / file)["prompt"] for file in files(tmp_path)} == {prompt}


def test_the_demo_shows_every_stage(copy: Path, tmp_path: Path, capsys) -> None:
    shutil.rmtree(copy / "checker")
    command = ["demo", "Two $mall stars!", "--weights", str(copy), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert files(tmp_path / "out") == {"two-mall-stars.png", "two-mall-stars-stages.png"}
    assert Image.open(tmp_path / "out" / "two-mall-stars.png").size == (64, 64)
    kept = [read_facts(tmp_path / "out" / name) for name in ("two-mall-stars.png", "two-mall-stars-stages.png")]
    assert kept[0]["prompt"] == "Two $mall stars!" and kept[0].items() <= kept[1].items()
    assert "checker is not there" in text and all(stage in text for stage in ("text", "prior", "decoder", "upsampler1", "upsampler2"))
    save_model(copy / "checker", SceneReader(CheckerConfig(4)), {"width": 4})
    assert main([*command, "--prior", "autoregressive"]) == 0
    assert "checker: " in (text := capsys.readouterr().out) and "count" in text and "not there" not in text


def test_frames_keep_both_ends() -> None:
    frames = [np.full((1, 1, 3), i, np.uint8) for i in range(25)]
    assert [step for step, _ in evenly(frames, 6)] == [1, 6, 11, 15, 20, 25]
    assert [step for step, _ in evenly(frames[:2], 6)] == [1, 2]


@pytest.mark.parametrize(("text", "name"), [("A red circle, above!", "a-red-circle-above"), ("", "picture"), ("../../etc", "etc"), ("🐘", "picture")])
def test_slugs_are_plain_file_names(text: str, name: str) -> None:
    assert slug(text) == name
    assert len(slug("word " * 99)) <= 60


@pytest.mark.slow
def test_a_dry_run_tells_and_writes_nothing(tmp_path: Path, capsys) -> None:
    assert main(["train", "all", "--preset", "tiny", "--out", str(tmp_path / "run"), "--batch_size", "7", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(STAGES) and all("batch_size=7" in line for line in lines)
    assert all((" GB at the peak" in line) == (stage != "checker") for stage, line in zip(STAGES, lines))
    command = ["train", "decoder", "--preset", "paper", "--out", str(tmp_path / "run"), "--recompute", "--dry-run"]
    assert main(command) == 0 and "3,563.17 M parameters, 430.0 MB of activations an example in fp32, 2048 at once" in capsys.readouterr().out
    assert "use --dry-run" in refused(command[:-1], capsys)
    for steps, warmup, looks in (("4000", 600, (100, 500)), ("100", 10, (25, 25))):  # the preset's own steps are warmed up, and looked at, as the preset is
        assert main(["train", "checker", "--preset", "cpu", "--steps", steps, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
        told = capsys.readouterr().out
        assert f"warmup={warmup}," in told and "sample_every={1}, validate_every={0}".format(*looks) in told
    assert files(tmp_path) == set()


def test_training_by_command_and_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "options.yaml").write_text("steps: 2\nbatch_size: 4\n")
    out = ["train", "upsampler1", "--preset", "tiny", "--out", str(tmp_path / "run")]
    assert main([*out, "--config", str(tmp_path / "options.yaml")]) == 0
    assert json.loads((tmp_path / "run" / "upsampler1" / "log.jsonl").read_text().splitlines()[-1])["step"] == 2
    capsys.readouterr()
    more = [*out[:-1], str(tmp_path / "more"), "--config", str(tmp_path / "options.yaml"), "--steps", "3"]  # what is said last counts
    assert main(more) == 0
    assert json.loads((tmp_path / "more" / "upsampler1" / "log.jsonl").read_text().splitlines()[-1])["step"] == 3
    assert "batch_size=4" in (main([*more, "--dry-run"]), capsys.readouterr().out)[1]
    capsys.readouterr()
    assert "other settings" in [line for line in (main(out), capsys.readouterr().err)[1].splitlines() if line.startswith("minunclip")][0]

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train_stage", interrupt)
    assert main(out) == 130


def test_preview_writes_a_grid_and_says_a_caption_a_scene(tmp_path: Path, capsys) -> None:
    assert main(["data", "preview", "--count", "3", "--out", str(tmp_path / "world.png")]) == 0
    assert Image.open(tmp_path / "world.png").size == (8 * 128, 128) and len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(
    ("option", "message"), [(["--json", "."], "is a folder"), (["--samples", "."], "is a folder"), (["--size", "17"], "size 17"), (["--seed", "-1"], "seed -1")]
)
def test_an_evaluation_that_could_not_be_written_is_not_begun(tiny_weights: Path, tmp_path: Path, monkeypatch, capsys, option, message) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minunclip.report.clip_figures", lambda model: pytest.fail("measured first"))
    assert message in refused(["evaluate", "--weights", str(tiny_weights), *option], capsys)
    assert files(tmp_path) == set()


def test_a_run_is_not_packed_into_itself(tiny_run: Path, capsys) -> None:
    before = (tiny_run / "clip" / "model.safetensors").read_bytes()
    assert "pack it into another folder" in refused(["pack", str(tiny_run), str(tiny_run / "clip" / "..")], capsys)
    assert (tiny_run / "clip" / "model.safetensors").read_bytes() == before


def test_what_reads_other_words_does_not_stay_beside_what_is_packed(tiny_run: Path, copy: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("weights", "*.npy", *BASELINES)))
    assert main(["pack", str(run), str(copy)]) == 0 and (copy / "glide").exists()
    path = next((run / "data").glob("world-*/tokenizer.json"))
    words = Tokenizer.load(path)
    Tokenizer(list(words.merges)[:-1]).save(path)
    assert main(["pack", str(run), str(copy)]) == 0 and not (copy / "glide").exists() and (copy / "checker").exists()


def test_packing_takes_few_bits_a_weight_and_writes_cards(tiny_run: Path, tiny_weights: Path) -> None:
    for stage in STAGES + BASELINES:
        whole, packed = (load_model(stage, folder / stage).state_dict() for folder in (tiny_run, tiny_weights))
        for key, value in whole.items():
            loss = 0.005 * value.abs().max() if stage in EIGHT_BITS else 1e-3 * value.abs()
            assert ((packed[key] - value).abs() <= loss + 1e-6).all(), (stage, key)
        files = [(folder / stage / "model.safetensors").stat().st_size for folder in (tiny_run, tiny_weights)]
        assert files[1] < (0.45 if stage in EIGHT_BITS else 0.6) * files[0], stage
        card = (tiny_weights / stage / "card.md").read_text()
        assert f"minunclip train {stage} --preset tiny --seed 0 --steps 12" in card and "| seconds |" in card and "| commit |" in card
        assert ("| validation loss |" in card or "| shape error |" in card) and "![loss" in card and (tiny_weights / stage / "loss.png").exists()
    assert UnCLIP.from_pretrained(tiny_weights).models.keys() == set(STAGES + BASELINES)


def test_a_card_goes_with_the_model_that_it_describes(tiny_run: Path, tiny_weights: Path, copy: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("weights", "*.npy", *BASELINES)))
    for stage in ("upsampler1", "upsampler2"):  # as from weights to start from, not trained in this run
        for name in ("training.pt", "log.jsonl", "loss.png"):
            (run / stage / name).unlink()
    (run / "upsampler2" / "card.md").write_text("of whoever trained it")
    assert main(["pack", str(run), str(copy)]) == 0
    assert (copy / "upsampler2" / "card.md").read_text() == "of whoever trained it" and not (copy / "upsampler2" / "loss.png").exists()
    assert not (copy / "upsampler1" / "card.md").exists() and not (copy / "upsampler1" / "loss.png").exists()
    assert "minunclip train clip" in (copy / "clip" / "card.md").read_text() and (copy / "glide" / "card.md").exists()  # that one is not in the run


@pytest.mark.parametrize("lost", ["clip", "upsampler2", "data"])
def test_packing_an_unfinished_run_writes_nothing(tiny_run: Path, tmp_path: Path, capsys, lost: str) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("weights", "*.npy")))
    shutil.rmtree(run / lost)
    refused(["pack", str(run), str(tmp_path / "packed")], capsys)
    assert not (tmp_path / "packed").exists()


def test_a_baseline_that_has_not_begun_is_left_out_of_the_pack_and_a_damaged_checkpoint_is_named(tiny_run: Path, tmp_path: Path, capsys) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("weights", "*.npy", *BASELINES)))
    (run / "glide").mkdir()
    (run / "glide" / "log.jsonl").touch()
    assert main(["pack", str(run), str(tmp_path / "packed")]) == 0 and not (tmp_path / "packed" / "glide").exists()
    capsys.readouterr()
    (run / "decoder" / "training.pt").write_bytes(b"")
    assert "training.pt is damaged" in refused(["pack", str(run), str(tmp_path / "packed")], capsys)


def test_packing_that_fails_at_the_last_card_leaves_the_older_weights(tiny_run: Path, tiny_weights: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    packed = Path(shutil.copytree(tiny_weights, tmp_path / "packed"))
    for stage in STAGES + BASELINES:  # of an earlier training
        (packed / stage / "model.safetensors").write_bytes(b"older")
    (packed / "notes.txt").write_text("one's own")
    before = {name: (packed / name).read_bytes() for name in files(packed) if (packed / name).is_file()}

    def full(path: Path, write) -> None:
        if path.name == "card.md" and path.parent.name == BASELINES[-1]:
            raise OSError("No space left on device")
        write_atomically(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_atomically", full)
        assert "No space left" in refused(["pack", str(tiny_run), str(packed)], capsys)
    assert {name: (packed / name).read_bytes() for name in files(packed) if (packed / name).is_file()} == before
    assert files(tmp_path) == {"packed"} | {f"packed/{name}" for name in files(packed)}  # nothing is left beside it
    assert main(["pack", str(tiny_run), str(packed)]) == 0
    assert hashes(packed) == hashes(tiny_weights) and files(packed) == files(tiny_weights) | {"notes.txt"}


def test_packing_whose_last_rename_fails_puts_the_older_weights_back(tiny_run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "notes.txt").write_text("one's own")
    rename = os.replace

    def fails(start: Path, end: Path) -> None:
        if Path(start).name == "new":
            raise OSError("Device or resource busy")
        rename(start, end)

    monkeypatch.setattr(packing.os, "replace", fails)
    assert "Device or resource busy" in refused(["pack", str(tiny_run), str(tmp_path / "packed")], capsys)
    assert files(tmp_path) == {"packed", "packed/notes.txt"}


def test_packing_asks_which_of_two_tokenizers_is_meant(tiny_run: Path, tmp_path: Path, capsys) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("weights", "*.npy")))
    (run / "data" / "world-other").mkdir()
    Tokenizer([]).save(run / "data" / "world-other" / "tokenizer.json")
    assert "different tokenizers" in refused(["pack", str(run), str(tmp_path / "packed")], capsys)


@pytest.mark.slow
def test_a_reader_who_leaves_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m minunclip.cli data preview --count 500 --out {tmp_path / 'a.png'} | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and done.stderr == ""


def written_commands() -> list[str]:
    """Every line of README.md, notebooks/README.md and docs that starts the program, and the command of every card."""
    root = Path(__file__).parents[1]
    pages = [path.read_text() for path in (root / "README.md", root / "notebooks" / "README.md", *sorted(root.glob("docs/*.md")))]
    cards = [line for card in sorted(root.glob("data/weights/*/card.md")) for line in re.findall("`(minunclip train .*)`", card.read_text())]
    blocks = [line for page in pages for block in re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL) for line in block.splitlines()]
    return [line for line in blocks if re.match(r"(\.venv/bin/|torchrun .* -m )?minunclip", line)] + cards


@pytest.mark.parametrize("line", written_commands())
def test_the_program_understands_every_command_of_pages_and_cards(line: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    arguments = shlex.split(re.split("minunclip(?:\\.cli)? ", line, maxsplit=1)[1], comments=True)
    called = []
    monkeypatch.setattr(cli, "local_folder", lambda name: name)  # folders that earlier lines would have made
    for name, command in cli.COMMANDS.items():
        monkeypatch.setitem(cli.COMMANDS, name, wraps(command)(lambda _name=name, **options: called.append(_name)))
    assert main(arguments) == 0, capsys.readouterr().err
    assert called == [" ".join(arguments[: 2 if arguments[0] == "data" else 1])]


def test_a_preset_that_is_trained_by_name_is_in_the_list() -> None:
    assert set(get_args(cli.train.__annotations__["preset"])) == set(PRESETS) == set(get_args(get_args(cli.info.__annotations__["preset"])[0]))
