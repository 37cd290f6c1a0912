"""The package is a stack: a module imports only from modules above it in ORDER."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import resnetv2_cli

ORDER = """
    signals errors telling quantities ownname trust threads lean memory locks files jsonfile
    settings plans paper
    native fused triton_joined joined triton_augment
    own layers shortcuts units resnet compiling graphs
    data.catalog data.protocols
    weightfile recipes options config flags
    data.picture data.archive data.images
    data.turbo data.crop data.order data.augment data.colors data.shards data.folder
    data.prepare data.survey data.sortval data.workers data.module
    optim nonfinite anatomy describe
    footprint
    manifest runfolder csvlog
    form checkpoint source difference
    foreign.names foreign.sources foreign.files foreign.convert
    iteration task finetune callbacks leaving
    scales plot blueprint
    cluster syncbn machine resume run evaluation precise verify
    stats
    ablation.studies ablation.arms ablation.record ablation.planning ablation.launch
    ablation.sweep ablation.progress ablation.tables ablation.probe
    inventory compare
    inference sheet
    export.fold export.formats export.check export.card export.hub export.study display console
    bench.turns bench.plain bench.floor bench.draw bench.step bench.train bench.data
    analysis.topics analysis.trace analysis.subject analysis.draw analysis.forward
    analysis.backward analysis.shrink analysis.paths analysis.lesion analysis.study
    figures
    report.charts report.rows report.facts report.pictures report.page
    commands.app commands.train commands.predict commands.precise commands.verify commands.weights
    commands.export commands.ablate commands.analyze commands.bench commands.look commands.runs
    commands.report commands.data
    cli
""".split()
HEAVY = ("torch", "lightning", "torchvision", "torchmetrics", "matplotlib", "sklearn", "numpy")
PACKAGE = Path(resnetv2_cli.__file__).parent
MODULES = [p for p in PACKAGE.rglob("*.py") if not p.stem.startswith("_")]


def name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(text: str, module: str) -> set[str]:
    """The package's modules that this one imports; of other names, the module that holds them."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = f"resnetv2_cli.{module}".split(".")[: -node.level] if node.level else []
            names = [".".join(filter(None, (*above, node.module, a.name))) for a in node.names]
        else:
            continue
        inside = [n.removeprefix("resnetv2_cli.") for n in names if n.startswith("resnetv2_cli.")]
        found |= {n if n in ORDER else n.rpartition(".")[0] for n in inside} - {""}
    return found


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_point_up(path):
    module = name(path)
    assert imported(path.read_text(), module) <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize(
    "line",
    [
        "import resnetv2_cli.task",
        "from resnetv2_cli import task",
        "from resnetv2_cli.task import Scores",
        "from .. import task",
        "from ..task import Scores",
    ],
)
def test_an_import_is_seen_in_every_spelling(line):
    assert imported(line, "data.order") == {"task"}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_only_the_edge_prints(path):
    calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    printing = [c for c in calls if isinstance(c, ast.Name) and c.id == "print"]
    assert not printing or name(path).split(".")[0] in ("console", "commands", "cli")


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_text_is_in_the_encoding_of_whoever_runs_it(path):
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    texts = [c for c in calls if getattr(c.func, "attr", "") in ("read_text", "write_text")]
    assert all("encoding" in {k.arg for k in c.keywords} for c in texts)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["list"], ["--version"]])
def test_help_waits_for_nothing_heavy(arguments):
    code = f"""
import sys
from resnetv2_cli.cli import main
try: main({arguments})
except SystemExit: pass
sys.exit(",".join(m for m in {HEAVY} if m in sys.modules) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_comes_at_once(resnetv2):
    """In under 0.6 s of CPU time, of which it uses 0.3 s, and which a busy machine stretches less
    than wall time. The best of five counts, as the first may have to compile the modules."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        resnetv2("--help", env={"PYTHONDONTWRITEBYTECODE": ""})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.6
