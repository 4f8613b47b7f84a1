"""The command line: `ddpm COMMAND --help`. Each file but `main` and `options` holds one command or a family of them.

A file defines add(commands), which adds its parsers, and a run function for each command, which turns words into
arguments, calls a program in `ddpm.run`, and prints the result. `main` finds the files by itself. Nothing here imports
torch until a command runs, so that help is quick.
"""

from ddpm.cli.main import main

__all__ = ["main"]
