"""The application that every command joins, and the options that several commands share."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from resnetv2_cli import console, plans
from resnetv2_cli.config import Experiment
from resnetv2_cli.runfolder import RUNS

app = typer.Typer(
    no_args_is_help=True,
    help="Deep residual networks with identity mappings (He, Zhang, Ren, Sun 2016).",
    epilog="Exit status: 0 done, or saved when --time was over; 1 verify-resume found a "
    "difference; 2 an error that the message explains, or a run of an ablation crashed or was "
    "stopped; 130, 143, 138, 140 saved and exited on Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2; 141 the "
    "reader of the output closed it.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="A YAML file, or a name in configs/; flags override it."),
]
SAVED = "A checkpoint, a run's folder or name, or a safetensors file from export"


def of_a_run(text: str | None) -> str | None:
    """The text, if it is that of something on disk or of no run; else the folder of the run that it
    names, as in ``resnetv2 runs``.

    Raises:
        UserError: several runs begin with that name.
    """
    if not text or not RUNS.is_dir() or os.path.exists(os.path.expanduser(text)):
        return text
    from resnetv2_cli.inventory import choose, matching, runs_in

    runs = runs_in(RUNS)
    if not matching(text, runs):
        return text  # whoever takes it says what is missing
    found = str(choose(text, runs).folder.path)
    console.note(f"{text}: {found}")
    return found


def saved(path: Path | None) -> Path | None:
    """``of_a_run`` of a path."""
    return None if path is None else Path(of_a_run(str(path)) or "")


Saved = Annotated[Path, typer.Argument(help=f"{SAVED}.", callback=saved)]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON.")]
Format = Annotated[
    Literal["table", "json", "csv", "md"], typer.Option("--format", help="How results are shown.")
]
Detect = Annotated[
    float,
    typer.Option(
        help="Difference, in points, for which the needed number of seeds is given.", min=0.01
    ),
]
Time = Annotated[
    str | None, typer.Option(help="Save and exit cleanly after this long: 25m, 2h, 1h30m.")
]


def of_weights(config: Path | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The network settings of the weights that a config or flags start from, except those that the
    config or flags set themselves.

    Raises:
        UserError: there are no such weights, or a setting is wrong.
    """
    asked = Experiment.asked(config, flags)
    if not asked.get("weights"):
        return {}
    from resnetv2_cli.finetune import network_of

    network = network_of(Path(str(asked["weights"])))
    unsaid = {name: value for name, value in network.items() if name not in asked}
    return plans.of_shortcut(str(asked.get("shortcut", network.get("shortcut"))), unsaid)
