"""On a full disk every command that writes says so, and leaves nothing half-written behind."""

import shutil

import pytest
import torch
from torchvision.models import resnet18

WRITES = {  # TO: a folder on the disk; RUN: a run; WEIGHTS: another library's weights
    "export": "export RUN --format safetensors --output TO/x.safetensors",
    "export, onnx": "export RUN --format onnx --output TO/x.onnx",
    "export, torch": "export RUN --format torch-export --output TO/x.pt2",
    "import": "import WEIGHTS --from torchvision --output TO/x.ckpt",
    "report": "report RUN --output TO/x.html",
    "plot": "plot RUN --output TO",
    "plot, svg": "plot RUN --format svg --output TO",
    "analyze": "analyze RUN --topic forward --images 2 --output TO",
    "describe": "describe --depth 8 --picture TO/x.svg",
    "ablate": "ablate --shortcut conv1x1 --dataset digits --depth 8 --steps 4 --output TO",
    "train": "train --dataset digits --depth 8 --batch-size 64 --steps 2 --output TO/run",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(resnet18().state_dict(), file)
    return file


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    """A run without the analyses that other tests add to it: a report would draw them elsewhere."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("analysis*"))


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_is_one_line_and_no_half_file(what, alone, weights, tmp_path, full, here):
    kept = tmp_path / "x.html"
    kept.write_text("of last year")
    words = {"RUN": alone, "WEIGHTS": weights}
    line = [str(words.get(w, w)).replace("TO", str(tmp_path)) for w in WRITES[what].split()]
    full(500)
    try:
        said = here(*line, status=2).stderr
    finally:
        full()
    assert "File too large" in said and str(tmp_path) in said
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert kept.read_text() == "of last year"
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p != kept]
    assert [p.name for p in files if p.suffix not in (".lock", ".yaml", ".csv", ".log")] == []


def test_a_picture_of_an_evaluation_that_cannot_be_written_is_a_note(trained, tmp_path, full, here):
    full(500)
    try:
        said = here("eval", trained, "--output", tmp_path).stderr
    finally:
        full()
    assert "no picture: cannot write" in said and "confusion matrix" not in said
    assert not list(tmp_path.iterdir())
