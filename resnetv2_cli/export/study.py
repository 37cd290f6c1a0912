"""One export, from the checkpoint to the card beside the file."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from resnetv2_cli import __version__
from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.module import view_of
from resnetv2_cli.data.protocols import View
from resnetv2_cli.describe import parameters
from resnetv2_cli.errors import UserError
from resnetv2_cli.export.card import Facts, card
from resnetv2_cli.export.check import Agreement, written
from resnetv2_cli.export.fold import exported
from resnetv2_cli.export.formats import FORMATS, INPUT, OUTPUT, check_packages
from resnetv2_cli.files import write_text
from resnetv2_cli.inference import network_of
from resnetv2_cli.runfolder import RunFolder, refuse_needed
from resnetv2_cli.weightfile import sha256

FOLDED = (  # how to read folded weights, which no network here has
    "from safetensors.torch import load_file\n\nweights = load_file({file})"
)


@dataclass(frozen=True)
class Export:
    """What was written, and how it compares with the network."""

    file: Path
    card: Path
    size: int  # bytes
    norms: int  # BN layers of the network
    folded: list[str]  # names of those folded
    agreement: Agreement

    def as_json(self) -> dict[str, Any]:
        paths = {"file": str(self.file), "card": str(self.card), "sha256": sha256(self.file)}
        counts = {"bytes": self.size, "bn": self.norms, "folded": self.folded}
        return {**paths, **counts, "check": self.agreement._asdict()}


def export(
    path: Path, format: str, output: Path | None, fold: bool | None, data_dir: str | None
) -> Export:
    """Write a checkpoint's network as a file of the given format, with a card beside it.

    Raises:
        UserError: a package is missing, ``output`` is a file that a run needs or the checkpoint
            itself, or the file computes something else; nothing is left.
    """
    check_packages(format)
    row = FORMATS[format]
    overrides = {"precision": "32-true"} | ({"data_dir": data_dir} if data_dir else {})
    saved = checkpoints.network(path)
    task = network_of(saved, path, **overrides)
    trained = Experiment(**checkpoints.settings_of(saved))  # task's engine is this machine's
    run = RunFolder.of(path)
    to = output or run.path / "export" / f"{path.stem}{row.suffix}"
    if to.is_dir():
        raise UserError(f"{to} is a folder", f"name a file, such as network{row.suffix}")
    refuse_needed(to)
    if to.resolve() == path.resolve():
        raise UserError(f"{to} is the file being exported", "name another file with --output")
    model, folded = exported(task, row.fold if fold is None else fold)
    view = view_of(task.experiment, task.normalize)._replace(ten=False)
    use = FOLDED if folded and format == "safetensors" else row.use
    agreement = written(task, model, format, view, to, metadata(saved, trained, folded, view))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in task.net.modules())
    size = to.stat().st_size
    facts = Facts(
        experiment=trained,
        classes=task.classes,
        parameters=parameters(task.net),
        step=saved["global_step"],
        precise=saved.get(checkpoints.PRECISE, 0),
        imported=saved.get("imported", {}),
        run=run.path if run.begun else None,
        file=to.name,
        bytes=size,
        sha256=sha256(to),
        check=str(agreement),
        preprocessing=preprocessing(view),
        use=use.format(file=quoted(to.name)),
    )
    beside = to.with_name(to.name + ".md")
    write_text(beside, card(facts))
    return Export(to, beside, size, norms, folded, agreement)


def quoted(name: str) -> str:
    """A name as a Python string literal, in double quotes unless it contains one."""
    said = repr(name)
    return said if '"' in name else f'"{said[1:-1]}"'


def preprocessing(view: View) -> str:
    """How an image is preprocessed for the network, in words."""
    size = view.side
    return (
        f"The input is RGB, float32 from 0 to 1, of the shape (N, 3, {size}, {size}), any N: an "
        f"image whose shorter side is resized to {view.shorter} (bicubic, antialiased) "
        f"and whose middle {size}x{size} is cropped. Normalization is in the network."
    )


def metadata(
    saved: dict[str, Any], trained: Experiment, folded: list[str], view: View
) -> dict[str, str]:
    """The metadata of a file: plain text, or JSON where a value is more than a word."""
    size = view.side
    shape = {"name": INPUT, "shape": ["N", 3, size, size], "colors": "RGB", "range": [0, 1]}
    resize = {"shorter_side": view.shorter, "interpolation": "bicubic", "crop": size}
    # Paths of images and weights on this machine concern nobody else.
    weights = Path(trained.weights).name if trained.weights else None
    told = replace(trained, data_dir=Experiment.data_dir, weights=weights)
    origin = {"imported": json.dumps(saved["imported"])} if "imported" in saved else {}
    return origin | {
        "format": "pt",
        "made_by": f"resnetv2-cli {__version__}",
        "experiment": json.dumps(asdict(told)),
        "classes": json.dumps(saved["classes"]),
        "global_step": json.dumps(saved["global_step"]),
        "folded": json.dumps(folded),
        "input": json.dumps(shape | {"resize": resize, "normalized": "in the network"}),
        "output": json.dumps({"name": OUTPUT, "shape": ["N", len(saved["classes"])]}),
    }
