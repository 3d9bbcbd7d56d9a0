"""diffusers' unCLIP and this package's: each module's answer, and the whole pipeline both ways, on small random models."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minunclip.config import CLIPConfig, DecoderConfig, DiffusionConfig, DiffusionPriorConfig, TransformerConfig, UNetConfig, UpsamplerConfig
from minunclip.data.tokenizer import Tokenizer
from minunclip.diffusion import SeededNoise
from minunclip.interop.karlo import (
    Part,
    _read_part,
    decoder_from_diffusers,
    prior_from_diffusers,
    say_nothing_by_an_empty_caption,
    text_tower_from_diffusers,
    upsampler_from_diffusers,
)
from minunclip.interop.to_diffusers import to_diffusers
from minunclip.models.clip import CLIP
from minunclip.models.decoder import Decoder
from minunclip.models.diffusion_prior import DiffusionPrior
from minunclip.models.upsampler import Upsampler
from minunclip.pipeline import UnCLIP

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
UnCLIPTextProjModel = pytest.importorskip("diffusers.pipelines.deprecated.unclip.text_proj").UnCLIPTextProjModel

DIM, CONTEXT, WORDS = 32, 11, 518  # of embeddings and of the text tower; tokens a caption has; tokens that there are
SIZE, LARGE = 8, 16  # sides of the decoder's pictures and of the upsampler's
MERGES = [(81, 68), (512, 323), (82, 83), (514, 64)]  # re, red, st, sta


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unfilled(kind: Callable[..., nn.Module], **config: object) -> nn.Module:
    """A large model whose numbers do not matter yet, and would take long."""
    with torch.device("meta"):
        model = kind(**config)
    return model.to_empty(device="cpu")


def random(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same model in float64 with every parameter random: some start at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.double().parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 10
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * fan**-0.5 + (parameter.ndim == 1)
    return model.eval()


SCHEDULERS = {
    "prior_scheduler": diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0),
    "decoder_scheduler": diffusers.UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
    "super_res_scheduler": diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
}
PRIOR, DECODER, SUPER_RES = (Part(name, scheduler.config) for name, scheduler in SCHEDULERS.items())


def part(model: nn.Module) -> Part:
    return Part("theirs", model.config if hasattr(model.config, "items") else model.config.to_dict(), model.state_dict())


def their_prior() -> nn.Module:
    model = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=DIM, num_embeddings=CONTEXT)
    random(model).clip_std.data.abs_()
    return model


def their_text_encoder() -> nn.Module:
    sizes = {"hidden_size": DIM, "intermediate_size": 4 * DIM, "num_attention_heads": 2, "num_hidden_layers": 2, "projection_dim": DIM}
    tokens = {"vocab_size": WORDS, "max_position_embeddings": CONTEXT, "bos_token_id": WORDS - 2, "eos_token_id": WORDS - 1, "pad_token_id": 0}
    return random(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(hidden_act="quick_gelu", **sizes, **tokens)))


def their_decoder() -> tuple[nn.Module, nn.Module]:
    """256 channels and more, as Karlo's: there 32 groups have 8 channels at least, and both libraries give as many."""
    unet = unfilled(
        diffusers.UNet2DConditionModel,
        sample_size=SIZE,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(256, 512),
        layers_per_block=1,
        cross_attention_dim=48,
        attention_head_dim=64,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
    )
    projection = UnCLIPTextProjModel(clip_extra_context_tokens=4, clip_embeddings_dim=DIM, time_embed_dim=1024, cross_attention_dim=48)
    return random(unet), random(projection, seed=1)


def their_upsampler(seed: int) -> nn.Module:
    model = unfilled(
        diffusers.UNet2DModel,
        sample_size=LARGE,
        in_channels=6,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(256, 256),
        layers_per_block=1,
        add_attention=False,
    )
    return random(model, seed)


def our_clip() -> CLIP:
    return text_tower_from_diffusers(part(their_text_encoder()))


def our_decoder() -> Decoder:
    unet, projection = their_decoder()
    return decoder_from_diffusers(part(unet), part(projection), DECODER, our_clip())


def words() -> tuple[Tensor, Tensor]:
    """Tokens of captions of three lengths, as CLIP has them, and their mask."""
    tokens = torch.randint(1, WORDS - 2, (3, CONTEXT), generator=torch.Generator().manual_seed(5))
    length, place = torch.tensor([CONTEXT, 2, 6])[:, None], torch.arange(CONTEXT)
    tokens[:, 0] = WORDS - 2
    return tokens.masked_fill(place == length - 1, WORDS - 1).masked_fill(place >= length, 0), place < length


def captions(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Encoded text, its mask, and z_t that is not of unit norm."""
    mask = torch.arange(CONTEXT) < torch.tensor([CONTEXT, 2, 6])[:batch, None]
    return noise(batch, CONTEXT, DIM, seed=1), mask, 3 * noise(batch, DIM, seed=2)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_prior() -> None:
    theirs = their_prior()
    ours = prior_from_diffusers(part(theirs), PRIOR)
    (encoded, mask, z_t), x_t, timestep = captions(), noise(3, DIM), torch.tensor([0, 431, 999])
    expected = theirs(x_t, timestep, z_t, encoded, mask).predicted_image_embedding
    close(ours(x_t, timestep, encoded, mask, z_t), expected)
    close(ours.from_latent(x_t), theirs.post_process_latents(x_t))
    close(ours.to_latent(ours.from_latent(x_t)), x_t)


@torch.no_grad()
def test_the_text_tower() -> None:
    theirs, ours, (tokens, mask) = their_text_encoder(), our_clip(), words()
    expected, (encoded, z_t) = theirs(tokens, attention_mask=mask.long()), ours.text_features(tokens, mask)
    close(encoded[mask], expected.last_hidden_state[mask])
    close(z_t.double(), expected.text_embeds)  # its norm is kept
    with pytest.raises(ValueError, match="can embed no picture"):
        ours.encode_image(torch.zeros(1, 3, 224, 224))


@torch.no_grad()
def test_the_decoder() -> None:
    (unet, projection), text_encoder, ours, (tokens, mask) = their_decoder(), their_text_encoder(), our_decoder(), words()
    x_t, timestep, z_i = noise(3, 3, SIZE, SIZE), torch.tensor([0, 431, 999]), noise(3, DIM, seed=1)
    text = text_encoder(tokens, attention_mask=mask.long())
    context, vector = projection(
        image_embeddings=z_i, prompt_embeds=text.text_embeds, text_encoder_hidden_states=text.last_hidden_state, do_classifier_free_guidance=False
    )
    seen = torch.nn.functional.pad(mask, (4, 0), value=True)
    expected = unet(x_t, timestep, encoder_hidden_states=context, class_labels=vector, attention_mask=seen).sample
    close(ours(x_t, timestep, DIM**0.5 * z_i, tokens, mask), expected)
    shorter = mask.any(dim=0).sum() - 1
    assert (ours(x_t, timestep, DIM**0.5 * z_i, tokens, mask & (torch.arange(CONTEXT) < shorter)) - expected)[0].abs().max() > 1e-3  # words count


@torch.no_grad()
def test_the_upsampler_has_two_networks() -> None:
    first, last = their_upsampler(0), their_upsampler(1)
    ours = upsampler_from_diffusers(part(first), part(last), SUPER_RES, SIZE)
    x_t, low = noise(3, 3, LARGE, LARGE), noise(3, 3, SIZE, SIZE, seed=1).clamp(-1, 1)
    large = torch.nn.functional.interpolate(low, size=(LARGE, LARGE), mode="bicubic", antialias=True, align_corners=False)
    assert large.abs().max() > 1  # it overshoots, and is left so
    for theirs, timestep in ((first, torch.tensor([7, 431, 999])), (last, torch.zeros(3, dtype=torch.int64))):
        close(ours(x_t, timestep, low), theirs(torch.cat([x_t, large], dim=1), timestep).sample)


# ---- the whole pipeline, both ways ----


def their_tokenizer() -> object:
    """CLIP's alphabet and a few merges."""
    vocabulary, merges = Tokenizer(MERGES, "clip").clip_files()
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token="!", model_max_length=CONTEXT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline of theirs, saved by diffusers."""
    decoder, projection = their_decoder()
    models = {"prior": their_prior(), "decoder": decoder, "text_proj": projection, "text_encoder": their_text_encoder()}
    models |= {"super_res_first": their_upsampler(0), "super_res_last": their_upsampler(1)}
    pipeline = diffusers.UnCLIPPipeline(**{name: model.float() for name, model in models.items()}, tokenizer=their_tokenizer(), **SCHEDULERS)
    path = tmp_path_factory.mktemp("karlo")
    pipeline.save_pretrained(path, max_shard_size="20MB")
    return path


# x_0 = (x_T - epsilon) / 5e-5 at timestep 999: with these seeds no pixel lies within float32's error of the border between black and white
CAPTIONS, SEEDS = ["a red star", "Stars and 3 reds", ""], [3, 4, 5]
GUIDANCE, STEPS = {"prior": 4.0, "decoder": 8.0}, 4


def drawn_by(model: UnCLIP) -> Tensor:
    """Large pictures in [0, 1]."""
    text = model.read(CAPTIONS)
    z_i, _ = model.draw_embeddings(text, "diffusion", SEEDS, guidance=GUIDANCE["prior"])
    small = model.decode(z_i, text, SEEDS, guidance=GUIDANCE["decoder"])
    return (model.upsample("upsampler1", small, SEEDS).clamp(-1, 1) + 1) / 2


def drawn_by_theirs(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Large pictures in [0, 1] from the noise that ours draws, each stage from its seeds."""
    noise = SeededNoise([])

    def same_noise(shape: tuple[int, ...], **options: object) -> Tensor:
        return noise(shape[1:])

    def fresh(shape: tuple[int, ...], dtype: object, device: object, generator: object, latents: object, scheduler: object) -> Tensor:
        noise.generators = SeededNoise(SEEDS).generators
        return noise(shape[1:])

    monkeypatch.setattr("diffusers.schedulers.scheduling_unclip.randn_tensor", same_noise)
    monkeypatch.setattr(pipeline, "prepare_latents", fresh)
    pipeline.set_progress_bar_config(disable=True)
    steps = {f"{name}_num_inference_steps": STEPS for name in ("prior", "decoder", "super_res")}
    images = pipeline(CAPTIONS, **steps, prior_guidance_scale=GUIDANCE["prior"], decoder_guidance_scale=GUIDANCE["decoder"], output_type="np").images
    return torch.from_numpy(images).movedim(3, 1)


def with_few_steps(model: UnCLIP) -> UnCLIP:
    for stage in ("prior", "decoder", "upsampler1"):
        config = model.models[stage].config
        model.models[stage].config = replace(config, diffusion=replace(config.diffusion, sampling_steps=STEPS))
    return model


def our_own() -> UnCLIP:
    """Not from diffusers, but with a config that it has a counterpart for."""
    text, ddpm = TransformerConfig(DIM, 1, 2), partial(DiffusionConfig, "cosine", sampler="ancestral", sampling_steps=STEPS)
    unet = UNetConfig(256, (1, 1), 1, (SIZE // 2,), 64)
    clip = CLIPConfig(224, 14, None, text, CONTEXT, WORDS, DIM, unit_norm=False)
    prior = DiffusionPriorConfig(DIM, DIM, CONTEXT, text, ddpm("x0", False), latent="standardised", null_tokens=2, candidates=1)
    decoder = DecoderConfig(SIZE, DIM, WORDS, CONTEXT, text, unet, ddpm("epsilon", True), text_start="clip", context_width=48, null_tokens=2)
    upsampler = UpsamplerConfig(SIZE, LARGE, "none", replace(unet, attention_at=()), ddpm("epsilon", False), clamp=False)
    models = {"clip": CLIP(clip), "prior": DiffusionPrior(prior), "decoder": Decoder(decoder), "upsampler1": Upsampler(upsampler)}
    models = {stage: random(model, seed).float() for seed, (stage, model) in enumerate(models.items())}
    models["decoder"].prepare_from(models["clip"], torch.zeros(1, DIM))
    tokenizer = Tokenizer(MERGES, "clip")
    say_nothing_by_an_empty_caption(models, tokenizer)
    return UnCLIP(models, tokenizer)


def require_same(ours: Tensor, theirs: Tensor) -> None:
    difference = (ours - theirs).abs().max().item()
    print(f"largest difference {difference:.1e}")
    assert difference < 1e-3 and ours.std() > 0.05


@pytest.mark.slow
def test_theirs_draws_the_same_pictures_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "UnCLIPTextProjModel", UnCLIPTextProjModel, raising=False)  # diffusers 0.42 saves the class, and then misses it
    theirs = diffusers.UnCLIPPipeline.from_pretrained(folder)
    require_same(drawn_by(with_few_steps(UnCLIP.from_karlo(folder))), drawn_by_theirs(theirs, monkeypatch))


@pytest.mark.slow
def test_ours_draws_the_same_pictures_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = our_own()
    require_same(drawn_by(ours), drawn_by_theirs(to_diffusers(ours), monkeypatch))


@pytest.mark.slow
def test_there_and_back_the_weights_are_the_same(folder: Path) -> None:
    ours = UnCLIP.from_karlo(folder)
    assert ours.models["decoder"].text_transformer is ours.models["clip"].text_transformer  # not twice in memory
    back = to_diffusers(ours)
    for name in ("prior", "decoder", "text_proj", "text_encoder", "super_res_first", "super_res_last"):
        theirs, state = _read_part(folder, name, torch.float32), getattr(back, name).state_dict()
        assert theirs.state.keys() == state.keys()
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, theirs.state[key], atol=1e-4, rtol=1e-4)
    assert back.tokenizer("a red star").input_ids == ours.tokenizer(["a red star"], 6)[0][0].tolist()


@pytest.mark.slow
def test_it_is_saved_as_any_other_and_draws_in_half_precision(folder: Path, tmp_path: Path) -> None:
    half = with_few_steps(UnCLIP.from_karlo(folder, dtype=torch.bfloat16))
    assert half.sizes == (SIZE, LARGE) and half.dtype == torch.bfloat16
    assert half.generate(CAPTIONS[:1], size=SIZE).pictures[SIZE].shape == (1, SIZE, SIZE, 3)
    half.save_pretrained(tmp_path, torch.bfloat16)
    again = UnCLIP.from_pretrained(tmp_path)
    for stage, model in half.models.items():
        for key, tensor in again.models[stage].state_dict().items():
            assert torch.equal(tensor, model.state_dict()[key].to(tensor.dtype))


def test_karlos_own_sizes_fit_and_take_the_memory_that_is_stated() -> None:
    """On the meta device, with the configs of diffusers' own conversion of Karlo's weights (scripts/convert_kakao_brain_unclip_to_diffusers.py)."""
    levels = {"block_out_channels": (320, 640, 960, 1280), "layers_per_block": 3}
    down, up = [["ResnetDownsampleBlock2D"], ["SimpleCrossAttnDownBlock2D"]], [["SimpleCrossAttnUpBlock2D"], ["ResnetUpsampleBlock2D"]]
    plain = {"down_block_types": 4 * down[0], "up_block_types": 4 * up[1], "in_channels": 6, "out_channels": 3, "add_attention": False}
    cross = {"down_block_types": down[0] + 3 * down[1], "up_block_types": 3 * up[0] + up[1], "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}
    cross |= {"cross_attention_dim": 1536, "class_embed_type": "identity", "attention_head_dim": 64, "resnet_time_scale_shift": "scale_shift"}
    tower = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768}
    with torch.device("meta"):
        prior = diffusers.PriorTransformer()
        unet = diffusers.UNet2DConditionModel(sample_size=64, in_channels=3, out_channels=6, **levels, **cross)
        projection = UnCLIPTextProjModel(time_embed_dim=1280, cross_attention_dim=1536)
        first = diffusers.UNet2DModel(sample_size=256, **levels, **plain)
        text_encoder = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(hidden_act="quick_gelu", **tower))
    prior_from_diffusers(part(prior), PRIOR)
    decoder_from_diffusers(part(unet), part(projection), DECODER, text_tower_from_diffusers(part(text_encoder)))
    upsampler_from_diffusers(part(first), part(first), SUPER_RES, 64)
    count = sum(p.numel() for model in (prior, unet, projection, first, first, text_encoder) for p in model.parameters())
    assert f"{count / 1e9:.2f} billion: {2 * count / 1e9:.1f} GB in float16, {4 * count / 1e9:.1f} GB" in (UnCLIP.from_karlo.__doc__ or "")


# ---- what does not fit ----

Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("transformer_blocks.1.attn1.to_k.weight"), r"lacks 'transformer_blocks.1.attn1.to_k.weight' of shape \(32, 32\).*shard"),
        (lambda s: s.update({"down_blocks.0.resnets.0.conv1.bias": torch.zeros(5)}), r"'down_blocks.0.resnets.0.conv1.bias' of shape \(5,\).*another family"),
        (lambda s: s.update(proj_in=s.pop("proj_in.weight")), "'proj_in'|'proj_in.weight'"),
        (lambda s: s.update({"proj_in.weight": torch.zeros(32, 48)}), r"'proj_in.weight' has shape \(32, 48\), but the config asks for \(32, 32\)"),
        (lambda s: s.update(clip_std=torch.full((1, DIM), 70_000.0).half()), "'clip_std' has values that are not finite.*half precision"),
    ],
)
def test_wrong_weights_of_a_prior_are_refused_by_name(change: Change, message: str) -> None:
    theirs = their_prior()
    state = theirs.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message) as caught:
        prior_from_diffusers(Part("theirs", theirs.config, state), PRIOR)
    assert "\n" not in str(caught.value)


def test_a_config_of_another_family_is_refused_by_its_field() -> None:
    theirs = their_prior()
    with pytest.raises(ValueError, match="norm_in_type is 'layer', but this package has None"):
        prior_from_diffusers(Part("theirs", {**theirs.config, "norm_in_type": "layer"}, theirs.state_dict()), PRIOR)
    with pytest.raises(ValueError, match="clip_sample_range is 1.0"):
        prior_from_diffusers(part(theirs), SUPER_RES)


def gone(folder: Path, name: str) -> None:
    (folder / name).unlink()


def changed(folder: Path, name: str, **values: object) -> None:
    config = json.loads((folder / name).read_text()) | values
    gone(folder, name)  # it is linked, not copied
    (folder / name).write_text(json.dumps(config))


def pickled(folder: Path) -> None:
    for path in (folder / "text_encoder").glob("model*"):
        path.unlink()
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: gone(f, "model_index.json"), "model_index.json is missing: give a folder in diffusers' layout"),
        (lambda f: changed(f, "model_index.json", _class_name="StableDiffusionPipeline"), "_class_name is 'StableDiffusionPipeline'.*'UnCLIPPipeline'"),
        (pickled, "text_encoder has none of model.safetensors.*pickle"),
        (lambda f: next((f / "decoder").glob("*-00002-of-*")).unlink(), "00002-of-.*.safetensors is missing: a shard is missing"),
        (lambda f: changed(f, "decoder/config.json", norm_num_groups=16), "norm_num_groups is 16, but this package gives 256 channels 32 groups"),
        (lambda f: changed(f, "prior/config.json", embedding_dim=48), r"'clip_mean' has shape \(1, 32\), but the config asks for \(1, 48\)"),
        (lambda f: changed(f, "super_res_last/config.json", layers_per_block=2), "super_res_last: layers_per_block is 2, but this package has 1 only"),
        (lambda f: changed(f, "prior_scheduler/scheduler_config.json", clip_sample_range=1.0), "clip_sample_range is 1.0, but this package has 5.0 only"),
        (lambda f: gone(f, "tokenizer/tokenizer.json"), "merges.txt is missing"),
    ],
)
def test_a_spoilt_folder_gets_one_line(folder: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    shutil.copytree(folder, tmp_path / "karlo", copy_function=os.link)
    spoil(tmp_path / "karlo")
    with pytest.raises(ValueError, match=message) as caught:
        UnCLIP.from_karlo(tmp_path / "karlo")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "fields", "message"),
    [
        ("prior", {"candidates": 2}, "prior: diffusers' unCLIP has no candidates of 2: train with 1 to export it"),
        ("decoder", {"whiten": True}, "decoder: diffusers' unCLIP has no whiten of True"),
        ("decoder", {"context_width": None}, "context_width"),
    ],
)
def test_what_diffusers_has_no_counterpart_for_is_not_exported(stage: str, fields: dict[str, object], message: str) -> None:
    ours = our_own()
    ours.models[stage].config = replace(ours.models[stage].config, **fields)
    with pytest.raises(ValueError, match=message):
        to_diffusers(ours)


def test_words_of_its_own_are_not_exported() -> None:
    ours = our_own()
    with torch.no_grad():
        ours.models["decoder"].token_embedding.weight[3] += 1
    with pytest.raises(ValueError, match="'token_embedding.weight' is not CLIP's"):
        to_diffusers(ours)
    with torch.no_grad():
        ours.models["prior"].condition.null_text[0] += 1
    with pytest.raises(ValueError, match="drops a caption by an empty one"):
        to_diffusers(ours)
