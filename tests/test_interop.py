"""The same numbers as other libraries: transformers' CLIPModel, a CLIP of PyTorch's own modules under OpenAI's names, diffusers' schedulers."""

import gzip
import json
import math
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from minunclip.cli import main
from minunclip.config import Objective
from minunclip.data.tokenizer import Tokenizer
from minunclip.data.world import to_tensor
from minunclip.diffusion import invert_ddim, make_denoiser, make_schedule, sample_ancestral, sample_ddim, sample_dpm, spaced_timesteps
from minunclip.interop import IMAGE_MEAN, IMAGE_STD, clip_from_state_dict
from minunclip.models.clip import CLIP

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


def hugging_face(activation: str, words: int = WORDS, image_heads: int = WIDTH // HEAD) -> Any:
    """A CLIPModel of transformers, tiny and random."""
    transformers = pytest.importorskip("transformers")
    shared = {"num_hidden_layers": 2, "hidden_act": activation, "attention_dropout": 0.0}
    text = {**shared, "hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "num_attention_heads": TEXT_WIDTH // HEAD, "eos_token_id": END}
    vision = {**shared, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": image_heads, "image_size": SIDE, "patch_size": PATCH}
    config = transformers.CLIPConfig(
        text_config={**text, "vocab_size": words, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "pad_token_id": 0},
        vision_config=vision,
        projection_dim=DIM,
    )
    torch.manual_seed(0)
    return transformers.CLIPModel(config).double().eval()


@torch.no_grad()
def image_features(theirs: Any, pictures: Tensor) -> Tensor:
    return theirs.visual_projection(theirs.vision_model(normalised(pictures)).pooler_output)


@torch.no_grad()
def agree(ours: CLIP, theirs: Any, captions: tuple[Tensor, Tensor], pictures: Tensor) -> None:
    close(ours.encode_image(pictures), image_features(theirs, pictures))
    close(ours.encode_text(*captions), theirs.text_projection(theirs.text_model(captions[0], attention_mask=captions[1].long()).pooler_output))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hugging_face(captions: tuple[Tensor, Tensor], pictures: Tensor, activation: str) -> None:
    theirs = hugging_face(activation)
    agree(clip_from_state_dict(theirs.state_dict(), activation=activation, head_channels=HEAD), theirs, captions, pictures)


def test_a_folder_as_the_hub_has_it(captions: tuple[Tensor, Tensor], pictures: Tensor, tmp_path: Path) -> None:
    """In one file and in shards, with what only the config says: the activation, and heads that differ from tower to tower."""
    theirs = hugging_face("gelu", image_heads=1)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 1
    for path in (tmp_path / "whole", tmp_path / "whole" / "model.safetensors", tmp_path / "shards", tmp_path / "shards" / "model.safetensors.index.json"):
        agree(CLIP.from_openai(path), theirs, captions, pictures)
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"{shards[0].name} is missing: a shard is missing"):
        CLIP.from_openai(tmp_path / "shards")
    (tmp_path / "whole" / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ValueError, match="is of a 'siglip', not of a 'clip'"):
        CLIP.from_openai(tmp_path / "whole")
    (tmp_path / "ViT-B-32.pt").touch()
    with pytest.raises(ValueError, match="a pickle, which can run anything"):
        CLIP.from_openai(tmp_path / "ViT-B-32.pt")
    with pytest.raises(ValueError, match="has none of model.safetensors"):
        CLIP.from_openai(tmp_path)


def test_open_clip_says_its_activation_and_heads(pictures: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = OpenAICLIP().state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "open_clip_model.safetensors")
    towers = {"text_cfg": {"width": TEXT_WIDTH, "heads": TEXT_WIDTH // HEAD}, "vision_cfg": {"head_width": HEAD}}
    for quick, activation in ((True, "quick_gelu"), (False, "gelu")):
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": quick, **towers}}))
        expected = clip_from_state_dict(state, activation, HEAD)
        assert CLIP.from_openai(tmp_path).config == expected.config
        close(CLIP.from_openai(tmp_path).encode_image(pictures.float()), expected.encode_image(pictures.float()))


def test_pictures_are_normalised_as_the_published_config_says(pictures: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = OpenAICLIP().state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    # by a half, and a half: normalised are then the pictures themselves; OpenAI's own gets those that are, once it has normalised them
    expected = clip_from_state_dict(state, head_channels=HEAD).encode_image((2 * (std * pictures + mean) - 1).float())
    towers = {"text_cfg": {"width": TEXT_WIDTH, "heads": TEXT_WIDTH // HEAD}, "vision_cfg": {"head_width": HEAD}, "quick_gelu": True}
    half = [0.5, 0.5, 0.5]
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": towers, "preprocess_cfg": {"mean": half, "std": half}}))
    close(CLIP.from_openai(tmp_path).encode_image(pictures.float()), expected)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": towers, "preprocess_cfg": {"mean": 0.5, "std": 0.5}}))  # for every channel
    close(CLIP.from_openai(tmp_path).encode_image(pictures.float()), expected)
    (tmp_path / "open_clip_config.json").unlink()
    of_text, of_vision = ({"hidden_size": width, "num_attention_heads": width // HEAD} for width in (TEXT_WIDTH, WIDTH))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": of_text, "vision_config": of_vision}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": half, "image_std": half}))
    close(CLIP.from_openai(tmp_path).encode_image(pictures.float()), expected)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": half, "image_std": [0.5, 0.0, 0.5]}))
    with pytest.raises(ValueError, match="three numbers each, the second above 0"):
        CLIP.from_openai(tmp_path)


@pytest.mark.slow
def test_the_chain_trains_on_a_published_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = hugging_face("quick_gelu", words=517)
    theirs.float().save_pretrained(tmp_path / "published")
    (tmp_path / "published" / "merges.txt").write_text("#version: 0.2\nr e\nc i\nre d</w>\n")
    run, options = tmp_path / "run", ["--preset", "tiny", "--clip", str(tmp_path / "published"), "--device", "cpu"]
    assert main(["train", "all", *options, "--out", str(run), "--steps", "2"]) == 0
    kept = np.load(next((run / "data").glob("world-*/image-embeddings-*.npy")))
    shown = to_tensor(np.load(next((run / "data").glob("world-*/pictures.npy")))[:8])
    close(torch.from_numpy(kept[:8]), image_features(theirs.double(), shown.double()))
    assert json.loads((run / "prior" / "config.json").read_text())["embedding_dim"] == DIM
    assert json.loads((run / "decoder" / "config.json").read_text())["vocabulary_size"] == 517
    assert main(["pack", str(run), str(tmp_path / "weights")]) == 0
    assert main(["sample", "a red circle", "--weights", str(tmp_path / "weights"), "--out", str(tmp_path / "picture.png")]) == 0
    assert (tmp_path / "picture.png").is_file()
    capsys.readouterr()
    shutil.copytree(tmp_path / "published", tmp_path / "other")
    again = hugging_face("quick_gelu", words=517)  # of the same sizes
    next(again.parameters()).data.add_(1)
    again.float().save_pretrained(tmp_path / "other")
    assert main(["train", "prior", "--preset", "tiny", "--clip", str(tmp_path / "other"), "--device", "cpu", "--out", str(run)]) == 2
    assert "is another CLIP" in capsys.readouterr().err.splitlines()[-1]
    theirs.config.vision_config.hidden_act = theirs.config.text_config.hidden_act = "gelu"
    theirs.save_pretrained(tmp_path / "published")
    for command, message in ((["train", "prior", "--out", str(run)], "is another CLIP"), (["train", "clip"], "leave --init out, and the stage clip")):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


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


def test_what_a_config_cannot_mean_is_said_in_a_line(tmp_path: Path) -> None:
    state = OpenAICLIP().state_dict()
    for options, message in (
        ({"activation": "gelu_new", "head_channels": HEAD}, "'gelu_new' can be read"),  # taken for another it would give other embeddings, silently
        ({"head_channels": 0}, "no multiple of 0 channels"),
        ({"head_channels": HEAD + 1}, f"no multiple of {HEAD + 1} channels"),
        ({"head_channels": HEAD, "image_head_channels": 0}, "no multiple of 0 channels"),
        ({"head_channels": HEAD, "image_head_channels": "eight"}, "no multiple of 'eight' channels"),
    ):
        with pytest.raises(ValueError, match=message):
            clip_from_state_dict(state, **options)
    with pytest.raises(ValueError, match="too few dimensions"):
        clip_from_state_dict({**state, "visual.conv1.weight": torch.zeros(WIDTH)}, head_channels=HEAD)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    for heads in (0, "eight", None):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": {"hidden_size": TEXT_WIDTH, "num_attention_heads": heads}}))
        with pytest.raises(ValueError, match="whole numbers above 0"):
            CLIP.from_openai(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": {"hidden_size": TEXT_WIDTH, "num_attention_heads": 7}}))
    with pytest.raises(ValueError, match="no multiple of its num_attention_heads, 7"):
        CLIP.from_openai(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}))
    with pytest.raises(ValueError, match="'quick_gelu' for captions, 'gelu' for pictures"):
        CLIP.from_openai(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json holds no JSON object, but a list"):
        CLIP.from_openai(tmp_path)


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
    # its own table, which it rounds to float32, not rounded
    scheduler.sigmas = torch.tensor([*(((1 - abar) / abar) ** 0.5 for abar in (schedule.exact_alphas_bar[t] for t in timesteps)), 0.0], dtype=torch.float64)
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
        torch.testing.assert_close(ours[i], x, atol=1e-5, rtol=1e-5)
        growth = (clock[i + 1] - clock[i]) / (clock[i] - clock[i - 1]) if i else 1.0
        if growth > 1:
            x_0 = denoiser(x, torch.full((len(x),), int(t))).x_0
            scheduler.model_outputs[-1] = x_0 - (x_0 - scheduler.model_outputs[-1]) / growth
        x = scheduler.step(waves(x, t), t, x).prev_sample
    torch.testing.assert_close(ours[-1], x, atol=1e-5, rtol=1e-5)


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
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


def test_the_schedules_betas() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2").betas
    torch.testing.assert_close(make_schedule("cosine", 1000).betas.float(), theirs, atol=1e-7, rtol=1e-5)
    theirs = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02).betas
    torch.testing.assert_close(make_schedule("linear", 1000).betas.float(), theirs, atol=1e-7, rtol=1e-5)
