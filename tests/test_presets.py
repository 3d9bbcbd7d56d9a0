"""The sizes that the presets name are the sizes that are built."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minunclip.config import BASELINES, CPU, PAPER, PRESETS, STAGES, TINY, TransformerConfig
from minunclip.loading import MODELS, load_model
from minunclip.runs import Run, on_clip, preset_named
from minunclip.safety import read_facts
from minunclip.stages import train
from minunclip.training import read_log

FURTHER = replace(TINY.training["decoder"], steps=30, checkpoint_every=5, precision="bf16", optimizer="muon", sample_every=100, validate_every=100)
DECODER = """
import sys
from pathlib import Path
from tests.test_presets import train_decoder
train_decoder(Path(sys.argv[1]))
"""


def train_decoder(folder: Path) -> None:
    """As the larger presets do it: in bf16 (where the processor knows it) and with Muon."""
    train("decoder", Run(TINY, folder, torch.device("cpu")), settings=FURTHER)


def parameters(stage: str, preset: str = "paper") -> int:
    config = (PRESETS[preset].models | PRESETS[preset].baselines)[stage]
    with torch.device("meta"):
        return sum(p.numel() for p in MODELS[stage][0](config).parameters())


@pytest.mark.parametrize("stage, millions", [("decoder", 3500), ("upsampler1", 700), ("upsampler2", 300)])
def test_the_papers_networks_have_the_sizes_of_table_3(stage: str, millions: int) -> None:
    assert parameters(stage) / 1e6 == pytest.approx(millions, rel=0.1)


def test_the_papers_priors_have_the_sizes_that_its_widths_give() -> None:
    # Tab. 3 gives both as 1B. Its width of 2048 and 24 blocks alone are 24 * 12 * 2048^2 = 1.21B, so that its 1B is rounded.
    assert parameters("prior") / 1e9 == pytest.approx(1.226, abs=0.001)
    # The latent transformer alone: 24 * 12 * 1664^2 = 0.80B. The paper's own text transformer of 1.2B (24 blocks of 2048) is left out here,
    # since the encoded text comes from CLIP.
    assert parameters("ar-prior") / 1e9 == pytest.approx(0.808, abs=0.001)
    assert 0.97 < 24 * 12 * 2048**2 / parameters("prior") < 1 and 0.97 < 24 * 12 * 1664**2 / parameters("ar-prior") < 1


def test_the_papers_preset_is_its_table_3() -> None:
    chain = (PAPER.prior, PAPER.decoder, PAPER.upsampler1, PAPER.upsampler2)
    assert [config.diffusion.schedule for config in chain] == ["cosine", "cosine", "cosine", "linear"]
    assert [config.diffusion.steps for config in chain] == 4 * [1000]
    assert [config.diffusion.sampling_steps for config in chain] == [64, 250, 27, 15]
    assert [config.diffusion.sampler for config in chain[2:]] == ["ddim", "ddim"]
    assert [config.diffusion.learned_variance for config in chain] == [False, True, True, True]
    assert (PAPER.prior.text_drop, PAPER.ar_prior.text_drop) == (0.1, 0.1)
    assert (PAPER.decoder.embedding_drop, PAPER.decoder.caption_drop) == (0.1, 0.5)
    nets = [config.unet for config in chain[1:]]
    assert [(net.width, net.multipliers, net.blocks) for net in nets] == [(512, (1, 2, 3, 4), 3), (320, (1, 2, 3, 4), 3), (192, (1, 1, 2, 2, 4, 4), 2)]
    assert [net.attention_at for net in nets] == [(32, 16, 8), (), ()] and nets[0].head_channels == 64
    assert [net.dropout for net in nets] == [0.1, 0.1, 0.0] and [net.patch_size for net in nets] == [1, 1, 1]
    assert (PAPER.upsampler1.degradation, PAPER.upsampler2.degradation) == ("blur", "bsr")
    transformers = [config.transformer for config in (PAPER.prior, PAPER.ar_prior)] + [PAPER.decoder.text]
    assert [(one.width, one.layers, one.heads) for one in transformers] == [(2048, 24, 32), (1664, 24, 26), (2048, 24, 32)]
    assert (PAPER.ar_prior.components, PAPER.ar_prior.buckets, PAPER.prior.context_length) == (319, 1024, 256)
    table = {  # batch, thousands of iterations, learning rate, Adam's beta 2 and epsilon, EMA decay
        "ar-prior": (4096, 1000, 1.6e-4, 0.91, 1e-10, 0.999),
        "prior": (4096, 600, 1.1e-4, 0.96, 1e-6, 0.9999),
        "decoder": (2048, 800, 1.2e-4, 0.999, 1e-8, 0.9999),
        "upsampler1": (1024, 1000, 1.2e-4, 0.999, 1e-8, 0.9999),
        "upsampler2": (512, 1000, 1.0e-4, 0.999, 1e-8, 0.9999),
    }
    for stage, row in table.items():
        given = PAPER.training[stage]
        assert (given.batch_size, given.steps / 1000, given.learning_rate, given.beta2, given.epsilon, given.ema_decay) == row, stage
        assert (given.optimizer, given.beta1) == ("adamw", 0.9)
    assert (PAPER.training["ar-prior"].weight_decay, PAPER.training["prior"].weight_decay) == (0.04, 0.06)


def test_the_weights_that_ship_keep_what_table_3_says_of_upsamplers() -> None:
    pair = (CPU.upsampler1, CPU.upsampler2)
    assert [(config.diffusion.schedule, config.diffusion.sampler, config.diffusion.sampling_steps) for config in pair] == [
        ("cosine", "ddim", 27),
        ("linear", "ddim", 15),
    ]
    assert [(config.unet.attention_at, config.degradation, config.diffusion.steps) for config in pair] == [((), "blur", 1000), ((), "bsr", 1000)]
    assert CPU.prior.diffusion.schedule == CPU.decoder.diffusion.schedule == "cosine"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_parts_of_a_preset_fit_together(preset: str) -> None:
    p = PRESETS[preset]
    assert p.clip.embedding_dim == p.prior.embedding_dim == p.ar_prior.embedding_dim == p.decoder.embedding_dim
    assert p.clip.text.width == p.prior.text_width == p.ar_prior.text_width
    assert p.clip.context_length == p.prior.context_length == p.ar_prior.context_length == p.decoder.context_length
    assert p.clip.vocabulary_size == p.decoder.vocabulary_size
    assert preset == "paper" or p.dalle.vae.image_size == p.decoder.image_size  # DALL-E drew 256 x 256 at once
    assert p.dalle.context_length == p.clip.context_length
    assert p.decoder.image_size == p.upsampler1.low_size and p.upsampler1.high_size == p.upsampler2.low_size
    assert tuple(p.training) == STAGES + BASELINES and all(t.batch_size % t.accumulation == 0 for t in p.training.values())
    assert all(parameters(stage, preset) > 0 for stage in STAGES + BASELINES)


def test_on_another_clip_the_priors_and_the_decoder_take_its_sizes() -> None:
    clip = replace(CPU.clip, embedding_dim=512, context_length=77, vocabulary_size=49_408, text=TransformerConfig(256, 2, 4))
    p = on_clip(CPU, clip)
    assert p.clip == clip and p.decoder.text == clip.text
    assert {config.embedding_dim for config in (p.prior, p.ar_prior, p.decoder)} == {512} and p.ar_prior.components == 512
    assert {config.context_length for config in (p.prior, p.ar_prior, p.decoder, p.dalle)} == {77} and p.prior.text_width == p.ar_prior.text_width == 256
    assert (p.upsampler1, p.upsampler2, p.prior.transformer, p.decoder.unet) == (CPU.upsampler1, CPU.upsampler2, CPU.prior.transformer, CPU.decoder.unet)


def test_an_unknown_preset_is_refused_with_the_names() -> None:
    assert preset_named("tiny") is TINY
    with pytest.raises(ValueError, match="no preset 'huge': choose one of tiny, course, cpu, long, gpu, paper"):
        preset_named("huge")


@pytest.mark.slow  # shares the training of the whole chain with other tests
@pytest.mark.parametrize("stage", STAGES + BASELINES)
def test_the_tiny_preset_trains(tiny_run: Path, stage: str) -> None:
    folder = tiny_run / stage
    log = read_log(folder / "log.jsonl")
    assert [line["step"] for line in log] == [4, 8, 10, 12] and all(line["loss"] > 0 for line in log)
    checked = "all_right_error" if stage == "checker" else "validation_loss"
    assert [line["step"] for line in log if checked in line] == [4, 8, 12]
    load_model(stage, folder)
    samples = folder / "samples-000012.png"
    assert samples.exists() == (stage != "checker")
    assert not samples.exists() or read_facts(samples) == {"stage": stage, "step": "12", "seed": "0"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_resumes_bit_for_bit(stage: str, tiny_run: Path, tmp_path: Path) -> None:
    for part in ("data",) if stage == "clip" else ("data", "clip"):
        (tmp_path / part).symlink_to(tiny_run / part)
    train(stage, Run(TINY, tmp_path, torch.device("cpu")), stop_after=5)
    train(stage, Run(TINY, tmp_path, torch.device("cpu")))
    assert (tmp_path / stage / "model.safetensors").read_bytes() == (tiny_run / stage / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_stage_that_is_killed_goes_on_bit_for_bit(tiny_run: Path, tmp_path: Path) -> None:
    for run in ("whole", "killed"):
        (tmp_path / run).mkdir()
        for part in ("data", "clip"):
            (tmp_path / run / part).symlink_to(tiny_run / part)
    train_decoder(tmp_path / "whole")
    folder = tmp_path / "killed" / "decoder"
    process = subprocess.Popen([sys.executable, "-c", DECODER, str(folder.parent)], cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    while not (folder / "training.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < torch.load(folder / "training.pt", weights_only=True)["step"] < FURTHER.steps
    train_decoder(folder.parent)
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole" / "decoder" / "model.safetensors").read_bytes()
