"""``describe``, ``diff``, ``list`` and ``show``: what there is, without running it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from resnetv2_cli import console, paper, plans
from resnetv2_cli.commands.app import SAVED, Config, Json, app, of_a_run, of_weights
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.catalog import DATASETS
from resnetv2_cli.errors import UserError
from resnetv2_cli.flags import with_flags
from resnetv2_cli.manifest import annotated, origins
from resnetv2_cli.recipes import CONFIGS

Picture = Annotated[
    Path | None,
    typer.Option(
        help="Draw the units as Figs. 2 and 4 do: .svg, .png, .pdf and others.",
        metavar="FILE.svg",
    ),
]


def drawn(units: dict[str, Any], to: Path) -> None:
    """Draw units into a file.

    Raises:
        UserError: its suffix is not that of a picture.
    """
    from resnetv2_cli.blueprint import blueprint
    from resnetv2_cli.plot import refuse_suffix

    refuse_suffix(to)
    blueprint(units, to)
    console.note(f"picture: {to}")


def figures_2_and_4() -> dict[str, Any]:
    """The shortcuts of Fig. 2, in its units, and the units of Fig. 4, by their names."""
    import torch

    from resnetv2_cli.anatomy import anatomy
    from resnetv2_cli.units import Kind, residual_unit

    of_figure_2 = [s for s, row in plans.shortcuts().items() if "Fig. 2" in row.formula]
    shortcuts = {s: Kind(unit="original", shortcut=s) for s in of_figure_2}
    units = {u: Kind(unit=u) for u in plans.UNITS}
    with torch.device("meta"):
        return {name: anatomy(residual_unit(k, 64, 64)) for name, k in (shortcuts | units).items()}


Network = Annotated[
    str,
    typer.Argument(
        help=f"{SAVED}; a config; or settings, such as depth=110,unit=original.", callback=of_a_run
    ),
]


@app.command(rich_help_panel="Study the paper")
@with_flags()
def describe(
    network: Annotated[
        str | None,
        typer.Argument(help=f"{SAVED}; a config; or give flags.", callback=of_a_run),
    ] = None,
    config: Config = None,
    picture: Picture = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Show a network's units, equations, shapes, parameters and multiply-adds."""
    if network and (config or flags):
        raise UserError(f"{network} takes no flags", "it has its own settings; leave either out")
    from resnetv2_cli import difference
    from resnetv2_cli.describe import describe as described
    from resnetv2_cli.describe import skeleton
    from resnetv2_cli.source import Source, named

    if network:
        main = named(network, Source(Experiment()))
    else:
        main = Source(Experiment.load(config, **of_weights(config, flags), **flags))
    experiment = main.experiment
    made = described(experiment, difference.classes(main))
    if picture:
        from resnetv2_cli.anatomy import kinds

        drawn({alike.name: alike.anatomy for alike in kinds(skeleton(experiment))}, picture)
    if json:
        console.as_json(made)
        return
    rows = [
        (
            p["name"],
            "x".join(map(str, p["output"])),
            str(p["receptive_field"] or "all"),
            f"{p['parameters']:,}",
            f"{p['macs']:,}",
        )
        for p in made["parts"]
    ]
    rows.append(("total", "", "", f"{made['parameters']:,}", f"{made['macs']:,}"))
    console.table(made["network"], ["part", "output", "sees, pixels", "parameters", "MACs"], rows)
    console.say(f"{made['parameters_without_bn']:,} parameters without BN")
    for alike in made["units"]:
        console.out.print(f"[bold]{alike['units']}[/]")
        for line in alike["equations"]:
            console.say(f"  {line}")
    for kind, errors in made["published"].items():
        said = f"the paper's errors {paper.ERRORS_OF[kind]}, %: {errors}"
        console.say(said)


@app.command(rich_help_panel="Study the paper")
def diff(a: Network, b: Network, json: Json = False) -> None:
    """Say in words and counts how two networks differ.

    Settings given for A change the defaults; those for B change A: resnetv2 diff
    depth=164,unit=original unit=full-preact
    """
    from resnetv2_cli import difference
    from resnetv2_cli.source import Source, named

    one = named(a, Source(Experiment()))
    other = named(b, one)
    made = difference.difference(one, other)
    if json:
        console.as_json(made)
        return
    second = f"a with {b}" if other.checkpoint is None and "=" in b else b
    console.table(f"a: {a}\nb: {second}", ["", "a", "b", "b - a"], difference.rows(made))
    for line in made["words"] if made["settings"] else ["the networks are the same"]:
        console.say(line)


Rows = list[tuple[str, ...]]


@app.command("list", rich_help_panel="Study the paper")
def list_(picture: Picture = None, json: Json = False) -> None:
    """List units, shortcuts, datasets and configs, with the errors the paper reports."""
    if picture:
        drawn(figures_2_and_4(), picture)
    units: Rows = [(u, cut, paper.published("unit", u)) for u, cut in plans.UNITS.items()]
    shortcuts: Rows = [
        (s, row.formula, paper.published("shortcut", s)) for s, row in plans.shortcuts().items()
    ]
    there: dict[str, tuple[str, list[str], Rows]] = {
        "unit": (
            "Units: + ends one, | begins the next (Fig. 4); write your own likewise",
            ["between two units", "paper, %"],
            units,
        ),
        "shortcut": ("Shortcuts (Fig. 2)", ["y", "paper, %"], shortcuts),
        "layout": (
            "Layouts",
            ["what it is"],
            [(name, row.doc) for name, row in plans.LAYOUTS.items()],
        ),
        "dataset": ("Datasets", ["what"], [(name, d.doc) for name, d in DATASETS.items()]),
        "config": ("Configs", ["what"], [(p.stem, headline(p)) for p in configs()]),
    }
    if json:
        console.as_json(
            {
                flag: {name: dict(zip(columns, rest, strict=True)) for name, *rest in rows}
                for flag, (_, columns, rows) in there.items()
            }
        )
        return
    for flag, (title, columns, rows) in there.items():
        console.table(title, [f"--{flag}", *columns], rows)


def configs() -> list[Path]:
    """The recipes that come with the tool."""
    return sorted(CONFIGS.glob("*.yaml"))


def headline(config: Path) -> str:
    """The first comment of a recipe."""
    return config.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()


@app.command(rich_help_panel="Study the paper")
@with_flags()
def show(config: Config = None, **flags: Any) -> None:
    """Show, without running it, the experiment that a config and flags define, and where values
    that are not defaults come from."""
    network = of_weights(config, flags)
    came = origins(config, flags) | dict.fromkeys(network, "weights")
    print(annotated(Experiment.load(config, **network, **flags), came), end="")
