"""Imports go one way: mathematics <- codec, files <- run <- cli. There is no circle, and leaves can be deleted."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ddpm
from ddpm import catalog

ROOT = Path(ddpm.__file__).parent
MAY_IMPORT = {"mathematics": {"mathematics"}, "codec": {"mathematics", "codec"}, "files": {"mathematics", "files"}}
MAY_IMPORT["run"] = {"mathematics", "codec", "files", "run"}
MAY_IMPORT["page"] = {*MAY_IMPORT["run"], "page"}
MAY_IMPORT["cli"] = {*MAY_IMPORT["page"], "cli"}
LEAVES = {"ddpm.run.report", "ddpm.page", "ddpm.cli"}
FILES = {".".join(["ddpm", *p.relative_to(ROOT).with_suffix("").parts]): p for p in ROOT.rglob("*.py")}
FILES.pop("ddpm.__init__")  # the public names of every layer
FILES.pop("ddpm.__main__")
FILES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}


def layer(module):
    """codec, files, run, page and cli are packages; every file beside them is mathematics."""
    name = module.split(".")[1]
    return name if name in MAY_IMPORT else "mathematics"


def imported(source, later=True):
    """Every module of ddpm that the source imports at its top, and with `later` inside functions too."""
    tree = ast.parse(source)
    for node in ast.walk(tree) if later else tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name.startswith("ddpm."))


def wrong(module, source):
    """The imports of `module` that go the wrong way."""
    allowed = MAY_IMPORT[layer(module)]
    from_leaf = {leaf for leaf in LEAVES if not module.startswith(leaf) and not module.startswith("ddpm.cli")}
    from_leaf |= {"ddpm.page"} if layer(module) == "cli" and module != "ddpm.cli.page" else set()
    return [
        name
        for name in imported(source)
        if layer(name) not in allowed or any(name == leaf or name.startswith(f"{leaf}.") for leaf in from_leaf)
    ]


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module):
    assert wrong(module, FILES[module].read_text(encoding="utf-8")) == []


def test_wrong_imports_are_found():
    """Negative control."""
    assert wrong("ddpm.gaussian", "def f():\n    from ddpm.files import images") == ["ddpm.files", "ddpm.files.images"]
    assert wrong("ddpm.files.images", "import ddpm.run.train") == ["ddpm.run.train"]
    assert wrong("ddpm.codec.file", "from ddpm.files.images import load")
    assert wrong("ddpm.run.train", "from ddpm.run import report") == ["ddpm.run.report"]
    assert wrong("ddpm.run.train", "from ddpm.cli import options") == ["ddpm.cli", "ddpm.cli.options"]
    assert wrong("ddpm.cli.sample", "from ddpm.page import server") == ["ddpm.page", "ddpm.page.server"]
    assert wrong("ddpm.cli.page", "from ddpm.page import server") == []
    assert wrong("ddpm.run.train", "from ddpm import losses\nimport torch") == []


def circle(graph):
    """The modules of an import circle, or nothing."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        path.append(module)
        cycle = next(filter(None, map(visit, graph.get(module, ()))), [])
        path.pop()
        done.add(module)
        return cycle

    return next(filter(None, map(visit, graph)), [])


def test_no_import_goes_in_a_circle():
    graph = {}
    for module, path in FILES.items():
        names = {name for name in imported(path.read_text(encoding="utf-8"), later=False) if name in FILES}
        graph[module] = {
            name for name in names if not module.startswith(f"{name}.")
        }  # a package loads before its modules
    graph["ddpm.cli"] = set()  # it only names its entry point
    assert circle(graph) == []
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c"]


@pytest.mark.parametrize("module", [m for m in FILES if layer(m) == "mathematics" and m != "ddpm.pixels"])
def test_only_pixels_knows_the_scale_of_pixels(module):
    source = FILES[module].read_text(encoding="utf-8")
    numbers = {n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant)}
    assert not numbers & {127.5, 255}


def test_the_command_line_starts_without_torch():
    """Otherwise --help would be slow."""
    code = "import sys, ddpm.cli.main as m, importlib; sys.modules['ddpm.cli.main'].parser(); "
    code += "print({'torch', 'datasets', 'sklearn', 'PIL', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_the_work_starts_without_torchs_compiler(tmp_path):
    """The imports of the compiler, and of scikit-learn, take seconds. One process loads, and trains with both kinds."""
    code = "import sys, ddpm; ddpm.load('digits'); small = {'steps': 1, 'sample_steps': 2, 'eval_images': 4}; "
    for optimizer in ("adam", "muon"):
        code += f"ddpm.train('digits', out={str(tmp_path / optimizer)!r}, optimizer={optimizer!r}, **small); "
    code += "print({'torch._dynamo', 'sklearn', 'scipy', 'datasets'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "set()"


def test_extras_and_version_match_the_package():
    """Every extra that an error names exists, and the citation has the version of the package."""
    repository = ROOT.parents[1]
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "ddpm-kit"
    for path in ROOT.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        extras = re.findall(r'not_installed\("\w+", "(\w+)"\)', source) + re.findall(r"ddpm-kit\[(\w+)\]", source)
        assert set(extras) <= project["optional-dependencies"].keys(), path
    assert catalog.trackers().keys() <= project["optional-dependencies"].keys()
    citation = (repository / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {ddpm.__version__}\n" in citation
