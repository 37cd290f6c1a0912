"""What allows the user's own code to run: the command line, and never the name of a file."""

import pytest

from resnetv2_cli import trust
from resnetv2_cli.errors import UserError


@pytest.mark.parametrize(
    "words, admitted",
    [
        (["train", "--unit", "evil:Own"], True),
        (["train", "--shortcut=evil:Own"], True),
        (["train", "--unit", "evil:Own:ratio=4"], True),
        (["ablate", "--grid", "shortcut=identity,evil:Own:start=0,evil:Own:start=1"], True),
        (["--allow-code", "evil:Own", "eval", "run"], True),
        (["ablate", "--grid", "depth=8", "unit=original,evil:Own"], True),
        (["analyze", "--compare", "depth=8,shortcut=evil:Own"], True),
        (["diff", "a.ckpt", "unit=evil:Own"], True),
        (["ablate", "--grid", "shortcut = identity, evil:Own:start=0"], True),
        (["eval", "evil:Own"], False),
        (["eval", "shortcut=evil:Own.ckpt"], False),
        (["eval", "unit=evil:Own/checkpoints/last.ckpt"], False),
        (["eval", "runs/a,unit=evil:Own-s0"], False),
        (["train", "--weights=unit=evil:Own.safetensors"], False),
        (["train", "--unit", "a/evil:Own"], False),
        (["train", "--unit", "good:Own:kind=evil:Own"], False),
        (["train", "--shortcut", "good:Own:kind=evil:Own=1"], False),
        (["report", "runs", "--output", "evil:Own"], False),
        (["train", "--data-dir=evil:Own"], False),
        (["train", "--weights", "x,evil:Own"], False),
        (["train", "--unit", "original", "evil:Own"], False),
    ],
)
def test_the_name_of_a_folder_admits_no_code(words, admitted):
    trust.admit(words)
    if admitted:
        trust.refuse_strange("evil:Own")
    else:
        with pytest.raises(UserError, match="evil:Own is code that a file asks for"):
            trust.refuse_strange("evil:Own")


def test_nor_does_a_file_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs,shortcut=evil:Own").mkdir()
    trust.admit(["eval", "runs,shortcut=evil:Own"])
    with pytest.raises(UserError, match="evil:Own is code that a file asks for"):
        trust.refuse_strange("evil:Own")
