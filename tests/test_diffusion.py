"""Diffusion against published values, brute force in float64, and a Gaussian world whose perfect denoiser is a closed form."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minunclip import diffusion as D

COSINE, LINEAR = D.make_schedule("cosine"), D.make_schedule("linear")
MEAN, DEVIATION = 0.7, 0.4  # of the Gaussian world


def dead_end(steps=50):
    """A schedule that ends in pure noise: abar is exactly 0."""
    betas = torch.linspace(1e-3, 0.2, steps, dtype=torch.float64)
    betas[-1] = 1.0
    return D.schedule_from_betas(betas)


def perfect_network(schedule, objective):
    """For x_0 ~ N(mu, s^2): E[x_0 | x_t] = mu + s^2 sqrt(abar) (x_t - sqrt(abar) mu) / (abar s^2 + 1 - abar), in float64."""
    alphas_bar = torch.tensor(schedule.exact_alphas_bar, dtype=torch.float64)

    def network(x_t, timestep):
        abar = alphas_bar[timestep].view(-1, *[1] * (x_t.ndim - 1))
        x_0 = MEAN + DEVIATION**2 * abar.sqrt() * (x_t.double() - abar.sqrt() * MEAN) / (abar * DEVIATION**2 + 1 - abar)
        epsilon = (x_t.double() - abar.sqrt() * x_0) / (1 - abar).sqrt()
        return {"x0": x_0, "epsilon": epsilon, "v": abar.sqrt() * epsilon - (1 - abar).sqrt() * x_0}[objective].float()

    return network


def perfect(schedule, objective="v", clip=None):
    return D.make_denoiser(perfect_network(schedule, objective), schedule, objective, clip=clip)


def flow_end(schedule, x_T):
    """Exact end of the probability-flow ODE: it keeps the standard score of x_t."""
    abar = schedule.exact_alphas_bar[-1]
    return MEAN + DEVIATION * (x_T - math.sqrt(abar) * MEAN) / math.sqrt(abar * DEVIATION**2 + 1 - abar)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- schedules ----


def test_published_values():
    assert COSINE.betas[0].item() == pytest.approx(4.128e-5, rel=1e-3)
    assert COSINE.betas.max().item() == pytest.approx(0.999)
    assert COSINE.alphas_bar[999].item() == pytest.approx(2.43e-9, rel=2e-3)
    assert COSINE.posterior_log_variance[0].item() == pytest.approx(-10.73, abs=5e-3)
    assert LINEAR.betas[0].item() == pytest.approx(1e-4) and LINEAR.betas[999].item() == pytest.approx(2e-2)
    assert LINEAR.alphas_bar[999].item() == pytest.approx(4.04e-5, rel=2e-3)


@pytest.mark.parametrize("schedule", [COSINE, LINEAR, D.make_schedule("linear", 21), D.make_schedule("cosine", 2), dead_end()])
def test_tables_are_finite_and_monotone(schedule):
    for table in (value for value in vars(schedule).values() if isinstance(value, torch.Tensor)):
        assert table.dtype == torch.float32 and table.isfinite().all()
    assert (schedule.alphas_bar.diff() < 0).all()
    torch.testing.assert_close(schedule.signal**2 + schedule.noise**2, torch.ones(schedule.steps))


def test_noise_table_keeps_its_digits():  # sqrt(1 - abar) from a float32 abar would be off by a thousandth at t = 0
    assert COSINE.noise[0].item() ** 2 == pytest.approx(4.12843e-5, rel=1e-5)
    assert COSINE.noise[0].item() ** 2 == pytest.approx(COSINE.betas[0].item(), rel=1e-6)


@pytest.mark.parametrize(
    "name, steps, word", [("linear", 20, "beta"), ("linear", 5, "beta"), ("linear", 0, "beta"), ("sqrt", 1000, "sqrt"), ("cosine", 1, "2")]
)
def test_refused_schedules(name, steps, word):
    with pytest.raises(ValueError, match=word):
        D.make_schedule(name, steps)


def test_tables_move_to_a_device_once():
    meta = torch.device("meta")
    moved = COSINE.to(meta)
    assert moved.signal.device == meta and moved.steps == 1000 and COSINE.to(meta) is moved and COSINE.to(torch.device("cpu")) is COSINE
    x, timestep = torch.zeros(2, 3, device=meta), torch.zeros(2, dtype=torch.int64, device=meta)
    assert D.q_sample(COSINE, x, timestep, x).device == meta


# ---- q, its posterior, and the conversions ----


def test_q_sample_is_the_chain_of_single_steps():
    """x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) z, repeated: the mean and variance that q_sample reaches in one jump."""
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(LINEAR.betas.double().tolist()[:300]):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        if t in (0, 7, 299):
            one, zero, timestep = torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([t])
            assert D.q_sample(LINEAR, one, timestep, zero).item() == pytest.approx(mean, rel=1e-5)
            assert D.q_sample(LINEAR, zero, timestep, one).item() ** 2 == pytest.approx(variance, rel=1e-5)


@pytest.mark.parametrize("schedule", [COSINE, LINEAR], ids=["cosine", "linear"])
@pytest.mark.parametrize("t", [1, 2, 50, 500, 999])
def test_posterior_against_bayes_on_a_grid(schedule, t):
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): multiply them numerically."""
    x_0, x_t = 0.3, -0.4
    beta, previous = 1 - schedule.exact_alphas_bar[t] / schedule.exact_alphas_bar[t - 1], schedule.exact_alphas_bar[t - 1]
    mean, log_variance = D.posterior(schedule, torch.tensor([[x_0]]), torch.tensor([[x_t]]), torch.tensor([t]))
    spread = math.exp(0.5 * log_variance.item())
    x = torch.linspace(mean.item() - 9 * spread, mean.item() + 9 * spread, 20_001, dtype=torch.float64)
    log_density = -((x_t - math.sqrt(1 - beta) * x) ** 2) / (2 * beta) - (x - math.sqrt(previous) * x_0) ** 2 / (2 * (1 - previous))
    density = torch.softmax(log_density, dim=0)
    expected = (density * x).sum()
    assert mean.item() == pytest.approx(expected.item(), abs=2e-3 * spread + 1e-6)
    assert log_variance.item() == pytest.approx((density * (x - expected) ** 2).sum().log().item(), abs=1e-3)


def test_posterior_at_zero_is_x_0():
    x_0, x_t = gaussian(2, 3), gaussian(2, 3, seed=1)
    mean, log_variance = D.posterior(COSINE, x_0, x_t, torch.tensor([0, 0]))
    torch.testing.assert_close(mean, x_0)
    assert (log_variance == COSINE.posterior_log_variance[1]).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.sampled_from(["epsilon", "x0", "v"]), st.sampled_from([COSINE, LINEAR]), st.integers(0, 1000))
def test_round_trips(t, objective, schedule, seed):
    x_0, noise, timestep = gaussian(2, 3, 2, 2, seed=seed), gaussian(2, 3, 2, 2, seed=seed + 1), torch.tensor([t, 0])
    x_t = D.q_sample(schedule, x_0, timestep, noise)
    output = D.target_for(schedule, objective, x_0, timestep, noise)
    prediction = D.make_denoiser(lambda *_: output, schedule, objective, clip=None)(x_t, timestep)
    # dividing by sqrt(abar) or sqrt(1 - abar) magnifies float32 rounding, as it must
    signal, standard_deviation = schedule.signal[t].item(), schedule.noise[0].item()
    torch.testing.assert_close(prediction.x_0[:1], x_0[:1], atol=2e-6 / (signal if objective == "epsilon" else 1) + 1e-6, rtol=1e-5)
    torch.testing.assert_close(prediction.epsilon, noise, atol=2e-6 / standard_deviation, rtol=1e-5)


@pytest.mark.parametrize("objective", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_no_nan_without_signal(objective, clip):
    schedule = dead_end()
    assert schedule.exact_alphas_bar[-1] == 0
    denoiser = D.make_denoiser(lambda x, t: x * 0.9 + 0.1, schedule, objective, clip=clip)
    for sampler in ("ancestral", "ddim", "dpm"):
        for steps in (1, 2, 10):
            assert D.sample(denoiser, schedule, gaussian(2, 4), sampler, steps, eta=0.5).isfinite().all()
    assert D.invert_ddim(denoiser, schedule, gaussian(2, 4), 10).isfinite().all()
    timestep = torch.full((2,), schedule.steps - 1)
    assert D.training_loss(schedule, objective, False, lambda x, t: x, gaussian(2, 4), timestep, gaussian(2, 4)).isfinite().all()


def test_clipped_prediction_agrees_with_itself():
    x_t, timestep = 3 * gaussian(2, 3, 4, 4), torch.tensor([900, 300])
    prediction = D.make_denoiser(lambda x, t: torch.zeros_like(x), COSINE, "epsilon")(x_t, timestep)
    assert prediction.x_0.abs().max() == 1
    torch.testing.assert_close(D.q_sample(COSINE, prediction.x_0, timestep, prediction.epsilon), x_t)


def test_wrong_output_shape_and_objective():
    with pytest.raises(ValueError, match="learned_variance"):
        D.make_denoiser(lambda x, t: x, COSINE, "epsilon", learned_variance=True)(torch.zeros(1, 3, 2, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match="objective"):
        D.make_denoiser(lambda x, t: x, COSINE, "score")  # type: ignore[arg-type]


# ---- loss ----


@pytest.mark.parametrize("objective", ["epsilon", "x0", "v"])
def test_plain_loss_is_the_mse_of_what_is_predicted(objective):
    x_0, noise, timestep = gaussian(3, 5), gaussian(3, 5, seed=1), torch.tensor([0, 400, 999])
    abar = torch.tensor([COSINE.exact_alphas_bar[t] for t in timestep.tolist()]).view(3, 1)
    target = {"epsilon": noise, "x0": x_0, "v": abar.sqrt() * noise - (1 - abar).sqrt() * x_0}[objective]
    loss = D.training_loss(COSINE, objective, False, lambda x, t: torch.full_like(x, 0.25), x_0, timestep, noise)
    torch.testing.assert_close(loss, ((target - 0.25) ** 2).mean(dim=1))


def test_hybrid_loss_by_brute_force():
    """MSE + T / 1000 VLB, with torch.distributions for the KL and the decoder's likelihood, in float64."""
    schedule = D.make_schedule("cosine", 100)
    x_0 = (torch.randint(0, 256, (3, 3, 4, 4), generator=torch.Generator().manual_seed(0)) / 127.5 - 1).float()
    x_0[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])  # both open end bins
    noise, output, timestep = gaussian(3, 3, 4, 4), gaussian(3, 6, 4, 4, seed=2) * 0.5, torch.tensor([0, 1, 60])
    loss = D.training_loss(schedule, "epsilon", True, lambda x, t: output, x_0, timestep, noise)
    for i, t in enumerate(timestep.tolist()):
        epsilon, variance = output[i].double().chunk(2)
        x, z = x_0[i].double(), noise[i].double()
        abar, previous = schedule.exact_alphas_bar[t], schedule.exact_alphas_bar[t - 1] if t else 1.0
        beta = 1 - abar / previous
        x_t = math.sqrt(abar) * x + math.sqrt(1 - abar) * z
        predicted = (x_t - math.sqrt(1 - abar) * epsilon) / math.sqrt(abar)
        share, rest = beta * math.sqrt(previous) / (1 - abar), math.sqrt(1 - beta) * (1 - previous) / (1 - abar)
        minimum = schedule.posterior_log_variance[t].double()
        fraction = (variance + 1) / 2
        p = torch.distributions.Normal(share * predicted + rest * x_t, torch.exp(0.5 * (fraction * math.log(beta) + (1 - fraction) * minimum)))
        if t:
            nats = torch.distributions.kl_divergence(torch.distributions.Normal(share * x + rest * x_t, (0.5 * minimum).exp()), p)
        else:
            upper = torch.where(x > 0.999, torch.ones_like(x), p.cdf(x + 1 / 255))
            nats = -torch.log(upper - torch.where(x < -0.999, torch.zeros_like(x), p.cdf(x - 1 / 255)))
        expected = ((epsilon - z) ** 2).mean() + 100 / 1000 * nats.mean() / math.log(2)
        assert loss[i].item() == pytest.approx(expected.item(), rel=1e-4)


def test_likelihood_sums_to_one_over_the_bins():
    pixels = torch.arange(256) / 127.5 - 1
    for mean, log_variance in [(0.1, -9.0), (-0.98, -3.0), (0.5, 0.0)]:
        nll = D.discretized_nll(pixels, torch.tensor(mean), torch.tensor(log_variance))
        assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_the_mean_gets_no_gradient_from_the_bound():
    x_0, noise, timestep = gaussian(4, 3, 2, 2).clamp(-1, 1), gaussian(4, 3, 2, 2, seed=1), torch.tensor([0, 1, 500, 999])
    output = gaussian(4, 6, 2, 2, seed=2).requires_grad_()
    (gradient,) = torch.autograd.grad(D.training_loss(COSINE, "epsilon", True, lambda x, t: output, x_0, timestep, noise).sum(), output)
    of_mean, of_variance = gradient.chunk(2, dim=1)
    torch.testing.assert_close(of_mean, 2 * (output[:, :3] - noise).detach() / 12)  # the MSE's alone
    assert of_variance.isfinite().all() and all(part.abs().sum() > 0 for part in of_variance)


@pytest.mark.parametrize("schedule", [COSINE, LINEAR, dead_end()], ids=["cosine", "linear", "dead end"])
@pytest.mark.parametrize("size", [1.0, 50.0])
def test_hybrid_loss_stays_finite_however_wrong_the_network(schedule, size):
    timestep = torch.arange(0, schedule.steps)
    x_0, noise = gaussian(schedule.steps, 3).clamp(-1, 1), gaussian(schedule.steps, 3, seed=1)
    output = (size * gaussian(schedule.steps, 6, seed=2)).requires_grad_()
    loss = D.training_loss(schedule, "epsilon", True, lambda x, t: output, x_0, timestep, noise)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_true_mean_and_lowest_variance_have_no_divergence():
    x_0, noise, timestep = gaussian(2, 3).clamp(-1, 1), gaussian(2, 3, seed=1), torch.tensor([1, 700])
    loss = D.training_loss(COSINE, "epsilon", True, lambda x, t: torch.cat([noise, -torch.ones_like(noise)], dim=1), x_0, timestep, noise)
    torch.testing.assert_close(loss, torch.zeros(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("output, expected", [(-1.0, 0.1), (1.0, 0.4), (0.0, 0.2)])
def test_learned_range_interpolates_logs(output, expected):
    fraction = (torch.tensor(output) + 1) / 2
    assert D.interpolate_log_variance(fraction, math.log(0.1), math.log(0.4)).exp().item() == pytest.approx(expected)  # 0.2: their geometric mean


# ---- guidance ----


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guiding_x_0_epsilon_and_v_is_the_same(scale):
    timestep, x_t = torch.tensor([100, 800]), gaussian(2, 3, 4, 4)
    clean = {"conditional": gaussian(2, 3, 4, 4, seed=1), "unconditional": gaussian(2, 3, 4, 4, seed=2)}
    guided = []
    for objective in ("x0", "epsilon", "v"):
        networks = []
        for x_0 in clean.values():
            output = D.target_for(COSINE, objective, x_0, timestep, D.to_epsilon(COSINE, x_0, x_t, timestep))
            networks.append(lambda x, t, output=output: output)
        guided.append(D.make_denoiser(D.guided_network(*networks, scale), COSINE, objective, clip=None)(x_t, timestep).x_0)
    torch.testing.assert_close(guided[0], clean["unconditional"] + scale * (clean["conditional"] - clean["unconditional"]))
    torch.testing.assert_close(guided[1], guided[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(guided[2], guided[0], atol=1e-4, rtol=1e-4)


def test_guidance_leaves_the_variance_alone():
    conditional, unconditional = gaussian(2, 6, 4, 4), gaussian(2, 6, 4, 4, seed=1)
    guided = D.guide(conditional, unconditional, 4.0, learned_variance=True)
    assert torch.equal(guided[:, 3:], conditional[:, 3:])
    torch.testing.assert_close(guided[:, :3], 4 * conditional[:, :3] - 3 * unconditional[:, :3])


def test_scale_one_never_asks_the_unconditional_half():
    def forbidden(x_t, timestep):
        raise AssertionError("called")

    x_t = gaussian(2, 3)
    assert torch.equal(D.guided_network(lambda x, t: x + 1, forbidden, 1.0)(x_t, torch.tensor([0, 0])), x_t + 1)


# ---- respacing ----


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 1000).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_spaced_timesteps(pair):
    total, count = pair
    timesteps = D.spaced_timesteps(total, count)
    assert len(set(timesteps)) == len(timesteps) == count and timesteps == sorted(timesteps)
    assert timesteps[-1] == total - 1 and (count == 1 or timesteps[0] == 0)
    gaps = [b - a for a, b in zip(timesteps, timesteps[1:])]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert D.spaced_timesteps(total, total) == list(range(total))


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_impossible_spacings(count):
    with pytest.raises(ValueError, match="sampling steps"):
        D.spaced_timesteps(1000, count)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpm"])
@pytest.mark.parametrize("steps", [1, 7])
def test_networks_see_the_original_timesteps(sampler, steps):
    seen, pictures = [], []

    def network(x_t, timestep):
        assert timestep.dtype == torch.int64 and timestep.shape == (2,)
        seen.append(timestep[0].item())
        return torch.full_like(x_t, 0.5)

    denoiser = D.make_denoiser(network, COSINE, "x0")
    result = D.sample(denoiser, COSINE, gaussian(2, 3), sampler, steps, on_step=lambda i, x_0: pictures.append((i, x_0)))
    assert seen == D.spaced_timesteps(1000, steps)[::-1]
    assert [i for i, _ in pictures] == list(range(steps))
    torch.testing.assert_close(result, torch.full((2, 3), 0.5), atol=1e-5, rtol=0)  # the last step lands on the predicted x_0


def test_ancestral_at_full_length_is_the_posterior_of_the_schedule():
    """With as many steps as the schedule has, respacing must change nothing: replay it with the tables."""
    schedule, draws = D.make_schedule("cosine", 30), [gaussian(2, 3, seed=s) for s in range(30)]
    denoiser, x_t = perfect(schedule), gaussian(2, 3, seed=99)
    queue = iter(draws)
    result = D.sample_ancestral(denoiser, schedule, x_t, 30, noise=lambda x: next(queue))
    for step, t in enumerate(reversed(range(30))):
        timestep = torch.full((2,), t)
        mean, log_variance = D.posterior(schedule, denoiser(x_t, timestep).x_0, x_t, timestep)
        x_t = mean + (t > 0) * (0.5 * log_variance).exp() * draws[step]
    torch.testing.assert_close(result, x_t, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("raw, bound", [(-1.0, "posterior"), (1.0, "beta")])
def test_learned_variance_under_respacing(raw, bound):
    """Three steps of 1,000: the two ends of the learned range are those of the long jumps, not of the schedule's single steps."""
    denoiser = D.make_denoiser(lambda x, t: torch.cat([torch.zeros_like(x), torch.full_like(x, raw)], dim=1), LINEAR, "x0", learned_variance=True)
    scales = []

    def noise(x):
        scales.append(x.clone())
        return torch.ones_like(x)

    seen = []
    D.sample_ancestral(lambda x, t: (seen.append(x.clone()), denoiser(x, t))[1], LINEAR, torch.zeros(1, 1), 3, noise=noise)
    abar = [LINEAR.exact_alphas_bar[t] for t in D.spaced_timesteps(1000, 3)]
    beta = 1 - abar[2] / abar[1]
    variance = beta if bound == "beta" else beta * (1 - abar[1]) / (1 - abar[2])
    assert (seen[1] - scales[0]).item() == pytest.approx(math.sqrt(variance), rel=1e-5)


# ---- samplers on the Gaussian world ----


@pytest.mark.parametrize("sampler, steps, eta", [("ancestral", 250, 0), ("ddim", 100, 0), ("ddim", 250, 1), ("ddim", 250, 0.5), ("dpm", 40, 0)])
@pytest.mark.parametrize("objective", ["epsilon", "v"])
@pytest.mark.parametrize("schedule", [COSINE, LINEAR], ids=["cosine", "linear"])
def test_samplers_recover_the_data(sampler, steps, eta, objective, schedule):
    count = 20_000
    noise = D.SeededNoise([7])
    x_0 = D.sample(perfect(schedule, objective), schedule, gaussian(1, count, seed=3), sampler, steps, noise=noise.like, eta=eta)
    assert x_0.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x_0.std().item() == pytest.approx(DEVIATION, rel=0.04)


def test_ddim_follows_the_probability_flow():
    """First order: the error falls with the number of steps, and is small at the end."""
    x_T = gaussian(1, 200)
    errors = [(D.sample_ddim(perfect(COSINE), COSINE, x_T, steps) - flow_end(COSINE, x_T)).abs().max().item() for steps in (10, 100, 1000)]
    assert errors[1] < errors[0] / 4 and errors[2] < errors[1] / 2 and errors[2] < 0.01


def flow_error(schedule, sampler, steps):
    x_T = gaussian(1, 200)
    return (D.sample(perfect(schedule), schedule, x_T, sampler, steps) - flow_end(schedule, x_T)).abs().max().item()


@pytest.mark.parametrize("schedule", [COSINE, LINEAR], ids=["cosine", "linear"])
@pytest.mark.parametrize("steps", [10, 15, 25])
def test_dpm_beats_ddim(schedule, steps):
    assert flow_error(schedule, "dpm", steps) < 0.6 * flow_error(schedule, "ddim", steps)


@pytest.mark.parametrize("schedule", [COSINE, LINEAR], ids=["cosine", "linear"])
def test_dpm_is_second_order(schedule):
    """Four times the steps: 16 times closer in theory, where first order would be 4 times."""
    assert flow_error(schedule, "dpm", 40) < flow_error(schedule, "dpm", 10) / 12
    assert flow_error(schedule, "ddim", 40) > flow_error(schedule, "ddim", 10) / 5


def test_dpm_by_its_published_update():
    """Algorithm 2 in lambda, with numbers from a constant-then-changed prediction: three steps, of which the middle one extrapolates."""
    predictions, timesteps = [1.0, 0.5, 0.2], [999, 500, 0]
    queue = iter(predictions)
    x = D.sample_dpm(lambda x, t: D.Prediction(torch.full_like(x, next(queue)), x, None), COSINE, torch.full((1, 1), 2.0), 3)
    assert x.item() == pytest.approx(0.2, abs=1e-6)
    pairs = [COSINE.exact_alphas_bar[t] for t in timesteps]
    assert D.spaced_timesteps(1000, 3) == timesteps[::-1]
    states = []
    queue = iter(predictions)

    def spy(x, t):
        states.append(x.item())
        return D.Prediction(torch.full_like(x, next(queue)), x, None)

    D.sample_dpm(spy, COSINE, torch.full((1, 1), 2.0), 3)
    (a0, s0), (a1, s1), (a2, s2) = ((math.sqrt(p), math.sqrt(1 - p)) for p in pairs)
    h1, h2 = math.log(a1 / s1) - math.log(a0 / s0), math.log(a2 / s2) - math.log(a1 / s1)
    after_first = s1 / s0 * 2.0 - a1 * (math.exp(-h1) - 1) * 1.0
    extra = h2 / (2 * h1)  # 1 / 2r, here below the cap of one half
    assert extra < 0.5
    after_second = s2 / s1 * after_first - a2 * (math.exp(-h2) - 1) * ((1 + extra) * 0.5 - extra * 1.0)
    assert states == pytest.approx([2.0, after_first, after_second], rel=1e-4)


def test_eta_one_is_ancestral():
    """DDIM with eta 1 has the posterior's mean and variance, so the same noise gives the same picture: any steps, clipped or not."""
    for steps, clip in [(1000, None), (9, 1.0), (2, None)]:
        ancestral, ddim = (
            D.sample(perfect(COSINE, clip=clip), COSINE, gaussian(1, 64), name, steps, noise=D.SeededNoise([5]).like, eta=1.0) for name in ("ancestral", "ddim")
        )
        torch.testing.assert_close(ancestral, ddim, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_out_of_range(eta):
    with pytest.raises(ValueError, match="eta"):
        D.sample(perfect(COSINE), COSINE, gaussian(1, 1), "ddim", 5, eta=eta)


def test_unknown_sampler():
    with pytest.raises(ValueError, match="unknown sampler"):
        D.sample(perfect(COSINE), COSINE, gaussian(1, 1), "euler", 5)  # type: ignore[arg-type]


def test_eta_zero_draws_no_noise():
    def forbidden(x):
        raise AssertionError("called")

    D.sample(perfect(COSINE), COSINE, gaussian(1, 3), "ddim", 5, noise=forbidden)


@pytest.mark.parametrize("objective", ["epsilon", "v", "x0"])
def test_inversion_then_ddim_gives_the_picture_back(objective):
    x_0 = MEAN + DEVIATION * gaussian(4, 30)
    denoiser = perfect(COSINE, objective)
    errors = []
    for steps in (50, 500):
        x_T = D.invert_ddim(denoiser, COSINE, x_0, steps)
        errors.append((D.sample_ddim(denoiser, COSINE, x_T, steps) - x_0).abs().max().item())
    assert errors[1] < errors[0] / 4 and errors[1] < 0.02
    torch.testing.assert_close(x_T, (x_0 - MEAN) / DEVIATION, atol=0.05, rtol=0.05)  # the flow keeps the standard score


def test_inversion_asks_at_the_noise_level_where_it_stands():
    """With a denoiser that is sure of x_0, DDIM's states are q_sample's: inversion visits them in order, each with its own timestep."""
    noise, seen = gaussian(1, 3), []

    def denoiser(x_t, timestep):
        seen.append((timestep.item(), x_t))
        return D.Prediction(torch.zeros_like(x_t), noise, None)

    x_T = D.invert_ddim(denoiser, COSINE, torch.zeros(1, 3), 5, first=30)
    timesteps = D.spaced_timesteps(1000, 5, first=30)
    assert [t for t, _ in seen] == timesteps[:-1] and (timesteps[0], timesteps[-1]) == (30, 999)
    assert (seen[0][1] == 0).all()  # the picture itself, which has no noise yet
    for t, x_t in [*seen[1:], (999, x_T)]:
        torch.testing.assert_close(x_t, D.q_sample(COSINE, torch.zeros(1, 3), torch.tensor([t]), noise))


@pytest.mark.parametrize("first", [0, 25, 100])
def test_inversion_takes_the_networks_error_for_noise_of_the_timestep_where_the_picture_enters(first):
    """A network that is sure of x_0 and off by 0.05: x_T is that error over the noise there, eight times too long from timestep 0."""
    x_0, error = gaussian(4, 30), 0.05 * gaussian(4, 30, seed=5).sign()

    def network(x_t, timestep):
        return D.Prediction(x_0 + error, D.to_epsilon(COSINE, x_0 + error, x_t, timestep), None)

    x_T = D.invert_ddim(network, COSINE, x_0, 20, first)
    abar = COSINE.exact_alphas_bar[first]
    torch.testing.assert_close(x_T, -error * math.sqrt(abar / (1 - abar)), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(D.revert_ddim(network, COSINE, x_T, 20, first), x_0, atol=1e-4, rtol=0)
    torch.testing.assert_close(D.sample_ddim(network, COSINE, x_T, 20, first=first), x_0 + error)


# ---- seeds ----


def test_seeded_noise_ignores_the_batch():
    together, alone, swapped = D.SeededNoise([1, 2, 3]), D.SeededNoise([2]), D.SeededNoise([3, 2])
    for _ in range(3):
        a, b, c = together((3, 4)), alone((3, 4)), swapped((3, 4))
        assert torch.equal(a[1:2], b) and torch.equal(a[1], c[1]) and torch.equal(a[2], c[0])
        assert not torch.equal(a[0], a[1])


def test_a_picture_does_not_depend_on_its_batch():
    def draw(seeds):
        noise = D.SeededNoise(seeds)
        return D.sample(perfect(COSINE), COSINE, noise((3, 4, 4)), "ancestral", 10, noise=noise.like)

    torch.testing.assert_close(draw([11, 12, 13])[1:2], draw([12]), atol=1e-6, rtol=0)


def test_one_seed_a_sample():
    with pytest.raises(ValueError, match="seed"):
        D.SeededNoise([1, 2]).like(torch.zeros(3, 1))


def test_works_under_autocast():
    layer = torch.nn.Conv2d(3, 3, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_0 = gaussian(2, 3, 4, 4).to(memory_format=torch.channels_last)
        loss = D.training_loss(COSINE, "v", False, lambda x, t: layer(x), x_0, torch.tensor([3, 900]), gaussian(2, 3, 4, 4))
        assert loss.dtype == torch.float32
        x_0 = D.sample(D.make_denoiser(lambda x, t: layer(x), COSINE, "v"), COSINE, x_0, "dpm", 3)
    assert x_0.dtype == torch.float32 and x_0.isfinite().all()


# ---- Analytic-DPM ----


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_analytic_variance_samples_a_gaussian_exactly_in_any_number_of_steps(steps):
    """Every reverse step of Gaussian data is Gaussian, so with the right variance few steps are as good as many; the posterior's is too small."""
    x_0 = MEAN + DEVIATION * gaussian(20_000, 2, seed=7)
    errors = D.x_0_errors(perfect(COSINE), COSINE, x_0, steps)
    drawn = D.sample_ancestral(perfect(COSINE), COSINE, gaussian(20_000, 2, seed=1), steps, D.SeededNoise(range(20_000)).like, errors=errors)
    assert drawn.std() == pytest.approx(DEVIATION, rel=0.02)
    plain = D.sample_ancestral(perfect(COSINE), COSINE, gaussian(20_000, 2, seed=1), steps, D.SeededNoise(range(20_000)).like)
    assert plain.std() < drawn.std()


def test_analytic_variance_is_that_of_the_source():
    """Bao et al. 2022, eq. 7, which says it by Gamma, the mean square of the score, instead of by the error of x_0."""
    steps, x_0 = 4, MEAN + DEVIATION * gaussian(200_000, 1, seed=7)
    errors = D.x_0_errors(perfect(COSINE), COSINE, x_0, steps)
    for index, _, abar, abar_next in D._descent(COSINE, steps):
        if abar_next == 1 or abar < 1e-6:
            continue
        score = 1 / (abar * DEVIATION**2 + 1 - abar)  # mean square of the score of N(., abar s^2 + 1 - abar)
        alpha, beta_n, beta_before = abar / abar_next, 1 - abar, 1 - abar_next
        posterior_variance = beta_before / beta_n * (1 - alpha)
        gap = math.sqrt(beta_n / alpha) - math.sqrt(beta_before - posterior_variance)
        published = posterior_variance + gap**2 * (1 - beta_n * score)
        share = (1 - alpha) * math.sqrt(abar_next) / beta_n
        assert posterior_variance + share**2 * errors[index] == pytest.approx(published, rel=0.02)


def test_as_many_errors_as_steps():
    with pytest.raises(ValueError, match="3 errors for 5 steps"):
        D.sample_ancestral(perfect(COSINE), COSINE, gaussian(1, 1), 5, errors=[0.1] * 3)
