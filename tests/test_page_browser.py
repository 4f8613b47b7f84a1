"""The page in a real browser, used as somebody uses it: by clicks, keys and looks."""

import base64
import io
import json
import re
from urllib.parse import urlsplit

import numpy as np
import pytest
from browser import browsing, need_browser, open_page, served
from PIL import Image

from ddpm.cli import main
from ddpm.files import images

need_browser()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("page") / "runs"


@pytest.fixture(scope="module")
def address(runs):
    with served(runs) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with browsing() as browser:
        yield browser


@pytest.fixture
def visit(browser, address):
    """A function that opens the page at a tab. What the pages ask for stays at the server, and no script fails."""
    pages = []

    def visit(tab="sample", **settings):
        pages.append(open_page(browser, address, tab, **settings))
        return pages[-1]

    yield visit
    for page in pages:
        assert {urlsplit(url).netloc for url in page.requests if not url.startswith(("data:", "blob:"))} == {
            urlsplit(address).netloc
        }
        assert page.faults == []
        page.close()


def status(page, line):
    page.wait_for_selector(f"#panel-sample [role=status]:text-is('{line}')")


def shown(page):
    """The pixels of the first canvas."""
    url = page.evaluate("document.querySelector('#panel-sample canvas').toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("L"))


def test_images_by_clicks_are_those_of_the_command_line(visit, tmp_path):
    page = visit()
    page.locator("#panel-sample").get_by_label("Images", exact=True).fill("1")
    page.get_by_role("button", name="Sample", exact=True).click()
    status(page, "Done.")
    assert main(["sample", "digits", "-n", "1", "--seed", "0", "--sampler", "ddim", "--steps", "20",
                 "--out", str(tmp_path / "image.npz")]) == 0  # fmt: skip
    image = np.load(tmp_path / "image.npz")["arr_0"][0, ..., 0]
    canvas = shown(page)
    scale = len(canvas) // len(image)
    assert (canvas == image.repeat(scale, 0).repeat(scale, 1)).all()
    with page.expect_download() as download:
        page.get_by_role("link", name="Save PNG").click()
    command = page.locator("#panel-sample code").first.inner_text().split()
    assert main([*command[1:-1], str(tmp_path / "samples.png")]) == 0
    saved = np.asarray(images.read(download.value.path()))
    assert (saved == np.asarray(images.read(tmp_path / "samples.png"))).all()


def test_the_scrubber_shows_noise_and_estimates(visit):
    page = visit()
    page.get_by_role("button", name="Sample", exact=True).click()
    status(page, "Done.")
    end = shown(page)
    scrubber = page.locator("#panel-sample").get_by_label("Noise level t")
    scrubber.press("Home")
    assert "t = 1000" in page.locator("figcaption").first.inner_text()
    noise = shown(page)
    page.locator("#panel-sample").get_by_label(re.compile("Show x̂₀")).check()
    estimate = shown(page)
    assert not (noise == end).all()
    assert not (noise == estimate).all()
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Pause").wait_for()
    page.get_by_role("button", name="Play").wait_for()
    assert (shown(page) == end).all()


def test_two_settings_stand_side_by_side(visit):
    page = visit()
    page.locator("#panel-sample").get_by_label("Compare with a second setting").check()
    page.locator("#panel-sample").get_by_label("Steps").nth(1).fill("3")
    page.get_by_role("button", name="Sample", exact=True).click()
    status(page, "Done.")
    commands = page.locator("#panel-sample code").all_inner_texts()
    assert "--sampler ddim --steps 20" in commands[0]
    assert "--sampler ancestral --steps 3" in commands[1]


def test_cancel_and_the_queue_between_two_tabs(visit):
    first, second = visit(), visit()
    first.locator("#panel-sample").get_by_label("Images", exact=True).fill("64")
    first.locator("#panel-sample").get_by_label("Sampler", exact=True).first.select_option("ancestral")
    first.locator("#panel-sample").get_by_label("Steps").first.fill("1000")
    first.get_by_role("button", name="Sample", exact=True).click()
    first.wait_for_selector("progress:not([value='0'])")
    second.get_by_role("button", name="Sample", exact=True).click()
    second.get_by_text("Waits for one other job to end.").wait_for()
    first.get_by_role("button", name="Cancel").click()
    status(first, "Cancelled.")
    assert 0 < first.evaluate("document.querySelector('progress').value") < 1
    status(second, "Done.")


def test_closing_a_tab_ends_its_job(visit, browser, address):
    first = open_page(browser, address, "sample")
    first.locator("#panel-sample").get_by_label("Images", exact=True).fill("64")
    first.locator("#panel-sample").get_by_label("Sampler", exact=True).first.select_option("ancestral")
    first.locator("#panel-sample").get_by_label("Steps").first.fill("1000")
    first.get_by_role("button", name="Sample", exact=True).click()
    first.wait_for_selector("progress:not([value='0'])")
    first.close()
    second = visit()
    second.get_by_role("button", name="Sample", exact=True).click()
    status(second, "Done.")


def test_an_error_is_one_line_that_can_be_closed(visit):
    page = visit()
    page.evaluate("""document.querySelector('#panel-sample form').noValidate = true""")
    page.locator("#panel-sample").get_by_label("Images", exact=True).fill("65")
    page.get_by_role("button", name="Sample", exact=True).click()
    alert = page.get_by_role("alert")
    assert "count 65: want a whole number, 1 to 64" in alert.inner_text()
    alert.get_by_role("button").click()
    assert alert.is_hidden()


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("new Blob(['hello'])", "the picture: not an image"),
        ("new Blob([new Uint8Array(4e7)])", "40,000,000 bytes; want at most 30,000,000"),
        ("await large()", "the picture: 8000x5000 pixels; want at most 16 million"),
    ],
)
def test_what_is_no_picture_for_the_page_is_refused_in_one_line(browser, address, file, line):
    page = open_page(browser, address)
    told = page.evaluate(
        """async () => {
            const large = () => new Promise((done) => {
                const canvas = document.createElement("canvas");
                Object.assign(canvas, { width: 8000, height: 5000 }).getContext("2d").fillRect(0, 0, 9, 9);
                canvas.toBlob(done);
            });
            const { upload } = await import("/common.js");
            try { return JSON.stringify(await upload(FILE)); } catch (error) { return error.message; }
        }""".replace("FILE", file)
    )
    page.close()
    assert line in told
    assert "\n" not in told


def test_the_keyboard_alone_suffices(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "tab-sample"
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.id") == "tab-runs"
    assert page.locator("#panel-runs").is_visible()
    page.keyboard.press("Home")
    page.locator("#panel-sample").get_by_label("Model", exact=True).wait_for()  # the form comes after the tabs
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.labels[0].textContent") == "Model"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    status(page, "Done.")


def test_a_run_that_grows_is_followed(visit, runs):
    run = runs / "grows"
    (run / "samples").mkdir(parents=True)
    (run / "config.json").write_text('{"steps": 300}')
    log = run / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": i, "loss": 1 / i}) + "\n" for i in range(1, 10)))
    images.save(run / "samples/00000005.png", np.zeros((4, 4, 1), np.uint8))
    page = visit("runs")
    page.get_by_text("9 of 300").wait_for()
    assert page.locator("#panel-runs svg").count() == 1
    with log.open("a") as file:
        levels = {"step": 40, "loss": 0.25, "held_out": 0.3, "held_out_by_level": [0.1, 0.2]}
        file.write(json.dumps(levels) + '\n{"step": 41, "lo')
    images.save(run / "samples/00000040.png", np.ones((4, 4, 1), np.uint8))
    page.get_by_text("40 of 300").wait_for()
    assert page.locator("#panel-runs svg").count() == 3
    assert page.get_by_alt_text("grid of samples at step 40").is_visible()
    page.locator("#panel-runs").get_by_label("Step", exact=True).press("Home")
    assert page.get_by_alt_text("grid of samples at step 5").is_visible()
    assert "0.25 at step 40" in page.locator("#panel-runs desc").first.text_content()


@pytest.mark.parametrize("tab", ["sample", "runs"])
def test_a_phone_shows_all_without_scrolling_sideways(visit, tab):
    page = visit(tab, viewport={"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
