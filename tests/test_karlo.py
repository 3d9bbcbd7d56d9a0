"""diffusers' unCLIP and this package's: each module's answer, and the whole pipeline both ways, on small random models."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from minunclip.interop.karlo import decoder_from_diffusers, prior_from_diffusers, text_tower_from_diffusers, upsampler_from_diffusers
from minunclip.models.clip import CLIP
from minunclip.models.decoder import Decoder

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
UnCLIPTextProjModel = pytest.importorskip("diffusers.pipelines.deprecated.unclip.text_proj").UnCLIPTextProjModel

DIM, CONTEXT, WORDS = 32, 11, 530  # of embeddings and of the text tower; tokens a caption has; tokens that there are
SIZE, LARGE = 8, 16  # sides of the decoder's pictures and of the upsampler's


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


def schedulers() -> dict[str, object]:
    prior = diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
    decoder = diffusers.UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon")
    super_res = diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon")
    return {"prior": prior, "decoder": decoder, "super_res": super_res}


SCHEDULERS = schedulers()


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
    theirs = their_text_encoder()
    return text_tower_from_diffusers(theirs.state_dict(), theirs.config.to_dict())


def our_decoder() -> Decoder:
    unet, projection = their_decoder()
    scheduler = SCHEDULERS["decoder"].config
    return decoder_from_diffusers(unet.state_dict(), unet.config, projection.state_dict(), projection.config, scheduler, our_clip())


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
    ours = prior_from_diffusers(theirs.state_dict(), theirs.config, SCHEDULERS["prior"].config)
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
    ours = upsampler_from_diffusers(first.state_dict(), last.state_dict(), first.config, SCHEDULERS["super_res"].config, SIZE)
    x_t, low = noise(3, 3, LARGE, LARGE), noise(3, 3, SIZE, SIZE, seed=1).clamp(-1, 1)
    large = torch.nn.functional.interpolate(low, size=(LARGE, LARGE), mode="bicubic", antialias=True, align_corners=False)
    assert large.abs().max() > 1  # it overshoots, and is left so
    for theirs, timestep in ((first, torch.tensor([7, 431, 999])), (last, torch.zeros(3, dtype=torch.int64))):
        close(ours(x_t, timestep, low), theirs(torch.cat([x_t, large], dim=1), timestep).sample)


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
        prior_from_diffusers(state, theirs.config, SCHEDULERS["prior"].config)
    assert "\n" not in str(caught.value)


def test_a_config_of_another_family_is_refused_by_its_field() -> None:
    theirs = their_prior()
    with pytest.raises(ValueError, match="norm_in_type is 'layer', but this package's models have None"):
        prior_from_diffusers(theirs.state_dict(), {**theirs.config, "norm_in_type": "layer"}, SCHEDULERS["prior"].config)
    with pytest.raises(ValueError, match="clip_sample_range is 1.0"):
        prior_from_diffusers(theirs.state_dict(), theirs.config, SCHEDULERS["super_res"].config)
