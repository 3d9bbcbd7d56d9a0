import numpy as np
import pytest
import torch

from minunclip.data.captions import SYNONYMS, Report, describes, parse
from minunclip.data.scenes import is_held_out, sample_scenes
from minunclip.evaluation import CHANCE, accuracy, diversity, frechet_distance, held_out_captions, kernel_distance, precision_recall, retrieval


def _with_moments(mean, root, count=400):
    """Features whose sample mean and covariance are exactly `mean` and root @ root.T."""
    white = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    white = white - white.mean(dim=0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T
    return mean + white @ root.T


def test_frechet_distance_of_gaussians_along_the_axes_has_a_closed_form():
    mean_a, mean_b = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    deviation_a, deviation_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 1.0, 0.5]).double()
    expected = (mean_a - mean_b).square().sum() + (deviation_a - deviation_b).square().sum()
    found = frechet_distance(_with_moments(mean_a, deviation_a.diag()), _with_moments(mean_b, deviation_b.diag()))
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_agrees_with_scipy_and_is_symmetric():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(80, 5)) + 0.3
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(torch.from_numpy(b), torch.from_numpy(a)) == pytest.approx(expected, rel=1e-7)


def test_frechet_distance_of_fewer_pictures_than_features_is_finite_and_zero_to_itself():
    features = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-5)


class Features(torch.nn.Module):
    """What torchmetrics calls a network: it takes features for pictures, and leaves them as they are."""

    num_features = 5

    def forward(self, features):
        return features


def two_sets():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(40, 5, generator=generator), 0.7 * torch.randn(30, 5, generator=generator) + 0.2


def test_frechet_distance_agrees_with_torchmetrics():
    theirs = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance(feature=Features()).set_dtype(torch.float64)
    a, b = two_sets()
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_kernel_distance_agrees_with_torchmetrics_and_with_a_loop():
    a, b = two_sets()
    theirs = pytest.importorskip("torchmetrics.image.kid").KernelInceptionDistance(feature=Features(), subsets=1, subset_size=30)
    theirs.update(a[:30], real=True)
    theirs.update(b, real=False)
    assert kernel_distance(a[:30], b) == pytest.approx(float(theirs.compute()[0]), abs=1e-5)

    def mean(x, y):
        return np.mean([(float(p.double() @ q.double()) / 5 + 1) ** 3 for i, p in enumerate(x) for j, q in enumerate(y) if x is not y or i != j])

    assert kernel_distance(a, b) == pytest.approx(mean(a, a) + mean(b, b) - 2 * mean(a, b))


def test_kernel_distance_of_sets_that_are_alike_is_zero_on_average():
    draws = torch.randn(400, 2, 8, 3, generator=torch.Generator().manual_seed(0))
    distances = np.array([kernel_distance(a, b) for a, b in draws])
    assert abs(distances.mean()) < 3 * distances.std() / 20 and distances.min() < 0


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_agree_with_a_loop(k):
    rng = np.random.default_rng(1)
    real, generated = rng.normal(size=(40, 3)), 0.6 * rng.normal(size=(30, 3)) + 0.5

    def covered(points, by):
        hits = 0
        for p in points:
            for i, centre in enumerate(by):
                radius = sorted(np.linalg.norm(centre - other) for j, other in enumerate(by) if j != i)[k - 1]
                if np.linalg.norm(p - centre) <= radius:
                    hits += 1
                    break
        return hits / len(points)

    precision, recall = precision_recall(torch.from_numpy(real), torch.from_numpy(generated), k)
    assert precision == pytest.approx(covered(generated, real)) and recall == pytest.approx(covered(real, generated))
    assert 0 < recall < precision


def test_one_picture_repeated_is_precise_but_recalls_little():
    real = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    precision, recall = precision_recall(real, real[:1].repeat(50, 1))
    assert precision == 1 and recall == pytest.approx(1 / 200)


def test_diversity():
    same, opposite = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert diversity(same[None]) == pytest.approx(0) and diversity(opposite[None]) == pytest.approx(2)
    assert diversity(torch.stack([same, opposite])) == pytest.approx(1)
    assert diversity(torch.eye(3)[None]) == pytest.approx(1)


def test_retrieval_counts_true_captions_of_other_scenes():
    scenes = sample_scenes(3, 0)
    mixed = torch.eye(3)[[1, 2, 0]]  # each picture is nearest to the caption of the next scene
    wrong = "two small red circles and the word nothing"
    assert not any(describes(wrong, scene) for scene in scenes)
    assert retrieval(torch.eye(3), torch.eye(3), scenes, [wrong] * 3) == {"image_to_text": 1, "text_to_image": 1}
    assert retrieval(mixed, torch.eye(3), scenes, [wrong] * 3) == {"image_to_text": 0, "text_to_image": 0}
    assert retrieval(mixed, torch.eye(3), scenes, ["a shape"] * 3) == {"image_to_text": 1, "text_to_image": 1}
    # picture 0 takes caption 1, so only a caption 1 that is true of scene 0 counts
    background = [f"a shape on a {SYNONYMS[scene.background][0]} background" for scene in scenes]
    share = np.mean([scenes[i].background == scenes[(i + 1) % 3].background for i in range(3)])
    assert retrieval(mixed, torch.eye(3), scenes, background)["image_to_text"] == pytest.approx(share)
    with pytest.raises(ValueError, match="as many"):
        retrieval(mixed, mixed, scenes[:2], background)


def test_held_out_captions_name_what_training_never_shows():
    pairs = held_out_captions(80, seed=5)
    assert pairs == held_out_captions(80, seed=5) and len(pairs) == 80
    for scene, text in pairs:
        assert describes(text, scene)
        assert any(t.texture and t.colour and t.shape and is_held_out(t.texture, t.colour, t.shape) for t in parse(text).things)
    mentions = [sum(len(vars(t)) - list(vars(t).values()).count(None) for t in parse(text).things) for _, text in pairs]
    assert sum(mentions[3::4]) > sum(mentions[0::4])


def test_accuracy():
    reports = [
        Report(right={"shape": 1, "word": 0}, asked={"shape": 1, "word": 1}),
        Report(right={"shape": 1, "colour": 0}, asked={"shape": 2, "colour": 1}),
    ]
    assert accuracy(reports) == {"shape": pytest.approx(2 / 3), "colour": 0, "word": 0, "all_right": 0.5}


def test_bad_input():
    for call in (
        lambda: frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3)),
        lambda: kernel_distance(torch.zeros(1, 3), torch.zeros(4, 3)),
        lambda: kernel_distance(torch.zeros(4, 3), torch.zeros(4, 2)),
        lambda: precision_recall(torch.zeros(3, 2), torch.zeros(9, 2)),
        lambda: diversity(torch.zeros(4, 2)),
        lambda: accuracy([]),
    ):
        with pytest.raises(ValueError):
            call()


def test_by_lot_each_value_that_occurs_is_as_likely_as_any():
    scenes = [scene for scene in sample_scenes(3000, seed=5) if len(scene.things) == 1]
    for name, chance in CHANCE.items():
        occur = {scene.background if name == "background" else getattr(scene.things[0], name) for scene in scenes}
        assert len(occur) == round(1 / chance), name
