"""Experiments: config files, flags, and the message for every mistake."""

import math
import runpy
from dataclasses import asdict, fields

import pytest
import yaml
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from resnetv2_cli import config, options, plans
from resnetv2_cli.checkpoint import experiment_of
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.catalog import DATASETS, Dataset
from resnetv2_cli.describe import describe
from resnetv2_cli.errors import UserError

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


def test_there_are_configs():
    assert len(CONFIGS) >= 10


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_says_how_to_start_it(path):
    experiment = Experiment.load(path)
    assert describe(experiment)["parameters"] > 0
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ")
    assert second == f"#   resnetv2 train --config {path.stem}"


def test_flags_win_over_files_win_over_defaults(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("depth: 20\nlr: 0.2\n")
    assert Experiment.load(file, lr=0.3) == Experiment(depth=20, lr=0.3)


def test_a_layout_stands_for_its_settings_where_it_is_given(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("layout: timm\nstride_on: first\n")
    assert Experiment.load(file) == Experiment(option="B", first_act="unit")
    assert Experiment.load(layout="fb", stride_on="first") == Experiment(pad="activated")


@pytest.mark.parametrize("name", plans.LAYOUTS)
@pytest.mark.parametrize("before", plans.LAYOUTS)
def test_nothing_is_left_of_the_layout_of_a_file(tmp_path, before, name):
    file = tmp_path / "a.yaml"
    file.write_text(f"layout: {before}\n")
    assert Experiment.load(file, layout=name) == Experiment.load(layout=name)


def test_a_length_by_flag_replaces_the_other_one_of_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("epochs: 3\n")
    assert Experiment.load(file, steps=7).epochs is None
    assert Experiment.load(file).settle(100).steps == 300
    assert Experiment(epochs=0.5).settle(391).steps == 196


def test_what_a_run_folder_keeps_is_the_same_experiment(tmp_path):
    experiment = Experiment(depth=164, gate_bias=-6, shortcut="exclusive-gate", weight_decay=1e-5)
    (tmp_path / "config.yaml").write_text(experiment.dump())
    assert Experiment.load(tmp_path / "config.yaml") == experiment


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("weight_decay: 1e-4\ndevices: 2\ndrops: 0.5\n")
    assert Experiment.load(file).weight_decay == 1e-4
    assert (Experiment.load(file).devices, Experiment.load(file).drops) == ("2", "0.5")


@pytest.mark.parametrize(
    "text, message, hint",
    [
        ("depht: 20", "unknown key 'depht'", "did you mean 'depth'?"),
        ("depth: 21", "no network has 21 layers", "try 20 or 26"),
        ("unit: preact", "unknown unit 'preact'", "did you mean 'full-preact'?"),
        ("shortcut: exclusive", "unknown shortcut 'exclusive'", "did you mean 'exclusive-gate'?"),
        ("dataset: cifar", "unknown dataset 'cifar'", "did you mean 'cifar10'?"),
        ("batch_size: 0", "batch_size must be at least 1, not 0", "Images per iteration"),
        ("layout: tim", "unknown layout 'tim'", "did you mean 'timm'?"),
        ("lr: fast", "lr must be a number, not 'fast'", "Learning rate"),
        ("lr: .nan", "lr must be a number, not nan", "Learning rate"),
        ("lr: .inf", "lr must be finite, not inf", "Learning rate"),
        ("steps: 1.5", "steps must be a whole number, not 1.5", "Training iterations"),
        ("nesterov: 1", "nesterov must be true or false, not 1", "Nesterov"),
        ("nesterov: true\nmomentum: 0", "Nesterov's momentum needs a momentum", "--momentum 0.9"),
        ("gate_bias: 1", "shortcut identity has no setting 'gate_bias'", "its settings: none"),
        ("dropout_ratio: 1.5", "dropout_ratio must be at most 1", "dropout: fraction"),
        ("crop: scale-aspect", "is for larger images than those of cifar10", "say --crop scale"),
        ("protocol: 320\ndataset: digits", "protocol 320 is for larger", "say --protocol 224"),
        ("- depth", "holds no keys", "one 'key: value' per line"),
        ("a: [", "is not YAML", "one 'key: value' per line"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message, hint):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match="a.yaml") as raised:
        Experiment.load(file)
    assert message in str(raised.value)
    assert hint in raised.value.hint


@pytest.mark.parametrize(
    "flags, names_the_file",
    [
        ({}, True),
        ({"seed": 1}, True),  # an unrelated flag
        ({"lr": -1}, False),
        ({"gate_bias": 1, "lr": 0.1}, False),  # wrong only beside the file's shortcut
        ({"layout": "tim"}, False),
    ],
)
def test_a_mistaken_flag_is_no_mistake_of_the_file(tmp_path, flags, names_the_file):
    file = tmp_path / "a.yaml"
    file.write_text("shortcut: conv1x1\n" + ("lr: fast\n" if names_the_file else ""))
    with pytest.raises(UserError) as raised:
        Experiment.load(file, **flags)
    assert ("a.yaml" in str(raised.value)) == names_the_file


@pytest.mark.parametrize("decoded, stem", [(True, "cifar"), (False, "imagenet")])
def test_a_dataset_is_one_row(monkeypatch, decoded, stem):
    monkeypatch.setitem(DATASETS, "svhn", Dataset("house numbers", decoded=decoded))
    of_it = runpy.run_path(options.__file__)["Options"]
    monkeypatch.setattr(options, "Options", of_it)
    anew = runpy.run_path(config.__file__)["Experiment"]
    assert anew(dataset="svhn", depth=50).stem_ == stem


@pytest.mark.parametrize("written, read", [("folder", "digits"), ("digits", "digits")])
def test_what_a_checkpoint_says_of_photographs_is_no_matter_of_small_images(written, read):
    """Its crop and protocol do not carry over: neither from training on photographs, nor from
    training on small images, where they were given and ignored."""
    saved = asdict(Experiment(dataset="folder", depth=8, stem="cifar", crop="scale-aspect"))
    saved |= {"dataset": written, "protocol": "320"}
    found = experiment_of({"experiment": saved}, dataset=read)
    assert (found.crop, found.protocol) == ("scale", "224")
    with pytest.raises(UserError, match="protocol 320"):
        experiment_of({"experiment": saved}, dataset=read, protocol="320")


def test_a_missing_file_names_the_nearest():
    with pytest.raises(UserError, match="unknown config file 'cifar10_resnet20_quik'") as raised:
        Experiment.load("cifar10_resnet20_quik")
    assert raised.value.hint == "did you mean 'cifar10_resnet20_quick'?"


def test_every_option_says_what_it_is():
    for field in fields(Experiment):
        assert field.metadata["doc"].endswith("."), field.name
        panels = {"Network", "Data", "Optimization", "Fine-tuning", "Engine", "Run"}
        assert field.metadata["panel"] in panels


values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())
)


@given(st.dictionaries(st.sampled_from([f.name for f in fields(Experiment)]), values, max_size=4))
def test_any_values_make_an_experiment_or_one_clear_error(given_values):
    try:
        experiment = Experiment(**given_values)
    except UserError as error:
        assert str(error)
    else:
        for name in given_values:
            value = getattr(experiment, name)
            assert not isinstance(value, float) or math.isfinite(value)
        assert Experiment(**yaml.safe_load(experiment.dump())) == experiment


@given(st.text(max_size=60))
def test_any_file_makes_an_experiment_or_one_clear_error(text):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.yaml"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            Experiment.load(file)
        except UserError as error:
            assert "a.yaml" in str(error)
