"""What a stage hands to its loss: how often it drops the caption and the embedding, so that guidance has something to start from; and what embeddings find."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minunclip import stages
from minunclip.config import TINY
from minunclip.runs import Run
from minunclip.stages import beside_the_nearest, prepare

DROPS = replace(
    TINY,
    prior=replace(TINY.prior, text_drop=0.3),
    ar_prior=replace(TINY.ar_prior, text_drop=0.15),
    decoder=replace(TINY.decoder, embedding_drop=0.2, caption_drop=0.7),
)


@pytest.mark.slow  # shares the training of the whole chain with other tests
@pytest.mark.parametrize(
    ("stage", "loss_name", "chances"),
    [
        ("prior", "prior_loss", (0.3,)),
        ("ar-prior", "autoregressive_loss", (0.15,)),
        ("decoder", "decoder_loss", (0.2, 0.7)),  # the embedding, the caption
        ("glide", "decoder_loss", (1.0, 0.2)),
    ],
)
def test_conditions_are_dropped_as_often_as_the_config_says(tiny_run: Path, monkeypatch: pytest.MonkeyPatch, stage, loss_name, chances) -> None:
    seen: list[list[Tensor]] = []
    times: list[Tensor] = []

    def look(*given: Tensor) -> Tensor:
        seen.append([drop.float() for drop in given[-len(chances) :]])
        if stage != "ar-prior":
            times.append(given[6])
        if loss_name == "decoder_loss":  # scaled, as it will be in use
            torch.testing.assert_close(given[3].norm(dim=1), torch.full((500,), 32**0.5))
        return torch.zeros(1)

    monkeypatch.setattr(stages, loss_name, look)
    settings = replace(TINY.training[stage], batch_size=500)
    _, model, batch, loss, _ = prepare(stage, Run(DROPS, tiny_run, torch.device("cpu")), settings)
    for step in range(8):
        loss(model, batch(step))
    drops = [torch.cat(column) for column in zip(*seen)]
    assert [drop.shape for drop in drops] == len(chances) * [(4000,)]
    for drop, chance in zip(drops, chances, strict=True):
        assert float(drop.mean()) == pytest.approx(chance, abs=0.03)  # four standard deviations
    if times:  # all of them, alike
        every = torch.cat(times)
        assert int(every.min()) < 8 and 991 < int(every.max()) < 1000 and float(every.float().mean()) == pytest.approx(499.5, abs=20)
    if len(chances) == 2:  # independent of each other
        assert float((drops[0] * drops[1]).mean()) == pytest.approx(chances[0] * chances[1], abs=0.03)


def test_the_codes_grow_colder_along_a_cosine(tiny_run: Path) -> None:
    batch = prepare("dalle-vae", Run(TINY, tiny_run, torch.device("cpu")), replace(TINY.training["dalle-vae"], steps=100))[2]
    assert [float(batch(step)["temperature"][0]) for step in (0, 50, 100)] == pytest.approx([1, (1 + 1 / 16) / 2, 1 / 16])


def test_what_embeddings_find_stands_below_what_they_should() -> None:
    levels = torch.linspace(-1, 1, 12)
    pictures = levels[:, None, None, None].expand(12, 3, 2, 2)
    z_i = torch.eye(12) * torch.linspace(1, 3, 12)[:, None]  # their length says nothing
    order = torch.tensor([0, 1, 2, 3, 4, 5, 6, 11, 8, 9])
    grid = beside_the_nearest(pictures, z_i, torch.eye(12)[order])
    rows = grid[::2, ::2, 0].astype(int)  # a number for each picture
    grey = ((levels + 1) * 127.5).round().int().numpy()
    assert rows.shape == (4, 8)  # eight, their finds, and then the last two with theirs, each row filled up with white
    assert (rows[0] == grey[:8]).all() and (rows[1] == grey[order[:8]]).all()
    assert rows[2].tolist() == rows[3].tolist() == [*grey[8:10], 255, 255, 255, 255, 255, 255]
