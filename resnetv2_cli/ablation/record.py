"""The file of an ablation, from which a report also knows rows that have not begun."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from resnetv2_cli import jsonfile
from resnetv2_cli.ablation.arms import Ablation, Arm, Line
from resnetv2_cli.ablation.studies import Study, unusual
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.protocols import PROTOCOLS
from resnetv2_cli.errors import UserError
from resnetv2_cli.jsonfile import is_number
from resnetv2_cli.locks import in_turn
from resnetv2_cli.paper import FAIL, PaperTable, Row
from resnetv2_cli.runfolder import RunFolder
from resnetv2_cli.settings import renewed


def write(ablation: Ablation) -> None:
    """Write an ablation's file. Another ablation of the same folder may do so too."""
    ablation.root.mkdir(parents=True, exist_ok=True)
    with in_turn(ablation.root):
        _write(ablation)


def _write(ablation: Ablation) -> None:
    before = recorded(ablation.file)
    rows = [
        {
            **described(line.row),
            "settings": unusual(asdict(replace(line.arms[0].experiment, seed=0))),
            "arms": runs(ablation.root, line, before.get(line.row.name, [])),
        }
        for line in ablation.lines
    ]
    jsonfile.write(
        ablation.file,
        {
            "title": ablation.title,
            "scale": ablation.scale,
            "protocol": ablation.protocol,
            "comparable": ablation.comparable,
            "panels": ablation.study.table.panels,
            "rows": rows,
        },
    )


def described(row: Row) -> dict[str, Any]:
    """What the paper says of a row, as plain values."""
    return {
        "name": row.name,
        "figure": row.figure,
        "published": number(row.published),
        "spread": row.spread,
        "note": row.note,
        "baseline": row.baseline,
        "tested": row.tested,
        "top5": row.top5,
    }


def runs(root: Path, line: Line, before: list[str]) -> list[str]:
    """The folders of a row's runs, and of runs that the record had before and that have begun."""
    ours = [str(arm.folder.relative_to(root)) for arm in line.arms]
    begun = [place for place in before if RunFolder(root / place).begun]
    return list(dict.fromkeys([*ours, *begun]))


def recorded(file: Path) -> dict[str, list[str]]:
    """The folders of each row's runs in the file of an ablation; empty if there is none."""
    try:
        rows = jsonfile.mapping(file).get("rows", [])
        return {str(row["name"]): [str(place) for place in row["arms"]] for row in rows}
    except (KeyError, TypeError):
        return {}


def number(error: float | None) -> float | str | None:
    """An error for JSON: percent, ``"fail"``, or null where there is none."""
    return "fail" if error == FAIL else error


def read(file: Path) -> Ablation:
    """An ablation as last written, with its runs in whatever state they are now.

    Raises:
        UserError: the file is not one that ``write`` leaves.
    """
    root = file.parent
    try:
        made = json.loads(file.read_bytes())
        lines = [line_of(row, root) for row in made["rows"]]
        table = PaperTable(
            made["title"].splitlines()[0], {}, tuple(line.row for line in lines), made["panels"]
        )
        return Ablation(
            Study(file.stem.removeprefix("ablation-"), table),
            lines,
            root,
            *(made[key] for key in ("title", "scale", "protocol", "comparable")),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        hint = "remove it, and the same resnetv2 ablate command writes it again"
        raise UserError(f"{file} is not what an ablation leaves: {error!r}", hint) from None


def line_of(row: Mapping[str, Any], root: Path) -> Line:
    """A row as ``write`` leaves it; each arm has the settings that it runs or will run with."""
    published = FAIL if row["published"] == "fail" else row["published"]
    kept: dict[str, Any] = {k: row[k] for k in ("figure", "spread", "note", "baseline")}
    tested, top5 = row.get("tested", ""), row.get("top5")  # earlier versions did not write these
    if tested not in ("", *PROTOCOLS) or not (top5 is None or is_number(top5)):
        raise ValueError(f"{row['name']}: {tested!r}, {top5!r}")
    settings = renewed(row.get("settings", {}))
    arms = []
    for place in row["arms"]:
        folder = root / place
        seed = int(folder.name.removeprefix("s"))
        asked = Experiment(**settings, seed=seed)
        arms.append(Arm(row["name"], asked, folder, tested=tested))
    if not arms:
        raise ValueError(f"{row['name']} has no runs")
    return Line(Row(row["name"], published, settings, top5=top5, tested=tested, **kept), arms)


def named(study: str, lines: list[Line], root: Path) -> str:
    """A study's name with a digest of its rows and their experiments, so that no ablation writes
    over another's files; the name alone if an earlier version left a file of that name with exactly
    these rows."""
    rows = {line.row.name: line.arms[0].folder.parent.name for line in lines}
    before = recorded(root / f"ablation-{study}.json")
    if rows == {name: Path(*places[:1]).parent.name for name, places in before.items()}:
        return study
    made = repr(rows).encode()
    return f"{study}-{hashlib.sha256(made).hexdigest()[:6]}"
