"""ONNX: the table of sampling steps against the samplers, and the exported chain, by onnxruntime, against PyTorch's."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minunclip import export
from minunclip.cli import WEIGHTS, main
from minunclip.config import TINY, DiffusionConfig
from minunclip.data.tokenizer import Tokenizer
from minunclip.diffusion import make_denoiser, make_schedule, sample
from minunclip.loading import MODELS
from minunclip.pipeline import UnCLIP

CAPTIONS = ["a red circle above a blue square", "", "three stars"]


@pytest.mark.parametrize("objective", ["epsilon", "x0", "v"])
@pytest.mark.parametrize(("schedule", "sampler", "steps"), [("cosine", "dpm", 8), ("linear", "ddim", 13), ("cosine", "ddim", 1), ("linear", "dpm", 2)])
def test_the_table_is_the_sampler(schedule: Any, sampler: Any, steps: int, objective: Any) -> None:
    tables = make_schedule(schedule, 1000)
    x_t = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))

    def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.sin(2 * x + timestep[:, None] / 300)

    expected = sample(make_denoiser(network, tables, objective, clip=1.5), tables, x_t, sampler, steps)
    previous = torch.zeros_like(x_t)
    for row in export.sampling_table(DiffusionConfig(schedule, objective, False, sampler, steps)):
        output = network(x_t, torch.full((2,), row["timestep"]))
        x_0 = (row["from_x_t"] * x_t + row["from_output"] * output).clamp(-1.5, 1.5)
        x_t, previous = row["keep"] * x_t + row["add"] * x_0 + row["previous"] * previous, x_0
    torch.testing.assert_close(x_t, expected, atol=1e-4, rtol=0)


def test_a_sampler_that_draws_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="ancestral"):
        export.sampling_table(DiffusionConfig("cosine", "epsilon", True, "ancestral", 8))


@pytest.fixture(scope="module")
def model() -> UnCLIP:
    """The tiny preset, untrained, but with no layer left at zero, and weights that half precision holds."""
    torch.manual_seed(0)
    models = {stage: MODELS[stage][0](TINY.models[stage]).eval() for stage in export.FILES}
    for parameter in (p for network in models.values() for p in network.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.data.half().float()
    return UnCLIP(models, Tokenizer.train(["a red circle", "three blue stars above a square"], 300))


@pytest.fixture(scope="module")
def exported(model: UnCLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("export") / "chain"
    differences = export.export_onnx(model, folder)
    assert differences.keys() == {f"{name}.onnx" for name in export.FILES.values()} and max(differences.values()) < 1e-4
    return folder


def test_graphs_take_any_batch_and_any_length(model: UnCLIP, exported: Path) -> None:
    tokens, mask = model.tokenizer(CAPTIONS * 2, 9)
    encoded, z_t = export.open_session(exported / "clip-text.onnx").run(None, {"tokens": tokens.numpy(), "mask": mask.numpy()})
    expected = model.models["clip"].text_features(tokens, mask)
    np.testing.assert_allclose(encoded, expected[0].detach(), atol=1e-4)
    np.testing.assert_allclose(z_t, expected[1].detach(), atol=1e-4)


def test_the_chain_draws_the_same_picture(model: UnCLIP, exported: Path) -> None:
    seeds = [5, 6, 7]
    for guidance, prior_guidance in ((1.0, 1.0), (2.0, 1.5), (1.0, 3.0)):
        ours = model.generate(CAPTIONS, seed=seeds, guidance=guidance, prior_guidance=prior_guidance).pictures
        theirs = export.draw(exported, CAPTIONS, seeds, guidance, prior_guidance)
        for expected, found in zip(ours.values(), theirs, strict=True):
            pixels = ((found.transpose(0, 2, 3, 1) + 1) * 127.5).round()
            assert expected.std() > 10 and np.abs(pixels - expected).max() <= 1


def test_the_manifest_describes_the_files_and_weights_take_half_the_room(model: UnCLIP, exported: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    assert sorted(path.name for path in exported.iterdir()) == sorted(["manifest.json", "tokenizer.json", *(m["file"] for m in manifest["models"].values())])
    assert Tokenizer.load(exported / manifest["tokenizer"]).merges == model.tokenizer.merges
    assert manifest["latent_scale"] == pytest.approx(32**0.5) and manifest["context_length"] == 32
    low = manifest["models"]["upsampler1"]["inputs"]["low_resolution"]
    assert low == {"type": "tensor(float)", "shape": ["batch", 3, 16, 16]} and len(manifest["models"]["decoder"]["steps"]) == 8
    weights = sum(parameter.numel() for parameter in model.models["decoder"].parameters())
    assert 2 * weights < (exported / "decoder.onnx").stat().st_size < 2.6 * weights


def test_a_graph_that_differs_is_not_exported(model: UnCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "_difference", lambda *_: 2e-4)
    with pytest.raises(ValueError, match="clip-text.onnx differs from PyTorch by 2.0e-04"):
        export.export_onnx(model, tmp_path / "chain")
    assert not list(tmp_path.iterdir())


def test_a_chain_that_enlarges_once_is_refused(model: UnCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="no upsampler2"):
        export.export_onnx(UnCLIP({stage: one for stage, one in model.models.items() if stage != "upsampler2"}, model.tokenizer), tmp_path / "chain")
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--onnx", str(tmp_path / "no" / "folder")]) == 2
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert main(["export", "--onnx", str(tmp_path / "chain")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "make it first" in first and "pip install -e '.[onnx]'" in second and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_weights_that_ship_draw_the_same_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    assert main(["export", "--onnx", str(tmp_path / "chain")]) == 0
    assert capsys.readouterr().out.count("differs from PyTorch") == 5
    expected = UnCLIP.from_pretrained(WEIGHTS).generate(CAPTIONS[:1], seed=7).pictures
    for ours, found in zip(expected.values(), export.draw(tmp_path / "chain", CAPTIONS[:1], [7]), strict=True):
        difference = np.abs(((found.transpose(0, 2, 3, 1).clip(-1, 1) + 1) * 127.5).round() - ours)
        assert difference.mean() < 0.1 and (difference > 2).mean() < 1e-3  # of 255; the second upsampler magnifies rounding at edges
