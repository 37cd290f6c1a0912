"""Photographs as shards: the same images in the same order, however preparing was interrupted."""

import io
import itertools
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from conftest import STOPPED, encoded, prepared
from iterations import FakeTrainer
from PIL import Image

from resnetv2_cli.config import Experiment
from resnetv2_cli.data import folder, prepare
from resnetv2_cli.data.module import ImageData
from resnetv2_cli.data.protocols import PROTOCOLS
from resnetv2_cli.errors import UserError
from resnetv2_cli.locks import held


def read_all(root: Path, split: str) -> tuple[folder.Folder, torch.Tensor]:
    """A split, and its training crops of one epoch."""
    found = folder.scan(root, split, ("ant", "bee"))
    views = folder.FolderImages(found, 224, "scale", 0, PROTOCOLS["224"].view(224))
    return found, torch.stack([views[i, 0][0] for i in range(len(found.files))])


@pytest.mark.parametrize("raw", [False, True])
def test_shards_have_the_same_images_in_the_same_order(tree, tmp_path, here, raw):
    shards = prepared(tree, tmp_path / "s", here, "--side", 4000, *(["--raw"] if raw else []))
    for split in ("train", "test"):
        (loose, x), (packed, y) = read_all(tree, split), read_all(shards, split)
        assert packed.labels.tolist() == loose.labels.tolist() and packed.classes == loose.classes
        apart = (x.short() - y.short()).abs()
        assert apart.max() <= 2 if raw else apart.float().mean() < 4


@pytest.mark.parametrize("raw", [False, True])
def test_webdataset_reads_the_shards(tree, tmp_path, here, raw):
    shards = prepared(tree, tmp_path / "s", here, "--side", 200, *(["--raw"] if raw else []))
    for split, labels in (("train", [0, 0, 1, 1]), ("val", [0, 1])):
        found = folder.scan(shards, "test" if split == "val" else split, ("ant", "bee"))
        files = sorted(str(shard) for shard in shards.glob(f"{split}-*.tar"))
        read = webdataset.WebDataset(files, shardshuffle=False).decode("rgb8")
        samples = sorted(read, key=lambda sample: sample["__key__"])
        assert [sample["cls"] for sample in samples] == labels == found.labels.tolist()
        for sample, member in zip(samples, found.files, strict=True):
            pixels = sample["npy" if raw else "jpg"]
            assert min(pixels.shape[:2]) == 200 and pixels.dtype == np.uint8
            assert np.array_equal(pixels, picture_of(member.read(), raw))


def picture_of(content: bytes, raw: bool) -> np.ndarray:
    return np.load(io.BytesIO(content)) if raw else np.asarray(Image.open(io.BytesIO(content)))


def test_preparing_goes_on_where_it_was_stopped(tree, tmp_path, here, monkeypatch):
    whole = prepared(tree, tmp_path / "a", here)
    calls = []

    def stops(path, form):
        calls.append(path)
        if len(calls) > 3:
            raise UserError("an image that cannot be read")
        return encode(path, form)

    encode = prepare.encoded
    monkeypatch.setattr(prepare, "encoded", stops)
    here(
        "data", "prepare", tree, "--output", tmp_path / "b", "--shard", 3, "--workers", 1,
        status=2,
    )  # fmt: skip
    left = {"prepared.json", "train-000000.tar"}
    assert {p.name for p in (tmp_path / "b").iterdir()} == left
    with pytest.raises(UserError, match="is not fully prepared") as refused:
        folder.scan(tmp_path / "b", "train")
    assert "data prepare again" in refused.value.hint
    monkeypatch.undo()
    first = (tmp_path / "b" / "train-000000.tar").stat().st_mtime_ns
    prepared(tree, tmp_path / "b", here)
    assert (tmp_path / "b" / "train-000000.tar").stat().st_mtime_ns == first
    for path in whole.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    done = here(
        "data", "prepare", tree, "--output", tmp_path / "b", "--side", 99, "--shard", 3, status=2
    )
    assert "begun with other images or settings" in done.stderr
    done = here("data", "prepare", tree, "--output", tree, status=2)
    assert "is not empty" in done.stderr


def test_shards_of_other_pictures_of_the_same_names_are_not_taken(tree, tmp_path, here):
    root = shutil.copytree(tree, tmp_path / "tree")  # keeps its files' times
    to = prepared(tree, tmp_path / "s", here)
    prepared(root, to, here)
    picture = root / "train" / "bee" / "1.JPEG"
    picture.write_bytes(encoded())
    before = {p: p.read_bytes() for p in to.iterdir()}
    done = here("data", "prepare", root, "--output", to, "--shard", 3, status=2)
    assert "was made from other images, or they have changed since" in done.stderr
    assert {p: p.read_bytes() for p in to.iterdir()} == before
    [stale] = re.findall(r"train-0+\d\.tar", done.stderr)
    (to / stale).unlink()  # as the hint says
    prepared(root, to, here)
    again = prepared(root, tmp_path / "again", here)
    for path in again.glob("*.tar"):
        assert path.read_bytes() == (to / path.name).read_bytes()


def test_pictures_are_known_by_their_sizes_and_times(tmp_path):
    picture, stamps = tmp_path / "a.jpg", set()
    for content, changed in ((b"one", 1), (b"two", 2), (b"three", 2)):
        picture.write_bytes(content)
        os.utime(picture, (changed, changed))
        stamps.add(prepare.stamp([picture]))
    assert len(stamps) == 3


def test_a_lower_quality_takes_less_room(tree, tmp_path, here):
    low, high = (
        prepared(tree, tmp_path / quality, here, "--quality", quality) / "train-000000.tar"
        for quality in ("20", "95")
    )
    assert 2 * low.stat().st_size < high.stat().st_size


def test_a_picture_that_no_jpeg_can_be_is_named(tmp_path):
    wide = tmp_path / "wide.png"
    Image.new("RGB", (70_000, 40)).save(wide)
    with pytest.raises(UserError, match="wide.png cannot be a JPEG"):
        prepare.encoded(wide, prepare.Form())
    assert prepare.encoded(wide, prepare.Form(raw=True))


def test_a_picture_mended_on_the_way_costs_no_shard(tree, tmp_path, here):
    root, to = shutil.copytree(tree, tmp_path / "tree"), tmp_path / "s"
    picture = root / "val" / "bee" / "0.JPEG"
    content = picture.read_bytes()
    picture.write_bytes(b"none")
    here("data", "prepare", root, "--output", to, "--shard", 3, status=2)
    done = {p: p.stat().st_mtime_ns for p in to.glob("*.tar")}
    assert done
    picture.write_bytes(content)
    prepared(root, to, here)
    assert {p: p.stat().st_mtime_ns for p in to.glob("*.tar")}.items() > done.items()


def test_shards_have_the_numbers_of_whoever_asks_for_their_classes(tree, tmp_path, here):
    """As for a folder tree: weights may have the classes in another order, and more of them."""
    shards = prepared(tree, tmp_path / "s", here)
    loose, packed = (folder.scan(r, "test", ("cow", "bee", "ant")) for r in (tree, shards))
    assert packed.labels.tolist() == loose.labels.tolist() == [1, 2]
    assert packed.classes == loose.classes == ("cow", "bee", "ant")
    assert len({file.name for file in packed.files}) == 2
    with pytest.raises(UserError, match="has classes that the checkpoint lacks: bee"):
        folder.scan(shards, "test", ("ant",), "the checkpoint")


def test_processes_read_each_image_of_the_shards_once_and_resume_within_an_epoch(
    tree, tmp_path, here
):
    shards = prepared(tree, tmp_path / "s", here)
    given = {"dataset": "folder", "data_dir": str(shards), "depth": 18, "batch_size": 2}
    e = Experiment(**given, steps=4, workers=0)

    def batches(rank: int, ranks: int, step: int = 0) -> list:
        module = ImageData(e)
        module.trainer = FakeTrainer(rank, ranks, step)
        module.setup()
        return list(module.train_dataloader())

    whole = batches(0, 1)
    assert sorted(torch.cat([b.labels for b in whole[:2]]).tolist()) == [0, 0, 1, 1]
    parts = [batches(rank, 2) for rank in (0, 1)]
    for k, batch in enumerate(whole):
        torch.testing.assert_close(torch.cat([p[k].images for p in parts]), batch.images)
    torch.testing.assert_close(batches(0, 1, step=1)[0].images, whole[1].images)


@pytest.mark.parametrize("made", [3, [], "all", None])
def test_a_record_without_stamps_is_that_of_others(tree, tmp_path, here, made):
    to = prepared(tree, tmp_path / "s", here)
    begun = to / "prepared.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"shards": made}))
    done = here("data", "prepare", tree, "--output", to, "--shard", 3, status=2)
    assert "was begun with other images or settings" in done.stderr


@pytest.mark.parametrize("number", STOPPED)
def test_a_signal_leaves_nothing_half_written_and_it_goes_on(
    tree, tmp_path, here, monkeypatch, number
):
    whole = prepared(tree, tmp_path / "a", here)
    to, images = tmp_path / "b", itertools.count()

    def stopped(path, form):
        if next(images) == 3:  # in the second shard
            os.kill(os.getpid(), number)
            time.sleep(0.2)
        return encode(path, form)

    encode = prepare.encoded
    monkeypatch.setattr(prepare, "encoded", stopped)
    status, line = STOPPED[number]
    done = here(
        "data", "prepare", tree, "--output", to, "--shard", 3, "--workers", 1, status=status
    )
    assert done.stderr == f"{line}\n"
    left = {"prepared.json", "train-000000.tar"}
    assert {p.name for p in to.iterdir()} == left
    monkeypatch.undo()
    prepared(tree, to, here)
    for path in whole.glob("*.tar"):
        assert path.read_bytes() == (to / path.name).read_bytes()


def test_killed_while_it_writes_the_second_call_goes_on(tree, tmp_path, here):
    """SIGKILL may leave half a shard or half a plan, under names that nothing reads."""
    whole, to = prepared(tree, tmp_path / "a", here), tmp_path / "b"
    to.mkdir()
    for name in ("prepared.json.tmp", "prepare.lock"):
        (to / name).write_text("")
    prepared(tree, to, here)
    for path in whole.glob("*.tar"):
        assert path.read_bytes() == (to / path.name).read_bytes()
    (to / "train-000000.tar").unlink()
    (to / "train-000000.tar.tmp").write_bytes(b"half")
    prepared(tree, to, here)
    assert not list(to.glob("*.tmp"))
    os.truncate(to / "train-000000.tar", 3000)
    done = here("data", "prepare", tree, "--output", to, "--shard", 3, status=2)
    assert "train-000000.tar is damaged" in done.stderr and "remove it" in done.stderr


def test_a_record_that_cannot_be_read_is_not_that_of_others(tree, tmp_path, here):
    (tmp_path / "s" / "prepared.json").mkdir(parents=True)
    done = here("data", "prepare", tree, "--output", tmp_path / "s", "--shard", 3, status=2)
    assert "Is a directory" in done.stderr and "begun with other" not in done.stderr


def test_where_nothing_can_be_written_it_says_so(tree, tmp_path, here, full):
    full(20_000)
    done = here("data", "prepare", tree, "--output", tmp_path / "s", "--shard", 3, status=2)
    assert "error: cannot write" in done.stderr and "File too large" in done.stderr
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"prepared.json"}
    full()
    prepared(tree, tmp_path / "s", here)
    (tmp_path / "file").write_text("")
    done = here("data", "prepare", tree, "--output", tmp_path / "file" / "s", status=2)
    assert "error: cannot write" in done.stderr and done.stderr.count("error") == 1


def test_two_at_once_are_refused(tree, tmp_path, here):
    with held(tmp_path / "s" / "prepare.lock", "wait"):
        done = here("data", "prepare", tree, "--output", tmp_path / "s", status=2)
    assert f"is in use by process {os.getpid()}" in done.stderr


@pytest.mark.parametrize("left", ["prepared.json", "train.index.npz", "val.index.npz"])
@pytest.mark.parametrize(
    "command", [["check"], ["sort-val", "--labels", "labels"], ["prepare", "--output", "again"]]
)
def test_a_folder_of_shards_is_known_for_one(tmp_path, here, command, left):
    """Even one that was only begun, and holds nothing else."""
    root = tmp_path / "s"
    root.mkdir()
    (root / left).write_text("{}")
    done = here("data", *command, root, status=2, cwd=tmp_path)
    assert "has shards that data prepare made, for train and eval to read" in done.stderr
    assert "name the folder of images that they were made from" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_pictures_beside_a_file_of_that_name_are_no_shards(tree, tmp_path, here):
    root = shutil.copytree(tree, tmp_path / "tree")
    (root / "prepared.json").write_text("by hand")
    prepared(root, tmp_path / "s", here)
    here("data", "check", root, "--output", tmp_path / "report.json")
