"""The application that every command joins, and the options that several of them have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Deep residual networks with identity mappings (He, Zhang, Ren, Sun 2016).",
    epilog="Exit status: 0 done, or saved when --time was over; 1 verify-resume found a "
    "difference; 2 a mistake that the message explains, or a run of an ablation crashed or was "
    "stopped; 130, 143, 138, 140 saved and left on Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="A file of configs/; flags win over it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]
Format = Annotated[
    Literal["table", "json", "csv", "md"], typer.Option("--format", help="How results are shown.")
]
