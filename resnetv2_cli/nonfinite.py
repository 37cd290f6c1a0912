"""Losses and gradients that are not finite: found on the device, skipped, and traced to the unit
where they began."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resnetv2_cli.resnet import ResNet

IN_A_ROW = 100  # skipped iterations; after so many in a row nothing more will be learned


class Guard:
    """Checks the gradient of each iteration and has the optimizer skip one that is not finite:
    weights, momentum and BN's moving averages stay as they were. Nothing here waits for the device.

    ``stop``: after the first such iteration all later ones are skipped too, so that the weights are
    still those before it when ``read`` finds it. ``found`` (3,) int64: the number of such
    iterations, the first, and how many of the latest in a row.
    """

    def __init__(self, net: nn.Module, *, stop: bool, scaled: bool) -> None:
        self.net, self.stop = net, stop
        self.scaled = scaled  # float16: its scaler skips overflows, which are normal there
        self.found = torch.tensor([0, -1, 0])
        self.kept: list[tuple[list[Tensor], Tensor]] = []

    def to(self, device: torch.device) -> None:
        self.found = self.found.to(device)

    def begin(self) -> None:
        """Save BN's moving averages, before an iteration."""
        if self.stop:
            return
        self.kept = [(same, flat(same)) for same in buffers_by_dtype(self.net)]

    @torch.no_grad()
    def look(self, step: int | Tensor, optimizer: Optimizer, finite_loss: Tensor) -> None:
        """Check the gradient of iteration ``step``, before the optimizer uses it."""
        learning = (p for group in optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in learning if p.grad is not None]
        bad = ~(finite_loss if self.scaled else finite(gradients))
        count, first, row = self.found
        first = torch.where(bad & (first < 0), step, first)
        self.found.copy_(torch.stack([count + bad, first, (row + 1) * bad]))
        out = first >= 0 if self.stop else bad
        if optimizer.defaults["fused"]:
            prepare(optimizer)
        if self.scaled:
            if self.stop:  # the scaler skips what is not finite
                gradients[0].masked_fill_(out, math.inf)
        elif optimizer.defaults["fused"]:
            optimizer.found_inf = out.float()  # type: ignore[attr-defined]
        for buffers, before in self.kept:
            fill(buffers, torch.where(out, before, flat(buffers)))
        self.kept = []

    def read(self) -> tuple[int, int, int]:
        """How many iterations were not finite, the first, and how many of the latest in a row."""
        count, first, row = self.found.tolist()
        return count, first, row


def finite(tensors: list[Tensor]) -> Tensor:
    """Whether all values of the tensors are finite: a bool on their device, found in one pass.

    By the operation of gradient scalers, with a scale of 1. A norm takes ten times as long on a
    CPU, and on a GPU costs a launch and more of the host's time for each tensor.

    Shape: tensors of any -> ().
    """
    found = tensors[0].new_zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, torch.ones_like(found))
    return found[0] == 0


def buffers_by_dtype(module: nn.Module) -> list[list[Tensor]]:
    """A module's buffers, grouped by dtype."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for buffer in module.buffers():
        kinds.setdefault(buffer.dtype, []).append(buffer)
    return list(kinds.values())


def flat(tensors: list[Tensor]) -> Tensor:
    """All values, concatenated.

    Shape: tensors of any -> (all their numbers,).
    """
    return torch.cat([t.reshape(-1) for t in tensors])


def fill(tensors: list[Tensor], values: Tensor) -> None:
    """Write the values that ``flat`` concatenated back to the tensors.

    Shape: values (all their numbers,).
    """
    parts = values.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])


def prepare(optimizer: Optimizer) -> None:
    """Give SGD the momentum of 0 that its first step starts from: if that step were skipped, the
    fused kernel would leave the momentum uninitialized."""
    groups = [group for group in optimizer.param_groups if group["momentum"]]
    if len(optimizer.state) == sum(len(group["params"]) for group in groups):
        return
    for group in groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def poisoned(loss: Tensor, finite: Tensor) -> Tensor:
    """The loss, with a gradient that is not finite wherever the loss is not, so that every process
    sees it in the gradient they share.

    Shape: loss and ``finite``, a bool, ().
    """
    return loss * torch.where(finite, 1.0, math.nan)


class Parts:
    """Stem, units and head, and which of them gave values that are not finite."""

    def __init__(self, net: ResNet) -> None:
        self.parts: dict[str, Any] = {"stem": net.stem, **net.named_units, "head": net.head}
        self.forward: set[str] = set()
        self.backward: set[str] = set()

    def watch(self, name: str, part: nn.Module, hooks: ExitStack) -> None:
        """Check the output of a part, and the gradient of its input, as they are computed."""

        def before(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            if given[0].requires_grad:
                given[0].register_hook(back)

        def back(gradient: Tensor) -> None:
            if not gradient.isfinite().all():
                self.backward.add(name)

        def after(module: nn.Module, given: Any, out: Tensor) -> None:
            if not out.isfinite().all():
                self.forward.add(name)

        for handle in (part.register_forward_pre_hook(before), part.register_forward_hook(after)):
            hooks.callback(handle.remove)

    def first(self) -> int | None:
        """The index of the first place that is not finite, in the order of ``places``, or None."""
        self.backward |= {
            name
            for name, part in self.parts.items()
            if any(p.grad is not None and not p.grad.isfinite().all() for p in part.parameters())
        }
        names = list(self.parts)
        found = [i for i, name in enumerate(names) if name in self.forward]
        n = len(names)
        found += [2 * n - 1 - i for i, name in enumerate(names) if name in self.backward]
        return min(found, default=None)

    @property
    def places(self) -> list[str]:
        """Every part in the forward pass, then every part in the backward pass."""
        names = list(self.parts)
        return [f"{n}, on the way forward" for n in names] + [
            f"{n}, on the way back" for n in reversed(names)
        ]


def began(
    task: Any, step: int, batches: Iterable[Any], arithmetic: Callable[[], AbstractContextManager]
) -> tuple[int | None, list[str]]:
    """Rerun an iteration and check every unit; return the index of the first place that is not
    finite, or None, and the names of all places. The weights must be those before the iteration."""
    net = task.net
    task.iteration = None  # which frees its memory
    task.replays.clear()  # in a replay no module runs
    parts, net.segments = Parts(net), 0
    net.zero_grad()
    task.train()  # an evaluation may call this
    with ExitStack() as hooks, torch.inference_mode(False), torch.enable_grad():
        for name, part in parts.parts.items():
            part._compiled_call_impl = None  # hooks run in an eager call only
            parts.watch(name, part, hooks)
        for micro, batch in enumerate(batches):
            task.draw(step, micro)
            with arithmetic():
                loss = task.loss(batch)
            loss.backward()
    return parts.first(), parts.places
