"""Spelling and style of the pages, the README and all help texts, by codespell and proselint."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))


def help_texts() -> str:
    """What `ddpm --help` and `ddpm COMMAND --help` print."""
    from ddpm.cli.main import parser

    top = parser()
    commands = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction)).choices
    return "\n".join(p.format_help() for p in (top, *commands.values()))


def main() -> int:
    pages = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("[hrt]*/*.*")), ROOT / "README.md"]
    with tempfile.TemporaryDirectory() as folder:
        helps = Path(folder, "help.txt")
        helps.write_text(help_texts(), encoding="utf-8")
        files = [str(p) for p in (*pages, helps)]
        spelling = subprocess.run(
            [sys.executable, "-m", "codespell_lib", "--ignore-words", str(ROOT / "docs/words.txt"), *files]
        )
        style = subprocess.run(
            [sys.executable, "-m", "proselint", "check", "--config", str(ROOT / "docs/proselint.json"), *files]
        )
    return spelling.returncode or style.returncode


if __name__ == "__main__":
    sys.exit(main())
