"""The Triton kernels: by Triton's interpreter, its compiler, and a GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch
from compiled import LAST, distance
from torch import nn
from torch.nn import functional as F

from resnetv2_cli.data.augment import Normalize, augmented, in_one
from resnetv2_cli.joined import bn_relu_conv, joins

triton = pytest.importorskip("triton")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CASES = [  # images, height, width, c, n, kernel, whether something is added, whether there is BN
    (3, 8, 8, 16, 32, 3, True, True),
    (2, 5, 16, 32, 16, 3, False, True),
    (2, 8, 8, 64, 64, 3, True, False),
    (3, 5, 7, 64, 16, 1, True, True),
    (2, 4, 8, 128, 64, 1, False, False),
]

SCALARS = {"N_ROWS": "i32", "numbers": "i32", "momentum": "fp32", "eps": "fp32"} | {
    f"{name}_{axis}": "i32" for name in ("mean", "std") for axis in "chw"
}
INTERPRETED = """
import json, sys, torch
from torch.nn import functional as F
from resnetv2_cli import triton_joined
sys.path.insert(0, sys.argv[1])
from test_triton import CASES, drawn, exact
from compiled import distance
for case in CASES:
    norm, conv, x, plus, dy, dx = drawn(case, "cpu")
    w, bn, found = conv.weight.detach().bfloat16(), case[-1], {}
    saved = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0])[:, None].repeat(1, x.shape[1])
    own = [t.detach() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
    found["y"] = triton_joined.forward(x, plus, w, saved, own, (0.1, 1e-5), again=not bn)
    found["dx"], found["dw"], (found["dgamma"], found["dbeta"]) = triton_joined.backward(
        dy, x, dx, saved, w, not bn
    )
    want = exact(case, norm, conv, x, plus, dy, dx)
    found |= {"mean": own[2], "var": own[3]}
    far = {k: distance(found[k].double(), v) for k, v in want.items()}
    x[0, 1, 2, 3] = float("nan")
    y = triton_joined.forward(x, plus, w, saved, own, (0.1, 1e-5), again=not bn)
    lost = triton_joined.backward(dy, x, dx, saved, w, not bn)[:2]
    nan = [y.isnan(), lost[0][:, 1].isnan(), lost[1][:, 1].isnan()]
    print(json.dumps([far, [bool(t.all() if bn else t.any()) for t in nan]]))
"""


SEEN = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_triton import seen
for ours, theirs in seen("cpu"):
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert ours.stride() == theirs.stride()
"""


def seen(device):
    """Random images in every view, by one kernel and by PyTorch's; normalized by a mean image, and
    by channels."""
    views = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    images = torch.randint(256, (len(views), 32, 32, 3), dtype=torch.uint8)
    for mean, std in (
        (torch.rand(3, 32, 32), torch.ones(1, 1, 1)),
        (torch.rand(3, 1, 1), torch.rand(3, 1, 1) + 0.1),
    ):
        given = Normalize(mean, std).to(device), images.to(device), views.to(device)
        yield in_one(*given), augmented(*given)


def drawn(case, device):
    """BN, convolution, x, what is added to y, the gradient of y, and one that is added to x's."""
    images, h, w, c, n, kernel, added, _ = case
    torch.manual_seed(c + n)
    norm, conv = nn.BatchNorm2d(c), nn.Conv2d(c, n, kernel, padding=kernel // 2, bias=False)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias)
    conv.weight.data = conv.weight.data.bfloat16().float()
    conv.to(memory_format=LAST)

    def bf16(channels):
        tensor = torch.randn(images, channels, h, w).bfloat16()
        return tensor.to(device, memory_format=LAST)

    x = bf16(c).mul_(2).add_(1)
    return norm.to(device), conv.to(device), x, bf16(n) if added else None, bf16(n), bf16(c)


def exact(case, norm, conv, x, plus, dy, dx):
    """y, gradients and running statistics in float64."""
    x, w, gamma, beta = (
        t.detach().double().requires_grad_() for t in (x, conv.weight, norm.weight, norm.bias)
    )
    mean, var = torch.zeros_like(gamma.detach()), torch.ones_like(gamma.detach())
    a = F.batch_norm(x, mean, var, gamma, beta, True) if case[-1] else x
    y = F.conv2d(F.relu(a), w, padding=case[5] // 2)
    y = y if plus is None else y + plus.double()
    torch.autograd.backward([y, x], [dy.double(), dx.double()])
    want = {"y": y.detach(), "dx": x.grad, "dw": w.grad}
    of_bn = {"dgamma": gamma.grad, "dbeta": beta.grad, "mean": mean, "var": var}
    return want | (of_bn if case[-1] else {})


def bounds(name):
    return 1e-5 if name in ("dgamma", "dbeta", "mean", "var") else 2**-7


def test_the_numbers_are_float64s_by_the_interpreter():
    """The interpreter needs no GPU, and truncates to bf16 where a GPU rounds."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRETED, os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for (far, nan), case in zip(found, CASES, strict=True):
        assert len(far) == (7 if case[-1] else 3)
        assert all(value <= bounds(name) for name, value in far.items()), far
        # With BN the channel's mean is NaN, and every output sums over it; without, dx has no NaN.
        assert nan == [True, case[-1], True]


def test_a_batch_is_seen_as_by_pytorch_by_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SEEN, os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1000:]


@gpu
def test_a_batch_is_seen_as_by_pytorch_on_a_gpu():
    for ours, theirs in seen("cuda"):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize(
    "kernel", ["_forward", "_gradient", "_weights", "_statistics", "_augmented"]
)
def test_an_h100_has_a_program_of_it(kernel, monkeypatch, tmp_path):
    """Triton can compile for a GPU that is not there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from resnetv2_cli import triton_augment, triton_joined

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # if unset, 3.9 warns of 3.10's default
    sizes = {"C": 16, "N": 32, "BC": 16, "BN": 32, "H": 8, "W": 8, "TAPS": 9, "BLOCK": 64}
    constant = sizes | {
        "PARTS": 128,
        "ROOM": 128,
        "DOT": triton.language.bfloat16,
        "ADDS": True,
        "PAD": 4,
    }
    pointers = dict.fromkeys(("x", "plus", "y", "w", "dy", "g"), "*bf16")
    function = getattr(triton_augment if kernel == "_augmented" else triton_joined, kernel)
    types = dict.fromkeys(function.arg_names, "*fp32") | pointers | SCALARS
    if kernel == "_augmented":
        types |= {"images": "*u8", "views": "*i64", "x": "*fp32"}
    signature = {n: "constexpr" if n in constant else types[n] for n in function.arg_names}
    constants = {(i,): constant[n] for i, n in enumerate(function.arg_names) if n in constant}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert made.asm["cubin"] and made.metadata.shared < 200_000
    if kernel not in ("_statistics", "_augmented"):
        assert "mma" in made.asm["ptx"]


@gpu
@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_float64s_on_a_gpu(case):
    norm, conv, x, plus, dy, dx = drawn(case, "cuda")
    x.requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        assert joins(x, norm if case[-1] else None, conv)
    y, again = bn_relu_conv(x, plus, norm if case[-1] else None, True, conv)
    torch.autograd.backward([y, again], [dy, dx])
    found = {"y": y.detach(), "dx": x.grad, "dw": conv.weight.grad}
    if case[-1]:
        found |= {"dgamma": norm.weight.grad, "dbeta": norm.bias.grad}
        found |= {"mean": norm.running_mean, "var": norm.running_var}
    for name, value in exact(case, norm, conv, x, plus, dy, dx).items():
        assert distance(found[name].double(), value) <= bounds(name), name
