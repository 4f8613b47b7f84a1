"""Docstrings are plain text with `code`, tables of "name  meaning" and doctests. They become reStructuredText here."""

import re
from typing import Any

from docutils import nodes

ROW = re.compile(r"(?P<name>[\w*.]+(?:(?:, | and )[\w*.]+)*) {2,}(?P<meaning>\S.*)")
INNER = re.compile(r"(?P<name>[\w*.]+(?: \w+)?) {2,}(?P<meaning>\S.*)")
CODE = re.compile(r"(``?[^`]+``?)")


def prose(text: str) -> str:
    """A line of prose, with what reStructuredText would read as markup escaped.

    >>> prose("eps_ of `x_t`, *args")
    'eps\\\\_ of ``x_t``, \\\\*args'
    """
    parts = CODE.split(text)
    return "".join(
        f"``{part.strip('`')}``" if i % 2 else re.sub(r"([\\*|_`])", r"\\\1", part) for i, part in enumerate(parts)
    )


def convert(lines: list[str]) -> list[str]:
    """The docstring's lines as reStructuredText."""
    out: list[str] = []
    mode = ""
    column = inner = 0  # where the meaning of a row begins, and of a row in a row
    for number, line in enumerate(lines):
        row = ROW.fullmatch(line) if number or not line.strip() else None
        if not line.strip():
            if mode != "row":
                mode = ""
            out.append("")
        elif line.startswith(">>>") or mode == "doctest":
            mode = "doctest"
            out.append(line)
        elif row:
            if mode != "row" and out and out[-1]:
                out.append("")
            mode, column, inner = "row", row.start("meaning"), 0
            out += [f"``{row['name']}``", f"    {prose(row['meaning'])}"]
        elif line.startswith(" ") and mode == "row":
            indent, row = len(line) - len(line.lstrip()), INNER.fullmatch(line.strip())
            if row and indent == column:
                if not inner:
                    out.append("")
                inner = indent + row.start("meaning")
                out += [f"    ``{row['name']}``", f"        {prose(row['meaning'])}"]
            elif inner and indent >= inner:
                out.append(f"        {prose(line.strip())}")
            else:
                if inner:
                    out.append("")
                inner = 0
                out.append(f"    {prose(line.strip())}")
        elif line.startswith("  ") and mode in ("", "literal"):
            if mode == "":
                out += ["::", ""]
            mode = "literal"
            out.append("    " + line)
        else:
            if mode in ("row", "literal") and out and out[-1]:
                out.append("")
            mode = "prose"
            marker = re.match(r"\* ", line)
            out.append(f"* {prose(line[2:])}" if marker else prose(line))
    return [*out, ""]


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = convert(lines)


def _skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Fields of named tuples are described by their class; methods that torch calls are no interface."""
    return True if type(obj).__name__ == "_tuplegetter" or name in ("forward", "training") else None


def _link(app: Any, doctree: nodes.document, docname: str) -> None:
    """`samplers.ddim` in a page or a docstring links to its place in the reference."""
    objects = app.env.get_domain("py").objects
    for literal in list(doctree.findall(nodes.literal)):
        name = literal.astext().removesuffix("()")
        if "." not in name or isinstance(literal.parent, nodes.reference):
            continue
        full = next((f for f in (name, f"ddpm.{name}") if f in objects), None) or _only(objects, f".{name}")
        if full and objects[full].docname != docname:
            place = app.builder.get_relative_uri(docname, objects[full].docname) + "#" + objects[full].node_id
            literal.replace_self(nodes.reference("", "", literal.deepcopy(), refuri=place, internal=True))


def _only(objects: Any, end: str) -> str | None:
    """The one name that has this end."""
    found = [name for name in objects if name.endswith(end)]
    return found[0] if len(found) == 1 else None


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process)
    app.connect("doctree-resolved", _link)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True}
