"""A whole iteration of training, from pixels to weights, as one CUDA graph: one call launches it.

If only the network is replayed, the host still makes some hundred calls besides: the loss, the
gradients one by one, the check of them, the optimizer. A deep network of narrow layers leaves no
time for that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from resnetv2_cli import graphs
from resnetv2_cli.data.module import Batch
from resnetv2_cli.nonfinite import flat, prepare


class Iteration:
    """An iteration of ``Classification``, on a batch at a fixed place in memory.

    ``inputs``: the batch; ``number``: the iteration's; ``rates``: the learning rate of each group
    of parameters. A replay reads all three.
    """

    def __init__(self, task: Any, optimizer: Optimizer, batch: Batch) -> None:
        self.task, self.optimizer, self.inputs = task, optimizer, batch
        self.number = torch.zeros((), dtype=torch.int64, device=batch.images.device)
        self.rates = [torch.ones_like(self.number, dtype=torch.float32) for _ in self.groups]
        self.loss = torch.zeros_like(self.rates[0])
        self.replay: Callable[[], object] = self.step

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self) -> None:
        """The iteration, launched call by call."""
        task, precision = self.task, self.task.experiment.precision
        task.begin()
        self.optimizer.zero_grad()
        with graphs.arithmetic(self.inputs.images.device, precision):
            loss = task.loss(self.inputs)
        loss.backward()
        self.loss.copy_(loss.detach())
        task.guard.look(self.number, self.optimizer, task.finite)
        with self.fixed_rates():
            self.optimizer.step()
        self.optimizer.zero_grad()

    @contextmanager
    def fixed_rates(self) -> Iterator[None]:
        """Have the optimizer take its learning rates from ``rates``."""
        before = [group["lr"] for group in self.groups]
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, rate in zip(self.groups, before, strict=True):
                group["lr"] = rate

    def record(self) -> str:
        """Capture ``step``, and compare a replay with it on another batch before it is used.
        Weights, momentum, moving averages and sums stay as they are.

        Returns why it cannot be replayed; empty if it can.
        """
        prepare(self.optimizer)
        kept = [(tensor, tensor.clone()) for tensor in self.state()]
        try:
            replay = graphs.recorded(self.step)
            self.inputs.images.random_(0, 256)
            self.inputs.labels.random_(0, len(self.task.classes))
            if self.inputs.views is not None:
                self.inputs.views.copy_(self.inputs.views.flip(0))
            ours, theirs = (self.update(run, kept) for run in (self.step, replay))
        except Exception as error:  # whatever a layer does that a graph cannot
            return graphs.reason(error)
        finally:
            restore(kept)
        far = float((theirs - ours).norm() / ours.norm())
        if not far < graphs.NEAR:
            return f"the update of a replay is {far:.2g} of its norm away from the iteration's"
        self.replay = replay
        return ""

    def state(self) -> list[Tensor]:
        """All tensors that an iteration changes in place."""
        task = self.task
        momentum = [t for s in self.optimizer.state.values() for t in s.values() if t is not None]
        learned = [*task.net.parameters(), *task.net.buffers()]
        return [*learned, *momentum, task.sums, task.finite, task.guard.found]

    @torch.no_grad()
    def update(self, run: Callable[[], object], kept: list[tuple[Tensor, Tensor]]) -> Tensor:
        """What a step with rate 1 and zero momentum subtracts from the weights: gradient and
        weight decay."""
        restore(kept)
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()
        for rate in self.rates:
            rate.fill_(1)
        self.task.draw(0, 0)
        with torch.enable_grad():
            run()
        before = {id(tensor): value for tensor, value in kept}
        learning = [p for group in self.groups for p in group["params"]]
        return flat([before[id(p)] - p for p in learning]).float()

    def fits(self, batch: Batch) -> bool:
        """Whether a batch has the captured shape; the last of an epoch is smaller."""
        return batch.images.shape == self.inputs.images.shape

    def __call__(self, batch: Batch, number: int) -> Tensor:
        """Run iteration ``number`` on a batch that fits; return its mean loss, detached."""
        for place, given in zip(self.inputs[:3], batch[:3], strict=True):
            if place is not None and given is not None:
                place.copy_(given)
        self.number.fill_(number)
        for rate, group in zip(self.rates, self.groups, strict=True):
            rate.fill_(group["lr"])
        self.replay()
        return self.loss


@torch.no_grad()
def restore(kept: list[tuple[Tensor, Tensor]]) -> None:
    """Put back the values of tensors."""
    for tensor, value in kept:
        tensor.copy_(value)
