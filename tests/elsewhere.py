"""Networks as other code bases build and name them, and their logits compared with this tool's.

They are reimplemented for the tests; those of installable libraries come from the libraries.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnetv2_cli.foreign.convert import imported
from resnetv2_cli.resnet import ResNet


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)


class Block(nn.Module):
    """A unit whose layers are conv1, bn1, conv2, ...; pre-activation if ``pre``.

    ``shared``: the shortcut reads the activated input instead of x, if it projects or ``shared`` is
    "always". ``where``: the name of the shortcut; ``names``: those of the projection's layers.
    """

    def __init__(self, c_in, width, deep, stride, pre, shared, where, names):
        super().__init__()
        c_out = width * (4 if deep == 3 else 1)
        sizes = [c_in] + [width] * (deep - 1) + [c_out]
        kernels = (1, 3, 1) if deep == 3 else (3, 3)
        self.pre, self.deep, self.where = pre, deep, where
        for k in range(1, deep + 1):
            strided = stride if kernels[k - 1] == 3 and k <= 2 and (deep == 3 or k == 1) else 1
            self.add_module(f"conv{k}", conv(sizes[k - 1], sizes[k], kernels[k - 1], strided))
            self.add_module(f"bn{k}", nn.BatchNorm2d(sizes[k - 1 if pre else k]))
        self.projected = c_in != c_out
        self.shared = shared and (self.projected or shared == "always")
        layers = [conv(c_in, c_out, 1, stride), *([] if pre else [nn.BatchNorm2d(c_out)])]
        named = zip(names, layers, strict=False) if self.projected else ()
        self.add_module(where, nn.Sequential(OrderedDict(named)))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for k in range(1, self.deep + 1):
            c, bn = getattr(self, f"conv{k}"), getattr(self, f"bn{k}")
            if self.pre:
                y = F.relu(bn(y))
                x = y if k == 1 and self.shared else x
                y = c(y)
            else:
                y = bn(c(y))
                y = F.relu(y) if k < self.deep else y
        y = y + getattr(self, self.where)(x)
        return y if self.pre else F.relu(y)


class Cifar(nn.Module):
    """Three stages of n units, with a code base's names for stem, stages, units and head."""

    def __init__(self, n, deep, pre, names, *, first="always", shared=True, last=True):
        super().__init__()
        self.pre, self.last, self.names = pre, last, names
        self.add_module(names["conv"], conv(3, 16, 3))
        if not pre:
            self.add_module(names["bn"], nn.BatchNorm2d(16))
        c = 16
        for s, width in enumerate((16, 32, 64), 1):
            units = OrderedDict()
            for u in range(1, n + 1):
                stride = 2 if s > 1 and u == 1 else 1
                reads = (first if s == u == 1 else shared) if pre else False
                units[names["unit"].format(u, u - 1)] = Block(
                    c, width, deep, stride, pre, reads, names["shortcut"], names["projection"]
                )
                c = width * (4 if deep == 3 else 1)
            self.add_module(names["stage"].format(s), nn.Sequential(units))
        if pre and last:
            self.add_module(names["last"], nn.BatchNorm2d(c))
        self.add_module(names["fc"], nn.Linear(c, 10))

    def forward(self, x: Tensor) -> Tensor:
        names = self.names
        x = getattr(self, names["conv"])(x)
        x = x if self.pre else F.relu(getattr(self, names["bn"])(x))
        for s in (1, 2, 3):
            x = getattr(self, names["stage"].format(s))(x)
        x = F.relu(getattr(self, names["last"])(x)) if self.pre and self.last else x
        return getattr(self, names["fc"])(x.mean((2, 3)))


HYSTS = {
    "conv": "conv", "bn": "bn", "stage": "stage{}", "unit": "block{}", "shortcut": "shortcut",
    "projection": ("conv", "bn"), "last": "bn", "fc": "fc",
}  # fmt: skip
BEARPAW = {
    "conv": "conv1", "bn": "bn1", "stage": "layer{}", "unit": "{1}", "shortcut": "downsample",
    "projection": ("0", "1"), "last": "bn", "fc": "fc",
}  # fmt: skip
KUANGLIU = BEARPAW | {"shortcut": "shortcut", "fc": "linear"}


class Both(nn.Sequential):
    """Torch7's ConcatTable followed by CAddTable: F(x) + h(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x) + self[1](x)


class Pad(nn.Module):
    """Torch7's strided shortcut, with channels of zeros appended."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, ::2, ::2]
        return torch.cat([x, torch.zeros_like(x)], 1)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def torch7(stem: str, deep: int, stages: tuple[int, ...], pre: bool, option: str) -> nn.Sequential:
    """fb.resnet.torch's resnet.lua, or preresnet.lua since 2016-04-30, container by container."""
    bn, relu, imagenet = nn.BatchNorm2d, nn.ReLU, stem == "imagenet"
    c = 64 if imagenet else 16
    begins = [conv(3, c, 7, 2), bn(c), relu(), nn.MaxPool2d(3, 2, 1)]
    if not imagenet:
        begins = [conv(3, c, 3)] if pre else [conv(3, c, 3), bn(c), relu()]
    top, first = nn.Sequential(*begins), True
    for s, n in enumerate(stages):
        stage, width = nn.Sequential(), (64 if imagenet else 16) * 2**s
        for u in range(n):
            stride, c_out = 2 if s and not u else 1, width * (4 if deep == 3 else 1)
            kernels = (1, 3, 1) if deep == 3 else (3, 3)
            sizes = [c] + [width] * (deep - 1) + [c_out]
            split = pre and not u and not (first and imagenet)
            bare = pre and first and imagenet  # the stem has activated x
            residual: list[nn.Module] = [] if not pre or split or bare else [bn(c), relu()]
            for k, kernel in enumerate(kernels):
                strided = stride if k == (1 if deep == 3 else 0) else 1
                residual.append(conv(sizes[k], sizes[k + 1], kernel, strided))
                if k < deep - 1:
                    residual += [bn(sizes[k + 1]), relu()]
            residual += [] if pre else [bn(c_out)]
            shortcut: nn.Module = nn.Identity()
            if c != c_out and option == "B":
                shortcut = nn.Sequential(conv(c, c_out, 1, stride), *([] if pre else [bn(c_out)]))
            elif c != c_out:
                shortcut = nn.Sequential(nn.Identity(), Pad())
            parts = [*([bn(c), relu()] if split else []), Both(nn.Sequential(*residual), shortcut)]
            stage.append(nn.Sequential(*parts, nn.Identity(), *([] if pre else [relu()])))
            c, first = c_out, False
        top.append(stage)
    for layer in [*([bn(c), relu()] if pre else []), Mean(), nn.Identity()]:
        top.append(layer)
    return top.append(nn.Sequential(nn.Identity(), nn.Linear(c, 10)))


def shaken(net: nn.Module) -> nn.Module:
    """Give every BN random scales, shifts, means and variances, so that no two layers share any."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.8)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.double().eval()


def converted(given: dict, source: str) -> tuple[nn.Module, object]:
    made = imported(given, source)
    e = made.experiment
    net = ResNet(**e.architecture, classes=made.classes).double().eval()
    net.load_state_dict(made.weights)
    return net, e


def parity(net: nn.Module, source: str, size: int = 64) -> tuple[float, float, object]:
    """The largest difference between the two logits, their largest size, and the experiment."""
    ours, experiment = converted(net.state_dict(), source)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        theirs = net(x)
        return (ours(x) - theirs).abs().max().item(), theirs.abs().max().item(), experiment
