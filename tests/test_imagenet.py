"""Photographs: what is cropped of them, how fast they are read, and how they are looked after."""

import io
import json
import os
import re
import shlex
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import FakeTrainer
from test_fuzz import MUCH, mutated
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import (
    center_crop,
    pil_to_tensor,
    resize,
    resized_crop,
    ten_crop,
)

from resnetv2_cli import paper
from resnetv2_cli.cli import main
from resnetv2_cli.config import Experiment
from resnetv2_cli.data import crop, folder, prepare, survey, turbo
from resnetv2_cli.data.augment import Normalize
from resnetv2_cli.data.module import ImageData
from resnetv2_cli.data.protocols import PROTOCOLS
from resnetv2_cli.data.turbo import Box
from resnetv2_cli.errors import UserError
from resnetv2_cli.task import Classification

needs_turbo = pytest.mark.skipif(turbo.library() is None, reason="there is no TurboJPEG 3")


@pytest.fixture(scope="session")
def photographs(shared_data) -> dict[str, bytes]:
    """A few real photographs of ImageNet, as they are in it."""
    with zipfile.ZipFile(shared_data / "imagenet-sample.zip") as sample:
        names = sorted(n for n in sample.namelist() if n.endswith(".JPEG"))
        return {Path(n).name: sample.read(n) for n in names[::12]}


def encoded(width: int = 90, height: int = 70, mode: str = "RGB", **how) -> bytes:
    """A smooth picture with some noise on it, as photographs have."""
    rng = np.random.default_rng(width * height)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height)), np.int16) + rng.integers(
        -9, 10, (height, width, 3), dtype=np.int16
    )
    out = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)
    image.save(out, how.pop("format", "JPEG"), **how)
    return out.getvalue()


def by_pil(content: bytes, scale: int) -> np.ndarray:
    """The whole picture at a scale of the JPEG's transform."""
    with Image.open(io.BytesIO(content)) as image:
        image.draft(None, (image.width // scale, image.height // scale))
        return np.asarray(image.convert("RGB"))


KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "grey": {"mode": "L"},
}


@needs_turbo
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_a_region_has_the_very_pixels_that_pil_decodes(kind, scale):
    content = encoded(213, 157, quality=88, **KINDS[kind])
    jpeg = turbo.plain(content, 10**6)
    whole = by_pil(content, scale)
    rng = np.random.default_rng(0)
    for _ in range(20):
        left, right = sorted(rng.choice(213 // scale + 1, 2, replace=False))
        top, bottom = sorted(rng.choice(157 // scale + 1, 2, replace=False))
        found = jpeg.region(Box(int(left), int(top), int(right), int(bottom)), scale)
        np.testing.assert_array_equal(found, whole[top:bottom, left:right])


def chosen(kind: str, seed: int) -> crop.Choose:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(folder.DRAWS, generator=generator, dtype=torch.float64).tolist()
    return lambda width, height: [folder.random_box(width, height, kind, draws)]


@pytest.mark.parametrize("kind", ["scale", "scale-aspect"])
def test_crops_are_the_reference_transforms_within_bounds(kind, photographs):
    """torchvision's crop and bicubic resize of the whole picture, in grey levels: what torch's
    resize makes of it differs by 2, or where one side grows and the other shrinks by more; at half
    the scale the JPEG's transform is another filter."""
    for seed, content in enumerate(photographs.values()):
        with Image.open(io.BytesIO(content)) as image:
            whole = image.convert("RGB")
        plan = crop.settled(chosen(kind, seed)(*whole.size), whole.size, 224)
        [box], s = plan
        width, height = box.right - box.left, box.bottom - box.top
        expected = resized_crop(
            whole, box.top * s, box.left * s, height * s, width * s, [224, 224],
            InterpolationMode.BICUBIC,
        )  # fmt: skip
        found = crop.crops(content, "it", chosen(kind, seed), 224)[0].numpy()
        apart = np.abs(np.asarray(expected, np.int16) - found)
        mixed = (width < 224) != (height < 224)
        mean, most = (3, 90) if s > 1 else (0.5, 30) if mixed else (0.05, 2)
        assert apart.mean() < mean and apart.max() <= most, (seed, s, apart.mean(), apart.max())


def test_a_crop_is_decoded_at_the_least_scale_that_has_its_pixels():
    for side, scale in [(223, 1), (447, 1), (448, 2), (900, 4), (5000, 8)]:
        plan = crop.settled([(10.4, 20.0, 10.4 + side, 20.0 + side)], (6000, 6000), 224)
        assert plan.scale == scale
        [box] = plan.boxes
        assert abs(box.left * scale - 10.4) <= scale / 2 + 1e-9
        assert min(box.right - box.left, box.bottom - box.top) >= min(side, 224)


@pytest.mark.parametrize("kind", ["scale", "scale-aspect"])
def test_without_the_library_the_pixels_are_the_same(kind, photographs, monkeypatch):
    some = [*list(photographs.values())[:4], encoded(1000, 900, quality=70)]
    fast = [crop.crops(content, "it", chosen(kind, i), 224) for i, content in enumerate(some)]
    monkeypatch.setattr(turbo, "library", lambda: None)
    slow = [crop.crops(content, "it", chosen(kind, i), 224) for i, content in enumerate(some)]
    torch.testing.assert_close(fast, slow, rtol=0, atol=0)


OTHERS = {
    "progressive": {"progressive": True},
    "CMYK": {"mode": "CMYK"},
    "PNG": {"format": "PNG"},
    "PNG, palette": {"format": "PNG", "mode": "P"},
    "WebP": {"format": "WEBP"},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_any_other_file_is_read_in_the_usual_way(kind):
    content = encoded(**OTHERS[kind])
    assert turbo.plain(content, 10**6) is None
    found = crop.crops(content, "it", lambda w, h: [(5, 7, 45, 47)], 32)
    with Image.open(io.BytesIO(content)) as image:
        part = image.convert("RGB").crop((5, 7, 45, 47))
    expected = part.resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(expected, np.int16) - found[0].numpy()).max() <= 2


@pytest.mark.parametrize("cut", [0.2, 0.6, 0.95])
def test_a_photograph_that_is_cut_off_is_an_error_wherever_the_crop_is(cut):
    content = encoded(400, 300)
    with pytest.raises(UserError, match="cannot read the image it.jpg: .*truncated"):
        crop.crops(content[: int(cut * len(content))], "it.jpg", lambda w, h: [(0, 0, 9, 9)], 8)


def test_a_size_that_would_fill_the_memory_is_refused():
    content = bytearray(encoded())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = b"\xff\xff" * 2  # 65535 x 65535
    with pytest.raises(UserError, match="it.jpg: .*exceeds limit"):
        crop.crops(bytes(content), "it.jpg", lambda w, h: [(0, 0, 9, 9)], 8)


SMALL = [encoded(30, 22, **how) for how in KINDS.values()]


@needs_turbo
@settings(max_examples=400 * MUCH)
@given(content=mutated(SMALL), kind=st.sampled_from(["scale", "scale-aspect"]))
@pytest.mark.filterwarnings("ignore")  # Pillow's, of images that it can still read
def test_crops_of_random_bytes(content, kind):
    try:
        found = crop.crops(content, "it", chosen(kind, 0), 8)
    except UserError as error:
        assert 0 < len(str(error)) < 2000 and "\n" not in str(error)
    else:
        assert found.shape == (1, 8, 8, 3)


# Protocols.


@pytest.fixture(scope="session")
def tree(photographs, tmp_path_factory) -> Path:
    """Two classes of photographs, of which four train and two test."""
    root = tmp_path_factory.mktemp("tree")
    content = list(photographs.values())
    for i, (split, label) in enumerate(
        [("train", "ant"), ("train", "bee"), ("val", "ant"), ("val", "bee")]
    ):
        (root / split / label).mkdir(parents=True)
        for k in range(2 if split == "train" else 1):
            (root / split / label / f"{k}.JPEG").write_bytes(content[2 * i % 7 + k])
    return root


def test_the_views_of_the_protocols():
    views = {name: row.view(224) for name, row in PROTOCOLS.items()}
    assert views == {
        "224": (224, 224 / 256, False),
        "320": (320, 1.0, False),
        "ten-crop": (224, 224 / 256, True),
    }
    assert [v.shorter for v in views.values()] == [256, 320, 256]
    assert PROTOCOLS["224"].view(32) == (32, 224 / 256, False)  # --stem cifar: in proportion


@pytest.mark.parametrize("size", [(500, 375), (256, 400)])
def test_the_places_of_ten_crops(size):
    """Of the image whose shorter side is 256: four corners and the middle."""
    found = folder.boxes(*size, PROTOCOLS["ten-crop"].view(224))
    scale = 256 / min(size)
    width, height = (side * scale for side in size)
    expected = [(x, y) for y in (0, height - 224) for x in (0, width - 224)]
    expected.append(((width - 224) / 2, (height - 224) / 2))
    assert len(found) == 5
    for (left, top, right, bottom), (x, y) in zip(found, expected, strict=True):
        assert (left * scale, top * scale) == pytest.approx((x, y))
        assert ((right - left) * scale, (bottom - top) * scale) == pytest.approx((224, 224))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_test_view_is_resize_and_crop(tree, protocol):
    """As torchvision's, up to the half pixels that both round: a mean of less than 8 grey levels,
    where another place, 8 pixels away, has more."""
    split = folder.scan(tree, "test")
    view = PROTOCOLS[protocol].view(224)
    found, _ = folder.FolderImages(split, 224, "scale", 0, view)[0, -1]
    with Image.open(split.files[0]) as image:
        small = resize(image.convert("RGB"), view.shorter, InterpolationMode.BICUBIC)
    cut = ten_crop if view.ten else lambda *args: [center_crop(*args)]
    expected = torch.stack([pil_to_tensor(c) for c in cut(small, view.side)]).permute(0, 2, 3, 1)
    if view.ten:  # theirs are the five of the mirrored image: left and right change places
        expected = expected[[0, 1, 2, 3, 4, 6, 5, 8, 7, 9]]
    found = found if view.ten else found[None]
    assert found.shape == expected.shape == (10 if view.ten else 1, view.side, view.side, 3)
    for ours, theirs in zip(found.short(), expected.short(), strict=True):
        near = (ours - theirs).abs().float().mean()
        far = (ours - theirs.roll(8, 0)).abs().float().mean()
        assert near < 8 and near < far / 2


def test_ten_crops_are_the_mean_of_softmax():
    task = Classification(
        Experiment(depth=8, dataset="digits"), ("a", "b", "c"),
        Normalize(torch.zeros(3, 1, 1), torch.ones(3, 1, 1)),
    ).eval()  # fmt: skip
    images = torch.randint(256, (4, 10, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        found = task.look(images).softmax(1)
        each = torch.stack([task(images[:, k]).softmax(1) for k in range(10)])
        torch.testing.assert_close(found, each.mean(0))
        torch.testing.assert_close(task.look(images[:, 0]), task(images[:, 0]))


def test_ten_crops_of_each_image_are_counted_once_by_several_processes(tree):
    given = {"dataset": "folder", "data_dir": str(tree), "depth": 18, "batch_size": 2}
    e = Experiment(**given, steps=1, workers=0, protocol="ten-crop")
    batches = []
    for rank in range(2):
        module = ImageData(e)
        module.trainer = FakeTrainer(rank, 2)
        module.setup()
        batches += list(module.test_dataloader())
    assert [b.images.shape for b in batches] == [(1, 10, 224, 224, 3)] * 2
    assert [int(label) for b in batches for label in b.labels] == [0, 1]


def test_a_network_of_the_paper_has_its_published_errors():
    def known(**given):
        e = Experiment(dataset="imagenet", **given)
        return [(r.published, r.top5) for r in paper.evaluated(e)]

    assert known(depth=200, protocol="320") == [(20.7, 5.3), (20.1, 4.8)]
    assert known(depth=152, unit="original") == [(23.0, 6.7)]
    assert known(depth=200, protocol="ten-crop") == [(20.15, 4.93)]
    assert known(depth=34) == known(depth=152, unit="original", shortcut="conv1x1") == []
    assert paper.evaluated(Experiment(depth=110)) == []


def test_files_of_older_versions_say_test_size(tmp_path):
    (tmp_path / "old.yaml").write_text("depth: 50\ndataset: imagenet\ntest_size: 320\n")
    assert Experiment.load(tmp_path / "old.yaml").protocol == "320"
    (tmp_path / "old.yaml").write_text("test_size: null\nprotocol: 320\n")
    assert Experiment.load(tmp_path / "old.yaml").protocol == "320"
    (tmp_path / "old.yaml").write_text("test_size: 64\n")
    with pytest.raises(UserError, match="test_size 64 is no longer known"):
        Experiment.load(tmp_path / "old.yaml")


def test_the_scale_of_training_crops_goes_with_the_network(tree):
    """For inputs of 32 the shorter side is drawn from 256..480 times 32/224: the same share."""
    draws = [0.0] * folder.DRAWS
    left, _, right, _ = folder.random_box(400, 300, "scale", draws)
    assert right - left == pytest.approx(300 * 224 / 256)
    split = folder.scan(tree, "train")
    small = folder.FolderImages(split, 32, "scale", 0, PROTOCOLS["224"].view(32))[0, 0][0]
    large = folder.FolderImages(split, 224, "scale", 0, PROTOCOLS["224"].view(224))[0, 0][0]
    shrunk = F.interpolate(large.permute(2, 0, 1)[None].float(), (32, 32), mode="area")
    assert (shrunk[0].permute(1, 2, 0) - small).abs().mean() < 8


# Looking after a tree.


def called(capsys, *arguments, status: int = 0) -> tuple[str, str]:
    """What the command writes to stdout and stderr."""
    capsys.readouterr()
    try:
        main(["data", *map(str, arguments)])
        left = 0
    except SystemExit as exit:
        left = exit.code or 0
    said = capsys.readouterr()
    assert left == status, said.err
    return " ".join(said.out.split()), " ".join(said.err.split())


def plant(root: Path) -> dict[str, list[str]]:
    """A tree with each fault; which files have it."""
    good = {split: encoded(60, 50, quality=q) for split, q in (("train", 80), ("val", 90))}
    for split in good:
        for label in ("ant", "bee"):
            (root / split / label).mkdir(parents=True)
    (root / "train" / "cow").mkdir()
    (root / "val" / "dog").mkdir()
    files = {
        "train/ant/0.jpg": good["train"],
        "train/bee/same.png": encoded(33, 30, format="PNG"),
        "val/bee/other-name.bmp": encoded(33, 30, format="BMP"),
        "val/ant/0.jpg": good["val"],
        "train/bee/twice.jpg": good["train"],
        "train/ant/text.jpg": b"no image at all",
        "train/ant/cut.jpg": encoded(300, 200)[:2000],
        "train/bee/cut.png": encoded(300, 200, format="PNG")[:2000],
        "val/bee/named.png": encoded(34, 30),
        "train/bee/print.jpg": encoded(35, 30, mode="CMYK"),
        "val/ant/grey.png": encoded(36, 30, mode="L", format="PNG"),
        "val/ant/moves.webp": encoded(
            37, 30, format="WEBP", save_all=True, append_images=[Image.new("RGB", (37, 30))]
        ),
        "val/ant/notes.txt": b"by hand",
        "train/ant/deep/er.jpg": good["train"],
    }
    (root / "train/ant/deep").mkdir()
    for name, content in files.items():
        (root / name).write_bytes(content)
    return {
        "unreadable": ["train/ant/text.jpg"],
        "truncated": ["train/ant/cut.jpg", "train/bee/cut.png"],
        "suffix": ["val/bee/named.png"],
        "CMYK": ["train/bee/print.jpg"],
        "grey": ["val/ant/grey.png"],
        "animated": ["val/ant/moves.webp"],
        "ignored": ["train/ant/deep/er.jpg", "val/ant/notes.txt"],
    }


def test_check_finds_each_fault_that_was_planted(tmp_path, capsys):
    planted = plant(tmp_path / "tree")
    report = tmp_path / "report.json"
    out, err = called(capsys, "check", tmp_path / "tree", "--output", report, status=2)
    made = json.loads(report.read_text())
    root = f"{tmp_path / 'tree'}/"
    found = {k: [f["file"].removeprefix(root) for f in v] for k, v in made["faults"].items()}
    assert found == planted and set(planted) == set(survey.FAULTS)
    assert made["splits"]["train"] | {"bytes": 0} == {
        "classes": 3, "images": 7, "bytes": 0, "least": 0, "most": 4, "empty": ["cow"],
    }  # fmt: skip
    assert made["classes"] == {"val": {"missing": ["cow"], "strange": ["dog"]}}
    names = {
        k: [[n.removeprefix(root) for n in g] for g in v] for k, v in made["duplicates"].items()
    }
    assert names["across"] == [["train/bee/same.png", "val/bee/other-name.bmp"]]
    assert names["classes"] == [["train/ant/0.jpg", "train/bee/twice.jpg"]]
    for words in ("1 unreadable", "2 truncated", "1 classes of val", "1 images in several splits"):
        assert words in err
    assert "same pixels" in out and "colors of print" in out


def test_check_of_a_tree_of_photographs_finds_nothing(tree, tmp_path, capsys, photographs):
    report = tmp_path / "report.json"
    out, _ = called(capsys, "check", tree, "--output", report, "--workers", 2)
    made = json.loads(report.read_text())
    assert made["splits"]["train"]["images"] == 4 and made["splits"]["val"]["images"] == 2
    assert not made["classes"] and not made["flat"]
    assert not any(made["faults"][kind] for kind in ("unreadable", "truncated", "suffix"))
    assert "train" in out


FORMS = {
    "names": "ILSVRC2012_val_00000001.JPEG n2\nILSVRC2012_val_00000002.JPEG n1\n"
    "ILSVRC2012_val_00000003.JPEG n2\n",
    "tabs": "ILSVRC2012_val_00000003\tn2\nILSVRC2012_val_00000001\tn2\n"
    "ILSVRC2012_val_00000002\tn1\n",
    "csv": "ImageId,PredictionString\nILSVRC2012_val_00000002,n1 85 1 499 272 \n"
    "ILSVRC2012_val_00000001,n2 1 2 3 4\nILSVRC2012_val_00000003,n2 1 2 3 4 n2 5 6 7 8\n",
    "in order": "n2\nn1\nn2\n",
}
SORTED = [f"n1/{2:08}", f"n2/{1:08}", f"n2/{3:08}"]


@pytest.fixture
def archive(tmp_path) -> Path:
    """val/ as the official archive has it."""
    for label in ("n1", "n2"):
        (tmp_path / "train" / label).mkdir(parents=True)
        (tmp_path / "train" / label / "a.JPEG").write_bytes(encoded())
    (tmp_path / "val").mkdir()
    for i in (1, 2, 3):
        (tmp_path / "val" / f"ILSVRC2012_val_{i:08}.JPEG").write_bytes(encoded(30 + i))
    return tmp_path


def places(root: Path) -> list[str]:
    return [
        str(p.relative_to(root / "val")) for p in sorted((root / "val").rglob("*")) if p.is_file()
    ]


@pytest.mark.parametrize("form", FORMS)
def test_a_flat_val_is_sorted_by_labels_of_any_form(archive, capsys, form):
    with pytest.raises(UserError, match="3 images in .*val are in no class folder") as refused:
        folder.scan(archive, "test", ("n1", "n2"))
    words = shlex.split(refused.value.hint.split(", which")[0])
    assert words[:3] == ["resnetv2", "data", "sort-val"]
    labels = archive / "labels.txt"
    labels.write_text(FORMS[form])
    command = [str(labels) if word == "FILE" else word for word in words[2:]]
    before = places(archive)
    assert "3 images would be moved" in called(capsys, *command, "--dry-run")[0]
    assert places(archive) == before
    assert "3 images moved into 2 class folders" in called(capsys, *command)[0]
    expected = [f"{p[:3]}ILSVRC2012_val_{p[3:]}.JPEG" for p in SORTED]
    assert places(archive) == expected
    assert folder.scan(archive, "test", ("n1", "n2")).labels.tolist() == [0, 1, 1]
    again, _ = called(capsys, *command)
    assert "0 images moved" in again and "3 were there already" in again
    assert places(archive) == expected


def test_sorting_goes_on_where_it_was_stopped(archive, capsys):
    (archive / "labels.txt").write_text(FORMS["csv"])
    (archive / "val" / "n1").mkdir()
    name = "ILSVRC2012_val_00000002.JPEG"
    (archive / "val" / name).rename(archive / "val" / "n1" / name)
    out, _ = called(capsys, "sort-val", archive, "--labels", archive / "labels.txt")
    assert "2 images moved" in out and "1 were there already" in out


@pytest.mark.parametrize(
    "labels, message",
    [
        ("".join(FORMS["names"].splitlines(True)[:2]), "1 images have no label"),
        (FORMS["names"] + "ILSVRC2012_val_00000004.JPEG n1\n", "1 labelled images are not in"),
        (FORMS["names"].replace("n1", "n9"), "train lacks 1 of the classes: 'n9'"),
        (FORMS["names"] + "ILSVRC2012_val_00000001.JPEG n1\n", "two classes, n2 and n1"),
        (FORMS["names"].replace("n1", "../n1"), "line 2: .* is no image and its class"),
        ("n2\nn1\n", "2 labels without names, for 3 images"),
        ("490\n361\n171\n", "numbers for classes"),
        ("", "does not give each image its class"),
        ("n1\nILSVRC2012_val_00000001.JPEG n1\n", "does not give each image its class"),
    ],
)
def test_nothing_is_moved_if_anything_is_wrong(archive, capsys, labels, message):
    (archive / "labels.txt").write_text(labels)
    before = places(archive)
    _, err = called(capsys, "sort-val", archive, "--labels", archive / "labels.txt", status=2)
    assert re.search(message, err), err
    assert places(archive) == before


# Prepared shards.


def prepared(tree: Path, to: Path, capsys, *more) -> Path:
    called(capsys, "prepare", tree, "--output", to, "--shard", 3, *more)
    return to


def read_all(root: Path, split: str) -> tuple[folder.Folder, torch.Tensor]:
    """A split, and its training crops in one epoch."""
    found = folder.scan(root, split, ("ant", "bee"))
    views = folder.FolderImages(found, 224, "scale", 0, PROTOCOLS["224"].view(224))
    return found, torch.stack([views[i, 0][0] for i in range(len(found.files))])


@pytest.mark.parametrize("raw", [False, True])
def test_shards_have_the_same_images_in_the_same_order(tree, tmp_path, capsys, raw):
    shards = prepared(tree, tmp_path / "s", capsys, "--side", 4000, *(["--raw"] if raw else []))
    for split in ("train", "test"):
        (loose, x), (packed, y) = read_all(tree, split), read_all(shards, split)
        assert packed.labels.tolist() == loose.labels.tolist() and packed.classes == loose.classes
        apart = (x.short() - y.short()).abs()
        assert apart.max() <= 2 if raw else apart.float().mean() < 4


def test_plain_tar_reads_the_shards(tree, tmp_path, capsys):
    shards = prepared(tree, tmp_path / "s", capsys, "--side", 200)
    seen = []
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as tar:
            names = tar.getnames()
            for image, label in zip(names[::2], names[1::2], strict=True):
                assert Path(image).stem == Path(label).stem and label.endswith(".cls")
                with Image.open(tar.extractfile(image)) as found:
                    assert min(found.size) <= 200
                seen.append((shard.name[:5], int(tar.extractfile(label).read())))
    assert sorted(seen) == [("train", 0)] * 2 + [("train", 1)] * 2 + [("val-0", 0), ("val-0", 1)]


def test_preparing_goes_on_where_it_was_stopped(tree, tmp_path, capsys, monkeypatch):
    whole = prepared(tree, tmp_path / "a", capsys)
    calls = []

    def stops(path, form):
        calls.append(path)
        if len(calls) > 3:
            raise UserError("an image that cannot be read")
        return encode(path, form)

    encode = prepare.encoded
    monkeypatch.setattr(prepare, "encoded", stops)
    called(
        capsys, "prepare", tree, "--output", tmp_path / "b", "--shard", 3, "--workers", 1,
        status=2,
    )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "prepared.json", "train-000000.tar",
    ]  # fmt: skip
    with pytest.raises(UserError, match="there is no folder"):
        folder.scan(tmp_path / "b", "train")
    monkeypatch.undo()
    first = (tmp_path / "b" / "train-000000.tar").stat().st_mtime_ns
    prepared(tree, tmp_path / "b", capsys)
    assert (tmp_path / "b" / "train-000000.tar").stat().st_mtime_ns == first
    for path in whole.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    _, err = called(
        capsys, "prepare", tree, "--output", tmp_path / "b", "--side", 99, "--shard", 3, status=2
    )
    assert "begun with other images or settings" in err
    _, err = called(capsys, "prepare", tree, "--output", tree, status=2)
    assert "is not empty" in err


def test_processes_read_each_image_of_the_shards_once_and_resume_within_an_epoch(
    tree, tmp_path, capsys
):
    shards = prepared(tree, tmp_path / "s", capsys)
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
        (lambda r: os.truncate(r / "train-000000.tar", 3000), "cannot read the image .*cut off"),
    ],
)
def test_damaged_shards_are_one_clear_error(tree, tmp_path, capsys, damage, message):
    shards = prepared(tree, tmp_path / "s", capsys)
    damage(shards)
    with pytest.raises(UserError, match=message):
        read_all(shards, "train")
