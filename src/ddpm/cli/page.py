"""`ddpm page`."""

import argparse
import os
import sys
from pathlib import Path

from ddpm.cli.options import MODEL, Commands, command, importing, number
from ddpm.errors import InputError, not_installed
from ddpm.presets import check


def add(commands: Commands) -> None:
    parser = command(
        commands, "page", run, "open a page to watch, edit and compress in the browser",
        "Start a server on this machine and print the address of its page. Only this machine reaches it, unless --host "
        "says otherwise. Ctrl-C ends it.",
        "ddpm page runs/digits",
    )  # fmt: skip
    parser.add_argument("models", nargs="*", metavar="RUN", help=f"{MODEL}; the page lists it first")
    address = "address to listen at; 0.0.0.0 opens the page to the network, with a token (default: this machine only)"
    parser.add_argument("--host", metavar="X", help=address)
    parser.add_argument("--port", **number(int, 8000), help="port; 0 is a free one (default: %(default)s)")
    parser.add_argument("--token", metavar="X", help="secret word in the page's address, which a visitor must know")
    parser.add_argument("--no-open", action="store_true", help="do not open the page in this machine's browser")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder of runs (default: %(default)s)")
    parser.add_argument("--device", default="auto", metavar="X", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")


def run(args: argparse.Namespace) -> int:
    check("--port", args.port, int, 0, 65535)
    if args.token is not None and not (
        args.token.isascii() and args.token.replace("-", "a").replace("_", "a").isalnum()
    ):
        raise InputError(f"--token {args.token!r}: want letters, digits, - and _")
    with importing():
        try:
            import starlette  # noqa: F401
            import uvicorn  # noqa: F401
        except ModuleNotFoundError as error:
            raise not_installed(error.name or "starlette", "page") from None
        from ddpm.files.opening import find
        from ddpm.page.server import serve
        from ddpm.page.state import State
        from ddpm.run.processes import pick_device
    for name in args.models:
        if not name.startswith("hf:") and not (Path(name) / "config.json").is_file():
            find(Path(name))
    desktop = sys.platform in ("darwin", "win32") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    show = desktop and sys.stdout.isatty() and not args.no_open  # a browser in the terminal would take it over
    serve(State(args.models, Path(args.runs), pick_device(args.device)), args.host, args.port, args.token, show)
    return 0
