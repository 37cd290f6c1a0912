"""An ablation's record for reports: no other ablation overwrites it; the same one continues it."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import REPOSITORY, two_rows

from resnetv2_cli.ablation import planning, record, studies, tables
from resnetv2_cli.errors import UserError
from resnetv2_cli.inventory import look

LONG = "depth=20,32,44,56,110 unit=original,bn-after-add,relu-before-add shortcut={}"


def of_grid(text, root):
    return planning.plan(studies.of_grid(text.split()), 1, {}, root)


@pytest.mark.parametrize(
    "one, other",
    [
        (lambda at: two_rows(at), lambda at: two_rows(at, 1, {"epochs": 1.0})),
        (lambda at: two_rows(at), lambda at: two_rows(at, protocol="val")),
        (lambda at: two_rows(at), lambda at: two_rows(at, 1, {"precision": "32-true"})),
        (lambda at: of_grid("depth=20,32", at), lambda at: of_grid("depth=20,32 lr=0.1", at)),
        (
            lambda at: of_grid(LONG.format("identity"), at),
            lambda at: of_grid(LONG.format("conv1x1"), at),
        ),
    ],
    ids=["flags", "protocol", "what is harmless", "axes", "long names"],
)
def test_no_ablation_takes_the_record_of_another(tmp_path, one, other):
    made = [one(tmp_path), other(tmp_path)]
    for ablation in made:
        record.write(ablation)
    assert {a.study.name for a in look([tmp_path]).ablations} == {a.study.name for a in made}
    assert len({a.study.name for a in made}) == 2


@pytest.mark.parametrize("number", [1, 4], ids=["fails", "spreads"])
def test_a_table_is_read_as_it_was_written(tmp_path, number):
    """Including the paper's numbers for its rows, and seeds that do not start at 0."""
    [study] = studies.studies(tables=[number])
    made = planning.plan(study, 2, {"seed": 3}, tmp_path)
    record.write(made)
    assert tables.as_json(record.read(made.file), 0.5) == tables.as_json(made, 0.5)


def test_rows_alone_have_a_record_of_their_own(tmp_path):
    [table] = studies.studies(tables=[2])
    few = table.only(["ResNet-110 original"])
    assert len({planning.plan(study, 1, {}, tmp_path).file for study in (table, few)}) == 2


def test_fewer_seeds_leave_those_that_have_begun_in_the_record(tmp_path):
    whole = two_rows(tmp_path, 3)
    record.write(whole)
    for arm in whole.lines[0].arms[:2]:
        arm.folder.mkdir(parents=True)
        (arm.folder / "config.yaml").write_text(arm.experiment.dump())
    record.write(two_rows(tmp_path, 1))
    [ablation] = look([tmp_path]).ablations
    assert [[arm.experiment.seed for arm in line.arms] for line in ablation.lines] == [[0, 1], [0]]


def test_a_record_of_an_earlier_version_goes_on(tmp_path):
    """Whose file name had no digest."""
    made = two_rows(tmp_path)
    record.write(made)
    before = made.file.rename(tmp_path / "ablation-shortcut-conv1x1.json")
    said = before.read_text()
    record.write(two_rows(tmp_path, 1, {"epochs": 1.0}))
    assert before.read_text() == said
    again = two_rows(tmp_path, 2)
    assert again.file == before
    record.write(again)
    assert [len(row["arms"]) for row in json.loads(before.read_text())["rows"]] == [2, 2]


def test_settings_of_an_earlier_version_have_the_names_of_today(tmp_path):
    made = of_grid("depth=18 dataset=imagenet protocol=320", tmp_path)
    record.write(made)
    was = made.file.read_text().replace('"protocol": "320"', '"test_size": 320')
    assert "test_size" in was
    made.file.write_text(was)
    assert tables.as_json(record.read(made.file), 0.5) == tables.as_json(made, 0.5)


def test_what_was_kept_of_the_reproduction_goes_on():
    lab = REPOSITORY / "results" / "lab"
    made = of_grid("depth=20 unit=original", lab)
    assert made.file.exists() and made.lines[0].arms[0].error is not None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"rows": [1]}', '{"rows": [{"name": "identity"}]}']
)
def test_a_damaged_record_is_written_anew(tmp_path, text):
    made = two_rows(tmp_path)
    made.file.write_text(text)
    record.write(two_rows(tmp_path))
    assert len(look([tmp_path]).ablations) == 1


def test_a_record_of_rows_without_runs_is_one_clear_error(tmp_path):
    made = two_rows(tmp_path)
    record.write(made)
    said = json.loads(made.file.read_text())
    said["rows"][0]["arms"] = []
    made.file.write_text(json.dumps(said))
    with pytest.raises(UserError, match="is not what an ablation leaves: .*identity has no runs"):
        record.read(made.file)


def test_ablations_of_one_folder_write_their_record_in_turn(tmp_path):
    made = [two_rows(tmp_path, 1, {"seed": seed}) for seed in range(2)]
    for ablation in made:
        for line in ablation.lines:
            line.arms[0].config.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(50):
            list(pool.map(record.write, made))
    assert record.read(made[0].file)
