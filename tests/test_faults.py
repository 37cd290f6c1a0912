"""Faults planted one at a time in a copy of the package: the tests of the network catch each.

Half of them pass every test of layer order and of parameter counts.
"""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY, THREADS

# name: (file, the right code, the fault that replaces it, the tests that must catch it)
PLANTED = {
    "the projection is fed the raw signal": (
        "units.py",
        "        x = self.shared(x)  # the identity in most units",
        "        raw, x = x, self.shared(x)\n"
        "        return self.after(self.shortcut(raw, self.residual(x)))",
        "figures",
    ),
    "the gates of exclusive gating are swapped": (
        "shortcuts.py",
        "return (1 - g) * self.carry(x) + g * residual",
        "return g * self.carry(x) + (1 - g) * residual",
        "shortcuts",
    ),
    "ReLU is in place, and rewrites what the shortcut carries": (
        "layers.py",
        "nn.ReLU(inplace=fresh)",
        "nn.ReLU(inplace=True)",
        "equations",
    ),
    "the last unit has no activation after it": (
        "resnet.py",
        "act = activation(before, c)",
        'act = activation("", c)',
        "figures",
    ),
    "the first unit activates x a second time": (
        "resnet.py",
        'activated = first_act == "stem" and not stages and i == 0',
        "activated = False",
        "figures",
    ),
    "initialization resets the gates": (
        "resnet.py",
        "    for module in net.modules():\n",
        "    for module in net.modules():\n        if getattr(module, 'bias', None) is not None"
        " and isinstance(module, nn.Conv2d):\n            nn.init.zeros_(module.bias)\n",
        "shortcuts",
    ),
    "the new channels come before the old": (
        "layers.py",
        "(0, 0, 0, 0, 0, extra)",
        "(0, 0, 0, 0, extra, 0)",
        "figures",
    ),
    "every unit's projection lacks its BN": (
        "units.py",
        'bn = "bn" if "bn" in last else ""',
        'bn = ""',
        "figures",
    ),
    "subsampling averages": (
        "layers.py",
        "F.pad(x[:, :, ::stride, ::stride],",
        "F.pad(F.avg_pool2d(x, stride),",
        "figures",
    ),
    "the residual is scaled, not the shortcut": (
        "shortcuts.py",
        "self.a * self.carry(x) + self.b * residual",
        "self.b * self.carry(x) + self.a * residual",
        "shortcuts",
    ),
    "the schedule drops one iteration late": (
        "optim.py",
        "step >= round(drop * steps)",
        "step > round(drop * steps)",
        "optim",
    ),
    "a batch weighs as the square of its size": (
        "task.py",
        "        logits = logits.float()\n        finite",
        "        labels = labels.repeat(len(labels))\n"
        "        logits = logits.float().repeat(len(logits), 1)\n        finite",
        "task",
    ),
    "BN counts a recomputed batch twice": (
        "resnet.py",
        "norm.momentum = 0.0",
        "pass",
        "equations",
    ),
    "crops are mirrored before they are cut": (
        "data/augment.py",
        "columns = torch.where(flip.bool(), w - 1 - across, across) + left",
        "columns = torch.where(flip.bool(), w + 2 * PAD - 1 - across - left, across + left)",
        "data",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_caught(name, tmp_path):
    file, right, wrong, catcher = PLANTED[name]
    shutil.copytree(REPOSITORY / "resnetv2_cli", tmp_path / "resnetv2_cli")
    shutil.copytree(REPOSITORY / "tests", tmp_path / "tests")
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    target = tmp_path / "resnetv2_cli" / file
    source = target.read_text()
    assert source.count(right) == 1
    target.write_text(source.replace(right, wrong))
    skip = "not every_combination and not cifar and not run_applied"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", skip]
    done = subprocess.run(
        [*command, f"tests/test_{catcher}.py"],
        cwd=tmp_path,
        env={**os.environ, **THREADS, "RESNETV2_TEST_DATA": "none"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, f"not caught: {done.stdout[-600:]}"
    assert " failed" in done.stdout and "error" not in done.stdout.splitlines()[-1]
