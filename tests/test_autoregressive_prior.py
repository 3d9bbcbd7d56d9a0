"""The autoregressive prior: its codec against linear algebra, its transformer's causality, and that it samples what it learned."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from minunclip.config import AutoregressivePriorConfig, TransformerConfig
from minunclip.models.autoregressive_prior import (
    AutoregressivePrior,
    Quantiser,
    autoregressive_loss,
    draw,
    fit_pca,
    fit_quantiser,
    sample_autoregressive,
)

DIM, TEXT_WIDTH, CONTEXT, BUCKETS = 8, 12, 5, 32
CONFIG = AutoregressivePriorConfig(DIM, TEXT_WIDTH, CONTEXT, DIM, BUCKETS, TransformerConfig(32, 2, 2))


def embeddings(count: int, seed: int = 0) -> Tensor:
    """Unit-norm, off-centre, and far from isotropic."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, DIM, generator=generator) * torch.logspace(0, -2, DIM) + 0.2, dim=1)


@pytest.fixture
def model() -> AutoregressivePrior:
    torch.manual_seed(0)
    return AutoregressivePrior.fitted(CONFIG, embeddings(400), embeddings(400, seed=1))


def captions(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    mask = torch.arange(CONTEXT) < torch.tensor([2 + i % (CONTEXT - 1) for i in range(batch)])[:, None]
    return torch.randn(batch, CONTEXT, TEXT_WIDTH, generator=generator), mask, F.normalize(torch.randn(batch, DIM, generator=generator), dim=1)


def component_tokens(model: AutoregressivePrior, batch: int = 3) -> Tensor:
    return torch.randint(BUCKETS, (batch, model.config.components), generator=torch.Generator().manual_seed(6))


# ---- PCA ----


def test_pca_agrees_with_the_singular_value_decomposition():
    z = embeddings(300)
    pca = fit_pca(z, max_components=DIM, tolerance=1e-9)
    centred = z.double().numpy() - z.double().numpy().mean(axis=0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    k = len(pca.eigenvalues)
    np.testing.assert_allclose(pca.eigenvalues, singular[:k] ** 2 / len(z), rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(np.abs(np.sum(pca.components.double().numpy() * rows[:k], axis=1)), 1, atol=1e-4)  # up to sign
    assert (pca.eigenvalues.diff() <= 0).all()


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01, 0.001])
def test_pca_keeps_the_fewest_components_that_meet_the_error(tolerance: float):
    z = embeddings(300)
    pca = fit_pca(z, DIM, tolerance)
    variance = (z - z.mean(dim=0)).square().sum()
    errors = [float((z - pca.reconstruct(pca.project(z)[:, :n])).square().sum() / variance) for n in range(len(pca.eigenvalues) + 1)]
    assert errors[-1] < tolerance <= errors[-2]


def test_too_few_components_are_kept_with_a_warning_that_says_what_they_miss():
    z = embeddings(300)
    with pytest.warns(UserWarning, match=r"^2 components leave (\d+\.\d\d)% of the variance, more than 1\.00%: raise ") as seen:
        pca = fit_pca(z, 2)
    assert len(pca.eigenvalues) == 2 and len(seen) == 1
    left = (z - pca.reconstruct(pca.project(z))).square().sum() / (z - z.mean(dim=0)).square().sum()
    assert f"leave {left:.2%} of" in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_pca(z, DIM)
        fit_pca(z, DIM, tolerance=0.0)  # all there are


def test_pca_of_constant_embeddings_is_refused():
    with pytest.raises(ValueError, match="do not vary"):
        fit_pca(torch.ones(10, DIM), DIM)


# ---- the quantiser ----


@given(st.integers(2, 300), st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(-5, 5), st.floats(0.01, 10))
def test_quantising_errs_by_half_a_bucket_at_most(buckets: int, positions: list[float], low: float, span: float):
    quantiser = Quantiser(torch.tensor([low]), torch.tensor([low + span]), buckets)
    values = low + span * torch.tensor(positions)[:, None]
    tokens = quantiser.encode(values)
    assert tokens.dtype == torch.int64 and tokens.min() >= 0 and tokens.max() < buckets
    assert (quantiser.decode(tokens) - values).abs().max() <= span / buckets / 2 + 1e-5
    assert torch.equal(quantiser.encode(quantiser.decode(tokens)), tokens)


def test_each_component_has_its_own_range_and_outliers_are_clamped():
    values = torch.linspace(-1, 1, 5001)[:, None] * torch.tensor([1.0, 0.01])
    quantiser = fit_quantiser(values, 16)
    assert torch.allclose(quantiser.high, torch.tensor([0.998, 0.00998]), rtol=1e-3)
    counts = torch.bincount(quantiser.encode(values)[:, 1], minlength=16)
    assert counts.min() > 290 and counts.max() < 330  # 5001 / 16 = 313
    assert quantiser.encode(torch.tensor([[9.0, -9.0]])).tolist() == [[15, 0]]


def test_codec_round_trip_and_the_state_dict_carry_everything(model: AutoregressivePrior):
    z_i, z_t = embeddings(50, seed=3), embeddings(50, seed=4)
    tokens = model.encode(z_i, z_t)
    assert tokens.shape == (50, 1 + model.config.components) and model.config.components < DIM
    assert F.cosine_similarity(model.decode(tokens[:, 1:]), z_i).min() > 0.97
    assert torch.allclose(model.dot_quantiser.decode(tokens[:, :1])[:, 0], (z_i * z_t).sum(dim=1), atol=0.05)
    copy = AutoregressivePrior(model.config)
    copy.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(copy.encode(z_i, z_t), tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode(z_i, z_t), tokens)


# ---- the transformer ----


def test_logits_see_earlier_tokens_only(model: AutoregressivePrior):
    text, mask, z_t = captions()
    tokens = component_tokens(model)
    expected = model(text, mask, z_t, tokens)
    assert expected.shape == (3, model.config.components + 1, BUCKETS)
    for j in range(model.config.components):
        changed = tokens.clone()
        changed[:, j] = (changed[:, j] + 5) % BUCKETS
        difference = (model(text, mask, z_t, changed) - expected).abs().amax(dim=(0, 2))
        assert (difference > 1e-6).tolist() == [i > j for i in range(len(difference))]


def test_padding_never_matters_and_a_dropped_caption_neither(model: AutoregressivePrior):
    text, mask, z_t = captions()
    tokens = component_tokens(model)
    expected = model(text, mask, z_t, tokens)
    assert torch.equal(model(torch.where(mask[..., None], text, 1e4), mask, z_t, tokens), expected)
    drop = torch.tensor([True, False, True])
    dropped = model(text, mask, z_t, tokens, drop)
    other = model(-text, mask.roll(1, 0), -z_t, tokens, drop)
    assert torch.allclose(other[drop], dropped[drop], atol=1e-6)
    assert not torch.allclose(other[~drop], dropped[~drop], atol=1e-2)
    assert not torch.allclose(model(text, mask, z_t, (tokens + 9) % BUCKETS, drop)[drop], dropped[drop], atol=1e-2)


def test_loss_is_the_cross_entropy_of_every_token(model: AutoregressivePrior):
    text, mask, z_t = captions()
    z_i = embeddings(3, seed=7)
    tokens = model.encode(z_i, z_t)
    log_probabilities = model(text, mask, z_t, tokens[:, :-1]).log_softmax(dim=-1).detach()
    picked = torch.tensor([[float(log_probabilities[b, n, tokens[b, n]]) for n in range(tokens.shape[1])] for b in range(3)])
    assert torch.allclose(autoregressive_loss(model, z_i, text, mask, z_t).detach(), -picked.mean(dim=1), atol=1e-5)


def test_runs_in_bfloat16_and_every_parameter_is_trained(model: AutoregressivePrior):
    text, mask, z_t = captions()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = autoregressive_loss(model, embeddings(3, seed=7), text, mask, z_t, torch.tensor([True, False, False]))
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ---- sampling ----


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20).filter(lambda p: sum(p) > 0.1), st.floats(0, 1, exclude_max=True))
def test_top_half_is_never_below_the_median_and_no_impossible_bucket_is_drawn(weights: list[float], number: float):
    probabilities = torch.tensor([weights], dtype=torch.float64)
    probabilities = probabilities / probabilities.sum()
    anywhere, top = (int(draw(probabilities, torch.tensor([u], dtype=torch.float64))) for u in (number, 0.5 + number / 2))
    assert probabilities[0, anywhere] > 0 and probabilities[0, top] > 0
    assert probabilities[0, : top + 1].sum() >= 0.5 - 1e-9
    assert top >= anywhere


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3]).expand(10_000, 4)
    uniform = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    frequency = torch.bincount(draw(probabilities, uniform), minlength=4) / 10_000
    assert torch.allclose(frequency, probabilities[0], atol=0.02)
    # the top half of the mass: 0.2 of bucket 2 and all of bucket 3, made to sum to one
    frequency = torch.bincount(draw(probabilities, 0.5 + uniform / 2), minlength=4) / 10_000
    assert torch.allclose(frequency, torch.tensor([0, 0, 0.4, 0.6]), atol=0.02)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_cached_sampling_agrees_with_sampling_from_the_whole_sequence(model: AutoregressivePrior, guidance: float):
    text, mask, z_t = captions()
    seeds, temperature = [11, 12, 13], 0.8
    cached = sample_autoregressive(model, text, mask, z_t, seeds, guidance, temperature)

    # the reference: no cache, the null pass on its own, every step from the start
    uniform = torch.stack([torch.rand(model.config.components + 1, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    tokens = torch.zeros(3, 0, dtype=torch.int64)
    with torch.no_grad():
        for i in range(model.config.components + 1):
            conditional = model(text, mask, z_t, tokens)[:, -1]
            null = model(text, mask, z_t, tokens, torch.ones(3, dtype=torch.bool))[:, -1]
            logits = conditional if i == 0 else (null + guidance * (conditional - null)) / temperature
            token = draw(logits.softmax(dim=-1), 0.5 + uniform[:, 0] / 2 if i == 0 else uniform[:, i])
            tokens = torch.cat([tokens, token[:, None]], dim=1)
    assert torch.allclose(cached, model.decode(tokens[:, 1:]), atol=1e-6)
    assert torch.allclose(cached.norm(dim=1), torch.ones(3), atol=1e-5)


def test_cached_logits_equal_uncached_logits(model: AutoregressivePrior):
    text, mask, z_t = captions()
    tokens = component_tokens(model)
    expected = model(text, mask, z_t, tokens)
    x, visible = model.condition(text, mask, z_t)
    cache: list = []
    for i in range(tokens.shape[1] + 1):
        key_mask = F.pad(visible, (0, i), value=True)
        logits = model.to_buckets(model.norm(model.transformer(x, causal=True, key_mask=key_mask, cache=cache)[:, -1]))
        assert torch.allclose(logits, expected[:, i], atol=1e-5)
        x = model.embed(tokens[:, i : i + 1], start=i)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_caption_gets_the_same_embedding_in_any_batch(model: AutoregressivePrior, guidance: float):
    text, mask, z_t = captions()
    together = sample_autoregressive(model, text, mask, z_t, [7, 8, 7], guidance)
    alone = [sample_autoregressive(model, text[i : i + 1], mask[i : i + 1], z_t[i : i + 1], [seed], guidance) for i, seed in enumerate([7, 8, 7])]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    assert not torch.allclose(together, sample_autoregressive(model, text, mask, z_t, [1, 2, 3], guidance), atol=1e-2)


def test_bad_input_is_refused(model: AutoregressivePrior):
    with pytest.raises(ValueError, match="2 seeds for 3 captions"):
        sample_autoregressive(model, *captions(), seeds=[0, 1])
    with pytest.raises(ValueError, match="temperature"):
        sample_autoregressive(model, *captions(), seeds=[0, 1, 2], temperature=0.0)


def test_learns_four_captions_by_heart(model: AutoregressivePrior):
    text, mask, z_t = captions(4)
    z_i = embeddings(4, seed=9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = autoregressive_loss(model, z_i, text, mask, z_t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(BUCKETS), rel=0.2)  # it starts at chance
    assert losses[-1] < 0.1
    sampled = sample_autoregressive(model, text, mask, z_t, [0, 1, 2, 3])
    assert F.cosine_similarity(sampled, z_i).min() > 0.95
