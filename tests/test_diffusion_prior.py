"""The diffusion prior: who sees whom, what may be dropped, and that it learns."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from minunclip.config import TINY, DiffusionConfig, DiffusionPriorConfig, TransformerConfig
from minunclip.data.tokenizer import Tokenizer
from minunclip.diffusion import make_schedule
from minunclip.models.clip import CLIP
from minunclip.models.decoder import Decoder
from minunclip.models.diffusion_prior import DiffusionPrior, LatentScale, TextCondition, prior_loss, sample_prior
from minunclip.pipeline import require_fit

DIM, TEXT_WIDTH, CONTEXT = 16, 12, 6
CONFIG = DiffusionPriorConfig(DIM, TEXT_WIDTH, CONTEXT, TransformerConfig(32, 2, 2), DiffusionConfig("cosine", "x0", False, "dpm", 6))
SCHEDULE = make_schedule("cosine")


@pytest.fixture
def model() -> DiffusionPrior:
    torch.manual_seed(0)
    return DiffusionPrior(CONFIG)


def captions(batch: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Random encoded text, masks of different lengths, and unit-norm z_t."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, CONTEXT, TEXT_WIDTH, generator=generator)
    mask = torch.arange(CONTEXT) < torch.tensor([2 + i % (CONTEXT - 1) for i in range(batch)])[:, None]
    return text, mask, F.normalize(torch.randn(batch, DIM, generator=generator), dim=-1)


def noised(batch: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, DIM, generator=torch.Generator().manual_seed(2)), torch.arange(batch) * 300


# ---- the latent scale ----


@given(st.integers(1, 2048), st.integers(0, 1000))
def test_scaled_embeddings_have_unit_rms_and_the_original_is_untouched(dim: int, seed: int):
    embedding = F.normalize(torch.randn(3, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)
    before, scale = embedding.clone(), LatentScale.for_dim(dim)
    latent = scale.scale(embedding)
    assert torch.allclose(latent.square().mean(dim=1), torch.ones(3), atol=1e-4)
    latent.add_(1)  # whoever writes into the result writes into a copy
    scale.unscale(embedding).add_(1)
    assert torch.equal(embedding, before)


def test_scale_round_trip_and_the_papers_factor():
    scale = LatentScale.for_dim(1024)
    assert 17.2 / scale.factor == pytest.approx(0.5375)
    embedding = torch.randn(2, 1024)
    assert torch.allclose(scale.unscale(scale.scale(embedding)), embedding)


def test_prior_and_decoder_must_share_the_scale():
    models = {"clip": CLIP(TINY.clip), "prior": DiffusionPrior(TINY.prior), "decoder": Decoder(TINY.decoder)}
    require_fit(Path("weights"), models, Tokenizer([]))
    assert models["prior"].latent_scale == LatentScale.for_dim(TINY.decoder.embedding_dim)
    for stage, name, other in (
        ("prior", "diffusion prior", DiffusionPrior(dataclasses.replace(TINY.prior, embedding_dim=48))),
        ("decoder", "decoder", Decoder(dataclasses.replace(TINY.decoder, embedding_dim=48))),
    ):
        with pytest.raises(ValueError, match=f"^weights: the {name} has embedding_dim 48, CLIP 32: "):
            require_fit(Path("weights"), {**models, stage: other}, Tokenizer([]))


# ---- who sees whom ----


def test_the_sequence_is_causal_in_the_papers_order(model: DiffusionPrior):
    """Text, z_t, timestep, noised z_i, final: a change in one reaches the hidden states from its place on, and none before."""
    text, mask, z_t = captions(1)
    mask = torch.ones_like(mask)
    x_t, timestep = noised(1)
    hidden: list[Tensor] = []
    model.transformer.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    changes = {
        3: (x_t, timestep, text + torch.eye(CONTEXT)[3][None, :, None], mask, z_t),
        CONTEXT: (x_t, timestep, text, mask, -z_t),
        CONTEXT + 1: (x_t, timestep + 100, text, mask, z_t),
        CONTEXT + 2: (x_t + 1, timestep, text, mask, z_t),
    }
    with torch.no_grad():
        model(x_t, timestep, text, mask, z_t)
        for place, inputs in changes.items():
            model(*inputs)
            changed = (hidden[-1] - hidden[0]).abs().amax(dim=(0, 2)) > 1e-6
            assert changed.tolist() == [i >= place for i in range(CONTEXT + 4)]


def test_padding_never_matters(model: DiffusionPrior):
    text, mask, z_t = captions()
    x_t, timestep = noised()
    expected = model(x_t, timestep, text, mask, z_t)
    assert torch.equal(model(x_t, timestep, torch.where(mask[..., None], text, 1e4), mask, z_t), expected)
    # nor does how much of it there is
    short = model(x_t[:1], timestep[:1], text[:1, :2], mask[:1, :2], z_t[:1])
    assert torch.allclose(short, expected[:1], atol=1e-5)
    changed = model(x_t, timestep, torch.where(mask[..., None], 2 * text, text), mask, z_t)
    assert (changed - expected).abs().amin() > 0  # while the words themselves matter


def test_a_dropped_caption_leaves_only_the_noised_latent_and_the_timestep(model: DiffusionPrior):
    text, mask, z_t = captions()
    x_t, timestep = noised()
    drop = torch.tensor([True, False, True])
    expected = model(x_t, timestep, text, mask, z_t, drop)
    other = model(x_t, timestep, -text, mask.roll(1, 0), -z_t, drop)
    assert torch.allclose(other[drop], expected[drop], atol=1e-6)
    assert not torch.allclose(other[~drop], expected[~drop], atol=1e-2)
    assert torch.allclose(expected[~drop], model(x_t, timestep, text, mask, z_t)[~drop], atol=1e-6)
    for changed in (model(-x_t, timestep, text, mask, z_t, drop), model(x_t, timestep + 50, text, mask, z_t, drop)):
        assert not torch.allclose(changed[drop], expected[drop], atol=1e-3)


def test_null_tokens_are_read_as_a_caption_of_that_many_tokens():
    torch.manual_seed(0)
    model = DiffusionPrior(dataclasses.replace(CONFIG, null_tokens=2))
    (text, mask, z_t), (x_t, timestep) = captions(), noised()
    condition = model.condition
    with torch.no_grad():  # the null tokens are set to what the first caption's two tokens and its z_t are projected to
        condition.null_text.copy_(condition.text(text[0, :2]))
        condition.null_embedding.copy_(condition.embedding(condition.latent_scale.scale(z_t[0])))
    first = [value[:1].expand(3, *value.shape[1:]) for value in (text, torch.arange(CONTEXT)[None] < 2, z_t)]
    assert torch.allclose(model(x_t, timestep, text, mask, z_t, torch.ones(3, dtype=torch.bool)), model(x_t, timestep, *first), atol=1e-6)


def test_a_standardised_latent_has_no_mean_and_unit_spread():
    embeddings = 3 + 2 * torch.randn(500, DIM, generator=torch.Generator().manual_seed(0))
    model = DiffusionPrior(dataclasses.replace(CONFIG, latent="standardised"))
    model.prepare_from(embeddings)
    latent = model.to_latent(embeddings)
    assert latent.mean(dim=0).abs().max() < 1e-5 and torch.allclose(latent.std(dim=0), torch.ones(DIM), atol=1e-5)
    assert torch.allclose(model.from_latent(latent), embeddings, atol=1e-5)


def test_an_empty_caption_is_finite(model: DiffusionPrior):
    text, mask, z_t = captions()
    assert torch.isfinite(model(*noised(), text, torch.zeros_like(mask), z_t)).all()


def test_too_long_a_text_is_refused():
    with pytest.raises(ValueError, match="7 tokens"):
        TextCondition(DIM, TEXT_WIDTH, CONTEXT, 8)(torch.zeros(1, 7, TEXT_WIDTH), torch.ones(1, 7, dtype=torch.bool), torch.zeros(1, DIM))


# ---- the loss ----


def test_loss_is_the_squared_error_of_the_scaled_embedding(model: DiffusionPrior):
    text, mask, z_t = captions()
    z_i = F.normalize(torch.randn(3, DIM), dim=-1)
    noise, timestep = torch.randn(3, DIM), torch.tensor([0, 500, 999])
    drop = torch.tensor([True, False, False])
    abar = SCHEDULE.alphas_bar[timestep][:, None]
    x_t = abar.sqrt() * 4 * z_i + (1 - abar).sqrt() * noise  # sqrt(16) = 4
    expected = (model(x_t, timestep, text, mask, z_t, drop) - 4 * z_i).square().mean(dim=1)
    assert torch.allclose(prior_loss(model, SCHEDULE, z_i, text, mask, z_t, timestep, noise, drop), expected, atol=1e-5)


def test_runs_in_bfloat16_and_every_parameter_is_trained(model: DiffusionPrior):
    text, mask, z_t = captions()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drop = torch.tensor([True, False, False])
        loss = prior_loss(model, SCHEDULE, z_t, text, mask, z_t, torch.tensor([5, 500, 900]), torch.randn(3, DIM), drop)
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ---- sampling ----


def test_the_best_candidate_is_kept(model: DiffusionPrior):
    text, mask, z_t = captions(4)
    best, candidates, scores = sample_prior(model, SCHEDULE, text, mask, z_t, seeds=[3, 4, 5, 6], candidates=3)
    assert candidates.shape == (4, 3, DIM) and scores.shape == (4, 3)
    assert torch.allclose(candidates.norm(dim=-1), torch.ones(4, 3), atol=1e-5)
    for i in range(4):
        dots = [float(candidate @ z_t[i]) for candidate in candidates[i]]
        assert len(set(dots)) == 3 and scores[i].tolist() == pytest.approx(dots, abs=1e-5)
        assert torch.equal(best[i], candidates[i][dots.index(max(dots))])


def test_x_0_of_a_latent_is_bounded_where_latents_end(model: DiffusionPrior, monkeypatch: pytest.MonkeyPatch):
    """Scaled latents have unit RMS: a bound of 1, as of pixels, would flatten them. 9 is cut to 5, 3 and -2 stay."""
    answer = torch.tensor([9.0, 3.0, -2.0] + [0.0] * (DIM - 3))
    monkeypatch.setattr(model, "forward", lambda noised, *_: answer.expand_as(noised))
    drawn = sample_prior(model, SCHEDULE, *captions(1), seeds=[0])[0][0]
    torch.testing.assert_close(drawn, torch.nn.functional.normalize(answer.clamp(-5, 5), dim=0))
    monkeypatch.setattr(model, "latent_scale", LatentScale(10 * DIM**0.5))  # latents ten times as large end ten times as far out
    drawn = sample_prior(model, SCHEDULE, *captions(1), seeds=[0])[0][0]
    torch.testing.assert_close(drawn, torch.nn.functional.normalize(answer, dim=0))


@pytest.mark.parametrize("sampler", ["ancestral", "dpm"])
def test_a_caption_gets_the_same_embedding_in_any_batch(model: DiffusionPrior, sampler):
    text, mask, z_t = captions(4)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)  # at its initial size the final token hardly looks at the noised embedding: all seeds would agree
    together = sample_prior(model, SCHEDULE, text, mask, z_t, [7, 8, 9, 7], guidance=2.0, sampler=sampler)[1]
    for i, seed in enumerate([7, 8, 9, 7]):
        alone = sample_prior(model, SCHEDULE, text[i : i + 1], mask[i : i + 1], z_t[i : i + 1], [seed], guidance=2.0, sampler=sampler)[1]
        assert torch.allclose(together[i], alone[0], atol=1e-4)
    other = sample_prior(model, SCHEDULE, text, mask, z_t, [1, 2, 3, 4], guidance=2.0, sampler=sampler)[1]
    assert not torch.allclose(together, other, atol=1e-2)


def test_guidance_1_skips_the_null_pass_and_more_guidance_changes_the_sample(model: DiffusionPrior):
    text, mask, z_t = captions()
    dropped: list[bool] = []
    model.condition.register_forward_hook(lambda module, inputs, output: dropped.append(inputs[3] is not None))
    plain = sample_prior(model, SCHEDULE, text, mask, z_t, [0, 1, 2], steps=2)[0]
    assert dropped == [False, False]
    guided = sample_prior(model, SCHEDULE, text, mask, z_t, [0, 1, 2], steps=2, guidance=3.0)[0]
    assert dropped[2:].count(True) == dropped[2:].count(False) == 2
    assert not torch.allclose(plain, guided, atol=1e-3)


def test_bad_input_is_refused(model: DiffusionPrior):
    text, mask, z_t = captions()
    with pytest.raises(ValueError, match="2 seeds for 3 captions"):
        sample_prior(model, SCHEDULE, text, mask, z_t, [0, 1])
    with pytest.raises(ValueError, match="at least one"):
        sample_prior(model, SCHEDULE, text, mask, z_t, [0, 1, 2], candidates=0)


def test_learns_four_captions_by_heart(model: DiffusionPrior):
    torch.manual_seed(0)
    text, mask, z_t = captions(4)
    z_i = F.normalize(torch.randn(4, DIM), dim=-1)
    repeated = [x.repeat(16, *[1] * (x.ndim - 1)) for x in (z_i, text, mask, z_t)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(120):
        loss = prior_loss(model, SCHEDULE, *repeated, torch.randint(1000, (64,)), torch.randn(64, DIM)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    best, _, _ = sample_prior(model, SCHEDULE, text, mask, z_t, [0, 1, 2, 3])
    assert (best * z_i).sum(dim=1).min() > 0.95
