"""How a process reads an environment that makes it one of several, before it meets the others."""

import os

import pytest
from conftest import SMALL
from lightning.pytorch.utilities import rank_zero_only

from resnetv2_cli import run
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError
from resnetv2_cli.machine import trainer_of


@pytest.mark.parametrize(
    "environment",
    [
        {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"},
        {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "1"},
    ],
    ids=["torchrun", "slurm"],
)
def test_processes_started_together_choose_no_folder_each(monkeypatch, here, environment):
    monkeypatch.setattr(run, "train", lambda *_, **__: pytest.fail("it would wait for the other"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = here("train", *SMALL, "--steps", 1, status=2)
    assert "2 processes were started together" in done.stderr


def test_processes_of_another_number_than_is_asked_for_do_not_train(monkeypatch):
    """Each would train alone, all of them into the same folder."""
    torchrun = {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="2 processes were started together, .* ask for 1"):
        trainer_of(Experiment(accelerator="cpu", devices="1"))


@pytest.mark.parametrize(
    "environment, asked",
    [
        ({}, {"nodes": 2}),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "x", "SLURM_PROCID": "0"}, {"devices": "2"}),
        ({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "1", "RANK": "0"}, {"devices": "2"}),
    ],
    ids=["alone", "slurm", "torchrun"],
)
def test_one_process_does_not_wait_for_others_that_nobody_starts(monkeypatch, environment, asked):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="1 process is alone, and .* ask for 2"):
        trainer_of(Experiment(accelerator="cpu", **asked))


def test_a_rank_that_is_of_something_else_makes_no_second_process(monkeypatch, here, tmp_path):
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as Lightning sets it on import
    monkeypatch.setenv("LOCAL_RANK", "1")
    here("train", *SMALL, "--steps", 1, "--output", tmp_path / "run")
    assert (tmp_path / "run" / "result.json").is_file()
    assert "LOCAL_RANK" not in os.environ
