"""Pages that are written from the program: every command from its parser, every setting from `ddpm.presets`."""

import argparse
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from ddpm.catalog import schedules
from ddpm.cli.main import parser
from ddpm.presets import GROUPS, PRESETS, Preset, types_of_settings

FAMILIES = {
    "Make a model": ("train", "distill", "average", "calibrate", "export", "import"),
    "Make and change pictures": ("sample", "edit", "interpolate", "inpaint", "restore", "page"),
    "Measure": ("evaluate", "compare", "paper", "report", "info", "data"),
    "Compress": ("compress", "decompress", "inspect"),
}
BY_CODE = ("class_names", "details")
"""Fields of Preset that no option sets: training or an import writes them."""


def escaped(text: str) -> str:
    """Text of a help line as Markdown: `code` stays, and what else would be markup is escaped."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if i % 2 else re.sub(r"([\\*_|<>\[$`])", r"\\\1", part) for i, part in enumerate(parts))


def _help(action: argparse.Action, top: argparse.ArgumentParser) -> str:
    return (action.help or "") % {**vars(action), "prog": top.prog}


def _option(action: argparse.Action, top: argparse.ArgumentParser) -> list[str]:
    value = ""
    if action.nargs != 0:
        metavar = action.metavar or action.dest.upper()
        value = f" {metavar if isinstance(metavar, str) else ' '.join(metavar)}"
        value += " ..." if action.nargs in ("+", "*") else ""
    names = ", ".join(f"{name}{value}" for name in action.option_strings) or value.strip()
    return [f":::{{option}} {names}", escaped(_help(action, top)), ":::", ""]


def command_page(command: argparse.ArgumentParser) -> str:
    """One command as a page."""
    name = command.prog.split()[-1]
    lines = [f"# ddpm {name}", "", escaped(command.description or ""), ""]
    epilog = (command.epilog or "").removeprefix("example:").strip()
    lines += [
        "```sh",
        *(line.strip() for line in epilog.splitlines()),
        "```",
        "",
        f":::{{program}} ddpm {name}",
        ":::",
        "",
    ]
    for group in command._action_groups:
        actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS and "--help" not in a.option_strings]
        if not actions:
            continue
        lines += [f"## {(group.title or '').capitalize()}", ""]
        about, _, table = (group.description or "").partition("\n\n")
        if about:
            lines += [escaped(about[0].upper() + about[1:]) + ".", ""]
        if table:
            lines += ["```text", inspect.cleandoc(table), "```", ""]
        for action in actions:
            lines += _option(action, command)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value)) if len(value) == 2 and min(value) >= 8 else ",".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def _range(field: Any, hint: Any) -> str:
    least, most = field.metadata["least"], field.metadata["most"]
    choices = field.metadata["choices"] or [a for a in get_args(hint) if isinstance(a, (str, int))]
    if field.name == "schedule":
        choices = list(schedules())
    if choices and most is None:
        return ", ".join(map(str, choices))
    if hint is bool:
        return "yes, no"
    if least is None and most is None:
        return field.metadata["value"] or "text"
    return f"{least:,} to {most:,}" if most is not None else f"at least {least:,}"


def settings_page() -> str:
    """Every setting of a preset: meaning, range, default; and what each preset changes."""
    hints = types_of_settings()
    lines = [
        "# Settings and presets",
        "",
        "A *setting* is a field of `ddpm.Preset`. Each one is an option of `ddpm train`, a keyword of `ddpm.train`, "
        "and a line of a `--config` file. In an option, a hyphen takes the place of the underscore: `batch_size` is "
        "`--batch-size`. A switch has a second form that turns it off: `--no-flip`. The default is the value of the "
        "preset `cifar10`, which is the paper's. A setting with *resume* can be changed when a run goes on.",
        "",
    ]
    for group, about in GROUPS.items():
        lines += [f"## {group.capitalize()}", "", f"{about[0].upper()}{about[1:]}.", ""]
        lines += ["| setting | meaning | range | default | resume |", "|---|---|---|---|---|"]
        for f in fields(Preset):
            if f.metadata.get("group") != group or f.name in BY_CODE:
                continue
            resume = "yes" if f.metadata["resume"] else ""
            default = _shown(getattr(PRESETS["cifar10"], f.name))
            row = (
                f"`{f.name}`",
                escaped(f.metadata["help"]),
                escaped(_range(f, hints[f.name])),
                escaped(default),
                resume,
            )
            lines.append(f"| {' | '.join(row)} |")
        lines.append("")
    lines += [
        "## What each preset changes", "", "All other settings have the defaults above. "
        "[Choose a preset](../howto/presets.md) says what each preset is for.", "",
    ]  # fmt: skip
    for name, preset in PRESETS.items():
        changed = [
            f for f in fields(Preset) if getattr(preset, f.name) != getattr(Preset(data="uoft-cs/cifar10"), f.name)
        ]
        lines += [f"### {name}", ""]
        lines += [
            ", ".join(f"`{f.name}` {escaped(_shown(getattr(preset, f.name)))}" for f in changed) or "Nothing.",
            "",
        ]
    return "\n".join(lines)


def commands_page(commands: dict[str, argparse.ArgumentParser], helps: dict[str, str]) -> str:
    lines = [
        "# Commands", "", "`ddpm COMMAND --help` prints the same text as these pages, which are made from the program "
        "itself. `ddpm --version` prints the version.", "",
    ]  # fmt: skip
    families = {family: [name for name in names if name in commands] for family, names in FAMILIES.items()}
    listed = {name for names in families.values() for name in names}
    families |= {"Others": [name for name in commands if name not in listed]} if set(commands) - listed else {}
    told = [name for names in families.values() for name in names]
    for family, names in families.items():
        lines += [f"## {family}", "", "| command | what it does |", "|---|---|"]
        lines += [f"| [ddpm {name}](command-{name}.md) | {escaped(helps[name])} |" for name in names]
        lines.append("")
    lines += [
        "## Exit codes", "", "| code | meaning |", "|---|---|", "| 0 | success |", "| 1 | a run that cannot go on |",
        "| 2 | a mistake in the command, its files or its data; one line says what would be accepted |",
        "| 130 | Ctrl-C |", "| 143 | SIGTERM in training, after the run was saved |", "",
        "```{toctree}", ":hidden:", "", *(f"command-{name}" for name in told), "```",
    ]  # fmt: skip
    return "\n".join(lines)


def write(folder: Path) -> None:
    """Write the pages into `folder`; a page that is the same as before keeps its time."""
    top = parser()
    action = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    commands = dict(action.choices)
    helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
    pages = {f"command-{name}": command_page(command) for name, command in commands.items()}
    pages |= {"commands": commands_page(commands, helps), "settings": settings_page()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.is_file() or path.read_text(encoding="utf-8") != text + "\n":
            path.write_text(text + "\n", encoding="utf-8")


def _start(app: Any) -> None:
    write(Path(app.srcdir) / "docs/generated")


LINKS = {"a page for each command": "commands", "a page of all settings": "settings"}
"""What docs/reference/index.md says of pages that are only on the site."""


def _links(app: Any, docname: str, text: list[str]) -> None:
    """On the site, a link to a tutorial's script is a link to its page, and words about written pages link to these."""
    if docname == "docs/reference/index":
        for words, page in LINKS.items():
            assert words in text[0], words
            text[0] = text[0].replace(words, f"[{words}](../generated/{page}.md)")
    text[0] = re.sub(r"\]\(((?:\.\./)*)tutorials/(\w+)\.py\)", r"](\1gallery/\2.rst)", text[0])


def _notebooks(app: Any) -> None:
    """In a notebook, a link to another tutorial opens its notebook."""
    for path in Path(app.srcdir, "docs/gallery").glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"\((\d_\w+)\.html\)", r"(\1.ipynb)", text), encoding="utf-8")


def _finish(app: Any, error: Exception | None) -> None:
    """The site's address opens the start page."""
    if error is None and app.builder.format == "html":
        page = (
            '<!doctype html><meta charset="utf-8"><title>ddpm</title><meta http-equiv="refresh" content="0; url=docs/">'
        )
        link = '<a href="docs/index.html">ddpm</a>'
        (Path(app.outdir) / "index.html").write_text(f"{page.replace('docs/', 'docs/index.html')}{link}\n")


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", _start)
    app.connect("builder-inited", _notebooks, priority=900)  # after sphinx-gallery wrote them
    app.connect("source-read", _links)
    app.connect("build-finished", _finish)
    return {"parallel_read_safe": True}
