import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from minunclip.config import COURSE
from minunclip.course import compare_run
from minunclip.curves import EXPECTED, band, diagnose, expected, with_worth
from minunclip.runs import Run
from minunclip.stages import train
from minunclip.training import read_log

STAGES = ("clip", "prior", "ar-prior", "decoder", "upsampler1", "upsampler2")
RUNS = {stage: json.loads((EXPECTED / f"{stage}-runs.json").read_text()) for stage in STAGES}  # trained so, and trained well with a seed left out


UNSEEN = {("decoder", "no latent scale"), ("decoder", "never dropped"), ("prior", "never dropped")}  # they leave no trace in the log: the module says why


@pytest.mark.parametrize(("stage", "fault"), [(stage, fault) for stage in STAGES for fault in RUNS[stage]])
def test_what_is_off_is_seen_from_the_log(stage, fault):
    assert diagnose(RUNS[stage][fault], stage)[0] == ("as expected" if (stage, fault) in UNSEEN else fault)


def test_every_stage_was_also_broken():
    assert all({"as expected", "learning rate too high", "learning rate too low"} <= set(runs) for runs in RUNS.values())
    assert "no causal mask" in RUNS["ar-prior"] and "no latent scale" in RUNS["prior"] and "no temperature" in RUNS["clip"]
    assert all({"never dropped", "always dropped"} <= set(RUNS[stage]) for stage in ("prior", "ar-prior", "decoder"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_bands_are_of_the_presets_settings_and_hold_a_seed_that_did_not_make_them(stage):
    given, settings = expected(stage), COURSE.training[stage]
    assert (given["steps"], given["batch_size"], given["learning_rate"]) == (settings.steps, settings.batch_size, settings.learning_rate)
    assert len(given["seeds"]) >= 3
    inside = []
    for figure, curve in given["curves"].items():
        values = np.array([line[figure] for line in with_worth(RUNS[stage]["as expected"]) if figure in line])
        assert len(values) == len(curve["step"])
        inside += [*((values >= curve["low"]) & (values <= curve["high"]))]
    assert np.mean(inside) > 0.9


def test_a_band_is_three_deviations_and_two_percent_wide():
    logs = [[{"step": step, "loss": value, "validation_loss": value - 10, "retrieval": value - 10} for step in (10, 20)] for value in (10.4, 10.5, 10.6)]
    curves = band(logs)
    assert curves["loss"] == {"step": [10, 20], "low": pytest.approx([9.99] * 2), "high": pytest.approx([11.01] * 2)}
    assert curves["validation_loss"]["low"] == pytest.approx([0.19] * 2) and curves["retrieval"]["high"] == pytest.approx([0.81] * 2)


def test_no_band_leaves_what_can_be():
    logs = [[{"step": 10, "loss": value, "untold_loss": value, "validation_loss": 0.5, "cosine": value, "retrieval": value}] for value in (0.2, 0.5, 0.8)]
    edges = {figure: (curve["low"][0], curve["high"][0]) for figure, curve in band(logs).items()}
    assert edges["loss"] == (0, pytest.approx(1.41)) and edges["retrieval"] == (0, 1) and edges["cosine"] == (pytest.approx(-0.41), 1)
    assert edges["worth"] == pytest.approx((-0.9, 0.9))  # the condition may be worth less than nothing
    for stage in STAGES:
        for figure, curve in expected(stage)["curves"].items():
            assert figure == "worth" or figure == "cosine" or min(curve["low"]) >= 0
            assert figure not in ("cosine", "retrieval") or max(curve["high"]) <= 1


def test_a_run_that_is_not_over_is_compared_as_far_as_it_goes():
    for fault in ("as expected", "learning rate too low", "no latent scale"):
        assert diagnose(RUNS["prior"][fault][:14], "prior")[0] == fault


def test_a_loss_that_is_no_number_is_a_learning_rate_too_high():
    log = [{"step": 10, "loss": 1.0}, {"step": 20, "loss": math.nan}]
    assert diagnose(log, "decoder")[0] == "learning rate too high"


def test_a_figure_has_a_panel_for_each_band_with_the_run_on_it(monkeypatch):
    shown = []
    monkeypatch.setattr("minunclip.plots.show", lambda figure, alt: shown.append(figure))
    log = RUNS["ar-prior"]["no causal mask"]
    compare_run(log, "ar-prior")
    (figure,) = shown
    assert [axes.get_title() for axes in figure.axes] == ["loss", "validation loss", "cosine", "gradient norm", "worth"]
    assert figure.axes[0].lines[0].get_ydata().tolist() == [line["loss"] for line in log] and len(figure.axes[2].collections) == 1


def test_a_file_is_shown_with_its_words(tmp_path: Path, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr("minunclip.plots.show", lambda figure, alt: shown.append(alt))
    (tmp_path / "prior").mkdir()
    lines = RUNS["prior"]["no latent scale"][:12]
    (tmp_path / "prior" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compare_run(tmp_path / "prior" / "log.jsonl")
    said = capsys.readouterr().out
    assert "prior: no latent scale; " in said and "120 steps so far, the band 240" in said
    assert "in grey bands: no latent scale. At the end: loss below, validation loss below" in shown[0]


def test_a_good_curve_says_what_no_curve_shows(monkeypatch, capsys):
    monkeypatch.setattr("minunclip.plots.show", lambda figure, alt: None)
    for stage, more in (("decoder", "never dropped"), ("clip", "")):
        compare_run(RUNS[stage]["as expected"], stage)
        said = capsys.readouterr().out
        assert f"{stage}: as expected" in said and (more in said if more else "No curve" not in said)


def test_what_cannot_be_compared_is_refused():
    for call, words in (
        (lambda: compare_run(RUNS["clip"]["as expected"]), "say of which stage"),
        (lambda: compare_run(RUNS["clip"]["as expected"], "checker"), "choose one of ar-prior, clip, decoder"),
        (lambda: diagnose([], "clip"), "at least 10 steps"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.slow
def test_a_training_of_today_is_as_expected(tmp_path: Path):
    train("upsampler1", Run(COURSE, tmp_path, torch.device("cpu"), seed=7), stop_after=60)
    assert diagnose(read_log(tmp_path / "upsampler1" / "log.jsonl"), "upsampler1")[0] == "as expected"
