"""The entry point: it parses a command, runs it, and turns an error into one line and an exit code."""

import argparse
import errno
import importlib
import os
import pkgutil
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from ddpm import cli
from ddpm.cli.options import Help, Parser
from ddpm.errors import InputError, Stopped, one_line
from ddpm.files.atomic import CannotWrite
from ddpm.version import __version__

FIRST = ("train", "sample", "evaluate")
"""The files whose commands come first in `ddpm --help`; the others follow by name."""

REFUSED = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG, errno.EISDIR,
    errno.ELOOP,
}  # fmt: skip
"""Errors of the operating system that are not our fault. A missing file may be our fault, so it is not among them."""


SEVERAL = ("train", "distill", "sample", "evaluate", "calibrate", "paper", "compress")
"""The commands that torchrun runs in several processes. They tell each other of a mistake."""


@cache
def parser() -> Parser:
    """The parser of all commands, from the files of this package. A process builds it once."""
    top = Parser(
        prog="ddpm",
        usage="ddpm COMMAND ...",
        description="Denoising Diffusion Probabilistic Models: train, sample, measure, edit and compress.",
        epilog="`ddpm COMMAND --help` describes a command.\n\nexample:\n  ddpm sample digits -n 16 --out digits.png",
        formatter_class=Help,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"ddpm {__version__}")
    commands = top.add_subparsers(title="commands", dest="command", metavar="COMMAND", prog="ddpm")
    names = {module.name for module in pkgutil.iter_modules(cli.__path__)} - {"main", "options"}
    for name in [*FIRST, *sorted(names - set(FIRST))]:
        importlib.import_module(f"ddpm.cli.{name}").add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 is success, 1 a run that cannot go on, 2 a user's mistake, 130 Ctrl-C, and 143 SIGTERM in training.

    >>> main(["train", "cifra10"])
    2
    """
    with _process_state(), _patience():
        return _run(list(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    top = parser()
    commands: dict[str, Parser] = next(a.choices for a in top._actions if isinstance(a, argparse._SubParsersAction))
    command = top
    try:
        args, unknown = top.parse_known_args(arguments)
        command = commands.get(args.command, top)
        if unknown:
            raise command.unknown(unknown)
        if args.command is None:
            raise InputError(f"no command; want {', '.join(commands)}; see `ddpm --help`")
        code: int = args.run_command(args)
        sys.stdout.flush()  # here, where a full disk is reported
        return code
    except InputError as error:
        line = _as_option(str(error), command, arguments)
        _ends_itself()
        if _among_others() and arguments and arguments[0] in SEVERAL and not hasattr(error, "shared"):
            from ddpm.run.processes import tell

            error = tell(line)
            line = str(error)
        return _fail(2, line, getattr(error, "shared", True))
    except Stopped as error:
        _ends_itself()
        return _fail(1, str(error), getattr(error, "shared", True))
    except OSError as error:
        if error.errno is None or (error.errno not in REFUSED and not isinstance(error, CannotWrite)):
            raise
        reason = "the disk is full" if error.errno == errno.ENOSPC else os.strerror(error.errno).lower()
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else arguments[0]
        code = 2 if error.errno == errno.ENAMETOOLONG else 1
        return _fail(code, f"{reason} ({name if len(name) < 200 else name[:80] + '...'})")
    except (RuntimeError, MemoryError) as error:
        full = ("out of memory", "can't allocate memory", "not enough memory")
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in full):
            raise
        less = "use a smaller --batch-size, and in training also --accumulate or --gradient-checkpointing"
        return _fail(1, f"the memory is full; {less}")
    except KeyboardInterrupt as error:
        return _fail(130, "; ".join(["interrupted", *map(str, error.args)]))


def _among_others() -> bool:
    """Whether torchrun started this process with others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def _patience() -> Iterator[None]:
    """Under torchrun, let SIGTERM end this process after 5 seconds, not at once.

    torchrun sends it when one process has ended. If the reason was a mistake that all have made, this process is about
    to end by itself, with its own line and code.
    """
    if not _among_others() or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end_later(number: int, _: object) -> None:
        timer = threading.Timer(5, os._exit, [128 + number])
        timer.daemon = True
        timer.start()

    before = signal.signal(signal.SIGTERM, end_later)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end_later:
            signal.signal(signal.SIGTERM, before)


def _ends_itself() -> None:
    """Ignore torchrun's SIGTERM from now on, also while Python ends, when `_patience` is over."""
    if _among_others():
        with suppress(ValueError):  # outside the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _fail(code: int, message: str, prints: bool = True) -> int:
    """Print the line about an error as the last one, below warnings and progress bars, and return the exit code.

    prints  whether this process prints it, and no other one of torchrun
    """
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):  # the error may still hold the loop that would close it
            bar.close()
    if "ddpm.run.progress" in sys.modules:
        sys.modules["ddpm.run.progress"].close_all()
    if prints:
        print(f"ddpm: {one_line(message)}", file=sys.stderr)
    return code


def _as_option(message: str, command: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    """The message with a leading name of a setting, as the library says it, as the option of the command line.

    A first word that the user typed is a path or a value, and stays.

    >>> command = Parser()
    >>> _ = command.add_argument("--batch-size")
    >>> _as_option("batch_size 0: want at least 1", command, ["train"])
    '--batch-size 0: want at least 1'
    """
    word = re.match(r"[a-zA-Z_0-9]+(?=[ :,])", message)
    option = f"--{word[0].replace('_', '-')}" if word else ""
    known = any(option in action.option_strings for action in command._actions)
    return option + message[len(word[0]) :] if word and known and word[0] not in arguments else message


class _Warnings:
    """Prints each warning of a command once. Notes of conversions are one if only their count and first file differ."""

    def __init__(self) -> None:
        self._said = set[str]()

    def __call__(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        from tqdm import tqdm  # tqdm.write prints above a progress bar, not into it

        said = re.sub(r": (?:[\d,]+ )?images?: (.*); the first: .*", r": \1", str(message))
        if issubclass(category, UserWarning) and said not in self._said:
            self._said.add(said)
            tqdm.write(f"warning: {one_line(str(message))}", file=sys.stderr)


class _Output:
    """A standard stream that ends no command: what a closed pipe or another encoding cannot take is dropped or escaped.

    Only a full disk, or another failure of standard output that loses results, raises an error.
    """

    def __init__(self, stream: Any, *, results: bool) -> None:
        self._stream, self._results = open(os.devnull, "w") if stream is None else stream, results

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            self._stream.write(text.encode(self._stream.encoding, "backslashreplace").decode(self._stream.encoding))
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if self._results and error.errno != errno.EPIPE:
            raise error
        with suppress(OSError, ValueError):  # what is left in its buffer would be an error again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _process_state() -> Iterator[None]:
    """What a command sets in this process: standard streams, warnings and OpenMP's setting. All of it is put back."""
    for descriptor in range(3):  # a closed one would be given to the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    streams, spins = (sys.stdout, sys.stderr), os.environ.get("GOMP_SPINCOUNT")
    if spins is None and "OMP_WAIT_POLICY" not in os.environ:  # OpenMP reads them when torch is imported
        # A waiting thread spins briefly and then sleeps. Without this it spins for long at every layer, and small
        # networks train 5 times slower if other programs use the cores.
        os.environ["GOMP_SPINCOUNT"] = "1000"
    sys.stdout, sys.stderr = _Output(sys.stdout, results=True), _Output(sys.stderr, results=False)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _Warnings()
            warnings.filterwarnings("default", category=UserWarning, module=r"ddpm\b")  # they are this program's output
            yield
    finally:
        sys.stdout, sys.stderr = streams
        if spins is None:
            os.environ.pop("GOMP_SPINCOUNT", None)
