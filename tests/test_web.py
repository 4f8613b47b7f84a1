"""`ddpm export --to web`: the page's noise is ours bit for bit, and its images are those of `ddpm sample`."""

import ctypes
import functools
import http.server
import itertools
import json
import re
import shutil
import subprocess
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from browser import CHROMIUM, browsing
from PIL import Image

from ddpm import schedule
from ddpm.cli import main
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files.interop import onnx
from ddpm.files.opening import open_checkpoint
from ddpm.noise import mix, normal
from ddpm.pixels import Values
from ddpm.run import web
from ddpm.run.sample import trajectory
from ddpm.samplers import named

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


# -- the modules, in node ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """The page's modules where node takes them for modules."""
    folder = tmp_path_factory.mktemp("modules") / "web"
    shutil.copytree(web.PAGE, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    return folder


def node(folder, program, given):
    """Run a program that has the value `given`, and return the float32 numbers that it writes."""
    source = f"const given = JSON.parse(require('fs').readFileSync(0));\n(async () => {{ {program} }})()"
    done = subprocess.run(["node", "-e", source], cwd=folder, input=json.dumps(given).encode(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, np.float32)


DRAWS = """
  const { normal } = await import("./noise.js");
  const parts = given.levels.flatMap((t) => given.seeds.map((seed) => normal(BigInt(seed), given.length, t)));
"""
WRITE = "for (const part of parts) require('fs').writeSync(1, Buffer.from(part.buffer));"
SEEDS = [*range(990), 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 10**9, 10**12, 10**15]
LEVELS = [1, 2, 500, 1000]


def assert_same_bits(draws, want):
    """Assert that float32 numbers are equal, bit for bit.

    In the tail beyond 3.65, NumPy's numbers depend on the C library's log1pf; noise.js has that of glibc 2.36.
    With another library, the last bit of a few numbers may differ there, and nowhere else.
    """
    draws, want = np.asarray(draws).ravel(), want.numpy().ravel()
    differ = draws.view(np.int32) != want.view(np.int32)
    if not glibc_log1pf():
        near = np.abs(draws.view(np.int32).astype(int) - want.view(np.int32)) <= 1
        differ &= ~(near & (np.abs(want) > 3.65))
    assert len(draws) == len(want) > 0
    assert not differ.any(), (int(differ.sum()), draws[differ][:3], want[differ][:3])


def glibc_log1pf():
    """Whether the C library's log1pf rounds as noise.js does where the nearest float32 would be another one."""
    try:
        log1pf = ctypes.CDLL("libm.so.6").log1pf
    except OSError:
        return False
    log1pf.restype, log1pf.argtypes = ctypes.c_float, [ctypes.c_float]
    x = -np.arange(1, 2**24, 65_521, dtype=np.float64) / 2**24
    nearest = np.log1p(x).astype(np.float32)
    return any(log1pf(float(a)) != b for a, b in zip(x, nearest, strict=True))


@needs_node
def test_noise_is_numpys_bit_for_bit(modules):
    """1,000 seeds at four levels, of 64 numbers each."""
    draws = node(modules, DRAWS + WRITE, {"seeds": list(map(str, SEEDS)), "levels": LEVELS, "length": 64})
    assert len(SEEDS) == 1000
    assert_same_bits(draws, torch.stack([normal(SEEDS, (64,), t) for t in LEVELS]))


@needs_node
def test_noise_of_a_large_image_has_numpys_tail(modules):
    """The tail, beyond 3.65, is drawn by another rule, and one of 4,000 numbers comes from there."""
    want = normal([7], (3, 1024, 1024), 500)
    assert int((want.abs() > 3.6541529).sum()) > 500
    assert_same_bits(node(modules, DRAWS + WRITE, {"seeds": ["7"], "levels": [500], "length": 3 * 2**20}), want)


@needs_node
def test_the_keys_are_those_of_mix(modules):
    keys = [[0], [1, 2], [2**64 - 1, 5], [-1, 3], [2**80 + 1]]
    program = """
      const { mix } = await import("./noise.js");
      require("fs").writeSync(1, Buffer.from(BigUint64Array.from(given, (keys) => mix(...keys.map(BigInt))).buffer));
    """
    got = node(modules, program, [list(map(str, k)) for k in keys]).view(np.uint64)
    assert got.tolist() == [mix(*k) for k in keys]


PATHS = """
  const { sample } = await import("./sampler.js");
  const parts = [];
  for (const { model, settings } of given) {
    const size = model.shape.reduce((a, b) => a * b), learned = model.variance.startsWith("learned");
    const network = async (x, timestep, labels) => { // `formula` in Python
      const width = learned ? 2 * size : size, out = new Float32Array((x.length / size) * width);
      for (let i = 0; i < x.length; i++) {
        const image = Math.floor(i / size), place = image * width + (i % size);
        out[place] = 0.6 * x[i] + 0.1 * (labels ? labels[image] : -1) + timestep / 1000;
        if (learned) out[place + size] = 0.3 * x[i] - 1;
      }
      return out;
    };
    for await (const step of sample(model, network, settings)) parts.push(step.x, step.x0);
  }
"""


def formula(x, timestep, y):
    """A network that is a formula."""
    return 0.6 * x + (0.1 * y + timestep / 1000).view(-1, 1, 1, 1)


def formula_with_variance(x, timestep, y):
    return torch.cat([formula(x, timestep, y), 0.3 * x - 1], 1)


@needs_node
@pytest.mark.parametrize("predict", ["eps", "x0", "v", "mu"])
def test_samplers_are_those_of_the_library(predict, modules):
    """Every step, for a network that is a formula: each variance, with clipping and without, guidance and eta."""
    T, seeds, y, shape, cases, want = 40, [3, 4, 5], [1, 0, 2], (2, 3, 2), [], []
    table = schedule.cosine(T)
    for variance, sampler, clip, guidance in itertools.product(
        ("fixed_large", "fixed_small", "learned", "learned_range"), ("ddim", "ancestral"), (True, False), (1.0, 2.0)
    ):
        network = formula if variance.startswith("fixed") else formula_with_variance
        eta = 0.7 if clip and sampler == "ddim" else 0.0
        steps = T if sampler == "ancestral" and (predict == "mu" or variance == "learned") else 7
        denoiser = Denoiser(network, table, predict, variance, clip).guided(guidance)
        for step in trajectory(denoiser, shape, seeds, named(sampler, eta), steps, y=torch.tensor(y)):
            want += [step.x, step.x0]
        model = {"T": T, "shape": shape, "predict": predict, "variance": variance, "clip": clip}
        settings = {"sampler": sampler, "steps": steps, "eta": eta, "seeds": seeds, "labels": y, "guidance": guidance}
        cases.append({"model": {**model, "alpha_bar": table.alpha_bar.tolist()}, "settings": settings})
    got = torch.from_numpy(node(modules, PATHS + WRITE, cases).copy()).view(len(want), *want[0].shape)
    torch.testing.assert_close(got, torch.stack(want), rtol=2e-4, atol=2e-4)


# -- the runtime -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """A folder with the files of onnxruntime-web."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    try:
        files = web.read_runtime(None)
    except InputError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("runtime")
    (folder / "dist").mkdir()
    for name, content in files.items():
        (folder / "dist" / name).write_bytes(content)
    return folder


def test_a_runtime_that_is_missing_or_another_one_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"min\.mjs is not there; want a folder with onnxruntime-web@1\.30\.0"):
        web.read_runtime(tmp_path)
    for name in web.RUNTIME:
        (tmp_path / name).write_text("another version")
    with pytest.raises(InputError, match=r"is not that of version 1\.30\.0, since its SHA-512 differs"):
        web.read_runtime(tmp_path)


def test_without_npm_one_line_says_what_to_get(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    which = shutil.which
    monkeypatch.setattr(web.shutil, "which", lambda name: None if name == "npm" else which(name))
    assert main(["export", "digits", "--to", "web", str(tmp_path / "page")]) == 2
    error = capsys.readouterr().err
    assert "npm is not installed" in error
    assert "`npm pack onnxruntime-web@1.30.0`" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "page").exists()


def test_what_the_page_cannot_show_is_refused(tmp_path):
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    digits = open_checkpoint("digits")
    for changes, reason in (
        ({"values": Values("uint16", 0, 65535)}, "grey and RGB images of 8 bits"),
        ({"clip": 0.9}, "clip 0.9"),
        ({"variance": torch.ones(1001, dtype=torch.float64)}, "variance calibrated"),
    ):
        with pytest.raises(InputError, match=reason):
            web.check(replace(digits, denoiser=replace(digits.denoiser, **changes)), tmp_path / "page")


# -- the page, in Chromium ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(runtime, tmp_path_factory, request):
    """The page of digits, with the graph that `ddpm export --to onnx` wrote."""
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    content = request.getfixturevalue("digits_onnx").read_bytes()
    folder = tmp_path_factory.mktemp("page") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "graph", lambda checkpoint: (content, onnx.settings(checkpoint)))
        assert main(["export", "digits", "--to", "web", str(folder), "--runtime", str(runtime)]) == 0
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    """The server of `python3 -m http.server` without its notes."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def serve():
    """A function that serves a folder and returns its address."""
    servers = []

    def start(folder):
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(browser, exported, serve):
    """The page, loaded, and the addresses that it asked for in `page.asked`, errors in `page.errors`."""
    page = browser.new_context(accept_downloads=True).new_page()
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda line: page.errors.append(line.text) if line.type == "error" else None)
    page.address = serve(exported)
    page.goto(page.address)
    page.wait_for_selector("#form:not([hidden])")
    return page


def fill(page, **settings):
    """Choose settings in the form, by the ids of their fields."""
    for name, value in settings.items():
        field = page.locator(f"#{name}")
        field.select_option(value) if name in ("class", "sampler") else field.fill(str(value))


def wait_for(page, words):
    """Wait until the page has a text, or text of a pattern."""
    page.get_by_text(words).wait_for(timeout=120_000)


def saved(page, path):
    """The picture that `Save PNG` saves."""
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(path)
    return np.asarray(Image.open(path).convert("L")).astype(int)


def test_chromiums_noise_is_numpys_bit_for_bit(page):
    """As in node: browsers differ in Math.exp and Math.log1p, of which noise.js uses the first alone."""
    program = (
        "async (given) => {"
        + DRAWS.replace("./noise", "/noise")
        + (
            "const all = new Float32Array(parts.length * given.length);"
            "parts.forEach((part, i) => all.set(part, i * given.length));"
            "return Array.from(new Int32Array(all.buffer)); }"
        )
    )
    bits = page.evaluate(program, {"seeds": list(map(str, SEEDS)), "levels": LEVELS, "length": 64})
    assert_same_bits(np.array(bits, np.int32).view(np.float32), torch.stack([normal(SEEDS, (64,), t) for t in LEVELS]))


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"sampler": "ddim", "steps": 20, "class": ""}, "--sampler ddim --steps 20"),
        (
            {"sampler": "ddim", "steps": 20, "class": "7", "guidance": 3, "eta": 0.5},
            "--sampler ddim --steps 20 --class 7 --guidance 3 --eta 0.5",
        ),
        (
            {"sampler": "ancestral", "steps": 30, "class": "all", "guidance": 1.5},
            "--sampler ancestral --steps 30 --class all",
        ),
    ],
)
def test_images_are_those_of_ddpm_sample(fields, options, page, tmp_path):
    """Within one grey level in at least 99% of the pixels; the saved picture has the layout of `ddpm sample`."""
    fill(page, **fields, seed=11, count=10)
    page.click("#start")
    wait_for(page, "10 images in")
    ours = saved(page, tmp_path / "page.png")
    out = tmp_path / "ours.png"
    words = f"sample digits -n 10 --seed 11 --precision float32 --device cpu --out {out} --json {options}".split()
    assert main(words) == 0
    theirs = np.asarray(Image.open(out).convert("L")).astype(int)
    assert ours.shape == theirs.shape
    assert ours.std() > 50
    assert (np.abs(ours - theirs) <= 1).mean() >= 0.99
    fill(page, seed=12)  # negative control: other noise makes other images
    assert (np.abs(saved(page, tmp_path / "noise.png") - theirs) <= 1).mean() < 0.9


def test_scrubber_switch_and_play(page, tmp_path):
    fill(page, sampler="ddim", steps=10, seed=0, count=4, **{"class": ""})
    page.click("#start")
    wait_for(page, "4 images in")
    pictures = {}
    for step, shown in itertools.product((1, 10), ("x", "x0")):
        page.check(f"[name=shown][value={shown}]")
        page.locator("#scrubber").fill(str(step))
        pictures[step, shown] = saved(page, tmp_path / f"{step}{shown}.png")
        assert page.inner_text("#caption").startswith(f"Step {step} of 10, t = {1000 - 100 * step}")
    assert (pictures[10, "x"] == pictures[10, "x0"]).all()  # the last step's x0^ is the image
    assert (pictures[1, "x"] != pictures[1, "x0"]).mean() > 0.3
    page.click("#play")
    assert page.inner_text("#play") == "Pause"
    page.get_by_role("button", name="Play").wait_for()  # it stops at the end
    assert page.input_value("#scrubber") == "10"


def test_cancel_works_at_once_and_the_next_sampling_is_not_disturbed(page, tmp_path):
    fill(page, sampler="ancestral", steps=1000, seed=0, count=60, **{"class": "all"})
    page.click("#start")
    wait_for(page, re.compile(r"Step [1-9]\d* of 1000"))
    page.click("#cancel")
    wait_for(page, "Cancelled after")
    page.locator("#cancel:disabled").wait_for()
    fill(page, sampler="ddim", steps=5, seed=3, count=9, **{"class": ""})
    pictures = []
    for _ in range(2):
        page.click("#start")
        wait_for(page, "9 images in")
        pictures.append(saved(page, tmp_path / "a.png"))
    assert (pictures[0] == pictures[1]).all()


def test_the_keyboard_alone_samples(page):
    fill(page, sampler="ddim", steps=5, count=4, **{"class": ""})
    page.locator("#class").focus()
    visited = []
    while page.evaluate("document.activeElement.id") != "start":
        page.keyboard.press("Tab")
        visited.append(page.evaluate("document.activeElement.id"))
        assert len(visited) < 20
    assert {"sampler", "steps", "seed", "count"} <= set(visited)
    page.keyboard.press("Enter")
    wait_for(page, "4 images in")


def test_a_wrong_value_is_not_sampled(page):
    fill(page, sampler="ddim", steps=1001)
    page.click("#start")
    assert page.evaluate("document.querySelector('#steps').validity.rangeOverflow")
    assert page.locator("#cancel").is_disabled()


def test_every_field_has_a_label_and_a_phone_shows_all(page):
    fields = "[...document.querySelectorAll('input, select, progress')]"
    assert page.evaluate(f"{fields}.length") >= 10
    assert (
        page.evaluate(f"{fields}.filter((field) => !field.labels.length && !field.ariaLabel).map((field) => field.id)")
        == []
    )
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.set_viewport_size({"width": 1280, "height": 800})


def test_all_requests_go_to_the_pages_own_origin_and_no_error_is_reported(page):
    """After all that the tests above do. The policy of the page forbids other origins."""
    asked = [url for url in page.asked if not url.startswith(("data:", f"blob:{page.address}"))]
    names = {url.removeprefix(page.address) for url in asked}
    assert names >= {"page.js", "worker.js", "model.onnx", "ort/ort-wasm-simd-threaded.wasm"}
    assert [url for url in asked if not url.startswith(page.address)] == []
    assert page.errors == []
    refused = "fetch('http://127.0.0.1:1/').then(() => 'fetched', (error) => error.name)"
    assert page.evaluate(refused) == "TypeError"
    assert "Content Security Policy" in page.errors[-1]


def test_opened_as_a_file_the_page_says_how_to_serve_it(browser, exported):
    page = browser.new_page()
    page.goto((exported / "index.html").as_uri())
    assert page.get_by_text("python3 -m http.server -d FOLDER").is_visible()
    assert not page.locator("#form").is_visible()
    page.close()


def test_a_missing_file_is_named(browser, exported, serve, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "page")
    (folder / "model.onnx").unlink()
    page = browser.new_page()
    page.goto(serve(folder))
    page.get_by_text("The model cannot be loaded: model.onnx: the server answers 404").wait_for()
    page.close()


def test_the_folder_holds_what_the_page_needs_and_nothing_else(exported):
    names = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert names == {
        "model.onnx",
        "model.json",
        *(f"ort/{name}" for name in web.RUNTIME),
        *(p.name for p in web.PAGE.iterdir()),
    }
    settings = json.loads((exported / "model.json").read_text())
    assert settings == {**onnx.settings(open_checkpoint("digits")), "guidance": 1.5}
