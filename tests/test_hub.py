"""Weights by a name of the Hub: out of a cache as huggingface_hub lays it, and up into a Hub that is a folder. No network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minunclip import hub as weights_hub
from minunclip.cli import WEIGHTS, main
from minunclip.hub import local_folder, model_card
from minunclip.pipeline import UnCLIP

hub = pytest.importorskip("huggingface_hub")
NAME = "somebody/tiny-unclip"


def lay_in_cache(folder: Path, cache: Path, name: str = NAME) -> None:
    """blobs by hash, a snapshot of links to them, and refs/main that names the snapshot."""
    home, commit = cache / f"models--{name.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (home / part).mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    for i, path in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        shutil.copyfile(path, home / "blobs" / f"{i:040x}")
        link = home / "snapshots" / commit / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(home / "blobs" / f"{i:040x}", link.parent))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_folders_come_first_and_other_names_are_left_alone(cache: Path, tmp_path: Path) -> None:
    for name in ("nowhere", str(tmp_path / "a" / "b"), "a/b/c", "somebody/"):
        assert local_folder(name) == Path(name)
    (tmp_path / "somebody").mkdir()
    assert local_folder(NAME) == Path(NAME)  # a folder that lacks one of its own is no owner


def test_what_cannot_be_had_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "a star", "--weights", NAME, "--out", "x.png"]) == 2
    monkeypatch.setattr(weights_hub, "find_spec", lambda name: None)
    assert main(["sample", "a star", "--weights", NAME, "--out", "x.png"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert f"{NAME} is no folder, and the Hub does not give it" in first and "pip install -e '.[hub]'" in second


@pytest.mark.slow
def test_a_name_draws_what_the_folder_draws_offline(tiny_weights: Path, tmp_path: Path) -> None:
    lay_in_cache(tiny_weights, tmp_path / "cache")
    where = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "minunclip.cli", "sample", "a star", "--device", "cpu", "--out"]
    subprocess.run([*command, "there.png", "--weights", NAME], cwd=tmp_path, env=os.environ | where, check=True)
    subprocess.run([*command, "here.png", "--weights", str(tiny_weights)], cwd=tmp_path, check=True)
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()  # the same in what is written beside it, too


def test_a_snapshot_that_lacks_a_file_names_it(cache: Path) -> None:
    lay_in_cache(WEIGHTS, cache)
    next(cache.rglob("snapshots/*/decoder/model.safetensors")).unlink()
    with pytest.raises(ValueError, match="decoder/model.safetensors is missing"):
        UnCLIP.from_pretrained(NAME)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub that is a folder."""

    def upload_folder(repo_id: str, folder_path: Path, allow_patterns: list[str]) -> None:
        for path in (path for pattern in allow_patterns for path in Path(folder_path).rglob(pattern)):
            to = tmp_path / "remote" / path.relative_to(folder_path)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)

    def upload_file(repo_id: str, path_or_fileobj: bytes, path_in_repo: str) -> None:
        (tmp_path / "remote" / path_in_repo).write_bytes(path_or_fileobj)

    monkeypatch.setattr(hub, "create_repo", lambda name, private, exist_ok: f"https://hub/{name}{' for its owner alone' * private}")
    monkeypatch.setattr(hub, "upload_folder", upload_folder)
    monkeypatch.setattr(hub, "upload_file", upload_file)
    return tmp_path / "remote"


@pytest.mark.slow
def test_what_is_pushed_comes_back(cache: Path, remote: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(WEIGHTS, tmp_path / "copy")
    (copy / "decoder" / "training.pt").touch()
    evaluation = WEIGHTS.parents[1] / "results" / "evaluation.json"
    assert main(["push", str(copy), NAME, "--figures", str(evaluation)]) == 0
    assert capsys.readouterr().out == f"https://hub/{NAME}\n" and not list(remote.rglob("*.pt"))
    lay_in_cache(remote, cache)
    ours, theirs = UnCLIP.from_pretrained(copy), UnCLIP.from_pretrained(NAME)
    pictures = [model.generate(["a red star"], seed=3, size=32).pictures[32] for model in (ours, theirs)]
    assert np.array_equal(*pictures)
    card = (remote / "README.md").read_text()
    for part in (
        "license: mit\n",
        "captioned world and nothing else",
        "| shape right |",
        "`minunclip train prior --preset long",
        "](clip/loss.png)",
        f'("{NAME}")',
    ):
        assert card.count(part) == 1, part
    assert "\n\n\n" not in card
    assert main(["push", str(copy), NAME, "--private"]) == 0 and capsys.readouterr().out == f"https://hub/{NAME} for its owner alone\n"
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"weights": "of others"}))
    assert main(["push", str(copy), NAME, "--figures", str(other)]) == 2 and main(["push", str(copy), "nameless"]) == 2
    other.write_text(json.dumps({"weights": "of others", "clip": {}}))
    assert main(["push", str(copy), NAME, "--figures", str(other)]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert "without --captions" in first and "write owner/name" in second and "figures of other weights" in third


def test_a_model_without_cards_says_so(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = UnCLIP.from_pretrained(WEIGHTS)
    assert model.push_to_hub(NAME) == f"https://hub/{NAME}"
    card = (remote / "README.md").read_text()
    stages = "ar-prior, checker, clip, dalle, dalle-vae, decoder, glide, prior, upsampler1, upsampler2"
    assert "license: other" in card and f"Of {stages} it is not recorded" in card and "Not measured." in card

    for error, said in ((OSError("401 Unauthorized\nmore"), "401 Unauthorized"), (hub.errors.HTTPError("no connection"), "no connection")):

        def refuse(*arguments: Any, error: Exception = error, **options: Any) -> None:
            raise error

        monkeypatch.setattr(hub, "create_repo", refuse)
        with pytest.raises(ValueError, match=f"{said}.: log in with `hf auth login`"):
            model.push_to_hub(NAME)


def test_pictures_of_ones_own_keep_their_licence(tmp_path: Path) -> None:
    (tmp_path / "prior").mkdir()
    data = "Data: the pictures of holidays, whose licence holds for this model too. Figures and limits: not measured."
    (tmp_path / "prior" / "card.md").write_text(f"# prior\n\nA prior.\n\n{data}\n\n| | |\n|---|---|\n| preset | cpu |\n")
    card = model_card(tmp_path, NAME)
    assert "license: other" in card and card.count(data) == 1 and "## prior\n\nA prior.\n\n| | |" in card
