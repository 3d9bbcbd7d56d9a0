"""diffusers' unCLIP and this package's: each module's answer, and the whole pipeline both ways, on small random models."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from minunclip.interop.karlo import prior_from_diffusers

diffusers = pytest.importorskip("diffusers")

DIM, CONTEXT = 32, 11  # of embeddings and of the text tower; tokens


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same model in float64, with every parameter random: some start at zero or one."""
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
