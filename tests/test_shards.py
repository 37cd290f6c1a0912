"""Shards that are damaged, or of other images: one clear error, and a hint that repairs them."""

import errno
import io
import multiprocessing
import os
import re
import resource
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, prepared
from iterations import FakeTrainer

from resnetv2_cli.config import Experiment
from resnetv2_cli.data import folder, shards
from resnetv2_cli.data.module import ImageData
from resnetv2_cli.errors import UserError


def trains(root: Path, workers: int) -> list:
    """The batches of one epoch."""
    given = {"dataset": "folder", "data_dir": str(root), "depth": 18, "batch_size": 4}
    module = ImageData(Experiment(**given, steps=1, workers=workers))
    module.trainer = FakeTrainer()
    module.setup()
    return list(module.train_dataloader())


def borders(shard: Path) -> list[int]:
    """The offset of each member, image and label in turn."""
    with tarfile.open(shard) as tar:
        return [info.offset for info in tar]


def zeros(shard: Path, start: int, stop: int) -> None:
    """Zero a range, like blocks that a power cut, or a copy with holes, left unwritten."""
    content = bytearray(shard.read_bytes())
    content[start:stop] = bytes(stop - start)
    shard.write_bytes(content)


def holding(shard: Path, *members: tuple[str, bytes]) -> None:
    """Write an intact tar with any members; those without content are folders (``name/``) or broken
    links."""
    with tarfile.open(shard, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name.rstrip("/"))
            info.size = len(content)
            if not content:
                info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.SYMTYPE
                info.linkname = "nowhere"
            tar.addfile(info, io.BytesIO(content))


def edited(shard: Path, old: str, content: bytes, new: str = "") -> None:
    """Replace the content of one member, and its name if ``new`` is given."""
    with tarfile.open(shard) as tar:
        kept = [(info.name, tar.extractfile(info).read()) for info in tar]
    holding(shard, *((new or old, content) if name == old else (name, data) for name, data in kept))


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


@pytest.mark.parametrize("workers", [0, 1])
def test_where_a_picture_in_a_shard_is_damaged_the_hint_mends_it(tree, tmp_path, here, workers):
    to = prepared(tree, tmp_path / "s", here)
    shard = to / "train-000000.tar"
    whole, start = shard.read_bytes(), borders(shard)[2] + 512
    zeros(shard, start, start + 3000)
    prepared(tree, to, here)  # which does not look at pixels
    with pytest.raises(UserError, match=rf"^cannot read the image {shard}:0+\d\.jpg") as refused:
        trains(to, workers)
    assert refused.value.hint == f"remove {shard}: resnetv2 data prepare makes it again"
    shard.unlink()
    prepared(tree, to, here)
    assert shard.read_bytes() == whole and len(trains(to, workers)) == 1


@pytest.fixture
def anew():
    """Start fresh processes unless the code asks for forks, as Python does from 3.14 on."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are copies on Linux alone")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "number, hint",
    [
        (errno.EMFILE, "^ulimit -n 4096 lets a process have more files open$"),
        (errno.ENOENT, "^resnetv2 data prepare makes it again$"),
        (errno.EIO, "^remove .*train-0+[01].tar: resnetv2 data prepare makes it again$"),
    ],
)
def test_the_hint_is_of_what_the_system_says(
    tree, tmp_path, here, monkeypatch, anew, workers, number, hint
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
        ("place", lambda a: a - a[0], "train.index.npz is damaged"),  # a size of 0
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
    assert "data prepare makes it again" in refused.value.hint
    if "remove" in refused.value.hint:
        for shard in to.glob("train-*.tar"):
            shard.unlink()
    prepared(tree, to, here)  # as the hint says
    assert folder.scan(to, "train").labels.tolist() == [0, 0, 1, 1]


@pytest.fixture
def few():
    """Limit how many more files than now this process may open."""
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
    assert "ulimit -n" in refused.value.hint  # and not: make the shard again


@pytest.mark.parametrize(
    "damage",
    [
        lambda shard: os.truncate(shard, borders(shard)[4]),  # between two images
        lambda shard: os.truncate(shard, borders(shard)[5]),  # after an image, before its label
        lambda shard: zeros(shard, borders(shard)[2], shard.stat().st_size),
        lambda shard: zeros(shard, borders(shard)[2], borders(shard)[2] + 512),  # a header
        lambda shard: zeros(shard, borders(shard)[4], borders(shard)[4] + 100),  # a wrong checksum
        lambda shard: holding(shard),
        lambda shard: holding(shard, ("00000001.jpg", b"abc"), ("00000001.cls", b"0")),
        lambda shard: edited(shard, "00000002.cls", b"99"),
        lambda shard: edited(shard, "00000002.cls", b"0"),  # a class that exists
        lambda shard: edited(shard, "00000002.cls", b"1", "00000003.cls"),
        lambda shard: edited(shard, "00000002.cls", b""),  # a broken link
        lambda shard: edited(shard, "00000002.cls", b"", "00000002.cls/"),  # a folder
        lambda shard: edited(shard, "00000002.jpg", b""),
    ],
)
def test_a_shard_that_lacks_images_is_not_taken_for_whole(tree, tmp_path, here, damage):
    """To a tar reader, each of these ends where the damage begins, or is intact: the index would
    lack images, or have wrong ones, and no number would show it."""
    to = prepared(tree, tmp_path / "s", here)
    whole = {p.name: p.read_bytes() for p in to.iterdir()}
    shard = to / "train-000000.tar"
    damage(shard)
    assert shard.read_bytes() != whole[shard.name]
    done = here("data", "prepare", tree, "--output", to, "--shard", 3, status=2)
    assert "train-000000.tar is damaged" in done.stderr and "remove it" in done.stderr
    assert (to / "train.index.npz").read_bytes() == whole["train.index.npz"]
    shard.unlink()  # as the hint says
    prepared(tree, to, here)
    again = {p.name: p.read_bytes() for p in to.iterdir()}
    assert all(again[name] == whole[name] for name in whole if name.endswith(".tar"))
    assert len(shards.read_index(to / "train.index.npz")["ant"]) == 2


def test_a_shard_that_begins_with_a_label_is_damaged(tmp_path):
    """Even if Python leaves out assertions (-O)."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        label = tarfile.TarInfo("0.cls")
        label.size = 1
        tar.addfile(label, io.BytesIO(b"1"))
    optimized = {"__name__": "optimized"}
    exec(compile(Path(shards.__file__).read_text(), shards.__file__, "exec", optimize=1), optimized)
    with pytest.raises(UserError, match="s.tar is damaged"):
        optimized["members"](tmp_path / "s.tar", [("0.jpg", 1)])
