"""What `make bench` does, in small: from a fresh clone, without a training run of before."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from minunclip.config import CPU, STAGES, TINY

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


def test_the_readme_has_the_speeds_that_were_measured_and_they_keep_their_limits() -> None:
    spec = importlib.util.spec_from_file_location("speed", ROOT / "benchmarks" / "speed.py")
    speed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(speed)
    figures = json.loads((ROOT / "results" / "speed.json").read_text())
    assert speed.table(figures) in (ROOT / "README.md").read_text()
    limits = {"cold, import to file": 15, "warm, 512": 6, "warm, 32": 2}
    assert all(figures["sampling"][name] < limit for name, limit in limits.items())
    assert list(figures["training"]) == list(STAGES)
    assert all(found["steps"] == CPU.training[stage].steps for stage, found in figures["training"].items())
    for stage, found in figures["training"].items():
        assert found["seconds"] * found["images_per_second"] == pytest.approx(CPU.training[stage].batch_size, rel=0.02), f"{stage}: run `make bench` again"
    total = sum(found["steps"] * found["seconds"] for found in figures["training"].values()) / 60
    assert figures["training minutes"] == pytest.approx(total)
