"""BN under several processes: statistics of all their batches on devices that PyTorch's
SyncBatchNorm does not know, and which process's moving averages are kept."""

from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from resnetv2_cli.nonfinite import buffers_by_dtype, fill, flat


class SyncBN(nn.BatchNorm2d):
    """BN whose statistics in training are of every process's part of the batch together.

    Sums in float64 travel, and their gradients back, so that parts of different sizes weigh as many
    images as they have. Alone, or in evaluation, it is BN.

    Shape: (N, C, H, W) -> (N, C, H, W), where N may differ from process to process.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and distributed.is_initialized()):
            return super().forward(x)
        c, over = x.shape[1], (0, 2, 3)
        wide = x.double()
        images = wide.new_tensor([x.numel() / c])
        sums = all_reduce(torch.cat([wide.sum(over), (wide * wide).sum(over), images]))
        n = sums[-1].detach()
        mean = sums[:c] / n
        variance = sums[c:-1] / n - mean**2
        if self.track_running_stats:
            self._count(mean.detach(), variance.detach() * n / (n - 1))
        weight, bias = (self.weight.double(), self.bias.double()) if self.affine else (1.0, 0.0)
        scale = weight * torch.rsqrt(variance + self.eps)
        shift = bias - mean * scale
        kind = torch.promote_types(x.dtype, torch.float32)
        scale, shift = (v.to(kind)[:, None, None] for v in (scale, shift))
        return (x * scale + shift).to(x.dtype)

    @torch.no_grad()
    def _count(self, mean: Tensor, variance: Tensor) -> None:
        """Into the moving averages, with the momentum that BN has; without one all weigh alike."""
        tracked = cast(Tensor, self.num_batches_tracked).add_(1)
        new = 1 / int(tracked) if self.momentum is None else self.momentum
        for average, value in ((self.running_mean, mean), (self.running_var, variance)):
            cast(Tensor, average).lerp_(value.to(cast(Tensor, average).dtype), new)


class OverProcesses(LayerSync):
    """Puts ``SyncBN`` in the place of every BN, with the same parameters and buffers."""

    def apply(self, model: nn.Module) -> nn.Module:
        return exchange(model, nn.BatchNorm2d, SyncBN)

    def revert(self, model: nn.Module) -> nn.Module:
        return exchange(model, SyncBN, nn.BatchNorm2d)


def exchange(model: nn.Module, old: type[nn.BatchNorm2d], new: type[nn.BatchNorm2d]) -> nn.Module:
    """Every module that is an ``old`` becomes a ``new`` with its state."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is old:
                how = (child.eps, child.momentum, child.affine, child.track_running_stats)
                made = new(child.num_features, *how, device="meta")
                made._parameters, made._buffers = child._parameters, child._buffers
                made.train(child.training)
                setattr(parent, name, made)
    return model


class FirstAverages(Callback):
    """Gives every process the first one's moving averages when they are used: before an evaluation.

    DDP does so before each forward in training, which has no use for them. The bits are the same:
    the first one's averages never depend on the others', and a checkpoint has the first one's.
    """

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.broadcast_buffers = False

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, task: nn.Module) -> None:
        if trainer.world_size == 1:
            return
        for buffers in buffers_by_dtype(task):
            values = flat(buffers)
            distributed.broadcast(values, 0)
            fill(buffers, values)
