"""``analyze``: its arguments, its output, and where the output goes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import worst

from resnetv2_cli import checkpoint, source, trust
from resnetv2_cli.ablation.studies import digest
from resnetv2_cli.analysis import study, subject
from resnetv2_cli.analysis.subject import Batch
from resnetv2_cli.analysis.topics import TOPICS
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.folder import FolderImages, chosen, scan
from resnetv2_cli.data.protocols import PROTOCOLS
from resnetv2_cli.errors import UserError
from resnetv2_cli.source import Source, from_checkpoint
from resnetv2_cli.telling import silent


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_measures_tells_and_draws(topic):
    module = study.module(topic)
    assert all(callable(getattr(module, name)) for name in ("measure", "table", "draw"))


def test_networks_are_called_by_what_tells_them_apart(tmp_path):
    main = Source(Experiment(dataset="digits", depth=20))
    others = [
        source.beside(main, "depth=14,unit=original"),
        source.beside(main, "shortcut=exclusive-gate, gate-bias=-5"),
    ]
    assert others[0].experiment == Experiment(dataset="digits", depth=14, unit="original")
    assert others[1].experiment.gate_bias == -5.0
    assert [s.label for s in source.labelled([main, *others])] == [
        "depth=20, full-preact, identity",
        "depth=14, original, identity",
        "depth=20, full-preact, exclusive-gate, gate_bias=-5.0",
    ]
    narrow = Source(replace(main.experiment, block="basic"))
    assert source.beside(narrow, "depth=164").experiment.block_ == "bottleneck"
    assert source.beside(narrow, "depth=164,block=basic").experiment.block_ == "basic"
    assert source.beside(narrow, "data_dir=2001-01-01").experiment.data_dir == "2001-01-01"
    name = main.experiment.name
    trained = main._replace(checkpoint=tmp_path, step=64000)
    labels = [s.label for s in source.labelled([main] * 3 + [trained] * 2)]
    assert labels == [name, f"{name} (2)", f"{name} (3)", f"{name} @64000", f"{name} @64000 (2)"]
    for text, message in [
        ("layout=tim", "unknown layout 'tim'"),
        ("dept=20", "dept=20: unknown setting 'dept'"),
        ("depth=111", "no network has 111 layers"),
        ("depth=", "depth must be"),
        ("unit=[", "unknown unit '\\['"),
        ("shortcut=[a]", "unknown shortcut '\\[a\\]'"),
        ("seed=2001-99-99", "seed must be a whole number, not '2001-99-99'"),
        ("lr=0b_", "lr must be a number, not '0b_'"),
        (str(tmp_path / "none.ckpt"), "there is no checkpoint"),
    ]:
        with pytest.raises(UserError, match=message):
            source.beside(main, text)


@pytest.mark.parametrize(
    "text, settings",
    [
        ("shortcut=identity", {}),
        ("shortcut=mine:Own", {}),
        ("shortcut=shortcut-only-gate", {"gate_bias": -5.0}),  # which has a gate too
        ("shortcut=shortcut-only-gate,gate_bias=-7", {"gate_bias": -7.0}),
        ("shortcut=constant-scale,residual_scale=0.5", {"residual_scale": 0.5}),
        ("unit=original", {"gate_bias": -5.0}),
    ],
)
def test_another_shortcut_has_the_settings_that_are_its_own(text, settings):
    gated = Source(Experiment(depth=8, shortcut="exclusive-gate", gate_bias=-5.0))
    assert source.beside(gated, text).experiment.settings == settings


def test_images_come_from_all_classes():
    one = subject.subject(
        Source(Experiment(dataset="digits", depth=8)), Batch(10, 20, "float32"), silent
    )
    assert one.labels.tolist() == list(range(10))
    assert one.x.shape == (10, 3, 32, 32) and one.x.dtype == torch.float32
    assert len(one.test_labels) == 20 and set(one.test_labels.tolist()) == set(range(10))
    assert one.net.training


def test_there_may_be_fewer_images_than_training_would_have_in_a_batch():
    wide = Experiment(dataset="digits", depth=8, batch_size=10_000, accumulate=2)
    assert len(subject.subject(Source(wide), Batch(2, 2), silent).labels) == 2


def test_photographs_are_looked_at_in_their_middle(tree):
    """They are taken at equal distances, and of ten crops only the center one is used."""
    ten = {"dataset": "folder", "data_dir": str(tree), "depth": 18, "protocol": "ten-crop"}
    one = subject.subject(Source(Experiment(**ten)), Batch(2, 2, "float32"), silent)
    assert one.x.shape == (2, 3, 224, 224) and one.labels.tolist() == [0, 1]
    split, view = scan(tree, "train"), PROTOCOLS["224"].view(224)
    views = FolderImages(split, 224, "scale", 0, view)
    expected = torch.stack([views[1, -1][0], views[3, -1][0]])
    assert torch.equal(chosen(split, 2, view)[0], expected)


FAST = ["--dataset", "digits", "--depth", 8, "--images", 2]


def test_analyze_at_initialization(here, tmp_path):
    arguments = [*FAST, "--compare", "unit=original", "--compare", "depth=14"]
    done = here("analyze", *arguments, "--json", "--output", tmp_path)
    made = json.loads(done.stdout)
    assert made == json.loads((tmp_path / "analysis.json").read_text())
    topics = {"forward", "backward", "shrink", "paths"}  # the others need a trained network
    assert set(made["topics"]) == topics and made["batch"]["precision"] == "float64"
    labels = ["depth=8, full-preact", "depth=8, original", "depth=14, full-preact"]
    assert [n["label"] for n in made["networks"]] == labels
    for topic in topics:
        assert list(made["topics"][topic]) == labels
        picture = tmp_path / made["pictures"][topic]
        assert picture.read_bytes().startswith(b"\x89PNG")
    off = {name: worst(m["off"]) for name, m in made["topics"]["backward"].items()}
    assert off["depth=14, full-preact"] < 1e-12 and off["depth=8, full-preact"] < 1e-12


def test_an_analysis_names_the_processor_where_there_is_a_gpu(monkeypatch, tmp_path):
    """Analyses are computed on the CPU even then."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "NVIDIA H100")
    plain = Source(Experiment(dataset="digits", depth=8, precision="32-true"))
    made = study.study([plain], ["forward"], subject.Batch(2, 2), tmp_path)
    assert " cores, " in made["environment"]["hardware"]


def test_a_network_in_which_no_unit_keeps_its_shape_has_no_stage_to_follow(here, tmp_path):
    """11 layers: one unit per stage, which changes the shape."""
    arguments = ["--dataset", "digits", "--depth", 11, "--images", 2, "--topic", "shrink"]
    here("analyze", *arguments, "--output", tmp_path)
    [measured] = json.loads((tmp_path / "analysis.json").read_text())["topics"]["shrink"].values()
    assert measured["change"] == [[]] * 4


def test_analyze_of_a_run(here, trained):
    many = ("--images", 2, "--test-images", 360, "--pairs", 2)
    done = here("analyze", trained, *many)
    for word in ("(Eq. 4)", "(Eqs. 5, 8)", "(Sec. 2, Eq. 5)", "(Veit et al. 2016)", "360 images"):
        assert word in done.stdout, word
    assert "2 of 3 pairs, drawn at random" in done.stdout
    folder = trained / "analysis"
    assert f"pictures and numbers: {folder}" in done.stderr
    made = json.loads((folder / "analysis.json").read_text())
    assert set(made["topics"]) == set(TOPICS)
    [found] = made["topics"]["lesion"].values()
    result = json.loads((trained / "result.json").read_text())
    assert found["whole"] == pytest.approx(result["test_error"], abs=1)  # in another precision
    assert len(found["single"]) == 3 and max(found["single"]) > found["whole"]
    here("analyze", trained, *many, "--topic", "forward")  # same network: the other topics stay
    again = json.loads((folder / "analysis.json").read_text())
    assert again["topics"] == made["topics"]
    here("analyze", trained, "--images", 3, "--topic", "forward", "--bn", "kept")  # other settings
    other = json.loads((folder / "analysis.json").read_text())
    assert set(other["topics"]) == {"forward"}


def test_units_are_deleted_of_trained_networks_alone(trained, tmp_path):
    said: list[str] = []
    fresh = Source(Experiment(dataset="digits", depth=8), label="fresh")
    of = [fresh, from_checkpoint(trained)._replace(label="trained")]
    few = Batch(2, 2, "float32", pairs=1)
    made = study.study(of, ["lesion", "shrink"], few, tmp_path, said.append)
    assert {topic: list(found) for topic, found in made["topics"].items()} == {
        "lesion": ["trained"], "shrink": ["fresh", "trained"]
    }  # fmt: skip
    assert [line for line in said if "lesion" in line] == ["no lesion of fresh: it is not trained"]


def test_weights_to_start_from_are_those_that_are_looked_at(here, trained, tmp_path):
    given = [*FAST, "--weights", trained, "--compare", "weights=", "--compare", trained]
    done = here("analyze", *given, "--topic", "forward", "--output", tmp_path)
    assert "tensors are those of" in done.stderr
    found = json.loads((tmp_path / "analysis.json").read_text())["topics"]["forward"]
    begun, fresh, itself = found.values()
    assert begun == itself and begun != fresh
    assert [f"weights={trained}" in label for label in found] == [True, False, False]
    assert "sha256" not in "".join(found)


def test_where_an_analysis_goes(tmp_path):
    e = Experiment(dataset="digits")
    inside = tmp_path / "run" / "checkpoints"
    inside.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(e.dump())
    for of, to in [
        (Source(e), f"runs/analyze-{e.name}-{digest(e)}"),
        (Source(e, inside / "last.ckpt"), tmp_path / "run" / "analysis"),
        (Source(e, inside / "best.ckpt"), tmp_path / "run" / "analysis-best"),
        (Source(e, tmp_path / "mine.ckpt"), tmp_path / "analysis-mine"),
    ]:
        assert str(study.folder_of([of])) == str(to)


def test_networks_of_one_name_are_analyzed_in_two_places():
    scaled = [{"shortcut_scale": 0.25}, {"residual_scale": 0.25}]
    two = [Source(Experiment(depth=8, shortcut="constant-scale", **how)) for how in scaled]
    assert len({source.experiment.name for source in two}) == 1
    assert len({study.folder_of([source]) for source in two}) == 2


def test_each_choice_of_networks_beside_one_goes_to_another_place():
    one, deeper, original = (
        Source(e) for e in (Experiment(), Experiment(depth=20), Experiment(unit="original"))
    )
    choices = [[one], [one, deeper], [one, original], [one, deeper, original]]
    places = [study.folder_of(choice) for choice in choices]
    assert len({*places}) == 4 and len({place.parent for place in places}) == 1
    assert study.folder_of(choices[1]) == places[1]
    trained = [[one, one._replace(checkpoint=Path(name))] for name in ("a.ckpt", "b.ckpt")]
    assert len({study.folder_of(choice) for choice in trained}) == 2


OWN = """
from resnetv2_cli.shortcuts import Shortcut
class Own(Shortcut):
    def forward(self, x, residual):
        return self.carry(x) + residual
"""


def test_topics_of_other_code_do_not_stay(tmp_path, monkeypatch):
    (tmp_path / "rewritten.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    trust.admit(["--shortcut", "rewritten:Own"])
    source = Source(Experiment(dataset="digits", depth=8, shortcut="rewritten:Own"), label="own")
    batch = Batch(2, 2, "float32")
    study.study([source], ["forward"], batch, tmp_path)
    again = study.study([source], ["shrink"], batch, tmp_path)
    assert set(again["topics"]) == {"forward", "shrink"}
    (tmp_path / "rewritten.py").write_text(OWN + "# in other words\n")
    assert set(study.study([source], ["shrink"], batch, tmp_path)["topics"]) == {"shrink"}


def test_topics_of_other_weights_do_not_stay(trained, tmp_path):
    file = tmp_path / "last.ckpt"
    saved = checkpoint.read(trained / "checkpoints" / "last.ckpt")
    found = []
    for topic in ("forward", "shrink"):
        saved["state_dict"]["net.head.fc.weight"] += 1
        checkpoint.write(saved, file)
        source = from_checkpoint(file)
        found.append(study.study([source], [topic], Batch(2, 2, "float32"), tmp_path))
    assert set(found[1]["topics"]) == {"shrink"}


@pytest.mark.parametrize(
    "arguments, error, hint",
    [
        (["--topic", "forwards"], "unknown topic 'forwards'", "did you mean 'forward'?"),
        (["--topic", "lesion"], "--topic lesion needs a trained network", "a run's folder"),
        (["--compare", "unit=preact"], "unknown unit 'preact'", "did you mean 'full-preact'?"),
        (["nothing.ckpt"], "there is no checkpoint nothing.ckpt", "a run folder"),
        (["nothing.ckpt", "--config", "smoke"], "a checkpoint takes no --config", "images itself"),
        (["nothing.ckpt", "--weights", "a.ckpt"], "a checkpoint takes no --weights", "its own"),
    ],
)
def test_mistakes(here, arguments, error, hint):
    done = here("analyze", *([] if "ckpt" in arguments[0] else FAST), *arguments, status=2)
    assert f"error: {error}" in done.stderr and hint in done.stderr


def test_the_flags_that_mean_nothing_here_are_not_offered(resnetv2):
    text = resnetv2("analyze", "--help").stdout
    assert "--shortcut-scale" in text and "--data-dir" in text
    assert "--devices" not in text and "--log-every" not in text
    assert all(name in text for name in TOPICS)


def test_no_network_is_lost_whatever_its_label_is(tmp_path):
    """A label may contain a file name, which may have a number in parentheses too."""
    files = [tmp_path / "w (1).ckpt", tmp_path / "w (1).ckpt", tmp_path / "w.ckpt"]
    for file in files:
        file.write_text("weights")
    named = [Source(Experiment(dataset="digits", depth=20, weights=str(f))) for f in files]
    labels = [s.label for s in source.labelled(named)]
    assert len(set(labels)) == 3


@pytest.mark.parametrize(
    "made",
    [
        {"networks": [{"label": "a"}], "topics": {"forward": {"a": {}}}},
        {"networks": [{"label": "a"}], "topics": []},
        {"networks": [{}], "topics": {}},
    ],
)
def test_an_analysis_that_lacks_what_a_picture_needs_is_one_line(here, tmp_path, made):
    (tmp_path / "analysis.json").write_text(json.dumps(made))
    for command in ("plot", "report"):
        said = here(command, tmp_path, "--output", tmp_path / f"{command}.html", status=2).stderr
        assert "analysis.json is not what an analysis leaves" in said
