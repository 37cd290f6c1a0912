"""An ablation as its file keeps it, so that a report finds rows that have not begun too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resnetv2_cli.ablation.arms import Ablation, Arm, Line
from resnetv2_cli.ablation.studies import UNPUBLISHED, Study
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError
from resnetv2_cli.paper import FAIL, PaperTable, Row


def read(file: Path) -> Ablation:
    """An ablation as it was last written, its runs in whatever state they are.

    Raises:
        UserError: the file is none that an ablation leaves.
    """
    root = file.parent
    try:
        made = json.loads(file.read_text())
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        hint = "without it, the same resnetv2 ablate command writes it anew"
        raise UserError(f"{file} is not what an ablation leaves: {error!r}", hint) from None


def line_of(row: Mapping[str, Any], root: Path) -> Line:
    """A row as ``Ablation.write`` leaves it; an arm that has not begun is what it will be."""
    published = {"fail": FAIL, None: UNPUBLISHED}.get(row["published"], row["published"])
    kept = {key: row[key] for key in ("figure", "spread", "note", "baseline")}
    arms = []
    for place in row["arms"]:
        folder = root / place
        seed = int(folder.name.removeprefix("s"))
        asked = Experiment(**row.get("settings", {}), seed=seed)
        arms.append(Arm(row["name"], asked, folder))
    return Line(Row(row["name"], published, row.get("settings", {}), **kept), arms)
