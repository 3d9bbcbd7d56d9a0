"""Your own pictures: real files, good ones of every kind and broken ones of every kind, from the folder to a drawn picture."""

import hashlib
import json
import multiprocessing
import os
import shutil
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minunclip.cli import main
from minunclip.config import TINY
from minunclip.data import collection
from minunclip.data.collection import build_collection
from minunclip.data.files import MOST_BYTES, Unusable, check_folder, list_folder, read_pictures, read_square
from minunclip.runs import Run


def scribble(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    colour = np.random.default_rng(seed).integers(0, 256, 3)
    return Image.fromarray(np.broadcast_to(colour, (height, width, 3)).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty good pictures with sidecar captions, some of them in a sub-folder."""
    home = tmp_path / "pictures"
    (home / "more").mkdir(parents=True)
    for i in range(30):
        path = home / ("more" if i % 3 == 0 else "") / f"{i:02}.png"
        scribble(i).save(path)
        path.with_suffix(".txt").write_text(f"picture {i}\nthe same, called {i}\n", encoding="utf-8")
    return home


def test_orientation_alpha_palette_grey_sixteen_bits_cmyk_and_animation(tmp_path: Path) -> None:
    def read(image: Image.Image, name: str, **options: object) -> np.ndarray:
        image.save(tmp_path / name, **options)
        return np.asarray(read_square((tmp_path / name).read_bytes()))

    upright = scribble(0, 40, 40)
    upright.paste((255, 0, 0), (0, 0, 40, 20))  # red above
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees clockwise"
    assert np.array_equal(read(turned, "turned.png", exif=exif), np.asarray(upright))
    clear = Image.new("RGBA", (8, 8), (0, 0, 255, 0))
    assert (read(clear, "clear.png") == 255).all()  # on white, not the blue that hides in it
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert abs(int(read(half, "half.png")[0, 0, 0]) - 127) <= 1
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.paste(1, (0, 0, 4, 8))
    seen = read(palette, "palette.gif", transparency=0)
    assert seen[0, 0].tolist() == [40, 50, 60] and seen[0, 7].tolist() == [255, 255, 255]
    assert read(Image.new("L", (8, 8), 77), "grey.png")[0, 0].tolist() == [77] * 3
    deep = Image.fromarray(np.full((8, 8), 200 * 256 + 9, np.uint16))
    assert read(deep, "deep.png")[0, 0].tolist() == [200] * 3
    with pytest.raises(Unusable, match="floating-point"):  # from 0 to 1, or to 255, or to anything
        read(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "float.tif")
    assert read(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "print.jpg", quality=95)[0, 0, 0] > 200
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert read(frames[0], "moving.gif", save_all=True, append_images=frames[1:])[0, 0].tolist() == [255, 0, 0]
    wide = scribble(1, 90, 30)
    wide.paste((0, 255, 0), (30, 0, 60, 30))
    assert (read(wide, "wide.bmp") == (0, 255, 0)).all()  # the middle, and not squeezed


def test_broken_files_have_a_reason_each(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "01.png").read_bytes()
    Image.effect_noise((64, 64), 50).save(folder / "noise.png")
    noise = (folder / "noise.png").read_bytes()
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")
    (folder / "noise.png").write_bytes(noise[: len(noise) // 2])
    (folder / "nothing.png").write_bytes(b"")
    scribble(0).save(folder / "turned.png", exif=b"Exif\0\0II*\0\x08")  # the directory that this announces is not there
    (folder / "words.png").write_text("not a picture")
    (folder / "latin.png").write_bytes(whole)
    (folder / "silent.png").write_bytes(whole)
    (folder / "alone.png").write_bytes(whole)
    (tmp_path / "secret.png").write_bytes(whole)
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    (folder / "told.png").write_bytes(whole)
    (tmp_path / "secret.txt").write_text("a secret")
    os.symlink(tmp_path / "secret.txt", folder / "told.txt")
    for name in ("noise", "bomb", "nothing", "turned", "words", "silent", "link"):
        (folder / f"{name}.txt").write_text("a caption" if name != "silent" else " \n")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "huge.png").touch()
    os.truncate(folder / "huge.png", MOST_BYTES + 1)  # a file with a hole: it takes no space
    (folder / "huge.txt").write_text("huge")
    (folder / "renamed.jpg").write_bytes(whole)  # a PNG by content: read all the same
    (folder / "renamed.txt").write_text("renamed")
    found = check_folder(folder)
    assert dict(found.skipped) == {
        "noise.png": "broken",
        "bomb.png": "of more than 64 million pixels",
        "huge.png": "of more than 256 million bytes",
        "nothing.png": "empty",
        "turned.png": "broken",
        "words.png": "no picture",
        "latin.png": "with a caption that is not UTF-8",
        "silent.png": "without a caption",
        "alone.png": "without a caption",
        "told.png": "without a caption",
        "link.png": "outside the folder",
    }
    assert len(found.pictures) == 31 and "3 without a caption" in found.reasons()
    world = build_collection(TINY, folder, tmp_path / "data")
    assert [json.loads(line)["reason"] for line in (world.folder / "skipped.jsonl").read_text().splitlines()].count("broken") == 2


def test_lists_of_three_kinds_say_the_same_and_may_not_lead_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    scribble(1).save(tmp_path / "outside.png")
    names = ["01.png", "more/00.png", "../outside.png", str(tmp_path / "outside.png"), "gone.png"]
    captions = [["one\u2028line", "another"], ["two"], ["three"], ["four"], ["five"]]
    expected = [("01.png", ("one line", "another"), "01.png", folder / "01.png"), ("more/00.png", ("two",), "more/00.png", folder / "more" / "00.png")]
    coco = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": i, "caption": text} for i, texts in enumerate(captions) for text in texts],
    }
    rows = "".join(f"{name},{text}\n" for name, texts in zip(names, captions) for text in texts)
    lines = "".join(
        json.dumps({"file_name": name, "text": texts if len(texts) > 1 else texts[0]}, ensure_ascii=False) + "\n" for name, texts in zip(names, captions)
    )
    for name, content in (("metadata.csv", "file_name,text\n" + rows), ("metadata.jsonl", lines + lines.split("\n")[0]), ("captions.json", json.dumps(coco))):
        (folder / name).write_text(content)
        found = list_folder(folder)
        assert [picture[:4] for picture in found.pictures] == expected
        twice = ["named twice"] if name == "metadata.jsonl" else []
        assert [reason for _, reason in found.skipped] == ["outside the folder", "outside the folder", "not there", *twice]
        (folder / name).unlink()


def test_a_caption_that_is_null_or_no_text_costs_one_picture(folder: Path) -> None:
    rows = [{"file_name": "01.png", "text": None}, {"file_name": "02.png", "text": ["kept", None]}, {"file_name": "04.png", "text": {"en": "a cat"}}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list_folder(folder)
    assert [(picture.name, picture.captions) for picture in found.pictures] == [("02.png", ("kept",))]
    assert found.skipped == [("01.png", "without a caption"), ("04.png", "with a caption that is no text")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", '{"file_name": "01.png"}'),
        ("metadata.jsonl", "{"),
        ("metadata.jsonl", "[" * 100_000),
        ("metadata.csv", "a,b\n1,2"),
        ("captions.json", "[]"),
        ("captions.json", "{}"),
    ],
)
def test_a_list_that_is_no_list_gets_one_line_that_names_it(folder: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).write_text(content)
    assert main(["data", "check", str(folder)]) == 2
    error = capsys.readouterr().err
    assert name in error and len(error.splitlines()) == 1


def test_captions_that_are_cut_are_counted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_collection(TINY, folder, tmp_path / "short")
    assert "are cut" not in capsys.readouterr().out
    (folder / "01.txt").write_text("word " * 200)
    build_collection(TINY, folder, tmp_path / "long")
    assert f"1 of 59 captions are longer than the {TINY.clip.context_length} tokens" in capsys.readouterr().out


def test_a_collection_is_read_once_split_by_name_and_holds_what_the_pictures_show(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = build_collection(TINY, folder, tmp_path / "data")
    monkeypatch.chdir(folder.parent)
    assert build_collection(TINY, Path(folder.name), tmp_path / "data").folder == world.folder
    assert world.held is not None and len(world) == 27 and len(world.held["pictures"]) == 3
    assert world.captions.shape == (27, 2, TINY.clip.context_length)
    by_caption = {world.tokenizer.decode([t for t in row[0].tolist() if t > 1]).strip(): picture for row, picture in zip(world.captions, world.pictures)}
    for i in range(30):
        if f"picture {i}" in by_caption:
            assert (by_caption[f"picture {i}"] == np.asarray(scribble(i))[0, 0]).all()
    assert len(by_caption) == 27 and world.parts.shape[1] == TINY.upsampler2.high_size // 4 and world.parts_small.shape[1] == TINY.upsampler2.low_size // 4
    stamp = (world.folder / "pictures.npy").stat().st_mtime_ns
    assert (build_collection(TINY, folder, tmp_path / "data").folder / "pictures.npy").stat().st_mtime_ns == stamp
    (folder / "01.txt").write_text("changed")
    with pytest.raises(ValueError, match="of other data"):
        build_collection(TINY, folder, tmp_path / "data")


def _wait_and_read(barrier: Barrier, folder: Path, out: Path) -> None:
    barrier.wait()
    world = Run(TINY, out, torch.device("cpu"), data=folder).world
    assert len(world) == 270 and world.held is not None
    for captions, pictures in ((world.captions, world.pictures), (world.held["captions"], world.held["pictures"])):
        for row, picture in zip(captions, pictures):
            number = int(world.tokenizer.decode([token for token in row[0].tolist() if token > 1]))
            assert (picture == np.asarray(scribble(number))[0, 0]).all()


@pytest.mark.slow
def test_two_stages_that_begin_side_by_side_read_the_same_pictures(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(300):
        scribble(i).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(str(i))
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    both = [spawn.Process(target=_wait_and_read, args=(barrier, tmp_path / "pictures", tmp_path / "run")) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert not [path for path in (tmp_path / "run" / "data").rglob("*") if path.suffix == ".tmp"]


def test_too_few_or_mostly_broken_pictures_stop_before_anything_is_kept(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(31):
        (folder / f"bad{i}.png").write_bytes(b"")
        (folder / f"bad{i}.txt").write_text("bad")
    with pytest.raises(ValueError, match="30 of 61 pictures .* 31 empty"):
        build_collection(TINY, folder, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())
    assert main(["data", "check", str(folder)]) == 0
    assert "a training would stop: 30 of 61 pictures" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is no folder"):
        list_folder(tmp_path / "nowhere")
    assert collection.FEWEST == 20


@pytest.mark.slow
def test_from_a_folder_to_a_picture_from_scratch_and_from_weights(folder: Path, tmp_path: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, weights = str(tmp_path / "run"), str(tmp_path / "weights")
    assert main(["train", "all", "--preset", "tiny", "--data", str(folder), "--out", run, "--steps", "3"]) == 0
    assert "27 pictures to learn from, 3 held out, 0 skipped" in capsys.readouterr().out
    assert main(["pack", run, weights]) == 0
    assert "the pictures of pictures" in (Path(weights) / "clip" / "card.md").read_text()
    assert main(["sample", "picture 4", "--weights", weights, "--out", str(tmp_path / "made.png")]) == 0
    assert "never seen" not in capsys.readouterr().err
    assert Image.open(tmp_path / "made.png").size == (64, 64)

    run, weights = str(tmp_path / "tuned"), str(tmp_path / "tuned-weights")
    assert main(["train", "decoder", "--preset", "tiny", "--data", str(folder), "--init", str(tiny_weights), "--out", run, "--steps", "3"]) == 0
    assert main(["pack", run, weights]) == 0
    same = {
        stage: (Path(weights) / stage / "model.safetensors").read_bytes() == (tiny_weights / stage / "model.safetensors").read_bytes()
        for stage in ("clip", "decoder")
    }
    assert same == {"clip": True, "decoder": False}
    assert not (Path(weights) / "checker").exists()  # it reads the captioned world, and would call every other word unknown


def test_links_in_a_circle_senseless_names_and_files_that_vanish_are_skipped(folder: Path) -> None:
    os.symlink("circle.png", folder / "circle.png")
    (folder / "circle.txt").write_text("round")
    found = list_folder(folder)
    assert found.skipped == [("circle.png", "not there")]
    (folder / "01.png").unlink()
    assert len(list(read_pictures(found, lambda square, rng: None))) == 29 and ("01.png", "not readable") in found.skipped
    (folder / "metadata.csv").write_text(f"file_name,text\n{'x' * 5000}.png,long\n02.png,good\n")
    found = list_folder(folder)
    assert [reason for _, reason in found.skipped] == ["not there"] and len(found.pictures) == 1


def test_names_that_are_not_utf_8_are_read_and_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        for name in (b"caf\xe9.png", b"caf\xe9.txt", b"th\xe9.png"):
            (folder / os.fsdecode(name)).write_bytes((folder / "01.png").read_bytes() if name.endswith(b"png") else b"a caption")
    except OSError:
        pytest.skip("this file system wants UTF-8")
    assert main(["data", "check", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "31 pictures can be used" in said and "th\ufffd.png: without a caption" in said


def test_one_caption_of_a_list_that_is_not_utf_8_costs_one_picture(folder: Path) -> None:
    coco = '{"images": [{"id": 1, "file_name": "01.png"}, {"id": 2, "file_name": "02.png"}], "annotations": ['
    coco += '{"image_id": 1, "caption": "caf\u00e9"}, {"image_id": 2, "caption": "tea"}]}'
    lists = {
        "metadata.jsonl": '{"file_name": "01.png", "text": "caf\u00e9"}\n{"file_name": "02.png", "text": "tea"}\n',
        "metadata.csv": "file_name,text\n01.png,caf\u00e9\n02.png,tea\n",
        "captions.json": coco,
    }
    for name, content in lists.items():
        for encoding, skipped in (("latin-1", [("01.png", "with a caption that is not UTF-8")]), ("utf-8-sig", [])):
            (folder / name).write_bytes(content.encode(encoding))
            found = list_folder(folder)
            assert found.skipped == skipped and found.pictures[-1].captions == ("tea",) and len(found.pictures) == 2 - len(skipped)
        (folder / name).unlink()


def test_folders_that_cannot_be_used_get_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (
        ["train", "clip", "--preset", "tiny", "--data", str(tmp_path / "nowhere")],
        ["train", "checker", "--preset", "tiny", "--data", str(folder)],
        ["train", "clip", "--preset", "tiny", "--data", str(folder), "--init", str(tmp_path)],
    ):
        assert main([*options, "--out", str(tmp_path / "run")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["data", "check", str(folder), "--out", str(tmp_path / "grid.png")]) == 0
    assert "30 pictures can be used, 0 are skipped" in capsys.readouterr().out and (tmp_path / "grid.png").exists()


@pytest.mark.slow
def test_a_folder_that_is_mostly_broken_is_refused_before_weights_are_copied(folder: Path, tmp_path: Path, tiny_weights: Path, capsys) -> None:
    for path in sorted(folder.rglob("*.png"))[:20]:
        path.write_bytes(path.read_bytes()[:60])
    assert main(["train", "decoder", "--preset", "tiny", "--data", str(folder), "--init", str(tiny_weights), "--out", str(tmp_path / "run")]) == 2
    assert "10 of 30 pictures can be used" in capsys.readouterr().err and not list((tmp_path / "run").rglob("*.safetensors"))


def test_pictures_of_a_group_are_held_out_together_and_one_group_alone_is_refused(folder: Path, tmp_path: Path) -> None:
    def write(groups: list[str]) -> None:
        rows = [{"file_name": f"{i:02}.png", "text": f"of {group}", "group": group} for i, group in enumerate(groups) if i % 3]
        rows += [{"file_name": f"more/{i:02}.png", "text": f"of {group}", "group": group} for i, group in enumerate(groups) if i % 3 == 0]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write([f"kind {i // 5}" for i in range(30)])
    world = build_collection(TINY, folder, tmp_path / "data")
    assert world.held is not None and len(world.held["pictures"]) == 5  # one in ten would be three, of a group of five
    assert not {row.tobytes() for row in world.captions[:, 0]} & {row.tobytes() for row in world.held["captions"][:, 0]}
    first = [hashlib.sha256(f"large {number}".encode()).hexdigest() < hashlib.sha256(b"little").hexdigest() for number in range(4)]
    assert {True, False} == set(first)
    for number in range(4):  # whichever comes first, never more than half of the pictures are held out
        write([f"large {number}"] * 28 + ["little"] * 2)
        world = build_collection(TINY, folder, tmp_path / f"data-{number}")
        assert world.held is not None and len(world.held["pictures"]) == 2 and len(world.pictures) == 28
    write([f"half {i % 2}" for i in range(30)])
    assert len(build_collection(TINY, folder, tmp_path / "halves").pictures) == 15
    for groups in (["kind"] * 30, ["kind"] * 29 + ["other"]):
        write(groups)
        with pytest.raises(ValueError, match="of one group, or nearly all"):
            build_collection(TINY, folder, tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "file_name,text\n01.png,a cat\n02.png,a cat, on a mat\n", "line 3 has more fields than the first: put a text with a comma in quotes"),
        ("metadata.csv", "file_name;text\n01.png;a cat, on a mat\n", "name the columns file_name and text, with a comma between them"),
        ("metadata.jsonl", '{"file_name": "01.png", "text": "a"}\n\n{"file_name": "02.png"}\n', "line 3 has no 'text'"),
        ("captions.json", '{"images": [{"id": "1", "file_name": "01.png"}], "annotations": [{"image_id": 1, "caption": "a"}]}', "no image_id"),
        ("metadata.jsonl", '{"file_name": "01.png", "text": "a"}\n{"file_name": 02}\n', "line 2: "),
    ],
)
def test_a_list_that_is_wrong_says_in_which_line(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list_folder(folder)


def test_rows_of_one_picture_are_one_picture_and_notes_of_none_are_left_over(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text,group\n01.png,a,\n01.png,b,g\n01.png,c,,\n")  # a comma at the end is no text
    (picture,) = list_folder(folder).pictures
    assert picture.captions == ("a", "b", "c") and picture.group == "g"
    (folder / "metadata.csv").unlink()
    notes = [{"image_id": 1, "caption": "a"}, {"image_id": 42, "caption": "of a picture that was taken out"}]
    (folder / "captions.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "01.png"}], "annotations": notes}))
    (picture,) = list_folder(folder).pictures
    assert picture.captions == ("a",)


def test_a_name_that_is_no_text_is_skipped_alone(folder: Path) -> None:
    rows = [{"file_name": "\ud83d.png", "text": "a"}, {"file_name": "01.png", "text": "b", "group": "\ud83d"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list_folder(folder)
    assert found.skipped == [("\ufffd.png", "not there")] and [picture.group for picture in found.pictures] == ["\ufffd"]


@pytest.mark.slow
def test_what_is_fitted_to_embeddings_is_fitted_anew_where_clip_was_trained_further(folder: Path, tmp_path: Path, tiny_weights: Path) -> None:
    options = ["--preset", "tiny", "--data", str(folder), "--init", str(tiny_weights), "--steps", "2"]
    words, means = {}, {}
    for name, stages in (("frozen", ("ar-prior", "decoder")), ("free", ("clip", "ar-prior", "decoder"))):
        for stage in stages:
            assert main(["train", stage, *options, "--out", str(tmp_path / name)]) == 0
        words[name] = load_file(tmp_path / name / "decoder" / "model.safetensors")["token_embedding.weight"]
        means[name] = load_file(tmp_path / name / "ar-prior" / "model.safetensors")["pca.mean"]
    given = load_file(tiny_weights / "ar-prior" / "model.safetensors")["pca.mean"]
    assert torch.equal(means["frozen"], given) and not torch.equal(means["free"], given)
    ours = load_file(tmp_path / "free" / "clip" / "model.safetensors")["token_embedding.weight"]
    # two short steps away from where it started: the decoder of the weights, or the words of the new CLIP
    assert (words["free"] - ours).abs().mean() < (words["frozen"] - ours).abs().mean()


@pytest.mark.slow
def test_an_autoregressive_prior_of_another_clip_is_not_packed(folder: Path, tmp_path: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_weights, tmp_path / "older")
    options = ["--preset", "tiny", "--data", str(folder), "--init", str(tiny_weights), "--steps", "2", "--out", str(tmp_path / "run")]
    for stage in ("clip", "prior", "decoder"):
        assert main(["train", stage, *options]) == 0
        if stage == "prior":
            assert main(["pack", str(tmp_path / "run"), str(tmp_path / "packed")]) == 2 and not (tmp_path / "packed").exists()
    assert main(["pack", str(tmp_path / "run"), str(tmp_path / "packed")]) == main(["pack", str(tmp_path / "run"), str(tmp_path / "older")]) == 0
    assert not (tmp_path / "older" / "ar-prior").exists() and (tmp_path / "older" / "glide").exists()
    assert "ar-prior has not learned from the clip" in capsys.readouterr().out and not (tmp_path / "packed" / "ar-prior").exists()
    assert main(["train", "ar-prior", *options]) == 0 and main(["pack", str(tmp_path / "run"), str(tmp_path / "whole")]) == 0
    assert (tmp_path / "whole" / "ar-prior" / "card.md").exists()
    assert main(["train", "clip", *options, "--resume", "never", "--learning_rate", "0.1"]) == 0  # and what has learned from the one before does not follow
    assert main(["pack", str(tmp_path / "run"), str(tmp_path / "mixed")]) == 2 and not (tmp_path / "mixed").exists()
    assert "prior has not learned from the clip" in capsys.readouterr().err
    assert main(["train", "prior", *options]) == 2 and "trained further since" in capsys.readouterr().err
    for stage in ("prior", "decoder", "ar-prior"):
        assert main(["train", stage, *options, "--resume", "never"]) == 0
    assert main(["pack", str(tmp_path / "run"), str(tmp_path / "mixed")]) == 0


@pytest.mark.slow
def test_a_run_that_began_from_other_weights_is_not_mixed_with_new_ones(tmp_path: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_weights, tmp_path / "weights")
    command = ["train", "decoder", "--preset", "tiny", "--init", str(tmp_path / "weights"), "--steps", "2", "--out", str(tmp_path / "run")]
    assert main(command) == 0 and main(command) == 0
    assert main(["pack", str(tmp_path / "run"), str(tmp_path / "weights")]) == 0 and main(command) == 0  # what was not trained is packed byte for byte
    shutil.copyfile(tiny_weights / "upsampler2" / "model.safetensors", tmp_path / "weights" / "upsampler1" / "model.safetensors")
    assert main(command) == 2 and "began from other weights" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_the_codes_of_the_world_are_taken_along_where_dalle_is_trained_further(folder: Path, tmp_path: Path, tiny_weights: Path, capsys) -> None:
    command = ["train", "dalle", "--preset", "tiny", "--init", str(tiny_weights), "--steps", "2", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    assert (tmp_path / "run" / "dalle-vae" / "model.safetensors").read_bytes() == (tiny_weights / "dalle-vae" / "model.safetensors").read_bytes()
    assert not (tmp_path / "run" / "glide").exists()
    assert main([*command[:-1], str(tmp_path / "own"), "--data", str(folder)]) == 2
    assert "run `minunclip train dalle-vae` first" in capsys.readouterr().err.splitlines()[-1]
