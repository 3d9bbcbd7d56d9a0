"""The tables and figures of docs/scale.md are those that the formulas and the measurement give."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from minunclip.budget import NETWORKS, NVLINK, PEAK, cost, many_gpus_as_markdown, memory, one_gpu_as_markdown
from minunclip.config import PRESETS
from minunclip.data.world import picture_sizes

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"


def measured() -> str:
    """results/scaling.json as a table."""
    figures = json.loads((ROOT / "results" / "scaling.json").read_text())["figures"]
    one = figures["1 process"]["seconds"]
    lines = ["| | seconds a step | of these forward and backward | times as fast | state a process | all-reduce |", "|---|---|---|---|---|---|"]
    for name, row in figures.items():
        ring = f"{row['gradient_bytes'] / row['all_reduce'] / 1e9:.2f} GB/s" if "all_reduce" in row else ""  # 2 (n - 1) / n is 1
        speed = f"{row['seconds']:.2f} | {row['forward_and_backward']:.2f} | {one / row['seconds']:.2f}"
        lines.append(f"| {name} | {speed} | {row['state_bytes'] / 1e6:.0f} MB | {ring} |")
    return "\n".join(lines)


def streamed() -> str:
    """results/streaming.json as the rows of a table."""
    found = json.loads((ROOT / "results" / "streaming.json").read_text())["pictures_per_second"]
    views = {"first reading": "first reading, of the whole folder", "pictures": "for CLIP, 64 × 64", "small": "for the decoder, 32 × 32"}
    views |= {"middle": "for the first upsampler, 128 × 128", "parts": "for the second, quarters of 512 × 512"}
    return "\n".join(f"| {title} | {found[f'arrays, {view}']:,.0f} | {found[f'stream, {view}']:,.0f} |" for view, title in views.items())


def on_a_gpu() -> str:
    """results/gpu.json as a table, beside the estimate for as many examples at once."""
    lines = ["| stage | examples at once | memory | by the estimate | examples a second | of an A100's peak |", "|---|---|---|---|---|---|"]
    preset = PRESETS["gpu"]
    for stage, row in json.loads((ROOT / "results" / "gpu.json").read_text())["stages"].items():
        settings = replace(preset.training[stage], accumulation=preset.training[stage].batch_size // row["examples_at_once"])
        one = cost(stage, preset.models[stage], settings)
        share = row["examples_per_second"] * 3 * one.forward / PEAK
        estimate = f"{memory(one, settings) / 1e9:.1f} GB | {row['examples_per_second']:,.0f} | {share:.0%}"
        lines.append(f"| {stage} | {row['examples_at_once']} | {row['measured_gb']:.1f} GB | {estimate} |")
    return "\n".join(lines)


def disk(preset: str) -> int:
    """Bytes of the arrays that one picture of your own becomes."""
    return 3 * sum(side**2 for side in picture_sizes(PRESETS[preset])[:5])


@pytest.mark.slow
def test_the_tables_are_what_the_formulas_and_the_measurement_give() -> None:
    page = PAGE.read_text()
    for table in (one_gpu_as_markdown(PRESETS["gpu"]), many_gpus_as_markdown(PRESETS["paper"]), measured(), streamed(), on_a_gpu()):
        assert table in page
    assert f"{NVLINK / 1e9:.0f} GB/s within a machine" in page and list(NETWORKS.values()) == [0.8 * 8 * 200e9 / 8, 0.8 * 100e9 / 8]


def test_disk_of_a_picture(tmp_path: Path) -> None:
    page = " ".join(PAGE.read_text().split())
    assert f"{disk('gpu') / 1e3:.0f} kB a picture in the `gpu` preset" in page
    for pictures, said in ((118_287, f"{118_287 * disk('gpu') / 1e9:.0f} GB"), (2.9e6, f"{2.9e6 * disk('gpu') / 1e12:.1f} TB")):
        assert said in page, pictures
