"""The network that comes with the repository: it is what its card and the README say."""

import re

import torch
from conftest import REPOSITORY

from resnetv2_cli.inference import network
from resnetv2_cli.weightfile import sha256

FILE = REPOSITORY / "results" / "weights" / "cifar10-resnet56.safetensors"
CARD = FILE.with_name(FILE.name + ".md").read_text()


def test_it_knows_the_test_images_as_the_readme_says(cifar10):
    """A thousand of them: 69 wrong of its 6.93 %, by 8 from one thousand to another."""
    [said] = re.findall(r"(\d\.\d\d) % of CIFAR-10", (REPOSITORY / "README.md").read_text())
    assert f"Test error {said} % of 10,000 test images" in CARD
    task, test = network(FILE), cifar10.test
    with torch.inference_mode():
        logits = task(torch.from_numpy(test.images[::10]))
    wrong = int((logits.argmax(1) != torch.from_numpy(test.labels[::10])).sum())
    assert len(logits) == 1000 and abs(wrong - 10 * float(said)) < 25
    assert sum(p.numel() for p in task.net.parameters()) == 853_018


def test_its_card_is_of_that_file():
    assert f"{FILE.stat().st_size:,} bytes, SHA-256 `{sha256(FILE)}`" in CARD
