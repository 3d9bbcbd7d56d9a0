"""Counted costs against closed forms, and against what a real forward pass keeps."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from minunclip.budget import BYTES, PEAK, UTILISATION, budget, count, memory
from minunclip.cli import main
from minunclip.config import PRESETS, TINY, TransformerConfig
from minunclip.models.transformer import Transformer


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = Transformer(TransformerConfig(32, 3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stack(x, causal=False)


def test_flops_of_a_transformer() -> None:
    tokens, width, layers = 10, 32, 3
    with torch.device("meta"):
        flops, _ = count(Causal(), (torch.zeros(1, tokens, width),))
    # of every block 12 w^2 weights, each a multiplication and an addition for a token, and two products of n by n by w
    assert flops == layers * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_a_chain_of_layers_keeps(device: str) -> None:
    with torch.device(device):
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Sigmoid())
        flops, kept = count(model, (torch.zeros(7, 6),))
    # the input of each linear layer (the second is what ReLU keeps too), and the output of the sigmoid
    assert kept == 4 * 7 * (6 + 5 + 4) and flops == 2 * 7 * (6 * 5 + 5 * 4)


def test_training_grows_with_steps_and_batch_and_sampling_with_its_steps() -> None:
    once = budget(TINY)
    settings = {stage: replace(s, steps=2 * s.steps, batch_size=3 * s.batch_size) for stage, s in TINY.training.items()}
    prior = replace(TINY.prior, diffusion=replace(TINY.prior.diffusion, sampling_steps=5 * TINY.prior.diffusion.sampling_steps))
    more = budget(replace(TINY, training=settings, prior=prior))
    for stage, cost in once.items():
        assert more[stage].training == pytest.approx(6 * cost.training) and more[stage].forward == cost.forward > 0 and cost.activations > 0
        assert cost.gpu_days == pytest.approx(cost.training / PEAK / UTILISATION / 86_400)
    assert more["prior"].sampling == 5 * once["prior"].sampling and once["clip"].sampling == 0
    quarters = 16 * TINY.upsampler1.diffusion.sampling_steps * once["upsampler1"].forward  # of the side, in training; but the timestep has no size
    assert once["upsampler1"].sampling == pytest.approx(quarters, rel=0.05)
    assert BYTES == 4 * 5


def test_memory_falls_with_accumulation_and_precision_but_not_below_the_state() -> None:
    cost, settings = budget(TINY)["decoder"], TINY.training["decoder"]
    state, activations = cost.parameters * BYTES, settings.batch_size * cost.activations
    assert memory(cost, settings) == state + activations
    assert memory(cost, replace(settings, precision="bf16")) == state + activations / 2
    assert memory(cost, replace(settings, accumulation=4)) == state + activations / 4


def test_every_stage_of_the_gpu_preset_fits_a_card_of_24_gb() -> None:
    for stage, cost in budget(PRESETS["gpu"]).items():
        assert memory(cost, PRESETS["gpu"].training[stage]) < 22e9, stage  # two for what an estimate leaves out


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--preset", "tiny", "--budget"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8
