"""Diffusion: schedules, q(x_t | x_0), losses, guidance and samplers. It knows no model: a network is any function of (x_t, timestep).

Paper: section 2 and Tab. 3 name the pieces; the equations are those of Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (cosine schedule, learned
variance, hybrid loss), Song et al. 2021 (DDIM), Salimans & Ho 2022 (v), Ho & Salimans 2022 (guidance) and Lu et al. 2022 (DPM-Solver++).
Differs from the paper: DPM-Solver++ is the prior's default, beside the Analytic-DPM of the paper, and a network may predict v as well as epsilon or x_0.

Three layers: a **network** gives raw output; `make_denoiser` turns it into a **denoiser**, which answers with x_0 and epsilon whatever the
objective; a **sampler** is a pure function of a denoiser and of x_T. Timesteps are int64 (B,) in 0 .. T-1; data may have any shape (B, C, ...).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from einops import reduce
from torch import Tensor

from minunclip.config import DiffusionConfig, Objective

SamplerName = Literal["ancestral", "ddim", "dpm"]
Network = Callable[[Tensor, Tensor], Tensor]  # (x_t, timestep) -> raw output; twice the channels if the variance is learned
Noise = Callable[[Tensor], Tensor]  # fresh unit Gaussian noise like the tensor given
OnStep = Callable[[int, Tensor], None]  # (index of the step, predicted x_0): for pictures of the process


class Prediction(NamedTuple):
    """What a denoiser says about x_t. The two always agree: x_t = sqrt(abar) x_0 + sqrt(1 - abar) epsilon."""

    x_0: Tensor
    epsilon: Tensor
    variance_fraction: Tensor | None  # 0: the posterior's variance, 1: beta. A fraction, because both ends move with respacing


Denoiser = Callable[[Tensor, Tensor], Prediction]


# ---- the forward process ----


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tables over timesteps: float32, each computed in float64 (1 - abar near t = 0 would lose most of its digits in float32)."""

    betas: Tensor
    log_betas: Tensor
    alphas_bar: Tensor
    signal: Tensor  # sqrt(abar): how much of x_0 is left in x_t
    noise: Tensor  # sqrt(1 - abar): how much noise there is
    posterior_x_0: Tensor  # the posterior mean is this times x_0 ...
    posterior_x_t: Tensor  # ... plus this times x_t
    posterior_log_variance: Tensor
    exact_alphas_bar: tuple[float, ...]  # float64: what samplers compute their few coefficients from

    @property
    def steps(self) -> int:
        return len(self.exact_alphas_bar)

    def to(self, device: torch.device) -> "Schedule":
        """The same tables on `device`; copied once, then remembered, so that no training step waits for a copy."""
        return self if device == self.betas.device else _copy_to(self, device)


@lru_cache(maxsize=16)
def _copy_to(schedule: Schedule, device: torch.device) -> Schedule:
    moved: dict[str, Any] = {name: value.to(device) for name, value in vars(schedule).items() if isinstance(value, Tensor)}
    return replace(schedule, **moved)


def make_schedule(name: Literal["cosine", "linear"], steps: int = 1000) -> Schedule:
    """The paper's two schedules (Tab. 3). Cosine: Nichol & Dhariwal 2021, eq. 17. Linear: Ho et al. 2020, rescaled to any number of steps."""
    if name == "cosine":
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        # abar(t) = cos^2((t + s) / (1 + s) pi / 2);   beta_t = 1 - abar(t) / abar(t - 1), at most 0.999
        alphas_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return schedule_from_betas((1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=0.999))
    if name == "linear":
        scale = 1000 / steps if steps > 0 else math.inf
        if 0.02 * scale >= 1:
            raise ValueError(f"a linear schedule of {steps} steps reaches beta >= 1: use more than 20 steps, or the cosine schedule")
        return schedule_from_betas(torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64))
    raise ValueError(f"unknown schedule {name!r}: use 'cosine' or 'linear'")


def schedule_of(process: DiffusionConfig) -> Schedule:
    """The schedule that a config names."""
    return make_schedule(process.schedule, process.steps)


def schedule_from_betas(betas: Tensor) -> Schedule:
    """All tables from float64 betas (T,) in (0, 1]; a last beta of exactly 1 (zero terminal signal) is fine."""
    if len(betas) < 2 or not (betas > 0).all() or not (betas <= 1).all():
        raise ValueError("a schedule needs at least 2 betas, each above 0 and at most 1: check the number of steps")
    betas = betas.double()
    alphas_bar = torch.cumprod(1 - betas, dim=0)
    previous = torch.cat([alphas_bar.new_ones(1), alphas_bar[:-1]])
    # q(x_{t-1} | x_t, x_0): variance beta (1 - abar_{t-1}) / (1 - abar_t). It is 0 at t = 0, and log 0 would poison the loss: take t = 1's
    posterior_log_variance = torch.log((betas * (1 - previous) / (1 - alphas_bar))[1:])
    tables = dict(
        betas=betas,
        log_betas=betas.log(),
        alphas_bar=alphas_bar,
        signal=alphas_bar.sqrt(),
        noise=(1 - alphas_bar).sqrt(),
        posterior_x_0=betas * previous.sqrt() / (1 - alphas_bar),
        posterior_x_t=(1 - betas).sqrt() * (1 - previous) / (1 - alphas_bar),
        posterior_log_variance=torch.cat([posterior_log_variance[:1], posterior_log_variance]),
    )
    return Schedule(**{name: table.float() for name, table in tables.items()}, exact_alphas_bar=tuple(alphas_bar.tolist()))


def _at(table: Tensor, timestep: Tensor, like: Tensor) -> Tensor:
    """A table's entries at timestep (B,), as (B, 1, ...) to go with `like`."""
    return table[timestep].reshape(-1, *[1] * (like.ndim - 1))


def q_sample(schedule: Schedule, x_0: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
    """Noise x_0 to `timestep`, in one jump."""
    schedule = schedule.to(x_0.device)
    # x_t = sqrt(abar) x_0 + sqrt(1 - abar) epsilon
    return _at(schedule.signal, timestep, x_0) * x_0 + _at(schedule.noise, timestep, x_0) * noise


def posterior(schedule: Schedule, x_0: Tensor, x_t: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (as x_t) and log-variance (B, 1, ...) of q(x_{t-1} | x_t, x_0); the log-variance at t = 0 is the one at t = 1."""
    schedule = schedule.to(x_t.device)
    # mean = beta sqrt(abar_{t-1}) / (1 - abar_t) x_0 + sqrt(alpha) (1 - abar_{t-1}) / (1 - abar_t) x_t
    mean = _at(schedule.posterior_x_0, timestep, x_t) * x_0 + _at(schedule.posterior_x_t, timestep, x_t) * x_t
    return mean, _at(schedule.posterior_log_variance, timestep, x_t)


# ---- from what a network predicts to x_0 and epsilon ----


def target_for(schedule: Schedule, objective: Objective, x_0: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
    """What a network with this objective should answer."""
    if objective == "epsilon":
        return noise
    if objective == "x0":
        return x_0
    if objective != "v":
        raise ValueError(f"unknown objective {objective!r}: use one of {', '.join(get_args(Objective))}")
    schedule = schedule.to(x_0.device)
    # v = sqrt(abar) epsilon - sqrt(1 - abar) x_0
    return _at(schedule.signal, timestep, x_0) * noise - _at(schedule.noise, timestep, x_0) * x_0


def to_x_0(schedule: Schedule, objective: Objective, output: Tensor, x_t: Tensor, timestep: Tensor) -> Tensor:
    """x_0 from a prediction of x_0, epsilon or v."""
    if objective == "x0":
        return output
    schedule = schedule.to(x_t.device)
    signal, noise = _at(schedule.signal, timestep, x_t), _at(schedule.noise, timestep, x_t)
    if objective == "v":  # signal^2 + noise^2 = 1, so (x_t, v) is (x_0, epsilon) turned by an angle: nothing to divide by
        return signal * x_t - noise * output
    # x_0 = (x_t - sqrt(1 - abar) epsilon) / sqrt(abar), kept finite where no signal is left
    return (x_t - noise * output) / signal.clamp(min=1e-5)


def to_epsilon(schedule: Schedule, x_0: Tensor, x_t: Tensor, timestep: Tensor) -> Tensor:
    """The noise that makes x_t out of x_0."""
    schedule = schedule.to(x_t.device)
    # epsilon = (x_t - sqrt(abar) x_0) / sqrt(1 - abar); 1 - abar is never 0, since every beta is above 0
    return (x_t - _at(schedule.signal, timestep, x_t) * x_0) / _at(schedule.noise, timestep, x_t)


def _split(output: Tensor, x_t: Tensor, learned_variance: bool) -> tuple[Tensor, Tensor | None]:
    """Raw output to the prediction and, if learned, the variance as a fraction (out of [-1, 1] it extrapolates, as in the source)."""
    expected = (x_t.shape[0], x_t.shape[1] * (2 if learned_variance else 1), *x_t.shape[2:])
    if output.shape != expected:
        raise ValueError(f"the network gave shape {tuple(output.shape)}, not {expected}: make its channels fit learned_variance={learned_variance}")
    if not learned_variance:
        return output.float(), None
    prediction, variance = output.float().chunk(2, dim=1)
    return prediction, (variance + 1) / 2


def make_denoiser(network: Network, schedule: Schedule, objective: Objective, learned_variance: bool = False, clip: float | None = 1.0) -> Denoiser:
    """A network with its objective, as a denoiser. `clip` bounds x_0 to [-clip, clip]: 1 for images, 5 to 10 or None for scaled latents."""
    if objective not in get_args(Objective):
        raise ValueError(f"unknown objective {objective!r}: use one of {', '.join(get_args(Objective))}")

    def denoise(x_t: Tensor, timestep: Tensor) -> Prediction:
        output, fraction = _split(network(x_t, timestep), x_t, learned_variance)
        x_0 = to_x_0(schedule, objective, output, x_t, timestep)
        if objective == "epsilon" and clip is None:
            return Prediction(x_0, output, fraction)
        if clip is not None:
            x_0 = x_0.clamp(-clip, clip)
        return Prediction(x_0, to_epsilon(schedule, x_0, x_t, timestep), fraction)  # from the clipped x_0, so that the two agree

    return denoise


def guide(conditional: Tensor, unconditional: Tensor, scale: float, learned_variance: bool = False) -> Tensor:
    """Classifier-free guidance on raw outputs (B, C, ...). Scale 1 is the conditional model, more exaggerates the condition.

    x_0, epsilon and v are linear in each other at fixed x_t, so guiding any of them is the same (before clipping).
    The variance channels are those of the conditional half.
    """
    wide = torch.promote_types(conditional.dtype, torch.float32)  # half precision would round the difference
    conditional, unconditional = conditional.to(wide), unconditional.to(wide)
    if not learned_variance:
        return unconditional + scale * (conditional - unconditional)
    (mean_c, variance_c), (mean_u, _) = conditional.chunk(2, dim=1), unconditional.chunk(2, dim=1)
    # epsilon_g = epsilon_u + w (epsilon_c - epsilon_u)
    return torch.cat([mean_u + scale * (mean_c - mean_u), variance_c], dim=1)


def guided_network(conditional: Network, unconditional: Network, scale: float, learned_variance: bool = False) -> Network:
    """Two views of one model, with its condition and with it dropped, as one network. At scale 1 the second is never called."""
    if scale == 1:
        return conditional
    return lambda x_t, timestep: guide(conditional(x_t, timestep), unconditional(x_t, timestep), scale, learned_variance)


# ---- training ----


def training_loss(schedule: Schedule, objective: Objective, learned_variance: bool, network: Network, x_0: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
    """Loss of each example (B,): the mean square error of the prediction; with a learned variance plus lambda times the VLB, lambda = T / 1000.

    The VLB (Nichol & Dhariwal 2021, eq. 16) is one term of it in bits per dimension and trains the variance only. It takes x_0 for an
    8-bit image in [-1, 1]: never learn the variance of a latent.
    """
    x_t = q_sample(schedule, x_0, timestep, noise)
    output, fraction = _split(network(x_t, timestep), x_t, learned_variance)
    loss = reduce((output - target_for(schedule, objective, x_0, timestep, noise)) ** 2, "b ... -> b", "mean")
    if fraction is None:
        return loss
    predicted = to_x_0(schedule, objective, output.detach(), x_t, timestep)  # detached: the MSE alone trains the mean
    return loss + schedule.steps / 1000 * _variational_bound(schedule, predicted, fraction, x_0, x_t, timestep)


def _variational_bound(schedule: Schedule, predicted: Tensor, fraction: Tensor, x_0: Tensor, x_t: Tensor, timestep: Tensor) -> Tensor:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0 the negative log-likelihood of x_0: bits per dimension (B,)."""
    true_mean, minimum = posterior(schedule, x_0, x_t, timestep)
    mean, _ = posterior(schedule, predicted, x_t, timestep)
    log_variance = interpolate_log_variance(fraction, minimum, _at(schedule.to(x_t.device).log_betas, timestep, x_t))
    # KL(N(m1, s1^2) || N(m2, s2^2)) = (log s2^2 - log s1^2 + s1^2 / s2^2 + (m1 - m2)^2 / s2^2 - 1) / 2
    kl = 0.5 * (log_variance - minimum + torch.exp(minimum - log_variance) + (true_mean - mean) ** 2 * torch.exp(-log_variance) - 1)
    first = (timestep == 0).reshape(-1, *[1] * (x_t.ndim - 1))
    nats = torch.where(first, discretized_nll(x_0, mean, log_variance), kl)
    return reduce(nats, "b ... -> b", "mean") / math.log(2)


def interpolate_log_variance(fraction: Tensor, minimum: Tensor | float, maximum: Tensor | float) -> Tensor:
    """The learned variance lies between the posterior's and beta, on a log scale (Nichol & Dhariwal 2021, eq. 15)."""
    return fraction * maximum + (1 - fraction) * minimum


def discretized_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the Gaussian mass on the pixel's bin: 256 values over [-1, 1], so 1/255 to each side, the end bins open (Ho et al. 2020, eq. 13)."""
    centred, precision = x - mean, torch.exp(-0.5 * log_variance)
    upper = torch.where(x > 0.999, 1.0, torch.special.ndtr(precision * (centred + 1 / 255)))
    lower = torch.where(x < -0.999, 0.0, torch.special.ndtr(precision * (centred - 1 / 255)))
    return -torch.log((upper - lower).clamp(min=1e-12))  # so far in the tail the gradient is 0: finite, however wrong the network


# ---- sampling ----


def spaced_timesteps(total: int, count: int, first: int = 0) -> list[int]:
    """`count` evenly spaced timesteps out of first .. total-1, ascending, with both ends; a count of 1 keeps the last, where pure noise is."""
    if not 1 <= count <= total - first:
        raise ValueError(f"cannot take {count} sampling steps out of {total - first}: use 1 to {total - first}")
    if count == 1:
        return [total - 1]
    return [first + round(i * (total - 1 - first) / (count - 1)) for i in range(count)]


def _descent(schedule: Schedule, steps: int, first: int = 0) -> Iterator[tuple[int, int, float, float]]:
    """From noise to data: (index, timestep, abar here, abar after the step). Networks see the original timesteps, never 0 .. steps-1."""
    timesteps = spaced_timesteps(schedule.steps, steps, first)
    levels = [1.0, *(schedule.exact_alphas_bar[t] for t in timesteps)]
    for index, i in enumerate(reversed(range(steps))):
        yield index, timesteps[i], levels[i + 1], levels[i]


def _predict(denoiser: Denoiser, x_t: Tensor, timestep: int, index: int, on_step: OnStep | None) -> Prediction:
    prediction = denoiser(x_t, torch.full((len(x_t),), timestep, dtype=torch.int64, device=x_t.device))
    if on_step is not None:
        on_step(index, prediction.x_0)
    return prediction


@torch.no_grad()
def x_0_errors(denoiser: Denoiser, schedule: Schedule, x_0: Tensor, steps: int) -> list[float]:
    """What Analytic-DPM needs to know: the mean square error of the predicted x_0, a value, at each of `steps` timesteps, from noise to data.

    x_0 (N, ...): examples of what is to be sampled; their noise is always the same. Measured once, before sampling.
    """
    epsilon = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0)
    errors = []
    for index, timestep, _, _ in _descent(schedule, steps):
        at = torch.full((len(x_0),), timestep, device=x_0.device)
        errors.append(float(((_predict(denoiser, q_sample(schedule, x_0, at, epsilon), timestep, index, None).x_0 - x_0) ** 2).mean()))
    return errors


@torch.no_grad()
def sample_ancestral(
    denoiser: Denoiser,
    schedule: Schedule,
    x_T: Tensor,
    steps: int,
    noise: Noise = torch.randn_like,
    on_step: OnStep | None = None,
    errors: Sequence[float] | None = None,
) -> Tensor:
    """DDPM (Ho et al. 2020): at each step draw x_{t-1} from the posterior. The variance is the learned one, else the posterior's.

    With `errors` (those of `x_0_errors`, as many as steps) it is Analytic-DPM (Bao et al. 2022, eq. 7): the posterior is that of one x_0, and as
    the network is not sure of x_0, its error is added, as far as x_0 counts in the mean. Fewer steps need it more. A learned variance is then not used.
    """
    if errors is not None and len(errors) != steps:
        raise ValueError(f"{len(errors)} errors for {steps} steps: measure them with x_0_errors at as many steps")
    x_t = x_T
    for index, timestep, abar, abar_next in _descent(schedule, steps):
        prediction = _predict(denoiser, x_t, timestep, index, on_step)
        beta = 1 - abar / abar_next  # of the jump just made, which under respacing spans many steps of the schedule
        # mean = beta sqrt(abar_{t-1}) / (1 - abar_t) x_0 + sqrt(alpha) (1 - abar_{t-1}) / (1 - abar_t) x_t
        x_0_share, x_t_share = beta * math.sqrt(abar_next) / (1 - abar), math.sqrt(1 - beta) * (1 - abar_next) / (1 - abar)
        x_t = x_0_share * prediction.x_0 + x_t_share * x_t
        if abar_next < 1:  # the last step has no noise
            deviation: Tensor | float = math.sqrt(beta * (1 - abar_next) / (1 - abar))
            if prediction.variance_fraction is not None:
                minimum, maximum = 2 * math.log(deviation), math.log(beta)
                deviation = torch.exp(0.5 * interpolate_log_variance(prediction.variance_fraction, minimum, maximum))
            if errors is not None:
                # sigma^2 = posterior variance + (share of x_0)^2 E|x_0 - x_0 predicted|^2 / d
                deviation = math.sqrt(beta * (1 - abar_next) / (1 - abar) + x_0_share**2 * errors[index])
            x_t = x_t + deviation * noise(x_t)
    return x_t


@torch.no_grad()
def sample_ddim(
    denoiser: Denoiser,
    schedule: Schedule,
    x_T: Tensor,
    steps: int,
    noise: Noise = torch.randn_like,
    eta: float = 0.0,
    on_step: OnStep | None = None,
    first: int = 0,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16). eta 0: a deterministic map from x_T to a picture; eta 1: as random as the ancestral sampler.

    `first` is the timestep from which the last step leads to a picture: that of `invert_ddim`, where x_T comes from there.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: use 0 (deterministic) to 1 (as random as ancestral sampling)")
    x_t = x_T
    for index, timestep, abar, abar_next in _descent(schedule, steps, first):
        prediction = _predict(denoiser, x_t, timestep, index, on_step)
        # sigma = eta sqrt((1 - abar_{t-1}) / (1 - abar_t)) sqrt(1 - abar_t / abar_{t-1})
        sigma = eta * math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))
        # x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1} - sigma^2) epsilon + sigma z
        x_t = math.sqrt(abar_next) * prediction.x_0 + math.sqrt(max(1 - abar_next - sigma**2, 0.0)) * prediction.epsilon
        if sigma > 0:
            x_t = x_t + sigma * noise(x_t)
    return x_t


def _log_ratio(abar: float) -> float:
    """lambda = log(sqrt(abar) / sqrt(1 - abar)): the clock by which DPM-Solver steps. Infinite at pure noise and at clean data."""
    return -math.inf if abar <= 0 else math.inf if abar >= 1 else 0.5 * math.log(abar / (1 - abar))


@torch.no_grad()
def sample_dpm(denoiser: Denoiser, schedule: Schedule, x_T: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor:
    """DPM-Solver++ (2M) (Lu et al. 2022, Algorithm 2): DDIM's path, with x_0 extrapolated from the last two predictions. Deterministic.

    Differs from the source: the extrapolation never exceeds half the last change (r >= 1). Evenly spaced timesteps make the step into t = 0
    several times longer than the one before in lambda, where x_0 has settled already and a straight line would overshoot.
    """
    x_t = x_T
    previous, previous_h = x_T, math.inf  # an infinite last step gives its prediction no weight: the first step is first-order
    for index, timestep, abar, abar_next in _descent(schedule, steps):
        x_0 = _predict(denoiser, x_t, timestep, index, on_step).x_0
        h = _log_ratio(abar_next) - _log_ratio(abar)
        # D = (1 + 1 / 2r) x_0 - 1 / 2r x_0^previous,  r = h_previous / h;   the last step (h infinite) is first-order too
        extra = min(h / (2 * previous_h), 0.5) if h < math.inf else 0.0
        estimate = x_0 + extra * (x_0 - previous)
        # x_{t-1} = sigma_{t-1} / sigma_t x_t - sqrt(abar_{t-1}) (e^-h - 1) D
        x_t = math.sqrt((1 - abar_next) / (1 - abar)) * x_t - math.sqrt(abar_next) * math.expm1(-h) * estimate
        previous, previous_h = x_0, h
    return x_t


def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    x_T: Tensor,
    sampler: SamplerName,
    steps: int,
    noise: Noise = torch.randn_like,
    eta: float = 0.0,
    on_step: OnStep | None = None,
    errors: Sequence[float] | None = None,
) -> Tensor:
    """x_0 from unit Gaussian x_T by the sampler of that name. `noise` and `errors` are for "ancestral", `eta` for "ddim", which above 0 takes noise too."""
    if sampler == "ancestral":
        return sample_ancestral(denoiser, schedule, x_T, steps, noise, on_step, errors)
    if sampler == "ddim":
        return sample_ddim(denoiser, schedule, x_T, steps, noise, eta, on_step)
    if sampler == "dpm":
        return sample_dpm(denoiser, schedule, x_T, steps, on_step)
    raise ValueError(f"unknown sampler {sampler!r}: use 'ancestral', 'ddim' or 'dpm'")


def _walk(denoiser: Denoiser, schedule: Schedule, x_t: Tensor, timesteps: Sequence[int]) -> Tensor:
    """DDIM with eta 0 from the first of `timesteps` to the last, up or down: each step keeps x_0 and epsilon as they are seen where it starts."""
    if len(timesteps) < 2:
        raise ValueError("one step leads nowhere: invert in 2 or more")
    for index, (timestep, following) in enumerate(pairwise(timesteps)):
        prediction, abar = _predict(denoiser, x_t, timestep, index, None), schedule.exact_alphas_bar[following]
        x_t = math.sqrt(abar) * prediction.x_0 + math.sqrt(1 - abar) * prediction.epsilon
    return x_t


@torch.no_grad()
def invert_ddim(denoiser: Denoiser, schedule: Schedule, x_0: Tensor, steps: int, first: int = 0) -> Tensor:
    """The x_T from which `sample_ddim` with eta 0 makes x_0 (section 3): the same ODE backwards, approximate, better with more steps.

    x_0 enters at timestep `first`, as if it had that timestep's noise. Choose one whose noise is about as large as the network's own error on a
    clean picture: lower down, that error counts as noise, is divided by next to nothing, and x_T grows far beyond what the network knows.
    """
    x_t = math.sqrt(schedule.exact_alphas_bar[first]) * x_0
    return _walk(denoiser, schedule, x_t, spaced_timesteps(schedule.steps, steps, first))


@torch.no_grad()
def revert_ddim(denoiser: Denoiser, schedule: Schedule, x_T: Tensor, steps: int, first: int = 0) -> Tensor:
    """The way of `invert_ddim` back: the picture is taken as it stands at timestep `first`, where it had entered.

    `sample_ddim` would take the network's answer there instead, and with it the network's error.
    """
    x_t = _walk(denoiser, schedule, x_T, spaced_timesteps(schedule.steps, steps, first)[::-1])
    return x_t / math.sqrt(schedule.exact_alphas_bar[first])


class SeededNoise:
    """Noise where sample i depends on seed i alone, so that neither batch size nor batch mates nor the device ever change a picture."""

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """The next noise (B, *shape) for every sample, on the CPU: `x_T = noise((3, 64, 64))`."""
        return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in self.generators])

    def like(self, x: Tensor) -> Tensor:
        """The next noise, as x: what a sampler takes as its `noise`."""
        if len(x) != len(self.generators):
            raise ValueError(f"{len(self.generators)} seeds for {len(x)} samples: give one seed a sample")
        return self(x.shape[1:]).to(x)
