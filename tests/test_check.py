"""Checking and sorting a tree of photographs: ``data check`` and ``data sort-val``."""

import itertools
import json
import os
import re
import shlex
import shutil
import time
from pathlib import Path

import pytest
from conftest import CUT_OFF, STOPPED, encoded
from PIL import Image

from resnetv2_cli.data import folder, survey
from resnetv2_cli.errors import UserError


def oriented(how: int) -> Image.Exif:
    """The EXIF that a camera held in this orientation writes."""
    exif = Image.Exif()
    exif[survey.ORIENTATION] = how
    return exif


def plant(root: Path) -> dict[str, list[str]]:
    """Write a tree with every fault; return the files that have each."""
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
        "train/bee/lies.jpg": encoded(38, 30, exif=oriented(6)),
        "train/bee/stands.jpg": encoded(39, 30, exif=oriented(1)),
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
        "turned": ["train/bee/lies.jpg"],
        "ignored": ["train/ant/deep/er.jpg", "val/ant/notes.txt"],
    }


def test_check_finds_each_fault_that_was_planted(tmp_path, here):
    planted = plant(tmp_path / "tree")
    report = tmp_path / "report.json"
    done = here("data", "check", tmp_path / "tree", "--output", report, status=2)
    made = json.loads(report.read_text())
    root = f"{tmp_path / 'tree'}/"
    found = {k: [f["file"].removeprefix(root) for f in v] for k, v in made["faults"].items()}
    assert found == planted and set(planted) == set(survey.FAULTS)
    taken = sum(p.stat().st_size for p in (tmp_path / "tree/train").glob("*/*.*"))
    assert made["splits"]["train"] == {
        "classes": 3, "images": 9, "bytes": taken, "least": 0, "most": 6, "empty": ["cow"],
    }  # fmt: skip
    assert made["classes"] == {"val": {"missing": ["cow"], "strange": ["dog"]}}
    names = {
        k: [[n.removeprefix(root) for n in g] for g in v] for k, v in made["duplicates"].items()
    }
    assert names["across"] == [["train/bee/same.png", "val/bee/other-name.bmp"]]
    assert names["classes"] == [["train/ant/0.jpg", "train/bee/twice.jpg"]]
    for words in ("1 unreadable", "2 truncated", "1 classes of val", "1 images in several splits"):
        assert words in done.stderr
    assert "in several splits" in done.stdout and "twice" not in done.stdout.replace(
        "twice.jpg", ""
    )
    assert "1 classes of train without images" in done.stderr
    assert "same pixels" in done.stdout and "colors for print" in done.stdout


def test_check_of_a_tree_of_photographs_finds_nothing(tree, tmp_path, here, photographs):
    report = tmp_path / "report.json"
    done = here("data", "check", tree, "--output", report, "--workers", 2)
    made = json.loads(report.read_text())
    assert made["splits"]["train"]["images"] == 4 and made["splits"]["val"]["images"] == 2
    assert not made["classes"] and not made["flat"]
    assert not any(made["faults"][kind] for kind in ("unreadable", "truncated", "suffix"))
    assert "train" in done.stdout


@pytest.mark.parametrize("split, said", [("train", "no folder train"), ("val", "no folder val or")])
def test_check_says_when_half_is_missing(tree, tmp_path, here, split, said):
    half = shutil.copytree(tree, tmp_path / "half", ignore=lambda *_: {split})
    done = here("data", "check", half, "--output", tmp_path / "report.json", status=2)
    assert said in done.stderr
    assert "hint: train and val hold one folder for each class" in done.stderr


def test_a_flat_test_folder_beside_val_is_not_read_and_that_is_told(tree, tmp_path, here):
    root = shutil.copytree(tree, tmp_path / "tree")
    shutil.copytree(root / "val" / "ant", root / "test")
    done = here("data", "check", root, "--output", tmp_path / "report.json")
    line = f"{root / 'test'} is not read: {root / 'val'} is there"
    assert line in done.stderr
    assert "nothing is wrong" in done.stdout  # that its images are there twice does not matter
    told = []
    assert len(folder.scan(root, "test", tell=told.append).files) == 2 and told == [line]


def test_check_reads_what_lies_behind_links(tree, tmp_path, capsys):
    """As training does; but following a link to a folder that contains it would never end."""
    for split in ("train", "val"):
        (tmp_path / "tree" / split).mkdir(parents=True)
        for label in ("ant", "bee"):
            (tmp_path / "tree" / split / label).symlink_to(tree / split / label)
    (tmp_path / "tree" / "train" / ".again").symlink_to(tree)
    (tmp_path / "tree" / "val" / "up").mkdir()
    (tmp_path / "tree" / "val" / "up" / "again").symlink_to(tmp_path / "tree" / "val")
    seen = survey.survey(tmp_path / "tree", 1, lambda *_: None)
    assert {split: s["images"] for split, s in seen["splits"].items()} == {"train": 4, "val": 2}
    assert seen["faults"]["ignored"] == []


@pytest.mark.filterwarnings("ignore")  # Pillow's: pytest drops the package's own filter
def test_broken_exif_is_no_fault(tmp_path):
    """Reading the pixels does not depend on it."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    for name, exif in (
        ("cut.png", CUT_OFF),
        ("none.png", b"Exif\0\0nothing"),
        ("9.png", oriented(9)),
    ):
        (tmp_path / "train" / "a" / name).write_bytes(encoded(format="PNG", exif=exif))
    seen = survey.survey(tmp_path, 1, lambda *_: None)
    assert seen["splits"]["train"]["images"] == 3 and not any(seen["faults"].values())


def test_a_file_is_not_truncated_by_its_name(tmp_path):
    (tmp_path / "train" / "truncated").mkdir(parents=True)
    (tmp_path / "train" / "truncated" / "a.jpg").write_bytes(b"no image at all")
    seen = survey.survey(tmp_path, 1, lambda *_: None)
    assert seen["faults"]["unreadable"] and not seen["faults"]["truncated"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_check_says_that_a_split_has_class_folders_but_no_images(tree, tmp_path, here, split):
    root = shutil.copytree(tree, tmp_path / "tree")
    for file in (root / split).glob("*/*"):
        file.unlink()
    with pytest.raises(UserError, match="no images in"):  # training would stop here
        folder.scan(root, "train" if split == "train" else "test")
    done = here("data", "check", root, "--output", tmp_path / "report.json", status=2)
    assert f"no images in {split}\nhint" in done.stderr
    assert str(root / split / "CLASS") in done.stderr
    row = f"class empty 2 no image of it in {split} ant"
    assert row in " ".join(done.stdout.replace("│", "").split())
    assert "nothing is wrong" not in done.stdout


def test_a_class_that_is_alone_has_a_row(tree, tmp_path, here):
    root = shutil.copytree(tree, tmp_path / "tree", ignore=lambda *_: {"bee"})
    done = here("data", "check", root, "--output", tmp_path / "report.json")
    row = "class alone 1 there is no other to tell it from"
    assert row in " ".join(done.stdout.replace("│", "").split())


def test_check_says_that_photographs_of_train_are_in_no_class_folder(tree, tmp_path, here):
    root = shutil.copytree(tree, tmp_path / "tree")
    for file in (root / "train").glob("*/*"):
        file.rename(root / "train" / f"{file.parent.name}{file.name}")
    done = here("data", "check", root, "--output", tmp_path / "report.json", status=2)
    assert "train has its images in no class folder\nhint" in done.stderr
    assert str(root / "train" / "CLASS") in done.stderr
    assert "sort-val" not in done.stderr  # which sorts no train/


@pytest.mark.parametrize("number", STOPPED)
def test_a_check_that_is_stopped_leaves_the_report_of_before(
    tree, tmp_path, here, monkeypatch, number
):
    report = tmp_path / "report.json"
    here("data", "check", tree, "--output", report)
    before = report.read_bytes()

    def stopped(entry):
        if next(files) == 3:
            os.kill(os.getpid(), number)
            time.sleep(0.2)
        return look(entry)

    look, files = survey.look, itertools.count()
    monkeypatch.setattr(survey, "look", stopped)
    status, line = STOPPED[number]
    done = here("data", "check", tree, "--output", report, "--workers", 1, status=status)
    assert done.stderr == f"{line}\n" and report.read_bytes() == before
    assert list(tmp_path.iterdir()) == [report]


def test_a_report_without_a_place_is_refused_before_anything_is_read(
    tree, tmp_path, here, monkeypatch
):
    monkeypatch.setattr(survey, "look", None)
    to = tmp_path / "nowhere" / "report.json"
    done = here("data", "check", tree, "--output", to, status=2)
    assert "cannot write" in done.stderr and not done.stdout
    assert "hint: is its folder there" in done.stderr
    assert list(tmp_path.iterdir()) == []


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
    """A dataset whose val/ is flat, as in the official archive."""
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
def test_a_flat_val_is_sorted_by_labels_of_any_form(archive, here, form):
    with pytest.raises(UserError, match="3 images in .*val are in no class folder") as refused:
        folder.scan(archive, "test", ("n1", "n2"))
    words = shlex.split(refused.value.hint.split(", which")[0])
    assert words[:3] == ["resnetv2", "data", "sort-val"]
    labels = archive / "labels.txt"
    labels.write_text(FORMS[form])
    command = [str(labels) if word == "FILE" else word for word in words[2:]]
    before = places(archive)
    assert "3 images would be moved" in here("data", *command, "--dry-run").stdout
    assert places(archive) == before
    assert "3 images moved into 2 class folders" in here("data", *command).stdout
    expected = [f"{p[:3]}ILSVRC2012_val_{p[3:]}.JPEG" for p in SORTED]
    assert places(archive) == expected
    assert folder.scan(archive, "test", ("n1", "n2")).labels.tolist() == [0, 1, 1]
    done = here("data", *command)
    assert "0 images moved" in done.stdout and "3 were there already" in done.stdout
    assert places(archive) == expected


def test_val_itself_can_be_named_once_more(archive, here):
    (archive / "labels.txt").write_text(FORMS["csv"])
    command = ["sort-val", archive / "val", "--labels", archive / "labels.txt"]
    assert "3 images moved" in here("data", *command).stdout
    done = here("data", *command)
    assert "0 images moved" in done.stdout and "3 were there already" in done.stdout
    shutil.rmtree(archive / "val")
    (archive / "train" / "n1" / "a.JPEG").rename(archive / "train" / "a.JPEG")
    command[1] = archive
    assert "has no folder val" in here("data", *command, status=2).stderr  # train is no substitute


def test_a_class_may_be_of_several_words(archive, here):
    shutil.rmtree(archive / "train")
    labels = ("golden retriever", "type 2", " n1 85 1 499 272 n1 1 2 3 4")
    lines = [f"ILSVRC2012_val_{i:08}.JPEG,{label}" for i, label in enumerate(labels, 1)]
    (archive / "labels.txt").write_text("\n".join(lines))
    here("data", "sort-val", archive, "--labels", archive / "labels.txt")
    assert [p.split("/")[0] for p in places(archive)] == ["golden retriever", "n1", "type 2"]


def test_classes_may_be_numbers_where_train_has_their_folders(archive, here):
    for old, new in (("n1", "1"), ("n2", "2")):
        (archive / "train" / old).rename(archive / "train" / new)
    (archive / "labels.txt").write_text(FORMS["names"].replace(" n", " "))
    here("data", "sort-val", archive, "--labels", archive / "labels.txt")
    assert [p.split("/")[0] for p in places(archive)] == ["1", "2", "2"]


def test_images_that_only_their_suffixes_tell_apart(archive, here):
    for path in (archive / "val").iterdir():
        path.unlink()
    for name in ("a.jpg", "a.png", "b.jpg"):
        (archive / "val" / name).write_bytes(encoded())
    labels = archive / "labels.txt"
    labels.write_text("a n1\nb n2\n")
    done = here("data", "sort-val", archive, "--labels", labels, status=2)
    assert "'a' is a.jpg and a.png" in done.stderr
    labels.write_text("a.jpg n1\na.png n2\nb.JPEG n2\n")
    here("data", "sort-val", archive, "--labels", labels)
    assert places(archive) == ["n1/a.jpg", "n2/a.png", "n2/b.jpg"]


def test_a_byte_order_mark_is_no_part_of_a_name(archive, here):
    (archive / "labels.txt").write_text(FORMS["in order"], encoding="utf-8-sig")
    here("data", "sort-val", archive, "--labels", archive / "labels.txt")
    assert [p.split("/")[0] for p in places(archive)] == ["n1", "n2", "n2"]


def moved(archive: Path, number: int) -> None:
    """Move an image of val/ to n1 beforehand."""
    (archive / "val" / "n1").mkdir()
    name = f"ILSVRC2012_val_{number:08}.JPEG"
    (archive / "val" / name).rename(archive / "val" / "n1" / name)


def test_sorting_goes_on_where_it_was_stopped(archive, here):
    (archive / "labels.txt").write_text(FORMS["csv"])
    moved(archive, 2)
    done = here("data", "sort-val", archive, "--labels", archive / "labels.txt")
    assert "2 images moved" in done.stdout and "1 were there already" in done.stdout


def test_an_image_in_another_class_than_labelled_stops_sorting(archive, here):
    (archive / "labels.txt").write_text(FORMS["names"])
    moved(archive, 1)
    before, labels = places(archive), archive / "labels.txt"
    done = here("data", "sort-val", archive, "--labels", labels, status=2)
    assert "1 images are in another class than labelled" in done.stderr
    assert places(archive) == before


@pytest.mark.parametrize(
    "labels, message",
    [
        ("".join(FORMS["names"].splitlines(True)[:2]), "1 images have no label"),
        (FORMS["names"] + "ILSVRC2012_val_00000004.JPEG n1\n", "1 labelled images are not in"),
        (FORMS["names"].replace("n1", "n9"), "train lacks 1 of the classes: 'n9'"),
        (FORMS["names"] + "ILSVRC2012_val_00000001.JPEG n1\n", "two classes, n2 and n1"),
        (FORMS["names"].replace("n1", "../n1"), "line 2: .* is not an image and its class"),
        ("n2\nn1\n", "2 labels without names, for 3 images"),
        ("490\n361\n171\n", "numbers for classes"),
        ("n" * 200_000, "cannot read the labels"),
        (" \n", "line 1: .* is not an image and its class"),
        ("a.JPEG,\n", "line 1: .* is not an image and its class"),
        ("", "does not give each image its class"),
        ("n1\nILSVRC2012_val_00000001.JPEG n1\n", "does not give each image its class"),
    ],
)
def test_nothing_is_moved_if_anything_is_wrong(archive, here, labels, message):
    (archive / "labels.txt").write_text(labels)
    before = places(archive)
    done = here("data", "sort-val", archive, "--labels", archive / "labels.txt", status=2)
    assert re.search(message, done.stderr), done.stderr
    assert places(archive) == before


def test_a_report_takes_the_place_of_a_report_alone(tree, tmp_path, here):
    photograph = shutil.copy(next(tree.rglob("*.JPEG")), tmp_path / "x.jpg")
    before = Path(photograph).read_bytes()
    assert "is not a report" in here("data", "check", tree, "-o", photograph, status=2).stderr
    assert Path(photograph).read_bytes() == before
    assert "is a folder" in here("data", "check", tree, "-o", tmp_path, status=2).stderr
    for _ in range(2):
        here("data", "check", tree, "-o", tmp_path / "report.json", status=None)
        assert "splits" in json.loads((tmp_path / "report.json").read_text())
