import inspect
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from minunclip import experiments
from minunclip.ablations import TRAININGS
from minunclip.baselines.dalle import sample_dalle
from minunclip.cli import WEIGHTS, main
from minunclip.data.captions import caption, compare, parse
from minunclip.data.render import render
from minunclip.data.unsaid import another, unsaid
from minunclip.data.world import to_tensor
from minunclip.evaluation import held_out_captions
from minunclip.pipeline import UnCLIP, weights_id
from minunclip.safety import read_facts


@pytest.fixture(scope="module")
def model(tiny_weights):
    return UnCLIP.from_pretrained(tiny_weights)


class Knows:
    """A checker that knows which scenes pictures show (nothing where it does not know a picture), and sees all their pixels."""

    def __init__(self, known):
        self.known = [(picture, scene) for pictures, scenes in known for picture, scene in zip(pictures, scenes)]

    def read(self, images):
        nothing = experiments.Scene((), "white")
        return [next((scene for picture, scene in self.known if torch.equal(picture, image)), nothing) for image in images]

    def features(self, images):
        return images.flatten(1)


def test_psnr_of_a_constant_error_has_a_closed_form():
    truth = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(experiments.psnr(truth + torch.tensor([0.2, 0.02])[:, None, None, None], truth), torch.tensor([20.0, 40.0]))


def test_no_two_networks_and_no_two_repetitions_share_a_seed():
    lists = [seeds for seed in (6, 106, 206) for seeds in experiments.seeds_apart(200, seed)]
    assert len(set().union(*lists)) == sum(map(len, lists)) == 6 * 200


def test_inversion_gets_better_with_steps(model):
    table = experiments.inversion(model, count=4, steps=(5, 50))
    assert table["steps 50"]["PSNR undone"] > table["steps 5"]["PSNR undone"] > 0
    images = experiments._small(model, experiments.sample_scenes(4, 1, held_out=True))
    back = model.redraw(*model.invert(images, 5), range(4), 5)
    errors = ((back.clamp(-1, 1) - images) / 2).square().mean((1, 2, 3))
    assert table["steps 5"]["PSNR drawn"] == pytest.approx(float(-10 * errors.log10().mean()), abs=1e-3)


def test_variations_move_more_with_eta(model):
    table = experiments.varying(model, count=3, etas=(0.0, 1.0), copies=2, steps=10)
    assert table["eta 1"]["pixel change"] > table["eta 0"]["pixel change"] and 0 <= table["eta 0"]["all_right"] <= 1


def test_what_captions_never_say_is_read_off_a_picture():
    scenes, rng = experiments.single_things(60, seed=5), np.random.default_rng(0)
    others = [another(scene, rng) for scene in scenes]
    found = unsaid(to_tensor(render(others, 32)), scenes)
    things = [scene.things[0] for scene in others]
    truth = torch.tensor([[thing.x, thing.y, thing.rotation, *thing.shade] for thing in things])
    unseen = torch.tensor([thing.shape in ("circle", "ring") and thing.texture == "plain" for thing in things])
    assert unseen.any() and torch.equal(found[:, 2].isnan(), unseen)
    error = (found - truth).abs()
    assert error[:, :2].mean() < 0.005 and error[:, 2].nanmean() < 0.05 and error[:, 3:].mean() < 3  # the world's own spread: 0.03, 0.17, 8
    rng = np.random.default_rng(1)
    assert all(compare(parse(caption(scene, "full", rng)), other).all_right for scene, other in zip(scenes, others))


def test_variations_that_are_other_scenes_vary_as_the_world_does(model, monkeypatch):
    """A perfect painter: told by a checker that knows what is drawn."""
    scenes = [scene for scene in experiments.single_things(20, 2) for _ in range(2)]
    rng = np.random.default_rng(3)
    others = to_tensor(render([another(scene, rng) for scene in scenes], model.sizes[0]))
    monkeypatch.setitem(model.models, "checker", type("Knows", (), {"read": lambda self, images: scenes})())
    monkeypatch.setattr(experiments, "variations", lambda model, images, copies, eta, seed, steps: others.view(20, 2, *others.shape[1:]))
    ours, world = experiments.varying(model, count=20, etas=(1.0,), copies=2).values()
    assert ours["shape"] == world["shape"] == 1
    for name in ("moved", "shade"):
        assert ours[name] == pytest.approx(world[name], rel=0.35)


def test_a_way_begins_at_the_first_thing_and_ends_at_the_second(model, monkeypatch):
    known = []

    def walk(model, start, end, shares, noise_seed, steps):
        known[:] = [start, end]
        return torch.stack([start, end], dim=1)

    def read(self, images):
        things = experiments.single_things(48, 16)
        drawn = to_tensor(render(things, images.shape[-1]))
        return [things[next(i for i, other in enumerate(drawn) if torch.equal(image, other))] for image in images]

    monkeypatch.setitem(model.models, "checker", type("Knows", (), {"read": read})())
    monkeypatch.setattr(experiments, "interpolate", walk)
    table = experiments.interpolating(model, count=6, shares=(0.0, 1.0))
    assert table["one noise, 0 of the way"] == {"the first's": 1.0, "the second's": 0.0, "neither's": 0.0}
    last = table["both latents, 1 of the way"]
    assert (last["the first's"], last["the second's"]) == (0, 1) and last["step"] == pytest.approx(float((known[0] - known[1]).abs().mean() / 2))


def test_a_perfect_text_diff_flips_what_is_asked_and_keeps_the_rest(model, monkeypatch):
    asked = []
    monkeypatch.setattr(experiments, "text_diff", lambda model, images, before, after, shares, steps: asked.append((before, after)) or images[:, None])
    table = experiments.turning(model, count=60, shares=[0.5])
    (before, after), scenes = asked[0], experiments.single_things(60, 3)
    for old, new, scene in zip(before, after, scenes):
        report = compare(parse(new), scene)
        wrong = [name for name, number in report.asked.items() if report.right.get(name, 0) < number]
        assert compare(parse(old), scene).all_right and len(wrong) == 1 and wrong[0] in experiments.CHANGED
        assert sum(one != other for one, other in zip(old.split(), new.split(), strict=True)) == 1
    assert set(table) == {"theta 0.5"}


def test_what_a_text_diff_is_worth_is_counted(model, monkeypatch):
    """Pictures that stay as they are never flip, and keep all the rest: told by a checker that knows what is drawn."""
    scenes = experiments.single_things(6, 3)
    monkeypatch.setitem(model.models, "checker", type("Knows", (), {"read": lambda self, images: scenes})())
    monkeypatch.setattr(experiments, "text_diff", lambda model, images, before, after, shares, steps: images[:, None])
    assert experiments.turning(model, count=6, shares=[0.0])["theta 0"] == {"flipped": 0.0, "others kept": 1.0, "both": 0.0}


def test_words_on_things_are_drawn_and_asked(model):
    table = experiments.typographic(model, count=6)
    asked = {"shape believed", "word believed", "shape drawn", "word drawn"}
    assert {name: set(row) for name, row in table.items()} == {
        "no word": asked,
        "its own word": asked | {"word read", "name read"},
        "another shape's word": asked | {"word read", "name read"},
    }
    assert all(0 <= share <= 1 for row in table.values() for share in row.values())


def test_answers_are_counted_as_the_shape_or_as_the_word():
    cases, wanted = experiments.written_on(30, 4)
    for scene, shape, lie in zip(cases["another shape's word"], wanted["shape"], wanted["word"]):
        assert (scene.things[0].shape, scene.word, scene.word_on_thing) == (experiments.SHAPES[shape], experiments.SHAPES[lie], True) and shape != lie
    assert all(scene.word is None for scene in cases["no word"])
    answers = [*wanted["shape"][:10], *wanted["word"][10:15], *[None] * 15]
    assert experiments.counted(answers, wanted, "drawn") == {"shape drawn": pytest.approx(1 / 3), "word drawn": pytest.approx(1 / 6)}


def test_what_a_clip_believes_and_reads(model, monkeypatch):
    """A CLIP whose embedding of a picture is its written word, and of a caption the word that it names, or else its shape."""
    cases, wanted = experiments.written_on(10, 4)

    def embedded(names):
        return F.one_hot(torch.tensor([experiments.SHAPES.index(name) for name in names]), 8).float()

    def read(captions):
        return type("Text", (), {"z_t": embedded([parse(text).word or parse(text).things[0].shape for text in captions])})

    monkeypatch.setattr(model, "read", read, raising=False)
    scenes = cases["another shape's word"]
    z_i = embedded([scene.word for scene in scenes])
    assert experiments.believed(model, scenes, z_i, wanted) == {"shape believed": 0, "word believed": 1, "word read": 1, "name read": 0}
    assert experiments.believed(model, scenes, z_i.roll(1, dims=0), wanted)["word read"] < 1
    shapes = embedded([scene.things[0].shape for scene in scenes])
    assert experiments.believed(model, cases["no word"], shapes, wanted) == {"shape believed": 1, "word believed": 0}


def test_all_components_give_the_embedding_back(model):
    table = experiments.principal_components(model, count=4, dims=(0, 4, 32))
    assert table["32 components"]["cosine"] == pytest.approx(1, abs=1e-3) and table["0 components"]["cosine"] < table["4 components"]["cosine"] < 1


def test_the_prior_is_compared_with_nothing_and_with_the_truth(model):
    given, decode = [], UnCLIP.decode

    def noted(self, z_i, *rest, **more):
        given.append(z_i)
        return decode(self, z_i, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnCLIP, "decode", noted)
        patch.setattr(UnCLIP, "draw_embeddings", lambda self, text, prior, seeds: (F.one_hot(torch.full((len(seeds),), len(prior)), 32).float(), None))
        experiments.importance_of_the_prior(model, count=4)
    scenes, texts = zip(*held_out_captions(4, 6))
    true = model.embed(to_tensor(render(list(scenes), model.models["clip"].config.image_size)))
    assert given[0] is None and [int(z.argmax(dim=1)[0]) for z in given[2:4]] == [len("diffusion"), len("autoregressive")]
    torch.testing.assert_close(given[1][::2], model.read(texts).z_t)
    torch.testing.assert_close(given[4][::2], true, atol=1e-5, rtol=0)
    table = experiments.importance_of_the_prior(model, count=4)
    assert list(table) == ["nothing", "z_t", "diffusion prior", "autoregressive prior", "true z_i", "floor", "floor of near-copies"]
    assert all(row["FID"] > 0 and row.get("diversity", 0) >= 0 for row in table.values())


def test_systems_are_those_among_the_weights(model):
    everything = ["unCLIP, diffusion prior", "unCLIP, AR prior", "GLIDE", "DALL-E"]
    assert list(experiments.systems(model)) == everything
    bare = UnCLIP({name: one for name, one in model.models.items() if name not in ("glide", "dalle", "ar-prior")}, model.tokenizer)
    assert list(experiments.systems(bare)) == everything[:1]


@pytest.mark.parametrize("name", ["unCLIP, diffusion prior", "unCLIP, AR prior", "GLIDE", "DALL-E"])
def test_a_system_draws_a_caption_by_its_seed_alone(model, name):
    draw = experiments.systems(model)[name]
    texts = ["a red circle", "two blue stars on grey", "a red circle"]
    together = draw(texts, [3, 4, 5], 2.0)
    assert together.shape == (3, 3, model.sizes[0], model.sizes[0]) and together.abs().max() <= 1
    torch.testing.assert_close(draw(texts[:1], [3], 2.0), together[:1], atol=0.01, rtol=0)
    assert not torch.allclose(together[0], together[2], atol=0.01)


def test_dalle_keeps_the_candidate_that_clip_likes_best(model):
    texts, count = ["a red circle", "a star"], experiments.RERANKED
    text = model.read([t for t in texts for _ in range(count)])
    images = sample_dalle(model.models["dalle"], model.models["dalle-vae"], text.tokens, text.mask, [count * seed + k for seed in (7, 9) for k in range(count)])
    scores = (model.embed(images) * text.z_t).sum(dim=1)
    best = [max(range(i * count, (i + 1) * count), key=lambda k: float(scores[k])) for i in range(2)]
    torch.testing.assert_close(experiments.systems(model)["DALL-E"](texts, [7, 9], 1.0), images[best])


def test_the_sweep_guides_every_system_by_every_scale(model, monkeypatch):
    asked = []

    def system(name):
        return lambda texts, seeds, guidance: asked.append((name, guidance)) or torch.zeros(len(texts), 3, *[model.sizes[0]] * 2)

    monkeypatch.setattr(experiments, "guided", lambda model: {name: system(name) for name in ("one", "other")})
    experiments.guidance_sweep(model, count=5, scales=(1.0, 4.0))
    assert list(dict.fromkeys(asked)) == [(name, scale) for name in ("one", "other") for scale in (1.0, 4.0)]


def test_the_prior_is_guided_or_not(model, monkeypatch):
    """The decoder's scale is swept for all; DALL-E has none, and so is not there."""
    asked, generate = [], UnCLIP.generate

    def noted(self, *arguments):
        asked.append(arguments[4:])
        return generate(self, *arguments)

    monkeypatch.setattr(UnCLIP, "generate", noted)
    there = experiments.guided(model)
    assert list(there) == ["unCLIP, diffusion prior", "unCLIP, prior unguided", "GLIDE"]
    pictures = [draw(["a red circle"], [3], 2.0) for draw in there.values()]
    assert asked == [(2.0, 1.5), (2.0, 1.0)] and not torch.equal(pictures[0], pictures[1])


def test_floors_are_of_scenes_that_all_differ_and_of_near_copies(model):
    real, floors = experiments._floors(model, 20, 2, seed=6)
    assert list(floors) == ["floor", "floor of near-copies"] and all(len(scenes) == 40 for scenes in (real, *floors.values()))
    apart = {name: experiments.diversity(scenes.reshape(20, 2, -1)) for name, scenes in floors.items()}
    assert 0 < apart["floor of near-copies"] < 0.5 * apart["floor"]
    assert not any(torch.equal(one, other) for one, other in zip(real, floors["floor"]))


def test_near_copies_answer_the_same_captions():
    rng = np.random.default_rng(6)
    for scene in experiments.sample_scenes(60, 8, held_out=True):
        copy = another(scene, rng)
        assert copy != scene and compare(parse(caption(scene, "full", rng)), copy).all_right and copy.word == scene.word


def test_the_comparison_has_every_system_and_a_floor(model):
    table = experiments.compared(model, count=6)
    assert list(table) == ["unCLIP, diffusion prior", "unCLIP, AR prior", "GLIDE", "DALL-E", "through DALL-E's codes", "floor"]
    row = table["GLIDE"]
    assert row["seconds"] > 0 and 0 <= row["all_right"] <= 1
    assert row["million parameters"] == pytest.approx(sum(p.numel() for p in model.models["glide"].parameters()) / 1e6)
    assert table["floor"].keys() == {"FID", "FID of the checker"}


def test_codes_that_lose_nothing_leave_every_scene_right(model, monkeypatch):
    scenes = [scene for scene, _ in held_out_captions(6, experiments.HELD_OUT_SEED + 7)]
    pictures = to_tensor(render(scenes, model.sizes[0]))
    monkeypatch.setitem(model.models, "checker", Knows([(pictures, scenes)]))
    monkeypatch.setattr(experiments, "systems", lambda model: {})
    vae = {"encode": staticmethod(lambda images: images), "decode": staticmethod(lambda codes: codes)}
    monkeypatch.setitem(model.models, "dalle-vae", type("Exact", (), vae)())
    assert experiments.compared(model, count=6)["through DALL-E's codes"]["all_right"] == 1
    vae["decode"] = staticmethod(lambda codes: codes.roll(1, dims=0))
    monkeypatch.setitem(model.models, "dalle-vae", type("Mixed", (), vae)())
    assert experiments.compared(model, count=6)["through DALL-E's codes"]["all_right"] == 0


def test_raters_prefer_what_is_right_and_varied(model, monkeypatch):
    """Ours: three different pictures that are right, and one of another caption. Theirs: noise, four different that are right, four times the same."""
    pairs, rng = held_out_captions(6, experiments.HELD_OUT_SEED + 18), np.random.default_rng(0)
    scenes = [another(scene, rng) for scene, _ in pairs for _ in range(4)]
    pictures = to_tensor(render(scenes, model.sizes[0]))
    originals = to_tensor(render([scene for scene, _ in pairs], model.sizes[0]))
    monkeypatch.setitem(model.models, "checker", Knows([(pictures, scenes), (originals, [scene for scene, _ in pairs])]))
    ours = pictures.clone()
    ours[::4] = pictures.roll(4, dims=0)[::4]
    there = {
        "ours": ours,
        "noise": 2 * torch.rand(pictures.shape, generator=torch.Generator().manual_seed(0)) - 1,
        "all right": pictures,
        "the same": pictures[1::4].repeat_interleave(4, dim=0),
        "ours again": ours,
    }
    monkeypatch.setattr(experiments, "systems", lambda model: {name: lambda texts, seeds, guidance, name=name: there[name] for name in there})
    table = experiments.judged(model, count=6)
    assert list(table) == [*(f"preferred to {name}" for name in list(there)[1:]), "preferred to the scenes themselves"]
    noise = table["preferred to noise"]
    assert noise["caption similarity"] > 7 / 8 and noise["diversity"] == 1  # a wrong picture may have as little right as noise
    assert table["preferred to ours again"] == {"caption similarity": 0.5, "diversity": 0.5}  # ties count half
    three_of_four = {"caption similarity": pytest.approx(3 / 8)}  # a tie, but for the one that is wrong
    assert table["preferred to the scenes themselves"] == three_of_four and table["preferred to all right"].items() >= three_of_four.items()
    assert table["preferred to the same"] == {**three_of_four, "diversity": 1}  # four right, but alike


def test_over_seeds_are_means_and_spreads_of_tables(model):
    def experiment(model, seed=5):
        return {"a": {"x": float(seed)}, "b": {"x": 1.0, "y": seed**2}}

    tables = [experiments.with_seed(experiment, model, number) for number in range(3)]
    assert experiments.over_seeds(tables[:1]) == {"a": {"x": 5.0}, "b": {"x": 1.0, "y": 25}}
    seeds = np.array([5, 105, 205])
    table = experiments.over_seeds(tables)
    assert table["a"] == {"x": 105.0, "± x": pytest.approx(100.0)} and table["b"]["± x"] == 0
    assert (table["b"]["y"], table["b"]["± y"]) == (pytest.approx((seeds**2).mean()), pytest.approx((seeds**2).std(ddof=1)))


def test_every_sampler_is_asked_at_every_number_of_steps(model):
    table = experiments.samplers(model, count=6, steps=(2, 5))
    assert list(table) == [f"prior, {name}, {n}" for name in ("ancestral", "analytic", "ddim", "dpm") for n in (2, 5)] + [
        f"decoder, {name}, {n}" for name in ("ancestral", "ddim", "dpm", "ddim unguided") for n in (2, 5)
    ]
    assert table["decoder, ddim unguided, 5"]["network calls"] == 5 and table["decoder, ddim unguided, 5"]["FID"] != table["decoder, ddim, 5"]["FID"]
    assert table["prior, analytic, 5"]["cosine"] != table["prior, ancestral, 5"]["cosine"] and table["decoder, dpm, 5"]["network calls"] == 10


def test_more_candidates_agree_better_with_the_caption(model, monkeypatch):
    kept = []
    monkeypatch.setattr(model, "decode", lambda z_i, text, seeds: kept.append((z_i * text.z_t).sum(dim=1)) or torch.zeros(len(z_i), 3, 16, 16), raising=False)
    assert list(experiments.candidates(model, count=5, numbers=(1, 3))) == ["best of 1", "best of 3"]
    assert kept[1].mean() > kept[0].mean()


def test_guidance_of_the_prior_is_swept(model):
    table = experiments.prior_guidance(model, count=5, scales=(1.0, 4.0))
    assert list(table) == ["guidance 1", "guidance 4"]
    assert all(0 <= row["diversity"] < 2 and 0 <= row["all_right"] <= 1 for row in table.values())
    assert table["guidance 1"]["cosine"] != table["guidance 4"]["cosine"]


def test_the_probe_judges_every_guided_system(model):
    table = experiments.aesthetic(model, count=6, scales=(1.0, 3.0))
    assert list(table)[2:] == [f"{name}, guidance {scale}" for name in experiments.guided(model) for scale in (1, 3)]
    assert all(1 <= row["the rule's own rating"] <= 10 for row in list(table.values())[1:])


def test_guidance_is_swept_for_those_that_have_it(model):
    table = experiments.guidance_sweep(model, count=5, copies=2, scales=(1.0, 4.0))
    assert list(table) == [f"{name}, guidance {scale}" for name in experiments.guided(model) for scale in (1, 4)] + ["floor", "floor of near-copies"]
    assert all(row.get("diversity", 0) >= 0 and 0 <= row["recall"] <= 1 for row in table.values())


def test_a_table_in_markdown():
    lines = experiments.as_markdown({"a": {"x": 0.5}, "b": {"x": 1.0, "y": math.nan}}).splitlines()
    assert lines == ["| | x | y |", "|---|---|---|", "| a | 0.500 |  |", "| b | 1.000 |  |"]
    assert "| a | 0.500 ± 0.010 |" in experiments.as_markdown({"a": {"x": 0.5, "± x": 0.01}})


def test_the_command_writes_what_it_prints(tiny_weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(experiments.EXPERIMENTS, "typographic", lambda model, seed=4: experiments.typographic(model, count=4, seed=seed))
    assert main(["experiment", "typographic", "--out", str(tmp_path), "--weights", str(tiny_weights), "--seeds", "2"]) == 0
    kept = json.loads((tmp_path / "typographic.json").read_text())
    assert experiments.as_markdown(kept["table"]) in capsys.readouterr().out and len(kept["weights"]) == 12 and kept["seeds"] == 2
    assert kept["table"] == experiments.over_seeds(kept["by seed"]) and len(kept["by seed"]) == 2
    facts = {"experiment": "typographic", "seeds": "2", "weights": kept["weights"]}
    assert read_facts(tmp_path / "typographic.png").items() >= facts.items()


@pytest.mark.slow
def test_all_goes_on_where_it_stopped(tiny_weights, tmp_path, capsys, monkeypatch):
    """What is there of the same weights stays, seed by seed; a run of its name or of other weights is drawn anew."""
    ran = []
    for name in (*experiments.EXPERIMENTS, *TRAININGS):
        table = TRAININGS if name in TRAININGS else experiments.EXPERIMENTS
        monkeypatch.setitem(table, name, lambda model, seed=1, folder=None, name=name: ran.append(name) or {"row": {"figure": float(len(ran))}})

    def run(name, *more):
        ran.clear()
        assert main(["experiment", name, "--out", str(tmp_path), "--weights", str(tiny_weights), *more]) == 0
        return list(ran), capsys.readouterr().out

    everything = [*experiments.EXPERIMENTS, *TRAININGS]
    assert run("all")[0] == everything
    (tmp_path / "race.json").unlink()
    (tmp_path / "varying.json").write_text((tmp_path / "varying.json").read_text().replace('"weights": "', '"weights": "0'))
    again, printed = run("all")
    assert again == ["varying", "race"] and all(f"{name}\n\n| | figure |" in printed for name in everything)
    assert run("typographic")[0] == ["typographic"]
    first = json.loads((tmp_path / "typographic.json").read_text())
    assert run("all", "--seeds", "2")[0] == everything and run("all")[0] == []
    kept = json.loads((tmp_path / "typographic.json").read_text())
    assert kept["by seed"][0] == first["table"] != kept["table"] and (kept["seeds"], len(kept["by seed"])) == (2, 2)
    del kept["by seed"]  # as files of before were written: enough where it has as many seeds
    (tmp_path / "typographic.json").write_text(json.dumps(kept))
    assert run("all", "--seeds", "2")[0] == [] and run("all", "--seeds", "3")[0].count("typographic") == 3


@pytest.mark.slow
def test_a_stopped_experiment_goes_on_with_its_next_seed(tiny_weights, tmp_path, monkeypatch):
    """Each seed is written when it is done."""
    ran = []

    def experiment(model, seed=7):
        ran.append(seed)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return {"row": {"figure": float(seed)}}

    monkeypatch.setitem(experiments.EXPERIMENTS, "typographic", experiment)
    given = ["--out", str(tmp_path), "--weights", str(tiny_weights), "--seeds", "4"]
    assert main(["experiment", "typographic", *given]) == 130
    assert json.loads((tmp_path / "typographic.json").read_text())["seeds"] == 2
    for name in (*experiments.EXPERIMENTS, *TRAININGS):
        if name != "typographic":
            monkeypatch.setitem(TRAININGS if name in TRAININGS else experiments.EXPERIMENTS, name, lambda model, seed=1, folder=None: {"row": {"figure": 1.0}})
    assert main(["experiment", "all", *given]) == 0
    assert ran == [7, 107, 207, 207, 307] and json.loads((tmp_path / "typographic.json").read_text())["table"]["row"]["figure"] == 157.0


def test_experiments_need_a_checker(tiny_weights, tmp_path, capsys):
    shutil.copytree(tiny_weights, tmp_path / "own", ignore=shutil.ignore_patterns("checker"))
    assert main(["experiment", "typographic", "--weights", str(tmp_path / "own")]) == 2
    assert "has no checker" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["levitation"], ["typographic", "--seeds", "0"], ["typographic", "--out", "nowhere/at/all"]])
def test_a_bad_experiment_is_refused_in_a_line(wrong, capsys):
    assert main(["experiment", *wrong]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_an_experiment_without_the_other_systems_holds_when_they_are_trained_anew():
    for name, function in experiments.EXPERIMENTS.items():
        source, unused = inspect.getsource(function), experiments.unused(name)
        assert ("systems(model)" in source) == ("dalle" not in unused) == ("dalle-vae" not in unused), name
        assert ("systems(model)" in source or "guided(model)" in source) == ("glide" not in unused), name
    assert "glide" in experiments.unused("race") and "upsampler2" in experiments.unused("compared")


def test_the_readme_asks_the_question_of_every_experiment():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in (*experiments.EXPERIMENTS, *TRAININGS))


def test_the_page_of_results_shows_what_the_files_say():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "results.md").read_text()
    for name in (*experiments.EXPERIMENTS, *TRAININGS):
        kept = json.loads((root / "results" / f"{name}.json").read_text())
        assert experiments.as_markdown(kept["table"]) in page and page.count(f"](../results/{name}.png)") == 1, name
        assert kept["seeds"] == 3 and kept["weights"] == weights_id(WEIGHTS, without=experiments.unused(name)), name
    columns = ("training seconds", "cosine", "shape", "colour", "all_right")
    choices = {}
    for name, of in (("prior-choices", "prior"), ("decoder-objectives", "decoder"), ("decoder-choices", "decoder")):
        for row, line in json.loads((root / "results" / f"{name}.json").read_text())["table"].items():
            choices.setdefault(f"{of}, {row}", {key: line[key] for column in columns for key in (column, f"± {column}") if key in line})
    assert experiments.as_markdown(choices) in page
    inversion = json.loads((root / "results" / "inversion.json").read_text())["table"]["steps 250"]
    assert min(inversion["PSNR undone"], inversion["PSNR drawn"]) >= 30
