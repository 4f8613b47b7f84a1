"""`ddpm page`."""

import argparse
import os
import sys
from pathlib import Path

from ddpm.cli.options import MODEL, Commands, add_device, add_general, command, importing, number
from ddpm.errors import InputError, not_installed
from ddpm.presets import check


def add(commands: Commands) -> None:
    parser = command(
        commands, "page", run, "open a page in the browser to watch runs, sample, edit and compress",
        "Start a server on this machine and print the address of its page. Only this machine reaches it, unless --host "
        "says otherwise. Ctrl-C ends it.",
        "ddpm page digits",
    )  # fmt: skip
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{MODEL}; the page lists it first")
    group = parser.add_argument_group("page", "what it shows, and who reaches it")
    group.add_argument("--runs", default="runs", metavar="FOLDER", help="folder of runs to show (default: %(default)s)")
    group.add_argument("--no-open", action="store_true", help="do not open the page in this machine's browser")
    group.add_argument("--port", **number(int, 8000), help="port to listen at; 0 is a free one (default: %(default)s)")
    address = "address to listen at; 0.0.0.0 opens the page to the network, with a token (default: this machine only)"
    group.add_argument("--host", metavar="ADDRESS", help=address)
    token = "secret word in the page's address, which a visitor must know (default: a random one, if --host is given)"
    group.add_argument("--token", metavar="WORD", help=token)
    add_device(parser.add_argument_group("machine", "where the network runs"))
    add_general(parser, json=False)


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
        from ddpm.files.interop import is_diffusers
        from ddpm.files.opening import find
        from ddpm.page.server import serve
        from ddpm.page.state import State
        from ddpm.run.processes import pick_device
    for name in args.models:
        if not (name.startswith("hf:") or is_diffusers(Path(name)) or (Path(name) / "config.json").is_file()):
            find(Path(name))
    desktop = sys.platform in ("darwin", "win32") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    show = desktop and sys.stdout.isatty() and not args.no_open  # a browser in the terminal would take it over
    serve(State(args.models, Path(args.runs), pick_device(args.device)), args.host, args.port, args.token, show)
    return 0
