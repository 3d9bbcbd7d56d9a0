import csv

import numpy as np
import pytest

from minunclip.blind import Comparison, compare, read_answers, simulate

COUNT = 40
CAPTIONS = [f"picture {i}" for i in range(COUNT)]
BRIGHT = [np.full((4, 4, 3), 200, np.uint8)] * COUNT
DARK = [np.full((4, 4, 3), 50, np.uint8)] * COUNT


def comparison(path, **options):
    return Comparison(BRIGHT, DARK, CAPTIONS, path, names=("bright", "dark"), **options)


def bright(caption, picture):
    return float(picture.mean())


def test_sides_are_random_and_of_the_seed_alone(tmp_path):
    sides = [comparison(tmp_path / "a.csv", seed=seed).left_is_first for seed in (0, 0, 1)]
    assert (sides[0] == sides[1]).all() and (sides[0] != sides[2]).any()
    assert 0.2 < sides[0].mean() < 0.8


def test_a_rater_who_likes_one_system_always_finds_it(tmp_path):
    path = tmp_path / "answers.csv"
    assert simulate(comparison(path), bright) == (1.0, 0.0)
    assert simulate(comparison(path, seed=1), lambda caption, picture: -picture.mean()) == (0.0, 0.0)
    rows = read_answers(path)
    assert len(rows) == 2 * COUNT and rows[3]["caption"] == "picture 3" and {row["winner"] for row in rows[:COUNT]} == {"bright"}


def test_a_rater_who_always_takes_the_left_is_undecided_within_the_interval(tmp_path):
    judged = comparison(tmp_path / "answers.csv")
    share, margin = simulate(judged, lambda caption, picture: 0.0)
    assert share == judged.left_is_first.mean()
    assert margin == pytest.approx(1.96 * (share * (1 - share) / COUNT) ** 0.5)
    assert abs(share - 0.5) < margin


def test_the_interval_is_the_papers(tmp_path):
    """48.9 % ± 3.1 (Tab. 1) is the margin of about 1,000 comparisons."""
    many = Comparison(BRIGHT * 25, DARK * 25, CAPTIONS * 25, tmp_path / "answers.csv", names=("bright", "dark"))
    for k in range(1000):
        many.answer("left" if many.left_is_first[k] == (k < 489) else "right")
    assert many.win_rate() == (0.489, pytest.approx(0.031, abs=5e-4))


def test_a_session_goes_on_where_it_stopped_and_questions_do_not_mix(tmp_path):
    path = tmp_path / "answers.csv"
    first = comparison(path)
    for _ in range(7):
        first.answer("left")
    again = comparison(path)
    assert again.done == 7 and again.next().caption == "picture 7"
    assert comparison(path, question="photorealism").done == 0
    assert comparison(path, seed=1).done == 0
    simulate(again, bright)
    assert again.next() is None
    for captions in (CAPTIONS[:9], CAPTIONS[::-1]):
        with pytest.raises(ValueError, match="other captions"):
            Comparison(BRIGHT[: len(captions)], DARK[: len(captions)], captions, path, names=("bright", "dark"))
    with pytest.raises(ValueError, match="every pair has been judged"):
        again.answer("left")


def test_captions_with_commas_quotes_and_newlines_survive(tmp_path):
    captions = ['a "red", round\nthing', "ünï, ✓"]
    judged = Comparison(BRIGHT[:2], DARK[:2], captions, tmp_path / "a.csv")
    simulate(judged, bright)
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        assert [row["caption"] for row in csv.DictReader(file)] == captions


def test_the_widget_judges_by_its_buttons_and_shows_the_rate_at_the_end(tmp_path):
    judged = comparison(tmp_path / "answers.csv")
    box = compare(judged, side=16)
    caption, pictures, buttons, state = box.children
    assert "picture 0" in caption.value and state.value == f"0 of {COUNT} judged"
    seen = set()
    for i in range(COUNT):
        assert f'alt="The left picture for the caption: picture {i}"' in pictures.children[0].value
        seen.add(pictures.children[0].value.partition("src=")[2])
        buttons.children[0 if judged.left_is_first[i] else 1].click()
    assert len(seen) == 2  # both systems have stood on the left
    assert all(button.disabled for button in buttons.children)
    assert "bright preferred to dark in 100.0 % ± 0.0" in state.value
    assert compare(judged).children[2].children[0].disabled  # shown again, it is still done


def test_captions_are_not_read_as_html(tmp_path):
    box = compare(Comparison(BRIGHT[:1], DARK[:1], ["a <b>red & green"], tmp_path / "a.csv"))
    assert "a &lt;b&gt;red &amp; green" in box.children[0].value


@pytest.mark.parametrize("text", ["name,age\nx,3\n", "name,age\n", "question,first,second,seed,index,caption,winner\na,b\n"])
def test_another_file_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="does not hold answers"):
        comparison(path)
    assert path.read_text() == text


def test_bad_calls(tmp_path):
    path = tmp_path / "a.csv"
    with pytest.raises(ValueError, match="one picture a caption"):
        Comparison(BRIGHT, DARK[:3], CAPTIONS, path)
    with pytest.raises(ValueError, match="different names"):
        Comparison(BRIGHT, DARK, CAPTIONS, path, names=("a", "a"))
    with pytest.raises(ValueError, match="nothing has been judged"):
        comparison(path).win_rate()
    assert not path.exists()
