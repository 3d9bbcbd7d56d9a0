"""The decoder: what it is told, what it must not see, and that it can learn."""

import dataclasses

import pytest
import torch
from einops import rearrange

from minunclip.config import PRESETS
from minunclip.diffusion import make_schedule, q_sample
from minunclip.models.clip import CLIP
from minunclip.models.decoder import Decoder, Whitener, decoder_denoiser, decoder_loss, sample_decoder

CONFIG = PRESETS["tiny"].decoder
LEARNED = dataclasses.replace(CONFIG, diffusion=dataclasses.replace(CONFIG.diffusion, learned_variance=True, sampler="ancestral"))
SCHEDULE = make_schedule("cosine")
LENGTHS = torch.tensor([3, 1, 7, 5])


@pytest.fixture
def model():
    return awake(CONFIG)


def awake(config) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config)
    for parameter in model.parameters():  # zero-initialised layers would hide everything
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "x_t": torch.randn(4, 3, 16, 16, generator=generator),
        "timestep": torch.tensor([0, 10, 500, 999]),
        "image_embedding": torch.randn(4, CONFIG.embedding_dim, generator=generator),
        "tokens": torch.randint(1, 500, (4, 8), generator=generator),
        "mask": torch.arange(8) < LENGTHS[:, None],
    }


def told(inputs):
    return inputs["image_embedding"], inputs["tokens"], inputs["mask"]


@pytest.mark.parametrize("config, channels", [(CONFIG, 3), (LEARNED, 6)])
def test_output_shape(config, channels, inputs):
    assert awake(config)(**inputs).shape == (4, channels, 16, 16)


def test_a_new_decoder_answers_zero(inputs):
    assert Decoder(CONFIG)(**inputs).abs().max() == 0


@torch.no_grad()
def test_the_embedding_is_four_tokens_in_order_after_the_caption(model, inputs):
    condition = model.encode_condition(*told(inputs))
    assert condition.context.shape == (4, 8 + 4, CONFIG.text.width) and condition.mask.shape == (4, 12)
    # token k is rows k C .. (k + 1) C of the projection
    width = CONFIG.text.width
    for k in range(4):
        rows = slice(k * width, (k + 1) * width)
        expected = inputs["image_embedding"] @ model.embedding_to_tokens.weight[rows].T + model.embedding_to_tokens.bias[rows]
        torch.testing.assert_close(condition.context[:, 8 + k], expected)
    assert torch.equal(condition.mask, torch.cat([inputs["mask"], torch.ones(4, 4, dtype=torch.bool)], dim=1))


@torch.no_grad()
def test_the_vector_is_the_embedding_and_the_end_tokens_output(model, inputs):
    condition = model.encode_condition(*told(inputs))
    for b, length in enumerate(LENGTHS):
        caption = condition.context[b, length - 1]
        expected = model.embedding_to_vector(inputs["image_embedding"][b]) + model.caption_to_vector(caption)
        torch.testing.assert_close(condition.vector[b], expected)


def test_whitened_every_direction_is_as_loud_as_any_other():
    torch.manual_seed(0)
    spread = torch.tensor([3.0, 1.0, 0.5, 0.3])
    embeddings = (torch.randn(20_000, 4) * spread) @ torch.linalg.qr(torch.randn(4, 4)).Q + 7
    whitener = Whitener(4)
    whitener.fit(embeddings)
    white = whitener(embeddings)
    assert white.mean(dim=0).abs().max() < 0.01
    # a direction of variance v ends with v / (v + 0.003 max v): nearly one for the loud, 0.77 for the quietest of these
    expected = spread**2 / (spread**2 + 0.003 * 9)
    torch.testing.assert_close(torch.linalg.eigvalsh(torch.cov(white.T)), expected.flip(0), rtol=0.05, atol=0)
    off_diagonal = torch.cov(white.T) - torch.diag(torch.cov(white.T).diagonal())
    assert off_diagonal.abs().max() < 0.01
    assert (white.abs() <= 3 * expected.sqrt().max() + 1e-5).all()
    whitener.fit(torch.ones(5, 4))  # nothing varies: finite all the same
    assert whitener(torch.ones(5, 4)).isfinite().all()


def test_what_lies_out_of_reach_is_brought_back_direction_by_direction():
    torch.manual_seed(0)
    embeddings = torch.randn(5000, 3) * torch.tensor([2.0, 1.0, 0.001])  # along the axes
    whitener = Whitener(3)
    assert torch.equal(whitener(embeddings), embeddings)  # before it is fitted
    whitener.fit(embeddings)
    inside = torch.tensor([[1.0, -1.0, 0.001]])
    torch.testing.assert_close(whitener(inside), (inside - whitener.mean) @ whitener.matrix)
    # a step of 0.5 along the axis that hardly varies is 500 deviations, and comes back as 3; the other two axes do not notice
    far = inside + torch.tensor([[0.0, 0.0, 0.5]])
    difference = (whitener(far) - whitener(inside)).abs()[0]
    assert (difference > 1e-4).sum() == 1 and difference.max() < 6 * 0.001 / 0.1


@torch.no_grad()
def test_the_text_transformer_starts_as_clips_and_stays_its_own(inputs):
    clip = CLIP(PRESETS["tiny"].clip).eval()
    model = Decoder(CONFIG).eval()
    model.prepare_from(clip, torch.randn(100, CONFIG.embedding_dim))
    encoded, _ = clip.text_features(inputs["tokens"], inputs["mask"])
    context = model.encode_condition(*told(inputs)).context[:, :8]
    torch.testing.assert_close(context[inputs["mask"]], encoded[inputs["mask"]])
    for parameter in model.parameters():
        parameter.zero_()
    torch.testing.assert_close(clip.text_features(inputs["tokens"], inputs["mask"])[0], encoded)


def test_a_text_transformer_of_another_size_cannot_start_from_clips():
    model = Decoder(dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, layers=1)))
    with pytest.raises(ValueError, match="sizes differ"):
        model.prepare_from(CLIP(PRESETS["tiny"].clip), torch.randn(100, CONFIG.embedding_dim))


def test_the_papers_decoder_takes_nothing_over(inputs):
    plain = dataclasses.replace(CONFIG, text_start="scratch", whiten=False)
    model = Decoder(plain)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.prepare_from(CLIP(PRESETS["tiny"].clip), torch.randn(100, CONFIG.embedding_dim))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not PRESETS["paper"].decoder.whiten and PRESETS["paper"].decoder.text_start == "scratch"


@torch.no_grad()
@pytest.mark.parametrize("start", ["scratch", "clip"])
def test_a_caption_reads_the_same_however_it_is_padded(start, inputs):
    model = awake(dataclasses.replace(CONFIG, text_start=start))
    longer = torch.nn.functional.pad(inputs["tokens"], (0, 5), value=9), torch.nn.functional.pad(inputs["mask"], (0, 5))
    vector = model.encode_condition(*told(inputs)).vector
    torch.testing.assert_close(model.encode_condition(inputs["image_embedding"], *longer).vector, vector)


@torch.no_grad()
def test_padding_never_matters_and_real_tokens_do(model, inputs):
    before = model(**inputs)
    padded = torch.where(inputs["mask"], inputs["tokens"], torch.full_like(inputs["tokens"], 77))
    torch.testing.assert_close(model(**{**inputs, "tokens": padded}), before, rtol=0, atol=0)
    shorter = {**inputs, "tokens": inputs["tokens"][:, :7], "mask": inputs["mask"][:, :7]}
    torch.testing.assert_close(model(**shorter), before, rtol=1e-4, atol=1e-4)
    first = inputs["tokens"].clone()
    first[:, 0] = (first[:, 0] + 1) % 500
    assert ((model(**{**inputs, "tokens": first}) - before).abs().amax(dim=(1, 2, 3)) > 1e-4).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["x_t", "timestep", "image_embedding", "tokens"])
def test_samples_do_not_mix(model, inputs, name):
    before = model(**inputs)
    changed = inputs[name].clone()
    changed[0] = changed[0] + 1
    after = model(**{**inputs, name: changed})
    torch.testing.assert_close(after[1:], before[1:], rtol=1e-4, atol=1e-4)
    assert (after[0] - before[0]).abs().max() > 1e-3


@torch.no_grad()
def test_dropping_drops_and_drops_only_where_asked(model, inputs):
    drop = torch.tensor([True, False, True, False])
    other_embedding, other_tokens = inputs["image_embedding"] + 5, (inputs["tokens"] + 1) % 500
    for flag, changed in [("drop_embedding", {"image_embedding": other_embedding}), ("drop_caption", {"tokens": other_tokens})]:
        before, after = model(**inputs, **{flag: drop}), model(**{**inputs, **changed}, **{flag: drop})
        torch.testing.assert_close(after[drop], before[drop], rtol=1e-4, atol=1e-4)
        assert ((after - before)[~drop].abs().amax(dim=(1, 2, 3)) > 1e-3).all()
        kept = model(**inputs)
        torch.testing.assert_close(before[~drop], kept[~drop], rtol=1e-4, atol=1e-4)
        assert ((before - kept)[drop].abs().amax(dim=(1, 2, 3)) > 1e-3).all()


@torch.no_grad()
def test_a_dropped_caption_may_show_null_tokens_and_only_then(inputs):
    model = awake(dataclasses.replace(CONFIG, null_tokens=2, context_width=24))
    drop = torch.tensor([True, False, False, True])
    condition = model.encode_condition(*told(inputs), drop_caption=drop)
    assert condition.context.shape == (4, 8 + 2 + 4, 24)
    torch.testing.assert_close(condition.context[:, 8:10], model.null_tokens.expand(4, 2, 24))
    shown = torch.stack([drop, drop], dim=1)
    assert torch.equal(condition.mask, torch.cat([inputs["mask"] & ~drop[:, None], shown, torch.ones(4, 4, dtype=torch.bool)], dim=1))
    kept = {name: value[~drop] for name, value in inputs.items()}
    torch.testing.assert_close(model(**inputs, drop_caption=drop)[~drop], model(**kept), atol=1e-5, rtol=1e-4)


def test_null_vectors_are_learned(model, inputs):
    drop = torch.ones(4, dtype=torch.bool)
    model(**inputs, drop_embedding=drop, drop_caption=drop).square().mean().backward()
    assert model.null_embedding.grad.abs().max() > 0 and model.null_caption.grad.abs().max() > 0
    assert not model.token_embedding.weight.grad.any()


def test_captions_too_long_are_refused(model):
    length = CONFIG.context_length + 1
    with pytest.raises(ValueError, match=f"captions of {length} tokens"):
        model.encode_condition(torch.zeros(1, CONFIG.embedding_dim), torch.ones(1, length, dtype=torch.long), torch.ones(1, length, dtype=torch.bool))


@torch.no_grad()
def test_loss_is_the_error_of_v(model, inputs):
    x_0, noise, t = inputs["x_t"].clamp(-1, 1), torch.randn(4, 3, 16, 16), inputs["timestep"]
    loss = decoder_loss(model, SCHEDULE, x_0, *told(inputs), t, noise)
    abar = SCHEDULE.alphas_bar[t][:, None, None, None]
    output = model(q_sample(SCHEDULE, x_0, t, noise), t, *told(inputs))
    torch.testing.assert_close(loss, (output - (abar.sqrt() * noise - (1 - abar).sqrt() * x_0)).square().mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("config", [CONFIG, LEARNED])
def test_guidance_is_two_passes_in_one(config, inputs):
    model, t, everyone = awake(config), torch.full((4,), 300), torch.ones(4, dtype=torch.bool)
    conditional = model(inputs["x_t"], t, *told(inputs))
    unconditional = model(inputs["x_t"], t, *told(inputs), drop_embedding=everyone, drop_caption=everyone)
    signal, noise = SCHEDULE.signal[300], SCHEDULE.noise[300]
    for scale in (1.0, 3.0):
        v = (unconditional + scale * (conditional - unconditional))[:, :3]
        expected = (signal * inputs["x_t"] - noise * v).clamp(-1, 1)
        prediction = decoder_denoiser(model, SCHEDULE, *told(inputs), guidance=scale)(inputs["x_t"], t)
        torch.testing.assert_close(prediction.x_0, expected, rtol=1e-3, atol=1e-3)
        if config is LEARNED:
            torch.testing.assert_close(prediction.variance_fraction, (conditional[:, 3:] + 1) / 2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("missing", ["caption", "embedding"])
def test_what_is_not_given_is_dropped(model, inputs, guidance, missing):
    """Whatever the placeholder says: only the other is told, and with guidance the second half is told nothing."""
    drop_embedding, drop_caption = (torch.full((4,), missing == name) for name in ("embedding", "caption"))
    everything = torch.ones(4, dtype=torch.bool)
    x_t, t = inputs["x_t"], inputs["timestep"]
    conditional = model(x_t, t, *told(inputs), drop_embedding, drop_caption)
    unconditional = model(x_t, t, *told(inputs), everything, everything)
    expected = unconditional + guidance * (conditional - unconditional)
    z_i, tokens, mask = told(inputs)
    given = (z_i, None, None) if missing == "caption" else (None, tokens, mask)
    silent = decoder_denoiser(model, SCHEDULE, *given, guidance)(x_t, t)
    signal, noise = (values[t][:, None, None, None].float() for values in (SCHEDULE.signal, SCHEDULE.noise))
    torch.testing.assert_close(silent.x_0, (signal * x_t - noise * expected).clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("guidance, rows", [(1.0, 4), (2.0, 8)])
def test_sampling_encodes_the_caption_once(model, inputs, guidance, rows):
    encoded, denoised = [], []
    model.text_transformer.register_forward_hook(lambda module, args, output: encoded.append(len(output)))
    model.unet.register_forward_hook(lambda module, args, output: denoised.append(len(output)))
    seen = []
    images = sample_decoder(model, SCHEDULE, *told(inputs), seeds=range(4), steps=3, guidance=guidance, on_step=lambda i, x_0: seen.append(i))
    assert images.shape == (4, 3, 16, 16) and images.abs().max() <= 1 + 1e-5
    assert encoded == [rows] and denoised == [rows] * 3 and seen == [0, 1, 2]


@pytest.mark.parametrize("sampler, eta", [("dpm", 0.0), ("ddim", 1.0), ("ancestral", 0.0)])
def test_an_image_depends_on_its_own_seed_alone(model, inputs, sampler, eta):
    def draw(rows, seeds):
        return sample_decoder(model, SCHEDULE, *(x[rows] for x in told(inputs)), seeds=seeds, steps=3, guidance=1.5, sampler=sampler, eta=eta)

    together, alone = draw(slice(0, 4), [7, 8, 9, 10]), draw(slice(2, 3), [9])
    torch.testing.assert_close(together[2:3], alone, rtol=1e-3, atol=1e-3)
    assert (draw(slice(2, 3), [11]) - alone).abs().max() > 0.05


def test_a_given_start_replaces_noise_and_seeds_must_fit(model, inputs):
    one, two = (sample_decoder(model, SCHEDULE, *told(inputs), seeds=seeds, steps=2, x_T=inputs["x_t"]) for seeds in (range(4), range(4, 8)))
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match="3 seeds for 4 images"):
        sample_decoder(model, SCHEDULE, *told(inputs), seeds=range(3))


def test_neither_embedding_nor_caption_is_refused(model):
    with pytest.raises(ValueError, match="nothing to draw"):
        sample_decoder(model, SCHEDULE, None, None, None, [1])


def test_a_caption_without_its_mask_is_refused(model, inputs):
    z_i, tokens, _ = told(inputs)
    with pytest.raises(ValueError, match="give both, or neither"):
        sample_decoder(model, SCHEDULE, z_i, tokens, None, range(4))


def test_bfloat16_training_step(inputs):
    model = Decoder(CONFIG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drops = {"drop_embedding": torch.tensor([1, 0, 0, 1]).bool(), "drop_caption": torch.tensor([1, 1, 0, 0]).bool()}
        loss = decoder_loss(model, SCHEDULE, inputs["x_t"].clamp(-1, 1), *told(inputs), inputs["timestep"], torch.randn(4, 3, 16, 16), **drops)
    loss.mean().backward()
    assert loss.dtype == torch.float32 and loss.isfinite().all()


def test_the_papers_decoder_has_its_size():
    with torch.device("meta"):
        model = Decoder(PRESETS["paper"].decoder)
    assert 3.4e9 < sum(p.numel() for p in model.parameters()) < 3.7e9  # Tab. 3: 3.5B


@pytest.mark.slow
def test_it_learns_two_images_by_heart():
    torch.manual_seed(0)
    model = Decoder(dataclasses.replace(CONFIG, diffusion=dataclasses.replace(CONFIG.diffusion, objective="x0")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images = torch.stack([torch.full((3, 16, 16), -0.5), torch.full((3, 16, 16), 0.5)])
    images[0, 0, :, 8:] = 0.9
    images[1, 2, 8:] = -0.9
    condition = torch.randn(2, CONFIG.embedding_dim), torch.tensor([[5, 1], [9, 1]]), torch.ones(2, 2, dtype=torch.bool)
    x_0, *repeated = (rearrange(x.expand(8, *x.shape), "n b ... -> (n b) ...") for x in (images, *condition))
    for _ in range(100):
        loss = decoder_loss(model, SCHEDULE, x_0, *repeated, torch.randint(0, 1000, (16,)), torch.randn_like(x_0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = sample_decoder(model.eval(), SCHEDULE, *condition, seeds=[0, 1], steps=10)
    assert (drawn - images).square().mean() < 0.05 < (drawn.flip(0) - images).square().mean() / 4
