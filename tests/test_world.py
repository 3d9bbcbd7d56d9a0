from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minunclip.config import TINY
from minunclip.data.world import build_world, trim

SMALL = replace(TINY, world=replace(TINY.world, training_scenes=12, upsampler_scenes=20))


def test_a_world_is_drawn_once_and_captions_belong_to_their_pictures(tmp_path: Path) -> None:
    first = build_world(SMALL, tmp_path)
    stamp = (first.folder / "pictures.npy").stat().st_mtime_ns
    again = build_world(SMALL, tmp_path)
    assert (again.folder / "pictures.npy").stat().st_mtime_ns == stamp and len(again) == 12
    assert all(np.array_equal(getattr(first, name), getattr(again, name)) for name in ("pictures", "small", "captions", "middle", "parts"))
    assert again.pictures.dtype == np.uint8 and again.captions.shape == (12, 4, TINY.clip.context_length)


def test_a_run_folder_holds_one_world_and_settings_that_do_not_draw_do_not_change_it(tmp_path: Path) -> None:
    world = build_world(SMALL, tmp_path)
    diffusion = replace(SMALL.upsampler2.diffusion, objective="v")
    assert build_world(replace(SMALL, upsampler2=replace(SMALL.upsampler2, diffusion=diffusion)), tmp_path).folder == world.folder
    with pytest.raises(ValueError, match="of other data, settings or code"):
        build_world(SMALL, tmp_path, seed=1)


def test_every_other_scene_is_the_twin_of_the_one_before(tmp_path: Path) -> None:
    """Twins share their background, and so most of their pixels; neighbours that are not twins share few."""
    pictures = build_world(replace(SMALL, world=replace(SMALL.world, training_scenes=200)), tmp_path).pictures
    same = [(one == other).all(axis=-1).mean() for one, other in zip(pictures, pictures[1:])]
    assert min(same[::2]) > 0.3 and np.mean(same[::2]) > 2 * np.mean(same[1::2])
    assert all((one != other).any() for one, other in zip(pictures[::2], pictures[1::2]))


def test_padding_is_cut_and_a_token_0_within_a_caption_is_none() -> None:
    tokens, mask = trim(torch.tensor([[5, 0, 7, 0, 0], [9, 0, 0, 0, 0]]))
    assert tokens.tolist() == [[5, 0, 7], [9, 0, 0]] and mask.tolist() == [[True, True, True], [True, False, False]]
    assert trim(torch.zeros(2, 4, dtype=torch.int64))[0].shape == (2, 1)
