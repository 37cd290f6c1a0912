"""What is studied: a network, at initialization or from a checkpoint, and real images for it."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from resnetv2_cli.data.folder import chosen
from resnetv2_cli.data.module import view_of
from resnetv2_cli.evaluation import restore_as
from resnetv2_cli.finetune import begin
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.run import build
from resnetv2_cli.source import Source
from resnetv2_cli.telling import Tell


class Batch(NamedTuple):
    """How a network is studied. ``images``: training images in the batch; ``bn``: the statistics
    that BN uses, ``batch`` or ``kept``; ``test_images`` and ``pairs``: at most so many test images
    for errors, and pairs of units deleted together; ``precision``."""

    images: int = 8
    test_images: int = 250
    precision: str = "float64"
    bn: str = "batch"
    pairs: int = 100


@dataclass(eq=False)
class Subject:
    """One network with its images, on the CPU.

    ``net`` is in train mode if BN uses the batch's statistics, else in eval mode.

    Shape: x (images, 3, H, W), labels (images,); test_x and test_labels alike, float32.
    """

    net: ResNet
    x: Tensor
    labels: Tensor
    test_x: Tensor
    test_labels: Tensor
    batch: Batch = Batch()


def subject(source: Source, batch: Batch, tell: Tell) -> Subject:
    """Build the network, load its weights, a checkpoint's or those that training would start from,
    and read its images. ``tell`` is called with what is loaded of weights to start from.

    Raises:
        UserError: the images are missing or of another size than the network's mean image, or the
            weights are those of another network.
    """
    plain = replace(
        source.experiment,
        compile=False,
        recompute=0,
        recompute_bn=False,
        kernels="eager",
        batch_size=1,  # nothing is trained: there may be fewer images than in a batch
        accumulate=1,
    )
    if source.checkpoint:
        task, data = restore_as(source.checkpoint, plain)
    else:
        task, data = build(plain)
        for line in begin(task):
            tell(line)
    dtype: torch.dtype = getattr(torch, batch.precision)
    view = view_of(plain, task.normalize)._replace(ten=False)
    some, labels = chosen(data.train, batch.images, view)
    test, test_labels = chosen(data.test, batch.test_images, view)
    test_x = task.normalize(test)
    task.to(dtype)
    net = task.net.train(batch.bn == "batch")
    return Subject(net, task.normalize(some), labels, test_x, test_labels, batch)
