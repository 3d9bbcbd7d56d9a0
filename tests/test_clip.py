"""CLIP: what may and may not change an embedding, and the loss against its definition."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minunclip.config import PRESETS, TINY
from minunclip.models.clip import CLIP, contrastive_loss, same_captions, zero_shot

CONFIG = replace(PRESETS["tiny"].clip, context_length=12)


@pytest.fixture(scope="module")
def model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(CONFIG).eval()


def captions(batch: int, lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens, the end token (1) last, padding (0) behind."""
    tokens = torch.randint(2, CONFIG.vocabulary_size, (batch, CONFIG.context_length), generator=torch.Generator().manual_seed(seed))
    position = torch.arange(CONFIG.context_length)
    length = torch.tensor(lengths)[:, None]
    return tokens.masked_fill(position == length - 1, 1).masked_fill(position >= length, 0), position < length


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, CONFIG.image_size, CONFIG.image_size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def unit(batch: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(batch, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_shapes_and_norms(model: CLIP) -> None:
    tokens, mask = captions(3, [12, 5, 1])
    z_i = model.encode_image(images(3))
    encoded, z_t = model.text_features(tokens, mask)
    assert z_i.shape == z_t.shape == (3, CONFIG.embedding_dim) and encoded.shape == (3, 12, CONFIG.text.width)
    torch.testing.assert_close(z_i.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(z_t.norm(dim=1), torch.ones(3))
    assert torch.equal(model.encode_text(tokens, mask), z_t)


def test_text_is_causal(model: CLIP) -> None:
    tokens, mask = captions(2, [12, 12])
    before, _ = model.text_features(tokens, mask)
    for j in (0, 5, 11):
        changed = tokens.clone()
        changed[:, j] = (tokens[:, j] + 7) % CONFIG.vocabulary_size
        after, _ = model.text_features(changed, mask)
        torch.testing.assert_close(after[:, :j], before[:, :j])
        assert ((after - before)[:, j:].abs().amax(dim=(0, 2)) > 1e-6).all()  # and each later token sees the change


def test_padding_never_changes_the_embedding(model: CLIP) -> None:
    tokens, mask = captions(3, [4, 7, 1])
    noise = torch.randint_like(tokens, CONFIG.vocabulary_size)
    z_t = model.encode_text(tokens, mask)
    torch.testing.assert_close(model.encode_text(torch.where(mask, tokens, noise), mask), z_t)
    torch.testing.assert_close(model.encode_text(tokens[:, :7], mask[:, :7]), z_t)  # nor does its amount


def test_every_token_up_to_the_end_changes_the_embedding(model: CLIP) -> None:
    tokens, mask = captions(1, [6])
    z_t = model.encode_text(tokens, mask)
    for j in range(6):
        changed = tokens.clone()
        changed[:, j] += 3
        assert (model.encode_text(changed, mask) - z_t).abs().max() > 1e-5


def test_embeddings_do_not_depend_on_the_rest_of_the_batch(model: CLIP) -> None:
    tokens, mask = captions(4, [3, 12, 8, 5])
    torch.testing.assert_close(torch.cat([model.encode_text(tokens[i : i + 1], mask[i : i + 1]) for i in range(4)]), model.encode_text(tokens, mask))
    x = images(4)
    torch.testing.assert_close(torch.cat([model.encode_image(one[None]) for one in x]), model.encode_image(x))


def test_patch_embedding_is_a_strided_convolution(model: CLIP) -> None:
    """The whole image tower up to the transformer, computed with a convolution."""
    x, side = images(2), CONFIG.patch_size
    seen: list[Tensor] = []
    hook = model.image_pre_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.encode_image(x)
    hook.remove()
    patches = F.conv2d(x, model.patch_embedding.weight.view(-1, 3, side, side), stride=side).flatten(2).transpose(1, 2)
    torch.testing.assert_close(seen[0][:, 1:], patches + model.image_positions[1:])
    torch.testing.assert_close(seen[0][:, 0], (model.class_token + model.image_positions[0]).expand(2, -1))


def test_shuffled_patches_change_the_embedding_only_through_the_positions() -> None:
    torch.manual_seed(1)
    model = CLIP(CONFIG).eval()
    x, side = images(2), CONFIG.patch_size
    rolled = x.roll((side, 2 * side), dims=(2, 3))  # moves whole patches
    assert (model.encode_image(rolled) - model.encode_image(x)).abs().max() > 1e-3
    with torch.no_grad():
        model.image_positions.zero_()
    torch.testing.assert_close(model.encode_image(rolled), model.encode_image(x))
    assert (model.encode_image(x.roll(1, dims=3)) - model.encode_image(x)).abs().max() > 1e-3  # within a patch order matters


def test_channels_last_is_the_same(model: CLIP) -> None:
    torch.testing.assert_close(model.encode_image(images(2).to(memory_format=torch.channels_last)), model.encode_image(images(2)))


def test_autocast_keeps_embeddings_float32_and_unit_norm(model: CLIP) -> None:
    tokens, mask = captions(3, [12, 5, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_i, z_t, loss = model.encode_image(images(3)), model.encode_text(tokens, mask), model(images(3), tokens, mask)
    for z, exact in ((z_i, model.encode_image(images(3))), (z_t, model.encode_text(tokens, mask))):
        assert z.dtype == torch.float32 and z.isfinite().all()
        torch.testing.assert_close(z.norm(dim=1), torch.ones(3))
        assert ((z * exact).sum(dim=1) > 0.999).all()
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_autocast_does_not_round_the_logits() -> None:
    z_i, z_t = unit(6, 0).float(), unit(6, 1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, probabilities = contrastive_loss(z_i, z_t, 100.0), zero_shot(z_i, z_t, 100.0)
    torch.testing.assert_close(loss, contrastive_loss(z_i.double(), z_t.double(), 100.0).float())
    torch.testing.assert_close(probabilities, zero_shot(z_i.double(), z_t.double(), 100.0).float())


@pytest.mark.parametrize("labels", [None, [0, 1, 2, 3, 4], [0, 1, 0, 2, 0], [5, 5, 5, 5, 5], [1, 2, 2, 1, 3]])
def test_loss_and_gradient_are_those_of_the_definition(labels: list[int] | None) -> None:
    """A double loop in float64; captions with the same label are equal."""
    same = None if labels is None else torch.tensor(labels)[:, None] == torch.tensor(labels)[None]
    ours = [unit(5, 0).requires_grad_(), unit(5, 1).requires_grad_(), torch.tensor(3.7, dtype=torch.float64, requires_grad=True)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    loss = contrastive_loss(*ours, same)

    z_i, z_t, scale = theirs
    label = labels or list(range(5))
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        equals = [j for j in range(5) if label[j] == label[i]]
        over_texts = sum((scale * z_i[i] @ z_t[j]).exp() for j in range(5))
        over_images = sum((scale * z_i[j] @ z_t[i]).exp() for j in range(5))
        for j in equals:
            expected = expected - ((scale * z_i[i] @ z_t[j]).exp() / over_texts).log() / len(equals) / 10
            expected = expected - ((scale * z_i[j] @ z_t[i]).exp() / over_images).log() / len(equals) / 10
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_loss_of_perfect_and_of_uninformative_embeddings() -> None:
    eye = torch.eye(4)
    assert contrastive_loss(eye, eye, 100.0) < 1e-6
    torch.testing.assert_close(contrastive_loss(eye[:1].expand(4, -1), eye[:1].expand(4, -1), 100.0), torch.tensor(math.log(4)))
    # all captions the same: nothing to tell apart, so the even answer is the best, at the entropy of the target
    torch.testing.assert_close(contrastive_loss(eye[:1].expand(4, -1), eye[:1].expand(4, -1), 9.0, torch.ones(4, 4).bool()), torch.tensor(math.log(4)))


def test_same_captions() -> None:
    tokens = torch.tensor([[5, 6, 1, 0], [5, 1, 0, 0], [5, 6, 1, 0], [6, 5, 1, 0]])
    assert same_captions(tokens).tolist() == [[i == j or {i, j} == {0, 2} for j in range(4)] for i in range(4)]


def test_forward_is_the_loss_with_equal_captions_known(model: CLIP) -> None:
    tokens, mask = captions(3, [12, 5, 5])
    tokens[2] = tokens[1]
    same = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 1]]).bool()
    expected = contrastive_loss(model.encode_image(images(3)), model.encode_text(tokens, mask), 1 / 0.07, same)
    torch.testing.assert_close(model(images(3), tokens, mask), expected)


def test_zero_shot_is_a_softmax_over_classes() -> None:
    z_i, classes = unit(4, 0), unit(3, 1)
    expected = [[math.exp(5 * float(z @ c)) for c in classes] for z in z_i]
    torch.testing.assert_close(zero_shot(z_i, classes, 5.0), torch.tensor([[e / sum(row) for e in row] for row in expected], dtype=torch.float64))


def test_temperature_starts_at_007_and_is_clamped_but_can_come_back() -> None:
    model = CLIP(CONFIG)
    assert math.isclose(model.scale().item(), 1 / 0.07, rel_tol=1e-6)
    with torch.no_grad():
        model.logit_scale.fill_(10.0)
    scale = model.scale()
    assert math.isclose(scale.item(), 100.0, rel_tol=1e-5)
    scale.backward()
    torch.optim.SGD([model.logit_scale], lr=0.01).step()
    assert model.scale().item() < 99


def test_every_parameter_learns_and_the_loss_falls() -> None:
    torch.manual_seed(2)
    model = CLIP(CONFIG)
    tokens, mask = captions(8, [12, 11, 10, 9, 8, 7, 6, 5])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = model(images(8), tokens, mask)
    first.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(images(8), tokens, mask)
        loss.backward()
        optimizer.step()
    assert loss < first / 4


def test_a_stem_of_convolutions_wants_a_power_of_two() -> None:
    for side in (1, 14):
        with pytest.raises(ValueError, match=f"patch_size {side} is no power of 2 above 1"):
            CLIP(replace(TINY.clip, image_size=56, patch_size=side, stem="convolutions"))


def test_initialisation_is_clips() -> None:
    torch.manual_seed(3)
    model = CLIP(PRESETS["cpu"].clip)
    width = 128
    for parameter, std in [
        (model.token_embedding.weight, 0.02),
        (model.text_positions, 0.01),
        (model.image_positions, width**-0.5),
        (model.image_projection.weight, width**-0.5),
        (model.text_projection.weight, width**-0.5),
    ]:
        assert math.isclose(parameter.std().item(), std, rel_tol=0.05) and abs(parameter.mean().item()) < 0.05 * std
    assert model.image_projection.bias is None and model.text_projection.bias is None and model.patch_embedding.bias is None


def test_bad_input_is_named(model: CLIP) -> None:
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 3, 32, 32\), got \(2, 3, 16, 16\)"):
        model.encode_image(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match="captions of 13 tokens"):
        model.encode_text(torch.ones(1, 13, dtype=torch.int64), torch.ones(1, 13, dtype=torch.bool))
    with pytest.raises(ValueError, match="not a multiple of patch_size"):
        CLIP(replace(CONFIG, patch_size=5))


@pytest.mark.parametrize(("stem", "reach"), [("patches", 0), ("convolutions", 8)])
def test_convolutions_see_across_the_borders_of_patches_and_plain_patches_do_not(stem: str, reach: int) -> None:
    torch.manual_seed(0)
    tower = CLIP(replace(CONFIG, stem=stem, image_size=64)).eval()
    for layer in tower.stem.modules():
        if isinstance(layer, torch.nn.GroupNorm):  # a norm over the whole picture lets everything see a little of everything
            layer.forward = lambda x: x  # type: ignore[method-assign]
    pixels = images(1).new_zeros(1, 3, 64, 64).requires_grad_()
    grid, side = tower.stem(pixels), tower.patch_side
    assert (grid.shape[2] // side) ** 2 + 1 == tower.image_positions.shape[0] == 65
    fourth = slice(3 * side, 4 * side)
    gradient = torch.autograd.grad(grid[:, :, fourth, fourth].sum(), pixels)[0].abs().sum(dim=(0, 1))
    seen = gradient.nonzero()
    assert (int(seen.min()), int(seen.max())) == (24 - min(reach, 7), 31) if reach else (24, 31)
