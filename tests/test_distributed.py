"""Real processes under torchrun: the same numbers as one process, a lost process, and a run that goes on with fewer of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

WORKER = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
import torch.distributed._functional_collectives as functional
from minunclip.config import TINY
from minunclip.distributed import start
from minunclip.runs import Run
from minunclip.stages import train
folder, accumulation, stop_after, means, *stages = sys.argv[1:]
torch.set_num_threads(1)
functional.wait_tensor = None  # on CPUs it crashes now and then: nothing may call it
run = Run(TINY, Path(folder), start(torch.device("cpu")))
for stage in stages:
    settings = replace(TINY.training[stage], accumulation=1 if stage == "clip" else int(accumulation))
    settings = replace(settings, sharded="sharded" in means and stage != "clip", recompute="recompute" in means)  # CLIP stays whole
    train(stage, run, settings=settings, stop_after=int(stop_after) or None)
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
QUIET = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def work(script: Path, processes: int, folder: Path, accumulation: int, *stages: str, stop_after: int = 0, means: str = "") -> None:
    script.write_text(WORKER)
    start = [sys.executable] if processes == 1 else [*TORCHRUN, "--nproc-per-node", str(processes)]
    given = [str(script), str(folder), str(accumulation), str(stop_after), means, *stages]
    done = subprocess.run([*start, *given], env=QUIET, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:6000]


def log(folder: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / stage / "log.jsonl").read_text().splitlines()]


def assert_same(one: Path, other: Path, stage: str) -> None:
    """The same losses, gradients and weights, up to the order of summation."""
    for a, b in zip(log(one, stage), log(other, stage), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
        assert a.keys() == b.keys() and a.get("validation_loss", 1) == pytest.approx(b.get("validation_loss", 1), rel=1e-3)
    ours, theirs = (load_file(folder / stage / "model.safetensors") for folder in (one, other))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "ways", "stages"),
    [(2, ("whole", "sharded"), ("clip", "prior", "decoder", "upsampler1")), (4, ("sharded, recompute",), ("clip", "decoder"))],
)
def test_several_processes_do_what_one_does_in_as_many_parts(tmp_path: Path, processes: int, ways: tuple[str, ...], stages: tuple[str, ...]) -> None:
    work(tmp_path / "worker.py", 1, tmp_path / "one", processes, *stages)
    for means in ways:
        work(tmp_path / "worker.py", processes, tmp_path / means, 1, *stages, means=means)
        for stage in stages:
            assert_same(tmp_path / "one", tmp_path / means, stage)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    work(tmp_path / "worker.py", 2, tmp_path / "run", 1, "clip", stop_after=8)
    before = log(tmp_path / "run", "clip")
    assert [line["step"] for line in before] == [4, 8]
    work(tmp_path / "worker.py", 1, tmp_path / "run", 1, "clip")
    after = log(tmp_path / "run", "clip")
    assert [line["step"] for line in after] == [4, 8, 10, 12] and after[:2] == before  # with the seconds that they took


@pytest.mark.slow
def test_a_sharded_run_goes_on_whole_and_a_whole_one_sharded(tmp_path: Path) -> None:
    worker, run, whole, stages = tmp_path / "worker.py", tmp_path / "run", tmp_path / "whole", ("ar-prior", "decoder")
    work(worker, 1, whole, 4, "clip", *stages)
    run.mkdir()
    for part in ("data", "clip"):
        (run / part).symlink_to(whole / part)
    work(worker, 4, run, 1, *stages, stop_after=4, means="sharded")
    work(worker, 1, run, 4, *stages, stop_after=8)
    for stage in stages:
        state = torch.load(run / stage / "training.pt", weights_only=True)
        assert state["step"] == 8 and {type(value) for entry in state["optimizers"][0]["state"].values() for value in entry.values()} == {torch.Tensor}
    work(worker, 2, run, 2, *stages, means="sharded")
    for stage in stages:
        ours, theirs = (load_file(folder / stage / "model.safetensors") for folder in (run, whole))
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("means", [(), ("--sharded",)])
def test_a_lost_process_ends_the_run_with_a_line_and_its_checkpoint_whole(tmp_path: Path, means: tuple[str, ...]) -> None:
    command = ["-m", "minunclip.cli", "train", "upsampler1", "--preset", "tiny", "--device", "cpu", "--steps", "100000", "--out", str(tmp_path), *means]
    checkpoint = tmp_path / "upsampler1" / "training.pt"
    with open(tmp_path / "said", "w") as said:
        run = subprocess.Popen([*TORCHRUN, "--nproc-per-node", "2", *command], env=QUIET, stderr=said, stdout=said, start_new_session=True)
    try:
        for _ in range(3000):
            if checkpoint.exists() or run.poll() is not None:
                break
            time.sleep(0.1)
        assert checkpoint.exists(), (tmp_path / "said").read_text()[:6000]
        children = Path(f"/proc/{run.pid}/task").glob("*/children")
        os.kill(max(int(worker) for child in children for worker in child.read_text().split()), signal.SIGKILL)
        assert run.wait(timeout=60) != 0
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    text = (tmp_path / "said").read_text()
    assert "another process was lost" in text or "the same command goes on" in text, text[-2000:]
    assert torch.load(checkpoint, weights_only=True)["step"] >= 4


@pytest.mark.slow
def test_two_processes_that_stream_pictures_do_what_one_does_with_arrays(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(40):
        Image.effect_noise((48, 40), 90).convert("RGB").save(tmp_path / "pictures" / f"{number}.jpg")
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"noise of the number {number}\nagain {number}")
    stages, given = ("clip", "decoder", "upsampler2"), ["--preset", "tiny", "--device", "cpu", "--data", str(tmp_path / "pictures")]
    commands = {
        "one": [["train", stage, *given, *([] if stage == "clip" else ["--accumulation", "2"]), "--out", str(tmp_path / "one")] for stage in stages],
        "many": [["train", stage, *given, "--stream", "--out", str(tmp_path / "many")] for stage in stages],
    }
    script = tmp_path / "commands.py"  # one after the other in the same processes, as `train all` has it
    script.write_text("import json, sys\nfrom minunclip.cli import main\nsys.exit(next(filter(None, map(main, json.loads(sys.argv[1]))), 0))\n")
    for name, start in (("one", [sys.executable]), ("many", [*TORCHRUN, "--nproc-per-node", "2"])):
        done = subprocess.run([*start, str(script), json.dumps(commands[name])], env=QUIET, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:6000]
    for stage in stages:
        assert_same(tmp_path / "one", tmp_path / "many", stage)
    assert len(list((tmp_path / "many").glob("data/*/places.npy"))) == 1 and len(list((tmp_path / "one").glob("data/*/parts.npy"))) == 1


@pytest.mark.slow
def test_accelerate_starts_it_as_torchrun_does(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    command = ["minunclip.cli", "train", "upsampler1", "--preset", "tiny", "--device", "cpu"]
    launch = ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2", "--main_process_port", "0"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
    one = [*command, "--accumulation", "2", "--out", str(tmp_path / "one")]
    many = [*launch, *command, "--sharded", "--out", str(tmp_path / "many")]
    for arguments in (one, many):
        done = subprocess.run([sys.executable, "-m", *arguments], env=QUIET, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:6000]
    assert_same(tmp_path / "one", tmp_path / "many", "upsampler1")
