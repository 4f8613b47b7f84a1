"""Print the test files for the files that changed since a commit, for `make quick`: `python tests/changed.py [COMMIT]`.

A changed test file runs. For a changed source file, its doctests and the test files that import it run. For a changed
benchmark, the test files that import it run. tests/test_imports.py always runs. Slow test files are left out.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOW = {"test_distributed.py", "test_docs.py", "test_gpu_benchmark.py", "test_paper.py", "test_train.py"}


def changed(since: str) -> list[Path]:
    """Files that differ from the commit, or that git does not track yet."""
    tracked = ["git", "diff", "--name-only", "--diff-filter=d", since]
    new = ["git", "ls-files", "--others", "--exclude-standard"]
    names = [
        subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout for words in (tracked, new)
    ]
    return [ROOT / name for name in "".join(names).splitlines() if name.endswith(".py")]


def tests_of(files: list[Path]) -> list[str]:
    """The paths for pytest, relative to the repository."""
    paths = {ROOT / "tests" / "test_imports.py"}
    for file in files:
        if file.parent.name == "tests" and file.name.startswith("test_"):
            paths.add(file)
        elif file.is_relative_to(ROOT / "src"):
            module = ".".join(file.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
            paths |= {file, *importing(module)}
        elif file.parent.name == "benchmarks":
            paths |= importing(file.stem)
    return sorted(str(path.relative_to(ROOT)) for path in paths if path.name not in SLOW)


def importing(module: str) -> set[Path]:
    """The test files that import a module such as ddpm.files.images."""
    package, _, name = map(re.escape, module.rpartition("."))
    pattern = rf"^\s*(from {re.escape(module)} import|import {re.escape(module)}\b"
    pattern += rf"|from {package} import [^\n]*\b{name}\b)" if package else ")"
    tests = (ROOT / "tests").glob("test_*.py")
    return {test for test in tests if re.search(pattern, test.read_text(encoding="utf-8"), re.MULTILINE)}


if __name__ == "__main__":
    print(*tests_of(changed(sys.argv[1] if len(sys.argv) > 1 else "HEAD")))
