"""The same numbers as other libraries: transformers' CLIPModel, a CLIP of PyTorch's own modules under OpenAI's names, diffusers' schedulers."""

import gzip
import math
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minunclip.config import Objective
from minunclip.data.tokenizer import Tokenizer
from minunclip.diffusion import invert_ddim, make_denoiser, make_schedule, sample_ancestral, sample_ddim, sample_dpm, spaced_timesteps
from minunclip.interop import IMAGE_MEAN, IMAGE_STD, clip_from_state_dict

WIDTH, TEXT_WIDTH, DIM, PATCH, SIDE, WORDS, CONTEXT, HEAD = 32, 48, 24, 8, 32, 99, 16, 16
END = WORDS - 1


class OpenAIBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // HEAD, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))


class OpenAIStack(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.resblocks = nn.ModuleList(OpenAIBlock(width) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenAIVision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post, self.transformer = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), OpenAIStack(WIDTH)
        self.proj = nn.Parameter(torch.randn(WIDTH, DIM))

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.conv1(pictures).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, WIDTH), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenAICLIP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual, self.transformer = OpenAIVision(), OpenAIStack(TEXT_WIDTH)
        self.token_embedding, self.ln_final = nn.Embedding(WORDS, TEXT_WIDTH), nn.LayerNorm(TEXT_WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, TEXT_WIDTH))
        self.text_projection = nn.Parameter(torch.randn(TEXT_WIDTH, DIM))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_text(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding[:length], mask))
        return x[torch.arange(len(x)), tokens.argmax(dim=1)] @ self.text_projection


@pytest.fixture
def captions() -> tuple[Tensor, Tensor]:
    """Tokens with the end token at several places, padding behind, and the mask."""
    tokens = torch.randint(1, END, (4, CONTEXT), generator=torch.Generator().manual_seed(1))
    length = torch.tensor([CONTEXT, 3, 9, 5])[:, None]
    place = torch.arange(CONTEXT)
    return tokens.masked_fill(place == length - 1, END).masked_fill(place >= length, 0), place < length


@pytest.fixture
def pictures() -> Tensor:
    return torch.rand(3, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2 - 1


def normalised(pictures: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return ((pictures + 1) / 2 - mean) / std


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), F.normalize(theirs.double(), dim=1), atol=1e-6, rtol=0)


def test_openai_names(captions: tuple[Tensor, Tensor], pictures: Tensor) -> None:
    torch.manual_seed(0)
    theirs = OpenAICLIP().double()
    ours = clip_from_state_dict(theirs.state_dict(), head_channels=HEAD)
    with torch.no_grad():
        close(ours.encode_image(pictures), theirs.visual(normalised(pictures)))
        close(ours.encode_text(*captions), theirs.encode_text(captions[0]))
    assert ours.logit_scale.item() == 3.0 and ours.config.image_size == SIDE and ours.config.vision.layers == 2


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hugging_face(captions: tuple[Tensor, Tensor], pictures: Tensor, activation: str) -> None:
    transformers = pytest.importorskip("transformers")
    shared = {"num_hidden_layers": 2, "hidden_act": activation, "attention_dropout": 0.0}
    text = {**shared, "hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "num_attention_heads": TEXT_WIDTH // HEAD, "eos_token_id": END}
    vision = {**shared, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": WIDTH // HEAD, "image_size": SIDE, "patch_size": PATCH}
    config = transformers.CLIPConfig(
        text_config={**text, "vocab_size": WORDS, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "pad_token_id": 0},
        vision_config=vision,
        projection_dim=DIM,
    )
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(config).double().eval()
    ours = clip_from_state_dict(theirs.state_dict(), activation=activation, head_channels=HEAD)
    tokens, mask = captions
    with torch.no_grad():
        image = theirs.visual_projection(theirs.vision_model(normalised(pictures)).pooler_output)
        words = theirs.text_projection(theirs.text_model(tokens, attention_mask=mask.long()).pooler_output)
        close(ours.encode_image(pictures), image)
        close(ours.encode_text(tokens, mask), words)


def test_clips_own_vocabulary() -> None:
    """Published ids, and those of transformers' tokenizer, from the vocabulary that open_clip carries: of its package nothing else is used."""
    transformers, package = pytest.importorskip("transformers"), find_spec("open_clip")
    if package is None or package.origin is None:
        pytest.skip("CLIP's vocabulary is not here: pip install --no-deps open_clip_torch")
    path = Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    ours = Tokenizer.from_clip(path)
    assert ours.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert (len(ours), ours.start_token, ours.end_token) == (49_408, 49_406, 49_407)
    letters = [*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)]), *map(chr, range(256, 256 + 68))]
    merges = [tuple(line.split()) for line in gzip.decompress(path.read_bytes()).decode().splitlines()[1 : 49_152 - 256 - 1]]
    names = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    theirs = transformers.CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=merges)
    for text in ("Hello, World!!  it's 2 o'clock", "naïve café", "a\tstriped   purple-star?!", "3 x 128 pixels ;-)", "東京 タワー", "wow!?", "🙂 emoji"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text


def test_weights_of_another_model_name_the_key() -> None:
    state = OpenAICLIP().state_dict()
    for change, message in (
        ({"visual.layer1.0.conv1.weight": torch.zeros(1)}, "visual.layer1.0.conv1.weight"),
        ({"visual.proj": torch.zeros(WIDTH + 1, DIM)}, "image_projection.weight"),
        ({"ln_final.bias": torch.full((TEXT_WIDTH,), torch.inf)}, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            clip_from_state_dict({**state, **change}, head_channels=HEAD)
    for lost in ("visual.conv1.weight", "transformer.resblocks.1.ln_2.weight", "text_projection"):
        with pytest.raises(ValueError, match="nothing for|lacks"):
            clip_from_state_dict({name: tensor for name, tensor in state.items() if name != lost}, head_channels=HEAD)


# ---- diffusers' schedulers, step by step ----

STEPS = 200


def waves(x_t: Tensor, timestep: Tensor | int) -> Tensor:
    """A made-up network: some smooth answer in reach of both the picture and the timestep."""
    return torch.tanh(1.3 * x_t + torch.sin(torch.as_tensor(timestep, dtype=torch.float64).reshape(-1, 1, 1, 1) / 17))


def start() -> Tensor:
    return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def drawing(seed: int) -> tuple[torch.Generator, Callable[[Tensor], Tensor]]:
    """A generator for their sampler, and noise from its twin for ours."""
    twin = torch.Generator().manual_seed(seed)
    return torch.Generator().manual_seed(seed), lambda x: torch.randn(x.shape, dtype=x.dtype, generator=twin)


def settings(name: str, objective: str) -> dict[str, object]:
    schedule = {"beta_schedule": "squaredcos_cap_v2"} if name == "cosine" else {"trained_betas": make_schedule("linear", STEPS).betas.numpy()}
    prediction = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}[objective]
    return {"num_train_timesteps": STEPS, "prediction_type": prediction, "clip_sample": True, "clip_sample_range": 1.0, **schedule}


@pytest.mark.parametrize("objective", ["epsilon", "x0", "v"])
@pytest.mark.parametrize(("name", "steps"), [("cosine", STEPS), ("cosine", 13), ("linear", STEPS), ("linear", 40)])
def test_ancestral_sampling(name: Literal["cosine", "linear"], steps: int, objective: Objective) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(**settings(name, objective), variance_type="fixed_small")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(timesteps=spaced_timesteps(STEPS, steps)[::-1])
    generator, noise = drawing(3)
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(waves(x, t), t, x, generator=generator).prev_sample
    schedule = make_schedule(name, STEPS)
    ours = sample_ancestral(make_denoiser(waves, schedule, objective), schedule, start(), steps, noise)
    torch.testing.assert_close(ours, x, atol=2e-5, rtol=0)  # they keep their table in float32, and a floor of 1e-20 under the variance


@pytest.mark.parametrize("objective", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_ddim(name: Literal["cosine", "linear"], eta: float, objective: Objective) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(**settings(name, objective), set_alpha_to_one=True, timestep_spacing="leading")
    scheduler.set_timesteps(STEPS)
    generator, noise = drawing(4)
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(waves(x, t), t, x, eta=eta, use_clipped_model_output=True, generator=generator).prev_sample
    schedule = make_schedule(name, STEPS)
    ours = sample_ddim(make_denoiser(waves, schedule, objective), schedule, start(), STEPS, noise, eta=eta)
    torch.testing.assert_close(ours, x, atol=2e-5, rtol=0)  # they keep their table in float32


@pytest.mark.parametrize("objective", ["epsilon", "x0", "v"])
@pytest.mark.parametrize(("name", "steps"), [("cosine", STEPS), ("cosine", 13), ("linear", STEPS), ("linear", 8)])
def test_dpm_solver(name: Literal["cosine", "linear"], steps: int, objective: Objective) -> None:
    """Step by step. The one difference: where a step is longer than the one before, in lambda, ours extrapolates no further than if it were as long."""
    diffusers = pytest.importorskip("diffusers")
    options = {key: value for key, value in settings(name, objective).items() if not key.startswith("clip")}
    scheduler = diffusers.DPMSolverMultistepScheduler(**options, solver_order=2, final_sigmas_type="zero")
    schedule, timesteps = make_schedule(name, STEPS), spaced_timesteps(STEPS, steps)[::-1]
    scheduler.set_timesteps(timesteps=timesteps)
    clock = [0.5 * math.log(abar / (1 - abar)) for abar in (schedule.exact_alphas_bar[t] for t in timesteps)]
    clock.append(clock[-1])  # the last step, to clean data, is infinitely long, and first-order in both
    seen: list[Tensor] = []

    def network(x_t: Tensor, timestep: Tensor) -> Tensor:
        seen.append(x_t)
        return waves(x_t, timestep)

    denoiser = make_denoiser(network, schedule, objective, clip=None)
    last = sample_dpm(denoiser, schedule, start(), steps)
    ours, x = [*seen, last], start()
    for i, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(ours[i], x, atol=1e-4, rtol=1e-4)
        growth = (clock[i + 1] - clock[i]) / (clock[i] - clock[i - 1]) if i else 1.0
        if growth > 1:
            x_0 = denoiser(x, torch.full((len(x),), int(t))).x_0
            scheduler.model_outputs[-1] = x_0 - (x_0 - scheduler.model_outputs[-1]) / growth
        x = scheduler.step(waves(x, t), t, x).prev_sample
    torch.testing.assert_close(ours[-1], x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("objective", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_ddim_inversion(name: Literal["cosine", "linear"], objective: Objective) -> None:
    """Step by step. The one difference: ours asks the network at the timestep where the picture stands, theirs at the one where it goes."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMInverseScheduler(**settings(name, objective) | {"clip_sample": False}, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS // 10)
    schedule = make_schedule(name, STEPS)
    timesteps = spaced_timesteps(STEPS, STEPS // 10, first=9)
    assert scheduler.timesteps.tolist() == timesteps
    x = start() * schedule.exact_alphas_bar[9] ** 0.5
    for here, there in pairwise(timesteps):
        x = scheduler.step(waves(x, here), there, x).prev_sample
    ours = invert_ddim(make_denoiser(waves, schedule, objective, clip=None), schedule, start(), STEPS // 10, first=9)
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_the_schedules_betas() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2").betas
    torch.testing.assert_close(make_schedule("cosine", 1000).betas.float(), theirs, atol=1e-7, rtol=1e-5)
    theirs = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02).betas
    torch.testing.assert_close(make_schedule("linear", 1000).betas.float(), theirs, atol=1e-7, rtol=1e-5)
