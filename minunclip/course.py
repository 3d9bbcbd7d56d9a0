"""What the notebooks teach with: `check("best_candidate", your_function)` looks at an exercise, `slide` shows a slider over pictures,
`compare_run` holds a log of training against what is expected, `compare` shows two systems side by side, to be judged blindly,
`keep` and `artefact` hand what one notebook has made to another, and `in_large` shows what an experiment on many more pictures has found.

An exercise that is not begun (it raises NotImplementedError) is let off with a word; a wrong answer raises AssertionError and says why.
"""

import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minunclip.ablations import TRAININGS
from minunclip.blind import compare as compare
from minunclip.curves import compare_run as compare_run
from minunclip.data.captions import describes
from minunclip.data.scenes import sample_scenes
from minunclip.diffusion import make_schedule
from minunclip.evaluation import precision_recall
from minunclip.experiments import EXPERIMENTS, Table, as_markdown
from minunclip.plots import slide as slide
from minunclip.training import write_atomically

ARTEFACTS = Path("artefacts")  # beside the notebooks
RESULTS = Path(__file__).parents[1] / "results"


def keep(name: str, write: Callable[[Path], object]) -> None:
    """Lets `write` make the file artefacts/NAME for later notebooks: whole, or not at all."""
    ARTEFACTS.mkdir(exist_ok=True)
    write_atomically(ARTEFACTS / name, write)
    print(f"wrote {ARTEFACTS / name}")


def artefact(name: str, shipped: Path) -> Path:
    """artefacts/NAME of an earlier notebook; where that has not come to its end, what ships in its place. Says which."""
    path = ARTEFACTS / name
    if (path / "config.json" if path.is_dir() else path).exists():  # of a model's folder the config is written last
        print(f"{name}: yours, of notebook {name[:2]}")
        return path
    print(f"{name}: not there, as notebook {name[:2]} has not come to its end here; the shipped {shipped.name} takes its place")
    return shipped


def in_large(name: str, columns: Sequence[str], paper: dict[str, float] | None = None) -> Table:
    """Shows some columns of results/NAME.json, which `minunclip experiment NAME` has drawn on more than a notebook has the time for, and returns them; "± "
    and a column's name is its spread over seeds. `paper`: figures of the paper's, an FID for a row. Nothing, and a word, where the file is not there.
    """
    from IPython.display import Markdown, display

    path = RESULTS / f"{name}.json"
    if not path.exists():
        print(f"results/{name}.json is missing: it is in the repository, or made in its root by `minunclip experiment {name} --seeds 3 --out results`")
        return {}
    run, paper = json.loads(path.read_text()), paper or {}
    count = inspect.signature((EXPERIMENTS | TRAININGS)[name]).parameters["count"].default
    print(f"results/{name}.json: {count} captions or pictures on each of {run['seeds']} seeds")
    table = {row: {key: value for key, value in line.items() if key.removeprefix("± ") in columns} for row, line in run["table"].items()}
    display(Markdown(as_markdown({f"{row} (the paper's FID: {paper[row]:g})" if row in paper else row: line for row, line in table.items()})))
    return table


def check(exercise: str, attempt: Callable[..., Any]) -> bool:
    """Whether the exercise is solved. ValueError for an exercise that there is not; AssertionError explains a wrong answer."""
    if exercise not in CHECKS:
        raise ValueError(f"there is no exercise {exercise!r}: choose one of {', '.join(CHECKS)}")

    def answered(*given: Any) -> Any:
        answer = attempt(*given)
        assert answer is not None or exercise in MAY_BE_NONE, "the function gives nothing back: end it with `return`, and what was asked for"
        return answer

    try:
        CHECKS[exercise](answered)
    except NotImplementedError:
        print(f"{exercise}: not attempted yet")
        return False
    print(f"{exercise}: right")
    return True


# ---- 00 tour ----


def slowest_stage(attempt: Callable[..., Any]) -> None:
    for seconds, right in (({"text": 0.1, "decoder": 2.0, "prior": 0.3}, "decoder"), ({"prior": 1.0, "decoder": 0.5}, "prior")):
        got = attempt(seconds)
        assert got == right, f"of {seconds} the slowest stage is {right!r}, but the answer was {got!r}: return the key, not its value"


def best_candidate(attempt: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    z_t = torch.nn.functional.normalize(torch.randn(5, 8, generator=generator), dim=1)
    candidates = torch.nn.functional.normalize(torch.randn(5, 3, 8, generator=generator), dim=2)
    got = attempt(z_t, candidates)
    assert isinstance(got, torch.Tensor) and got.shape == (5, 8), "return one embedding a caption, a tensor (B, d): index the candidates, do not score them"
    right = torch.stack([max(options, key=lambda z: float(z @ text)) for text, options in zip(z_t, candidates)])
    least = torch.stack([min(options, key=lambda z: float(z @ text)) for text, options in zip(z_t, candidates)])
    assert not torch.allclose(got, least), "these agree least with z_t: take the largest z_i . z_t, not the smallest"
    assert torch.allclose(got, right), "each caption has its own best candidate, the one with the largest z_i . z_t"


def margin(attempt: Callable[..., Any]) -> None:
    for right, count in ((50, 100), (90, 100), (950, 1000), (0, 10)):
        share = right / count
        expected, got = 1.96 * math.sqrt(share * (1 - share) / count), attempt(right, count)
        off = f"of {right} right out of {count} the margin is {expected:.4f}, not {got:.4f}"
        assert abs(got - expected) < 1e-6, f"{off}: 1.96 times the square root of p (1 - p) / n"


# ---- 01 a world with captions, and byte-pair encoding ----


def most_frequent_pair(attempt: Callable[..., Any]) -> None:
    cases: list[tuple[dict[tuple[int, ...], int], tuple[int, int]]] = [
        ({(2, 3, 2, 3): 5, (3, 2): 4}, (2, 3)),
        ({(5, 5, 5): 2, (4, 6): 3}, (5, 5)),
        ({(9, 8): 1, (7, 8): 1}, (7, 8)),
        ({(2, 3): 1, (4, 5): 5, (2, 3, 9): 1}, (4, 5)),
    ]
    for words, right in cases:
        got = attempt(dict(words))
        advice = "count each pair as often as its word, and of equals take the lowest"
        assert tuple(got) == right, f"in {words} the most frequent pair is {right}, not {got}: {advice}"


def share_allowed(attempt: Callable[..., Any]) -> None:
    scenes = sample_scenes(200, seed=21)
    for words in ("a shape", "a red circle", "two shapes", "a striped shape"):
        right, got = sum(describes(words, scene) for scene in scenes) / len(scenes), attempt(words, scenes)
        assert abs(got - right) < 1e-9, f"{words!r} is true of {right:.1%} of these scenes, not of {got}: divide by the number of scenes"


def pad(attempt: Callable[..., Any]) -> None:
    rows = [[5, 6, 7], [8], [9, 3]]
    ids, mask = attempt(rows)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [9, 3, 0]], f"ids must be the rows, filled up with 0 to the longest, not {ids.tolist()}"
    assert not ids.is_floating_point(), f"ids number tokens, and so must be whole (torch.long), not {ids.dtype}"
    assert mask.dtype == torch.bool, "mask must be of booleans: True for real tokens"
    assert mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]], "mask must be True on real tokens, and nowhere else"


def bits(attempt: Callable[..., Any]) -> None:
    for counts, right in (([3, 3], 1.0), ([5, 5, 5, 5], 2.0), ([4, 2, 1, 1], 1.75), ([7], 0.0), ([6, 0, 2, 0], 2 - 0.75 * math.log2(3))):
        got = float(attempt(list(counts)))
        shares = [count / sum(counts) for count in counts if count]
        off = f"tokens that occur {counts} times say {right:.3f} bits each, not {got:.3f}"
        assert right == 0 or abs(got - right * math.log(2)) > 1e-6, f"{off}: these are natural logarithms, a bit is one of base 2"
        assert right == 0 or abs(got - right * sum(counts)) > 1e-6, f"{off}: this is what all of them say together, divide by their number"
        plain_mean = -sum(map(math.log2, shares)) / len(shares)
        assert abs(plain_mean - right) < 1e-6 or abs(got - plain_mean) > 1e-6, f"{off}: a token counts in the mean as often as it occurs"
        assert abs(got - right) < 1e-6, f"{off}: one of share p says log2(1 / p), and it comes up p of the time"


# ---- 02 CLIP ----


def _pairs(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-length z_i and z_t (count, 16) of which z_t i is near z_i i."""
    generator = torch.Generator().manual_seed(seed)
    z_i = torch.randn(count, 16, generator=generator)
    z_t = z_i + 0.8 * torch.randn(count, 16, generator=generator)
    return torch.nn.functional.normalize(z_i, dim=1), torch.nn.functional.normalize(z_t, dim=1)


def contrastive(attempt: Callable[..., Any]) -> None:
    for count, scale in ((6, 5.0), (9, 20.0)):
        z_i, z_t = _pairs(count, count)
        logits = scale * z_i @ z_t.T
        one_way = -logits.log_softmax(dim=1).diagonal().mean()
        right = (one_way - logits.log_softmax(dim=0).diagonal().mean()) / 2
        got = torch.as_tensor(attempt(z_i, z_t, scale))
        assert not torch.allclose(got, one_way, atol=1e-4), "this asks each picture for its caption only: ask each caption for its picture too, and average"
        assert not torch.allclose(got, 2 * right, atol=1e-4), "this is the sum of both directions: take their mean"
        assert torch.allclose(got, right, atol=1e-4), f"for {count} pairs at scale {scale} the loss is {right:.4f}, not {got.item():.4f}"


def recall_at(attempt: Callable[..., Any]) -> None:
    z_i, z_t = _pairs(40, 3)
    similarity = z_i @ z_t.T
    rank = (similarity > similarity.diagonal()[:, None]).sum(dim=1)
    for k in (1, 3, 40):
        right, got = (rank < k).float().mean().item(), float(attempt(z_i, z_t, k))
        assert abs(got - right) < 1e-6, f"with k = {k} the share is {right:.3f}, not {got:.3f}: row i is right if column i is among its k largest"


def best_loss(attempt: Callable[..., Any]) -> None:
    for scale, count in ((1.0, 128), (5.0, 16)):
        right, got = math.log(1 + (count - 1) * math.exp(-2 * scale)), float(attempt(scale, count))
        advice = "the true pair has the logit s, each of the B - 1 others -s"
        assert abs(got - right) < 1e-6, f"at scale {scale} among {count} the best loss is {right:.4f}, not {got:.4f}: {advice}"


# ---- 03 diffusion from scratch ----


def _noised() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_0, alpha_bar, noise and x_t of five points."""
    generator = torch.Generator().manual_seed(1)
    x_0, noise = (torch.randn(5, 2, generator=generator) for _ in range(2))
    alpha_bar = torch.tensor([0.99, 0.8, 0.5, 0.2, 0.05])
    return x_0, alpha_bar, noise, alpha_bar[:, None].sqrt() * x_0 + (1 - alpha_bar[:, None]).sqrt() * noise


def crossing(attempt: Callable[..., Any]) -> None:
    got, alphas_bar = float(attempt()), make_schedule("cosine", 100).alphas_bar
    assert 1 <= got < len(alphas_bar), f"{got:g} is no timestep: read off where on the t axis the curves meet, not how high, nor as a share"
    share = float(alphas_bar[round(got)])
    times = (1 - share) / share  # what an error in the noise is multiplied by, squared, when x_0 is computed from it
    assert 0.75 < times < 1.35, f"at t = {got:g} the dashed curve is {times:.2g} times as high as the other: find the t at which they are as high"


def x_0_from_epsilon(attempt: Callable[..., Any]) -> None:
    x_0, alpha_bar, noise, x_t = _noised()
    got = attempt(x_t, noise, alpha_bar)
    assert got.shape == (5, 2), f"the answer must be (B, 2), not {tuple(got.shape)}: give alpha_bar a second axis"
    assert torch.allclose(got, x_0, atol=1e-4), "take the noise away first, in the strength that it has, then undo the shrinking"


def x_0_from_v(attempt: Callable[..., Any]) -> None:
    x_0, _, noise, _ = _noised()
    alpha_bar = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])  # at the end nothing of x_0 is left in x_t
    signal, rest = alpha_bar[:, None].sqrt(), (1 - alpha_bar[:, None]).sqrt()
    x_t, v = signal * x_0 + rest * noise, signal * noise - rest * x_0
    got = attempt(x_t, v, alpha_bar)
    assert got.shape == (5, 2), f"the answer must be (B, 2), not {tuple(got.shape)}: give alpha_bar a second axis"
    assert got.isfinite().all(), "where alpha_bar is 0 or 1 this divides by 0: combine x_t and v so that the noise cancels, and nothing is left to divide by"
    assert not torch.allclose(got, noise, atol=1e-4), "this is the noise: the other combination of x_t and v gives x_0"
    assert not torch.allclose(got, signal * x_t + rest * v, atol=1e-4), "x_0 stands in v with a minus: take v's part away, do not add it"
    assert torch.allclose(got, x_0, atol=1e-4), "x_0 is the root of alpha_bar times x_t, less the root of 1 - alpha_bar times v"


def cosine_betas(attempt: Callable[..., Any]) -> None:
    for steps in (10, 1000):
        right, got = make_schedule("cosine", steps).betas.double(), torch.as_tensor(attempt(steps)).double()
        assert got.shape == (steps,), f"there are {steps} betas, not {tuple(got.shape)}: one less than values of alpha_bar"
        assert got.max() <= 0.999 + 1e-6, f"the largest beta is {got.max():.4f}: keep them to 0.999, or the last step leaves nothing"
        off = (~torch.isclose(got, right, atol=1e-4)).nonzero().flatten().tolist()
        hint = "mind the 0.008 and the 1.008" if 0 in off else "those before it are right; keep to 0.999, and no less"
        assert not off, f"beta {off[0]} of {steps} should be {right[off[0]]:.6f}, it is {got[off[0]]:.6f}: {hint}"


# ---- 04 the autoregressive prior ----


def components_kept(attempt: Callable[..., Any]) -> None:
    eigenvalues = torch.tensor([8.0, 4, 2, 1, 0.5, 0.25, 0.125, 0.125])
    for tolerance, right in ((0.5, 2), (0.2, 3), (0.01, 7), (0.3, 2)):
        got = attempt(eigenvalues, tolerance)
        explained = f"{right} components are the fewest that leave less than {tolerance:.0%} out"
        assert got == right, f"{explained}, not {got}: what is left out is 1 minus the share of those kept"


def to_bucket(attempt: Callable[..., Any]) -> None:
    values = torch.tensor([-9.0, -1, -0.51, 0, 0.49, 0.99, 1, 7])
    got = attempt(values, -1.0, 1.0, 4)
    assert not got.is_floating_point(), "tokens are whole numbers: end with .long()"
    assert got.min() >= 0 and got.max() <= 3, "values outside belong to the first or the last of the four buckets: clamp to 0 .. buckets - 1"
    assert got.tolist() == [0, 0, 0, 2, 2, 3, 3, 3], f"in four buckets from -1 to 1 {values.tolist()} became {got.tolist()}: round down"


def top_half(attempt: Callable[..., Any]) -> None:
    cases = [([0.25, 0.25, 0.25, 0.25], [0, 0, 0.5, 0.5]), ([0.1, 0.6, 0.3], [0, 0.4, 0.6]), ([0.9, 0.1], [0.8, 0.2])]
    for given, right in cases:
        got = torch.as_tensor(attempt(torch.tensor(given)))
        assert abs(got.sum().item() - 1) < 1e-5, f"what remains of {given} must sum to one again, it sums to {got.sum():.3f}"
        advice = "half of the probability goes, not half of the buckets, and the median's bucket keeps a part"
        assert torch.allclose(got.float(), torch.tensor(right), atol=1e-5), f"the top half of {given} is {right}: {advice}"


# ---- 05 the diffusion prior ----


def sequence(attempt: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(3, 4, 6, generator=generator)
    singles = [torch.randn(3, 6, generator=generator) for _ in range(4)]
    got = attempt(text, *singles)
    assert got.shape == (3, 8, 6), f"the sequence must be (B, L + 4, width), here (3, 8, 6), not {tuple(got.shape)}"
    assert torch.equal(got[:, :4], text), "the encoded text comes first"
    for place, (name, single) in enumerate(zip(("z_t", "the timestep", "the noised z_i", "the last token"), singles), start=4):
        assert torch.equal(got[:, place], single), f"{name} belongs at place {place + 1} of 8"


def guided(attempt: Callable[..., Any]) -> None:
    with_caption, without = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    for w, right in ((1.0, [[1.0, 2.0]]), (0.0, [[0.0, 4.0]]), (3.0, [[3.0, -2.0]])):
        got = attempt(with_caption, without, w)
        advice = "from the answer without the caption, go w times the way to the one with it"
        assert torch.allclose(got, torch.tensor(right)), f"at w = {w} the guided answer is {right}, not {got.tolist()}: {advice}"


def latent_factor(attempt: Callable[..., Any]) -> None:
    for d in (16, 128, 1024):
        got = float(attempt(d))
        z = torch.nn.functional.normalize(torch.randn(100, d, generator=torch.Generator().manual_seed(d)), dim=1)
        size = (got * z).square().mean().item()
        assert abs(size - 1) < 1e-3, f"times {got:.3g}, embeddings of {d} numbers have a mean square of {size:.3g}, not 1"


# ---- 06 the decoder and guidance ----


def drop_shares(attempt: Callable[..., Any]) -> None:
    for p_z, p_y in ((0.1, 0.5), (0.2, 0.3), (0.0, 1.0)):
        right, got = ((1 - p_z) * (1 - p_y), (1 - p_z) * p_y, p_z * (1 - p_y), p_z * p_y), tuple(attempt(p_z, p_y))
        assert len(got) == 4 and abs(sum(got) - 1) < 1e-9, f"the four shares must sum to one, {got} do not"
        advice = "an example sees a part with one minus the chance of its drop; order: both, embedding only, caption only, neither"
        assert all(abs(a - b) < 1e-9 for a, b in zip(got, right)), f"with {p_z} and {p_y} the shares are {right}, not {got}: {advice}"


def context(attempt: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    text, projected = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 20, generator=generator)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    tokens, visible = attempt(text, mask, projected)
    assert tokens.shape == (2, 7, 5), f"the context must be (B, L + 4, w), here (2, 7, 5), not {tuple(tokens.shape)}"
    assert torch.equal(tokens[:, :3], text), "the caption's tokens come first"
    assert torch.equal(tokens[:, 3:], projected.view(2, 4, 5)), "each of the four tokens is w neighbouring numbers of the projection"
    assert visible.shape == (2, 7) and visible.dtype == torch.bool, "the mask must be of booleans, (B, L + 4)"
    assert torch.equal(visible[:, :3], mask), "the caption's part of the mask stays as it is: padding must not be seen"
    assert visible[:, 3:].all(), "the embedding's four tokens are always visible"


def guided_six(attempt: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(4)
    told, untold = (torch.randn(2, 6, 4, 4, generator=generator) for _ in range(2))
    for w in (1.0, 3.0):
        got = attempt(told, untold, w)
        assert got.shape == told.shape, f"the answer keeps its six channels, (2, 6, 4, 4), not {tuple(got.shape)}"
        assert torch.allclose(got[:, 3:], told[:, 3:]), "the variance is that with the condition, and not guided: it would leave its range"
        assert torch.allclose(got[:, :3], untold[:, :3] + w * (told - untold)[:, :3], atol=1e-5), "the first three channels go w times the way"


# ---- 07 the upsamplers ----


def peak_ratio(attempt: Callable[..., Any]) -> None:
    a = torch.zeros(2, 3, 4, 4)
    for difference in (0.2, 0.02):
        right, got = 20 * math.log10(2 / difference), float(attempt(a, a + difference))
        assert abs(got - right) < 1e-2, f"a difference of {difference} everywhere is {right:.2f} dB, not {got:.2f}: 10 log10 of the peak squared over the MSE"
    b = torch.cat([a[:1] + 0.2, a[1:] + 0.02])
    right, got = 10 * math.log10(4 / (0.5 * 0.2**2 + 0.5 * 0.02**2)), float(attempt(a, b))
    assert abs(got - right) < 1e-2, f"one picture off by 0.2 and one by 0.02 are {right:.2f} dB, not {got:.2f}: the mean of the squares, over all of it"


def aligned_crops(attempt: Callable[..., Any]) -> None:
    small = torch.arange(3 * 6 * 6.0).view(3, 6, 6)
    for scale in (2, 4):
        large = small.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
        big, little = attempt(large, small, 1, 3, 2)
        assert torch.equal(little, small[:, 1:3, 3:5]), "the small crop is rows top to top + side, columns left to left + side"
        assert big.shape == (3, 2 * scale, 2 * scale), f"the large crop is {2 * scale} pixels wide here, not {tuple(big.shape[1:])}"
        blown_up = little.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
        assert torch.equal(big, blown_up), "the large crop shows another part: offsets need the factor too"


def gaussian(attempt: Callable[..., Any]) -> None:
    for sigma, size in ((0.6, 3), (1.5, 7)):
        got = attempt(sigma, size)
        assert got.shape == (size, size), f"the kernel must be ({size}, {size}), not {tuple(got.shape)}"
        assert abs(float(got.sum()) - 1) < 1e-5, f"the kernel sums to {float(got.sum()):.3f}: it must sum to 1, or the picture gets brighter or darker"
        middle = size // 2
        for down, across in ((0, 1), (1, 1), (0, middle)):
            ratio, right = float(got[middle + down, middle + across] / got[middle, middle]), math.exp(-(down**2 + across**2) / (2 * sigma**2))
            where = f"{down} down and {across} across from the middle the weight falls to {right:.3f} of it, not {ratio:.3f}"
            assert abs(ratio - right) < 1e-4, f"{where}: exp of minus r^2 over 2 sigma^2"
        assert torch.allclose(got, got.T) and torch.allclose(got, got.flip(0)), "the kernel must be the same in all directions: its middle is at size // 2"


# ---- 08 the whole of unCLIP ----


def training_order(attempt: Callable[..., Any]) -> None:
    chain: dict[str, list[str]] = {"decoder": ["clip"], "prior": ["clip"], "upsampler": [], "clip": []}
    for needs in (chain, {"c": ["b"], "b": ["a"], "a": []}, {"x": ["y", "z"], "y": ["z"], "z": []}):
        order = list(attempt({stage: list(first) for stage, first in needs.items()}))
        assert sorted(order) == sorted(needs), f"every stage once: {order} for {sorted(needs)}"
        for place, stage in enumerate(order):
            missing = [need for need in needs[stage] if need not in order[:place]]
            assert not missing, f"{stage!r} comes before {missing[0]!r}, which it needs: {order}"


def noise_for(attempt: Callable[..., Any]) -> None:
    both, alone = attempt([3, 8], (2, 5)), attempt([8], (2, 5))
    assert both.shape == (2, 2, 5), f"two seeds and a shape (2, 5) give (2, 2, 5), not {tuple(both.shape)}"
    assert torch.equal(both[1], alone[0]), "seed 8 gives other noise alone than beside seed 3: each seed needs a generator of its own"
    assert not torch.equal(both[0], both[1]), "different seeds must give different noise"
    many = attempt(list(range(40)), (50,))
    assert abs(float(many.mean())) < 0.1 and abs(float(many.std()) - 1) < 0.1, "the noise must be Gaussian, of mean 0 and deviation 1: torch.randn"


def all_at_once(attempt: Callable[..., Any]) -> None:
    for p, n, target in (([0.9, 0.8], 2, 0.81), ([0.95] * 8, 8, 0.8), ([0.9, 0.8], 4, 0.5)):
        chance, share = attempt(p, n, target)
        assert abs(chance - math.prod(p)) < 1e-9, f"with {p} all are right with a chance of {math.prod(p):.4f}, not {chance}: chances multiply"
        assert abs(share**n - target) < 1e-9, f"{n} shares of {share} multiply to {share**n:.4f}, not to {target}: take the n-th root"


# ---- 09 variations, interpolations, text diffs ----


def direction(attempt: Callable[..., Any]) -> None:
    before, after = _pairs(5, 9)
    got = attempt(before, after)
    assert got.shape == before.shape, f"one direction for each pair, {tuple(before.shape)}, not {tuple(got.shape)}"
    assert torch.allclose(got.norm(dim=1), torch.ones(5), atol=1e-5), "each direction must have length one: divide by the norm of its own row"
    cosine = torch.nn.functional.cosine_similarity(got, after - before, dim=1)
    assert torch.allclose(cosine, torch.ones(5), atol=1e-4), "it must point from the first to the second: what is added is the second minus the first"


def straight_length(attempt: Callable[..., Any]) -> None:
    for n, share in ((3072, 0.5), (100, 0.0), (100, 0.25)):
        right, got = math.sqrt(n * ((1 - share) ** 2 + share**2)), float(attempt(n, share))
        assert abs(got - right) < 1e-4, f"at {share} between noises of {n} numbers the length is {right:.2f}, not {got:.2f}: the parts are at right angles"


def great_circle(attempt: Callable[..., Any]) -> None:
    vectors, _ = _pairs(4, 11)
    for a, b in (vectors[:2], vectors[2:]):
        for share in (0.0, 0.3, 1.0):
            got, cosine = attempt(a, b, share), torch.acos(a @ b)
            assert abs(float(got.norm()) - 1) < 1e-4, f"at {share} the length is {float(got.norm()):.3f}: on the circle it stays one"
            assert abs(float(torch.acos((got @ a).clamp(-1, 1)) - share * cosine)) < 1e-3, f"at {share} the angle to a must be that share of the whole angle"
        assert torch.allclose(attempt(a, b, 1.0), b, atol=1e-3), "at share 1 it must arrive at b: there are many circles through a, and one through both"
    assert torch.allclose(attempt(vectors[0], vectors[0].clone(), 0.5), vectors[0], atol=1e-4), "between a vector and itself is that vector, and no nan"


# ---- 10 probing CLIP's space ----


def neighbours(attempt: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(12)
    gallery = torch.randn(30, 6, generator=generator) * torch.linspace(0.2, 5, 30)[:, None]  # some long, some short
    queries = gallery[[4, 20]] * 3
    got = torch.as_tensor(attempt(queries, gallery, 5))
    assert got.shape == (2, 5), f"five indices for each of two queries, (2, 5), not {tuple(got.shape)}"
    cosine = torch.nn.functional.cosine_similarity(queries[:, None], gallery[None], dim=2)
    assert got[:, 0].tolist() == [4, 20], "these queries point exactly along rows 4 and 20, which must come first: divide by the lengths, largest first"
    assert torch.equal(got, cosine.topk(5).indices), "by cosine the order is another: bring queries and gallery to length one, then sort from large to small"


def close_gap(attempt: Callable[..., Any]) -> None:
    z_i, z_t = _pairs(50, 13)
    z_t = torch.nn.functional.normalize(z_t + torch.linspace(-0.5, 0.7, 16), dim=1)
    mean_t, mean_i = z_t.mean(dim=0), z_i.mean(dim=0)
    got = attempt(z_t, mean_t, mean_i)
    assert torch.allclose(got.norm(dim=1), torch.ones(50), atol=1e-5), "embeddings have length one: normalise after the shift"
    before, after = float((mean_t - mean_i).norm()), float((got.mean(dim=0) - mean_i).norm())
    assert after < 0.5 * before, f"the means were {before:.2f} apart and are {after:.2f} apart now: add the pictures' mean, take away the captions'"
    right = torch.nn.functional.normalize(z_t - mean_t + mean_i, dim=1)
    assert torch.allclose(got, right, atol=1e-5), "each embedding is moved by the same vector, then divided by its own length"


def ridge(attempt: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(14)
    Z, labels = torch.randn(40, 8, generator=generator), torch.randint(3, (40,), generator=generator)
    Y = torch.nn.functional.one_hot(labels, 3).float()
    for penalty in (0.001, 10.0):
        got = attempt(Z, Y, penalty)
        assert got.shape == (8, 3), f"the weights are (d, classes) = (8, 3), not {tuple(got.shape)}"
        # at the minimum of |Z W - Y|^2 + penalty |W|^2 the gradient vanishes
        slope = float((Z.T @ (Z @ got - Y) + penalty * got).abs().max())
        assert slope < 1e-3, f"with a penalty of {penalty} these weights are not the minimum (the slope there is {slope:.2g}): add the penalty to the diagonal"


# ---- 11 evaluation and the baselines ----


def frechet_1d(attempt: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(21)
    for sizes, shift, spread in (((5, 9), 2.0, 1.0), ((40, 40), 0.0, 3.0), ((7, 6), -1.0, 0.5)):
        a, b = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
        b = shift + spread * b
        right, got = float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2), float(attempt(a.tolist(), b.tolist()))
        roots = float((a.mean() - b.mean()) ** 2 + (a.var() - b.var()) ** 2)
        assert abs(got - roots) > 1e-6, "this takes the difference of the variances: take that of the standard deviations"
        assert abs(got - right) < 1e-6, f"the distance is {right:.4f}, not {got:.4f}: both squares, of means and of deviations, with n - 1 below the variance"


def recall_of(attempt: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(22)
    for real_count, made_count, k in ((40, 30, 3), (25, 50, 1)):
        real, made = torch.randn(real_count, 3, generator=generator), 0.5 * torch.randn(made_count, 3, generator=generator)
        precision, recall = precision_recall(real, made, k)
        got = float(attempt(real, made, k))
        assert abs(got - precision) > 1e-6, "this is precision: count real points, within the reach of generated ones"
        assert abs(got - recall) < 1e-6, (
            f"the share is {recall:.3f}, not {got:.3f}: each generated point reaches to its k-th other neighbour, itself not counted"
        )


def answers_needed(attempt: Callable[..., Any]) -> None:
    for share in (0.57, 0.453, 0.7, 0.52):
        got = attempt(share)
        far = abs(share - 0.5)
        assert got == int(got) and 1.96 * math.sqrt(share * (1 - share) / got) < far, f"with {got} answers the interval of {share:.1%} still reaches 50 %"
        assert 1.96 * math.sqrt(share * (1 - share) / (got - 1)) >= far, f"{got} answers are more than {share:.1%} needs: find the smallest number"


# ---- 12 safety, provenance, bias ----


def threshold_for(attempt: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(15)
    for count, recall in ((40, 0.9), (41, 1.0), (25, 0.5)):
        labels = torch.rand(count, generator=generator) < 0.4
        scores = torch.randn(count, generator=generator) + labels
        got = float(attempt(scores, labels, recall))
        found = float((scores[labels] >= got).float().mean())
        assert found >= recall - 1e-6, f"above {got:.3f} lie {found:.0%} of the true ones, not {recall:.0%}: take a lower threshold, and round their number up"
        higher = scores[labels][scores[labels] > got + 1e-6]
        assert len(higher) < recall * int(labels.sum()), f"{got:.3f} is lower than need be: every score above it still keeps the promise"


def weights_after_filter(attempt: Callable[..., Any]) -> None:
    before, after = {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 0.7, "b": 0.2, "c": 0.1}
    got = attempt(dict(before), dict(after))
    mean = sum(after[group] * got[group] for group in after)
    assert abs(mean - 1) < 1e-6, f"the mean weight of the filtered data is {mean:.3f}, not 1: divide by the sum of after x weight"
    for group in after:
        share = after[group] * got[group]
        assert abs(share - before[group]) < 1e-6, f"so {group!r} has a share of {share:.3f}, not {before[group]} as before: rare ones weigh more"
    got = attempt(dict(before), {"a": 0.8, "b": 0.2, "c": 0.0})
    assert not got.get("c"), "a group that was emptied has nothing to weigh: leave it out"
    mean = 0.8 * got["a"] + 0.2 * got["b"]
    assert abs(mean - 1) < 1e-6, f"with one group emptied the mean weight is {mean:.3f}, not 1: divide by the sum of after x weight of those that are left"


def chance_of(attempt: Callable[..., Any]) -> None:
    for k, n, p in ((3, 5, 0.5), (0, 4, 0.3), (20, 128, 0.1), (4, 4, 0.25)):
        right, got = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1)), float(attempt(k, n, p))
        exactly = math.comb(n, k) * p**k * (1 - p) ** (n - k)
        assert right - exactly < 1e-12 or abs(got - exactly) > 1e-9, f"this is the chance of exactly {k} of {n}: add those of more"
        assert abs(got - right) < 1e-9, f"{k} or more of {n} at {p}: {right:.4f}, not {got:.4f}; each way of choosing which i are red has p^i (1 - p)^(n - i)"


def both_errors(attempt: Callable[..., Any]) -> None:
    for hits, missed, alarms, quiet in ((90, 10, 30, 870), (8, 2, 1, 29), (48, 2, 52, 148)):
        harmful, harmless, kept = hits + missed, alarms + quiet, missed + quiet
        got = attempt(hits / (hits + alarms), hits / harmful, harmful / (harmful + harmless))
        assert isinstance(got, tuple | list) and len(got) == 2, f"return two shares, of what is let through and of what is harmless, not {got}"
        found = f"{hits} of {harmful} harmful pictures are thrown out, and {alarms} of {harmless} harmless ones"
        left, lost = missed / kept, alarms / harmless
        assert abs(got[0] - left) < 1e-9, f"{found}: of the {kept} that are let through {missed} are harmful, {left:.4f}, not {got[0]:.4f}"
        assert abs(got[1] - lost) < 1e-9, f"{found}: the second share is {lost:.4f}, not {got[1]:.4f}; flagged are base x recall / precision of all"


# ---- 13 your own pictures, one GPU and many ----


def parts_needed(attempt: Callable[..., Any]) -> None:
    cases = [
        ((10, 100, 1000, 8), 1),
        ((10, 100, 700, 8), 2),
        ((10, 100, 410, 12), 6),
        ((10, 100, 470, 8), 4),
        ((10, 100, 299, 8), None),
        ((10, 100, 300, 6), 6),
    ]
    for given, right in cases:
        got = attempt(*given)
        told = "{} parameters, {} bytes an example, {} bytes, a batch of {}".format(*given)
        assert got == right, f"with {told}: {right} parts, not {got}: 20 bytes a parameter, then batch / parts examples at once; parts must divide the batch"


def combine(attempt: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(16)
    examples, sizes = torch.randn(10, 4, generator=generator), [5, 3, 2]
    parts = [part.mean(dim=0) for part in examples.split(sizes)]
    got, right = attempt([part.clone() for part in parts], list(sizes)), examples.mean(dim=0)
    assert not torch.allclose(got, sum(parts) / 3, atol=1e-6), "this is the mean of the parts: one of five examples must count more than one of two"
    assert torch.allclose(got, right, atol=1e-5), "each part's gradient counts as often as it has examples; divide by their total"


def efficiency(attempt: Callable[..., Any]) -> None:
    for compute, size, ranks, bandwidth in ((10.0, 7e9, 8, 25e9), (1.0, 1e9, 64, 1e9), (3.0, 2e9, 1, 1e9)):
        right, got = compute / (compute + 2 * (ranks - 1) * size / bandwidth), float(attempt(compute, size, ranks, bandwidth))
        assert abs(got - right) < 1e-9, f"{ranks} ranks, {compute} s, {size:g} bytes at {bandwidth:g} bytes/s: {right:.4f}, not {got:.4f}; one rank alone has 1"


MAY_BE_NONE = {"parts_needed"}  # where nothing fits
CHECKS: dict[str, Callable[[Callable[..., Any]], None]] = {
    function.__name__: function
    for function in (
        *(slowest_stage, best_candidate, margin),
        *(most_frequent_pair, share_allowed, pad, bits),
        *(contrastive, recall_at, best_loss),
        *(crossing, x_0_from_epsilon, x_0_from_v, cosine_betas),
        *(components_kept, to_bucket, top_half),
        *(sequence, guided, latent_factor),
        *(drop_shares, context, guided_six),
        *(peak_ratio, aligned_crops, gaussian),
        *(training_order, noise_for, all_at_once),
        *(direction, straight_length, great_circle),
        *(neighbours, close_gap, ridge),
        *(frechet_1d, recall_of, answers_needed),
        *(threshold_for, weights_after_filter, chance_of, both_errors),
        *(parts_needed, combine, efficiency),
    )
}
