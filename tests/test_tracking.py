"""What TensorBoard itself reads back from the event files, against the log, the pictures and what was drawn."""

import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_training import run

from minunclip.cli import main
from minunclip.training import read_log

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def read(folder: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_scalars_samples_and_the_loss_curve(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path, track=True, sample=lambda model: PICTURE, validate=lambda model: {"validation_loss": 2.5})
    events, lines = read(tmp_path), read_log(tmp_path / "log.jsonl")
    assert set(events.Tags()["scalars"]) == set().union(*lines) - {"step"}
    for name in ("loss", "gradient_norm", "validation_loss"):
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert seen == [(line["step"], pytest.approx(line[name])) for line in lines if name in line]
    (sample,), (curve,) = events.Images("samples"), events.Images("loss curve")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.encoded_image_string))), PICTURE) and sample.step == curve.step == 40
    assert len({*np.asarray(Image.open(io.BytesIO(curve.encoded_image_string)).convert("L")).flat}) > 2  # something is drawn


def test_what_a_lost_run_had_written_past_its_checkpoint_is_hidden(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path, track=True, stop_after=20)
    shutil.copy(tmp_path / "training.pt", tmp_path / "kept.pt")
    run(tmp_path, track=True, stop_after=30)
    shutil.move(tmp_path / "kept.pt", tmp_path / "training.pt")
    run(tmp_path, track=True)
    assert [event.step for event in read(tmp_path).Scalars("loss")] == [10, 20, 30, 40]


def test_without_tensorboard_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert main(["train", "clip", "--preset", "tiny", "--track", "--out", str(tmp_path / "run")]) == 2
    assert "pip install -e '.[track]'" in capsys.readouterr().err and not (tmp_path / "run").exists()
