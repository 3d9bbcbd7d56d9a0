"""The probe against a least-squares solver, the rule against pictures whose rating is plain, and the command on real files."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from minunclip.aesthetics import SPREAD, fit_probe, read_ratings, simulated_ratings, taste
from minunclip.cli import main


def test_the_rule_likes_contrast_and_symmetry():
    grey = torch.zeros(1, 3, 8, 8)
    halves = torch.cat([-torch.ones(1, 3, 8, 4), torch.ones(1, 3, 8, 4)], dim=3)
    assert taste(grey).item() == pytest.approx(1 + 9 / 2)  # all symmetry, no contrast
    assert taste(halves).item() == pytest.approx(1 + 9 / 2)  # all contrast, no symmetry
    assert taste(halves.transpose(2, 3)).item() == pytest.approx(10)  # both: the mirror is upright


def test_raters_have_moods():
    pictures = torch.zeros(4000, 3, 2, 2)
    assert (simulated_ratings(pictures, np.random.default_rng(0)) - taste(pictures)).std().item() == pytest.approx(SPREAD, rel=0.05)


def test_the_probe_is_the_ridge_regression_of_a_longer_system():
    """Ridge is least squares with a row sqrt(N r) for every direction."""
    z = torch.nn.functional.normalize(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    y = torch.randn(50, generator=torch.Generator().manual_seed(1))
    x = (z - z.mean(dim=0)).double().numpy()
    rows = np.concatenate([x, np.sqrt(50 * 1e-3 / 6) * np.eye(6)])
    weight = np.linalg.lstsq(rows, np.concatenate([(y - y.mean()).double().numpy(), np.zeros(6)]), rcond=None)[0]
    np.testing.assert_allclose(fit_probe(z, y)(z).numpy(), x @ weight + float(y.mean()), atol=1e-5)


def test_one_rating_is_too_few():
    with pytest.raises(ValueError, match="1 pictures and 1 ratings"):
        fit_probe(torch.ones(1, 4), torch.ones(1))


def rated_folder(folder, count=20):
    rng = np.random.default_rng(0)
    with open(folder / "ratings.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "rating"])
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)).save(folder / f"{i}.png")
            writer.writerow([f"{i}.png", i / 2])
    return folder / "ratings.csv"


def test_your_own_ratings(tmp_path, tiny_weights, capsys, monkeypatch):
    ratings, fitted = rated_folder(tmp_path), []
    monkeypatch.setattr("minunclip.cli.fit_probe", lambda z_i, rated: fitted.append(set(rated.tolist())) or fit_probe(z_i, rated))
    assert read_ratings(ratings)[3] == (tmp_path / "3.png", 1.5)
    assert main(["rate", str(ratings), str(tmp_path / "0.png"), "--weights", str(tiny_weights)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("correlation with ratings it had not seen: ") and second.endswith(str(tmp_path / "0.png")) and float(second.split()[0]) < 10
    everything = {i / 2 for i in range(20)}
    unseen = [everything - seen for seen in fitted]  # each rating is left out once, and the last probe has seen all
    assert [len(some) for some in unseen] == [4, 4, 4, 4, 4, 0] and set.union(*unseen) == everything


def test_a_broken_picture_is_named(tmp_path, tiny_weights, capsys):
    ratings = rated_folder(tmp_path, count=3)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:200])
    assert main(["rate", str(ratings), str(tmp_path / "0.png"), "--weights", str(tiny_weights)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / '1.png'} is broken" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "content, word",
    [
        ("file_name,rating\n0.png,good\n", "line 2"),
        ("a,b\n1,2\n", "columns"),
        ("rating,file_name\n5\n3,b.png\n", "line 2: no file_name"),
        ("file_name,rating\nno.png,1\nno.png,2\n", "no.png"),
        ("file_name,rating\na.png,nan\nb.png,1\n", "line 2"),
        ("file_name,rating\na.png,3,5\nb.png,1\n", "line 2: more fields than in the first line: write 3.5, not 3,5"),
        ("file_name,rating\na.png,1\n", "two pictures"),
    ],
)
def test_bad_ratings_get_a_line(tmp_path, tiny_weights, capsys, content, word):
    (tmp_path / "ratings.csv").write_text(content)
    assert main(["rate", str(tmp_path / "ratings.csv"), "a.png", "--weights", str(tiny_weights)]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1
