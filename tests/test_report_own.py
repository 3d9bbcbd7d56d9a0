"""The report on your own pictures, by models whose answers are known."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from minunclip.cli import main
from minunclip.data.tokenizer import Tokenizer
from minunclip.data.world import World, to_tensor
from minunclip.report_own import TITLES, evaluate_own
from minunclip.safety import read_facts

ROOT = Path(__file__).parents[1]

SIDE, DIM = 8, 12
MAP = torch.randn(3 * SIDE * SIDE, DIM, generator=torch.Generator().manual_seed(0))


class Oracle:
    """CLIP is a random map of the pixels and knows every caption; the prior is always right; the decoder has learned pictures, and draws these alone."""

    device = torch.device("cpu")

    def __init__(self, world: World, learned: dict[str, np.ndarray]):
        self.tokenizer = Tokenizer([(32, 33)])  # of other words than those that the run has read
        self.words = world.tokenizer
        held = world.held or {}
        self.pictures = {self.text(row): picture for row, picture in zip([*world.captions[:, 0], *held["captions"][:, 0]], [*world.small, *held["small"]])}
        self.learned = learned

    def text(self, row: np.ndarray) -> str:
        return self.words.decode([token for token in row.tolist() if token > 1])

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(images.flatten(1) @ MAP, dim=-1)

    def read(self, texts: list[str]) -> Any:
        return SimpleNamespace(z_t=self.embed(to_tensor(np.stack([self.pictures[text] for text in texts]))), texts=texts)

    def draw_embeddings(self, text: Any, prior: str, seeds: list[int]) -> tuple[torch.Tensor, None]:
        return text.z_t, None

    def decode(self, z_i: torch.Tensor, text: Any, seeds: list[int], guidance: float) -> torch.Tensor:
        first = next(iter(self.learned.values()))
        return to_tensor(np.stack([self.learned.get(words, first) for words in text.texts]))


def test_a_model_that_knows_by_heart_is_right_on_what_it_learned_and_told_apart_on_what_it_did_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (90, SIDE, SIDE, 3), dtype=np.uint8)
    tokenizer = Tokenizer([])
    captions = tokenizer([f"picture {i:02}" for i in range(90)], 16)[0].numpy().astype(np.uint16)[:, None]
    held = {"pictures": small[60:], "small": small[60:], "captions": captions[60:]}
    world = World(tmp_path, small[:60], small[:60], captions[:60], small, small, small, tokenizer, held)
    oracle = Oracle(world, {f"picture {i:02}": small[i] for i in range(60)})
    figures, sheet, titles = evaluate_own(oracle, world, count=30, seed=0)  # type: ignore[arg-type]
    assert all(found.keys() == TITLES.keys() for found in figures.values())
    learned, unseen = figures["learned"], figures["held out"]
    for found in (learned, unseen):
        assert found["picture_to_caption"] == found["caption_to_picture"] == 1 and found["chance"] == pytest.approx(1 / 30)
        assert found["prior"] == pytest.approx(1) and found["another"] < 0.5
    assert learned["fid"] == pytest.approx(0, abs=1e-4) and learned["clip_score"] == pytest.approx(1) and learned["copied"] == 1
    assert unseen["fid"] > 5 * unseen["fid_floor"] > 0 and unseen["clip_score"] < 0.5 and unseen["copied"] == 1  # it draws one picture again and again
    rows = [sheet[8 * k : 8 * k + 8] for k in range(12)]
    assert len(sheet) == len(titles) == 96 and titles[8] == "drawn" and titles[48] == "picture 60"
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[1], rows[2])  # learned by heart: true, drawn and nearest are one picture
    assert np.array_equal(rows[6], small[60:68]) and np.array_equal(rows[8], [small[0]] * 8)


@pytest.mark.slow
def test_the_command_writes_figures_and_a_sheet_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = tmp_path / "pictures", tmp_path / "run"
    folder.mkdir()
    for i in range(40):
        Image.new("RGB", (20, 20), (6 * i, 99, 255 - 6 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    assert main(["data", "evaluate", str(run)]) == 2 and "data of 0 trainings" in capsys.readouterr().err
    assert main(["train", "all", "--preset", "tiny", "--data", str(folder), "--out", str(run), "--steps", "2"]) == 0
    assert main(["pack", str(run), f"{run}-weights"]) == 0
    assert main(["data", "evaluate", str(run), "--json", str(tmp_path / "f.json"), "--samples", str(tmp_path / "s.png")]) == 0
    kept = json.loads((tmp_path / "f.json").read_text())
    assert kept["figures"].keys() == {"learned", "held out"} and 0 <= kept["figures"]["learned"]["copied"] <= 1
    assert read_facts(tmp_path / "s.png")["weights"] == kept["weights"]
    assert Image.open(tmp_path / "s.png").width > 500 and TITLES["fid_floor"] in capsys.readouterr().out


def test_the_tables_of_the_page_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "own-pictures.md").read_text()
    rows = {
        "": ("picture_to_caption", "prior", "another", "fid", "fid_floor", "copied"),
        "-frozen": ("picture_to_caption", "prior", "another"),
    }
    for kind, names in rows.items():
        sets = [
            json.loads((ROOT / "results" / f"{name}{kind}.json").read_text())["figures"][half]
            for name in ("emoji", "clipart")
            for half in ("learned", "held out")
        ]
        for name in names:
            shown = "{:.1%}" if name in ("picture_to_caption", "copied") else "{:.3f}"
            assert "| " + " | ".join(shown.format(found[name]) for found in sets) + " |" in page, (kind, name)
