import math

import pytest
import torch
from torch.nn import functional as F

from minunclip.baselines.dalle import DALLE, DiscreteVAE, dalle_loss, sample_dalle, vae_loss
from minunclip.config import DALLEConfig, DiscreteVAEConfig, TransformerConfig

VAE = DiscreteVAEConfig(image_size=16, codes=12, grid=4, width=16)
CONFIG = DALLEConfig(VAE, vocabulary_size=20, context_length=8, transformer=TransformerConfig(16, 2, 2))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def captions():
    tokens = torch.randint(2, 20, (3, 6))
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    return tokens * mask, mask


def test_codes_are_drawn_where_they_stand():
    vae = DiscreteVAE(VAE).eval()
    codes = torch.randint(12, (2, 16))
    changed = codes.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 12
    difference = (vae.decode(codes) - vae.decode(changed)).abs().sum(dim=(0, 1))
    assert difference[:4, :4].mean() > 10 * difference[-4:, -4:].mean()
    assert vae.encode(torch.rand(2, 3, 16, 16)).shape == (2, 16)
    with pytest.raises(ValueError, match="multiple"):
        DiscreteVAE(DiscreteVAEConfig(16, 12, 5, 16))


def test_kl_is_zero_for_uniform_codes_and_log_k_for_sure_ones():
    vae = DiscreteVAE(VAE)
    torch.nn.init.zeros_(vae.encoder[-1].weight)
    images = torch.zeros(2, 3, 16, 16)
    for bias, expected in ((torch.zeros(12), 0.0), (100 * F.one_hot(torch.tensor(3), 12).float(), math.log(12))):
        vae.encoder[-1].bias.data = bias
        torch.manual_seed(1)
        with_kl = vae_loss(vae, images, 1.0, 1.0)
        torch.manual_seed(1)
        torch.testing.assert_close(with_kl - vae_loss(vae, images, 1.0, 0.0), torch.full((2,), expected), atol=1e-4, rtol=0)


def test_loss_is_that_of_a_loop_and_hides_padding():
    model, (tokens, mask), codes = DALLE(CONFIG).eval(), captions(), torch.randint(12, (3, 16))
    text, picture = model(tokens, mask, codes)
    for b in range(3):
        n = int(mask[b].sum())
        of_text = [-text[b, i].log_softmax(0)[tokens[b, i + 1]] for i in range(n - 1)]
        of_picture = [-picture[b, i].log_softmax(0)[codes[b, i]] for i in range(16)]
        expected = sum(of_text) / len(of_text) / 8 + 7 / 8 * sum(of_picture) / 16
        torch.testing.assert_close(dalle_loss(model, tokens, mask, codes)[b], expected)
    garbage = torch.where(mask, tokens, 7)
    torch.testing.assert_close(dalle_loss(model, garbage, mask, codes), dalle_loss(model, tokens, mask, codes))


def test_a_code_is_predicted_from_those_before_it_alone():
    model, (tokens, mask), codes = DALLE(CONFIG).eval(), captions(), torch.randint(12, (3, 16))
    changed = codes.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 12
    _, one = model(tokens, mask, codes)
    _, other = model(tokens, mask, changed)
    assert torch.equal(one[:, :6], other[:, :6]) and not torch.allclose(one[:, 6], other[:, 6])


def test_sampling_with_a_cache_draws_what_the_whole_sequence_would():
    model, vae, (tokens, mask) = DALLE(CONFIG).eval(), DiscreteVAE(VAE).eval(), captions()
    seeds = [4, 5, 6]
    drawn = sample_dalle(model, vae, tokens, mask, seeds)
    uniform = torch.stack([torch.rand(16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    codes = torch.zeros(3, 16, dtype=torch.int64)
    for i in range(16):
        _, picture = model(tokens, mask, codes)
        cumulative = picture[:, i].double().softmax(dim=1).cumsum(dim=1)
        codes[:, i] = (cumulative < uniform[:, i : i + 1].double()).sum(dim=1)
    torch.testing.assert_close(drawn, vae.decode(codes).clamp(-1, 1))
    alone = sample_dalle(model, vae, tokens[1:2], mask[1:2], [5])
    torch.testing.assert_close(alone, drawn[1:2])
    with pytest.raises(ValueError, match="one seed"):
        sample_dalle(model, vae, tokens, mask, [1])
    with pytest.raises(ValueError, match="temperature"):
        sample_dalle(model, vae, tokens, mask, seeds, temperature=0)


@pytest.mark.slow
def test_it_learns_two_captions_by_heart():
    images = torch.stack([torch.full((3, 16, 16), -0.8), torch.full((3, 16, 16), 0.8)])
    images[0, 0, :8] = 0.8
    vae, model = DiscreteVAE(VAE), DALLE(CONFIG)
    optimizer = torch.optim.AdamW([*vae.parameters(), *model.parameters()], lr=4e-3)
    tokens, mask = torch.tensor([[2, 1], [3, 1]]), torch.ones(2, 2, dtype=torch.bool)
    for step in range(300):
        loss = vae_loss(vae, images, max(1 / 16, 1 - step / 200), 1e-3).mean()
        if step >= 200:
            loss = loss + dalle_loss(model, tokens, mask, vae.encode(images)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = sample_dalle(model.eval(), vae.eval(), tokens, mask, [0, 1], temperature=0.1)
    assert (drawn - images).abs().mean() < 0.15
