"""Photographs as shards: the same images in the same order, whatever stopped their making."""

import errno
import io
import itertools
import json
import os
import re
import resource
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from conftest import STOPPED, encoded
from iterations import FakeTrainer
from PIL import Image

from resnetv2_cli.config import Experiment
from resnetv2_cli.data import folder, prepare, shards
from resnetv2_cli.data.module import ImageData
from resnetv2_cli.data.protocols import PROTOCOLS
from resnetv2_cli.errors import UserError
from resnetv2_cli.locks import held


def prepared(tree: Path, to: Path, here, *more) -> Path:
    here("data", "prepare", tree, "--output", to, "--shard", 3, *more)
    return to


def read_all(root: Path, split: str) -> tuple[folder.Folder, torch.Tensor]:
    """A split, and its training crops in one epoch."""
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
    with pytest.raises(UserError, match="is not wholly prepared") as refused:
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
    root = shutil.copytree(tree, tmp_path / "tree")  # with the times of its files
    to = prepared(tree, tmp_path / "s", here)
    prepared(root, to, here)
    picture = root / "train" / "bee" / "1.JPEG"
    picture.write_bytes(encoded())
    before = {p: p.read_bytes() for p in to.iterdir()}
    done = here("data", "prepare", root, "--output", to, "--shard", 3, status=2)
    assert "was made of other images, or they have changed since" in done.stderr
    assert {p: p.read_bytes() for p in to.iterdir()} == before
    [stale] = re.findall(r"train-0+\d\.tar", done.stderr)
    (to / stale).unlink()  # as the hint has it
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
    """As a tree has: of weights from elsewhere, in another order and with more of them."""
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


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda r: (r / "train.index.npz").write_bytes(b"nothing"), "index.npz is damaged"),
        (lambda r: (r / "train-000000.tar").unlink(), "the shard .*train-000000.tar is missing"),
        (lambda r: os.truncate(r / "train-000000.tar", 3000), "train-000000.tar is cut off"),
    ],
)
def test_damaged_shards_are_one_clear_error(tree, tmp_path, here, damage, message):
    shards = prepared(tree, tmp_path / "s", here)
    damage(shards)
    with pytest.raises(UserError, match=message):
        folder.scan(shards, "train")


def test_a_shard_that_shrinks_once_its_index_is_read_is_one_clear_error(tree, tmp_path, here):
    shards = prepared(tree, tmp_path / "s", here)
    first = folder.scan(shards, "train").files[0]
    os.truncate(first.shard, 600)
    with pytest.raises(UserError, match="cannot read the image .*jpg: .*tar is cut off"):
        first.read()


def trains(root: Path, workers: int) -> list:
    """The batches of one epoch."""
    given = {"dataset": "folder", "data_dir": str(root), "depth": 18, "batch_size": 4}
    module = ImageData(Experiment(**given, steps=1, workers=workers))
    module.trainer = FakeTrainer()
    module.setup()
    return list(module.train_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
def test_where_a_picture_in_a_shard_is_damaged_the_hint_mends_it(tree, tmp_path, here, workers):
    to = prepared(tree, tmp_path / "s", here)
    shard = to / "train-000000.tar"
    whole, start = shard.read_bytes(), borders(shard)[2] + 512
    zeros(shard, start, start + 3000)
    prepared(tree, to, here)  # which looks at no pixels
    with pytest.raises(UserError, match=rf"^cannot read the image {shard}:0+\d\.jpg") as refused:
        trains(to, workers)
    assert refused.value.hint == f"remove {shard}: resnetv2 data prepare makes it anew"
    shard.unlink()
    prepared(tree, to, here)
    assert shard.read_bytes() == whole and len(trains(to, workers)) == 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "number, hint",
    [
        (errno.EMFILE, "^ulimit -n 4096 lets a process have more files open$"),
        (errno.ENOENT, "^resnetv2 data prepare makes it anew$"),
        (errno.EIO, "^remove .*train-0+[01].tar: resnetv2 data prepare makes it anew$"),
    ],
)
def test_the_hint_is_of_what_the_system_says(
    tree, tmp_path, here, monkeypatch, workers, number, hint
):
    def fails(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    to = prepared(tree, tmp_path / "s", here)
    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(UserError, match=os.strerror(number)) as refused:
        trains(to, workers)
    assert re.search(hint, refused.value.hint)


@pytest.mark.parametrize(
    "name, other, message",
    [
        ("place", lambda a: a + 0.5, "train.index.npz is damaged"),
        ("place", lambda a: a - a[0], "train.index.npz is damaged"),  # of no bytes
        ("place", lambda a: a * [-1, 1], "train.index.npz is damaged"),
        ("place", lambda a: a[:-1], "train.index.npz is damaged"),
        (
            "place",
            lambda a: np.add(a, (0, 10**15)),
            "train-00000..tar is cut off: train.index.npz has",
        ),
        ("place", lambda a: np.add(a, (2**63 - 10**6, 0)), "train-00000..tar is cut off"),
        ("label", lambda a: a - 1, "train.index.npz is damaged"),
        ("label", lambda a: a + 1, "train.index.npz is damaged"),
        ("shard", lambda a: a - 1, "train.index.npz is damaged"),
        ("shard", lambda a: a + 1, "train.index.npz is damaged"),
        ("name", lambda a: np.arange(len(a)), "train.index.npz is damaged"),
        ("name", lambda a: a[:, None], "train.index.npz is damaged"),
        ("classes", lambda a: '["ant", 3]', "train.index.npz is damaged"),
        ("classes", lambda a: '["ant", "bee", "ant"]', "train.index.npz is damaged"),
        ("shards", lambda a: a[:1], "train.index.npz is damaged"),
    ],
)
def test_an_index_of_what_is_not_there_is_one_clear_error(
    tree, tmp_path, here, name, other, message
):
    to = prepared(tree, tmp_path / "s", here)
    file = to / "train.index.npz"
    arrays = dict(np.load(file))
    np.savez(file, **arrays | {name: other(arrays[name])})
    with pytest.raises(UserError, match=message) as refused:
        folder.scan(to, "train")
    assert "data prepare makes it anew" in refused.value.hint
    if "remove" in refused.value.hint:
        for shard in to.glob("train-*.tar"):
            shard.unlink()
    prepared(tree, to, here)  # as the hint has it
    assert folder.scan(to, "train").labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("made", [3, [], "all", None])
def test_a_record_without_stamps_is_that_of_others(tree, tmp_path, here, made):
    to = prepared(tree, tmp_path / "s", here)
    begun = to / "prepared.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"shards": made}))
    done = here("data", "prepare", tree, "--output", to, "--shard", 3, status=2)
    assert "was begun with other images or settings" in done.stderr


@pytest.fixture
def few():
    """A process may have so many more files open than it has."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(more: int) -> None:
        os.close(next_ := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_ + more, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_there_may_be_more_shards_than_a_process_may_have_open(tmp_path, here, few):
    for split, n in (("train", 12), ("val", 1)):
        (tmp_path / "tree" / split / "ant").mkdir(parents=True)
        for i in range(n):
            (tmp_path / "tree" / split / "ant" / f"{i}.jpg").write_bytes(encoded(33, 30))
    to = tmp_path / "s"
    here("data", "prepare", tmp_path / "tree", "--output", to, "--shard", 1, "--workers", 1)
    members = folder.scan(to, "train").files
    assert len({m.shard for m in members}) == 12
    few(3)
    assert all(m.read().startswith(b"\xff\xd8") for m in members)
    few(0)
    with pytest.raises(UserError, match="Too many open files") as refused:
        members[0].read()
    assert "ulimit -n" in refused.value.hint  # and not: make the shard anew


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
    """What SIGKILL leaves: half of a shard, half of a plan, under names that nobody reads."""
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


def borders(shard: Path) -> list[int]:
    """Where each member begins, image and label in turn."""
    with tarfile.open(shard) as tar:
        return [info.offset for info in tar]


def zeros(shard: Path, start: int, stop: int) -> None:
    """What a power cut, or a copy with holes, leaves of blocks that were not on the disk."""
    content = bytearray(shard.read_bytes())
    content[start:stop] = bytes(stop - start)
    shard.write_bytes(content)


def holding(shard: Path, *members: tuple[str, bytes]) -> None:
    """A whole shard with members of another's making; without content, links to nothing."""
    with tarfile.open(shard, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name.rstrip("/"))
            info.size = len(content)
            if not content:
                info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.SYMTYPE
                info.linkname = "nowhere"
            tar.addfile(info, io.BytesIO(content))


def edited(shard: Path, old: str, content: bytes, new: str = "") -> None:
    """Another content, and another name, for one of its members."""
    with tarfile.open(shard) as tar:
        kept = [(info.name, tar.extractfile(info).read()) for info in tar]
    holding(shard, *((new or old, content) if name == old else (name, data) for name, data in kept))


@pytest.mark.parametrize(
    "damage",
    [
        lambda shard: os.truncate(shard, borders(shard)[4]),  # between two images
        lambda shard: os.truncate(shard, borders(shard)[5]),  # behind an image, before its label
        lambda shard: zeros(shard, borders(shard)[2], shard.stat().st_size),
        lambda shard: zeros(shard, borders(shard)[2], borders(shard)[2] + 512),  # a header
        lambda shard: zeros(shard, borders(shard)[4], borders(shard)[4] + 100),  # its checksum says
        lambda shard: holding(shard),
        lambda shard: holding(shard, ("00000001.jpg", b"abc"), ("00000001.cls", b"0")),
        lambda shard: edited(shard, "00000002.cls", b"99"),
        lambda shard: edited(shard, "00000002.cls", b"0"),  # a class that there is
        lambda shard: edited(shard, "00000002.cls", b"1", "00000003.cls"),
        lambda shard: edited(shard, "00000002.cls", b""),  # a link to nothing
        lambda shard: edited(shard, "00000002.cls", b"", "00000002.cls/"),  # a folder
        lambda shard: edited(shard, "00000002.jpg", b""),
    ],
)
def test_a_shard_that_lacks_images_is_not_taken_for_whole(tree, tmp_path, here, damage):
    """A reader of tar files takes each of these for one that ends where the damage begins, or for
    whole: the index would lack images, or have others, and no number would say so."""
    to = prepared(tree, tmp_path / "s", here)
    whole = {p.name: p.read_bytes() for p in to.iterdir()}
    shard = to / "train-000000.tar"
    damage(shard)
    assert shard.read_bytes() != whole[shard.name]
    done = here("data", "prepare", tree, "--output", to, "--shard", 3, status=2)
    assert "train-000000.tar is damaged" in done.stderr and "remove it" in done.stderr
    assert (to / "train.index.npz").read_bytes() == whole["train.index.npz"]
    shard.unlink()  # as the hint has it
    prepared(tree, to, here)
    again = {p.name: p.read_bytes() for p in to.iterdir()}
    assert all(again[name] == whole[name] for name in whole if name.endswith(".tar"))
    assert len(shards.read_index(to / "train.index.npz")["ant"]) == 2


def test_a_shard_that_begins_with_a_label_is_damaged(tmp_path):
    """Also where Python leaves assertions out (-O)."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        label = tarfile.TarInfo("0.cls")
        label.size = 1
        tar.addfile(label, io.BytesIO(b"1"))
    optimized = {"__name__": "optimized"}
    exec(compile(Path(shards.__file__).read_text(), shards.__file__, "exec", optimize=1), optimized)
    with pytest.raises(UserError, match="s.tar is damaged"):
        optimized["members"](tmp_path / "s.tar", [("0.jpg", 1)])


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
    """Also one that was begun, and that is all that is there."""
    root = tmp_path / "s"
    root.mkdir()
    (root / left).write_text("{}")
    done = here("data", *command, root, status=2, cwd=tmp_path)
    assert "has the shards that data prepare made, for train and eval to read" in done.stderr
    assert "name the folder of pictures that they were made of" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_pictures_beside_a_file_of_that_name_are_no_shards(tree, tmp_path, here):
    root = shutil.copytree(tree, tmp_path / "tree")
    (root / "prepared.json").write_text("by hand")
    prepared(root, tmp_path / "s", here)
    here("data", "check", root, "--output", tmp_path / "report.json")
