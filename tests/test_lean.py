"""Commands start without the packages that torchmetrics would import and nothing uses."""

import subprocess
import sys

import pytest
from conftest import THREADS
from PIL import Image

from resnetv2_cli import lean

AFTER = """
import sys
from resnetv2_cli.cli import main
try:
    main(sys.argv[1:])
except SystemExit as left:
    assert not left.code
import resnetv2_cli.run
names = ("matplotlib", "scipy", "sklearn", "torchvision")
imported = [name for name in names if name in sys.modules]
import torch
from torchmetrics.classification import MulticlassAccuracy
score = MulticlassAccuracy(3)
score.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))
assert round(float(score.compute()), 2) == 0.5
from lightning_utilities.core.imports import RequirementCache, module_available, package_available
for name in names[:2]:
    assert package_available(name) and module_available(name) and RequirementCache(name)
sys.exit(f"imported: {imported}")
"""


def test_a_command_imports_nothing_that_it_does_not_use(trained, tmp_path):
    """Nor does training before its end. Once torchmetrics is imported, all who ask whether a
    package is installed get the true answer."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    words = [sys.executable, "-c", AFTER, "predict", trained, tmp_path / "a.png"]
    done = subprocess.run(words, capture_output=True, text=True, env={**THREADS, "HOME": "/"})
    assert done.stderr.endswith("imported: []\n"), done.stderr


def test_code_of_ones_own_has_all_of_torchmetrics(resnetv2, tmp_path):
    (tmp_path / "boxes.py").write_text(
        "from torchmetrics.detection import IntersectionOverUnion\n"
        "from resnetv2_cli.shortcuts import Shortcut\n\n\nclass Own(Shortcut):\n    pass\n"
    )
    resnetv2("describe", "--depth", 8, "--shortcut", "boxes:Own", cwd=tmp_path)


def test_where_it_asks_otherwise_it_hears_the_truth(monkeypatch):
    from lightning_utilities.core import imports

    monkeypatch.delattr(imports, "_version")
    with lean.uninstalled(["scipy"]):
        assert not hasattr(imports, "_version") and not imports.package_available("scipy")
        assert imports.package_available("numpy")
    assert imports.package_available("scipy")


def test_a_failure_meanwhile_leaves_no_lie():
    from lightning_utilities.core import imports

    with pytest.raises(KeyError), lean.uninstalled(["scipy"]):
        assert not imports.package_available("scipy") and not imports.module_available("scipy")
        raise KeyError
    assert imports.package_available("scipy") and imports.module_available("scipy")


def test_one_that_is_there_already_is_left_alone():
    import torchmetrics  # noqa: F401

    before = list(sys.meta_path)
    lean.start()
    assert sys.meta_path == before
