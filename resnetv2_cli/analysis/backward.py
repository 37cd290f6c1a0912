"""The gradient on its way down: dL/dx_l = direct term + term through the weights (Eqs. 5 and 8)."""

from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnetv2_cli.analysis.draw import Measured, Panels, by_stage, ends, named, of, short
from resnetv2_cli.analysis.subject import Subject
from resnetv2_cli.analysis.topics import Table
from resnetv2_cli.analysis.trace import Trace, Unit, ratio, size
from resnetv2_cli.quantities import NONE

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def vjp(outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    """Vector-Jacobian products summed over the outputs, one for each input; zeros where an
    input has no effect.

    Shape: each cotangent as its output; each result as its input.
    """
    found = torch.autograd.grad(
        outputs, inputs, cotangents, retain_graph=True, materialize_grads=True
    )
    return list(found)


def gradients(trace: Trace) -> tuple[dict[Unit, Tensor], dict[Unit, Tensor]]:
    """dL/dx_l and dL/dx_{l+1} of every unit, from autograd through the whole network.

    Shape: as x_l, and as x_{l+1}.
    """
    tensors = [u.x for u in trace.units] + [trace.units[-1].out]
    found = vjp([trace.loss], tensors, [torch.ones_like(trace.loss)])
    units = trace.units
    return dict(zip(units, found, strict=False)), dict(zip(units, found[1:], strict=True))


def direct_terms(span: list[Unit], at_end: Tensor) -> list[Tensor]:
    """dL/dx_L times the product of h'_i from i = L-1 down to l, for l = L, L-1, ... of a span:
    the vjp of the shortcuts alone, each at its own x_i.

    Source: Eq. 8, with "h'" for shortcuts other than constant scaling; in Eq. 5 it is dL/dx_L.

    Shape: at_end as x_L; each term as its x_l.
    """
    terms = [at_end]
    for unit in reversed(span):
        terms += vjp([unit.h], [unit.x], [terms[-1]])
    return terms


def split(span: list[Unit], at_end: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two terms of Eq. 8 at every x_l of a span: direct, and through the weights.

    The second is d/dx_l of the sum of F-hat(x_i), times dL/dx_L, in one vjp. F-hat is F times the
    product of h'_j above it, so the cotangent of F(x_i) is the direct term that arrives there; with
    identity shortcuts each of these is dL/dx_L (Eq. 5).

    Shape: at_end as x_L; both terms as their x_l.
    """
    direct = direct_terms(span, at_end)[::-1]
    added, xs = [u.added for u in span], [u.x for u in span]
    return list(zip(direct, vjp(added, xs, direct[1:]), strict=False))


def shortcut_scale(unit: Unit, cotangent: Tensor) -> float:
    """The factor by which h' alone scales a gradient's norm: |lambda_l| for constant scaling, since
    norms have no sign; NaN where there is no gradient.

    Where the shape changes, padding or projection is not counted, only the rest of the shortcut.
    """
    [below] = vjp([unit.h], [unit.x], [cotangent])
    if unit.keeps_shape:
        return ratio(size(below), size(cotangent))
    carried = unit.module.shortcut.carry(unit.split)  # type: ignore[union-attr, operator]
    [alone] = vjp([carried], [unit.x], [cotangent])
    return ratio(size(below), size(alone))


def limits(products: list[float]) -> dict[str, dict[str, int | None]]:
    """For each number format, after how many units the product of scales is below the normal
    numbers (``underflow``), above the finite ones (``overflow``), or too small to change a 1 that
    it is added to (``lost``); None if it never is. ``products`` run from the last unit down."""

    def first(found: list[bool]) -> int | None:
        return found.index(True) + 1 if True in found else None

    made = {}
    for name, dtype in TYPES.items():
        info = torch.finfo(dtype)
        made[name] = {
            "underflow": first([p < info.tiny for p in products]),
            "overflow": first([p > info.max for p in products]),
            "lost": first([p <= info.eps / 2 for p in products]),
        }
    return made


def gate(unit: Unit) -> list[float] | None:
    """Mean, minimum and maximum of g(x_l); None without a gate, and where g has NaN."""
    g = unit.gate
    if g is None or g.isnan().any():
        return None
    return [float(v) for v in (g.mean(), g.min(), g.max())]


def measure(subject: Subject, trace: Trace) -> dict[str, Any]:
    """For every unit: ``gradient`` (norm of dL/dx_l), ``direct`` and ``weights`` (norms of the two
    terms) and ``off`` (norm of gradient - direct - weights, over the gradient's), None where the
    shape changes; ``scale`` of its shortcut, and the ``product`` of scales from the last unit down
    to it; ``gate``. And ``limits`` of the products."""
    at_x, at_out = gradients(trace)
    terms = {
        unit: pair
        for span in trace.spans
        for unit, pair in zip(span, split(span, at_out[span[-1]]), strict=True)
    }
    off = {u: ratio(size(at_x[u] - sum(pair)), size(at_x[u])) for u, pair in terms.items()}
    scales = [shortcut_scale(u, at_out[u]) for u in trace.units]
    products = list(accumulate(reversed(scales), mul))
    return {
        "stage": [u.stage for u in trace.units],
        "gradient": [size(at_x[u]) for u in trace.units],
        "direct": [size(terms[u][0]) if u in terms else None for u in trace.units],
        "weights": [size(terms[u][1]) if u in terms else None for u in trace.units],
        "off": [off.get(u) for u in trace.units],
        "scale": scales,
        "product": products[::-1],
        "gate": [gate(u) for u in trace.units],
        "limits": limits(products),
    }


def table(measured: Measured) -> Table:
    """A line for each stage of each network; terms are of its first unit that keeps the shape."""
    columns = ["stage", "|dL/dx_l|", "direct", "weights", "off by", "scales", "g"]
    rows = []
    for label, m in measured.items():
        for stage, units in by_stage(m):
            kept = [i for i in units if m["direct"][i] is not None]
            off = [m["off"][i] for i in kept if m["off"][i] is not None]
            gates = [m["gate"][i] for i in units]
            rows.append(
                [
                    named(measured, label, stage),
                    ends([m["gradient"][i] for i in units]),
                    *(short(m[k][kept[0]]) if kept else NONE for k in ("direct", "weights")),
                    short(max(off, default=None)),
                    short(m["product"][units[0]]),
                    ends([g and g[0] for g in gates]) if any(gates) else NONE,
                ]
            )
    title = f"dL/dx_l = direct + through the weights (Eqs. 5, 8), by stage{of(measured)}"
    return Table(title, columns, rows, tuple(notes(measured)))


def notes(measured: Measured) -> list[str]:
    """Where the products of shortcut scales leave the formats that networks are trained in."""
    words = {
        "underflow": "is below the normal numbers of {} after {} units",
        "overflow": "is above the largest {} after {} units",
        "lost": "no longer changes a {} gradient of size 1 after {} units",
    }
    lines = []
    for label, m in measured.items():
        for what, sentence in words.items():
            found = [(name, at[what]) for name, at in m["limits"].items() if at[what]]
            if found:
                said = ", ".join(sentence.format(name, n) for name, n in found[:1])
                said += "".join(f", {name} after {n}" for name, n in found[1:])
                lines.append(f"{label}: the product of shortcut scales {said}")
    return lines


def draw(measured: Measured, to: Path) -> None:
    """Gradients, terms, products and, if there are any, gates, over depth."""
    titles = [
        "norm of dL/dx_l (solid) and of its direct term within the stage (dashed)",
        "Eqs. 5, 8 off by: |dL/dx_l - direct - through weights| / |dL/dx_l|",
        "product of shortcut scales from unit l to the last",
    ]
    gated = {label: m for label, m in measured.items() if any(m["gate"])}
    if gated:
        titles.append("1 - g, openness of the shortcut: mean, minimum and maximum")
    panels = Panels(measured, *titles)
    for label, m in measured.items():
        panels.over_depth(0, label, m["gradient"])
        panels.over_depth(0, label, m["direct"], "--")
        panels.off(1, label, m["off"])
        panels.over_depth(2, label, m["product"])
    for label, m in gated.items():
        for which, dash in enumerate(("-", ":", ":")):
            panels.over_depth(3, label, [g and 1 - g[which] for g in m["gate"]], dash)
    panels.log(0, 2)
    panels.save(to)
