"""BN over several processes is BN of the whole batch: outputs, gradients and moving averages."""

import os
from datetime import timedelta

import torch
from torch import distributed, multiprocessing, nn

from resnetv2_cli.resnet import _uncounted
from resnetv2_cli.syncbn import OverProcesses, SyncBN

CUTS = ((0, 2), (2, 7))  # of seven images: parts of different sizes


def case() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    nn.init.normal_(net[1].weight)
    x = 5 + torch.randn(7, 3, 6, 6, dtype=torch.float64)
    return net, x, torch.randn(7, 4, 4, 4, dtype=torch.float64)


def part(rank: int, place: str) -> None:
    """Forward and backward pass on one process's images; the results go to a file."""
    distributed.init_process_group(
        "gloo", f"file://{place}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    net, x, weight = case()
    OverProcesses().apply(net)
    assert type(net[1]) is SyncBN
    images = slice(*CUTS[rank])
    x = x[images].requires_grad_()
    y = net(x)
    (y * weight[images]).sum().backward()
    gradients = [p.grad for p in net.parameters()]
    for gradient in gradients:
        distributed.all_reduce(gradient)
    torch.save([y.detach(), x.grad, gradients, list(net.buffers())], f"{place}/{rank}")
    distributed.destroy_process_group()


def test_bn_over_two_processes_is_bn_of_the_whole_batch(tmp_path):
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.spawn(part, args=(str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    net, x, weight = case()
    x.requires_grad_()
    y = net(x)
    (y * weight).sum().backward()
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), y.detach(), **close)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), x.grad, **close)
    for _, _, gradients, buffers in parts:
        torch.testing.assert_close(gradients, [p.grad for p in net.parameters()], **close)
        torch.testing.assert_close(buffers, list(net.buffers()), **close)


def test_alone_it_is_bn_and_it_can_be_taken_back():
    net, x, _ = case()
    expected = net(x)
    state = net.state_dict()
    over = OverProcesses()
    torch.testing.assert_close(over.apply(net)(x), expected, rtol=0, atol=0)
    assert type(over.revert(net)[1]) is nn.BatchNorm2d
    assert list(net.state_dict()) == list(state)


def test_a_second_pass_counts_for_no_kind_of_bn():
    """PyTorch's SyncBatchNorm is not a BatchNorm2d."""
    segment = nn.Sequential(nn.BatchNorm2d(4), nn.SyncBatchNorm(4))
    with _uncounted(segment):
        assert [norm.momentum for norm in segment] == [0.0, 0.0]
    assert [norm.momentum for norm in segment] == [0.1, 0.1]
