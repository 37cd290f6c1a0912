"""The files that a network can leave as; each is read back by what will run it.

To add a format: a row in FORMATS. Nothing needs torch before it is called, so that help comes at
once. Files are opened here, and libraries get their bytes: some refuse a name that is no UTF-8.
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
    """``write`` and ``read`` a file; ``fold``: whether BN is folded unless it is said otherwise;
    ``needs``: packages of the extra ``export``; ``use``: how ``{file}`` is run on images
    (N, 3, size, size), 0 to 1."""

    doc: str
    suffix: str
    fold: bool
    needs: tuple[str, ...]
    write: Callable[["Exported", "Tensor", Path, Metadata], None]
    read: Callable[["Exported", Path], Run]
    use: str


def write_safetensors(model: "Exported", example: "Tensor", path: Path, metadata: Metadata) -> None:
    """The weights, every tensor by its name."""
    from safetensors.torch import save

    # Counters of batches are the training's alone, but --weights wants every tensor.
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    path.write_bytes(ordered(save(state, metadata)))  # save_file raises an error that is no OSError


def ordered(file: bytes) -> bytes:
    """A safetensors file with its metadata in the order of their names. They are written in any, so
    that the bytes of the same weights were others each time."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin where 8 divides
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def read_safetensors(model: "Exported", path: Path) -> Run:
    """The network with the weights of the file."""
    from safetensors.torch import load

    from resnetv2_cli.export.fold import blank

    other = blank(model)
    other.load_state_dict(load(path.read_bytes()))
    return other


def write_onnx(model: "Exported", example: "Tensor", path: Path, metadata: Metadata) -> None:
    """The graph by PyTorch's exporter, checked by onnx."""
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
        del node.metadata_props[:]  # which lines of which files made it, on this machine
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
    """The graph as ``torch.export`` has it."""
    import torch

    shapes = {INPUT: {0: torch.export.Dim("batch")}}
    with quiet():
        program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # of files on this machine
    file = io.BytesIO()  # by its name it would insist on a suffix; a full disk would end it all
    with quiet():
        torch.export.save(program, file, extra_files=metadata)  # type: ignore[arg-type]
    path.write_bytes(file.getbuffer())


def read_torch_export(model: "Exported", path: Path) -> Run:
    """The graph as ``torch.export.load`` gives it."""
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
    """
    Raises:
        UserError: a package that the format needs is not installed.
    """
    from importlib.util import find_spec

    missing = [name for name in FORMATS[format].needs if find_spec(name) is None]
    if missing:
        message = f"--format {format} needs {', '.join(missing)}"
        raise UserError(message, "pip install 'resnetv2-cli[export]'")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what exporters say to their own developers off the terminal, and out of --json: some
    versions print."""
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
