import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minunclip import report
from minunclip.cli import WEIGHTS, main
from minunclip.config import BASELINES
from minunclip.data.captions import LEVELS, compare, describes, parse
from minunclip.data.render import render
from minunclip.evaluation import held_out_captions
from minunclip.experiments import unused
from minunclip.pipeline import UnCLIP, weights_id
from minunclip.safety import read_facts


class Knows:
    """A checker that makes no mistake, as it is told what is drawn."""

    def __init__(self, scenes):
        self.scenes = scenes

    def read(self, images):
        return self.scenes[: len(images)]


@pytest.fixture
def model(tiny_weights):
    return UnCLIP.from_pretrained(tiny_weights)


def test_true_pictures_are_all_right_and_as_far_from_real_ones_as_the_floor(model):
    scenes, captions = zip(*held_out_captions(40))
    pictures = render(list(scenes), 32)
    real = report.embed_scenes(model, scenes, 32)
    model.models["checker"] = Knows(scenes)
    judged = report.Judged(model)
    judged.add(pictures, captions)
    figures = judged.figures((real, real))
    assert set(figures["accuracy"].values()) == {1.0}
    assert figures["fid"] == pytest.approx(figures["fid_floor"], abs=1e-4) and figures["precision"] == figures["recall"] == 1
    model.models["checker"] = Knows(scenes[1:] + scenes[:1])  # each picture now shows the scene of another caption
    judged = report.Judged(model)
    judged.add(pictures, captions)
    assert judged.figures(None)["accuracy"]["all_right"] < 0.5 and "fid" not in judged.figures(None)


def test_one_picture_again_and_again_is_precise_and_recalls_itself_alone(model):
    real = torch.nn.functional.normalize(torch.randn(40, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    judged = report.Judged(model)
    judged.reports, judged.z_i = [compare(parse("a star"), held_out_captions(1)[0][0])] * 40, [real[:1].repeat(40, 1)]
    judged.z_t = judged.z_i
    figures = judged.figures((real, real))
    assert figures["precision"] == 1 and figures["recall"] == pytest.approx(1 / 40) and figures["clip_score"] == pytest.approx(1)


def test_a_prior_that_knows_the_picture_has_cosine_one(model, monkeypatch):
    pairs = held_out_captions(12)
    true = report.embed_scenes(model, [scene for scene, _ in pairs], 32)
    monkeypatch.setattr(UnCLIP, "draw_embeddings", lambda *_: (true, true))
    figures = report.prior_figures(model, pairs)
    for name in ("diffusion", "autoregressive", "same_caption"):
        assert set(figures[name]) == {"all", *LEVELS} and all(value == pytest.approx(1, abs=1e-5) for value in figures[name].values())
    text = model.read([words for _, words in pairs])
    assert figures["z_t"]["all"] == pytest.approx(float((text.z_t * true).sum(dim=1).mean()), abs=1e-5)
    assert figures["modality_gap"]["all"] == pytest.approx(float((true.mean(0) - text.z_t.mean(0)).norm()), abs=1e-5)


def test_figures_of_priors_are_of_their_own_levels_and_draws(model, monkeypatch):
    pairs = held_out_captions(12)
    true = report.embed_scenes(model, [scene for scene, _ in pairs], 32)
    levels = torch.arange(12) % 4

    def draw(self, text, prior, seeds):
        return (-true if seeds[0] >= 2**31 else true * (levels[:, None] + 1.0)), true

    monkeypatch.setattr(UnCLIP, "draw_embeddings", draw)
    figures = report.prior_figures(model, pairs)
    assert [figures["diffusion"][level] for level in LEVELS] == pytest.approx([1, 2, 3, 4])
    assert [figures["same_caption"][level] for level in LEVELS] == pytest.approx([-1, -2, -3, -4])


def test_a_probe_is_asked_about_pictures_that_it_was_not_fitted_to(model, monkeypatch):
    monkeypatch.setattr(report, "embed_scenes", lambda model, scenes, size: torch.randn(len(scenes), 400, generator=torch.Generator().manual_seed(0)))
    assert report.probe(model, count=600)["shape"] < 0.4  # embeddings that know nothing: 400 numbers fit 150 pictures exactly


def test_retrieval_by_chance_is_poor_and_by_a_clip_that_knows_is_perfect(model, monkeypatch):
    by_chance = report.clip_figures(model, count=50)
    assert by_chance["full"]["image_to_text"] < 0.3  # twelve steps teach little
    codes = torch.nn.functional.normalize(torch.randn(50, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    monkeypatch.setattr(report, "embed_scenes", lambda *_: codes)
    monkeypatch.setattr(UnCLIP, "read", lambda self, captions: type("Text", (), {"z_t": codes}))
    assert report.clip_figures(model, count=50)["full"] == {"image_to_text": 1.0, "text_to_image": 1.0}


def test_binding_asks_for_captions_that_differ_in_the_relation_alone(model, monkeypatch):
    asked, shown = [], []

    def read(self, captions):
        asked.append(captions)
        true = torch.tensor([describes(text, scene) for text, scene in zip(captions, shown)])
        return type("Text", (), {"z_t": torch.where(true, 1.0, -1.0)[:, None].expand(-1, 32)})

    monkeypatch.setattr(UnCLIP, "read", read)
    monkeypatch.setattr(report, "embed_scenes", lambda model, scenes, size: shown.extend(scenes) or torch.ones(len(scenes), 32))
    assert report.binding(model, count=30) == 1.0
    words = {"left", "right", "above", "below", "over", "under", "to", "the", "of"}
    for true, false in zip(*asked):
        assert true != false and set(true.split()) ^ set(false.split()) <= words


def test_whoever_looks_sees_the_pictures_that_are_judged(model):
    texts, seen = ["a red star", "two blue rings"], []
    report.evaluate(model, texts, seed=3, look=seen.append)
    assert len(seen) == 1 and np.array_equal(seen[0], model.generate(texts, seed=[3, 4]).pictures[64])


@pytest.mark.slow
def test_pictures_are_enlarged_for_as_many_captions_as_asked(model):
    pictures = report.evaluate(model, ["a red star"] * 60, enlarged=1)["pictures"]
    assert {side: found["captions"] for side, found in pictures.items()} == {"16": 60, "32": 50, "64": 50}  # fifty are drawn at a time


@pytest.mark.slow
def test_evaluate_writes_what_it_prints(tiny_weights, tmp_path, capsys):
    path = tmp_path / "figures.json"
    picture = tmp_path / "samples.png"
    assert main(["evaluate", "--count", "6", "--json", str(path), "--samples", str(picture), "--weights", str(tiny_weights)]) == 0
    assert Image.open(picture).width > 500 and read_facts(picture).items() >= {"seed": "0", "prior": "diffusion", "weights": weights_id(tiny_weights)}.items()
    figures, text = json.loads(path.read_text()), capsys.readouterr().out
    assert set(figures["pictures"]) == {"16", "32", "64", "without_prior"} and set(figures["clip"]) == {"full", "terse"}
    assert {"z_t", "diffusion", "autoregressive", "random_picture", "same_caption"} < set(figures["prior_cosine"])
    for found in figures["pictures"].values():
        assert all(0 <= share <= 1 for share in found["accuracy"].values()) and found["fid_floor"] > 5e-5  # of two sets, not of one
        assert found["accuracy"].keys() <= found["checker_error"].keys()
        assert f"CLIP score {found['clip_score']:.3f}, fid {found['fid']:.4f}" in text
        assert sum(part["captions"] for part in found["by_kind"].values()) == 6
        right = sum(part["captions"] * part["all_right"] for part in found["by_kind"].values()) / 6
        assert right == pytest.approx(found["accuracy"]["all_right"])
        assert all(f"captions: all right {part['all_right']:6.1%}" in text for part in found["by_kind"].values())
    table = report.as_markdown(figures)
    assert f"| colour right | {figures['pictures']['16']['accuracy']['colour']:.1%} | " in table and "the diffusion prior" in table
    for found in figures["clip"].values():
        assert f"image to text {found['image_to_text']:.1%}" in text
    figures["pictures"] = {name: figures["pictures"][name] for name in ("32", "without_prior")}  # as with --size 32
    assert "| 6 held-out captions | 32 × 32 | without a prior, 32 | checker's own error, 32 | 32 |" in report.as_markdown(figures)


def test_own_captions_are_judged_without_true_pictures(tiny_weights, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("a red circle\n\ntwo $tars\n", encoding="utf-8")
    assert main(["evaluate", "--captions", str(tmp_path / "own.txt"), "--size", "16", "--json", str(tmp_path / "a.json"), "--weights", str(tiny_weights)]) == 0
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["captions"] == 2 and set(figures["pictures"]) == {"16"} and "clip" not in figures and "fid" not in figures["pictures"]["16"]
    assert "'tars'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"\n \n", [], "no captions"),
        (b"\xff\xfe\xff", [], "not UTF-8"),
        (None, [], "own.txt"),
        (b"a star", ["--size", "17"], "size 17"),
        (b"a star", ["--count", "3"], "count is 3"),
        (b"a star", ["--seed", "-1"], "seed -1"),
        (b"a star", ["--json", "nowhere/a.json"], "nowhere"),
    ],
)
def test_bad_input_gets_one_line_and_writes_nothing(tiny_weights, tmp_path, capsys, monkeypatch, content, options, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "own.txt").write_bytes(content)
    given = ["evaluate", "--captions", "own.txt", "--json", "a.json", "--weights", str(tiny_weights), *options]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "a.json").exists()


def test_weights_without_a_checker_cannot_be_evaluated(model):
    del model.models["checker"]
    with pytest.raises(ValueError, match="checker"):
        report.evaluate(model, ["a star"])


def test_the_readme_shows_the_figures_of_the_last_evaluation():
    home = Path(__file__).parents[1]
    figures = json.loads((home / "results" / "evaluation.json").read_text())
    assert report.as_markdown(figures) in (home / "README.md").read_text()
    assert figures["weights"] == weights_id(WEIGHTS, without=BASELINES), "the weights have changed since: run `make evaluate`"
    assert figures["captions"] == 1000 and min(figures["clip"]["full"].values()) >= 0.95
    for size in ("32", "128", "512"):
        shares = figures["pictures"][size]["accuracy"]
        assert shares["all_right"] >= 0.8 and all(share >= 0.95 for name, share in shares.items() if name not in ("word", "all_right")), size


def test_the_readme_has_the_figures_of_the_kept_experiment_on_the_weights_that_ship() -> None:
    home = Path(__file__).parents[1]
    kept = json.loads((home / "results" / "importance-of-the-prior.json").read_text())
    assert kept["weights"] == weights_id(home / "data" / "weights", without=unused("importance-of-the-prior"))
    readme = (home / "README.md").read_text()
    for name in ("floor", "floor of near-copies"):
        floor = kept["table"].pop(name)
        assert f"| {floor['FID']:.3f} ± {floor['± FID']:.3f} | |" in readme
    for row in kept["table"].values():
        spread = {name: row[f"± {name}"] for name in ("all_right", "FID", "diversity")}
        shares = f"{row['all_right']:.1%} ± {100 * spread['all_right']:.1f}"
        assert f"| {shares} | {row['FID']:.3f} ± {spread['FID']:.3f} | {row['diversity']:.3f} ± {spread['diversity']:.3f} |" in readme


def test_the_readme_shows_what_two_hours_of_training_come_to():
    home = Path(__file__).parents[1]
    trained, ships = (json.loads((home / "results" / name).read_text()) for name in ("two-hours.json", "evaluation.json"))
    readme = (home / "README.md").read_text()
    for attribute in trained["pictures"]["32"]["accuracy"]:
        title = "all but words at once" if attribute == "all_right" else attribute
        shares = " | ".join(f"{figures['pictures']['32']['accuracy'][attribute]:.1%}" for figures in (trained, ships))
        assert f"| {title} right | {shares} |" in readme
    for prior in ("diffusion", "autoregressive"):
        assert " | ".join(f"{figures['prior_cosine'][prior]['all']:.3f}" for figures in (trained, ships)) in readme
