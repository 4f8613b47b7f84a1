"""A page that is served in this process, and a browser that looks at it, for tests of `ddpm.page`."""

import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def need_page() -> None:
    """Skip the module if the extra `page` is not installed."""
    for package in ("starlette", "uvicorn"):
        pytest.importorskip(package, reason=f"{package} is not installed, which the extra page brings")


def need_browser() -> None:
    """Skip the module if the extra `page`, Playwright or Chromium is not installed."""
    need_page()
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing", allow_module_level=True)


@contextmanager
def served(folder: Path, *given: str, token: str | None = None) -> Iterator[str]:
    """The address of a page whose runs lie under `folder`, on the CPU. It is served until the context ends."""
    import uvicorn

    from ddpm.page.server import app
    from ddpm.page.state import State

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        state = State(given, folder, torch.device("cpu"))
        server = uvicorn.Server(uvicorn.Config(app(state, token), log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            state.work.end()


@contextmanager
def browsing() -> Iterator["object"]:
    """A browser of Playwright. Its pages see nothing of the user's settings."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser: "object", address: str, tab: str = "", **settings: object) -> "object":
    """A new page of the browser at a tab, once its scripts are ready. An uncaught error of a script fails at close."""
    page = browser.new_page(**settings)  # type: ignore[attr-defined]
    page.requests, page.faults = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda m: page.faults.append(m.text) if m.type == "error" else None)
    page.goto(f"{address}/#{tab}")
    page.wait_for_selector("body[data-ready]")
    return page


def look(tab: str, folder: Path, to: Path, scripts: str = "") -> None:
    """Write screenshots of a tab at 1280 and 360 pixels, light and dark, to TO/TAB-WIDTH-SCHEME.png."""
    with served(folder) as address, browsing() as browser:
        for width in (1280, 360):
            for scheme in ("light", "dark"):
                page = open_page(browser, address, tab, viewport={"width": width, "height": 900}, color_scheme=scheme)
                if scripts:
                    page.evaluate(scripts)
                    page.wait_for_timeout(3000)
                wide = page.evaluate("document.documentElement.scrollWidth")
                page.screenshot(path=str(to / f"{tab}-{width}-{scheme}.png"), full_page=True)
                print(tab, width, scheme, page.faults, wide, "pixels wide")


if __name__ == "__main__":
    look(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
