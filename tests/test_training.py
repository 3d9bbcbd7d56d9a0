import copy
import dataclasses
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minunclip import training
from minunclip.config import TINY, TrainingConfig
from minunclip.models.decoder import Decoder
from minunclip.muon import Muon
from minunclip.training import TrainingError, compile_stacks, fit, learning_rate_at, make_optimizers, read_log, recompute, save_model, update_ema

SETTINGS = TrainingConfig(steps=40, batch_size=8, learning_rate=0.05, warmup=4, weight_decay=0.0, precision="fp32", checkpoint_every=10)
TOY = """
import sys, time
from pathlib import Path
from tests.test_training import SETTINGS, run
run(Path(sys.argv[1]), pause=float(sys.argv[2]))
"""

FULL = """
import resource, sys
from pathlib import Path
from torch import nn
from minunclip.training import TrainingError, save_model
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_model(Path(sys.argv[1]), nn.Linear(100, 100), {})
except TrainingError as error:
    print(error)
"""


def batch(step: int) -> dict[str, Tensor]:
    """Points of the plane y = 2 a - b + 0.5: a function of the step alone."""
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(step))
    return {"x": x, "y": x @ torch.tensor([2.0, -1.0]) + 0.5}


def loss(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    """Squared error with noise drawn from torch's generator, as a diffusion loss would."""
    return (model(data["x"])[:, 0] - data["y"] + 0.01 * torch.randn(len(data["y"]))).square().mean()


def run(folder: Path, settings: TrainingConfig = SETTINGS, pause: float = 0.0, **options) -> nn.Module:
    def slow_batch(step: int) -> dict[str, Tensor]:
        time.sleep(pause)
        return batch(step)

    torch.manual_seed(0)
    return fit(nn.Linear(2, 1), options.pop("batch", slow_batch), options.pop("loss", loss), settings, folder, name="toy", model_config={"a": 1}, **options)


def state(folder: Path) -> dict:
    """All that a later step depends on."""
    kept = torch.load(folder / "training.pt", weights_only=True)
    moments = {f"{n}.{i}.{k}": v for n, o in enumerate(kept["optimizers"]) for i, s in o["state"].items() for k, v in s.items()}
    return {"step": torch.tensor(kept["step"]), **kept["model"], **{f"average.{k}": v for k, v in kept["average"].items()}, **moments}


def assert_same(one: Path, other: Path) -> None:
    first, second = state(one), state(other)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def test_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    settings = TrainingConfig(steps=110, batch_size=1, learning_rate=2.0, warmup=10, final_learning_rate=0.1)
    assert [learning_rate_at(step, settings) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert learning_rate_at(60, settings) == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half way
    assert learning_rate_at(35, settings) == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.sqrt(0.5))))  # a quarter
    assert learning_rate_at(110, settings) == learning_rate_at(500, settings) == pytest.approx(0.2)
    assert learning_rate_at(0, dataclasses.replace(settings, warmup=0)) == 2.0


def test_each_part_of_each_step_has_numbers_of_its_own(tmp_path: Path) -> None:
    drawn = []

    def noted(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        drawn.append(float(torch.rand(())))
        return loss(model, data)

    for seed in (0, 1):
        run(tmp_path / str(seed), dataclasses.replace(SETTINGS, steps=3, accumulation=4), loss=noted, seed=seed)
    assert len(drawn) == len(set(drawn)) == 24


def test_a_step_takes_the_schedules_rate_and_a_clipped_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates, norms = [], []

    class Notes(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            norms.append(float(nn.utils.get_total_norm([p.grad for group in self.param_groups for p in group["params"]])))
            super().step()

    monkeypatch.setattr(training, "make_optimizers", lambda model, settings: [Notes(model.parameters(), lr=9.0)])
    settings = dataclasses.replace(SETTINGS, clip_norm=0.01)
    run(tmp_path, settings)
    assert rates == [learning_rate_at(step, settings) for step in range(40)]
    assert norms == pytest.approx([0.01] * 40, rel=1e-3)
    logged = read_log(tmp_path / "log.jsonl")
    assert [line["learning_rate"] for line in logged] == pytest.approx([rates[line["step"] - 1] for line in logged])


def test_optimizers_are_set_as_the_settings_say() -> None:
    settings = dataclasses.replace(SETTINGS, optimizer="muon", weight_decay=0.1, beta1=0.8, beta2=0.7, epsilon=1e-3)
    adamw, muon = make_optimizers(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), settings)
    assert adamw.defaults["betas"] == (0.8, 0.7) and adamw.defaults["eps"] == 1e-3
    assert isinstance(muon, Muon) and muon.param_groups[0]["weight_decay"] == 0.1


def test_the_moving_average_has_its_closed_form() -> None:
    average, model, decay = nn.Linear(1, 1), nn.Linear(1, 1), 0.9
    nn.init.constant_(average.weight, 5.0)
    nn.init.constant_(model.weight, 1.0)
    for n in range(1, 6):  # late steps: 1 + 4 * 0.9^n
        update_ema(average, model, step=1000, decay=decay)
        assert average.weight.item() == pytest.approx(1 + 4 * decay**n)
    update_ema(average, model, step=0, decay=decay)  # the first step: a tenth stays
    assert average.weight.item() == pytest.approx(1 + 4 * decay**5 * 0.1)
    average, model = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    model.running_mean.fill_(3.0)
    update_ema(average, model, step=1000, decay=decay)
    assert average.running_mean.item() == 3.0  # a buffer is copied


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 2), nn.Embedding(5, 2))
    model[3].requires_grad_(False)
    decaying, others = make_optimizers(model, dataclasses.replace(SETTINGS, weight_decay=0.1))[0].param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decaying["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert {id(p) for p in others["params"]} == {id(p) for p in (model[0].bias, model[1].weight, model[1].bias, model[2].bias)}


def test_muon_takes_maps_and_leaves_tables_ends_and_vectors_to_adamw() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_in, self.middle, self.linear, self.conv_out = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2), nn.Conv2d(4, 3, 3)
            self.table, self.positions = nn.Embedding(5, 2), nn.Parameter(torch.zeros(2, 3))

    net = Net()
    adamw, muon = make_optimizers(net, dataclasses.replace(SETTINGS, optimizer="muon"))
    assert {id(p) for p in muon.param_groups[0]["params"]} == {id(net.middle.weight), id(net.linear.weight)}
    shared = [p for optimizer in (adamw, muon) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, shared)) == sorted(map(id, net.parameters()))
    assert [optimizer.__class__.__name__ for optimizer in make_optimizers(net, SETTINGS)] == ["AdamW"]


class Stack(nn.Module):
    """A U-Net's and a transformer's way of keeping layers, with dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Dropout(dropout)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def loss_and_gradients(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    value = model(*inputs).square().mean()
    value.backward()
    return [value.detach(), *[parameter.grad for parameter in model.parameters() if parameter.grad is not None]]


def test_recomputing_changes_nothing() -> None:
    torch.manual_seed(0)
    plain = Decoder(dataclasses.replace(TINY.decoder, unet=dataclasses.replace(TINY.decoder.unet, dropout=0.3)))
    for parameter in plain.parameters():  # none is zero, as many are at the start
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    again = copy.deepcopy(plain)
    recompute(again)
    tokens = torch.ones(2, 5, dtype=torch.int64)
    inputs = torch.randn(2, 3, 16, 16), torch.tensor([3, 900]), torch.randn(2, 32), tokens, tokens > 0
    for ours, theirs in zip(loss_and_gradients(again, *inputs), loss_and_gradients(plain, *inputs), strict=True):
        assert torch.equal(ours, theirs)
    assert list(again.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])  # inductor's dropout has numbers of its own
def test_compiling_changes_nothing_but_rounding(backend: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.utils.counters.clear()
    plain = Stack(dropout=0.3 if backend == "aot_eager" else 0.0)
    compiled = copy.deepcopy(plain)
    recompute(compiled)
    compile_stacks(compiled, backend)
    x = torch.randn(64, 8)
    torch.testing.assert_close(loss_and_gradients(compiled, x), loss_and_gradients(plain, x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it was not left as it is


def test_a_run_goes_on_with_other_means(tmp_path: Path, whole: Path) -> None:
    run(tmp_path, stop_after=20)
    run(tmp_path, dataclasses.replace(SETTINGS, recompute=True))
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("change", [{"optimizer": "muon"}, {"precision": "fp16"}])  # whose momentum, whose scale of the loss is kept
def test_a_stopped_run_with_a_state_of_its_own_goes_on_bit_for_bit(tmp_path: Path, change: dict[str, str]) -> None:
    settings = dataclasses.replace(SETTINGS, **change)
    run(tmp_path / "whole", settings)
    run(tmp_path / "halves", settings, stop_after=17)
    run(tmp_path / "halves", settings)
    assert_same(tmp_path / "whole", tmp_path / "halves")


def test_it_learns_a_plane(tmp_path: Path) -> None:
    average = run(tmp_path, dataclasses.replace(SETTINGS, steps=200))
    torch.testing.assert_close(average.weight, torch.tensor([[2.0, -1.0]]), atol=0.02, rtol=0)
    torch.testing.assert_close(average.bias, torch.tensor([0.5]), atol=0.02, rtol=0)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["weight"], average.weight) and json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == list(range(10, 201, 10))


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path) -> None:
    def plain(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        return (model(data["x"])[:, 0] - data["y"]).square().mean()

    one, four = (run(tmp_path / str(n), dataclasses.replace(SETTINGS, accumulation=n), loss=plain) for n in (1, 4))
    torch.testing.assert_close(one.state_dict(), four.state_dict())


@pytest.mark.parametrize("stop", [1, 10, 17, 39])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, whole: Path, stop: int) -> None:
    run(tmp_path, stop_after=stop)
    assert state(tmp_path)["step"] == stop
    run(tmp_path)
    assert_same(tmp_path, whole)


def test_a_run_past_where_it_is_to_stop_stays_as_it_is(tmp_path: Path) -> None:
    kept = run(tmp_path, stop_after=20).state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in run(tmp_path, stop_after=10).state_dict().items())
    assert all(torch.equal(value, kept[name]) for name, value in run(tmp_path, stop_after=20).state_dict().items())
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 20


def test_a_finished_run_is_left_as_it_is_and_mends_an_older_model(tmp_path: Path, whole: Path) -> None:
    run(tmp_path, stop_after=20)
    older = (tmp_path / "model.safetensors").read_bytes()
    run(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(older)  # killed between the last checkpoint and the model
    run(tmp_path)
    assert_same(tmp_path, whole)


def start(folder: Path) -> subprocess.Popen:
    """A run in a process of its own, once it has written its first checkpoint."""
    process = subprocess.Popen([sys.executable, "-c", TOY, str(folder), "0.05"], cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "config.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_survives_real_signals_bit_for_bit(tmp_path: Path, whole: Path, number: signal.Signals) -> None:
    process = start(tmp_path)
    time.sleep(0.12)  # a few steps past the checkpoint
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL and state(tmp_path)["step"] % 10 == 0
    else:
        assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert 10 <= state(tmp_path)["step"] < 40
    run(tmp_path)
    assert_same(tmp_path, whole)


def test_ctrl_c_while_the_last_step_is_validated_ends_the_command(tmp_path: Path, whole: Path) -> None:
    def validate(_: nn.Module) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, validate=validate)  # once, at the end
    assert signal.getsignal(signal.SIGINT) == before
    assert_same(tmp_path, whole)


def test_the_log_is_cut_where_the_run_goes_on(tmp_path: Path) -> None:
    run(tmp_path, stop_after=20)
    log = tmp_path / "log.jsonl"
    with open(log, "a") as file:  # what a killed run had written past its checkpoint, the last line torn
        file.write(json.dumps({"step": 30, "loss": 1e9}) + '\n{"step": 40, "lo')
    run(tmp_path)
    lines = read_log(log)
    assert [line["step"] for line in lines] == [10, 20, 30, 40] and all(line["loss"] < 1e6 for line in lines)


def test_it_is_validated_as_often_as_asked(tmp_path: Path) -> None:
    run(tmp_path, dataclasses.replace(SETTINGS, steps=21, validate_every=7), validate=lambda model: {"validation_loss": 1.0})
    log = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in log if "validation_loss" in line] == [7, 14, 21] and [line["step"] for line in log] == [7, 10, 14, 20, 21]


def test_starting_anew_forgets_the_old_run(tmp_path: Path, whole: Path) -> None:
    run(tmp_path, stop_after=20, seed=3)
    run(tmp_path, resume=False)
    assert_same(tmp_path, whole)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [10, 20, 30, 40]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bad", [20, 25])
def test_a_loss_that_is_not_finite_stops_with_the_checkpoint_intact(tmp_path: Path, bad: int, precision) -> None:
    def spoilt(step: int) -> dict[str, Tensor]:
        data = batch(step)
        return {**data, "y": data["y"] * (math.nan if step + 1 == bad else 1)}

    with pytest.raises(TrainingError, match=rf"^toy: the loss is nan at step {bad}: .*last checkpoint is intact$"):
        run(tmp_path, dataclasses.replace(SETTINGS, precision=precision), batch=spoilt)
    kept = state(tmp_path)
    assert kept["step"] == (bad - 1) // 10 * 10 and all(value.isfinite().all() for value in kept.values())


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_for_processors_that_compute_in_it(tmp_path: Path, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: fast)
    seen = set()

    def watched(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        seen.add(model(data["x"]).dtype)
        return loss(model, data)

    run(tmp_path, dataclasses.replace(SETTINGS, precision="bf16"), loss=watched, stop_after=2)
    assert seen == {torch.bfloat16 if fast else torch.float32}


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    def spoilt(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        value = loss(model, data)
        return value + 0 * (model.weight - model.weight).sum().sqrt()  # zero, with a gradient of 0 * infinity

    def sound(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        return spoilt(model, data) if float(data["bad"][0]) else loss(model, data)

    with pytest.raises(TrainingError, match="^toy: the gradient is not finite at step 20: "):
        run(tmp_path, batch=lambda step: {**batch(step), "bad": torch.full((8,), float(step == 19))}, loss=sound)
    kept = state(tmp_path)
    assert kept["step"] == 10 and all(value.isfinite().all() for value in kept.values())


class Shared(nn.Module):
    """A map, which Muon trains, and a bias and a gain, which AdamW does."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.gain = nn.Linear(2, 2), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.map(x) * self.gain).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("part", ["map.weight", "gain"])
def test_fp16_skips_a_step_with_all_optimisers_or_none(tmp_path: Path, part: str) -> None:
    settings, seen = dataclasses.replace(SETTINGS, precision="fp16", optimizer="muon", steps=100, learning_rate=0.2), []

    def spoilt(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        value = loss(model, data) / 64  # small enough for the scale that fp16 begins with
        parameter = model.get_parameter(part)  # its gradient alone is no number, in the twelfth step
        return value + 0 * (parameter - parameter).sum().sqrt() if len(seen) == 12 else value

    torch.manual_seed(0)
    trained = fit(Shared(), batch, spoilt, settings, tmp_path, name="toy", model_config={})
    moved = [any(not torch.equal(before[name], after[name]) for name in before) for before, after in zip(seen, seen[1:])]
    assert [step for step, moves in enumerate(moved, start=1) if not moves] == [12]
    assert all(value.isfinite().all() for value in trained.state_dict().values())
    losses = [line["loss"] for line in read_log(tmp_path / "log.jsonl")]
    assert losses[-1] < losses[0] / 2


def test_fp16_stops_where_every_step_would_be_skipped(tmp_path: Path) -> None:
    def spoilt(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        return loss(model, data) + 0 * (model.weight - model.weight).sum().sqrt()

    with pytest.raises(TrainingError, match="^toy: the gradient is not finite at step 20: "):
        run(tmp_path, dataclasses.replace(SETTINGS, precision="fp16"), loss=spoilt)
    assert all(value.isfinite().all() for value in state(tmp_path).values())


@pytest.mark.parametrize("change", [{"settings": dataclasses.replace(SETTINGS, learning_rate=0.04)}, {"seed": 1}])
def test_other_settings_are_refused(tmp_path: Path, change: dict) -> None:
    run(tmp_path, stop_after=10)
    before = (tmp_path / "training.pt").read_bytes()
    with pytest.raises(TrainingError, match="holds a toy run with other settings"):
        run(tmp_path, **change)
    assert (tmp_path / "training.pt").read_bytes() == before


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run(tmp_path, stop_after=10)
    path = tmp_path / "training.pt"
    for content in (path.read_bytes()[:-200], b"", b"no checkpoint"):
        path.write_bytes(content)
        with pytest.raises(TrainingError, match=r"training.pt is damaged: [^\n]*$"):
            run(tmp_path)
    torch.save({"step": 10}, path)  # of somebody else
    with pytest.raises(TrainingError, match="training.pt is damaged"):
        run(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed: file write failed\nmore")])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    run(tmp_path, stop_after=10)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "log.jsonl"}

    def half(state: dict, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(training.torch, "save", half)
        with pytest.raises(TrainingError, match=r"^cannot write .*training.pt \(.*\): what stood there is intact; [^\n]*$"):
            run(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "log.jsonl"} == before  # and nothing half written
    run(tmp_path)
    assert_same(tmp_path, whole)


def test_a_full_disk_leaves_the_old_model(tmp_path: Path) -> None:
    pytest.importorskip("resource")  # a limit on a file's size: to whoever writes, the disk is full
    save_model(tmp_path, nn.Linear(100, 100), {"a": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert re.fullmatch(r"cannot write .*model.safetensors \(.*\): what stood there is intact; [^\n]*\n", done.stdout), done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_log_that_the_disk_cut_short_is_read_as_far_as_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "lo')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 10, "loss": 1.0}]

    def full(log: Path, line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=r"cannot write .*log.jsonl \(.*No space left"):
        real = open
        patch.setattr("builtins.open", lambda path, mode="r", *rest, **more: full(path, mode) if mode == "a" else real(path, mode, *rest, **more))
        training._append(tmp_path / "log.jsonl", "{}\n")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        run(tmp_path / "file" / "run")
    if os.geteuid():  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(OSError, match="Permission"):
            run(tmp_path / "run")
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_can_be_written_no_more_keeps_its_checkpoint(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    run(tmp_path, stop_after=20)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(training.os, "replace", refuse)
        with pytest.raises(TrainingError, match=f"^cannot write .*{os.strerror(number)}.*what stood there is intact"):
            run(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    run(tmp_path)
    assert_same(tmp_path, whole)


def test_the_handlers_of_signals_come_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(tmp_path, dataclasses.replace(SETTINGS, steps=1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
