"""``analyze``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from resnetv2_cli import console
from resnetv2_cli.commands.app import Config, Json, app
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError, unknown
from resnetv2_cli.flags import with_flags

TOPICS = ("forward", "shortcuts", "backward", "paths", "lesion")


@app.command(rich_help_panel="Study the paper")
@with_flags()
def analyze(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="A checkpoint or a run's folder; without one, flags say what network."),
    ] = None,
    config: Config = None,
    topic: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(TOPICS)}; may be given often. All by default."),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="Beside it: a checkpoint, a run's folder, or changed settings such as "
            "depth=110,unit=original; may be given often."
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(help="Training images in the batch that is looked at.", min=2)
    ] = 8,
    tests: Annotated[
        int, typer.Option(help="Test images that a lesion is scored on.", min=1)
    ] = 256,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where pictures and analysis.json go.")
    ] = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Check the paper's argument on a network, at initialization or trained, in float64.

    For instance: resnetv2 analyze --unit original --compare unit=full-preact
    """
    for name in topic or []:
        if name not in TOPICS:
            raise unknown("topic", name, TOPICS)
    if checkpoint and config:
        raise UserError("a checkpoint takes no --config", "it names network and data itself")
    wanted = list(dict.fromkeys(topic or TOPICS))

    from resnetv2_cli import checkpoint as checkpoints
    from resnetv2_cli.analysis.draw import draw
    from resnetv2_cli.analysis.subject import analyze as analyzed
    from resnetv2_cli.analysis.subject import other, subject
    from resnetv2_cli.runfolder import write_json

    given = checkpoints.find(checkpoint) if checkpoint else Experiment.load(config, **flags)
    where = {"data_dir": flags["data_dir"]} if "data_dir" in flags else {}
    first, experiment = subject(given, images, tests, **(flags if checkpoint else {}))
    others = [subject(other(c, experiment), images, tests, **where)[0] for c in compare or []]
    if not topic and not all(s.trained for s in [first, *others]):
        wanted.remove("lesion")  # deleting units of an untrained network says nothing
    found = [analyzed(s, wanted) for s in [first, *others]]
    beside = Path(given).parent.parent if isinstance(given, Path) else None
    folder = output or (beside / "analysis" if beside else Path("runs/analysis") / experiment.name)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "analysis.json", console.finite(found))
    for name in wanted:
        draw(name, found, folder / f"{name}.png")
    if json:
        console.as_json(found)
        return
    letters = [chr(ord("A") + i) for i in range(len(found))]
    for letter, one in zip(letters, found, strict=True):
        console.out.print(f"{letter}: {one['network']}, {one['images']} images, float64")
    for name in wanted:
        title, columns, row = SUMMARIES[name]
        rows = [
            [letter, *cells]
            for letter, one in zip(letters, found, strict=True)
            for cells in row(one[name])
        ]
        console.table(title, ["", *columns], rows)
    console.note(f"pictures and numbers: {folder}")


def forward(found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            s["name"],
            f"{s['units']}",
            f"{s['additive_error']:.1e}",
            f"{s['least_growth']:.2g}",
            f"{s['truncated']:.0%}",
        ]
        for s in found["stages"]
    ]


def shortcuts(found: dict[str, Any]) -> list[list[str]]:
    gains = [u["gain"] for u in found["units"]]
    opened = [u["open"] for u in found["units"] if "open" in u]
    gates = f"{min(opened):.3f} to {max(opened):.3f}" if opened else "—"
    power = found["log10_product"]
    product = "0" if power == float("-inf") else f"1e{power:.1f}"
    cells = [f"{min(gains):.3f} to {max(gains):.3f}", gates, product]
    return [[*cells, ", ".join(found["underflows"]) or "none"]]


def backward(found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            s["name"],
            f"{s['at_end']:.1e}",
            f"{s['at_start']:.1e}",
            f"{s['direct']:.1e}",
            f"{s['weights']:.1e}",
            f"{s['split_error']:.1e}",
            f"{s['direct_error']:.1e}",
        ]
        for s in found["stages"]
    ]


def paths(found: dict[str, Any]) -> list[list[str]]:
    top = max(found["lengths"], key=lambda p: p["gradient"])
    first = found["lengths"][0]
    return [
        [f"{found['units']}", f"{first['share']:.1%}", f"{top['length']}", f"{top['share']:.1%}"]
    ]


def lesion(found: dict[str, Any]) -> list[list[str]]:
    worst = max(found["deleted"], key=lambda d: d["error"])

    def mean(name: str) -> str:
        made = [d["error"] for d in found[name]]
        return f"{sum(made) / len(made):.2f}" if made else "—"

    return [
        [
            f"{found['images']}",
            f"{found['intact']:.2f}",
            mean("deleted"),
            f"{worst['error']:.2f} ({worst['unit']})",
            f"{mean('pairs')} ({len(found['pairs'])} of {found['pairs_of']})",
            mean("swapped"),
        ]
    ]


SUMMARIES = {  # title, columns, cells of one network
    "forward": (
        "Forward: x_L = x_l + sum F_i within a stage (Eq. 4)",
        ["stage", "units", "error of Eq. 4", "least growth", "y < 0"],
        forward,
    ),
    "shortcuts": (
        "Shortcuts: what h lets through, and the product of Eq. 8",
        ["gain", "gate open", "product", "underflows in"],
        shortcuts,
    ),
    "backward": (
        "Backward: dE/dx_l = direct term + term through the weights (Eqs. 5 and 8)",
        ["stage", "dE/dx_L", "dE/dx_l", "direct", "weights", "sum is off", "direct is off"],
        backward,
    ),
    "paths": (
        "Paths: share of the gradient at x_1 by residual branches passed (Veit et al. 2016)",
        ["units", "none", "most at", "share"],
        paths,
    ),
    "lesion": (
        "Lesions: test error, %, in evaluation mode (Veit et al. 2016)",
        ["images", "intact", "unit deleted", "worst", "pair deleted", "swapped"],
        lesion,
    ),
}
