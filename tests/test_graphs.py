"""CUDA graphs: used only if a replay agrees with the network; else training runs call by call."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from iterations import Tapes, task

from resnetv2_cli import graphs, joined, run, trust
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.augment import augmented, in_one
from resnetv2_cli.layers import Activation
from resnetv2_cli.optim import sgd
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.runfolder import RunFolder

CPU = torch.device("cpu")
WAITS = """
from resnetv2_cli.shortcuts import Shortcut


class Waits(Shortcut):
    def forward(self, x, residual):
        return self.carry(x) + residual * (1.0 if residual.sum().item() else 0.5)
"""
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_what_is_not_of_this_batch_is_far_from_the_network():
    torch.manual_seed(1)
    net, x = ResNet(8, shortcut="dropout").train(), torch.randn(16, 3, 32, 32)
    assert graphs.distance(net, net, x, "32-true") == 0  # dropout draws the same, too
    assert graphs.distance(net, lambda _: net(x.flip(-1)), x, "32-true") > 4 * graphs.NEAR
    assert graphs.distance(net, net, x, "bf16-mixed") < graphs.NEAR


def test_a_gradient_that_is_not_finite_is_not_near():
    net, x = ResNet(8).train(), torch.randn(4, 3, 32, 32)
    assert not graphs.distance(net, lambda x: net(x) * torch.inf, x, "32-true") < graphs.NEAR


def breaks_off(call, samples, pool):
    call(*samples)
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("recorder, works", [(Tapes, True), (breaks_off, False)])
def test_a_network_is_as_it_was_whether_or_not_it_can_be_recorded(monkeypatch, recorder, works):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorder)
    net = ResNet(8).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    replay, why = graphs.record(net, torch.randn(4, 3, 32, 32), "32-true")
    assert (replay is not None) is works and bool(why) is not works
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    "device, given, word",
    [
        ("cpu", {}, "GPUs"),
        ("cuda", {"micro_batches": 2}, "micro-batches"),
        ("cuda", {"segments": 3}, "--recompute"),
        ("cuda", {"sync_bn": True}, "--sync-bn"),
    ],
)
def test_where_replays_would_be_wrong_there_are_none(device, given, word):
    assert word in graphs.why_not(torch.device(device), **given)
    assert not graphs.why_not(torch.device("cuda"))


def test_by_itself_a_gpu_has_them_and_code_of_ones_own_does_not():
    """Decisions that the user's own shortcut makes in Python are made only once, at capture."""
    assert graphs.wanted(None, "cuda", 1, own=False)
    assert not graphs.wanted(None, "cpu", 1, own=False)
    for processes, own in ((1, True), (2, False)):
        assert not graphs.wanted(None, "cuda", processes, own)
        assert graphs.wanted(True, "cuda", processes, own)
    assert not graphs.wanted(False, "cuda", 1, own=False)
    assert graphs.wanted(True, "cpu", 1, own=False)


@pytest.mark.parametrize(
    "given, processes, says",
    [({"shortcut": "mine:Learned"}, 1, "mine:Learned runs call by call"), ({}, 2, "several GPUs")],
)
def test_a_gpu_that_could_have_them_says_how(monkeypatch, given, processes, says):
    t, told = task(), []
    t.experiment, t.tell = replace(t.experiment, **given), told.append
    monkeypatch.setattr(type(t), "device", torch.device("cuda"))
    t.record(sgd(t.net, t.experiment), processes)
    [line] = told
    assert says in line and "--graphs is faster" in line
    t.experiment, t.tell = replace(t.experiment, graphs=False), pytest.fail
    t.record(sgd(t.net, t.experiment), processes)


def test_a_gpus_kernels_are_tried_before_pytorchs(monkeypatch):
    t, tried = task(), []
    t.experiment = replace(t.experiment, graphs=True)

    def fails(*given):
        activations = [each for each in t.net.modules() if isinstance(each, Activation)]
        tried.append((t.augmented, {each.compiled for each in activations}))
        return "it fails"

    monkeypatch.setattr(type(t), "device", torch.device("cuda"))
    monkeypatch.setattr(graphs, "why_not", lambda device, **parts: "")
    monkeypatch.setattr(joined, "why_not", lambda device: "")
    monkeypatch.setattr(type(t), "noise", lambda *given: None)
    monkeypatch.setattr(type(t), "record_iteration", fails)
    monkeypatch.setattr(type(t), "record_network", lambda *given: "it fails")
    t.record(sgd(t.net, t.experiment))
    assert tried == [(in_one, {True}), (augmented, {False})]


def test_on_a_gpu_replays_alone_have_its_kernels(monkeypatch):
    """Calls outside a replay, as in evaluation, compute as if nothing had been captured."""
    t, recorded_with = task(), []
    t.experiment = replace(t.experiment, graphs=True)
    monkeypatch.setattr(type(t), "device", torch.device("cuda"))
    monkeypatch.setattr(graphs, "why_not", lambda device, **parts: "")
    monkeypatch.setattr(joined, "why_not", lambda device: "")
    monkeypatch.setattr(type(t), "noise", lambda *given: None)
    monkeypatch.setattr(
        type(t), "record_iteration", lambda *given: recorded_with.append(t.augmented) or ""
    )
    t.record(sgd(t.net, t.experiment))
    assert recorded_with == [in_one] and t.augmented is augmented
    activations = [each for each in t.net.modules() if isinstance(each, Activation)]
    assert {each.compiled for each in activations} == {False}


def test_a_training_without_them_says_so(tmp_path):
    told: list[str] = []
    e = Experiment(dataset="digits", depth=8, batch_size=64, steps=2, graphs=True)
    result = run.train(replace(e, accelerator="cpu"), RunFolder(tmp_path / "run"), tell=told.append)
    assert "no CUDA graphs: they are for GPUs" in told
    assert result["test_step"] == 2


def test_nothing_is_said_of_them_where_nobody_asked(tmp_path):
    told: list[str] = []
    e = Experiment(dataset="digits", depth=8, batch_size=64, steps=1, accelerator="cpu")
    run.train(e, RunFolder(tmp_path / "run"), tell=told.append)
    assert not any("graph" in line.lower() for line in told)


@gpu
@pytest.mark.parametrize("shortcut", ["identity", "exclusive-gate", "dropout", "stochastic-depth"])
@pytest.mark.parametrize("kernels, bound", [("eager", 1e-3), ("auto", 0.03)])
def test_a_replayed_training_ends_where_another_does(kernels, bound, shortcut, tmp_path):
    """By default a replay uses kernels that round differently: on a CPU by 1e-2 at most."""
    told: list[str] = []
    e = Experiment(dataset="digits", depth=8, shortcut=shortcut, batch_size=64, steps=30)
    ends = {}
    for name in ("eager", "graphs"):
        one = replace(e, graphs=name == "graphs", kernels=kernels, deterministic=True)
        ends[name] = run.train(one, RunFolder(tmp_path / name), tell=told.append)["test_loss"]
    assert "iterations are replayed, each as one CUDA graph" in told
    assert ends["graphs"] == pytest.approx(ends["eager"], rel=bound)


def test_what_is_replayed_keeps_its_network_alive(monkeypatch):
    """A replay updates BN's moving averages in the network's memory, which must not be freed."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", Tapes)
    net, x = ResNet(8).train(), torch.randn(4, 3, 32, 32)
    alive = weakref.ref(net)
    replay, why = graphs.record(net, x, "32-true")
    del net
    gc.collect()
    assert not why and alive() and replay(x).shape == (4, 10)


class Gpu:
    """Logs what a capture calls in PyTorch. ``ends_itself``: PyTorch ends a failed one itself."""

    def __init__(self, monkeypatch, ends_itself):
        self.asked, self.ends_itself = [], ends_itself
        for name in ("graph_pool_handle", "current_stream", "set_stream", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, lambda *given, n=name: self.note(n, *given))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(graphs, "renew_generator", lambda device: self.note("renew"))
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda *given, n=name: self.note(n), raising=False)

    def note(self, name, *given):
        self.asked.append(name)
        if name == "_cuda_endAllocateToPool" and self.ends_itself:
            raise RuntimeError("not currently recording")
        return name


@pytest.mark.parametrize("ends_itself", [True, False])
def test_a_recording_that_breaks_off_leaves_the_gpu_as_it_was(monkeypatch, ends_itself):
    """Up to 2.12 PyTorch leaves its allocator in the capture, and all later calls fail."""
    gpu = Gpu(monkeypatch, ends_itself)
    with pytest.raises(ValueError), graphs.recording(torch.device("cuda", 0)) as pool:
        assert pool == "graph_pool_handle" and not gc.isenabled()
        raise ValueError
    assert gc.isenabled()
    released = [] if ends_itself else ["_cuda_releasePool"]
    after = ["set_stream", "_cuda_endAllocateToPool", *released, "synchronize", "renew"]
    assert gpu.asked[2:] == after
    with graphs.recording(torch.device("cuda", 0)):
        pass
    assert gc.isenabled() and gpu.asked[2:-2] == after


def test_the_reason_is_what_broke_a_recording_off_not_that_it_broke_off():
    try:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    except RuntimeError as error:
        assert graphs.reason(error) == "operation not permitted when stream is capturing"


@gpu
def test_a_shortcut_that_no_recording_can_have_trains_as_without(tmp_path, monkeypatch):
    (tmp_path / "waits.py").write_text(WAITS)
    monkeypatch.chdir(tmp_path)
    trust.admit(["--shortcut", "waits:Waits"])
    told: list[str] = []
    e = Experiment(dataset="digits", depth=8, shortcut="waits:Waits", batch_size=64, steps=30)
    result = run.train(replace(e, graphs=True), RunFolder(tmp_path / "run"), tell=told.append)
    assert [line for line in told if line.startswith("no CUDA graphs: ")]
    assert result["test_step"] == 30
