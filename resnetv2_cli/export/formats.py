"""The export formats; each file is read back by the runtime that will use it.

To add a format: a row in FORMATS. Nothing imports torch until it is called, so that help is fast.
Files are opened here and libraries get bytes: some refuse a file name that is not UTF-8.
"""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from resnetv2_cli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from resnetv2_cli.export.fold import Exported

Metadata = dict[str, str]
Run = Callable[["Tensor"], "Tensor"]  # images (N, 3, H, W), 0 to 1 -> logits (N, classes)

INPUT, OUTPUT = "images", "logits"


class Format(NamedTuple):
    """``write`` and ``read`` a file; ``fold``: whether BN is folded by default; ``needs``: packages
    of the extra ``export``; ``use``: code that runs ``{file}`` on ``images`` (N, 3, size, size),
    0 to 1."""

    doc: str
    suffix: str
    fold: bool
    needs: tuple[str, ...]
    write: Callable[["Exported", "Tensor", Path, Metadata], None]
    read: Callable[["Exported", Path], Run]
    use: str


def write_safetensors(model: "Exported", example: "Tensor", path: Path, metadata: Metadata) -> None:
    """Write the weights, every tensor under its name."""
    from safetensors.torch import save

    # Only training uses the counters of batches, but --weights requires every tensor.
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    path.write_bytes(ordered(save(state, metadata)))  # save_file's own error is no OSError


def ordered(file: bytes) -> bytes:
    """A safetensors file with its metadata sorted by name. The library writes it in any order, so
    that the same weights would give different bytes each time."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def read_safetensors(model: "Exported", path: Path) -> Run:
    """The network with the weights of the file."""
    from safetensors.torch import load

    from resnetv2_cli.export.fold import blank

    other = blank(model)
    other.load_state_dict(load(path.read_bytes()))
    return other


def write_onnx(model: "Exported", example: "Tensor", path: Path, metadata: Metadata) -> None:
    """Write the graph made by PyTorch's exporter, checked by onnx."""
    import onnx
    import torch

    with quiet():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes={INPUT: {0: "batch"}},
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    for node in graph.graph.node:
        del node.metadata_props[:]  # the source lines that made it, with paths on this machine
    onnx.helper.set_model_props(graph, metadata)
    onnx.checker.check_model(graph, full_check=True)
    path.write_bytes(graph.SerializeToString())


def read_onnx(model: "Exported", path: Path) -> Run:
    """The graph in onnxruntime, on the CPU."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    content = path.read_bytes()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def write_torch_export(
    model: "Exported", example: "Tensor", path: Path, metadata: Metadata
) -> None:
    """Write the graph made by ``torch.export``."""
    import torch

    shapes = {INPUT: {0: torch.export.Dim("batch")}}
    with quiet():
        program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # has paths on this machine
    file = io.BytesIO()  # given a path, save insists on a suffix, and a full disk ends the process
    with quiet():
        torch.export.save(program, file, extra_files=metadata)  # type: ignore[arg-type]
    path.write_bytes(file.getbuffer())


def read_torch_export(model: "Exported", path: Path) -> Run:
    """The graph as ``torch.export.load`` returns it."""
    import torch

    with quiet(), path.open("rb") as file:
        return torch.export.load(file).module()  # type: ignore[arg-type]


FORMATS = {
    "safetensors": Format(
        "the weights alone, which --weights reads",
        ".safetensors",
        False,
        (),
        write_safetensors,
        read_safetensors,
        "# resnetv2 train --weights FILE trains on from it\n"
        "from pathlib import Path\n\nfrom resnetv2_cli.inference import network\n\n"
        "logits = network(Path({file}))(255 * images.permute(0, 2, 3, 1))",
    ),
    "onnx": Format(
        "a graph for onnxruntime and others",
        ".onnx",
        True,
        ("onnx", "onnxscript", "onnxruntime"),
        write_onnx,
        read_onnx,
        "import onnxruntime\n\nsession = onnxruntime.InferenceSession({file})\n"
        'logits = session.run(["logits"], {{"images": images}})[0]',
    ),
    "torch-export": Format(
        "a graph for torch.export.load",
        ".pt2",
        True,
        (),
        write_torch_export,
        read_torch_export,
        "import torch\n\nnet = torch.export.load({file}).module()\nlogits = net(images)",
    ),
}


def check_packages(format: str) -> None:
    """Check that the packages of a format are installed.

    Raises:
        UserError: one is not.
    """
    from importlib.util import find_spec

    missing = [name for name in FORMATS[format].needs if find_spec(name) is None]
    if missing:
        message = f"--format {format} needs {', '.join(missing)}"
        raise UserError(message, "pip install 'resnetv2-cli[export]'")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep exporters' messages to their own developers off the terminal and out of --json: some
    versions print them."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    said = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
