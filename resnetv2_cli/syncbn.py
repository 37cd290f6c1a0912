"""BN under several processes: statistics over all of them, on devices that PyTorch's SyncBatchNorm
does not support, and the moving averages of rank 0 for all."""

from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from resnetv2_cli.nonfinite import buffers_by_dtype, fill, flat


class SyncBN(nn.BatchNorm2d):
    """BN whose statistics in training are those of the whole batch, over all processes.

    The processes exchange sums in float64, and in backward their gradients, so that parts of
    different sizes weigh by their numbers of images. In a single process, or in evaluation, it is
    plain BN.

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
        """Update the moving averages, with BN's momentum; without one all batches weigh alike."""
        tracked = cast(Tensor, self.num_batches_tracked).add_(1)
        new = 1 / int(tracked) if self.momentum is None else self.momentum
        for average, value in ((self.running_mean, mean), (self.running_var, variance)):
            cast(Tensor, average).lerp_(value.to(cast(Tensor, average).dtype), new)


class OverProcesses(LayerSync):
    """Replaces every BN by a ``SyncBN`` with the same parameters and buffers."""

    def apply(self, model: nn.Module) -> nn.Module:
        return exchange(model, nn.BatchNorm2d, SyncBN)

    def revert(self, model: nn.Module) -> nn.Module:
        return exchange(model, SyncBN, nn.BatchNorm2d)


def exchange(model: nn.Module, old: type[nn.BatchNorm2d], new: type[nn.BatchNorm2d]) -> nn.Module:
    """Replace every module of class ``old`` by one of class ``new`` with its state."""
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
    """Broadcasts rank 0's moving averages to every process where they are used: before evaluation.

    DDP does so before each forward pass in training, which does not use them. The results have the
    same bits: rank 0's averages never depend on other ranks', and a checkpoint holds rank 0's.
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
