"""Tar shards, whole and broken, and what a training sees of them: every picture once an epoch, on one process or two, also after a stop."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from minunclip.config import TINY
from minunclip.data.collection import build_collection
from minunclip.data.files import Crop, check_folder, list_folder, read_pictures
from minunclip.data.streams import VIEWS, Streamed
from minunclip.runs import Run, read_ahead
from minunclip.stages import train

Members = list[tuple[str, bytes]]


def picture(number: int, kind: str = "PNG") -> bytes:
    """A picture of one colour, which is its number; of noise where `kind` is JPEG, so that half of it is not enough."""
    content = io.BytesIO()
    image = Image.new("RGB", (40, 30), (number, 255 - number, 77)) if kind == "PNG" else Image.effect_noise((40, 30), 90).convert("RGB")
    image.save(content, kind)
    return content.getvalue()


def sample(number: int) -> Members:
    """As img2dataset writes it."""
    key, text = f"{number:09}", f"picture {number}"
    return [(f"{key}.png", picture(number)), (f"{key}.txt", text.encode()), (f"{key}.json", json.dumps({"caption": text, "key": key}).encode())]


def write_shard(path: Path, members: Members) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of ten pictures each, with the files that img2dataset leaves beside them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for k in range(3):
        write_shard(folder / f"{k:05}.tar", [member for number in range(10 * k, 10 * k + 10) for member in sample(number)])
        (folder / f"{k:05}_stats.json").write_text("{}")
    return folder


def numbers(pictures: np.ndarray) -> list[int]:
    return pictures[:, 0, 0, 0].tolist()


def test_shards_give_what_the_same_files_in_a_folder_give(shards: Path, tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            tar.extractall(loose / path.name, filter="data")
    ours, theirs = (build_collection(TINY, folder, tmp_path / folder.name / "data") for folder in (shards, loose))
    for name in ("pictures", "small", "captions", "middle", "parts", "parts_small"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    assert ours.held is not None and sorted(numbers(ours.pictures) + numbers(ours.held["pictures"])) == list(range(30))


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_a_stream_holds_the_pictures_of_the_arrays_to_the_last_bit(shards: Path, tmp_path: Path, crop: Crop) -> None:
    noise = [member for n in range(50, 80) for member in [*sample(n)[1:], (f"{n:09}.jpg", picture(n, "JPEG"))]]
    write_shard(shards / "00009.tar", [*noise, ("cut.jpg", picture(0, "JPEG")[:300]), ("cut.txt", b"cut")])
    arrays, stream = (build_collection(TINY, shards, tmp_path / str(kind), seed=4, crop=crop, stream=kind) for kind in (False, True))
    assert len(stream) == len(arrays) > 30 and stream.held is not None and arrays.held is not None
    some = np.array([3, 0, len(arrays) - 1, 3])
    for name in VIEWS:
        ours, theirs = getattr(stream, name), getattr(arrays, name)
        assert isinstance(ours, Streamed) and ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert np.array_equal(ours[:], theirs) and np.array_equal(ours[some], theirs[some]) and ours[some[:0]].shape == theirs[some[:0]].shape
    assert np.array_equal(stream.captions, arrays.captions) and stream.tokenizer.merges == arrays.tokenizer.merges
    assert all(np.array_equal(stream.held[name], arrays.held[name]) for name in arrays.held)
    for name in ("skipped.jsonl", "held-small.npy"):
        assert (stream.folder / name).read_bytes() == (arrays.folder / name).read_bytes()
    assert (stream.folder / "places.npy").stat().st_size == 128 + 32 * len(stream) and not (stream.folder / "small.npy").exists()
    again = build_collection(TINY, shards, tmp_path / "True", seed=4, crop=crop)  # what has been read is read no other way
    assert isinstance(again.small, Streamed) and np.array_equal(again.small[:], arrays.small)


@pytest.mark.slow
def test_a_stream_is_trained_on_as_arrays_are(shards: Path, tmp_path: Path) -> None:
    for stage in ("clip", "prior", "upsampler1", "upsampler2"):
        for kind in (False, True):
            run = Run(TINY, tmp_path / str(kind), torch.device("cpu"), data=shards, stream=kind)
            train(stage, run, settings=replace(TINY.training[stage], steps=6, warmup=1))
        ours, theirs = ((tmp_path / kind / stage / "model.safetensors").read_bytes() for kind in ("True", "False"))
        assert ours == theirs, stage


def test_a_picture_that_is_gone_in_mid_training_ends_it_with_a_line_and_the_checkpoint_whole(shards: Path, tmp_path: Path) -> None:
    run = Run(TINY, tmp_path, torch.device("cpu"), data=shards, stream=True)
    train("clip", run, stop_after=4)
    assert len(run.world) == 27
    shutil.copy2(shards / "00001.tar", tmp_path / "old")
    whole = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^\S*00001.tar has changed since .* \(a picture in it is now \w+\): put the old one back, .*; [^\n]*$"):
        train("clip", run)
    assert torch.load(tmp_path / "clip" / "training.pt", weights_only=True)["step"] >= 4
    shutil.copy2(tmp_path / "old", shards / "00001.tar")
    train("clip", Run(TINY, tmp_path, torch.device("cpu"), data=shards))
    assert torch.load(tmp_path / "clip" / "training.pt", weights_only=True)["step"] == TINY.training["clip"].steps


def test_where_arrays_find_no_room_there_is_a_line_that_names_the_stream(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(ValueError, match=r"^arrays of 30 pictures take 0.0 GB, and 0.0 are free: use --stream, [^\n]*$"):
        build_collection(TINY, shards, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == [] and len(build_collection(TINY, shards, tmp_path / "data", stream=True)) == 27


def test_reading_ahead_gives_each_step_its_batch_once_and_a_fault_where_it_belongs() -> None:
    asked: list[int] = []

    def batch(step: int) -> dict[str, torch.Tensor]:
        asked.append(step)
        if step == 8:
            raise ValueError("step 8")
        return {"step": torch.tensor(step)}

    ahead = read_ahead(batch)
    assert [int(ahead(step)["step"]) for step in (5, 6, 7)] == [5, 6, 7]
    with pytest.raises(ValueError, match="step 8"):
        ahead(8)
    assert int(ahead(20)["step"]) == 20 and asked[:5] == [5, 6, 7, 8, 9]


def test_shards_are_those_of_the_webdataset_package(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            writer.write({"__key__": f"{number:09}", "png": picture(number), "txt": f"picture {number}", "json": {"caption": "not this one"}})
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    theirs = [(row["__key__"], row["txt"].decode(), row["png"]) for row in webdataset.WebDataset(urls, shardshuffle=False)]
    ours = [(Path(found.name).stem, found.captions[0], found.content()) for found in list_folder(tmp_path).pictures]
    assert len(urls) == 3 and ours == theirs


def test_every_fault_of_a_shard_has_its_reason_and_costs_no_more_than_itself(shards: Path, tmp_path: Path) -> None:
    members = sample(100) + [
        ("/etc/absolute.png", picture(1)),
        ("../outside.png", picture(1)),
        ("a/../../outside.txt", b"out"),
        ("000000100.png", picture(2)),
        ("empty.png", b""),
        ("empty.txt", b"nothing to see"),
        ("half.jpg", picture(3, "JPEG")[:400]),
        ("half.json", b'{"caption": "half of it"}'),
        ("words.webp", b"only words"),
        ("words.txt", b"words"),
        ("latin.png", picture(4)),
        ("latin.txt", "café".encode("latin-1")),
        ("silent.png", picture(5)),
        ("null.png", picture(6)),
        ("null.json", b'{"caption": null}'),
        ("odd.png", picture(7)),
        ("odd.json", b"[1, 2"),
    ]
    write_shard(shards / "00003.tar", members)
    with tarfile.open(shards / "00003.tar", "a") as tar:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("folder", tarfile.DIRTYPE), ("pipe.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    (shards / "00004.tar").write_bytes(b"")
    (shards / "00005.tar").write_bytes(os.urandom(5000))
    (tmp_path / "elsewhere.tar").write_bytes((shards / "00000.tar").read_bytes())
    (shards / "00006.tar").symlink_to(tmp_path / "elsewhere.tar")
    before = sorted(tmp_path.rglob("*"))
    found = check_folder(shards)
    assert dict(found.skipped) == {
        "00003.tar//etc/absolute.png": "outside the folder",
        "00003.tar/../outside.png": "outside the folder",
        "00003.tar/a/../../outside.txt": "outside the folder",
        "00003.tar/000000100.png": "named twice",
        "00003.tar/empty.png": "empty",
        "00003.tar/half.jpg": "broken",
        "00003.tar/words.webp": "no picture",
        "00003.tar/latin.png": "with a caption that is not UTF-8",
        "00003.tar/silent.png": "without a caption",
        "00003.tar/null.png": "without a caption",
        "00003.tar/odd.png": "without a caption",
        "00003.tar/link.png": "no plain file",
        "00003.tar/hard.png": "no plain file",
        "00003.tar/pipe.png": "no plain file",
        "00004.tar": "empty",
        "00005.tar": "no tar archive",
        "00006.tar": "outside the folder",
    }
    assert len(found.pictures) == 31 and sorted(tmp_path.rglob("*")) == before  # nothing was unpacked


def test_of_a_shard_cut_anywhere_all_before_the_cut_is_used(shards: Path) -> None:
    path = shards / "00001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = {member.name: member.offset_data + member.size for member in tar}
    for cut in [len(whole) // 2, *(ends[f"{n:09}.png"] + extra for n in (12, 17) for extra in (-3, 0, 700))]:
        path.write_bytes(whole[:cut])
        found = list_folder(shards)
        used = [picture.name for picture in found.pictures if picture.name.startswith("00001")]
        expected = [n for n in range(10, 20) if max(ends[f"{n:09}.png"], ends[f"{n:09}.txt"]) <= cut]
        assert used == [f"00001.tar/{n:09}.png" for n in expected]
        assert ("00001.tar", "damaged or cut short") in found.skipped and len(found.pictures) == 20 + len(used)
    start = ends["000000014.json"] // 512 * 512 + 512  # the header of number 15
    path.write_bytes(whole[:start] + os.urandom(512) + whole[start + 512 :])
    found = list_folder(shards)
    assert found.skipped == [("00001.tar", "damaged or cut short")] and len(found.pictures) == 25


@pytest.mark.parametrize("size", [-1, -512, -1024, -(2**40), 2**33, 2**70])
def test_a_header_with_a_senseless_size_ends_its_shard(shards: Path, size: int) -> None:
    path = shards / "00001.tar"
    whole = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmember("000000013.png").offset
    header = whole[start : start + 512]
    header[124:136] = bytes([255 if size < 0 else 128]) + size.to_bytes(11, "big", signed=True)  # base 256, as GNU tar writes what is too large for octal
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    whole[start : start + 512] = header
    path.write_bytes(whole)
    found = list_folder(shards)
    assert len(found.pictures) == 23 and "damaged or cut short" in dict(found.skipped).values()


def test_threads_change_nothing_and_memory_holds_few_pictures(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(threads: int, crop: str) -> list[tuple[str, bytes, int]]:
        monkeypatch.setattr("os.cpu_count", lambda: threads)
        work = lambda square, rng: (square.tobytes(), int(rng.integers(1000)))  # noqa: E731
        return [(picture.name, *result) for picture, result in read_pictures(list_folder(shards), work, crop, seed=3)]  # type: ignore[arg-type]

    assert read(1, "random") == read(8, "random") and len(read(8, "centre")) == 30
    begun = 0

    def work(square: Image.Image, rng: np.random.Generator) -> None:
        nonlocal begun
        begun += 1

    for done, _ in enumerate(read_pictures(list_folder(shards), work), 1):
        assert begun - done < 8


def test_a_random_crop_is_a_square_of_the_picture_and_another_for_another_seed(tmp_path: Path) -> None:
    columns = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (20, 200, 3))
    Image.fromarray(np.ascontiguousarray(columns)).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("wide")
    lefts = []
    for seed in range(20):
        ((_, square),) = read_pictures(list_folder(tmp_path), lambda square, rng: np.asarray(square), "random", seed)
        assert np.array_equal(square, columns[:, square[0, 0, 0] : square[0, 0, 0] + 20])
        lefts.append(int(square[0, 0, 0]))
    assert len(set(lefts)) > 12 and min(lefts) < 50 and max(lefts) > 130


def test_an_epoch_shows_each_picture_once_and_a_stop_changes_nothing(shards: Path, tmp_path: Path) -> None:
    run = Run(TINY, tmp_path / "run", torch.device("cpu"), data=shards)
    count, size = len(run.world), 8
    steps = [run.draw(step, size, "decoder")[0] for step in range(2 * count)]  # 16 epochs in batches that do not divide them
    assert len({*np.concatenate(steps[:3]).tolist()}) == 24 and not np.array_equal(steps[0], steps[3])
    seen = Counter(np.concatenate(steps).tolist())
    assert set(seen.values()) == {16} and len(seen) == count
    again = Run(TINY, tmp_path / "run", torch.device("cpu"), data=shards)  # another process, in the middle of an epoch
    assert all(np.array_equal(again.draw(step, size, "decoder")[0], steps[step]) for step in (5, 6, 7, 20))


WORKER = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from minunclip.config import TINY
from minunclip.data.world import to_uint8
from minunclip.distributed import first_one_then_all, rank, ranks, start
from minunclip.runs import Run
run = Run(TINY, Path(sys.argv[1]), start(torch.device("cpu")), data=Path(sys.argv[2]), stream=len(sys.argv) > 3)
with first_one_then_all():
    run.world
seen = []
for step in range(len(run.world)):
    batch = to_uint8(run.read(run.world.pictures, run.draw(step, 8, "clip")[0]))
    share = np.split(batch, ranks())[rank()]  # as training.fit does
    seen += share[:, 0, 0, 0].tolist()
    assert not run.stream or (batch.any(axis=(1, 2, 3)).nonzero()[0] // 4 == rank()).all()  # of the rest of the batch no file was opened
Path(sys.argv[1], f"rank-{rank()}.json").write_text(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["stream"]])
def test_two_processes_share_the_shards_with_none_lost_and_none_doubled(shards: Path, tmp_path: Path, how: list[str]) -> None:
    script, out = tmp_path / "worker.py", tmp_path / "run"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(out), str(shards), *how]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("pictures to learn from") == 1  # read by one process alone
    first, second = (json.loads((out / f"rank-{k}.json").read_text()) for k in (0, 1))
    assert len(first) == len(second)
    assert set(Counter(first + second).values()) == {8} and len(set(first + second)) == 27  # eight epochs of the 27 that are not held out
