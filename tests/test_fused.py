"""BN and ReLU as one compiled operation match PyTorch's, or the reason is given."""

import copy
import ctypes
import subprocess

import pytest
import torch
from compiled import LAST, MODES, distance, needs_gcc, needs_x86, trained_step
from torch import nn
from torch.nn import functional as F

from resnetv2_cli import files, fused, native
from resnetv2_cli.layers import activation
from resnetv2_cli.plans import UNITS
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.shortcuts import SHORTCUTS


def pass_of(act, x, gradient, mode):
    """y, the gradients of x, scale and shift, and the running statistics, all in float64."""
    act, x = copy.deepcopy(act).train(), x.clone(memory_format=torch.preserve_format)
    act.compiled, act.forget = MODES[mode]
    y = act(x.requires_grad_())
    y.backward(gradient.to(y.dtype))
    grads = [x.grad, *(p.grad for p in act.parameters())]
    return [t.detach().double() for t in (y, *grads, *act.buffers())]


@needs_gcc
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("order", ["bn relu", "bn"])
@pytest.mark.parametrize(
    "shape", [(4, 16, 8, 8), (3, 48, 5, 7), (1, 16, 5, 13), (4, 256, 2, 2), (70, 64, 3, 3)]
)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_an_activation_is_float64s(dtype, bound, shape, order, threads):
    """Bounds: deviation relative to the largest value; for bf16 half a unit in the last place."""
    act = activation(order, shape[1])
    nn.init.normal_(act.bn.weight, 1, 0.3)
    nn.init.normal_(act.bn.bias)
    x = (2 * torch.randn(shape) + 5).to(dtype).to(memory_format=LAST)
    gradient = torch.randn(shape).to(dtype).to(memory_format=LAST)
    assert fused.fits(x, act.bn)
    exact = pass_of(copy.deepcopy(act).double(), x.double(), gradient.double(), "eager")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = pass_of(act, x, gradient, "compiled")
        again = pass_of(act, x, gradient, "compiled")
    finally:
        torch.set_num_threads(before)
    for got, same, want in zip(found, again, exact, strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got, want, rtol=0, atol=bound * max(1.0, want.abs().max()))


@needs_gcc
@needs_x86
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("without, lanes, ulp", [("-mno-avx512f", 8, 0), ("-mno-avx", 4, 2**-7)])
def test_narrow_vectors_round_as_wide_ones_do(without, lanes, ulp, dtype, compiled_from):
    """Code compiled without AVX512 gives the same bf16 values; without AVX, and so without fused
    multiply-add, the same or neighboring ones."""
    torch.set_num_threads(3)
    act = activation("bn relu", 48)
    x, gradient = (torch.randn(3, 48, 5, 7).to(dtype).to(memory_format=LAST) for _ in range(2))
    here = pass_of(act, x, gradient, "compiled")
    compiled_from([], [without])
    assert native.lanes() == lanes, native.why_not()
    y, dx, *rest = pass_of(act, x, gradient, "compiled")
    sums = {"rtol": 1e-5, "atol": 1e-5}  # in another order
    rounded = {"rtol": ulp, "atol": 0} if dtype == torch.bfloat16 else sums
    torch.testing.assert_close([y, dx], here[:2], **rounded)
    torch.testing.assert_close(rest, here[2:], **sums)


def sum_of(x, plus, norm, relu, dy):
    """y, the gradients of x, plus, scale and shift, and the running statistics, in float64;
    computed by PyTorch if x is float64."""
    norm, (x, plus) = copy.deepcopy(norm), (t.clone().requires_grad_() for t in (x, plus))
    if x.dtype == torch.float64:
        y = norm(x)
        y = F.relu(y + plus) if relu == fused.AFTER else (F.relu(y) if relu else y) + plus
    else:
        y = fused.bn_sum(x, plus, norm, relu)
    y.backward(dy.to(y.dtype))
    grads = [x.grad, plus.grad, *(p.grad for p in norm.parameters())]
    return [t.detach().double() for t in (y, *grads, *norm.buffers())]


@needs_gcc
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("relu", [0, fused.BEFORE, fused.AFTER])
@pytest.mark.parametrize("shape", [(4, 16, 8, 8), (3, 48, 5, 7)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_a_sum_is_float64s(dtype, bound, shape, relu, threads):
    norm = nn.BatchNorm2d(shape[1])
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias)
    x, plus, dy = (torch.randn(shape).to(dtype).to(memory_format=LAST) for _ in range(3))
    exact = copy.deepcopy(norm).double()
    want = sum_of(x.double(), plus.double(), exact, relu, dy.double())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = sum_of(x, plus, norm, relu, dy)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[2], dy.double() * (found[0] > 0 if relu == fused.AFTER else 1))
    for got, right in zip(found, want, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=bound * max(1.0, right.abs().max()))


@needs_gcc
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_and_shortcut_against_float64(unit, shortcut):
    """float32: logits and gradients within 1e-4 and 1e-2. bf16: no farther from float64 than eager
    bf16 is, with a margin for chance."""
    settings = {"dropout_ratio": 0.0} if shortcut == "dropout" else {}  # its draws vary by dtype
    block = "bottleneck" if shortcut == "conv1x1" else "basic"
    depth = 11 if block == "bottleneck" else 8
    net = ResNet(depth, block, unit, shortcut, settings=settings)
    exact = trained_step(copy.deepcopy(net).double(), "eager")
    single = trained_step(net, "compiled")
    # A value near ReLU's corner may fall on either side, and its gradient, of some 1e-3, with it.
    assert distance(single[0], exact[0]) < 1e-4 and distance(single[1], exact[1]) < 1e-2
    eager, compiled = (trained_step(net, mode, mixed=True) for mode in ("eager", "compiled"))
    for i in (0, 1):
        assert distance(compiled[i], exact[i]) < 1.3 * distance(eager[i], exact[i]) + 1e-3
    counted = [v for k, v in compiled[2].items() if k.endswith("tracked")]
    assert all(int(v) == 1 for v in counted)


@pytest.mark.parametrize("segments", [0, 2])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("mode", ["forget", "plain-forget"])
def test_what_is_made_again_is_what_was(mode, unit, segments):
    net = ResNet(14, unit=unit, shortcut="dropout")
    net.segments = segments
    kept = trained_step(net, "compiled" if mode == "forget" else "eager", mixed=True)
    again = trained_step(net, mode, mixed=True)
    same = mode == "forget" and native.library() is not None
    bound = {"rtol": 0, "atol": 0} if same else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(again[0], kept[0], **bound)
    torch.testing.assert_close(again[1], kept[1], **bound)
    torch.testing.assert_close(again[2], kept[2], rtol=1e-6, atol=1e-6)


def test_without_a_compiler_the_numbers_are_pytorchs(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    net = ResNet(8)
    native._found.cache_clear()
    try:
        assert native.library() is None and native.why_not() == "no gcc"
        found, eager = (trained_step(net, mode, mixed=True) for mode in ("compiled", "eager"))
    finally:
        native._found.cache_clear()
    assert torch.equal(found[0], eager[0]) and torch.equal(found[1], eager[1])


def test_without_a_home_there_is_no_library(homeless):
    native._found.cache_clear()
    try:
        assert native.library() is None and native.why_not().startswith("no home folder")
    finally:
        native._found.cache_clear()


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A small source to compile, and a cache of the test's own; returns the cache's folder."""
    (tmp_path / "tiny.c").write_text("int tiny;")
    monkeypatch.setattr(native, "SOURCES", [tmp_path / "tiny.c"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "resnetv2"


@needs_gcc
@pytest.mark.parametrize("compiler", ["", "gcc", "env gcc"])
def test_it_is_compiled_once_and_kept(compiler, tiny, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    native._loaded()
    [kept] = tiny.iterdir()
    made = kept.stat().st_mtime_ns
    assert native._loaded() and kept.stat().st_mtime_ns == made
    assert [*tiny.iterdir()] == [kept]


@needs_gcc
@pytest.mark.parametrize("word", ["flags", "Features"])
def test_each_kind_of_processor_has_its_own(word, tiny, monkeypatch, tmp_path):
    """Linux lists the features of x86 under ``flags``, and those of ARM under ``Features``."""
    monkeypatch.setattr(native, "CPUS", tmp_path / "cpuinfo")
    for knows in ("fp", "fp sve"):
        native.CPUS.write_text(f"processor\t: 0\nBogoMIPS\t: 50.00\n{word}\t\t: {knows}\n")
        native._loaded()
    assert len([*tiny.iterdir()]) == 2


@needs_gcc
def test_one_that_is_damaged_is_compiled_anew_once(tiny, monkeypatch):
    def damaged(_, file):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(4096))  # as after a power failure before it was on the disk

    with monkeypatch.context() as patch, pytest.raises(OSError, match="invalid ELF header"):
        patch.setattr(native, "_build", damaged)
        native._loaded()
    assert native._loaded() and len([*tiny.iterdir()]) == 1


@needs_gcc
@pytest.mark.parametrize("damage", ["changed", "cut"])
def test_one_that_would_load_though_it_is_damaged_is_compiled_anew(
    damage, tiny, monkeypatch, tmp_path
):
    constant = 123456789
    native.SOURCES[0].write_text(f"int tiny = {constant};")
    native._loaded()
    [kept] = tiny.iterdir()
    was = kept.read_bytes()
    right, wrong = (n.to_bytes(4, "little") for n in (constant, 7))
    damaged = was.replace(right, wrong) if damage == "changed" else was[:-1]
    assert damaged != was
    there = tmp_path / "copied" / "resnetv2" / kept.name  # a path that is not loaded yet
    there.parent.mkdir(parents=True)
    there.write_bytes(damaged)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "copied"))
    assert ctypes.c_int.in_dll(native._loaded(), "tiny").value == constant
    assert files.whole(there) and [*there.parent.iterdir()] == [there]


@needs_gcc
def test_a_build_that_is_interrupted_leaves_nothing(tiny, monkeypatch):
    real = subprocess.run

    def interrupted(command, **how):
        real(command, **how)
        if "-o" in command:
            raise KeyboardInterrupt
        return real(command, **how)

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        native._loaded()
    assert not [*tiny.iterdir()]


@needs_gcc
def test_a_source_that_does_not_compile_is_no_failure(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tmp_path / "kernels.c"
    broken.write_text("int;}")
    monkeypatch.setattr(native, "SOURCES", [broken])
    native._found.cache_clear()
    try:
        assert native.library() is None and "error" in native.why_not()
    finally:
        native._found.cache_clear()


@needs_gcc
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_none(dtype):
    """NaN must come through, so that a run that diverges shows it."""
    act = activation("bn relu", 16)
    act.compiled = True
    x = torch.randn(2, 16, 4, 4).to(dtype).to(memory_format=LAST)
    x[0, 3, 1, 1] = float("nan")
    assert fused.fits(x, act.bn)
    y = act(x)
    assert y[:, 3].isnan().all() and not y[:, :3].isnan().any()


@pytest.mark.parametrize("mode", MODES)
def test_one_value_a_channel_is_refused_as_pytorch_does(mode):
    """The variance of one value is undefined, and would stay in the running statistics."""
    act, x = activation("bn relu", 16), torch.randn(1, 16, 1, 1).to(memory_format=LAST)
    act.compiled, act.forget = MODES[mode]
    with pytest.raises(ValueError, match=r"more than 1 value .*, got input size .*\[1, 16, 1, 1\]"):
        act(x)
    assert act.bn.running_var.isfinite().all()
    if mode == "compiled":
        with pytest.raises(ValueError, match="more than 1 value"):
            fused.bn_sum(x, x, act.bn, fused.BEFORE)


def test_no_image_is_none():
    act = activation("bn relu", 16)
    act.compiled = True
    x = torch.empty(0, 16, 4, 4).to(memory_format=LAST)
    assert act(x).shape == x.shape and not fused.fits(x, act.bn)


def test_who_watches_a_module_sees_it_run():
    act, ran = activation("bn relu", 16), []
    act.compiled = act.forget = True
    act.bn.register_forward_hook(lambda *_: ran.append("bn"))
    act(torch.randn(2, 16, 4, 4).to(memory_format=LAST))
    assert ran == ["bn"]
