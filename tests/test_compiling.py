"""Compiled units: one program per shape, only in training, with the results of eager units."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from resnetv2_cli import compiling, run
from resnetv2_cli.config import Experiment
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.runfolder import RunFolder
from resnetv2_cli.units import ResidualUnit

CPU = torch.device("cpu")


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def test_as_many_graphs_as_shapes_of_unit_whatever_the_depth(fresh, monkeypatch):
    def traced(unit, **options):  # torch.compile's front end, which finds the shapes
        nn.Module.compile(unit, backend="eager", **options)

    monkeypatch.setattr(ResidualUnit, "compile", traced)
    for depth in (14, 44):
        net = ResNet(depth).train()
        compiling.compile_units(net)
        net(torch.randn(2, 3, 32, 32)).sum().backward()
        assert fresh["unique_graphs"] == 6  # in each stage: the first unit, and the others


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler, which PyTorch's needs"
)
def test_a_compiled_training_ends_where_another_does(fresh, tmp_path):
    e = Experiment(dataset="digits", depth=8, batch_size=64, steps=2, warmup=0, precision="32-true")
    told, ends = [], {}
    for name in ("eager", "compiled"):
        one = replace(e, compile=name == "compiled")
        result = run.train(one, RunFolder(tmp_path / name), tell=told.append)
        saved = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        ends[name] = result["test_loss"], saved["state_dict"]
    assert [line for line in told if "compiles the units" in line]
    assert fresh["unique_graphs"] == 1 + 3  # the trial and three units, but no evaluation
    assert ends["compiled"][0] == pytest.approx(ends["eager"][0], rel=1e-3)
    for key, value in ends["eager"][1].items():
        torch.testing.assert_close(ends["compiled"][1][key], value, rtol=0, atol=1e-3)


def test_where_there_is_no_compiler_it_says_so_and_trains(fresh, monkeypatch, tmp_path):
    import torch._inductor.config as settings

    monkeypatch.setattr(settings.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(settings, "fx_graph_cache", False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    told = []
    e = Experiment(dataset="digits", depth=8, batch_size=64, steps=2, compile=True)
    run.train(e, RunFolder(tmp_path / "run"), tell=told.append)
    assert [line for line in told if line.startswith("not compiled: ") and "ompiler" in line]
