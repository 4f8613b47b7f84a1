"""Imports go one way: mathematics <- codec, files <- run; report, app and cli are leaves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm

ROOT = Path(ddpm.__file__).parent
MAY_IMPORT = {"mathematics": {"mathematics"}, "codec": {"mathematics", "codec"}, "files": {"mathematics", "files"}}
MAY_IMPORT["run"] = {"mathematics", "codec", "files", "run"}
LEAVES = {"ddpm.run.report", "ddpm.run.app", "ddpm.run.cli"}
FILES = {".".join(["ddpm", *p.relative_to(ROOT).with_suffix("").parts]): p for p in ROOT.rglob("*.py")}
FILES.pop("ddpm.__init__")  # the public names, of every layer


def layer(module):
    """codec, files and run are packages; every file beside them is mathematics."""
    name = module.split(".")[1]
    return name if name in MAY_IMPORT else "mathematics"


def imported(source):
    """Every module of ddpm that the source imports, at its top or later, as ddpm.x or ddpm.x.y."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name.startswith("ddpm.") and "__" not in name)  # not __version__


def wrong(module, source):
    """The imports of `module` that go the wrong way."""
    allowed = MAY_IMPORT[layer(module)]
    leaves = LEAVES - {module} if module != "ddpm.run.cli" else set()  # the command line is where they are called from
    return [name for name in imported(source) if layer(name) not in allowed or name in leaves]


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module):
    assert wrong(module, FILES[module].read_text()) == []


def test_wrong_imports_are_seen():
    """Negative control."""
    assert wrong("ddpm.gaussian", "def f():\n    from ddpm.files import images") == ["ddpm.files", "ddpm.files.images"]
    assert wrong("ddpm.files.images", "import ddpm.run.train") == ["ddpm.run.train"]
    assert wrong("ddpm.codec.file", "from ddpm.files.images import load")
    assert wrong("ddpm.run.train", "from ddpm.run import report") == ["ddpm.run.report"]
    assert wrong("ddpm.run.train", "from ddpm import losses\nimport torch") == []


@pytest.mark.parametrize("module", [m for m in FILES if layer(m) == "mathematics" and m != "ddpm.pixels"])
def test_only_pixels_knows_the_scale_of_pixels(module):
    numbers = {n.value for n in ast.walk(ast.parse(FILES[module].read_text())) if isinstance(n, ast.Constant)}
    assert not numbers & {127.5, 255}


def test_the_command_line_starts_without_torch():
    """So that --help is quick."""
    code = "import sys, ddpm.run.cli; print({'torch', 'datasets', 'sklearn', 'PIL'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_a_model_loads_without_torchs_compiler():
    """Its imports take seconds."""
    code = "import sys, ddpm; ddpm.load('digits'); print('torch._dynamo' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
