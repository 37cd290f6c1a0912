"""docs/own-shortcut.md: its code and commands, run from its text at a small size."""

import json
import re
import shlex

import pytest
from conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "own-shortcut.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
[CODE] = [text for kind, text in BLOCKS if kind == "python"]
COMMANDS = [shlex.split(line) for kind, text in BLOCKS if not kind for line in text.splitlines()]
SMALL = ["--dataset", "digits", "--depth", "8", "--batch-size", "128"]
SMALLER = {  # what makes each command small; the last of two equal flags counts
    "train": [*SMALL, "--log-every", "2", "--epochs", "1"],
    "analyze": [*SMALL[:4], "--images", "2"],
    "ablate": [*SMALL, "--steps", "4", "--warmup", "0", "--log-every", "2", "--runs", "1"],
    "report": [],
}


def test_the_walkthrough_works_as_it_is_written(tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / CODE.splitlines()[0].removeprefix("# ")).write_text(CODE)
    assert [words[1] for words in COMMANDS] == ["train", "analyze", "ablate", "report", "ablate"]
    said = []
    for tool, command, *flags in COMMANDS:
        assert tool == "resnetv2"
        more = ["--no-probe"] if "--dry-run" in flags else []
        said.append(here(command, *flags, *SMALLER[command], *more).stdout)
    trained, equations, ablated, _, plan = said
    assert "test error" in trained
    assert "own:RootHalf" in equations and "own:RootHalf" in ablated
    assert [line.split("│")[1].strip() for line in plan.splitlines() if "identity" in line]
    page = (tmp_path / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    [chart, alone] = data["charts"]
    assert [row["name"] for row in chart["names"]] == ["identity", "own:RootHalf"]
    assert [row["name"] for row in alone["names"]] == ["first"]
    assert page.count('class="picture"') == 4  # the topics of an untrained network


def test_the_product_that_the_page_names_is_the_one_of_its_shortcut():
    """A basic ResNet-38 has 18 units."""
    [number] = re.findall(r"([\d.]+) for eighteen times 1/√2", PAGE)
    assert float(number) == pytest.approx(0.5**9, rel=0.05)
