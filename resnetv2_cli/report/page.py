"""One self-contained HTML file: tables with the paper's numbers, curves, analyses, every run."""

import json
import time
from collections import Counter
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from resnetv2_cli import __version__
from resnetv2_cli.compare import word
from resnetv2_cli.errors import UserError
from resnetv2_cli.files import write_text
from resnetv2_cli.inventory import Found, look
from resnetv2_cli.jsonfile import finite
from resnetv2_cli.plot import COLORS
from resnetv2_cli.report.charts import everything
from resnetv2_cli.report.facts import described, in_common
from resnetv2_cli.report.pictures import embedded
from resnetv2_cli.report.rows import study
from resnetv2_cli.runfolder import STATES
from resnetv2_cli.scales import YS
from resnetv2_cli.settings import flag_name

MOST_BYTES = 2_000_000
DARK = """
    #f1f2f4 #6cabeb #f0905a #69c08b #e3b341 #e07fc4 #4cc3d9 #ad98f5 #ee7f7f #b3c07a #f2a3cd #8fc1e3
""".split()  # COLORS in dark mode


def write(
    paths: list[Path], to: Path, detect: float, refresh: int = 0
) -> tuple[dict[str, int], bool]:
    """Write the page for some folders; return how many runs are in each state, and whether more is
    to come.

    ``detect``: points for which the needed number of seeds is given; ``refresh``: seconds after
    which the page reloads while runs are open, 0 for never. With it, folders without runs are
    accepted: more is to come.

    Raises:
        UserError: a folder does not exist, something in it cannot be read, or there is nothing to
            report and no ``refresh``.
    """
    found = look(paths)
    empty = not (found.ablations or found.every or found.analyses)
    if empty and not refresh:
        named = ", ".join(map(str, paths))
        raise UserError(f"nothing to report in {named}", "no run there has begun")
    states = Counter(run.state for run in found.every)
    html = render(found, detect, refresh if (more := found.open or empty) else 0, states)
    to.parent.mkdir(parents=True, exist_ok=True)
    write_text(to, html)
    return dict(states), more


def render(found: Found, detect: float, refresh: int, states: Counter[str]) -> str:
    """The page."""
    templates = Environment(
        loader=PackageLoader("resnetv2_cli.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    of_ablations, of_runs = everything(found)
    charts = [chart for some in [*of_ablations, of_runs] for chart in some]
    for i, chart in enumerate(charts):
        chart["id"] = i
    runs = found.every
    shared = in_common(runs)
    page = {
        "version": __version__,
        "written": time.strftime("%d %B %Y, %H:%M").lstrip("0"),
        "states": [(STATES[s], s, n) for s in STATES if (n := states[s])],
        "count": len(runs),
        "studies": [
            study(ablation, drawn, detect)
            for ablation, drawn in zip(found.ablations, of_ablations, strict=True)
        ],
        "loose": of_runs,
        "shared": [(flag_name(k), word(v)) for k, v in shared.items()],
        "runs": [described(run, shared) for run in runs if run.state != "waiting"],
        "hardware": sorted(
            {r.environment["hardware"] for r in runs if "hardware" in r.environment}
        ),
        "colors": list(zip(COLORS, DARK, strict=True)),
        "scales": YS,
        "data": json.dumps(
            finite({"refresh": refresh, "charts": charts, "scales": YS}), separators=(",", ":")
        ).replace("<", "\\u003c"),
    }
    template = templates.get_template("page.html.j2")
    room = MOST_BYTES - len(template.render(**page, analyses=[]).encode(errors="replace")) - 10_000
    html = template.render(**page, analyses=embedded(found.analyses, room))
    return html.encode(errors="replace").decode()  # file names need not be text
