"""What a run trains on: which devices, in which arithmetic, and how its processes are started."""

import pytest
import torch

from resnetv2_cli import machine, run
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError
from resnetv2_cli.manifest import environment
from resnetv2_cli.runfolder import RunFolder


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, "1 x Tesla T4"),
        ({"devices": "2,"}, "1 x NVIDIA H100"),
        ({"devices": "1,2"}, "2 x NVIDIA H100"),
        ({"devices": "auto", "accelerator": "gpu"}, "1 x Tesla T4, 2 x NVIDIA H100"),
        ({"accelerator": "cpu"}, " cores, "),
    ],
)
def test_the_hardware_is_what_the_run_is_on(monkeypatch, settings, said):
    names = ["Tesla T4", "NVIDIA H100", "NVIDIA H100"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: names[d.index])
    found = environment(machine.devices_of(Experiment(**settings)))["hardware"]
    assert said in found and (" x " in found) == (" x " in said)


@pytest.mark.parametrize(
    "strategy", ["fsdp", "deepspeed_stage_3", "ddp_spawn", "ddp_fork_find_unused_parameters_true"]
)
def test_a_strategy_that_cannot_be_used_is_refused_with_the_reason(tmp_path, strategy):
    with pytest.raises(UserError, match=f"--strategy {strategy} cannot be used here: its proc"):
        run.train(Experiment(dataset="digits", strategy=strategy), RunFolder(tmp_path / "run"))
    assert not list(tmp_path.iterdir())  # the run was not begun
    assert machine.trainer_of(Experiment(dataset="digits", accelerator="cpu", strategy="ddp"))


def test_who_asks_for_neither_cpu_nor_gpu_gets_one_answer_to_whether_a_gpu_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    e = Experiment(accelerator="tpu", precision="16-mixed", sync_bn=True)
    assert machine.devices_of(e) == [torch.device("cpu")]
    with pytest.raises(UserError, match="16-mixed needs a GPU"):
        machine.precision(e)
    assert "cores, " in environment(machine.devices_of(e))["hardware"]


@pytest.mark.parametrize(
    "devices, made", [("1", "16-mixed"), ("1,", "bf16-mixed"), ("auto", "16-mixed")]
)
def test_the_arithmetic_is_what_every_gpu_that_is_asked_for_has(monkeypatch, devices, made):
    has = [(7, 5), (8, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: has[d.index])
    assert machine.precision(Experiment(devices=devices)) == made
