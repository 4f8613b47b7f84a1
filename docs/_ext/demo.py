"""The digits model in a page of the site, if onnxruntime-web is at hand: DEMO is `npm`, to fetch it, or its folder.

docs/demo.md includes the text that is written here.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from sphinx.errors import ConfigError

PAGE = """\
<iframe class="demo" src="demo/index.html" title="The digits model, sampling in the browser"></iframe>

<a href="demo/index.html">Open it on a page of its own</a>
"""
MISSING = """\
This copy of the site was built without the model. `ddpm export digits --to web page` writes the same page, and
`python3 -m http.server -d page` shows it.
"""


def _start(app: Any) -> None:
    runtime, folder = os.environ.get("DEMO"), Path(app.outdir, "docs/demo")
    shutil.rmtree(folder, ignore_errors=True)
    if runtime:
        from ddpm.errors import InputError
        from ddpm.files.opening import open_checkpoint
        from ddpm.run.web import to_web

        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            to_web(open_checkpoint("digits"), folder, None if runtime == "npm" else Path(runtime))
        except InputError as error:
            raise ConfigError(f"DEMO={runtime}: {error}") from error
    else:
        print("docs/demo.md: without the model; `make docs DEMO=npm` fetches its runtime (33 MB) and puts the model in")
    page, text = Path(app.srcdir, "docs/generated/demo.txt"), PAGE if runtime else MISSING
    page.parent.mkdir(exist_ok=True)
    if not page.is_file() or page.read_text() != text:
        page.write_text(text)


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", _start)
    return {"parallel_read_safe": True}
