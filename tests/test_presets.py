"""The sizes that the presets name are the sizes that are built."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minunclip.config import BASELINES, CPU, PRESETS, STAGES, TINY, TransformerConfig
from minunclip.loading import MODELS, load_model
from minunclip.runs import Run, on_clip, preset_named
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
    assert (folder / "samples-000012.png").exists() == (stage in ("decoder", "upsampler1", "upsampler2", *BASELINES))


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
