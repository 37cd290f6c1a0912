"""predict: any picture, preprocessed as in evaluation; a broken file is a row, not the end."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CUT_OFF
from PIL import Image
from safetensors.torch import save

from resnetv2_cli.config import Experiment
from resnetv2_cli.data import folder, images
from resnetv2_cli.data.augment import Normalize
from resnetv2_cli.data.module import view_of
from resnetv2_cli.data.protocols import PROTOCOLS
from resnetv2_cli.errors import UserError
from resnetv2_cli.inference import Picture, from_stdin, images_of, network, predict
from resnetv2_cli.weightfile import find


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The test digits as files, in the order of evaluation; and their labels."""
    folder = tmp_path_factory.mktemp("digits")
    test = images.digits().test
    for i, pixels in enumerate(test.images):
        Image.fromarray(pixels).save(folder / f"{i:04}.png")
    return folder, test.labels


def rows(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_it_sees_what_evaluation_sees(trained, digits, here):
    """Its error on the test images, read from files, is the run's own test error."""
    folder, labels = digits
    done = here("predict", trained, folder, "--format", "jsonl", "--top", 10)
    found = rows(done.stdout)
    guesses = [int(row["predictions"][0]["class"]) for row in found]
    error = 100 * np.mean(np.array(guesses) != labels)
    result = json.loads((trained / "result.json").read_text())
    assert error == pytest.approx(result["test_error"])
    for row in found:
        assert sum(p["probability"] for p in row["predictions"]) == pytest.approx(1, abs=1e-4)


SHAPES = {"L": (8, 8), "P": (33, 40), "RGBA": (640, 48), "CMYK": (50, 50), "1": (1, 700)}


@pytest.mark.parametrize("mode", SHAPES)
def test_any_size_and_mode(trained, tmp_path, here, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, SHAPES[mode]).save(tmp_path / f"a.{suffix}")
    done = here("predict", trained, tmp_path / f"a.{suffix}", "--format", "jsonl")
    assert len(rows(done.stdout)[0]["predictions"]) == 3


def test_what_is_odd_but_can_be_read_warns_of_nothing(tmp_path):
    """A palette with transparency; more pixels than Pillow takes without a warning, here 1000; and
    truncated EXIF."""
    image = Image.new("P", (40, 30))
    image.putpalette([200, 100, 50, 1, 2, 3])
    image.save(tmp_path / "a.png", transparency=b"\x80\xff")
    image.convert("RGB").save(tmp_path / "b.jpg", exif=CUT_OFF)
    code = """
import sys
from pathlib import Path
from PIL import Image
from resnetv2_cli.data import picture
Image.MAX_IMAGE_PIXELS = 1000
for name in sys.argv[1:]:
    print(picture.rgb(Path(name), name).getpixel((0, 0)))
"""
    files = [str(tmp_path / "a.png"), str(tmp_path / "b.jpg")]
    command = [sys.executable, "-W", "error", "-c", code, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "(200, 100, 50)\n" * 2 and not done.stderr


def test_sixteen_bits_of_grey_are_not_cut_off_at_white(tmp_path):
    """convert("RGB") would make everything brighter than 0.4 % white."""
    from resnetv2_cli.data import picture

    grey = np.linspace(0, 2**16 - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(grey).save(tmp_path / "a.png")
    found = np.asarray(picture.rgb(tmp_path / "a.png", "a.png"))
    assert np.abs(found[..., 0].astype(int) - grey / 257).max() < 1


def test_a_broken_file_is_a_row_and_the_others_are_as_without_it(trained, digits, tmp_path, here):
    folder, _ = digits
    whole = sorted(folder.iterdir())[:2]
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(whole[0].read_bytes()[:-40])
    mixed = [whole[0], tmp_path / "text.png", whole[1], tmp_path / "cut.png", "nowhere.png"]
    mixed.append("a" * 300 + ".png")  # longer than the system allows
    done = here("predict", trained, *mixed, "--format", "jsonl")
    found = rows(done.stdout)
    assert [row["file"] for row in found] == [str(name) for name in mixed]
    assert [("error" in row, "predictions" in row) for row in found] == [
        (False, True), (True, False), (False, True), (True, False), (True, False),
        (True, False),
    ]  # fmt: skip
    assert "cannot identify" in found[1]["error"] and "is no file" in found[4]["error"]
    assert "too long" in found[5]["error"]
    assert "4 of 6 files could not be classified" in done.stderr
    done = here("predict", trained, *whole, "--format", "jsonl")
    assert rows(done.stdout) == [found[0], found[2]]


def test_what_a_folder_has_besides_images_is_told(trained, digits, tmp_path, here):
    (tmp_path / "a.png").write_bytes(sorted(digits[0].iterdir())[0].read_bytes())
    (tmp_path / "b.gif").write_text("moves")
    (tmp_path / "c.png").symlink_to("nowhere.png")
    done = here("predict", trained, tmp_path, "--format", "jsonl")
    assert ["error" in row for row in rows(done.stdout)] == [False, True]
    assert "1 file in" in done.stderr
    assert "is not read as an image: image names end in .bmp" in done.stderr


def test_a_folder_is_looked_through_behind_links(digits, tmp_path):
    (tmp_path / "linked").symlink_to(digits[0])
    (tmp_path / "up").symlink_to(tmp_path)
    found = images_of(tmp_path, lambda _: None)
    assert [p.path for p in found] == sorted((tmp_path / "linked").iterdir())


def test_nothing_but_broken_files_is_a_mistake(trained, here):
    done = here("predict", trained, "nowhere.png", status=2)
    assert "none of the 1 files could be classified" in done.stderr
    assert "nowhere.png is no file" in done.stderr


def test_the_network_is_the_checkpoints_own(trained, here):
    """In another layout it would silently compute something else."""
    done = here("predict", trained, "a.png", "--layout", "fb", status=2)
    assert re.search("no such option.*--layout", done.stderr)


def test_an_export_of_the_weights_sees_what_the_checkpoint_sees(trained, digits, tmp_path, here):
    file, to = sorted(digits[0].iterdir())[0], tmp_path / "net.safetensors"
    here("export", trained, "--format", "safetensors", "-o", to)
    of_both = [here("predict", of, file, "--format", "jsonl").stdout for of in (trained, to)]
    assert of_both[0] == of_both[1] and "predictions" in of_both[0]
    to.write_bytes(save({"net.stem.conv.weight": torch.zeros(16, 3, 3, 3)}))
    said = here("predict", to, file, status=2).stderr
    assert "it holds weights alone" in said and "resnetv2 import" in said


def test_a_folder_without_images_is_a_mistake(trained, tmp_path, here):
    done = here("predict", trained, tmp_path, status=2)
    assert "no images in" in done.stderr and ".png" in done.stderr


def test_a_table_and_csv_say_the_same(trained, digits, here):
    name = sorted(digits[0].iterdir())[0]
    done = here("predict", trained, name, "--format", "csv", "--top", 2)
    [row] = csv.DictReader(io.StringIO(done.stdout))
    assert row["file"] == str(name) and row["error"] == ""
    done = here("predict", trained, name, "--top", 2)
    assert f"{row['class_1']} {100 * float(row['probability_1']):.1f} %" in done.stdout


def test_standard_input_is_an_image_or_names_of_files(tmp_path):
    scratch = tmp_path / "scratch"
    Image.new("RGB", (4, 4)).save(tmp_path / "a.bmp")  # zeros after its header: could be names too
    content = (tmp_path / "a.bmp").read_bytes()
    assert from_stdin(content, scratch) == [Picture("-", scratch)]
    assert scratch.read_bytes() == content
    lines = from_stdin(b"BMW of mine.png\r\nP3.png\n\n\xc3\xa4.jpg", scratch)
    assert [p.name for p in lines] == ["BMW of mine.png", "P3.png", "ä.jpg"]
    zeros = from_stdin(b"one of mine.png\0b\r\n.png\0", scratch)
    assert [p.name for p in zeros] == ["one of mine.png", "b\r\n.png"]


@pytest.mark.parametrize(
    "name", ["5.30\u202fPM.png", "a\u00a0b.png", "👩\u200d🔬.png", "\udce9.png"]
)
def test_names_on_standard_input_may_have_what_is_not_printed(tmp_path, name):
    assert from_stdin(os.fsencode(name) + b"\n", tmp_path / "scratch")[0].name == name


@pytest.mark.parametrize("content", [b"GIF89a\0\1\2;", b"a\x1b[2J.png\n", b"\n"])
def test_what_is_neither_an_image_nor_names_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="neither an image nor names of files"):
        from_stdin(content, tmp_path / "scratch")


def test_names_come_on_standard_input(trained, digits, here, monkeypatch):
    names = [str(p) for p in sorted(digits[0].iterdir())[:3]]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(names).encode())))
    done = here("predict", trained, "-", "--format", "jsonl")
    assert [row["file"] for row in rows(done.stdout)] == names


def test_a_contact_sheet(trained, digits, tmp_path, here):
    (tmp_path / "broken.png").write_text("")
    picture = tmp_path / "sheet.png"
    few = sorted(digits[0].iterdir())[:8]
    here("predict", trained, *few, tmp_path / "broken.png", "--picture", picture)
    with Image.open(picture) as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    assert min(pixels.shape[:2]) > 400
    black, red = (pixels == 0).all(-1), (pixels[..., 0] > 200) & (pixels[..., 1:] < 60).all(-1)
    assert black.mean() > 0.01 and red.any()  # the text under the broken one is red


def test_a_picture_of_no_kind_is_refused_before_anything_is_predicted(trained, digits, here):
    name = sorted(digits[0].iterdir())[0]
    done = here("predict", trained, name, "--picture", "seen.xyz", status=2)
    assert "seen.xyz does not have the suffix of a picture" in done.stderr and not done.stdout


def test_a_link_to_itself_has_a_row_with_its_error(trained, digits, tmp_path, here):
    shutil.copy(sorted(digits[0].iterdir())[0], tmp_path / "mine.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    done = here("predict", trained, tmp_path, "--picture", tmp_path / "seen.svg")
    assert "1 of 2 files could not be classified" in done.stderr


def test_a_picture_that_is_looked_at_is_not_drawn_over(trained, digits, tmp_path, here):
    mine = shutil.copy(sorted(digits[0].iterdir())[0], tmp_path / "mine.png")
    before = mine.read_bytes()
    done = here("predict", trained, tmp_path, "--picture", tmp_path / "." / "mine.png", status=2)
    assert "is one of the pictures" in done.stderr and not done.stdout
    assert mine.read_bytes() == before


def test_what_a_network_gives_that_is_no_number_is_an_error(trained, digits):
    task = network(find(trained))
    with torch.no_grad():
        task.net.head.fc.bias[3] = float("nan")
    name = sorted(digits[0].iterdir())[0]
    [seen] = predict(task, [Picture(str(name), name)], 1)
    assert seen.error == "the network's output is not finite" and not seen.top


def test_results_come_at_once_and_their_names_need_not_be_text(trained, digits, tmp_path):
    name = os.fsencode(tmp_path) + b"/\xe9.png"
    shutil.copy(sorted(digits[0].iterdir())[0], name)
    code = """
import os, sys
from resnetv2_cli.cli import main
from resnetv2_cli import inference
predict = inference.predict
def stops(*given):
    yield from predict(*given)
    os._exit(7)  # nothing is flushed
inference.predict = stops
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, "predict", str(trained), os.fsdecode(name)]
    for form, known in (("csv", "\\udce9.png,,"), ("jsonl", '\\udce9.png", "predictions"')):
        env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
        done = subprocess.run([*command, "--format", form], capture_output=True, text=True, env=env)
        assert done.returncode == 7 and known in done.stdout.splitlines()[-1], done.stderr


def test_small_images_are_looked_at_whole_and_no_protocol_is_taken_for_more(trained):
    file = trained / "checkpoints" / "last.ckpt"
    task = network(file, protocol="224")
    assert view_of(task.experiment, task.normalize) == (32, 1.0, False)
    with pytest.raises(UserError, match="protocol 320 is for larger images than those of digits"):
        network(file, protocol="320")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_photographs_are_looked_at_by_the_protocol_that_is_asked_for(protocol):
    e = Experiment(dataset="folder", depth=18, protocol=protocol)
    assert view_of(e, Normalize(folder.MEAN, folder.STD)) == PROTOCOLS[protocol].view(224)
