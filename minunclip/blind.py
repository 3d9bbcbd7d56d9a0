"""Human evaluation: two systems side by side, in random order, judged by someone who does not know which is which.

Paper: section 5.2, where people compare unCLIP with GLIDE on photorealism and caption similarity, a pair of pictures at a time, and on
diversity, a pair of 4 x 4 grids. Answers go to a CSV file, line by line, and a session that was cut short goes on where it stopped.
"""

import base64
import csv
import html
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from ipywidgets import VBox

Question = Literal["photorealism", "caption similarity", "diversity"]
Side = Literal["left", "right"]
WORDS: dict[Question, str] = {
    "photorealism": "Which looks more like a real picture?",
    "caption similarity": "Which fits the caption better?",
    "diversity": "Which grid is more varied, and still fits the caption?",
}
COLUMNS = ("question", "first", "second", "seed", "index", "caption", "winner")


class Pair(NamedTuple):
    caption: str
    left: np.ndarray
    right: np.ndarray


class Comparison:
    """`first` and `second`: uint8 pictures (or grids) (H, W, 3), one a caption, of the systems called `names`. Answers are kept in `path`.

    ValueError where pictures and captions are not as many, where the names are alike, or where the file holds something else.
    """

    def __init__(
        self,
        first: Sequence[np.ndarray],
        second: Sequence[np.ndarray],
        captions: Sequence[str],
        path: Path,
        question: Question = "caption similarity",
        names: tuple[str, str] = ("first", "second"),
        seed: int = 0,
    ):
        if not len(first) == len(second) == len(captions) > 0:
            raise ValueError(f"{len(first)} and {len(second)} pictures for {len(captions)} captions: give both systems one picture a caption")
        if names[0] == names[1]:
            raise ValueError(f"both systems are called {names[0]!r}: give them different names")
        self.pictures, self.captions, self.path = (first, second), captions, path
        self.question, self.names, self.seed = question, names, seed
        # whose picture stands on the left: drawn anew for every pair, from the seed alone, so that a session can go on
        self.left_is_first = np.random.default_rng(seed).integers(2, size=len(captions)).astype(bool)
        judged = [row["caption"] for row in self._own(read_answers(path))]
        if judged != list(captions[: len(judged)]):
            raise ValueError(f"{path} has answers of these systems to other captions: choose another file")
        self.done = len(judged)

    def _own(self, answers: list[dict[str, str]]) -> list[dict[str, str]]:
        mine = (self.question, *self.names, str(self.seed))
        return [row for row in answers if (row["question"], row["first"], row["second"], row["seed"]) == mine]

    def next(self) -> Pair | None:
        """The pair to judge now; None when all are judged."""
        if self.done == len(self.captions):
            return None
        first, second = (pictures[self.done] for pictures in self.pictures)
        left, right = (first, second) if self.left_is_first[self.done] else (second, first)
        return Pair(self.captions[self.done], left, right)

    def answer(self, side: Side) -> None:
        """Notes down that the picture on that side is the better one, and goes on. ValueError when there is nothing left to judge."""
        if self.next() is None:
            raise ValueError("every pair has been judged")
        winner = self.names[0] if (side == "left") == self.left_is_first[self.done] else self.names[1]
        new = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(COLUMNS)
            writer.writerow((self.question, *self.names, self.seed, self.done, self.captions[self.done], winner))
        self.done += 1

    def win_rate(self) -> tuple[float, float]:
        """How often the first system was preferred so far, and the margin of the 95 % interval, as the paper gives it. ValueError before an answer."""
        own = self._own(read_answers(self.path))
        if not own:
            raise ValueError("nothing has been judged yet")
        share = sum(row["winner"] == self.names[0] for row in own) / len(own)
        # 1.96 sqrt(p (1 - p) / n)
        return share, 1.96 * math.sqrt(share * (1 - share) / len(own))


def read_answers(path: Path) -> list[dict[str, str]]:
    """The lines of a file of answers; none where there is no file. ValueError where it is something else."""
    if not path.exists() or not path.stat().st_size:
        return []
    with path.open(newline="", encoding="utf-8-sig") as file:  # a spreadsheet puts a mark in front
        reader = csv.DictReader(file)
        rows = list(reader)
        if tuple(reader.fieldnames or ()) != COLUMNS or any(None in row.values() or None in row for row in rows):
            raise ValueError(f"{path} does not hold answers of a comparison: choose another file")
    return rows


def simulate(comparison: Comparison, score: Callable[[str, np.ndarray], float]) -> tuple[float, float]:
    """Judges what is left by a rule, the picture with the higher score (caption, picture) winning (the left one of two alike): the win rate and its margin."""
    while (pair := comparison.next()) is not None:
        comparison.answer("left" if score(pair.caption, pair.left) >= score(pair.caption, pair.right) else "right")
    return comparison.win_rate()


def compare(comparison: Comparison, side: int = 256) -> "VBox":
    """The comparison as a widget: two pictures, a button under each. It can be left and shown again at any time."""
    from ipywidgets import HTML, Button, HBox, Layout, VBox

    caption, state = HTML(), HTML()
    pictures = [HTML() for _ in range(2)]
    buttons = [Button(description=name, layout=Layout(width=f"{side}px")) for name in ("left", "right")]

    def update() -> None:
        pair = comparison.next()
        state.value = f"{comparison.done} of {len(comparison.captions)} judged"
        for button in buttons:
            button.disabled = pair is None
        if pair is None:
            share, margin = comparison.win_rate()
            caption.value = "<b>Done. Thank you.</b>"
            state.value += f": {comparison.names[0]} preferred to {comparison.names[1]} in {100 * share:.1f} % ± {100 * margin:.1f}"
            return
        caption.value = f"<b>{WORDS[comparison.question]}</b><br>“{html.escape(pair.caption, quote=False)}”"
        for widget, where, array in zip(pictures, ("left", "right"), (pair.left, pair.right)):
            buffer = io.BytesIO()
            enlarged = Image.fromarray(array).resize((side, side), Image.Resampling.NEAREST if len(array) < side else Image.Resampling.LANCZOS)
            enlarged.save(buffer, format="PNG")
            words = f"The {where} picture for the caption: {html.escape(pair.caption)}"
            widget.value = f'<img alt="{words}" width="{side}" height="{side}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'

    def clicked(button: Button) -> None:
        comparison.answer(button.description)
        update()

    for button in buttons:
        button.on_click(clicked)
    update()
    return VBox([caption, HBox(pictures), HBox(buttons), state])
