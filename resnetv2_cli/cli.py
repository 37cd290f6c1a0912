"""The console script: the commands, and the one place where a user's mistakes are reported."""

import errno
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Annotated

import typer

from resnetv2_cli import __version__, console, files, lean, threads, trust
from resnetv2_cli.commands.app import app
from resnetv2_cli.errors import LAUNCHED, OfAll, Stopped, UserError
from resnetv2_cli.quantities import size
from resnetv2_cli.signals import SIGNALS

# isort: off
# Importing them adds their commands to the app; the help lists them in this order.
from resnetv2_cli.commands import train, predict, precise, verify, weights, export  # noqa: F401
from resnetv2_cli.commands import ablate, analyze, report, runs, data, bench, look  # noqa: F401
# isort: on


class Terminated(SystemExit):
    """SIGTERM where nothing else handles it; as a SystemExit, it ends a child process silently."""


def terminate(number: int, frame: FrameType | None) -> None:
    """Signal handler: exit with the status of the signal."""
    raise Terminated(SIGNALS[number])


@contextmanager
def terminating() -> Iterator[None]:
    """Meanwhile SIGTERM unwinds the stack, as Ctrl-C does: half-written files are removed."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def version(wanted: bool) -> None:
    """Print the version for ``--version``."""
    if wanted:
        print(f"resnetv2 {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    allow_code: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-code",
            metavar="MODULE:CLASS",
            help="Let a checkpoint or a config import this class of your own.",
        ),
    ] = None,
    _: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """For the help only: ``main`` handles ``debug`` and ``allow_code``, wherever they appear."""


def code_first(given: list[str]) -> list[str]:
    """The same words with every ``--allow-code NAME`` first, where the app looks for it.

    Raises:
        UserError: one has no name.
    """
    first: list[str] = []
    left: list[str] = []
    words = iter(given)
    for word in words:
        if word == "--allow-code":
            if (name := next(words, None)) is None:
                raise UserError(f"{word} names nothing", f"{word} mine:LearnedScale")
            first += [word, name]
        else:
            (first if word.startswith("--allow-code=") else left).append(word)
    return first + left


@contextmanager
def heard() -> Iterator[None]:
    """Meanwhile exit with UNHEARD when the reader of the output closes it, as ``head`` does: typer
    and rich would exit with 1, by which ``verify-resume`` says that it found a difference."""
    try:
        yield
    except SystemExit as left:
        if left.code == 1 and began_with(left, BrokenPipeError):
            with suppress(OSError):  # or Python, from 3.14 on, would flush it at exit, and fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
            sys.exit(UNHEARD)
        raise


DEBUG = "RESNETV2_DEBUG"  # environment variable


@heard()
def main(arguments: Iterable[str] | None = None) -> None:
    """The console script: every mistake of the user ends here, as one line and a hint."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with debugging("--debug" in words), leaving_whole():  # wherever it appears
        run([word for word in words if word != "--debug"])


@contextmanager
def debugging(asked: bool) -> Iterator[None]:
    """Meanwhile show tracebacks, if that is asked for, also in processes that are started."""
    before = os.environ.get(DEBUG)
    if asked:
        os.environ[DEBUG] = "1"
    try:
        yield
    finally:
        if asked and before is None:
            os.environ.pop(DEBUG, None)


@contextmanager
def leaving_whole() -> Iterator[None]:
    """Skip Python's shutdown when a launched process exits that is in a process group of
    torch.distributed. One was seen to abort with all its work done, perhaps in a thread of the
    group during the shutdown; Lightning then kills the process that launched it."""
    try:
        yield
    except SystemExit as left:
        group = sys.modules.get("torch.distributed")
        if child() and group and group.is_initialized():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(left.code if isinstance(left.code, int) else 0)
        raise


def run(given: list[str]) -> None:
    """Run a command, and report how it ended."""
    trust.admit(given)
    threads.settle()
    if not trust.some():  # the user's own code may use any metric
        lean.start()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns users without a home
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with terminating():
            status = app(code_first(given), standalone_mode=False)
        if status == SIGNALS[signal.SIGINT]:  # typer turns Ctrl-C into it
            console.note(INTERRUPTED)
        sys.exit(status)
    except (UserError, OSError) as error:
        if os.environ.get(DEBUG):
            raise
        if child() and isinstance(error, OfAll):
            sys.exit(0)  # the first process says it
        console.fail(of_the_system(error) if isinstance(error, OSError) else error)
        sys.exit(2)
    except Stopped as stopped:
        sys.exit(0 if child() else stopped.status)
    except BaseException as left:
        for kind, word, status in ENDS:
            if began_with(left, kind):
                console.note(word)
                sys.exit(status)
        if os.environ.get(DEBUG) or (said := mistake(left)) is None:
            raise
        if str(said):
            console.fail(said)
        sys.exit(2)


def mistake(error: BaseException) -> UserError | None:
    """The user's mistake behind an error that the tool did not raise itself: a wrong command line,
    full memory, or the user's own code; None for any other. An empty message: already reported."""
    if hasattr(error, "format_message"):  # click's, or of typer's copy of click
        said = error.format_message().rstrip(".").replace("Value error, ", "")  # pydantic's
        command = context.command_path if (context := getattr(error, "ctx", None)) else "resnetv2"
        return UserError(said[:1].lower() + said[1:], f"{command} --help")
    if memory_full(error):
        return UserError(f"the memory is full{more(error)}", LESS)
    own = sys.modules.get("resnetv2_cli.own")  # if not imported, nor is the user's code
    return own.blamed(error) if own and isinstance(error, Exception) else None


def child() -> bool:
    """Whether another process of the same run started this one: it would take a status other than 0
    for a crash."""
    return LAUNCHED in os.environ


def of_the_system(error: OSError) -> UserError:
    """The message for an error of the system: a full disk, a folder that is missing or belongs to
    another user. A partial file is called by its final name."""
    name = str(error.filename or "")
    file = name.removesuffix(files.PARTIAL)
    what = f"cannot write {file}: " if file != name else f"{name}: " if name else ""
    there = error.errno not in NOT_THERE
    hint = "what was saved before is kept" if there else "is its folder there, and is it yours?"
    return UserError(f"{what}{error.strerror or error}", hint)


NOT_THERE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)
LESS = "a smaller --batch-size; train also has --micro-batch auto and --recompute-bn"
FULL = re.compile("out of memory|can't allocate memory|_ALLOC_FAILED", re.IGNORECASE)


def memory_full(error: BaseException) -> bool:
    """Whether Python, PyTorch or a GPU library (cuBLAS, Triton) says that memory ran out."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or bool(FULL.search(str(error)))


def more(error: BaseException) -> str:
    """How much could not be allocated, if the error says: with a unit on a GPU, bytes on a CPU."""
    asked = re.search(r"tried to allocate (\d+(\.\d+ \w+)?)", str(error), re.IGNORECASE)
    if not asked:
        return ""
    return f": {asked[1] if asked[2] else size(int(asked[1]))} more were asked for"


UNHEARD = 141  # a shell's status for a process that SIGPIPE ended
INTERRUPTED = "interrupted"
ENDS = (
    (KeyboardInterrupt, INTERRUPTED, SIGNALS[signal.SIGINT]),
    (Terminated, "terminated", SIGNALS[signal.SIGTERM]),
)


def began_with(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an error is of that kind, or a framework raised it while handling one that is."""
    while error and not isinstance(error, kind):
        error = error.__context__
    return error is not None
