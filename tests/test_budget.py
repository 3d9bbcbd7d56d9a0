"""Counted costs against closed forms, and against what a real forward pass keeps."""

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from minunclip.budget import BYTES, PEAK, UTILISATION, Cost, as_text, budget, cost, count, measure, memory, sample_inputs, step_seconds
from minunclip.cli import main
from minunclip.config import CPU, PRESETS, TINY, TransformerConfig
from minunclip.diffusion import make_schedule
from minunclip.loading import MODELS
from minunclip.models.clip import CLIP
from minunclip.models.decoder import Decoder, sample_decoder
from minunclip.models.diffusion_prior import DiffusionPrior, sample_prior
from minunclip.models.transformer import Transformer
from minunclip.training import recompute


@pytest.fixture(scope="module")
def tiny() -> dict[str, Cost]:
    return budget(TINY)


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = Transformer(TransformerConfig(32, 3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stack(x, causal=False)


def test_flops_of_a_transformer() -> None:
    tokens, width, layers = 10, 32, 3
    with torch.device("meta"):
        flops, _, _ = count(Causal(), (torch.zeros(1, tokens, width),))
    # of every block 12 w^2 weights, each a multiplication and an addition for a token, and two products of n by n by w
    assert flops == layers * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_a_chain_of_layers_keeps(device: str) -> None:
    with torch.device(device):
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Sigmoid())
        flops, kept, _ = count(model, (torch.zeros(7, 6),))
    # the input of each linear layer (the second is what ReLU keeps too), and the output of the sigmoid
    assert kept == 4 * 7 * (6 + 5 + 4) and flops == 2 * 7 * (6 * 5 + 5 * 4)


class Stack(nn.Module):
    """Layers of different widths, and one map outside of them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.Sigmoid(), nn.Linear(b, b)) for a, b in zip(widths, widths[1:]))
        self.end = nn.Linear(widths[-1], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.end(x)


def test_what_is_kept_when_layers_are_run_again() -> None:
    with torch.device("meta"):
        _, kept, recomputed = count(Stack(6, 5, 4, 3), (torch.zeros(7, 6),))
    # of every layer its input and the sigmoid's output, and the input of the last map
    assert kept == 4 * 7 * ((6 + 5) + (5 + 4) + (4 + 3) + 3)
    # every layer's input, the input of the last map, and all that the largest layer keeps
    assert recomputed == 4 * 7 * ((6 + 5 + 4) + 3 + (6 + 5))


class Live(TorchDispatchMode):
    """Follows every storage from its first operation to its release: bytes at the peak, without those that were there before."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in before}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def release(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("stage", ["prior", "decoder", "upsampler1"])
def test_the_estimate_is_near_what_a_real_step_holds_at_its_peak(stage: str, again: bool) -> None:
    config, settings = TINY.models[stage], replace(TINY.training[stage], recompute=again)
    model, inputs = MODELS[stage][0](config), sample_inputs(stage, config, 16)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # part of the state, and there from the second part of a batch on
    if again:
        recompute(model)
    live = Live([*model.parameters(), *model.buffers(), *[p.grad for p in model.parameters()], *inputs])
    with live:
        model(*inputs).square().mean().backward()
    assert live.peak == pytest.approx(16 * cost(stage, config, settings).activations, rel=0.1)


def test_recomputing_costs_a_third_more_and_keeps_less() -> None:
    for stage in ("prior", "decoder", "upsampler1"):
        config, settings = CPU.models[stage], CPU.training[stage]
        plain, again = cost(stage, config, settings), cost(stage, config, replace(settings, recompute=True))
        assert again.training == pytest.approx(4 / 3 * plain.training) and again.activations < plain.activations / 1.5


def test_a_share_of_the_state() -> None:
    one, settings = budget(TINY)["decoder"], replace(TINY.training["decoder"], sharded=True)
    assert memory(one, settings) == memory(one, replace(settings, sharded=False))  # alone
    assert memory(one, settings, gpus=4) == one.parameters * (20 / 4 + 4) + 4 * one.activations


def test_seconds_of_a_step_on_many_gpus() -> None:
    settings = PRESETS["paper"].training["decoder"]
    one = cost("decoder", PRESETS["paper"].decoder, settings)
    computing = 3 * one.forward * 2048 / (312e12 * 0.4)
    assert step_seconds(one, settings, 1, 1e9) == pytest.approx(computing)
    # an all-reduce sends every parameter (4 bytes) out twice, but for each GPU's own share
    assert step_seconds(one, settings, 8, 1e9) == pytest.approx(computing / 8 + 2 * 7 / 8 * 4 * one.parameters / 220e9)
    assert step_seconds(one, settings, 64, 1e9) == pytest.approx(computing / 64 + 2 * 63 / 64 * 4 * one.parameters / 1e9)
    sharded = replace(settings, sharded=True, accumulation=2)  # three rounds for each of two parts, less what hides behind half of the computing
    assert step_seconds(one, sharded, 64, 1e9) == pytest.approx(computing / 64 + 6 * 63 / 64 * 4 * one.parameters / 1e9 - computing / 128)
    assert step_seconds(one, sharded, 8, 1e9) == pytest.approx(computing / 8)


def test_a_few_steps_can_be_measured() -> None:
    for stage in ("clip", "decoder"):
        settings = replace(TINY.training[stage], batch_size=4, recompute=True)
        peak, speed = measure(stage, TINY.models[stage], settings, torch.device("cpu"), steps=1)
        assert peak == 0 and speed > 0  # nothing counts a CPU's memory


def test_training_grows_with_steps_and_batch_and_sampling_with_its_steps() -> None:
    once = budget(TINY)
    settings = {stage: replace(s, steps=2 * s.steps, batch_size=3 * s.batch_size) for stage, s in TINY.training.items()}
    prior = replace(TINY.prior, diffusion=replace(TINY.prior.diffusion, sampling_steps=5 * TINY.prior.diffusion.sampling_steps))
    more = budget(replace(TINY, training=settings, prior=prior))
    for stage, one in once.items():
        assert more[stage].training == pytest.approx(6 * one.training) and more[stage].forward == one.forward > 0 and one.activations > 0
        assert one.gpu_days == pytest.approx(one.training / PEAK / UTILISATION / 86_400)
    assert more["prior"].sampling == 5 * once["prior"].sampling and once["clip"].sampling == 0
    quarters = 16 * TINY.upsampler1.diffusion.sampling_steps * once["upsampler1"].forward  # of the side, in training; but the timestep has no size
    assert once["upsampler1"].sampling == pytest.approx(quarters, rel=0.05)
    assert BYTES == 4 * 5


def test_memory_falls_with_accumulation_and_precision_but_not_below_the_state() -> None:
    cost, settings = budget(TINY)["decoder"], TINY.training["decoder"]
    state, activations = cost.parameters * BYTES, settings.batch_size * cost.activations
    assert memory(cost, settings) == state + activations
    assert memory(cost, replace(settings, precision="bf16")) == state + activations  # a U-Net's norms stay in float32
    prior, halved = budget(TINY)["prior"], replace(TINY.training["prior"], precision="bf16")
    assert memory(prior, halved) == prior.parameters * BYTES + halved.batch_size * (prior.activations // 2)
    assert memory(cost, replace(settings, accumulation=4)) == state + activations / 4


@pytest.mark.slow
def test_every_stage_of_the_gpu_preset_fits_a_card_of_24_gb() -> None:
    for stage, one in budget(PRESETS["gpu"]).items():
        assert memory(one, PRESETS["gpu"].training[stage]) < 22e9, stage  # two for what an estimate leaves out


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--preset", "tiny", "--budget"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10


@pytest.mark.parametrize("stage", [stage for stage in TINY.models if stage != "checker"])
def test_what_is_counted_is_what_a_real_step_does(tiny: dict[str, Cost], stage: str) -> None:
    """On numbers, not on the meta device, with the attention that the counter knows; a step is nearly three forward passes (inputs need no gradient)."""
    one, config = tiny[stage], TINY.models[stage]
    model, inputs = MODELS[stage][0](config), sample_inputs(stage, config, 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        assert count(model, inputs)[:2] == (one.forward, one.activations)
        output = model.encode_image(inputs[0]).sum() + model.encode_text(*inputs[1:]).sum() if isinstance(model, CLIP) else model(*inputs).sum()
        before = counter.get_total_flops()
        output.backward()
    assert 1.8 * one.forward < counter.get_total_flops() - before <= 2 * one.forward


def test_a_picture_costs_what_drawing_it_does(tiny: dict[str, Cost]) -> None:
    torch.manual_seed(0)
    one, config = tiny["prior"], TINY.prior
    schedule, mask = make_schedule("cosine", 1000), torch.ones(1, config.context_length, dtype=torch.bool)
    text = torch.randn(1, config.context_length, config.text_width), mask, torch.randn(1, config.embedding_dim)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sample_prior(DiffusionPrior(config), schedule, *text, seeds=[0])
    assert counter.get_total_flops() == one.sampling
    told = torch.randn(1, TINY.decoder.embedding_dim), torch.zeros(1, TINY.decoder.context_length, dtype=torch.int64), mask
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sample_decoder(Decoder(TINY.decoder), schedule, *told, seeds=[0])
    assert counter.get_total_flops() == tiny["decoder"].sampling


@pytest.mark.slow
def test_the_page_shows_the_papers_budget() -> None:
    page = (Path(__file__).parents[1] / "docs" / "budget.md").read_text(encoding="utf-8")
    assert as_text(PRESETS["paper"]) in page
