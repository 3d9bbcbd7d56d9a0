import json
import math
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch

from minunclip import course
from minunclip.course import CHECKS, MAY_BE_NONE, artefact, check, in_large, keep
from minunclip.data.captions import describes


def frechet(a, b, spread):
    return (statistics.mean(a) - statistics.mean(b)) ** 2 + (spread(a) - spread(b)) ** 2


def reached(points, by, k):
    radius = torch.cdist(by, by).sort(dim=1).values[:, k - 1]
    return float((torch.cdist(points, by) <= radius).any(dim=1).float().mean())


def stub(*_):
    raise NotImplementedError


def pick(z_t, candidates):
    return candidates[torch.arange(len(z_t)), torch.einsum("bd,bcd->bc", z_t, candidates).argmax(dim=1)]


def pairs_of(words, weight=lambda count: count):
    pairs = Counter()
    for word, count in words.items():
        for pair in zip(word, word[1:]):
            pairs[pair] += weight(count)
    return pairs


def padded(rows, fill=0):
    longest = max(map(len, rows))
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows]), mask


def one_way(logits):
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))


def betas(T, s=0.008):
    t = torch.arange(T + 1, dtype=torch.float64) / T
    alphas_bar = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    return 1 - alphas_bar[1:] / alphas_bar[:-1]


def bell(sigma, size, power=2, middle=None):
    offset = torch.arange(size) - (size // 2 if middle is None else middle)
    line = torch.exp(-(offset.abs() ** power) / (2 * sigma**2))
    return line[:, None] * line[None, :]


def circle(a, b, share, guard=1e-4):
    omega = torch.acos((a @ b).clamp(-1, 1))
    if torch.sin(omega) < guard:
        return (1 - share) * a + share * b
    return (torch.sin((1 - share) * omega) * a + torch.sin(share * omega) * b) / torch.sin(omega)


def ordered(needs):
    order = []
    while len(order) < len(needs):
        order.append(next(stage for stage in needs if stage not in order and all(need in order for need in needs[stage])))
    return order


def own_noise(seeds, shape, draw=torch.randn):
    return torch.stack([draw(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def crops(large, small, top, left, side, where=None, wide=None):
    s = large.shape[1] // small.shape[1]
    where, wide = s if where is None else where, s if wide is None else wide
    big = large[:, where * top : where * top + wide * side, where * left : where * left + wide * side]
    return big, small[:, top : top + side, left : left + side]


def unit(x):
    return torch.nn.functional.normalize(x, dim=1)


def ridge_weights(Z, Y, penalty):
    return torch.linalg.solve(Z.T @ Z + penalty * torch.eye(Z.shape[1]), Z.T @ Y)


def kept_above(scores, labels, recall, round_up=math.ceil):
    return scores[labels].sort(descending=True).values[max(1, round_up(recall * int(labels.sum()))) - 1]


def weighed(before, after, power=1):
    raw = {group: (before[group] / after[group]) ** power for group in after if after[group] > 0}
    return {group: weight / sum(after[g] * raw[g] for g in raw) for group, weight in raw.items()}


def binomial(k, n, p, ways=math.comb):
    return sum(ways(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def entropy(counts, log=math.log2):
    return sum(count / sum(counts) * log(sum(counts) / count) for count in counts if count)


def unmixed(x_t, v, alpha_bar, sign=-1):
    return alpha_bar[:, None].sqrt() * x_t + sign * (1 - alpha_bar[:, None]).sqrt() * v


def by_way_of_the_noise(x_t, v, alpha_bar):
    noise = (1 - alpha_bar[:, None]).sqrt() * x_t + alpha_bar[:, None].sqrt() * v
    return (x_t - (1 - alpha_bar[:, None]).sqrt() * noise) / alpha_bar[:, None].sqrt()


def filtered(precision, recall, base):
    flagged = base * recall / precision
    return base * (1 - recall) / (1 - flagged), flagged * (1 - precision) / (1 - base)


def fitting(parameters, activations, memory, batch, state=20, divides=True):
    options = (n for n in range(1, batch + 1) if batch % n == 0 or not divides)
    return next((n for n in options if state * parameters + batch / n * activations <= memory), None)


SOLUTIONS = {
    "slowest_stage": lambda seconds: max(seconds, key=seconds.get),
    "best_candidate": pick,
    "margin": lambda right, count: 1.96 * math.sqrt(right / count * (1 - right / count) / count),
    "most_frequent_pair": lambda words: min(pairs := pairs_of(words), key=lambda pair: (-pairs[pair], pair)),
    "share_allowed": lambda words, scenes: sum(describes(words, scene) for scene in scenes) / len(scenes),
    "pad": padded,
    "bits": entropy,
    "contrastive": lambda z_i, z_t, s: (one_way(s * z_i @ z_t.T) + one_way(s * z_t @ z_i.T)) / 2,
    "recall_at": lambda z_i, z_t, k: ((z_i @ z_t.T).topk(k).indices == torch.arange(len(z_i))[:, None]).any(dim=1).float().mean(),
    "best_loss": lambda s, B: -math.log(math.exp(s) / (math.exp(s) + (B - 1) * math.exp(-s))),
    "crossing": lambda: 49,
    "x_0_from_epsilon": lambda x_t, noise, a: (x_t - (1 - a[:, None]).sqrt() * noise) / a[:, None].sqrt(),
    "x_0_from_v": unmixed,
    "cosine_betas": lambda T: betas(T).clamp(max=0.999).float(),
    "components_kept": lambda values, tolerance: int((1 - values.cumsum(0) / values.sum() >= tolerance).sum()) + 1,
    "to_bucket": lambda v, low, high, n: ((v - low) / (high - low) * n).floor().clamp(0, n - 1).long(),
    "top_half": lambda p: 2 * torch.minimum((p.cumsum(0) - 0.5).clamp(min=0), p),
    "sequence": lambda text, *singles: torch.cat([text, torch.stack(singles, dim=1)], dim=1),
    "guided": lambda c, u, w: u + w * (c - u),
    "latent_factor": lambda d: math.sqrt(d),
    "peak_ratio": lambda a, b: 10 * torch.log10(4 / (a - b).square().mean()),
    "aligned_crops": crops,
    "gaussian": lambda sigma, size: bell(sigma, size) / bell(sigma, size).sum(),
    "training_order": ordered,
    "noise_for": own_noise,
    "all_at_once": lambda p, n, target: (math.prod(p), target ** (1 / n)),
    "direction": lambda a, b: torch.nn.functional.normalize(b - a, dim=1),
    "straight_length": lambda n, share: math.sqrt(n * ((1 - share) ** 2 + share**2)),
    "great_circle": circle,
    "neighbours": lambda q, g, k: (unit(q) @ unit(g).T).topk(k).indices,
    "close_gap": lambda z_t, mean_t, mean_i: unit(z_t - mean_t + mean_i),
    "ridge": ridge_weights,
    "frechet_1d": lambda a, b: frechet(a, b, statistics.stdev),
    "recall_of": lambda real, made, k: reached(real, made, k + 1),
    "answers_needed": lambda p: math.floor(1.96**2 * p * (1 - p) / (p - 0.5) ** 2) + 1,
    "threshold_for": kept_above,
    "weights_after_filter": weighed,
    "chance_of": binomial,
    "both_errors": filtered,
    "parts_needed": fitting,
    "combine": lambda gradients, sizes: sum(n * g for n, g in zip(sizes, gradients)) / sum(sizes),
    "efficiency": lambda c, size, n, w: c / (c + 2 * (n - 1) * size / w),
    "drop_shares": lambda z, y: ((1 - z) * (1 - y), (1 - z) * y, z * (1 - y), z * y),
    "context": lambda text, mask, p: (torch.cat([text, p.view(len(p), 4, -1)], dim=1), torch.cat([mask, torch.ones(len(p), 4, dtype=torch.bool)], dim=1)),
    "guided_six": lambda c, u, w: torch.cat([(u + w * (c - u))[:, :3], c[:, 3:]], dim=1),
}
MUTANTS = {  # plausible wrong answers, and what the student is told
    "slowest_stage": [(lambda seconds: max(seconds.values()), "the key"), (lambda seconds: max(seconds), "slowest"), (lambda _: "decoder", "slowest")],
    "best_candidate": [
        (lambda z_t, candidates: candidates[:, 0], "its own best"),
        (lambda z_t, candidates: pick(-z_t, candidates), "largest"),
        (lambda z_t, candidates: torch.einsum("bd,bcd->bc", z_t, candidates).argmax(dim=1), "one embedding"),
    ],
    "margin": [
        (lambda right, count: 1.96 * math.sqrt(right / count * (1 - right / count)), "margin"),
        (lambda right, count: math.sqrt(right / count * (1 - right / count) / count), "1.96"),
        (lambda right, count: 1.96 / math.sqrt(count), "p \\(1 - p\\)"),
        (lambda right, count: 1.96 * math.sqrt(right / count * (1 - right / count) / (count - 1)), "/ n"),
    ],
    "most_frequent_pair": [
        (lambda words: pairs_of(words, lambda count: 1).most_common(1)[0][0], "as often as its word"),
        (lambda words: min(pairs := pairs_of(words), key=lambda pair: (pairs[pair], pair)), "most frequent"),
        (lambda words: max(pairs := pairs_of(words), key=lambda pair: (pairs[pair], pair)), "lowest"),
        (lambda words: min(pairs := pairs_of(words, lambda count: 1), key=lambda pair: (-pairs[pair], pair)), "as often as its word"),
    ],
    "share_allowed": [
        (lambda words, scenes: sum(describes(words, scene) for scene in scenes), "divide"),
        (lambda words, scenes: 1 - sum(describes(words, scene) for scene in scenes) / len(scenes), "true of"),
    ],
    "pad": [
        (lambda rows: padded(rows, fill=1), "filled up with 0"),
        (lambda rows: (padded(rows)[0], ~padded(rows)[1]), "True on real"),
        (lambda rows: (padded(rows)[0], padded(rows)[1].int()), "booleans"),
        (lambda rows: (padded(rows)[0].float(), padded(rows)[1]), "whole"),
    ],
    "bits": [
        (lambda counts: entropy(counts, math.log), "base 2"),
        (lambda counts: sum(counts) * entropy(counts), "divide by their number"),
        (lambda counts: statistics.mean(math.log2(sum(counts) / count) for count in counts if count), "as often as it occurs"),
        (lambda counts: math.log2(len(counts)), "share p"),
        (lambda counts: -entropy(counts), "not -1"),
    ],
    "contrastive": [
        (lambda z_i, z_t, s: one_way(s * z_i @ z_t.T), "ask each caption"),
        (lambda z_i, z_t, s: one_way(s * z_i @ z_t.T) + one_way(s * z_t @ z_i.T), "mean"),
        (lambda z_i, z_t, s: (one_way(z_i @ z_t.T) + one_way(z_t @ z_i.T)) / 2, "the loss is"),
    ],
    "recall_at": [
        (lambda z_i, z_t, k: ((z_i @ z_t.T).argmax(dim=1) == torch.arange(len(z_i))).float().mean(), "k = 3"),
        (lambda z_i, z_t, k: ((-z_i @ z_t.T).topk(k).indices == torch.arange(len(z_i))[:, None]).any(dim=1).float().mean(), "largest"),
    ],
    "best_loss": [
        (lambda s, B: math.log(B), "the others|others"),
        (lambda s, B: -math.log(math.exp(s) / (math.exp(s) + B * math.exp(-s))), "B - 1"),
    ],
    "crossing": [
        (lambda: 0.3, "no timestep"),  # the height at which they meet
        (lambda: 0.5, "no timestep"),
        (lambda: 100, "no timestep"),
        (lambda: 20, "as high"),
        (lambda: 90, "as high"),
    ],
    "x_0_from_epsilon": [
        (lambda x_t, noise, a: x_t - (1 - a[:, None]).sqrt() * noise, "undo the shrinking"),
        (lambda x_t, noise, a: (x_t - noise) / a[:, None].sqrt(), "strength"),
    ],
    "x_0_from_v": [
        (by_way_of_the_noise, "divides by 0"),
        (lambda x_t, v, a: unmixed(x_t, v, a, sign=1), "with a minus"),
        (lambda x_t, v, a: unmixed(v, x_t, a, sign=1), "this is the noise"),
        (lambda x_t, v, a: a[:, None] * x_t - (1 - a[:, None]) * v, "root of alpha_bar"),
        (lambda x_t, v, a: (x_t - (1 - a[:, None]).sqrt() * v) / a[:, None].sqrt().clamp(min=1e-8), "root of alpha_bar"),
        (lambda x_t, v, a: a.sqrt() @ x_t - (1 - a).sqrt() @ v, "second axis"),
    ],
    "cosine_betas": [
        (lambda T: betas(T), "0.999"),
        (lambda T: betas(T, s=0.0).clamp(max=0.999), "0.008"),
        (lambda T: betas(T).clamp(max=0.99), "no less"),
        (lambda T: torch.cos(torch.arange(T + 1) / T * math.pi / 2) ** 2, "one less"),
    ],
    "components_kept": [
        (lambda values, tolerance: int((1 - values.cumsum(0) / values.sum() >= tolerance).sum()), "fewest"),
        (lambda values, tolerance: int((values / values.sum() >= tolerance).sum()), "fewest"),
    ],
    "to_bucket": [
        (lambda v, low, high, n: ((v - low) / (high - low) * n).floor().long(), "clamp"),
        (lambda v, low, high, n: ((v - low) / (high - low) * (n - 1)).round().clamp(0, n - 1).long(), "round down"),
        (lambda v, low, high, n: ((v - low) / (high - low) * n).floor().clamp(0, n - 1), "whole numbers"),
    ],
    "top_half": [
        (lambda p: torch.where(torch.arange(len(p)) >= len(p) // 2, p, 0) / p[len(p) // 2 :].sum(), "half of the probability"),
        (lambda p: torch.where(p.cumsum(0) > 0.5, p, 0), "sum to one"),
    ],
    "sequence": [
        (lambda text, *singles: torch.cat([torch.stack(singles, dim=1), text], dim=1), "text comes first"),
        (lambda text, z_t, t, noised, last: torch.cat([text, torch.stack([t, z_t, noised, last], dim=1)], dim=1), "z_t belongs"),
        (lambda text, *singles: torch.cat([text, sum(singles)[:, None]], dim=1), "L \\+ 4"),
    ],
    "guided": [(lambda c, u, w: c + w * (c - u), "w times the way"), (lambda c, u, w: w * c + u, "w times the way")],
    "peak_ratio": [
        (lambda a, b: 10 * torch.log10(1 / (a - b).square().mean()), "peak squared"),
        (lambda a, b: 10 * torch.log10(2 / (a - b).square().mean()), "peak squared"),
        (lambda a, b: 10 * torch.log(4 / (a - b).square().mean()), "log10"),
        (lambda a, b: 20 * torch.log10(2 / (a - b).abs().mean()), "mean of the squares"),
        (lambda a, b: (10 * torch.log10(4 / (a - b).square().flatten(1).mean(dim=1))).mean(), "over all of it"),
    ],
    "aligned_crops": [
        (lambda *given: crops(*given, where=1), "factor too"),
        (lambda *given: crops(*given, wide=1), "pixels wide"),
        (lambda large, small, top, left, side: crops(large, small, left, top, side), "rows top"),
    ],
    "gaussian": [
        (lambda sigma, size: bell(sigma, size), "sum to 1"),
        (lambda sigma, size: bell(sigma, size) / bell(sigma, size).max(), "sum to 1"),
        (lambda sigma, size: bell(sigma * 2, size) / bell(sigma * 2, size).sum(), "falls to"),
        (lambda sigma, size: bell(sigma, size, middle=0) / bell(sigma, size, middle=0).sum(), "falls to"),
        (lambda sigma, size: bell(sigma, size, power=1) / bell(sigma, size, power=1).sum(), "falls to"),
    ],
    "training_order": [
        (lambda needs: list(needs), "comes before"),
        (lambda needs: sorted(needs, key=lambda stage: len(needs[stage]), reverse=True), "comes before"),
        (lambda needs: [stage for stage in needs if not needs[stage]], "every stage once"),
        (lambda needs: [needs[stage].clear() or stage for stage in needs], "comes before"),  # nothing is needed any more
    ],
    "noise_for": [
        (lambda seeds, shape: torch.randn(len(seeds), *shape, generator=torch.Generator().manual_seed(seeds[0])), "of its own"),
        (lambda seeds, shape: own_noise([0] * len(seeds), shape), "different seeds"),
        (lambda seeds, shape: own_noise(seeds, shape, torch.rand), "Gaussian"),
    ],
    "all_at_once": [
        (lambda p, n, target: (sum(p) / len(p), target ** (1 / n)), "multiply"),
        (lambda p, n, target: (min(p), target ** (1 / n)), "multiply"),
        (lambda p, n, target: (math.prod(p), target / n), "root"),
        (lambda p, n, target: (math.prod(p), target ** (1 / len(p))), "n-th root"),
    ],
    "direction": [
        (lambda a, b: b - a, "length one"),
        (lambda a, b: torch.nn.functional.normalize(a - b, dim=1), "from the first"),
        (lambda a, b: (b - a) / (b - a).norm(), "length one"),
    ],
    "straight_length": [
        (lambda n, share: math.sqrt(n), "right angles"),
        (lambda n, share: math.sqrt(n) * (1 - share), "right angles"),
        (lambda n, share: n * ((1 - share) ** 2 + share**2), "right angles"),
    ],
    "great_circle": [
        (lambda a, b, share: (1 - share) * a + share * b, "stays one"),
        (lambda a, b, share: torch.nn.functional.normalize((1 - share) * a + share * b, dim=0), "share of the whole angle"),
        (lambda a, b, share: circle(a, b, 1 - share), "share of the whole angle"),
        (lambda a, b, share: 2 * (circle(a, b, share) @ a) * a - circle(a, b, share) if not torch.equal(a, b) else a, "arrive at b"),
        (lambda a, b, share: circle(a, b, share, guard=-1) / (1 if not torch.equal(a, b) else math.nan), "nan"),
    ],
    "drop_shares": [
        (lambda z, y: ((1 - z) * (1 - y), z * (1 - y), (1 - z) * y, z * y), "order"),
        (lambda z, y: (z * y, z * (1 - y), (1 - z) * y, (1 - z) * (1 - y)), "order"),
        (lambda z, y: (1 - z, 1 - y, z, y), "sum to one"),
    ],
    "context": [
        (lambda text, mask, p: (torch.cat([p.view(len(p), 4, -1), text], dim=1), mask), "first"),
        (lambda text, mask, p: (torch.cat([text, p.view(len(p), -1, 4).mT], dim=1), mask), "neighbouring"),
        (lambda text, mask, p: (torch.cat([text, p.view(len(p), 4, -1)], dim=1), torch.ones(len(p), 7, dtype=torch.bool)), "padding"),
        (lambda text, mask, p: (torch.cat([text, p.view(len(p), 4, -1)], dim=1), torch.cat([mask, torch.zeros(len(p), 4).bool()], dim=1)), "always"),
    ],
    "guided_six": [
        (lambda c, u, w: u + w * (c - u), "not guided"),
        (lambda c, u, w: torch.cat([(c + w * (c - u))[:, :3], c[:, 3:]], dim=1), "w times the way"),
        (lambda c, u, w: (u + w * (c - u))[:, :3], "six channels"),
        (lambda c, u, w: torch.cat([(u + w * (c - u))[:, :3], u[:, 3:]], dim=1), "condition"),
    ],
    "neighbours": [
        (lambda q, g, k: (q @ g.T).topk(k).indices, "divide by the lengths"),
        (lambda q, g, k: (unit(q) @ unit(g).T).topk(k, largest=False).indices, "largest first"),
        (lambda q, g, k: (unit(q) @ unit(g).T).topk(k).values, "divide by the lengths"),
        (lambda q, g, k: torch.cat([(unit(q) @ unit(g).T).topk(1).indices, (q @ g.T).topk(k).indices[:, : k - 1]], dim=1), "another"),
    ],
    "close_gap": [
        (lambda z_t, mean_t, mean_i: z_t - mean_t + mean_i, "normalise"),
        (lambda z_t, mean_t, mean_i: unit(z_t + mean_t - mean_i), "take away"),
        (lambda z_t, mean_t, mean_i: unit(z_t), "take away"),
        (lambda z_t, mean_t, mean_i: unit(unit(z_t - mean_t) + mean_i), "same vector"),
    ],
    "frechet_1d": [
        (lambda a, b: frechet(a, b, statistics.variance), "standard deviations"),
        (lambda a, b: frechet(a, b, statistics.pstdev), "n - 1"),
        (lambda a, b: abs(statistics.mean(a) - statistics.mean(b)) + abs(statistics.stdev(a) - statistics.stdev(b)), "both squares"),
    ],
    "recall_of": [
        (lambda real, made, k: reached(made, real, k + 1), "precision"),
        (lambda real, made, k: reached(real, made, k), "itself not counted"),
    ],
    "answers_needed": [
        (lambda p: math.ceil(1.96**2 * p * (1 - p) / (p - 0.5) ** 2) + 5, "smallest"),
        (lambda p: math.floor(1.96**2 * p * (1 - p) / (p - 0.5) ** 2), "still reaches"),
        (lambda p: 1.96**2 * p * (1 - p) / (p - 0.5) ** 2 + 0.5, "still reaches"),
    ],
    "ridge": [
        (lambda Z, Y, penalty: ridge_weights(Z, Y, 0.0), "diagonal"),
        (lambda Z, Y, penalty: ridge_weights(Z, Y, penalty).T, "classes"),
        (lambda Z, Y, penalty: torch.linalg.solve(Z.T @ Z + penalty, Z.T @ Y), "diagonal"),
    ],
    "threshold_for": [
        (lambda scores, labels, recall: scores.quantile(1 - recall), "lower threshold|lower than need be"),
        (lambda scores, labels, recall: kept_above(scores, labels, recall, math.floor), "round their number up"),
        (lambda scores, labels, recall: scores.min(), "lower than need be"),
        (lambda scores, labels, recall: kept_above(scores, ~labels, recall), "lower threshold|lower than need be"),
    ],
    "weights_after_filter": [
        (lambda before, after: {group: before[group] / sum(before.values()) for group in after}, "mean weight"),
        (lambda before, after: {group: before[group] / after[group] if after[group] else 0.0 for group in after}, "one group emptied"),
        (lambda before, after: {**dict.fromkeys(after, 1.0), **weighed(before, after)}, "was emptied"),
        (lambda before, after: weighed(before, after, power=-1), "rare ones"),
        (lambda before, after: weighed(before, after, power=0), "rare ones"),
    ],
    "chance_of": [
        (lambda k, n, p: math.comb(n, k) * p**k * (1 - p) ** (n - k), "exactly"),
        (lambda k, n, p: binomial(k + 1, n, p), "or more"),
        (lambda k, n, p: binomial(k, n, p, lambda n, i: 1), "each way"),
    ],
    "both_errors": [
        (lambda p, r, b: filtered(p, r, b)[0], "two shares"),
        (lambda p, r, b: (1 - r, filtered(p, r, b)[1]), "of the 880 that are let through"),
        (lambda p, r, b: (b * (1 - r), filtered(p, r, b)[1]), "of the 880 that are let through"),
        (lambda p, r, b: (b * (1 - r) / (1 - b * r), filtered(p, r, b)[1]), "of the 880 that are let through"),
        (lambda p, r, b: filtered(p, r, b)[::-1], "of the 880 that are let through"),
        (lambda p, r, b: (filtered(p, r, b)[0], 1 - p), "0.0333, not 0.2500"),
        (lambda p, r, b: (filtered(p, r, b)[0], b * r / p - b * r), "0.0333, not 0.0300"),
    ],
    "parts_needed": [
        (lambda *given: fitting(*given, state=4), "20 bytes"),
        (lambda *given: fitting(*given, divides=False), "must divide"),
        (lambda *given: fitting(*given) or 8, "None parts"),
    ],
    "combine": [
        (lambda gradients, sizes: sum(gradients) / len(gradients), "mean of the parts"),
        (lambda gradients, sizes: sum(n * g for n, g in zip(sizes, gradients)), "total"),
        (lambda gradients, sizes: sum(gradients), "as often"),
    ],
    "efficiency": [
        (lambda c, size, n, w: c / n + 2 * (n - 1) / n * size / w, "one rank alone"),
        (lambda c, size, n, w: c / (c + 2 * (n - 1) / n * size / w), "not"),
        (lambda c, size, n, w: c / (c / n + 2 * (n - 1) / n * size / w), "not"),
    ],
    "latent_factor": [(lambda d: d, "mean square"), (lambda d: 17.2, "mean square"), (lambda d: 1 / math.sqrt(d), "mean square")],
}


def test_every_exercise_has_a_solution_and_mutants():
    assert set(CHECKS) == set(SOLUTIONS) == set(MUTANTS) and all(len(mutants) >= 2 for mutants in MUTANTS.values())


@pytest.mark.parametrize("exercise", CHECKS)
def test_a_check_passes_the_solution_and_is_soft_on_the_stub(exercise, capsys):
    assert check(exercise, SOLUTIONS[exercise]) and "right" in capsys.readouterr().out
    assert not check(exercise, stub) and "not attempted yet" in capsys.readouterr().out


@pytest.mark.parametrize(("exercise", "mutant", "said"), [(name, *pair) for name, pairs in MUTANTS.items() for pair in pairs])
def test_a_check_explains_what_is_wrong(exercise, mutant, said):
    with pytest.raises(AssertionError, match=said):
        check(exercise, mutant)


@pytest.mark.parametrize("exercise", sorted(set(CHECKS) - MAY_BE_NONE))
def test_whoever_forgets_to_return_is_told_so(exercise):
    with pytest.raises(AssertionError, match="gives nothing back"):
        check(exercise, lambda *given: None)


def test_an_unknown_exercise_is_named():
    with pytest.raises(ValueError, match="best_candidate"):
        check("nothing", stub)


def test_what_one_notebook_keeps_another_finds_and_else_what_ships(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shipped = tmp_path / "weights" / "prior"
    assert artefact("05_prior.txt", shipped) == shipped
    assert capsys.readouterr().out == "05_prior.txt: not there, as notebook 05 has not come to its end here; the shipped prior takes its place\n"
    keep("05_prior.txt", lambda path: path.write_text("mine"))
    assert artefact("05_prior.txt", shipped).read_text() == "mine"
    assert capsys.readouterr().out == "wrote artefacts/05_prior.txt\n05_prior.txt: yours, of notebook 05\n"
    half = tmp_path / "artefacts" / "05_prior"  # of a folder whose notebook runs beside this one the weights are there, the config is not
    half.mkdir()
    (half / "model.safetensors").touch()
    assert artefact("05_prior", shipped) == shipped
    (half / "config.json").touch()
    assert artefact("05_prior", shipped) == Path("artefacts/05_prior")


def test_an_artefact_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keep("05_prior.txt", lambda path: path.write_text("old"))

    def half(path):
        path.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep("05_prior.txt", half)
    assert [path.name for path in (tmp_path / "artefacts").iterdir()] == ["05_prior.txt"]
    assert (tmp_path / "artefacts" / "05_prior.txt").read_text() == "old"


def test_what_an_experiment_has_found_is_shown_or_said_to_be_missing(tmp_path, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda markdown: shown.append(markdown.data))
    kept = json.loads((course.RESULTS / "compared.json").read_text())["table"]
    table = in_large("compared", ("FID", "recall"), {"GLIDE": 12.24})
    assert capsys.readouterr().out == "results/compared.json: 300 captions or pictures on each of 3 seeds\n"
    assert table["GLIDE"] == {key: kept["GLIDE"][key] for key in ("FID", "± FID", "recall", "± recall")}
    (text,) = shown
    assert text.startswith("| | FID | recall |\n") and f"| GLIDE (the paper's FID: 12.24) | {kept['GLIDE']['FID']:.3f} ± " in text
    assert in_large("words-alone", ("word believed",)) and "200 captions or pictures" in capsys.readouterr().out
    monkeypatch.setattr(course, "RESULTS", tmp_path)
    assert in_large("compared", ("FID",)) == {} and "results/compared.json is missing" in capsys.readouterr().out
