"""The settings of the site. `make docs` builds it; its root is the repository's, so links between files are links here.

No inventory of Python, NumPy or torch is loaded: their names are text, by the one pattern of nitpick_ignore_regex.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "docs/_ext"), str(ROOT / "src")]

from ddpm.version import __version__  # noqa: E402

project = "ddpm"
author = copyright = "The ddpm authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
    "formulas",
    "demo",
    "generated",
    "docstrings",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**", "benchmarks/results/*.md", "models/*.md", "src/ddpm/models/*.md", "examples/cluster/README.md",
    "CHANGELOG.md", "CONTRIBUTING.md",
]  # fmt: skip
exclude_patterns = [
    ".*", "build", "demo", "runs", "**/cache", "tests", "docs/tutorials", "docs/gallery/**.ipynb", "docs/_*",
]  # fmt: skip

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 4
suppress_warnings = [
    "myst.header",  # records begin at any level of heading
    "config.cache",  # sphinx_gallery_conf holds a function
]
highlight_language = "none"
smartquotes = False  # two hyphens are an option, and no dash
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|PIL|collections|contextlib|pathlib|typing|argparse|zipfile)\..*|Path|(tuple|dict)\[\w+"),
]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"ddpm {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

sphinx_gallery_conf = {
    "examples_dirs": "docs/tutorials",
    "gallery_dirs": "docs/gallery",
    "filename_pattern": r"/\d_",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "write_computation_times": False,
    "show_memory": False,
    "show_signature": False,
    "copyfile_regex": r"$^",
    "first_notebook_cell": "# This notebook needs ddpm with two extras: pip install '.[codec,plots]' in a checkout",
    "image_srcset": ["2x"],
    "thumbnail_size": (320, 200),
}
