"""The shared transformer against torch's own modules with the same weights, and its cache against the full pass."""

import math

import pytest
import torch
from torch import Tensor, nn

from minunclip.config import TransformerConfig
from minunclip.models.transformer import Attention, Block, Cache, Transformer, timestep_embedding

WIDTH, HEADS = 24, 3


def inputs(tokens: int = 6, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(0))


def copy_attention(ours: Attention, theirs: nn.MultiheadAttention) -> None:
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)  # biases too, which start at zero
        theirs.in_proj_weight.copy_(ours.to_qkv.weight)
        theirs.in_proj_bias.copy_(ours.to_qkv.bias)
        theirs.out_proj.weight.copy_(ours.to_out.weight)
        theirs.out_proj.bias.copy_(ours.to_out.bias)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_torch(causal: bool, masked: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(WIDTH, HEADS), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    copy_attention(ours, theirs)
    x = inputs()
    key_mask = torch.tensor([[True] * 6, [True, True, False, True, False, False]]) if masked else None
    future = torch.ones(6, 6).triu(1).bool() if causal else None
    expected, _ = theirs(x, x, x, key_padding_mask=None if key_mask is None else ~key_mask, attn_mask=future)
    torch.testing.assert_close(ours(x, causal, key_mask)[0], expected)


def test_block_equals_torch() -> None:
    torch.manual_seed(0)
    ours = Block(TransformerConfig(WIDTH, 1, HEADS))
    theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    copy_attention(ours.attention, theirs.self_attn)
    for a, b in ((ours.norm1, theirs.norm1), (ours.norm2, theirs.norm2), (ours.mlp[0], theirs.linear1), (ours.mlp[2], theirs.linear2)):
        nn.init.normal_(a.weight)
        nn.init.normal_(a.bias)
        b.load_state_dict(a.state_dict())
    x = inputs()
    torch.testing.assert_close(ours(x, causal=False)[0], theirs(x))
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    torch.testing.assert_close(ours(x, causal=True)[0], theirs(x, src_mask=causal, is_causal=True))


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(1)
    model = Transformer(TransformerConfig(WIDTH, 3, HEADS)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def test_causality(model: Transformer) -> None:
    x = inputs()
    before = model(x, causal=True)
    for j in range(6):
        changed = x.clone()
        changed[:, j] += 1.0
        changed[:, j, 0] -= 3.0  # a norm would hide the same shift of all channels
        after = model(changed, causal=True)
        torch.testing.assert_close(after[:, :j], before[:, :j])
        assert ((after - before)[:, j:].abs().amax(dim=(0, 2)) > 1e-5).all()


@pytest.mark.parametrize("causal", [False, True])
def test_masked_keys_never_change_what_is_seen(model: Transformer, causal: bool) -> None:
    x = inputs()
    key_mask = torch.tensor([[True, False, True, True, True, False], [True, True, True, False, False, False]])
    changed = torch.where(key_mask[..., None], x, torch.full_like(x, 50.0).cumsum(dim=-1))
    before, after = model(x, causal, key_mask), model(changed, causal, key_mask)
    torch.testing.assert_close(after[key_mask], before[key_mask])
    short = model(x[1:, :3], causal)  # masked keys are as good as absent
    torch.testing.assert_close(before[1:, :3], short)


def test_without_positions_and_causality_order_does_not_matter(model: Transformer) -> None:
    x, order = inputs(), torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(model(x[:, order], causal=False), model(x, causal=False)[:, order])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunks", [[1, 1, 1, 1, 1, 1], [3, 1, 1, 1], [2, 4], [6]])
def test_cache_equals_the_full_pass(model: Transformer, masked: bool, chunks: list[int]) -> None:
    x = inputs()
    key_mask = torch.tensor([[True] * 6, [True, True, False, False, True, True]]) if masked else None
    cache: Cache = []
    outputs, seen = [], 0
    for size in chunks:
        seen += size
        outputs.append(model(x[:, seen - size : seen], True, None if key_mask is None else key_mask[:, :seen], cache))
        assert len(cache) == 3 and cache[0][0].shape == (2, HEADS, seen, WIDTH // HEADS)
    torch.testing.assert_close(torch.cat(outputs, dim=1), model(x, True, key_mask))


def test_autocast_is_close_and_keeps_the_residual_stream_in_float32(model: Transformer) -> None:
    x = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x, causal=True)
    assert y.dtype == torch.float32
    exact = model(x, causal=True)
    assert (y - exact).norm() < 0.02 * exact.norm()


def test_residual_stream_keeps_its_size_at_any_depth() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 64)
    grown = [Transformer(TransformerConfig(64, layers, 4))(x, causal=True).std().item() for layers in (2, 24)]
    assert all(0.9 < std < 1.5 for std in grown)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 24 is not a multiple of heads 5"):
        Attention(24, 5)


def test_timestep_embedding_is_its_formula() -> None:
    timestep = torch.tensor([0, 1, 17, 999])
    embedding = timestep_embedding(timestep, 8)
    for row, t in zip(embedding.tolist(), timestep.tolist(), strict=True):
        frequencies = [10_000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(t * f) for f in frequencies] + [math.sin(t * f) for f in frequencies]
        assert row == pytest.approx(expected, abs=2e-4)  # float32 angles of about 1,000


def test_timestep_embedding_tells_all_steps_apart() -> None:
    embedding = timestep_embedding(torch.arange(1000), 32)
    distance = torch.cdist(embedding, embedding) + 10 * torch.eye(1000)
    assert distance.min() > 0.1
    assert timestep_embedding(torch.arange(3).to(torch.bfloat16), 32).dtype == torch.float32
