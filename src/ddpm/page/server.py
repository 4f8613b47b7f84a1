"""The server: who may ask, how much one may send, and the routes of all tabs."""

import hmac
import importlib
import pkgutil
import secrets
import socket
import sys
import webbrowser
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddpm.errors import InputError, one_line
from ddpm.page import tabs
from ddpm.page.state import UPLOAD, State
from ddpm.page.work import LOG, UNFORESEEN, read

STATIC = Path(__file__).parent / "static"
LOCAL = ("localhost", "127.0.0.1", "::1")
NETWORK = (
    "--host {host}: everybody who reaches this machine over the network reaches this page. Who has the token in its "
    "address can use the models and the time of this machine, and read its runs. Nothing is encrypted."
)
UPLOADS = 8
"""Pictures that are added at a time, which bounds the memory that they take."""
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
        "frame-ancestors 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def app(state: State, token: str | None = None, any_host: bool = False) -> Starlette:
    """The application.

    token     who opens the page must know it: from /?token=..., which sets a cookie. None: no token is asked for
    any_host  accept requests to every name of this machine, and not only to LOCAL
    """
    modules = [importlib.import_module(f"{tabs.__name__}.{m.name}") for m in pkgutil.iter_modules(tabs.__path__)]
    names = [m.__name__.rpartition(".")[2] for m in modules]

    def models(request: Request) -> Response:
        return JSONResponse({"models": state.names(), "tabs": names, "upload": UPLOAD})

    async def add_picture(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(state.add_picture, await read(request, UPLOAD)))

    async def kept(request: Request) -> Response:
        file = state.kept(request.path_params["name"])
        return Response(file.data, media_type=file.kind)

    routes = [
        Route("/api/models", models),
        Route("/api/pictures", add_picture, methods=["POST"]),
        Route("/api/kept/{name}", kept),
        *(_file(path) for path in sorted(STATIC.iterdir())),
        *(route for module in modules for route in module.routes(state)),
    ]
    guard = Middleware(Guard, token=token, any_host=any_host)
    handlers = {InputError: _refuse, HTTPException: _refuse, Exception: _refuse}
    return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)


def _file(path: Path) -> Route:
    """The route of a file of the page, made from the folder's list: no request names a path."""

    async def send(request: Request) -> Response:
        return FileResponse(path, media_type=KINDS.get(path.suffix))

    return Route("/" if path.name == "index.html" else f"/{path.name}", send)


async def _refuse(request: Request, error: Exception) -> Response:
    line = error.detail if isinstance(error, HTTPException) else str(error)
    status = getattr(error, "status_code", 400)
    if not isinstance(error, InputError | HTTPException):
        LOG.error("a request failed", exc_info=error)
        line, status = UNFORESEEN, 500
    return JSONResponse({"kind": "error", "line": one_line(line)}, status)


class Guard:
    """Refuses requests from elsewhere before anything reads them, and adds HEADERS to every answer."""

    def __init__(self, app: ASGIApp, token: str | None, any_host: bool) -> None:
        self.app, self.token, self.any_host, self.uploads = app, token, any_host, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        request = Request(scope)
        given = request.query_params.get("token", "") if scope["path"] == "/" else ""
        knows = self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())
        cookie = f"{_cookie(request)}={self.token}; Path=/; HttpOnly; SameSite=Strict"
        headers = {**HEADERS, **({"Set-Cookie": cookie} if knows else {})}

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = message.get("headers", [])
                # Whoever is refused may not go on to send the rest of a long body.
                closing = {"Connection": "close"} if message["status"] >= 400 else {}
                added = [(name.lower().encode(), value.encode()) for name, value in (headers | closing).items()]
                message["headers"] = [*own, *(pair for pair in added if pair[0] not in dict(own))]
            await send(message)

        if (refusal := self._refusal(request, knows)) is None:
            uploads = _is_upload(request)
            self.uploads += uploads
            try:
                await self.app(scope, receive, with_headers)
            finally:
                self.uploads -= uploads
        else:
            status, line = refusal
            await JSONResponse({"kind": "error", "line": line}, status)(scope, receive, with_headers)

    def _refusal(self, request: Request, knows: bool) -> tuple[int, str] | None:
        """The status and the line with which a request is refused; None if it may pass."""
        host, origin = request.headers.getlist("host"), request.headers.get("origin")
        if len(host) != 1 or not (self.any_host or _name(host[0]) in LOCAL):
            return 403, "this page answers to localhost, 127.0.0.1 and [::1] only"
        if origin is not None and origin not in (f"http://{host[0]}", f"https://{host[0]}"):
            return 403, "the request comes from another site"
        if self.token is not None and not knows:
            cookie = request.cookies.get(_cookie(request), "")
            if not hmac.compare_digest(cookie.encode(), self.token.encode()):
                return 403, "open the address with ?token=... that the server printed"
        if request.method == "POST":
            wanted = "application/octet-stream" if _is_upload(request) else "application/json"
            if request.headers.get("content-type", "").split(";")[0].strip() != wanted:
                return 415, f"the request's Content-Type is not {wanted}"
            length = request.headers.get("content-length", "0")
            if not (length.isascii() and length.isdecimal()):
                return 400, "the request's Content-Length is no number"
            if _is_upload(request) and self.uploads >= UPLOADS:
                return 429, f"{UPLOADS} pictures are being added already; try again when one is there"
        return None


def _is_upload(request: Request) -> bool:
    return request.method == "POST" and request.url.path.startswith("/api/pictures")


def _cookie(request: Request) -> str:
    """The cookie's name. It has the port that the browser asked, which a browser does not tell apart by itself."""
    return "ddpm_page_" + "".join(filter(str.isdecimal, request.headers.get("host", "").rpartition(":")[2]))


def _name(host: str) -> str | None:
    """The name in a Host header, without the port; None if the header is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        return parts.hostname if parts.port is None or parts.port >= 0 else None
    except ValueError:
        return None


def serve(
    state: State, host: str | None = None, port: int = 8000, token: str | None = None, show: bool = False
) -> None:
    """Answer requests until Ctrl-C. Prints the page's address on standard output.

    host   the address to listen at; None is 127.0.0.1. Any other than LOCAL is open to the network, and needs a token,
           which is made if none is given
    port   0 is a free one
    show   open the page in the user's browser

    Raises InputError if the address or the port cannot be had.
    """
    to_network = host is not None and host not in LOCAL
    token = secrets.token_urlsafe(16) if to_network and token is None else token
    with _listen(host or LOCAL[1], port) as listener:
        if to_network:
            print(NETWORK.format(host=host), file=sys.stderr)
        name = socket.gethostname() if host in ("0.0.0.0", "::") else host or LOCAL[1]
        name = f"[{name}]" if ":" in name else name
        address = f"http://{name}:{listener.getsockname()[1]}/{f'?token={token}' if token else ''}"
        print(address, flush=True)
        print("Ctrl-C ends the page.", file=sys.stderr)
        if show:
            webbrowser.open(address)
        state.work.thread.submit(state.warm_up)
        settings = uvicorn.Config(
            app(state, token, to_network), log_level="critical", access_log=False, timeout_graceful_shutdown=1
        )
        with suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listener])
        state.work.end()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # On Windows, SO_REUSEADDR would let two pages listen at one port.
    listener.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR), 1)
    try:
        listener.bind((host, port))
        listener.listen(100)  # who comes before the server has started waits
    except (OSError, OverflowError) as error:
        listener.close()
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise InputError(f"port {port} of {host}: {reason}; want another --port, or --port 0 for a free one") from None
    return listener
