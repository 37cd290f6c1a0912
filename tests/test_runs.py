"""``runs``: found, told apart, and removed only where nobody works in them."""

import shutil

from resnetv2_cli import inventory
from resnetv2_cli.runfolder import RunFolder


def test_what_is_trained_longer_is_not_removed(called, lab, tmp_path):
    """It has a result until its first iteration, and its images may take minutes."""
    root = shutil.copytree(lab, tmp_path / "runs")
    [run] = (run for run in inventory.runs_in(root) if run.state == "done")
    with RunFolder(run.place).claimed():
        status, _, said = called("runs", "rm", run.name, "--yes", "--root", root)
    assert status == 2 and "is running" in said and run.place.exists()


def test_a_run_that_is_begun_while_it_asks_is_not_removed(called, lab, tmp_path, monkeypatch):
    root = shutil.copytree(lab, tmp_path / "runs")
    begun = RunFolder(root / "alone").claimed()
    monkeypatch.setattr("resnetv2_cli.commands.runs.confirmed", lambda _: begun.__enter__() or True)
    status, _, said = called("runs", "rm", "alone", "--root", root)
    begun.__exit__(None, None, None)
    assert status == 2 and "alone is running" in said and (root / "alone").exists()


def test_runs_behind_links_are_seen_once_and_removed_with_them(called, lab, tmp_path):
    root = tmp_path / "runs"
    root.mkdir()
    shutil.copytree(lab / "alone", root / "here")
    elsewhere = shutil.copytree(lab / "alone", tmp_path / "disk" / "alone")
    (root / "again").symlink_to("here")
    (root / "linked").symlink_to(elsewhere)
    (root / "round").symlink_to(tmp_path)
    assert [run.name for run in inventory.runs_in(root)] == ["here", "linked"]
    assert len(inventory.look([root]).runs) == 2
    assert called("runs", "rm", "here", "linked", "--yes", "--root", root)[0] == 0
    assert not (root / "linked").is_symlink() and not elsewhere.exists()
