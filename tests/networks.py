"""Networks in float64, and their inputs and traces, for the tests of ``analyze``."""

import torch
from torch import nn

from resnetv2_cli.analysis.subject import Subject
from resnetv2_cli.analysis.trace import Trace, trace
from resnetv2_cli.plans import UNITS
from resnetv2_cli.resnet import ResNet

EXACT = ["relu-before-add", "relu-only-preact", "full-preact"]  # f is the identity: 4(c), (d), (e)
BROKEN = ["original", "bn-after-add"]
assert {*EXACT, *BROKEN} == set(UNITS)


def batch(n: int = 2, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, size, size, dtype=torch.float64), torch.arange(n)


def network(depth: int = 14, **of) -> ResNet:
    """A network in float64 and training mode, whose BN scales and shifts are random."""
    net = ResNet(depth, **of).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return net.train()


def traced(depth: int = 14, **of) -> Trace:
    return trace(network(depth, **of), *batch())


def looked_at(net: ResNet) -> Subject:
    x, labels = batch(4)
    return Subject(net, x, labels, x.float(), labels)


def measured(topic, net: ResNet) -> dict:
    one = looked_at(net)
    return topic.measure(one, trace(net, one.x, one.labels))


def cells(topic, found: dict) -> list[dict[str, str]]:
    """A topic's table for one network: for each row, the cells by column."""
    made = topic.table({"net": found})
    return [dict(zip(made.columns, row, strict=True)) for row in made.rows]


def worst(values: list) -> float:
    return max(v for v in values if v is not None)
