"""The backward pass: the two terms of Eqs. 5 and 8, and the gradient by length of path.

A cotangent at x_{l+1} goes back through f, and then to x_l on two ways: through h, and through
the weights (all that is left of y_l when h is taken away). Both are vector-Jacobian products of
the unit itself; neither is got by subtracting the other from the gradient.
"""

from typing import Any

import torch
from torch import Tensor

from resnetv2_cli.analysis.trace import Step, stretches

LONGEST = 16  # residual branches on a path that is counted by itself; longer ones are together


def product(out: Tensor, at: Tensor, cotangent: Tensor) -> Tensor:
    """cotangent * d out / d at; zeros where ``out`` does not depend on ``at``."""
    [grad] = torch.autograd.grad(out, at, cotangent, materialize_grads=True)
    return grad


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def through_f(step: Step, cotangent: Tensor) -> Tensor:
    """From x_{l+1} to y_l (Eq. 2)."""
    y = leaf(step.y)
    return product(step.unit.after(y), y, cotangent)


def through_h(step: Step, cotangent: Tensor) -> Tensor:
    """From y_l to x_l by the shortcut alone; of a gate that is diag(1-g) - diag(x) dg/dx."""
    x = leaf(step.x)
    return product(step.h(step.unit.shared(x)), x, cotangent)


def through_weights(step: Step, cotangent: Tensor) -> Tensor:
    """From y_l to x_l by everything else: F, and a gate where it scales F."""
    x = leaf(step.x)
    shared = step.unit.shared(x)
    y = step.shortcut(shared, step.unit.residual(shared))
    return product(y - step.h(shared), x, cotangent)


def backward(steps: list[Step], loss: Tensor) -> dict[str, Any]:
    """``units``: size of dE/dx_l and of its direct term and its term through the weights, from
    the end of the stage (Eq. 5; Eq. 8 where h scales); ``stages``: how well the two add up.

    ``split_error``: max |direct + through weights - dE/dx_l| over max |dE/dx_l|, the worst of a
    stage; zero to rounding, whatever the unit and the shortcut. ``direct_error``: max |direct -
    dE/dx_L| over max |dE/dx_L|, zero where the path is clean.
    """
    ends = [s.x for s in steps] + [steps[-1].out]
    grads = torch.autograd.grad(loss, ends, retain_graph=True)
    gradient = dict(zip([s.name for s in steps] + ["end"], grads, strict=True))
    following = dict(zip([s.name for s in steps], grads[1:], strict=True))
    units = {s.name: {"name": s.name, "gradient": norm(gradient[s.name])} for s in steps}
    stages = []
    for name, part in stretches(steps).items():
        at_end = following[part[-1].name]
        direct, weights = at_end, torch.zeros_like(at_end)
        split = clean = 0.0
        for step in reversed(part):
            back, rest = through_f(step, direct), through_f(step, weights)
            weights = through_h(step, rest) + through_weights(step, rest + back)
            direct = through_h(step, back)
            whole = gradient[step.name]
            split = max(split, relative(direct + weights - whole, whole))
            clean = max(clean, relative(direct - at_end, at_end))
            units[step.name] |= {"direct": norm(direct), "weights": norm(weights)}
        stages.append(
            {
                "name": name,
                "units": len(part),
                "at_start": norm(gradient[part[0].name]),
                "at_end": norm(at_end),
                "direct": norm(direct),
                "weights": norm(weights),
                "split_error": split,
                "direct_error": clean,
            }
        )
    return {"units": list(units.values()), "at_end": norm(grads[-1]), "stages": stages}


def norm(x: Tensor) -> float:
    return float(x.norm())


def relative(error: Tensor, of: Tensor) -> float:
    """max |error| over max |of|."""
    return float(error.abs().max() / of.abs().max().clamp_min(torch.finfo(of.dtype).tiny))


def paths(steps: list[Step], loss: Tensor) -> dict[str, Any]:
    """The gradient at x_1, split by how many residual branches its paths pass.

    A network of L units is a sum over 2^L paths, of which so many pass k branches as there are
    ways to choose k of L (Veit, Wilber, Belongie 2016; not in the paper). ``lengths``: k and the
    size of the gradient over these paths; ``share``: of the sum of all sizes; ``longer``: the
    size of what passes more than LONGEST.
    """
    [at_end] = torch.autograd.grad(loss, [steps[-1].out], retain_graph=True)
    [whole] = torch.autograd.grad(loss, [steps[0].x], retain_graph=True)
    terms = [at_end]  # by length of path
    for step in reversed(steps):
        terms = [through_f(step, term) for term in terms]
        carried = [through_h(step, term) for term in terms]
        passed = [through_weights(step, term) for term in terms[:LONGEST]]
        grown = [torch.zeros_like(carried[0]), *passed]
        padded = carried + [torch.zeros_like(carried[0])] * (len(grown) - len(carried))
        terms = [a + b for a, b in zip(padded, grown, strict=True)]
    longer = whole - torch.stack(terms).sum(0)
    sizes = [norm(term) for term in terms]
    total = sum(sizes) + norm(longer)
    return {
        "units": len(steps),
        "lengths": [
            {"length": k, "gradient": size, "share": size / total} for k, size in enumerate(sizes)
        ],
        "longer": norm(longer),
        "whole": norm(whole),
    }
