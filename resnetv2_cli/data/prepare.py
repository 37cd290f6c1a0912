"""Photographs re-encoded once, into shards that are faster to read."""

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from resnetv2_cli import jsonfile
from resnetv2_cli.data import folder, picture, shards
from resnetv2_cli.errors import UserError
from resnetv2_cli.files import PARTIAL, replacing, write_text
from resnetv2_cli.locks import held

LOCK = "prepare.lock"


class Form(NamedTuple):
    """How images are stored: shorter side at most ``side`` pixels; as JPEG of ``quality``, or with
    ``raw`` as pixels; ``shard``: images in one file."""

    side: int = 512
    quality: int = 90
    raw: bool = False
    shard: int = 1000


def encoded(path: Path, form: Form) -> bytes:
    """A photograph encoded as ``form`` says.

    Raises:
        UserError: it cannot be read, or cannot be a JPEG; the message names it.
    """
    image = picture.rgb(path, str(path))
    share = form.side / min(image.size)
    if share < 1:
        size = [max(1, round(side * share)) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    if form.raw:
        np.save(out, np.asarray(image))
    else:
        try:
            image.save(out, "JPEG", quality=form.quality)
        except OSError as error:  # a side of more pixels than JPEG allows
            raise UserError(f"{path} cannot be a JPEG: {error}", "omit it, or use --raw") from None
    return out.getvalue()


def prepare(
    root: Path, output: Path, form: Form, workers: int, tick: Callable[[int, int], None]
) -> dict[str, int]:
    """Write the splits of class folders as shards, and return how many images each split has.
    Shards that an earlier call finished are kept, so a call that was stopped can be continued.

    Raises:
        UserError: an image cannot be read; ``output`` cannot be written, holds something else, or
            has a damaged shard; or ``root`` is itself a folder of shards.
    """
    shards.refuse_shards(root)
    splits = {"train": folder.scan(root, "train")}
    splits["val"] = folder.scan(root, "test", splits["train"].classes)
    stamps = {
        shard: stamp(splits[name].files[i] for i in rows)
        for name in splits
        for shard, rows in portions(name, splits[name], form).items()
    }
    plan = {"form": form._asdict(), "digest": folder.digest(*splits.values())}
    begun = output / shards.BEGUN
    if output.is_dir() and not begun.exists():
        left = {p.name for p in output.iterdir() if p.suffix != PARTIAL}
        if left - {LOCK}:
            raise UserError(f"{output} is not empty", "name a new folder")
    with held(output / LOCK, "wait for it, or stop it"):
        if begun.exists():
            refuse_others(output, jsonfile.parsed(begun.read_bytes()), plan, stamps)
        try:
            write_text(begun, json.dumps(plan | {"shards": stamps}))
            return _prepared(splits, output, form, workers, tick)
        except OSError as error:
            raise UserError(
                f"cannot write {output}: {error.strerror or error}",
                "finished shards are kept: make room, and run it again",
            ) from None


def stamp(files: Iterable[object]) -> str:
    """A digest of the files' sizes and times, to recognize other files of the same names."""
    made = hashlib.sha256()
    for path in map(Path, map(str, files)):
        picture.refuse_pipe(path, str(path))
        stat = path.stat()
        made.update(f"{stat.st_size} {stat.st_mtime_ns}\n".encode())
    return made.hexdigest()[:16]


def refuse_others(
    output: Path, was: dict[str, Any], plan: dict[str, Any], stamps: dict[str, str]
) -> None:
    """Refuse a folder that was begun with something else.

    Raises:
        UserError: images or settings were others, or images of a finished shard have changed.
    """
    made = was.pop("shards", {})
    if was != plan or not isinstance(made, dict):
        raise UserError(f"{output} was begun with other images or settings", "name a new folder")
    for shard, found in stamps.items():
        if made.get(shard, found) != found and (output / shard).exists():
            raise UserError(
                f"{output / shard} was made from other images, or they have changed since",
                "name a new folder; or remove the shard, and run it again",
            )


def portions(name: str, split: folder.Folder, form: Form) -> dict[str, list[int]]:
    """The shards of a split, and the rows in each."""
    order = list(range(len(split.files)))
    random.Random(0).shuffle(order)  # so that reading shards one after another mixes all classes
    starts = range(0, len(order), form.shard)
    return {f"{name}-{n:06}.tar": order[s : s + form.shard] for n, s in enumerate(starts)}


def contents(split: folder.Folder, rows: list[int], form: Form) -> list[tuple[str, int]]:
    """What a shard holds: the name of each row's image in it, and the number of its class."""
    suffix = ".npy" if form.raw else ".jpg"
    return [(f"{row:08}{suffix}", int(split.labels[row])) for row in rows]


def _prepared(
    splits: dict[str, folder.Folder],
    output: Path,
    form: Form,
    workers: int,
    tick: Callable[[int, int], None],
) -> dict[str, int]:
    every = sum(len(split.files) for split in splits.values())
    done, indexed = 0, {}

    def tick_from(before: int, here: int) -> None:
        tick(before + here, every)

    for name, split in splits.items():
        found = []
        for named, rows in portions(name, split, form).items():
            if not (shard := output / named).exists():
                write(shard, split, rows, form, workers, partial(tick_from, done))
            found += shards.members(shard, contents(split, rows, form))
            done += len(rows)
            tick(done, every)
        shards.write_index(shards.index_of(output, name), split.classes, found)
        indexed[name] = len(found)
    return indexed


def write(
    shard: Path,
    split: folder.Folder,
    rows: list[int],
    form: Form,
    workers: int,
    tick: Callable[[int], None],
) -> None:
    """Write one shard, completely or not at all."""

    def images() -> Iterator[bytes]:
        with ThreadPool(workers) as pool:
            yield from pool.imap(lambda i: encoded(Path(str(split.files[i])), form), rows)

    with replacing(shard) as file, tarfile.open(fileobj=file, mode="w:") as tar:
        pairs = zip(contents(split, rows, form), images(), strict=True)
        for k, ((name, label), content) in enumerate(pairs, 1):
            members = {name: content, f"{Path(name).stem}.cls": str(label).encode()}
            for called, data in members.items():
                info = tarfile.TarInfo(called)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            tick(k)
