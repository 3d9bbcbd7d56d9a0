"""What `make bench` does, in small: from a fresh clone, without a training run of before."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minunclip.config import STAGES, TINY

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_stage_is_timed_without_a_run_of_before(tiny_weights: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "speed.py", "--preset", "tiny", "--repeats", "1", "--weights", tiny_weights]
    subprocess.run([*command, "--run", tmp_path / "run", "--json", tmp_path / "speed.json"], check=True, cwd=ROOT, capture_output=True)
    figures = json.loads((tmp_path / "speed.json").read_text())
    assert list(figures["training"]) == list(STAGES) and list(figures["sampling"]) == ["cold, import to file", "warm, 16", "warm, 32", "warm, 64"]
    for stage, found in figures["training"].items():
        assert found["steps"] == TINY.training[stage].steps and 0 < found["share_of_ceiling"] < 1
        assert found["images_per_second"] == pytest.approx(TINY.training[stage].batch_size / found["seconds"])
