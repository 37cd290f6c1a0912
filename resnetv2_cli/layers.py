"""The layers every network in the paper is made of: weight, BN and ReLU."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnetv2_cli.fused import AFTER, BEFORE, NOWHERE, bn_relu, bn_sum, fits
from resnetv2_cli.joined import bn_relu_conv, joins


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A weight layer: (N, c_in, H, W) -> (N, c_out, H/stride, W/stride), no bias."""
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)


class Activation(nn.Sequential):
    """BN and ReLU in the order written; in training as one operation, if requested.

    ``compiled``: by the functions of ``kernels.c``, for tensors that fit them. ``forget``: the
    output is not kept for backward but recomputed, whatever the tensor. Modules with hooks run one
    by one.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    compiled = False
    forget = False

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not self.training or not (self.compiled or self.forget) or not plain(norm):
            return super().forward(x)
        compiled = self.compiled and fits(x, norm)
        if watched(*self) or not (compiled or self.forget):
            return super().forward(x)
        return bn_relu(x, norm, "relu" in self._modules, compiled)

    def adds(self, x: Tensor) -> Any:
        """The BN, if it can add another tensor as it writes its output; else None."""
        norm = self.norm
        one = self.training and self.compiled and plain(norm) and fits(x, norm)
        return norm if one and not watched(self, *self) else None

    @property
    def norm(self) -> Any:
        """The BN, if nothing but at most a ReLU follows, so that they can be one operation."""
        names = [*self._modules]
        one = names == ["bn"] or (names == ["bn", "relu"] and type(self.relu) is nn.ReLU)
        return self.bn if one else None

    @property
    def bare(self) -> bool:
        """Whether it is a single ReLU without hooks."""
        alone = [*self._modules] == ["relu"] and type(self.relu) is nn.ReLU
        return alone and not watched(self, *self)


def plain(norm: nn.Module | None) -> bool:
    """Whether this is ordinary BN in training mode: not synchronized over processes, with a
    momentum, a learned scale and running statistics."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.momentum is not None
        and norm.affine
        and norm.track_running_stats
    )


def still(norm: nn.Module | None) -> bool:
    """Whether this is BN with a learned scale that uses its running statistics."""
    return (
        type(norm) is nn.BatchNorm2d
        and not norm.training
        and norm.affine
        and norm.track_running_stats
    )


def watched(*modules: nn.Module) -> bool:
    """Whether any of them has forward or backward hooks."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )


class Joined(NamedTuple):
    """The first layers of a list that form one operation: how many they are, their BN or None,
    whether there is a ReLU, and the convolution."""

    many: int
    norm: Any
    relu: bool
    conv: Any


class Branch(nn.Sequential):
    """Layers in sequence; if ``compiled``, a convolution and the BN and ReLU before it run as one
    operation where they fit (``joins``).

    ``carry(x)``, if given, is added to the output, and ``after`` acts on the sum. A last layer that
    is such an operation or BN adds as it writes; BN without ReLU also applies a ReLU in ``after``.

    Shape: (N, c_in, H, W) -> (N, c_out, H', W').
    """

    compiled = False

    def joined(self, layers: list[Any], x: Tensor) -> Joined | None:
        """The first of the layers that form one operation on x; None if they do not."""
        acts = type(layers[0]) is Activation and len(layers) > 1
        act, conv = layers[:2] if acts else (None, layers[0])
        norm, relu = act.norm if act else None, act is not None and "relu" in act._modules
        evaluates = still(norm) and not torch.is_grad_enabled()
        known = act is None or act.bare or (relu and (plain(norm) or evaluates))
        compiled = self.compiled and (self.training or not torch.is_grad_enabled())
        parts = [act, *act, conv] if act else [conv]
        if compiled and known and joins(x, norm, conv) and not watched(*parts):
            return Joined(2 if acts else 1, norm, relu, conv)
        return None

    def forward(
        self,
        x: Tensor,
        carry: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        y = x
        layers: list[Any] = [m for m in self if type(m) is not Activation or len(m) or watched(m)]
        while layers:
            if joined := self.joined(layers, y):
                del layers[: joined.many]
                plus = None
                if carry is not None and not layers:
                    plus, carry = carry(x), None
                first = y is x
                y, same = bn_relu_conv(y, plus, joined.norm, joined.relu, joined.conv)
                x = same if first else x
                continue
            layer = layers.pop(0)
            acts = type(layer) is Activation
            if acts and not layers and carry is not None and (norm := layer.adds(y)):
                where = BEFORE if "relu" in layer._modules else NOWHERE
                if where == NOWHERE and type(after) is Activation and after.bare:
                    where, after = AFTER, None
                y, carry = bn_sum(y, carry(x), norm, where), None
            else:
                y = layer(y)
        y = y if carry is None else carry(x) + y
        return y if after is None else after(y)


def activation(order: str, channels: int) -> Activation:
    """BN and ReLU in the order written: ``"bn relu"``, ``"relu"``, or ``""``, the identity.

    ReLU works in place only after BN, whose output nothing else uses. Where F opens with ReLU,
    working in place would overwrite what the shortcut carries.
    """
    layers = OrderedDict[str, nn.Module]()
    for name in order.split():
        fresh = "bn" in layers
        layers[name] = nn.ReLU(inplace=fresh) if name == "relu" else nn.BatchNorm2d(channels)
    return Activation(layers)


# Classes whose parts run one after the other in evaluation.
SEQUENCES = (nn.Sequential, Activation, Branch)


def channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel are neighbors in memory: (N, C, H, W)."""
    return x.stride(1) == 1


def differentiates(x: Tensor) -> bool:
    """Whether autograd will differentiate what is now made of x. ``torch.compile`` does so itself,
    in layouts of its own; a function with a ``jvp`` would end its graph."""
    return torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()


class _KeepLayout(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.last = channels_last(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if not ctx.last:
            return grad.contiguous()
        return grad.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:
        return dx.view_as(dx)


def keep_layout(x: Tensor) -> Tensor:
    """x itself; its gradient is converted to the memory layout of x.

    The gradient of pooling is NCHW whatever the layout of x. Along identity shortcuts nothing would
    ever change that, and every unit would add two gradients of different layouts: measured on a
    CPU, 13 % of a training step of ResNet-110.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """
    return _KeepLayout.apply(x) if differentiates(x) else x


class _ZeroPad(torch.autograd.Function):
    """Its gradient has the layout of x, as in ``keep_layout``, and is written once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, stride: int, extra: int) -> Tensor:
        return padded(x, stride, extra)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        x, ctx.stride, ctx.extra = inputs
        ctx.shape, ctx.last = x.shape, channels_last(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        n, c, h, w = ctx.shape
        dx = grad.new_zeros((n, h, w, c) if ctx.last else ctx.shape)
        dx = dx.permute(0, 3, 1, 2) if ctx.last else dx
        dx[:, : grad.shape[1], :: ctx.stride, :: ctx.stride] = grad[:, :c]
        return dx, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        return padded(dx, ctx.stride, ctx.extra)


def padded(x: Tensor, stride: int, extra: int) -> Tensor:
    """x at every ``stride``-th row and column, and ``extra`` channels of zeros."""
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, extra))


class ZeroPad(nn.Module):
    """Option A of [1]: subsample, then append channels of zeros; no parameters.

    Shape: (N, c_in, H, W) -> (N, c_out, H/stride, W/stride).
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        return (_ZeroPad.apply if differentiates(x) else padded)(x, self.stride, self.extra)


def numbered(name: str, modules: Iterable[nn.Module]) -> nn.Sequential:
    """A sequence whose parts are called name1, name2, ..., in printouts and in checkpoints."""
    return nn.Sequential(OrderedDict((f"{name}{i}", m) for i, m in enumerate(modules, start=1)))
