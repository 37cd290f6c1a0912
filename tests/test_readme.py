"""The README agrees with the tool: every name, every published number, every command."""

import re
import shlex

import pytest
from conftest import REPOSITORY

from resnetv2_cli import paper, plans
from resnetv2_cli.config import Experiment

README = (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("unit", plans.UNITS)
def test_every_unit_stands_there_as_the_tool_has_it(unit):
    cut = plans.UNITS[unit].replace("|", r"\|")
    errors = [f"{row.published:.2f}" for row in paper.TABLE_2.of(unit=unit)]
    [line] = [ln for ln in README.splitlines() if ln.startswith(f"| `{unit}` |")]
    assert f"`{cut}`" in line and line.endswith(f"| {errors[0]} | {errors[1]} |")


@pytest.mark.parametrize("shortcut", plans.shortcuts())
def test_every_shortcut_stands_there_with_its_formula_settings_and_errors(shortcut):
    [line] = [ln for ln in README.splitlines() if ln.startswith(f"| `{shortcut}` |")]
    for setting in plans.shortcuts()[shortcut].settings:
        assert f"`--{setting.replace('_', '-')}`" in line or setting == "dropout_inverted"
    for row in paper.TABLE_1.of(shortcut=shortcut):
        assert paper.percent(row.published) in line


COMMANDS = sorted(set(re.findall(r"^resnetv2 [^#\n]+", README, re.MULTILINE)))


def test_there_are_commands():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_a_command_exists(command, resnetv2):
    words = shlex.split(command)
    known = resnetv2(words[1], "--help").stdout
    for flag in (word for word in words if word.startswith("--")):
        assert flag in known, flag


def test_the_defaults_it_names_are_the_defaults():
    e, said = Experiment(), " ".join(README.split())
    [decay] = re.findall(r"weight decay (\S+),", said)
    assert float(decay) == e.weight_decay
    drops = " and ".join(f"{share * e.steps / 1000:.0f}k" for share in e.drops_)
    for text in (
        f"momentum {e.momentum}", f"batch {e.batch_size}", f"learning rate {e.lr} ",
        f"first {e.warmup_} iterations", f"at {drops} of {e.steps // 1000}k iterations",
        f"--drops {e.drops}",
    ):  # fmt: skip
        assert text in said, text
