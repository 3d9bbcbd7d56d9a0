"""Short trainings on tiny models: that each case trains what it says, and that a stopped race goes on."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from minunclip import ablations
from minunclip.config import TINY
from minunclip.data.captions import parse
from minunclip.data.scenes import SHAPES
from minunclip.experiments import over_seeds, with_seed
from minunclip.pipeline import UnCLIP
from minunclip.stages import prepare
from minunclip.training import read_log

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tiny_weights):
    return UnCLIP.from_pretrained(tiny_weights)


def test_both_priors_race(model, tmp_path):
    table = ablations.race(model, tmp_path, count=6, stops=(2, 4), scenes=64, seed=11)
    assert list(table) == [f"{name}, time of {stop}" for name in ("diffusion prior", "AR prior") for stop in (2, 4)]
    assert table["AR prior, time of 4"]["training seconds"] > table["AR prior, time of 2"]["training seconds"] > 0
    assert [line["step"] for line in read_log(ablations.short_run(model, tmp_path, seed=11).folder / "race-prior-4" / "log.jsonl")] == [2, 4]
    again = ablations.race(model, tmp_path, count=6, stops=(2, 4), scenes=64, seed=11)  # trained already
    for name, row in table.items():
        assert {key: value for key, value in again[name].items() if key != "seconds"} == {key: value for key, value in row.items() if key != "seconds"}
    assert table["diffusion prior, time of 4"]["cosine"] != table["diffusion prior, time of 2"]["cosine"]


def test_seeds_and_experiments_share_a_folder(model, tmp_path):
    """As `make results` runs them: one --run for all, a world of its own for each seed."""
    race = partial(ablations.race, folder=tmp_path, count=6, stops=(2,), scenes=64)
    table = over_seeds([with_seed(race, model, number) for number in range(2)])
    assert table["AR prior, time of 2"]["± cosine"] > 0
    ablations.prior_choices(model, tmp_path, count=6, steps=1, scenes=64)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_world_is_told_in_the_words_of_the_weights(model, tmp_path):
    run = ablations.short_run(model, tmp_path, seed=3, scenes=64)
    assert run.world.tokenizer.merges == model.tokenizer.merges and len(run.world) == 64


def test_choices_of_the_prior_differ(model, tmp_path):
    table = ablations.prior_choices(model, tmp_path, count=6, steps=3, scenes=64)
    assert len({row["cosine"] for row in table.values()}) == len(table) == 8


def test_the_last_step_is_what_a_run_without_an_average_keeps(model, tmp_path):
    run = ablations._with_steps(ablations.short_run(model, tmp_path, seed=5, scenes=64), "prior", steps=3, batch_size=16)
    seen = ablations._fit(run, "prior", "with")
    kept = ablations._fit(ablations._with_steps(run, "prior", ema_decay=0.0), "prior", "without")
    assert not torch.equal(seen.to_embedding.weight, kept.to_embedding.weight)
    ablations._take_last_step(seen, run.folder / "with")
    torch.testing.assert_close(seen.state_dict(), kept.state_dict())


def test_a_decoder_that_has_met_no_caption_is_told_of_none(model):
    judge = ablations.Judge(model, 4, seed=0)
    network = model.models["decoder"]
    blind = ablations.Decoder(replace(network.config, caption_drop=1.0))
    blind.load_state_dict(network.state_dict())
    seen = []
    for one in (network, blind):
        images = []
        judge._right = lambda drawn, images=images: images.append(drawn) or dict.fromkeys(("shape", "colour", "all_right"), 0.0)
        for words in ("a red circle", "two blue stars"):
            judge.text = model.read([words] * 4)
            judge.decoder(one)
        seen.append(torch.equal(*images))
    assert seen == [False, True]


def test_an_unmasked_prior_sees_the_last_token_from_the_first(model):
    prior = ablations.DiffusionPrior(model.models["prior"].config)
    x = torch.randn(1, 5, 32, requires_grad=True)
    for unmasked in (False, True):
        if unmasked:
            ablations._unmasked(prior)
        average = copy.deepcopy(prior)  # as `fit` keeps it
        (gradient,) = torch.autograd.grad(average.transformer(x, causal=average.causal)[:, 0].sum(), x)
        assert (gradient[:, -1].abs().sum() > 0) == unmasked


def test_choices_of_the_decoder_differ(model, tmp_path):
    settings = replace(TINY.training["decoder"], steps=2)
    table = ablations.decoder_choices(model, tmp_path, count=6, scenes=64, settings=settings, width=32)
    assert len(table) == len({row.get("validation loss") for row in table.values()}) == 6
    objectives = ablations.decoder_objectives(model, tmp_path, count=6, scenes=64, settings=settings, width=32)
    assert objectives["as it is"] == table["as it is"]  # trained already
    asked = json.loads(next(tmp_path.glob("*/decoder, predicts epsilon and a variance/config.json")).read_text())["diffusion"]
    assert asked["objective"] == "epsilon" and asked["learned_variance"]


def test_clip_is_trained_further_where_words_stand_alone(model, tmp_path, monkeypatch):
    """The same batches and the same start; only the captions of pictures with a word differ, and they are that word."""
    seen, fit = {}, ablations._fit

    def noted(run, stage, name, change):
        _, clip, batch, *_ = prepare(stage, run)
        change(clip)
        assert all(torch.equal(value, model.models["clip"].state_dict()[key]) for key, value in clip.state_dict().items())
        seen[name] = [batch(step) for step in range(3)]
        return fit(run, stage, name, change)

    monkeypatch.setattr(ablations, "_fit", noted)
    table = ablations.words_alone(model, tmp_path, count=6, steps=2, scenes=64)
    assert list(table) == [f"{name}: {case}" for name in ("as it is", "trained further", "the word alone") for case in ("no word", "another shape's word")]
    for known, alone in zip(*seen.values()):
        assert torch.equal(known["images"], alone["images"])
        told, heard = ([model.tokenizer.decode(tokens) for tokens in batch["tokens"].tolist()] for batch in (known, alone))
        words = [parse(text).word for text in told]
        assert any(words) and all(text == word for text, word in zip(heard, words) if word)
        assert all(text in (before, *SHAPES) for text, before in zip(heard, told))  # terse captions leave words out
    again = ablations.words_alone(model, tmp_path, count=6, steps=2, scenes=64)  # trained already
    assert again == table
