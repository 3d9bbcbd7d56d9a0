"""The U-Net against loops and its own definition: shapes, attention, masks, zero start."""

import math
from dataclasses import replace

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from minunclip.config import UNetConfig
from minunclip.models.transformer import attend
from minunclip.models.unet import ContextAttention, Refinement, ResidualBlock, TimestepMLP, UNet, group_norm, resample

PLAIN = UNetConfig(16, (1, 2), 1, (), 16, patch_size=2)
ATTENTIVE = UNetConfig(16, (1, 2), 1, (4,), 16, patch_size=2)


def awake(module: torch.nn.Module) -> torch.nn.Module:
    """Zero-initialised layers hide everything behind them: give every parameter a value."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (4, 4)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_net_without_attention_takes_any_size_that_it_can_halve(size, blocks):
    net = awake(UNet(UNetConfig(16, (1, 2), blocks, (), 16, patch_size=2), None, 3, 6, 32))
    assert net(torch.randn(2, 3, *size), torch.randn(2, 32)).shape == (2, 6, *size)


def test_a_shifted_image_gives_a_shifted_output():
    """By one cell of the coarsest grid, and as far from the borders as the convolutions see."""
    net = awake(UNet(UNetConfig(8, (1, 2), 1, (), 16), None, 3, 3, 32)).double()
    for norm in [m for m in net.modules() if isinstance(m, torch.nn.GroupNorm)]:
        norm.forward = lambda x: x  # statistics of the whole image are the one thing that is not local
    x, embedding = torch.randn(1, 3, 96, 96).double(), torch.randn(1, 32).double()
    a, b = net(x, embedding), net(x.roll((2, 2), (2, 3)), embedding)
    torch.testing.assert_close(a.roll((2, 2), (2, 3))[..., 44:52, 44:52], b[..., 44:52, 44:52])


@pytest.mark.parametrize("size", [(6, 8), (8, 10)])
def test_sizes_that_cannot_be_halved_are_refused(size):
    with pytest.raises(ValueError, match="multiples of 4"):
        UNet(PLAIN, None, 3, 3, 32)(torch.randn(1, 3, *size), torch.randn(1, 32))


def test_configurations_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="image_size 18"):
        UNet(PLAIN, 18, 3, 3, 32)
    with pytest.raises(ValueError, match="attention_at"):
        UNet(ATTENTIVE, 64, 3, 3, 32)
    with pytest.raises(ValueError, match="attention_at"):
        UNet(ATTENTIVE, None, 3, 3, 32)
    with pytest.raises(ValueError, match="head_channels"):
        UNet(UNetConfig(16, (1, 2), 1, (4,), 24, patch_size=2), 16, 3, 3, 32)


def test_blocks_and_attention_stand_where_adm_has_them():
    net = UNet(UNetConfig(16, (1, 2, 2), 2, (8,), 16), 32, 3, 3, 32)
    # down: 2 blocks a level and 2 that halve; up: 3 a level and 2 that double; middle: 2
    assert (len(net.down), len(net.up), len(net.middle)) == (3 * 2 + 2, 3 * 3 + 2, 2)
    assert [s.block.direction for s in net.down] == [None, None, "down", None, None, "down", None, None]
    assert [s.block.direction for s in net.up] == [None, None, None, "up", None, None, None, "up", None, None, None]
    assert [s.attention is not None for s in net.down] == [False] * 6 + [True] * 2
    assert [s.attention is not None for s in net.up] == [True] * 3 + [False] * 8
    assert [s.attention is not None for s in net.middle] == [True, False]


@pytest.mark.parametrize("direction, size", [(None, 8), ("down", 4), ("up", 16)])
def test_resampling_inside_the_block(direction, size):
    block = ResidualBlock(16, 16, 32, 0.0, direction)
    x = torch.randn(2, 16, 8, 8)
    assert block(x, torch.randn(2, 32)).shape == (2, 16, size, size)
    # conv2 starts at zero: the block starts as its skip
    torch.testing.assert_close(block(x, torch.randn(2, 32)), resample(x, direction))
    torch.testing.assert_close(resample(resample(x, "up"), "down"), x)


def test_scale_and_shift_are_those_of_the_embedding():
    block = awake(ResidualBlock(16, 24, 32, 0.0))
    x, embedding = torch.randn(3, 16, 8, 8), torch.randn(3, 32)
    scale, shift = block.to_scale_shift(embedding)[:, :24, None, None], block.to_scale_shift(embedding)[:, 24:, None, None]
    h = block.norm2(block.conv1(F.silu(block.norm1(x)))) * (1 + scale) + shift
    torch.testing.assert_close(block(x, embedding), block.skip(x) + block.conv2(F.silu(h)))


def test_the_timestep_may_be_added_before_the_second_norm():
    block = awake(ResidualBlock(16, 24, 32, 0.0, timestep="add"))
    x, embedding = torch.randn(3, 16, 8, 8), torch.randn(3, 32)
    h = block.norm2(block.conv1(F.silu(block.norm1(x))) + block.to_shift(embedding)[:, :, None, None])
    torch.testing.assert_close(block(x, embedding), block.skip(x) + block.conv2(F.silu(h)))


@pytest.mark.parametrize("channels, groups", [(8, 1), (16, 2), (48, 6), (96, 12), (288, 32), (320, 32), (1536, 32)])
def test_group_count(channels, groups):
    assert group_norm(channels).num_groups == groups


def attention_by_loops(layer: ContextAttention, x, context, mask):
    batch, channels, height, width = x.shape
    dim = channels // layer.heads
    out = torch.zeros(batch, height * width, channels)
    for b in range(batch):
        own = layer.to_qkv(layer.norm(x)[b].reshape(channels, -1).T)
        other = layer.context_to_kv(context[b])
        for head in range(layer.heads):
            part = slice(head * dim, (head + 1) * dim)
            q, k, v = (own[:, i * channels : (i + 1) * channels][:, part] for i in range(3))
            visible = [(other[j, :channels][part], other[j, channels:][part]) for j in range(len(other)) if mask[b, j]]
            visible += list(zip(k, v))
            for i in range(len(q)):
                weights = torch.tensor([math.exp(float(q[i] @ key) / math.sqrt(dim)) for key, _ in visible])
                out[b, i, part] = sum(w * value for w, (_, value) in zip(weights / weights.sum(), visible))
    return x + rearrange(layer.to_out(out), "b (h w) c -> b c h w", h=height)


@torch.no_grad()
def test_attention_with_context_against_loops():
    layer = awake(ContextAttention(16, 8, 12))
    x, context, mask = torch.randn(2, 16, 3, 2), torch.randn(2, 4, 12), torch.tensor([[1, 1, 0, 1], [0, 0, 0, 1]]).bool()
    torch.testing.assert_close(layer(x, context, mask), attention_by_loops(layer, x, context, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_both_ways_to_attend_agree(causal):
    q, k, v = torch.randn(3, 2, 4, 10, 8).bfloat16()
    mask = None if causal else torch.rand(2, 1, 1, 10) > 0.3
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal)
    torch.testing.assert_close(attend(q, k, v, mask, causal).float(), expected, rtol=0.05, atol=0.03)  # bfloat16 by hand
    torch.testing.assert_close(attend(q.float(), k.float(), v.float(), mask, causal), expected)  # float32 by the fused kernel


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_what_the_mask_hides_never_matters(precision):
    net = awake(UNet(ATTENTIVE, 16, 3, 3, 32, context_width=12))
    x, embedding, context = torch.randn(2, 3, 16, 16), torch.randn(2, 32), torch.randn(2, 5, 12)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1]]).bool()
    changed = torch.where(mask[..., None], context, 100 * torch.randn_like(context))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        torch.testing.assert_close(net(x, embedding, context, mask), net(x, embedding, changed, mask), rtol=0, atol=0)
        assert not torch.equal(net(x, embedding, context, mask), net(x, embedding, changed))  # without the mask it would


@torch.no_grad()
def test_samples_do_not_mix():
    net = awake(UNet(ATTENTIVE, 16, 3, 3, 32, context_width=12))
    inputs = [torch.randn(4, 3, 16, 16), torch.randn(4, 32), torch.randn(4, 5, 12)]
    before = net(*inputs)
    for i, x in enumerate(inputs):
        other = [y.clone() for y in inputs]
        other[i][0] = torch.randn_like(x[0])
        after = net(*other)
        torch.testing.assert_close(after[1:], before[1:], rtol=1e-4, atol=1e-4)
        assert (after[0] - before[0]).abs().max() > 0.01


def test_a_new_net_answers_zero_and_still_learns():
    net = UNet(ATTENTIVE, 16, 3, 3, 32, context_width=12)
    out = net(torch.randn(2, 3, 16, 16), torch.randn(2, 32), torch.randn(2, 5, 12))
    assert out.abs().max() == 0
    (out - 1).square().mean().backward()
    assert net.conv_out.weight.grad.abs().max() > 0


def test_patches_unfold_to_where_they_were_folded():
    net = UNet(UNetConfig(16, (1,), 1, (), 16, patch_size=2), None, 3, 3, 32)
    seen = []
    net.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 3, 8, 8)
    net(x, torch.randn(2, 32))
    torch.testing.assert_close(seen[0], F.pixel_unshuffle(x, 2))
    net.conv_out.register_forward_hook(lambda module, inputs, output: F.pixel_unshuffle(x, 2))
    torch.testing.assert_close(net(x, torch.randn(2, 32)), x)


def test_refinement_adds_nothing_at_first_and_then_what_it_has_learned():
    """So that a net without it can be trained further with it."""
    plain = awake(UNet(ATTENTIVE, 16, 3, 6, 32, context_width=12))
    fine = UNet(replace(ATTENTIVE, fine=8), 16, 3, 6, 32, context_width=12)
    missing = fine.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(name.startswith("refinement.") for name in missing)
    inputs = torch.randn(2, 3, 16, 16), torch.randn(2, 32), torch.randn(2, 5, 12)
    torch.testing.assert_close(fine(*inputs), plain(*inputs), rtol=0, atol=0)
    fine(*inputs).square().mean().backward()
    assert fine.refinement.conv_out.weight.grad.abs().max() > 0
    awake(fine.refinement)
    assert (fine(*inputs) - plain(*inputs)).abs().max() > 0.01


def test_refinement_knows_no_patches():
    """Shifted by a single pixel, what it is shown gives what it adds, shifted by a pixel."""
    fine = awake(Refinement(3, 8, 3, 2, 32, "scale_shift")).double()
    for norm in [m for m in fine.modules() if isinstance(m, torch.nn.GroupNorm)]:
        norm.forward = lambda x: x  # statistics of the whole image are the one thing that is not local
    x, drawn, embedding = torch.randn(1, 3, 24, 24).double(), torch.randn(1, 3, 24, 24).double(), torch.randn(1, 32).double()
    a, b = fine(x, drawn, embedding), fine(x.roll((1, 1), (2, 3)), drawn.roll((1, 1), (2, 3)), embedding)
    torch.testing.assert_close(a.roll((1, 1), (2, 3))[..., 10:14, 10:14], b[..., 10:14, 10:14])


@pytest.mark.parametrize("config", [ATTENTIVE, replace(ATTENTIVE, fine=8)])
def test_bfloat16_and_channels_last_all_the_way(config):
    net = awake(UNet(config, 16, 3, 3, 32, context_width=12))
    layouts = []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, i, o: layouts.append((o.dtype, o.is_contiguous(memory_format=torch.channels_last))))
    inputs = torch.randn(2, 3, 16, 16), torch.randn(2, 32), torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool)
    exact = net(*inputs)
    layouts.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(*inputs)
    assert set(layouts) == {(torch.bfloat16, True)}
    assert out.dtype == torch.float32
    assert (out - exact).norm() < 0.1 * exact.norm()
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_timestep_mlp_tells_timesteps_apart():
    out = TimestepMLP(32)(torch.tensor([0, 1, 999]))
    assert out.shape == (3, 128) and torch.pdist(out).min() > 1e-3
