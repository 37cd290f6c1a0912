"""BN, ReLU and a convolution as one operation match the three separate ones in float64."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled import BOUNDS, DTYPES, LAST, bf16, conv3x3, distance, needs_products, needs_x86
from torch import nn
from torch.nn import functional as F

from resnetv2_cli import native
from resnetv2_cli.joined import bn_relu_conv, joins
from resnetv2_cli.layers import conv


def example(c, n, shape, added, kernel=1, dtype=torch.bfloat16, stride=1):
    """A BN, a convolution with weights rounded to ``dtype``, x, the tensor to add or None, and the
    gradients of both outputs."""
    torch.manual_seed(c + n)
    norm, weights = nn.BatchNorm2d(c), conv(c, n, kernel, stride).to(memory_format=LAST)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias)
    weights.weight.data = weights.weight.data.to(dtype).float()
    images, *sides = shape
    fewer = [(side - 1) // stride + 1 for side in sides]
    x, dx = (bf16(images, c, *sides, dtype=dtype) for _ in range(2))
    plus, dy = (bf16(images, n, *fewer, dtype=dtype) for _ in range(2))
    return norm, weights, 2 * x + 3, plus if added else None, dy, dx


def joined(norm, weights, x, plus, dy, dx):
    """y, gradients and running statistics by the operation, as float64."""
    norm, weights = copy.deepcopy((norm, weights))
    x = x.clone().requires_grad_()
    plus = plus if plus is None else plus.clone().requires_grad_()
    own = norm if isinstance(norm, nn.BatchNorm2d) else None
    relu = not isinstance(norm, nn.Identity)
    y, again = bn_relu_conv(x, plus, own, relu, weights)
    torch.autograd.backward([y, again], [dy, dx])
    return told(norm, weights, x, plus, y)


def apart(norm, weights, x, plus, dy, dx):
    """The same by separate operations in float64."""
    norm, weights = copy.deepcopy(norm).double(), copy.deepcopy(weights).double()
    x = x.double().requires_grad_()
    plus = plus if plus is None else plus.double().requires_grad_()
    a = norm(x)
    y = weights(F.relu(a) if isinstance(norm, nn.BatchNorm2d) else a)
    y = y if plus is None else y + plus
    torch.autograd.backward([y, x], [dy.double(), dx.double()])
    return told(norm, weights, x, plus, y)


def told(norm, weights, x, plus, y):
    found = {"y": y, "dx": x.grad, "dw": weights.weight.grad}
    found |= {"dplus": plus.grad} if plus is not None else {}
    if isinstance(norm, nn.BatchNorm2d):
        found |= {"dgamma": norm.weight.grad, "dbeta": norm.bias.grad}
        found |= {"mean": norm.running_mean, "var": norm.running_var}
    return {name: tensor.detach().double() for name, tensor in found.items()}


def check(given):
    got, want = joined(*given), apart(*given)
    bounds = dict.fromkeys(("mean", "var"), 1e-6) | dict.fromkeys(("dgamma", "dbeta"), 1e-5)
    bounds["dplus"] = 0.0
    far = {k: distance(got[k], want[k]) for k in want}
    assert all(far[k] <= bounds.get(k, BOUNDS[given[2].dtype]) for k in far), far


SHAPES = {
    1: [(4, 8, 8), (3, 5, 7), (2, 9, 9), (1, 5, 13), (1, 1, 3)],  # 256, 105, 162, 65 and 3 rows
    3: [(4, 8, 8), (3, 5, 16), (2, 9, 24), (1, 1, 8)],
}
UNEVEN = [(3, 7, 7), (2, 9, 13), (2, 40, 6), (2, 3, 70), (9, 1, 1)]  # not for AMX


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("kernel, shape", [(k, s) for k in SHAPES for s in SHAPES[k]])
@pytest.mark.parametrize("c, n", [(64, 16), (16, 64), (48, 112), (256, 32), (16, 16)])
def test_the_numbers_are_float64s(c, n, kernel, shape, added, threads, dtype):
    given = example(c, n, shape, added, kernel, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(given)
        first, second = joined(*given), joined(*given)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", UNEVEN)
@pytest.mark.parametrize("c, n", [(64, 16), (16, 64), (48, 112), (16, 16)])
def test_images_of_any_size(c, n, shape, added, threads, dtype):
    """Winograd's algorithm computes 4x4 pixels at a time; ImageNet's last images have 7x7."""
    if dtype == torch.bfloat16 and conv3x3("bf16") == "conv3x3":
        pytest.skip("tiles take other sizes only")
    norm, layer, x, *more = example(c, n, shape, added, 3, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert joins(x, norm, layer)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check((norm, layer, x, *more))
    finally:
        torch.set_num_threads(before)


PATCHES = [(1, 2), (3, 2), (3, 3), (3, 5), (7, 2)]  # kernel and stride
OF_PATCHES = [(4, 8, 8), (3, 5, 7), (2, 9, 25), (1, 32, 32), (5, 1, 5)]  # 1 to 256 outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", OF_PATCHES)
@pytest.mark.parametrize("kernel, stride", PATCHES)
@pytest.mark.parametrize("c, n", [(64, 16), (16, 64), (48, 80)])
def test_any_stride_and_odd_size(c, n, kernel, stride, shape, added, threads, dtype):
    norm, layer, x, *more = example(c, n, shape, added, kernel, dtype, stride)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert joins(x, norm, layer) and joins(x, None, layer) == (kernel >= stride)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check((norm, layer, x, *more))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("kernel, stride, shape", [
    *((k, 1, s) for k in SHAPES for s in SHAPES[k]), *((3, 2, s) for s in OF_PATCHES)
])  # fmt: skip
@pytest.mark.parametrize("c, n", [(64, 16), (16, 48), (48, 112)])
@pytest.mark.parametrize("before", [nn.Identity(), nn.ReLU()], ids=["alone", "behind ReLU"])
def test_a_convolution_without_bn(before, c, n, kernel, stride, shape, added, dtype):
    _, *given = example(c, n, shape, added, kernel, dtype, stride)
    given[1].sub_(3)[0, :, 0, 0] = 0  # x: symmetric about 0, with some at ReLU's corner
    check((before, *given))


FAULTS = {  # file, original text, what is planted in its place, and kernel size
    "a ReLU that lets everything through backward": (
        "products.h", "_CMP_NLE_UQ", "_CMP_ORD_Q", 1,
    ),
    "rows of a tail that are lost": (
        "pointwise.c", "memcpy(x_, of.x, sizeof(T) * c * (last - b))",
        "memcpy(x_, of.x, sizeof(T) * c)", 1,
    ),
    "a gradient that is not added": ("products.h", "plus ? v + load(plus + i) : v", "v", 3),
    "a thread whose part of dW is lost": (
        "products.h", "t < omp_get_num_threads(); t++)\n", "t < 2; t++)\n", 3,
    ),
    "weights that are not turned for the gradient": ("winograd.c", "9 + 8 - t)", "9 + t)", 3),
    "a strip with tiles of the one before": (
        "winograd.c", "c, of->rows * s->across, to", "c, s->tiles, to", 3,
    ),
    "a tile with a column of the one before": (
        "winograd.c", "column[SIDE + 1][r]", "column[SIDE][r]", 3,
    ),
    "an image in the place of the one before": (
        "winograd.c", "row / s->height * s->rows", "row / s->height", 3,
    ),
    "a border that is not one of zeros": (
        "winograd.c", "memset(a, 0, sizeof", "memset(a, 63, sizeof", 3,
    ),
    "a patch that overwrites its neighbor's gradient": (
        "patches.c", "of->places[row + r]) += ", "of->places[row + r]) = ", 3,
    ),
    "a patch of other pixels": ("patches.c", "from += s->pitch", "from += s->width", 3),
    "a gradient in another row's place": (
        "patches.c", "place(s, tap / s->kernel, tap % s->kernel)", "place(s, 0, tap)", 3,
    ),
    "a border of patches that is not one of zeros": (
        "patches.c", "memset(image, 0, sizeof", "memset(image, 63, sizeof", 3,
    ),
    "outputs of the block before": (
        "patches.c", "memset(dy_, 0, sizeof(T) * n * of->rows)", "(void)0", 3,
    ),
}  # fmt: skip
FAULTS_OF_TILES = {  # the same, of 3x3 convolutions with AMX
    "taps that are not turned for the gradient": ("products.h", "taps - 1 - t", "t"),
    "taps of dW that are mirrored": ("conv3x3.c", "s->pitch + tap - 1", "s->pitch + 1 - tap"),
    "pairs of an odd pixel and the one before": (
        "conv3x3.c", "(even + i + 2 * c) << 16", "(even + i) << 16",
    ),
    "a border that is not one of zeros": (
        "conv3x3.c", "memset(a, 0, sizeof", "memset(a, 63, sizeof",
    ),
}  # fmt: skip
SEEN = r"\{'(y|dbeta)': "  # what ``check`` says


@needs_products
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault, dtype, compiled_from):
    """The comparisons above do not pass by chance: a fault planted in the kernels fails them."""
    *edit, kernel = FAULTS[fault]
    if edit[0] == "winograd.c" and dtype == torch.bfloat16 and conv3x3("bf16") == "conv3x3":
        pytest.skip("here tiles multiply bf16")
    compiled_from([edit], [])
    shape, stride = (3, 9, 9) if kernel == 1 else (4, 9, 8), 2 if edit[0] == "patches.c" else 1
    with pytest.raises(AssertionError, match=SEEN):
        check(example(64, 16, shape, True, kernel, dtype, stride))


@needs_products
@pytest.mark.parametrize("fault", FAULTS_OF_TILES)
def test_a_fault_of_tiles_is_seen(fault, compiled_from):
    with_tiles(compiled_from, FAULTS_OF_TILES[fault])
    with pytest.raises(AssertionError, match=SEEN):
        check(example(64, 16, (4, 9, 8), True, 3))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("point", [
    ("Q1 1.5f", "Q1 2.0f"), ("Q1 1.5f", "Q1 1.25f"),
    ("P1 0.625f", "P1 1.0f"), ("P1 0.625f", "P1 0.5f"),
])  # fmt: skip
def test_other_points_of_winograds_algorithm_are_worse(point, dtype, compiled_from):
    given = example(64, 64, (8, 8, 8), False, 3, dtype)
    want, ours = apart(*given), joined(*given)
    compiled_from([("winograd.c", *point)], [])
    others = joined(*given)
    for name in ("y", "dx"):
        assert distance(ours[name], want[name]) < 0.95 * distance(others[name], want[name])


@needs_x86
def test_short_vectors_give_the_same(compiled_from):
    """Tests the code for processors without AVX-512 also on those that have it."""
    compiled_from([], ["-mno-avx512f"])
    assert native.lanes() == 8 and not native.multiplies()
    if not native.multiplies(torch.float32):
        pytest.skip("no AVX2")
    kernels = [(k, 1, s) for k in SHAPES for s in SHAPES[k]] + [(3, 1, s) for s in UNEVEN]
    for kernel, stride, shape in kernels + [(*k, s) for k in PATCHES for s in OF_PATCHES]:
        for c, n in ((64, 16), (16, 64), (48, 112)):
            for added in (False, True):
                check(example(c, n, shape, added, kernel, torch.float32, stride))
    norm, layer, x, *_ = example(256, 256, (2, 4, 8), False, dtype=torch.float32)
    assert joins(x, norm, layer)  # with more weights PyTorch's convolution is as fast
    assert not joins(x, norm, conv(256, 272, 1).to(memory_format=LAST))
    assert not joins(x, norm, conv(256, 32, 3, 2).to(memory_format=LAST))


def with_tiles(compiled_from, *edits):
    """Compile the AMX code, its instructions emulated by vectors."""
    emulated = [
        ("amx.h", '__asm__ volatile("ldtilecfg %0" : : "m"(tiles))', "load_config(&tiles)"),
        ("pointwise.c", "return !syscall(SYS_arch_prctl, REQUEST, TILES)", "return 1"),
    ]
    header = str(Path(__file__).with_name("tiles.h"))
    compiled_from([*emulated, *edits], ["-include", header])
    assert native.has("conv3x3_forward_bf16"), native.why_not()


@needs_products
def test_tiles_give_the_same(compiled_from):
    """Tests the AMX code on processors without AMX too."""
    with_tiles(compiled_from)
    assert native.multiplies(), native.why_not()
    kernels = [(k, 1, s) for k in SHAPES for s in SHAPES[k]]
    for kernel, stride, shape in kernels + [(*k, s) for k in PATCHES for s in OF_PATCHES]:
        for c, n in ((64, 16), (16, 64), (48, 112)):
            for added in (False, True):
                check(example(c, n, shape, added, kernel, stride=stride))
    norm, layer, x, *_ = example(32, 32, (4, 8, 8), False, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert joins(x, norm, layer)
        for sides in ((8, 4), (64, 64)):  # a width that is not one of tiles; a larger image
            assert not joins(bf16(4, 32, *sides), norm, layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("before", [nn.Identity(), nn.ReLU()], ids=["alone", "behind ReLU"])
@pytest.mark.parametrize("x_has", [float("nan"), float("inf"), -float("inf")])
def test_gradients_pass_what_is_not_finite_as_pytorchs_do(x_has, before, kernel, dtype):
    """Without BN, dx depends on no more of x than its sign."""
    _, weights, x, plus, dy, dx = example(16, 16, (2, 4, 8), True, kernel, dtype)
    x[0, 3, 1, 1] = x_has
    got, want = (f(before, weights, x, plus, dy, dx)["dx"] for f in (joined, apart))
    assert want.isfinite().all() and distance(got, want) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c, n", [(256, 1024), (1024, 256)])
def test_the_largest_that_are_joined(c, n, dtype):
    norm, weights, x, *more = example(c, n, (2, 7, 7), True, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert joins(x, norm, weights) and not joins(
            x, norm, conv(c, n + 16, 1).to(memory_format=LAST)
        )
    check((norm, weights, x, *more))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_3x3_that_are_joined(dtype):
    most, more = {16: (160, 176), 8: (336, 352)}[native.lanes()]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for c, fits in ((most, True), (more, False)):
            norm, weights, x, *_ = example(c, c, (2, 8, 8), False, 3, dtype)
            assert joins(x, norm, weights) == fits


@needs_products
def test_threads_need_no_large_stacks():
    """Some systems give threads stacks of 128 KB."""
    code = (
        "import torch; from resnetv2_cli.joined import bn_relu_conv; from torch import nn\n"
        "torch.set_num_threads(3)\n"
        "last = dict(memory_format=torch.channels_last)\n"
        "for k, c, n in ((3, 64, 64), (1, 16, 8192)):\n"
        "    conv = nn.Conv2d(c, n, k, padding=k // 2, bias=False).to(**last)\n"
        "    x = torch.randn(4, c, 32, 32).bfloat16().to(**last).requires_grad_()\n"
        "    with torch.autocast('cpu', torch.bfloat16):\n"
        "        y, _ = bn_relu_conv(x, None, nn.BatchNorm2d(c), True, conv)\n"
        "    y.backward(y.detach())\n"
        "print(y.isfinite().all().item(), x.grad.isfinite().all().item())"
    )
    small = os.environ | {"OMP_STACKSIZE": "128k"}
    done = subprocess.run([sys.executable, "-c", code], env=small, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_none(dtype):
    norm, weights, x, *_ = example(16, 16, (2, 4, 4), False, dtype=dtype)
    x[0, 3, 1, 1] = float("nan")
    y, _ = bn_relu_conv(x, None, norm, True, weights)
    assert y.isnan().all()  # the channel's mean is NaN, and every output sums over the channel


def test_one_value_a_channel_is_refused_as_pytorch_does():
    norm, weights, x, *_ = example(16, 16, (1, 1, 1), False)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        bn_relu_conv(x, None, norm, True, weights)
    assert norm.running_var.isfinite().all()


def test_only_what_learns_has_a_gradient():
    norm, weights, x, plus, dy, _ = example(32, 16, (2, 4, 4), True)
    weights.weight.requires_grad_(False)
    y, _ = bn_relu_conv(x, plus, norm, True, weights)
    y.backward(dy)
    assert weights.weight.grad is None and x.grad is None and norm.weight.grad is not None
