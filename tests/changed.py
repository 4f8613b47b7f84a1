"""The test files of what changed since a commit, for `make quick`: `python tests/changed.py [COMMIT]`.

A changed test stands for itself. A changed source file stands for itself, because its docstrings hold tests, and for
the test files that import it. tests/test_imports.py is always among them. Slow test files are left to `make test`.
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
    """Paths for pytest."""
    found = {ROOT / "tests" / "test_imports.py"}
    for file in files:
        if file.parent.name == "tests" and file.name.startswith("test_"):
            found.add(file)
        elif file.is_relative_to(ROOT / "src"):
            found.add(file)
            module = ".".join(file.relative_to(ROOT / "src").with_suffix("").parts)
            package, _, name = module.removesuffix(".__init__").rpartition(".")
            package, module = re.escape(package), re.escape(module)
            words = rf"from {package} import [^\n]*\b{name}\b|from {module} import|import {module}\b"
            found |= {test for test in (ROOT / "tests").glob("test_*.py") if re.search(words, test.read_text())}
    return sorted(str(path.relative_to(ROOT)) for path in found if path.name not in SLOW)


if __name__ == "__main__":
    print(*tests_of(changed(sys.argv[1] if len(sys.argv) > 1 else "HEAD")))
