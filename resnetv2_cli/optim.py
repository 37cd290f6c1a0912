"""SGD and its learning-rate schedules, of which ``steps`` is the appendix's."""

import math

from torch import nn, optim

from resnetv2_cli.config import Experiment


def lr_factor(experiment: Experiment, step: int) -> float:
    """The factor of the learning rate at iteration ``step``, counted from 0.

    ``steps``: 0.1 in warm-up, then 1, and a tenth of that after each drop (appendix). ``cosine``: a
    linear rise, then half a cosine to 0. ``one-cycle``: the same, but from 1/25 and to 1/10^4.
    """
    steps, warmup = experiment.steps, experiment.warmup_
    if experiment.schedule == "steps":
        drops = sum(step >= round(drop * steps) for drop in experiment.drops_)
        return 0.1 if step < warmup else 0.1**drops
    low, end = (0.0, 0.0) if experiment.schedule == "cosine" else (1 / 25, 1e-4)
    if step < warmup:
        return low + (1 - low) * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return end + (1 - end) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def sgd(net: nn.Module, experiment: Experiment) -> optim.SGD:
    """SGD with momentum: v <- m v + g, w <- w - lr v, PyTorch's form.

    ``decay``: the paper gives one number, 1e-4; its Torch code decays every parameter.
    """
    trained = [p for p in net.parameters() if p.requires_grad]
    weights = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    spared = 0.0 if experiment.decay == "weights" else experiment.weight_decay
    groups = [
        {"params": weights, "weight_decay": experiment.weight_decay},
        {"params": others, "weight_decay": spared},
    ]
    return optim.SGD(
        groups,
        lr=experiment.lr,
        momentum=experiment.momentum,
        nesterov=experiment.nesterov,
        fused=next(net.parameters()).device.type in ("cpu", "cuda"),
    )


def schedule(optimizer: optim.Optimizer, experiment: Experiment) -> optim.lr_scheduler.LambdaLR:
    """The schedule, stepped with the optimizer once per iteration."""
    return optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(experiment, step))
