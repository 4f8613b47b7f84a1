"""The page's server: it answers its own page, makes one model call at a time, and hostile requests gain nothing."""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from browser import need_page, served
from conftest import train
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from several import printed, start_python, wait_until

from ddpm.cli import main
from ddpm.errors import InputError
from ddpm.files import images
from ddpm.files.images import DEEP
from ddpm.files.models import MODELS
from ddpm.presets import Preset
from ddpm.run.compress import load_codec
from ddpm.run.edit import fitted

need_page()

from ddpm.page import server  # noqa: E402
from ddpm.page.state import State  # noqa: E402
from ddpm.page.tabs import compress  # noqa: E402

SAMPLE = {"model": "digits", "sampler": "ddim", "steps": 4, "count": 2}
LONG = {"model": "digits", "sampler": "ancestral", "count": 1}
JSON = {"Content-Type": "application/json"}
BYTES = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs. A file that nobody may see lies beside it."""
    folder = tmp_path_factory.mktemp("page") / "runs"
    (folder / "one").mkdir(parents=True)
    (folder / "one/config.json").write_text('{"steps": 30}')
    (folder / "one/.secret").write_text("hidden")
    (folder.parent / "secret.txt").write_text("hidden")
    return folder


@pytest.fixture(scope="module")
def page(runs):
    with served(runs) as address:
        yield address


def ask(address, path="/", body=None, method=None, **headers):
    """Status, headers and body of the answer to one request. A header that is None is not sent."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    method = method or ("GET" if body is None else "POST")
    data = json.dumps(body).encode() if isinstance(body, dict | list) else body
    default = {"Host": urlsplit(address).netloc, "Content-Length": None if data is None else str(len(data))}
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in {**default, **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
        if value is not None:
            connection.putheader(name, value)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server may refuse before it has read all
        connection.endheaders(data)
    answer = connection.getresponse()
    try:
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def events(body):
    return [json.loads(line.removeprefix("data: ")) for line in body.decode().split("\n\n") if line]


def start(address, **settings):
    status, _, body = ask(address, "/api/sample/start", {**SAMPLE, **settings}, **JSON)
    assert status == 200
    return events(body)


def begin(address, settings, **headers):
    """A connection over which a job was started; its answer is not read."""
    host, body = urlsplit(address), json.dumps(settings).encode()
    lines = {"Host": host.netloc, **JSON, **headers, "Content-Length": len(body)}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    connection = socket.create_connection((host.hostname, host.port), timeout=60)
    connection.sendall(f"POST /api/sample/start HTTP/1.1\r\n{head}\r\n".encode() + body)
    return connection


def png(width, height):
    """The bytes of a black PNG of this size, which takes little memory to make."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))]
    pack = zlib.compressobj()
    rows = b"".join(pack.compress(bytes(width + 1)) for _ in range(height)) + pack.flush()
    chunks += [(b"IDAT", rows), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def resident(what="VmRSS"):
    """Megabytes of memory of this process."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system has no /proc, which tells a process's memory")
    return int(status.read_text().split(f"{what}:")[1].split()[0]) / 1024


def test_images_are_those_of_the_command_line(page, tmp_path):
    done = start(page, seed=5, classes=["3", "7"], guidance=2, spacing="log_snr")
    command = done[0]["command"].split()
    assert command[:2] == ["ddpm", "sample"]
    assert main([*command[1:-1], str(tmp_path / "samples.png")]) == 0
    _, _, data = ask(page, done[-1]["png"]["url"])
    assert (np.asarray(images.read(data)) == np.asarray(images.read(tmp_path / "samples.png"))).all()


def test_frames_are_few_and_end_with_the_images(page):
    told = start(page, sampler="ancestral", steps=100)
    frames = [event for event in told if event["kind"] == "step"]
    levels = [frame["t"] for frame in frames]
    assert len(levels) == 30
    assert levels == sorted(levels, reverse=True)
    assert (levels[0], levels[-1]) == (1000, 0)
    assert frames[-1]["x"] == frames[-1]["x0"]
    _, headers, data = ask(page, told[-1]["gif"]["url"])
    gif = Image.open(io.BytesIO(data))
    assert (headers["content-type"], gif.n_frames) == ("image/gif", 30)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"model": "../../etc/passwd"}, "model '../../etc/passwd': want digits"),
        ({"sampler": "magic"}, "sampler 'magic': want ancestral"),
        ({"steps": 10**9}, "steps"),
        ({"steps": "many"}, "steps 'many': want a whole number"),
        ({"count": 65}, "count 65: want a whole number, 1 to 64"),
        ({"seed": -1}, "seed -1: want a whole number of at least 0"),
        ({"guidance": 2}, "guidance: needs a class"),
        ({"classes": "7"}, "classes '7': want a list"),
        ({"classes": ["ten"]}, "class 'ten'"),
        ({"spacing": "wide"}, "spacing 'wide'"),
    ],
)
def test_a_wrong_setting_is_one_line(page, settings, line):
    last = start(page, **settings)[-1]
    assert last["kind"] == "error"
    assert last["line"].startswith(line)
    assert "\n" not in last["line"]


def test_other_kinds_of_models_work_or_say_why_not(tmp_path):
    """A consistency model has its own sampler in both tabs. A model with a condition is refused in one line."""
    two, told = str(tmp_path / "two"), str(tmp_path / "told")
    assert train(two, "--steps", 1, "--predict", "v", "--loss", "consistency") == 0
    assert train(told, "--steps", 1, "--condition", "lowres:2") == 0
    with served(tmp_path / "none", two, told) as address:
        about = start(address, model=two, sampler=None, steps=None)[0]
        assert "--sampler consistency" in about["command"]
        assert about["calls"] == 2
        status, _, body = ask(address, "/api/pictures", png(8, 8), **BYTES)
        assert status == 200
        mask = base64.b64encode(np.packbits(np.ones(64, np.uint8))).decode()
        sent = {"picture": json.loads(body)["id"], "other": json.loads(body)["id"], "t": 10, "n": 2, "mask": mask}
        line = "was trained with condition lowres:2, which the page does not know; want one without"
        for verb in ("inpaint", "redraw", "interpolate"):
            done = events(ask(address, f"/api/edit/{verb}", {"model": two, "resample": 2, **sent}, **JSON)[2])
            (about,) = (event for event in done if event["kind"] == "about")  # the last job may still be leaving
            assert "--sampler consistency" in about["command"]
            assert len(done[-1]["pictures"]) == 2
            error = events(ask(address, f"/api/edit/{verb}", {"model": told, **sent}, **JSON)[2])[-1]
            assert error["line"].endswith(line)
        assert start(address, model=told)[-1]["line"].endswith(line)
        status, _, body = ask(address, f"/api/sample/choices?model={told}")
        assert (status, json.loads(body)["line"].endswith(line)) == (400, True)


@pytest.mark.parametrize("part", [".", "unet"])
def test_a_folder_of_diffusers_is_a_model_and_no_run(part, trained, tmp_path, monkeypatch):
    """A pipeline, or its network alone."""
    assert main(["export", str(trained), "--to", "diffusers", str(tmp_path / "theirs")]) == 0
    states, folder = [], str(tmp_path / "theirs" / part)
    monkeypatch.setattr(server, "serve", lambda state, *_: states.append(state))
    assert main(["page", folder, "--runs", str(tmp_path / "none")]) == 0
    assert states[0].run_folders() == []
    assert states[0].model(folder).preset.size == (8, 8)
    states[0].work.end()


def test_a_model_that_was_written_or_calibrated_again_is_opened_anew(tmp_path):
    """Under the same name, and while the page is open; else a file would be made that nothing can read later."""
    file, tables = tmp_path / "model.safetensors", tmp_path / "model.calibration.json"
    shutil.copy(MODELS / "digits.safetensors", file)
    shutil.copy(MODELS / "digits.calibration.json", tables)
    state, asked = State((str(file),), tmp_path, torch.device("cpu")), {"model": str(file)}
    before, codec = state.model(str(file)), compress._codec(state, asked)
    assert state.model(str(file)) is before
    assert compress._codec(state, asked) is codec
    values = json.loads(tables.read_text())
    values["codec"]["tables"].pop()
    tables.write_text(json.dumps(values))
    assert compress._codec(state, asked).identity == load_codec(file).identity != codec.identity
    save_file({name: 2 * value for name, value in load_file(file).items()}, file, safe_open(file, "pt").metadata())
    assert state.model(str(file)).identity != before.identity
    with pytest.raises(InputError, match="of other weights than"):
        compress._codec(state, asked)
    state.work.end()


def test_a_weaker_model_guides(tmp_path):
    """The images are those of the command that is told, and differ from those without a guide; digits does not fit."""
    strong, weak = str(tmp_path / "strong"), str(tmp_path / "weak")
    for run, seed in ((strong, 0), (weak, 1)):
        assert train(run, "--steps", 1, "--seed", seed) == 0
    with served(tmp_path / "none", strong, weak) as address:
        status, _, body = ask(address, f"/api/sample/choices?model={strong}")
        guides = json.loads(body)["guides"]
        assert (status, guides[:2], strong in guides) == (200, [weak, "digits"], False)
        told = start(address, model=strong, guide=weak, guidance=3)
        command = told[0]["command"].split()
        assert main([*command[1:-1], str(tmp_path / "guided.png")]) == 0
        _, _, data = ask(address, told[-1]["png"]["url"])
        _, _, alone = ask(address, start(address, model=strong)[-1]["png"]["url"])
        assert (np.asarray(images.read(data)) == np.asarray(images.read(tmp_path / "guided.png"))).all()
        assert (np.asarray(images.read(data)) != np.asarray(images.read(alone))).any()
        assert "it has another class_names than" in start(address, model=strong, guide="digits")[-1]["line"]


def test_pictures_come_back_as_they_were(page):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    status, _, body = ask(page, "/api/pictures", images.to_png(pixels), **BYTES)
    about = json.loads(body)
    assert (status, about["width"], about["height"]) == (200, 7, 5)
    assert (np.asarray(images.read(ask(page, about["url"])[2])) == pixels).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("mode", "options", "told"),
    [
        ("1", {}, ["mode 1 is converted to L"]), ("L", {}, []), ("LA", {}, ["mode LA is converted to RGBA"]),
        ("L", {"transparency": 128}, ["mode L is converted to RGBA"]), ("P", {}, ["mode P is converted to RGBA"]),
        ("RGB", {}, []), ("RGBA", {}, []), ("I;16", {}, [DEEP]),
    ],
)  # fmt: skip
def test_an_added_picture_becomes_what_ddpm_edit_makes_of_its_file(mode, options, told, channels, tmp_path):
    """Also a transparent one, and what had to be changed is told."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    picture = deep if mode == "I;16" else Image.fromarray(noise).convert(mode)
    picture.save(file := io.BytesIO(), "PNG", **options)
    state = State((), tmp_path, torch.device("cpu"))
    added = state.add_picture(file.getvalue())
    state.work.end()
    preset = Preset(size=(8, 8), channels=channels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = fitted(file.getvalue(), preset)
        assert torch.equal(fitted(state.kept(added["id"]).data, preset), wanted)
    assert added["notes"] == told


@pytest.mark.parametrize("path", ["/api/pictures", "/api/pictures/exact"])
def test_pictures_are_decoded_in_a_thread_of_their_own(page, path, monkeypatch):
    """A large one takes seconds, and the server answers others meanwhile."""
    read, loops = images.read, []

    def watched(*given):
        loops.append(asyncio._get_running_loop())
        return read(*given)

    monkeypatch.setattr(images, "read", watched)
    assert ask(page, path, png(8, 8), **BYTES)[0] == 200
    assert loops == [None]


def hostile(address, port):
    """Twenty requests that nobody should send, each as the arguments of `ask`."""
    one = {"path": "/api/sample/start", "body": SAMPLE, **JSON}
    upload = {"path": "/api/pictures", **BYTES}
    return {
        "another host": {"Host": "evil.example"},
        "a host that looks near": {"Host": f"localhost.evil.example:{port}"},
        "a host that is malformed": {"Host": "localhost:port"},
        "no host": {"Host": None},
        "another site's origin": {**one, "Origin": "https://evil.example"},
        "an origin of another port": {**one, "Origin": f"http://127.0.0.1:{port + 1}"},
        "a null origin": {**one, "Origin": "null"},
        "a form's content type": {**one, "Content_Type": "text/plain"},
        "an upload as a form": {**upload, "body": b"x", "Content_Type": "multipart/form-data"},
        "a path out of the page": {"path": "/../../../../etc/passwd"},
        "an encoded path out": {"path": "/%2e%2e/%2e%2e/server.py"},
        "a file of the package": {"path": "/..%2fserver.py"},
        "an id that is a path": {"path": "/api/kept/..%2f..%2fetc%2fpasswd"},
        "a run that is a path": {"path": "/api/runs/one?run=/etc"},
        "a file out of its run": {"path": "/api/runs/file?run=RUN&file=../../secret.txt"},
        "a hidden file of a run": {"path": "/api/runs/file?run=RUN&file=.secret"},
        "a length of a terabyte": {**upload, "body": b"x", "Content_Length": str(10**12)},
        "a length that is no number": {**upload, "body": b"x", "Content_Length": "-5"},
        "a body that is no JSON": {**one, "body": b"{" * 1000},
        "a body of one deep list": {**one, "body": b"[" * 100_000},
        "a body that is too large": {**one, "body": b" " * 2_000_000},
        "bytes that are no picture": {**upload, "body": b"\x00" * 1000},
        "a picture of 40 megapixels": {**upload, "body": png(8000, 5000)},
        "a picture of 40 megapixels to compress": {**upload, "path": "/api/pictures/exact", "body": png(8000, 5000)},
        "a file that is none of the codec's": {**upload, "path": "/api/pictures/file", "body": b"\x00" * 1000},
        "a method that is not served": {"method": "DELETE"},
        "a null byte in a name": {"path": "/api/runs/one?run=%00"},
    }


OPENED: list[str] | None = None
sys.addaudithook(
    lambda event, arguments: OPENED.append(str(arguments[0])) if event == "open" and OPENED is not None else None
)


def test_hostile_requests_are_refused(page, runs):
    global OPENED
    ask(page)  # what is imported once is loaded now
    port, before, OPENED = urlsplit(page).port, resident(), []
    answers = {}
    for name, request in hostile(page, port).items():
        request["path"] = request.get("path", "/").replace("RUN", str(runs / "one"))
        for _ in range(5):  # a refusal may get lost if the server closes while some of the request is on its way
            with contextlib.suppress(ConnectionResetError):
                answers[name] = ask(page, **request)
                break
    opened, OPENED = OPENED, None
    assert len(answers) == len(hostile(page, port)) >= 20
    for name, (status, _, body) in answers.items():
        assert 400 <= status < 500, name
        assert b"hidden" not in body, name
        assert b"Traceback" not in body, name
    assert [path for path in opened if not path.startswith(("/usr/share/mime", "/proc"))] == []
    assert resident() - before < 200
    assert start(page)[-1]["kind"] == "done"


def test_a_body_that_never_ends_is_cut_off(page):
    """Its length is not told, so only counting helps."""
    host = urlsplit(page)
    with socket.create_connection((host.hostname, host.port), timeout=60) as connection:
        head = f"POST /api/pictures HTTP/1.1\r\nHost: {host.netloc}\r\nContent-Type: application/octet-stream\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        sent, chunk = 0, b"%x\r\n" % 1_000_000 + bytes(1_000_000) + b"\r\n"
        with contextlib.suppress(OSError):
            while sent < 200:
                connection.sendall(chunk)
                sent += 1
    assert sent < 100
    assert ask(page)[0] == 200


def test_many_uploads_at_a_time_are_refused(page):
    """Each of them holds memory."""
    from ddpm.page.server import UPLOADS

    host = urlsplit(page)
    head = f"POST /api/pictures HTTP/1.1\r\nHost: {host.netloc}\r\nContent-Type: application/octet-stream\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(UPLOADS):
            connection = stack.enter_context(socket.create_connection((host.hostname, host.port), timeout=60))
            connection.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
        for _ in range(100):
            status, _, told = ask(page, "/api/pictures", png(1, 1), **BYTES)
            if status != 200:  # all of them have come
                break
        assert status == 429
        assert json.loads(told)["line"].startswith(f"{UPLOADS} pictures are being added already")


def test_a_flood_of_starts_is_refused_beyond_the_queue(page):
    from ddpm.page.work import LONGEST

    before = resident()
    flood = [begin(page, LONG) for _ in range(200)]
    statuses = [int(connection.recv(12).split()[1]) for connection in flood]
    assert (statuses.count(200), statuses.count(429)) == (LONGEST, 200 - LONGEST)
    assert resident() - before < 200
    for connection in flood:
        connection.close()
    for _ in range(600):  # the jobs of readers that left are ended, each after one network call
        status, _, told = ask(page, "/api/sample/start", SAMPLE, **JSON)
        if status == 200:
            break
        time.sleep(0.1)
    assert events(told)[-1]["kind"] == "done"


def test_a_job_ends_when_its_reader_leaves(page):
    with begin(page, {**LONG, "count": 64}) as connection:
        sent = b""
        while b'"step"' not in sent:  # its turn has come, so those of other tests have ended
            sent += connection.recv(1000)
    told = start(page)
    assert [event["place"] for event in told if event["kind"] == "queue"] in ([], [1])
    assert told[-1]["kind"] == "done"


def test_answers_say_what_a_browser_may_do(page):
    _, headers, _ = ask(page)
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    for name in ("localhost", "[::1]", "127.0.0.1"):
        assert ask(page, Host=f"{name}:9000")[0] == 200  # as an ssh tunnel has it


def test_a_token_is_asked_for(runs):
    with served(runs, token="s3cret") as address:
        assert ask(address)[0] == 403
        assert ask(address, "/?token=wrong")[0] == 403
        assert ask(address, "/api/models?token=s3cret")[0] == 403
        status, headers, _ = ask(address, "/?token=s3cret")
        assert status == 200
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert ask(address, "/api/models", Cookie=cookie.split(";")[0])[0] == 200
        assert ask(address, "/api/models", Cookie=f"{cookie.partition('=')[0]}=wrong")[0] == 403


def test_pages_at_two_ports_keep_their_cookies(runs):
    """A browser sends the cookies of a host to all its ports."""
    with served(runs, token="one") as one, served(runs, token="two") as two:
        jar = {}
        for address, token in ((one, "one"), (two, "two")):
            _, headers, _ = ask(address, f"/?token={token}")
            name, _, value = headers["set-cookie"].split(";")[0].partition("=")
            jar[name] = value
        cookies = "; ".join(f"{name}={value}" for name, value in jar.items())
        assert [ask(address, "/api/models", Cookie=cookies)[0] for address in (one, two)] == [200, 200]


def test_an_unforeseen_error_is_one_line(runs, monkeypatch):
    from ddpm.page.tabs import sample

    def broken(*_):
        raise RuntimeError("a detail of the inside")

    monkeypatch.setattr(sample, "trajectory", broken)
    with served(runs) as address:
        told = start(address)[-1]
        assert told["kind"] == "error"
        assert "inside" not in told["line"]
        monkeypatch.undo()
        assert start(address)[-1]["kind"] == "done"


def test_what_is_kept_is_bounded(runs, monkeypatch):
    from ddpm.page import state

    monkeypatch.setattr(state, "KEPT_BYTES", 10_000)
    held = state.State((), runs, torch.device("cpu"))
    first = held.keep(np.zeros((64, 64, 1), np.uint8))
    for _ in range(3):
        last = held.keep(np.zeros((64, 64, 1), np.uint8))
    assert held.picture(last["id"]).shape == (64, 64, 1)
    with pytest.raises(InputError, match="no more"):
        held.picture(first["id"])


def test_importing_and_help_load_nothing_of_it(tmp_path):
    code = "import sys, ddpm.cli.main; sys.modules['ddpm.cli.main'].parser().format_help(); ddpm.load; "
    code += "print({'starlette', 'uvicorn', 'ddpm.page'} & set(sys.modules))"
    assert printed(code, tmp_path).strip() == "set()"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--port 70000", "--port 70000: want a whole number, 0 to 65535"),
        ("--token a/b", "--token 'a/b': want letters, digits, - and _"),
        ("nothing", "nothing: no such file or folder"),
    ],
)
def test_wrong_words_are_one_line(words, line, capsys):
    assert main(["page", *words.split()]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("windows", [False, True])
def test_a_port_has_one_page(windows, monkeypatch):
    """Windows has an option for it, and SO_REUSEADDR would undo it there. Another option stands for it here."""
    if windows:
        monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_KEEPALIVE, raising=False)
    with server._listen("127.0.0.1", 0) as first:
        options = [bool(first.getsockopt(socket.SOL_SOCKET, o)) for o in (socket.SO_REUSEADDR, socket.SO_KEEPALIVE)]
        assert options == [not windows, windows]
        with pytest.raises(InputError, match="want another --port"):
            server._listen("127.0.0.1", first.getsockname()[1])


def test_open_to_the_network_says_so_and_makes_a_token(tmp_path):
    words, out, err = ["-m", "ddpm", "page", "--host", "0.0.0.0", "--port", 0], tmp_path / "out", tmp_path / "err"
    process = start_python([*words, "--runs", tmp_path], tmp_path, out, err)
    try:
        wait_until(lambda: out.exists() and out.read_text().endswith("\n"))
        address = urlsplit(out.read_text().splitlines()[0])
        here = f"http://127.0.0.1:{address.port}"
        refused, (opened, headers, _) = ask(here)[0], ask(here, f"/?{address.query}")
        busy = begin(here, {**LONG, "count": 64}, Cookie=headers["set-cookie"].split(";")[0])
        assert busy.recv(15) == b"HTTP/1.1 200 OK"
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        busy.close()
    finally:
        process.kill()
    said = err.read_text()
    assert (refused, opened, process.exitcode) == (403, 200, 0)
    assert len(address.query) > len("token=") + 16
    assert "everybody who reaches this machine" in said
    assert "Traceback" not in said
