"""``verify-resume``."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from resnetv2_cli import console
from resnetv2_cli.commands.app import Config, Json, app, of_weights
from resnetv2_cli.flags import with_flags
from resnetv2_cli.quantities import NONE


@app.command("verify-resume", rich_help_panel="Train")
@with_flags()
def verify_resume(
    config: Config = None,
    kills: Annotated[int, typer.Option(help="How often a run is killed.", min=1)] = 3,
    moments: Annotated[int, typer.Option(help="Seed of the moments at which it is killed.")] = 0,
    json: Json = False,
    **flags: Any,
) -> None:
    """Show that a run that is killed and continued ends with the same bits as one that is not.

    It runs a few iterations of the training that the flags describe, on this machine, five times
    or more: twice uninterrupted; killed (SIGKILL) at random moments; and stopped by SIGTERM. Exit
    status: 0 if all end with the same bits, else 1.

    For instance: resnetv2 verify-resume --dataset digits --depth 20
    """
    from resnetv2_cli.verify import short, verify

    experiment = short(config, of_weights(config, flags) | flags)
    with tempfile.TemporaryDirectory(prefix="resnetv2-verify-") as root:
        made = verify(experiment, Path(root), kills, console.note, moments)
    exact = all(not row[part] for row in made for part in row if part not in WORDS)
    if json:
        console.as_json({"exact": exact, "runs": made})
    else:
        show(made, exact)
    raise typer.Exit(0 if exact else 1)


WORDS = ("stopped by", "went on after")


def show(made: list[dict[str, Any]], exact: bool) -> None:
    """The verdicts as a table."""
    parts = [name for name in made[0] if name not in WORDS]
    columns = [*WORDS, "the same", "differs"]
    rows = [
        [row["stopped by"], ", ".join(map(str, row["went on after"])) or NONE]
        + [", ".join(p for p in parts if bool(row[p]) is differs) for differs in (False, True)]
        for row in made
    ]
    console.table("Beside a run that was never stopped", columns, rows)
    for row in made:
        for part in parts:
            if row[part]:
                console.note(f"{row['stopped by']}: {part} differs at {row[part]}")
    if exact:
        console.say("every run ended with the same bits")
    elif any(made[0][part] for part in parts):
        console.note("hint: even two runs that are not stopped differ here: try --deterministic")
