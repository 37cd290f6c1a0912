"""What a command starts without: the packages that torchmetrics would import and nothing uses."""

import subprocess
import sys

import pytest
from conftest import THREADS

from resnetv2_cli import lean

AFTER = """
import sys
from resnetv2_cli import lean
{}
import lightning.pytorch
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
import torch
score = MulticlassAccuracy(3)
score.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))
assert round(float(score.compute()), 2) == 0.5
from lightning_utilities.core.imports import RequirementCache, module_available, package_available
assert all(package_available(name) and module_available(name) for name in lean.UNUSED)
assert all(RequirementCache(name) for name in lean.UNUSED)
assert not [finder for finder in sys.meta_path if isinstance(finder, lean.Lean)]
print([name for name in (*lean.UNUSED, "scipy.signal") if name in {}])
"""


def imported(start: str) -> str:
    before = "set(sys.modules)" if "start" in start else "sys.modules"
    text = AFTER.format(start, "there").replace("score = ", f"there = {before}\nscore = ")
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, env={**THREADS, "HOME": "/"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torchmetrics_starts_without_what_nothing_uses_and_computes_as_ever():
    """Once it is there, everybody is told what is installed again."""
    assert imported("lean.start(); lean.start()") == "[]"
    assert imported("") == str([*lean.UNUSED, "scipy.signal"])


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
