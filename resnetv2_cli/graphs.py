"""CUDA graphs: a whole iteration as one, or the forward and the backward pass as two.

A deep network of narrow layers keeps a GPU waiting for the launches of its kernels, some ten per
layer. Captured once, they are replayed. Decisions that the user's own code makes in Python are made
only once, at capture.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from resnetv2_cli.resnet import ResNet

WARM = 3  # warm-up runs before a capture: libraries choose their kernels, and compile
NEAR = 0.05  # of the gradient's norm: other kernels round differently, another batch is 1 away
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
Forward = Callable[[Tensor], Tensor]


def arithmetic(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Autocast as the Trainer's: no cache of cast weights, which a replay would not renew."""
    if precision not in DTYPES:
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision], cache_enabled=False)


def wanted(asked: bool | None, device: str, processes: int, own: bool) -> bool:
    """Whether to use CUDA graphs on a type of device: as ``asked``, or by default on one GPU, but
    not with the user's ``own`` code; on several GPUs they are untested."""
    by_itself = device == "cuda" and processes == 1 and not own
    return by_itself if asked is None else asked


def why_not(
    device: torch.device, *, micro_batches: int = 1, segments: int = 0, sync_bn: bool = False
) -> str:
    """Why a training cannot replay graphs; empty if it can."""
    if device.type != "cuda":
        return "they are for GPUs"
    if micro_batches > 1:  # a replay overwrites the gradients of the last one
        return "they cannot add up the gradients of micro-batches"
    if segments:  # recomputing reads the generator's seed, which is forbidden during capture
        return "not with --recompute"
    return "not with --sync-bn" if sync_bn else ""  # its processes communicate inside the network


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """Capture ``step``; return the function that replays it on the same tensors."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with recording(side.device) as pool:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                step()
        torch.cuda.current_stream().wait_stream(side)
        # Other threads pin memory meanwhile.
        with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
            step()
    return graph.replay


@contextmanager
def recording(device: torch.device) -> Iterator[Any]:
    """The context of a capture, which gives its memory pool. Garbage collection is off inside, as a
    finalizer may make a call that is forbidden during capture. If the capture fails, the GPU's
    state is restored."""
    if device.type != "cuda":
        yield None
        return
    pool, here = torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    gc.collect()
    gc.disable()
    try:
        yield pool
    except BaseException:
        torch.cuda.set_stream(here)
        with suppress(RuntimeError):  # raised if PyTorch has done so already, as from 2.13 on
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        torch.cuda.synchronize()
        renew_generator(device)
        raise
    finally:
        gc.enable()


def tidy(device: torch.device) -> None:
    """Free the memory of captures that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def replayed(
    step: Callable[[], None], device: torch.device
) -> tuple[Callable[[], None] | None, str]:
    """The replay of ``step`` as ``recorded`` returns it, or None and why there is none."""
    if why := why_not(device):
        return None, why
    try:
        return recorded(step), ""
    except Exception as error:  # whatever a layer does that a graph cannot
        return None, reason(error)


def reason(error: BaseException) -> str:
    """The first line of the original error: the last one says only that the capture failed."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return str(error).strip().partition("\n")[0] or type(error).__name__


def record(net: ResNet, x: Tensor, precision: str) -> tuple[Forward | None, str]:
    """Capture the network in training, for batches of the shape and layout of ``x``; return its
    replay, or None and why it cannot be captured. Weights and moving averages stay as they are.

    Before it is used for training, the gradient of a replay on another batch is compared with the
    network's own.

    Shape: x (N, 3, H, W) on the device of the network -> of the result: as the network's.
    """
    before = [buffer.clone() for buffer in net.buffers()]
    names, weights = zip(*net.named_parameters(), strict=True)
    # DDP holds the weights' own nodes in autograd, which are on streams that are not captured.
    places = [w.detach().requires_grad_(w.requires_grad) for w in weights]

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(net, dict(zip(names, weights, strict=True)), (x,))

    def replay(x: Tensor) -> Tensor:
        return graphed(x, *weights)

    try:
        with recording(x.device) as pool, arithmetic(x.device, precision):
            graphed: Any = torch.cuda.make_graphed_callables(call, (x, *places), pool=pool)
        far = distance(net, replay, x.flip(-1), precision)
    except Exception as error:  # whatever a layer does that a graph cannot
        return None, reason(error)
    finally:
        for buffer, value in zip(net.buffers(), before, strict=True):
            buffer.copy_(value)
    if not far < NEAR:
        return None, f"the gradient of a replay is {far:.2g} of its norm away from the network's"
    # The replay writes BN's moving averages into the network's memory, so it keeps the network.
    return lambda x, net=net: replay(x), ""


def renew_generator(device: torch.device) -> None:
    """Renew the generator's state: a failed capture leaves it in capture mode, unable to draw."""
    if device.type == "cuda":
        own = torch.cuda.default_generators[device.index or 0]
        own.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())


def distance(net: ResNet, replay: Forward, x: Tensor, precision: str) -> float:
    """How far the gradient through ``replay`` is from the network's own, relative to its norm.

    Shape: x (N, 3, H, W).
    """
    ours, theirs = (_gradient(net, forward, x, precision) for forward in (net, replay))
    return float((theirs - ours).norm() / ours.norm())


def _gradient(net: ResNet, forward: Forward, x: Tensor, precision: str) -> Tensor:
    torch.manual_seed(0)  # for what a shortcut draws
    with arithmetic(x.device, precision):
        logits = forward(x)
    labels = torch.arange(len(x), device=x.device) % logits.shape[1]
    learning = [p for p in net.parameters() if p.requires_grad]
    parts = torch.autograd.grad(F.cross_entropy(logits.float(), labels), learning)
    return torch.cat([part.detach().reshape(-1).float() for part in parts])
