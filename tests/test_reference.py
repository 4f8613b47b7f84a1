"""Every public name has a docstring and a place in the reference; the pages that link to one another exist."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import ddpm

DOCS = Path(__file__).parents[1] / "docs"
PAGES = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
MODULES = re.findall(r"automodule:: ([\w.]+)", PAGES)
NAMES = re.findall(r"auto(?:function|class|exception):: ([\w.]+)", PAGES)


def test_every_name_of_the_package_is_in_the_reference():
    """Each module of `ddpm.__all__` has a page, and each other name is on one."""
    for name in set(ddpm.__all__) - {"__version__"}:
        found = getattr(ddpm, name)
        if inspect.ismodule(found):
            assert found.__name__ in MODULES, name
        else:
            home = getattr(found, "__module__", "ddpm.presets")
            assert f"ddpm.{name}" in NAMES or home in MODULES, name


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring(module):
    """Also the methods and properties of its classes that are written there."""
    found = importlib.import_module(module)
    assert inspect.getdoc(found), module
    names = getattr(found, "__all__", [n for n in vars(found) if not n.startswith("_")])
    for name in names:
        value = getattr(found, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if not hasattr(found, "__all__") and value.__module__ != module:
            continue
        assert inspect.getdoc(value), f"{module}.{name}"
        if inspect.isclass(value):
            for member, what in vars(value).items():
                written = inspect.isfunction(what) or isinstance(what, property)
                field = member in vars(value).get("__annotations__", {})
                if written and not field and not member.startswith("_") and member != "forward":
                    protocol = getattr(getattr(found, "EncodedImages", None), member, None)
                    assert inspect.getdoc(what) or inspect.getdoc(protocol), f"{module}.{name}.{member}"


def test_links_between_pages_exist():
    """Each relative link of a page names a file of the repository."""
    for page in DOCS.rglob("*.md"):
        if {"gallery", "generated"} & set(page.relative_to(DOCS).parts):
            continue
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.relative_to(DOCS)}: {link}"


def test_there_are_six_tutorials_and_each_is_on_the_start_page():
    tutorials = sorted(path.name for path in (DOCS / "tutorials").glob("*.py"))
    assert len(tutorials) == 6
    for name in tutorials:
        assert f"(tutorials/{name})" in (DOCS / "index.md").read_text(encoding="utf-8")
