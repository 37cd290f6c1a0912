"""Random bytes and random words at every entry point: success or one clear error, no traceback.

Thousands of cases; ``RESNETV2_FUZZ=50 pytest tests/test_fuzz.py`` tries fifty times as many.
"""

import contextlib
import io
import tarfile
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fuzzing import cases, mutated
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli.cli import main
from resnetv2_cli.config import Experiment
from resnetv2_cli.data import picture, shards
from resnetv2_cli.errors import UserError
from resnetv2_cli.recipes import CONFIGS
from resnetv2_cli.resnet import ResNet

DOCUMENTED = (0, 2)  # exit statuses of commands that do not train

SETTINGS = [f.name for f in fields(Experiment)]


def one_line(error: UserError) -> None:
    """Check the line that a command would print: never empty, and short enough to read."""
    assert 0 < len(str(error)) < 2000


# Configs.

CONTENTS = [p.read_bytes() for p in sorted(CONFIGS.glob("*.yaml"))]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from(["1e-4", "auto", "A", "mine:Own", "0.5,0.75", ".inf", "identity", "dropout"]),
)  # fmt: skip
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(SCALARS, SCALARS))


@cases(1000)
@given(content=st.one_of(mutated(CONTENTS), st.binary(max_size=200)))
def test_configs_of_random_bytes(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(content)
    try:
        made = Experiment.load(file)
    except UserError as error:
        one_line(error)
    else:
        assert Experiment(**yaml.safe_load(made.dump())) == made


@cases(1500)
@given(chosen=st.dictionaries(st.sampled_from(SETTINGS), VALUES, max_size=6))
def test_configs_of_random_values(chosen):
    try:
        made = Experiment(**chosen)
    except UserError as error:
        one_line(error)
    else:
        assert Experiment(**yaml.safe_load(made.dump())) == made


# Command lines.

FLAGS = st.sampled_from([f"--{name.replace('_', '-')}" for name in SETTINGS] + ["--config", "-c"])
VALUE = st.one_of(
    st.sampled_from(["8", "-1", "0", "1e9", "nan", "identity", "auto", "", "A", "digits_resnet20"]),
    st.integers().map(str), st.floats().map(str), st.text(max_size=10),
)  # fmt: skip
LINE = st.lists(st.one_of(FLAGS, VALUE, st.tuples(FLAGS, VALUE).map("=".join)), max_size=8)


def left_with(words: list[str]) -> tuple[int, str]:
    """The exit status of ``main``, and its output; any other exception is a bug."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            main(words)
        except SystemExit as left:
            return int(left.code or 0), said.getvalue()
    return 0, said.getvalue()


@cases(400)
@given(words=LINE)
def test_command_lines(words):
    status, said = left_with(["show", *words])
    assert status in DOCUMENTED and "Traceback" not in said


@cases(200)
@given(words=LINE)
def test_command_lines_that_would_train(used_folder, words):
    """The output folder is in use already, so that even a line without mistakes is refused."""
    before = {p: p.read_bytes() for p in used_folder.iterdir()}
    line = [w for w in words if not w.startswith("--help")]
    status, said = left_with(["train", *line, f"--output={used_folder}"])
    assert status == 2 and "Traceback" not in said
    assert {p: p.read_bytes() for p in used_folder.iterdir()} == before


@pytest.fixture(scope="module")
def used_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("used")
    (folder / "precious.txt").write_text("of last year")
    return folder


# Checkpoints: with changed bytes, which a checksum catches; and intact files with other values.


@pytest.fixture(scope="module")
def checkpoint() -> dict:
    net = ResNet(depth=8, classes=10)
    weights = {f"net.{name}": value for name, value in net.state_dict().items()}
    experiment = asdict(Experiment(depth=8, dataset="digits"))
    names = [str(i) for i in range(10)]
    return {"state_dict": weights, "experiment": experiment, "classes": names, "global_step": 1}


def opened(file: Path) -> None:
    """Read a checkpoint and build its experiment, as every command does first."""
    try:
        checkpoints.experiment_of(checkpoints.read(file))
    except UserError as error:
        one_line(error)


@pytest.fixture(scope="module")
def content(checkpoint) -> bytes:
    out = io.BytesIO()
    torch.save(checkpoint | {"state_dict": {"net.w": torch.zeros(4)}}, out)
    return out.getvalue()


@cases(600)
@given(data=st.data())
def test_checkpoints_of_random_bytes(tmp_path_factory, content, data):
    file = tmp_path_factory.getbasetemp() / "fuzzed.ckpt"
    file.write_bytes(data.draw(mutated([content])))
    opened(file)


@cases(300)
@given(
    key=st.sampled_from(["state_dict", "experiment", "classes", "global_step"]),
    value=st.one_of(VALUES, st.dictionaries(st.sampled_from(SETTINGS), VALUES, max_size=4)),
)
def test_checkpoints_of_random_values(tmp_path_factory, checkpoint, key, value):
    file = tmp_path_factory.getbasetemp() / "fuzzed.ckpt"
    few = checkpoint | {"state_dict": {"net.w": torch.zeros(4)}}
    torch.save(few | {key: value}, file)
    opened(file)


# Images.


def encoded(format: str, **how) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(how.pop("mode", "RGB")).save(out, format, **how)
    return out.getvalue()


PICTURES = [
    encoded("PNG"), encoded("PNG", mode="P"), encoded("PNG", mode="LA"), encoded("JPEG"),
    encoded("JPEG", mode="CMYK"), encoded("JPEG", progressive=True), encoded("WEBP"),
    encoded("WEBP", lossless=True), encoded("BMP"),
]  # fmt: skip


@cases(1500)
@given(content=st.one_of(mutated(PICTURES), st.binary(max_size=100)))
@pytest.mark.filterwarnings("ignore")  # from Pillow, about images that it can still read
def test_images(content):
    try:
        found = picture.rgb(content, "it")
    except UserError as error:
        one_line(error)
    else:
        assert found.mode == "RGB"


# Shards and their index.

ROWS = [(f"{row:08}.jpg", row % 2) for row in range(3)]


def shard() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, label in ROWS:
            for called, content in ((name, b"pixels"), (f"{name[:8]}.cls", b"%d" % label)):
                info = tarfile.TarInfo(called)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def index(**changed) -> bytes:
    out = io.BytesIO()
    arrays = {
        "shards": ["train-000000.tar"], "shard": [0, 0], "place": [(512, 6), (2560, 6)],
        "name": ["0.jpg", "1.jpg"], "label": [0, 1], "classes": '["ant", "bee"]',
    }  # fmt: skip
    np.savez(out, **{name: np.array(value) for name, value in (arrays | changed).items()})
    return out.getvalue()


@cases(600)
@given(content=mutated([shard()]))
def test_shards_of_random_bytes(tmp_path_factory, content):
    """All images are found, or the shard is refused."""
    file = tmp_path_factory.getbasetemp() / "fuzzed.tar"
    file.write_bytes(content)
    try:
        found = shards.members(file, ROWS)
    except UserError as error:
        one_line(error)
    else:
        assert [(member.name, label) for member, label in found] == ROWS
        assert all(len(member.read()) == member.size > 0 for member, _ in found)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "train-000000.tar").write_bytes(shard())
    return folder / "train.index.npz"


def indexed(file: Path) -> None:
    """Read an index; every image that it names is there, or it is refused."""
    try:
        found = shards.read_index(file)
    except UserError as error:
        one_line(error)
    else:
        assert all(isinstance(name, str) for name in found)
        assert all(len(m.read()) == m.size > 0 for some in found.values() for m in some)


@cases(600)
@given(content=mutated([index()]))
def test_indexes_of_random_bytes(prepared, content):
    prepared.write_bytes(content)
    indexed(prepared)


NUMBERS = st.one_of(st.integers(-3, 3), st.integers(), st.floats(), st.text(max_size=3))


@cases(600)
@given(
    name=st.sampled_from(["shards", "shard", "place", "name", "label", "classes"]),
    value=st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3), st.lists(st.tuples(NUMBERS, NUMBERS))),
)
def test_indexes_of_random_values(prepared, name, value):
    prepared.write_bytes(index(**{name: value}))
    indexed(prepared)
