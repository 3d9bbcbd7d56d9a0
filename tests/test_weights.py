"""The weights that ship: small, described, and able to draw what a caption says."""

import math
import re

import pytest

from minunclip.cli import WEIGHTS, main
from minunclip.config import BASELINES, CPU, PRESETS, STAGES
from minunclip.data.captions import compare, parse
from minunclip.data.checker import reader_error
from minunclip.data.render import render
from minunclip.data.scenes import NESTED, kind_of, sample_scenes
from minunclip.data.world import to_tensor
from minunclip.evaluation import accuracy, held_out_captions
from minunclip.experiments import psnr
from minunclip.pipeline import UnCLIP
from minunclip.report import clip_figures, embed_scenes

FURTHER = ("decoder", "glide", "upsampler1", "upsampler2")  # trained further from others, by `make weights-further`


@pytest.fixture(scope="module")
def model():
    return UnCLIP.from_pretrained(WEIGHTS)


def test_they_are_small_and_each_has_a_card():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 40e6
    makefile = (WEIGHTS.parents[1] / "Makefile").read_text()
    for stage in STAGES + BASELINES:
        card = (WEIGHTS / stage / "card.md").read_text()
        if stage in ("clip", "checker"):
            command = re.search(rf"minunclip train {stage} --preset cpu .*--steps \d+", makefile)[0].replace("--out runs/first", "--seed 0")
        elif stage in ("decoder", "glide"):
            command = f"minunclip train {stage} --preset cpu --seed 0 --steps 3600 --batch_size 128 --learning_rate 0.0005"
            assert command.replace("--seed 0", "--init data/weights --out runs/further").replace(stage, "$$stage") in makefile
        elif stage in ("upsampler1", "upsampler2"):
            command = f"minunclip train {stage} --preset cpu --seed 0 --steps 6000 --batch_size 16"
            assert command.replace("--seed 0", "--init data/weights --out runs/further").replace(stage, "$$stage") in makefile
        else:
            settings = PRESETS["long"].training[stage]
            command = f"minunclip train {stage} --preset long --seed 0 --steps {settings.steps} --batch_size {settings.batch_size}"
        assert f"`{command} " in card
        assert ("--init data/weights`" in card) == ("| init | data/weights |" in card) == (stage in FURTHER)
        assert all(f"| {fact} |" in card for fact in ("commit", "machine", "seconds", "seed")) and "captioned world" in card
        assert not [file for file in (WEIGHTS / stage).iterdir() if file.suffix not in (".safetensors", ".json", ".md", ".png")]


def test_the_page_of_results_says_how_long_each_system_was_trained():
    page = (WEIGHTS.parents[1] / "docs" / "results.md").read_text()
    for stage in ("clip", "prior", "ar-prior", "decoder", "glide", "dalle-vae", "dalle"):
        card = (WEIGHTS / stage / "card.md").read_text()
        machine, seconds = re.search(r"\| machine \| (.*) \|", card)[1], float(re.search(r"\| seconds \| (.*) \|", card)[1])
        examples = math.prod(int(re.search(rf"--{name} (\d+)", card)[1]) for name in ("steps", "batch_size"))
        on_gpu = f"{seconds:.0f}" if "NVIDIA" in machine else ""
        threads = int(re.search(r"(\d+) threads", machine)[1])
        of_cores = "" if on_gpu else f"{seconds * threads:,.0f}"
        if before := re.search(r"([\d,]+) steps of (\d+)", card):  # on a GPU, from which it went on
            examples += math.prod(int(number.replace(",", "")) for number in before.groups())
            on_gpu = on_gpu or re.search(r"(\d+)\sseconds\son\sone\sH100", card)[1]
        assert f"\n| {stage} | {on_gpu} | {of_cores} | {examples / 1e6:.2f} |\n" in page, stage


def test_they_are_of_the_cpu_preset(model):
    configs = (CPU.clip, CPU.prior, CPU.ar_prior, CPU.decoder, CPU.upsampler1, CPU.upsampler2, CPU.checker)
    for stage, config in zip(STAGES, configs):
        if stage != "ar-prior":  # it keeps as many components as its data needs
            assert model.models[stage].config == config
    assert (model.models["glide"].config, model.models["dalle-vae"].config, model.models["dalle"].config) == (CPU.glide, CPU.dalle.vae, CPU.dalle)


def test_clip_finds_the_caption_of_a_picture_it_has_never_seen(model):
    found = clip_figures(model, count=100)["full"]
    assert min(found.values()) >= 0.95


@pytest.mark.slow
def test_the_autoregressive_prior_leaves_less_than_the_papers_hundredth_of_pictures_it_has_never_seen(model):
    z_i = embed_scenes(model, sample_scenes(1500, seed=31, held_out=True), CPU.clip.image_size)
    pca = model.models["ar-prior"].pca
    assert len(pca.eigenvalues) < CPU.clip.embedding_dim
    assert (z_i - pca.reconstruct(pca.project(z_i))).square().sum() < 0.01 * (z_i - z_i.mean(dim=0)).square().sum()


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["diffusion", "autoregressive"])
def test_captions_drawn_together_or_one_by_one_give_the_same_pictures(model, prior):
    captions = ["a red circle above a blue square", "three tiny stars on a dark background", "a large striped heart inside a green ring"]
    together = model.generate(captions, prior, [3, 4, 5], size=32).pictures[32].astype(int)
    alone = [model.generate([caption], prior, 3 + i, size=32).pictures[32][0] for i, caption in enumerate(captions)]
    assert abs(together - alone).max() <= 1
    assert abs(together[0] - together[1]).max() > 100


@pytest.mark.slow
def test_a_picture_is_enlarged_alike_whatever_stands_beside_it(model):
    """Five pictures are more than are enlarged at once, so that one stands alone."""
    small = to_tensor(render(sample_scenes(5, seed=6, held_out=True), 32))
    for stage in ("upsampler1", "upsampler2"):
        together, alone = model.upsample(stage, small, range(5)), [model.upsample(stage, small[k : k + 1], [k]) for k in (1, 4)]
        assert max(float((together[k] - one[0]).abs().max()) for k, one in zip((1, 4), alone)) < 2 / 255


@pytest.mark.parametrize("size", [32, 128])
def test_the_checker_reads_a_thing_inside_another(model, size):
    """The hardest scenes to read, and rare: an average over all scenes would not show that a third of them is misread."""
    assert sum(kind_of(scene) == NESTED for scene in sample_scenes(1500, seed=21, held_out=True)) > 80
    assert reader_error(model.models["checker"], 1500, 21, size, NESTED)["all_right"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["diffusion", "autoregressive"])
def test_pictures_show_far_more_of_their_captions_than_chance(model, prior):
    captions = [words for _, words in held_out_captions(32, seed=12)]
    drawn = model.generate(captions, prior, range(32), size=32).pictures[32]
    seen = model.models["checker"].read(to_tensor(drawn))
    right = accuracy([compare(parse(words), scene) for words, scene in zip(captions, seen)])
    assert right["colour"] > 0.5 and right["background"] > 0.8 and right["size"] > 0.6  # by chance 1/10, 1/6, 1/2


@pytest.mark.slow
def test_a_picture_comes_back_from_its_latents(model):
    images = to_tensor(render(sample_scenes(4, 1, held_out=True), 32))
    back = model.redraw(*model.invert(images, 50), range(4), 50)
    assert float(psnr(back, images).min()) > 30  # dB


@pytest.mark.slow
def test_the_demo_says_what_the_checker_sees(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "checker: shape" in text and "seconds: text" in text
    assert {path.name for path in tmp_path.iterdir()} == {f"a-red-circle-above-a-blue-square{end}.png" for end in ("", "-stages")}
