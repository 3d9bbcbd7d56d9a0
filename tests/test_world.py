import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minunclip.config import TINY
from minunclip.data.captions import describes
from minunclip.data.render import render
from minunclip.data.scenes import sample_scenes, twin
from minunclip.data.world import build_world, to_tensor, trim
from minunclip.models.upsampler import resize
from minunclip.runs import Run
from minunclip.stages import SOFT_SHARE, prepare, train
from minunclip.training import TrainingError

SMALL = replace(TINY, world=replace(TINY.world, training_scenes=12, upsampler_scenes=10))


def test_a_world_is_drawn_once(tmp_path: Path) -> None:
    first = build_world(SMALL, tmp_path)
    stamp = (first.folder / "pictures.npy").stat().st_mtime_ns
    again = build_world(SMALL, tmp_path)
    assert (again.folder / "pictures.npy").stat().st_mtime_ns == stamp and len(again) == 12
    assert all(np.array_equal(getattr(first, name), getattr(again, name)) for name in ("pictures", "small", "captions", "middle", "parts"))
    assert again.pictures.dtype == np.uint8 and again.captions.shape == (12, 4, TINY.clip.context_length)


def test_captions_are_true_of_their_pictures(tmp_path: Path) -> None:
    world, rng = build_world(SMALL, tmp_path), np.random.default_rng([0, 9])
    scenes = [one for scene in sample_scenes(6, 0) for one in (scene, twin(scene, rng))]
    assert np.array_equal(world.pictures, render(scenes, TINY.clip.image_size)) and np.array_equal(world.small, render(scenes, TINY.decoder.image_size))
    told = [describes(world.tokenizer.decode(row), scene) for i, scene in enumerate(scenes) for row in world.captions[i].tolist() if row[-1] == 0]
    assert len(told) > 20 and all(told)  # but for those that were cut


def test_clip_sees_pairs_beside_their_twins_and_a_quarter_of_them_blown_up(tmp_path: Path) -> None:
    run = Run(SMALL, tmp_path, torch.device("cpu"))
    data, side = prepare("clip", run)[2](0), TINY.clip.image_size
    sharp = to_tensor(np.array(run.world.pictures))
    views = torch.stack([sharp, resize(to_tensor(np.array(run.world.small)), (side, side))])  # (2, N, 3, S, S)
    apart = (data["images"][:, None, None] - views).abs().amax(dim=(3, 4, 5))  # (B, 2, N)
    kinds, rows = torch.unravel_index(apart.flatten(1).argmin(dim=1), apart.shape[1:])
    assert apart.flatten(1).amin(dim=1).max() < 1e-5 and int(kinds.sum()) == len(rows) // SOFT_SHARE
    assert sorted((rows ^ 1).tolist()) == sorted(rows.tolist())  # each beside its twin
    captions = torch.from_numpy(run.world.captions.astype(np.int64))
    assert all((captions[row] == tokens).all(dim=1).any() for row, tokens in zip(rows, data["tokens"]))
    with pytest.raises(TrainingError, match="each scene stands beside its twin, for which a batch of 3"):
        train("clip", run, settings=replace(SMALL.training["clip"], batch_size=3))


@pytest.mark.parametrize("stage", ["upsampler1", "upsampler2"])
def test_upsamplers_never_train_on_what_validates_them_and_see_it_spoiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    seen, draw = [], Run.draw

    def noted(self: Run, *given: object) -> object:
        found = draw(self, *given)  # type: ignore[arg-type]
        seen.extend(found[0])
        return found

    monkeypatch.setattr(Run, "draw", noted)
    run = Run(SMALL, tmp_path, torch.device("cpu"))
    batch = prepare(stage, run)[2]
    batches = [batch(step) for step in range(50)]
    assert set(seen) == set(range(5))  # of ten scenes
    drawn = to_tensor(np.array(run.world.small if stage == "upsampler1" else run.world.parts_small))
    lows = torch.cat([data["low"] for data in batches[:4]])
    windows = drawn.unfold(2, lows.shape[2], 1).unfold(3, lows.shape[3], 1)  # every crop of that size
    spoiled = [float((windows - low[None, :, None, None]).abs().amax(dim=(1, 4, 5)).min()) > 0.01 for low in lows]
    assert np.mean(spoiled) > 0.3  # a blur leaves a piece of bare background as it is


def test_a_run_folder_holds_one_world_and_settings_that_do_not_draw_do_not_change_it(tmp_path: Path) -> None:
    world = build_world(SMALL, tmp_path)
    diffusion = replace(SMALL.upsampler2.diffusion, objective="v")
    assert build_world(replace(SMALL, upsampler2=replace(SMALL.upsampler2, diffusion=diffusion)), tmp_path).folder == world.folder
    with pytest.raises(ValueError, match="of other data, settings or code"):
        build_world(SMALL, tmp_path, seed=1)


def test_a_world_that_was_not_finished_is_in_nobodys_way(tmp_path: Path) -> None:
    home = Run(SMALL, tmp_path, torch.device("cpu")).world.folder
    (home / "done").unlink()
    for name in ("world-notes", "world-0123456789ab"):
        (home.parent / name).mkdir()
    (home.parent / "world-notes" / "done").touch()  # whatever it is
    with pytest.raises(ValueError, match="holds world-notes"):
        _ = Run(SMALL, tmp_path, torch.device("cpu"), seed=1).world
    assert [path.name for path in home.parent.iterdir()] == ["world-notes"]
    shutil.rmtree(home.parent / "world-notes")
    assert Run(SMALL, tmp_path, torch.device("cpu"), seed=1).world.folder != home


def test_every_other_scene_is_the_twin_of_the_one_before(tmp_path: Path) -> None:
    """Twins share their background, and so most of their pixels; neighbours that are not twins share few."""
    pictures = build_world(replace(SMALL, world=replace(SMALL.world, training_scenes=200)), tmp_path).pictures
    same = [(one == other).all(axis=-1).mean() for one, other in zip(pictures, pictures[1:])]
    assert min(same[::2]) > 0.3 and np.mean(same[::2]) > 2 * np.mean(same[1::2])
    assert all((one != other).any() for one, other in zip(pictures[::2], pictures[1::2]))


def test_the_first_upsampler_learns_from_scenes_drawn_at_either_size(tmp_path: Path) -> None:
    run = Run(replace(SMALL, upsampler1=replace(SMALL.upsampler1, degradation="none", noise=0.0, crop=1)), tmp_path, torch.device("cpu"))
    assert len(run.world.middle) == 10
    pairs = prepare("upsampler1", run)[2](0)
    small, middle = (to_tensor(np.array(pictures[:10])) for pictures in (run.world.small, run.world.middle))
    rows = [int((middle == one).flatten(1).all(dim=1).nonzero()[0]) for one in pairs["images"]]
    assert torch.equal(pairs["low"], small[rows])  # as drawn, not reduced
    side = small.shape[2:]
    apart = [[float((resize(large[None], side) - one).square().mean()) for one in small] for large in middle]
    assert np.array_equal(np.argmin(apart, axis=1), range(10)) and 0 < max(np.diagonal(apart)) < 0.01  # the same scene, and no copy


def test_rows_with_a_thing_inside_another_are_known_and_drawn_more_often_for_the_decoder(tmp_path: Path) -> None:
    preset = replace(TINY, world=replace(TINY.world, training_scenes=400))
    run = Run(preset, tmp_path, torch.device("cpu"))
    assert [i // 2 for i in run.world.nested] == [i for i, scene in enumerate(sample_scenes(200, 0)) for _ in "ab" if scene.relation == "inside"]
    train("clip", run, settings=replace(preset.training["clip"], steps=1))
    train("dalle-vae", run, settings=replace(preset.training["dalle-vae"], steps=1))
    inside = to_tensor(run.world.small[run.world.nested].copy()).flatten(1)
    for stage in ("glide", "dalle-vae", "dalle", "decoder"):  # what is compared learns from the same pictures
        batch = prepare(stage, run)[2]
        shares = [np.mean([bool((inside == one).all(dim=1).any()) for one in batch(step)["images"].flatten(1)]) for step in range(20)]
        assert min(shares) >= 5 / 16 and np.mean(shares) == pytest.approx(5 / 16 + 11 / 16 * len(inside) / 400, abs=0.05), stage
    assert torch.equal(batch(3)["images"], prepare("decoder", run)[2](3)["images"])
    drawn = batch(3)
    rows = [int((to_tensor(np.array(run.world.small)).flatten(1) == one).all(dim=1).nonzero()[0]) for one in drawn["images"].flatten(1)]
    assert np.array_equal(drawn["z_i"].numpy(), run.image_embeddings[rows])  # what goes with a picture came with it


def test_padding_is_cut_and_a_token_0_within_a_caption_is_none() -> None:
    tokens, mask = trim(torch.tensor([[5, 0, 7, 0, 0], [9, 0, 0, 0, 0]]))
    assert tokens.tolist() == [[5, 0, 7], [9, 0, 0]] and mask.tolist() == [[True, True, True], [True, False, False]]
    assert trim(torch.zeros(2, 4, dtype=torch.int64))[0].shape == (2, 1)
