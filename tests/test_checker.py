from dataclasses import asdict

import pytest
import torch

from minunclip.config import CheckerConfig, TrainingConfig
from minunclip.data.captions import compare, parse
from minunclip.data.checker import (
    CELLS,
    NO_WORD,
    PARTS,
    Reading,
    SceneReader,
    decode,
    matches,
    reader_batch_loss,
    reader_batches,
    reader_loss,
    reader_scenes,
    targets,
)
from minunclip.data.render import render
from minunclip.data.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, is_held_out, sample_scenes
from minunclip.data.world import to_tensor
from minunclip.loading import load_model
from minunclip.training import fit, read_log, save_model


def perfect(scenes):
    """The reading of a reader that makes no mistake."""
    things = torch.zeros(len(scenes), len(SIZES), sum(PARTS), CELLS, CELLS)
    things[:, :, 0] = -20
    background, word = torch.zeros(len(scenes), len(BACKGROUNDS)), torch.zeros(len(scenes), NO_WORD + 1)
    for b, scene in enumerate(scenes):
        background[b, list(BACKGROUNDS).index(scene.background)] = 30
        word[b, SHAPES.index(scene.word) if scene.word else NO_WORD] = 30
        for t in scene.things:
            for dy in (-1, 0, 1):  # what the loss asks for: the thing's neighbours know it too
                for dx in (-1, 0, 1):
                    row, column = int(t.y * CELLS) + dy, int(t.x * CELLS) + dx
                    cell = things[b, SIZES.index(t.size), :, row, column]
                    cell[0] = 20 if dx == dy == 0 else -20
                    cell[1 + SHAPES.index(t.shape)] = cell[9 + list(COLOURS).index(t.colour)] = cell[19 + TEXTURES.index(t.texture)] = 30
                    cell[23], cell[24] = t.x * CELLS - column - 0.5, t.y * CELLS - row - 0.5
    return Reading(things, background, word)


def said(scene):
    things = sorted((t.size, t.shape, t.colour, t.texture, round(t.x, 4), round(t.y, 4)) for t in scene.things)
    return things, scene.background, scene.word


def test_a_perfect_reading_decodes_to_the_scene_and_has_no_loss():
    scenes = reader_scenes(200, seed=0)
    reading = perfect(scenes)
    assert [said(s) for s in decode(reading)] == [said(s) for s in scenes]
    assert reader_loss(reading, targets(scenes)) < 1e-4
    swapped = Reading(reading.things.flip(1), reading.background, reading.word)  # small for large
    assert reader_loss(swapped, targets(scenes)) > 10


def test_decode_keeps_the_three_highest_peaks_and_drops_their_neighbours():
    things = torch.full((1, 2, sum(PARTS), CELLS, CELLS), -5.0)
    things[:, :, -2:] = 0
    peaks = [(0, 3, 3, 4.0), (0, 3, 4, 3.0), (1, 3, 3, 2.0), (0, 9, 9, 1.0), (1, 12, 2, 0.5), (1, 6, 13, -0.1)]
    for size, row, column, logit in peaks:
        things[0, size, 0, row, column] = logit
    (scene,) = decode(Reading(things, torch.zeros(1, 6), torch.zeros(1, 9)))
    assert [(t.size, t.x * CELLS - 0.5, t.y * CELLS - 0.5) for t in scene.things] == [("small", 3, 3), ("small", 9, 9), ("large", 3, 3)]
    (empty,) = decode(Reading(torch.full_like(things, -5.0), torch.zeros(1, 6), torch.zeros(1, 9)))
    assert empty.things == () and not compare(parse("a red star"), empty).all_right


def test_reader_scenes_show_every_kind_of_scene():
    scenes = reader_scenes(400, seed=3)
    assert 0.1 < sum(s.word is not None for s in scenes) / len(scenes) < 0.35
    assert 0.25 < sum(s.relation == "inside" for s in scenes) / len(scenes) < 0.4
    odd = [any(is_held_out(t.texture, t.colour, t.shape) for t in s.things) for s in scenes]
    assert 0.3 < sum(odd) / len(odd) < 0.6


def test_a_picture_is_read_alike_at_any_batch_size_and_bad_input_is_refused():
    reader = SceneReader(CheckerConfig(8)).eval()
    with torch.no_grad():
        reader.things.bias.view(2, -1)[:, 0] = 5.0  # so that it sees something, whatever its weights
    images = to_tensor(render(sample_scenes(3, 0), 32))
    together = reader.read(images)
    assert [said(s) for s in together] == [said(reader.read(image[None])[0]) for image in images]
    assert any(s.things for s in together)
    with pytest.raises(ValueError, match="must be"):
        reader.read(images[0])
    with pytest.raises(ValueError, match="eval"):
        reader.train().read(images)


def test_a_saved_reader_reads_the_same(tmp_path):
    reader = SceneReader(CheckerConfig(8)).eval()
    save_model(tmp_path, reader, asdict(reader.config))
    again = load_model("checker", tmp_path)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        for a, b in zip(reader(images), again(images)):
            assert torch.equal(a, b)


@pytest.mark.slow
def test_a_reader_learns_a_few_scenes_by_heart(tmp_path):
    scenes, settings = reader_scenes(12, seed=0), TrainingConfig(steps=200, batch_size=16, learning_rate=4e-3, warmup=30, ema_decay=0.9)
    torch.manual_seed(0)
    reader = fit(SceneReader(CheckerConfig(16)), reader_batches(scenes, 16, 0), reader_batch_loss, settings, tmp_path, name="checker", model_config={})
    losses = [line["loss"] for line in read_log(tmp_path / "log.jsonl")]
    assert losses[-1] < 0.2 * losses[0]
    for size in (32, 64, 128):
        read = reader.read(to_tensor(render(scenes, size)))
        right = sum([t[:4] for t in said(a)[0]] == [t[:4] for t in said(b)[0]] and a.background == b.background for a, b in zip(scenes, read))
        assert right >= 0.8 * len(scenes)
    scene = next(s for s in scenes if len(s.things) == 1 and s.word is None)
    thing, image = scene.things[0], to_tensor(render([scene], 64))[0]
    assert matches(image, f"a {thing.size} {thing.colour} {thing.shape}", reader).all_right
    other = next(c for c in COLOURS if c != thing.colour)
    assert not matches(image, f"a {other} {thing.shape}", reader).all_right
