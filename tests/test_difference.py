"""describe and diff: a network compared with the paper, and with another network."""

import json
from dataclasses import asdict

import pytest

from resnetv2_cli import checkpoint, describe, plans, source
from resnetv2_cli.config import Experiment


def test_units_differ_only_where_bn_stands(here):
    """Fig. 4(a) and (e) have the same components: the BN that the units lose, the head gains."""
    done = here("diff", "depth=20,unit=original", "unit=full-preact", "--json")
    made = json.loads(done.stdout)
    assert made["settings"] == {"unit": ["original", "full-preact"]}
    assert made["counts"]["layers"] == [20, 20, 0] and made["counts"]["units"] == [9, 9, 0]
    assert made["counts"]["parameters_without_bn"][2] == made["counts"]["macs"][2] == 0
    assert made["parts"]["head"]["parameters"][2] == 2 * 64
    moved = sum(part["parameters"][2] for part in made["parts"].values())
    assert moved == made["counts"]["parameters"][2] == 0
    [words] = made["words"]
    assert "bn + relu |" in words and "+ | bn relu" in words and words.startswith("unit: original")


def test_depth_and_shortcut_of_a_checkpoint_and_a_config(here, tmp_path):
    file = tmp_path / "mine.ckpt"
    head = {"experiment": asdict(Experiment(depth=8)), "global_step": 5, "classes": ["a", "b"]}
    checkpoint.write(head | {"state_dict": {}}, file)
    done = here("diff", file, "depth=20,shortcut=exclusive-gate", "--json")
    made = json.loads(done.stdout)
    assert made["settings"]["gate_bias"] == [None, -6.0]
    assert "classes" not in made["settings"]  # both have the checkpoint's two
    assert "head" not in made["parts"] and "stage1" in made["parts"]
    assert made["counts"]["layers"] == [8, 20, 12] and made["counts"]["units"] == [3, 9, 6]
    assert made["words"] == [
        "shortcut: identity, x + F(x): identity, the clean information path (Fig. 2a); "
        "instead exclusive-gate, (1 - g(x)) x + g(x) F(x), as in Highway Networks (Fig. 2c)"
    ]
    done = here("diff", "digits_resnet20", "shortcut=identity")
    assert "269,722" in done.stdout and "shortcut:" not in done.stdout


def test_classes_that_are_asked_for_are_not_those_of_the_checkpoint(here, tmp_path):
    file = tmp_path / "mine.ckpt"
    e = Experiment(depth=8, dataset="folder", stem="cifar")
    head = {"experiment": asdict(e), "global_step": 5, "classes": ["a", "b"]}
    checkpoint.write(head | {"state_dict": {}}, file)
    done = here("diff", file, "classes=3", "--json")
    made = json.loads(done.stdout)
    assert made["settings"] == {"classes": [2, 3]} and made["counts"]["parameters"][2] == 65
    made = json.loads(here("diff", file, "dataset=cifar100", "--json").stdout)
    assert made["counts"]["parameters"][2] == 98 * 65


def test_without_its_weights_nothing_of_a_network_is_frozen(tmp_path):
    (tmp_path / "w.ckpt").write_bytes(b"weights")
    e = Experiment(depth=8, weights=str(tmp_path / "w.ckpt"), freeze="stem")
    assert source.beside(source.Source(e), "weights=").experiment.freeze == ""


def test_settings_may_be_longer_than_the_name_of_a_file(here):
    done = here("diff", "depth=20", "data_dir=" + "d" * 300)
    assert "the networks are the same" in done.stdout


def test_a_shortcut_that_says_nothing_has_no_formula(here, tmp_path, monkeypatch):
    text = 'from resnetv2_cli.shortcuts import Shortcut\nclass Own(Shortcut):\n    """ """\n'
    (tmp_path / "silent.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    done = here("diff", "depth=20", "shortcut=silent:Own")
    assert "instead silent:Own, no formula" in done.stdout


def test_what_defaults_stand_for_is_no_difference(here):
    done = here("diff", "depth=38,shortcut=dropout", "dropout_ratio=0.5,block=basic", "--json")
    made = json.loads(done.stdout)
    assert made["settings"] == made["parts"] == {} and made["words"] == []


@pytest.mark.parametrize(
    "a, b, said",
    [
        ("depth=8", "stride_on=3x3", {}),
        ("depth=8,unit=original", "layout=fb,option=A", {}),  # what is padded is activated anyway
        ("depth=11", "stride_on=3x3", {"stride_on": ["first", "3x3"]}),
        ("depth=8,option=B", "depth=11,stride_on=3x3", {"stride_on": ["first", "3x3"]}),
    ],
)
def test_a_setting_that_makes_no_other_layers_is_no_difference(here, a, b, said):
    done = here("diff", a, b, "--json")
    settings = json.loads(done.stdout)["settings"]
    assert {k: v for k, v in settings.items() if k in plans.LAYOUTS["fb"].settings} == said


@pytest.mark.parametrize(
    "text, error, hint",
    [
        ("dept=20", "dept=20: unknown setting 'dept'", "did you mean 'depth'?"),
        ("none.yaml", "unknown config file 'none.yaml'", "known:"),
        ("none.ckpt", "there is no checkpoint none.ckpt", "a run folder"),
    ],
)
def test_mistakes(here, text, error, hint):
    done = here("diff", text, "depth=20", status=2)
    assert f"error: {error}" in done.stderr and hint in done.stderr


def test_describe_says_what_the_paper_found(here):
    done = here("describe", "--depth", 20, "--shortcut", "dropout")
    out = " ".join(done.stdout.split())
    assert (
        "CIFAR-10 with this unit, %: 6.37 (110 layers, basic), 5.46 (164 layers, bottleneck)" in out
    )
    assert "of this network" not in out
    assert "with this shortcut (ResNet-110, original units), %: fail (0.5)" in out
    done = here("describe", "--depth", 50, "--dataset", "imagenet")
    assert "CIFAR-10" not in done.stdout


@pytest.mark.parametrize(
    "config, errors",
    [
        ("table3_cifar10_resnet110_single", "8.91 (Table 3)"),
        (
            "table3_cifar10_resnet1001",
            "4.92 (Tables 3, 4), 4.62 (Table 4, the authors' Torch code)",
        ),
    ],
)
def test_a_network_of_the_paper_is_described_with_its_own_errors(config, errors):
    assert describe.errors(Experiment.load(config))["network"] == errors


@pytest.mark.parametrize("asked, classes", [(["--classes", "5"], 5), ([], 1000)])
def test_images_in_folders_have_as_many_classes_as_were_asked_for(here, asked, classes):
    done = here("describe", "--dataset", "folder", "--depth", 18, "--json", *asked)
    made = json.loads(done.stdout)
    assert made["parts"][-1]["parameters"] == 2 * 512 + 513 * classes  # BN, then fc


def test_settings_of_b_change_what_a_is_and_what_is_the_same_is_said_to_be(here):
    done = here("diff", "depth=20,unit=original", "depth=20")
    assert "b: a with depth=20" in done.stdout and "the networks are the same" in done.stdout
    done = here("diff", "depth=20,unit=original", "unit=full-preact")
    assert "the same" not in done.stdout
