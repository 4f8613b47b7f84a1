"""The tabs Edit and Compress in a real browser: what they make is what the command line makes."""

import base64
import io
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from browser import browsing, need_browser, open_page, served
from conftest import train
from PIL import Image
from several import wait_until

from ddpm import codec
from ddpm.cli import main
from ddpm.files import images
from ddpm.files.models import MODELS
from ddpm.likelihood import vlb
from ddpm.noise import per_image
from ddpm.pixels import to_signal
from ddpm.run.compress import load_codec

need_browser()

from ddpm.page.state import State  # noqa: E402
from ddpm.page.tabs import compress, edit  # noqa: E402
from ddpm.page.watch import watched  # noqa: E402

DROP = """(element, [name, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name));
  element.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


PASTE = """([name, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name));
  document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
}"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Two images of the model as files, a.png and b.png."""
    folder = tmp_path_factory.mktemp("digits")
    sampled = ["sample", "digits", "-n", "2", "--class", "3", "5", "--sampler", "ddim", "--steps", "5"]
    assert main([*sampled, "--out", str(folder / "made")]) == 0
    for name, file in zip("ab", sorted((folder / "made").glob("*.png")), strict=True):
        file.rename(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with served(tmp_path_factory.mktemp("runs")) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with browsing() as browser:
        yield browser


@pytest.fixture
def visit(browser, address):
    """A function that opens a tab, and returns the page and the tab's section."""
    pages = []

    def visit(tab):
        pages.append(open_page(browser, address, tab, viewport={"width": 1280, "height": 1600}))
        return pages[-1], pages[-1].locator(f"#panel-{tab}")

    yield visit
    for page in pages:
        asked = {urlsplit(url).netloc for url in page.requests if not url.startswith(("data:", "blob:"))}
        assert asked == {urlsplit(address).netloc}
        assert [fault for fault in page.faults if "status of 4" not in fault] == []  # a refused file is no fault
        page.close()


def pixels(source):
    """The pixels of a file or of its bytes."""
    return np.asarray(images.read(source))


def add(section, *files):
    """Choose files for the places of pictures, in their order."""
    for place, file in enumerate(files):
        section.locator(".slot input[type=file]").nth(place).set_input_files(str(file))
        section.locator(".slot img").nth(place).wait_for()


def saved(page, link, to):
    """The path of the file that a link saves."""
    with page.expect_download() as download:
        link.click()
    download.value.save_as(to)
    return to


def made(page, section, address):
    """The images that the tab Edit made, in their order, once they are there."""
    section.locator("[role=status]", has_text="Done.").wait_for()
    links = section.locator(".made a")
    urls = [links.nth(i).get_attribute("href") for i in range(links.count())]
    return [pixels(urlopen(address + url).read()) for url in urls]


def same(section, folder, tmp_path, monkeypatch, **renamed):
    """The images of the command line that the page shows, run in a folder with its pictures."""
    words = section.locator(".command code").first.inner_text().split()
    assert words[0] == "ddpm"
    monkeypatch.chdir(folder)
    assert (
        main([renamed.get(word.removesuffix(".png"), word) for word in words[1:]] + ["--out", f"{tmp_path}/cli"]) == 0
    )
    return [pixels(file) for file in sorted((tmp_path / "cli").glob("*.png"))]


def equal(a, b):
    return len(a) == len(b) > 0 and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def status_line(section, text):
    section.locator(".status", has_text=text).wait_for()


# -- Edit --------------------------------------------------------------------------------------------------------------


def test_a_painted_mask_leaves_the_other_pixels(visit, digits, address, tmp_path, monkeypatch):
    """Two pixels by keyboard and a stroke of the mouse, of which the eraser takes one; then what the command makes."""
    page, section = visit("edit")
    add(section, digits / "a.png")
    canvas = section.locator(".painter canvas")
    section.locator(".painter small", has_text="0 of 64 pixels are painted").wait_for()
    section.get_by_label("Size of the brush").fill("1")
    canvas.focus()
    for key in ("Space", "ArrowRight", "Shift+ArrowDown"):  # (4, 4), and (5, 5) in rows and columns from 0
        page.keyboard.press(key)
    frame = canvas.bounding_box()
    at = lambda row, column: (  # noqa: E731
        frame["x"] + (column + 0.5) * frame["width"] / 8,
        frame["y"] + (row + 0.5) * frame["height"] / 8,
    )
    page.mouse.move(*at(1, 2))
    page.mouse.down()
    page.mouse.move(*at(1, 5))
    page.mouse.up()
    section.get_by_label("Eraser").check()
    page.mouse.click(*at(1, 3))
    mask = np.zeros((8, 8), bool)
    mask[[4, 5, 1, 1, 1], [4, 5, 2, 4, 5]] = True
    section.get_by_label("Steps").fill("10")
    section.get_by_label("Passes").fill("2")
    section.get_by_role("button", name="Redraw").click()
    versions, before = made(page, section, address), pixels(digits / "a.png")
    assert len(versions) == 4
    assert all(np.array_equal(version[~mask], before[~mask]) for version in versions)
    assert not any(np.array_equal(version[mask], before[mask]) for version in versions)
    painted = saved(page, section.get_by_role("link", name="Save the mask"), digits / "mask.png")
    assert np.array_equal(pixels(painted) == 255, mask)
    assert equal(versions, same(section, digits, tmp_path, monkeypatch, picture="a.png"))
    section.get_by_role("button", name="Use this: image 2 becomes the picture").click()
    section.locator(".painter small", has_text="0 of 64 pixels").wait_for()
    source = section.locator(".slot img").first.get_attribute("src")
    assert np.array_equal(pixels(urlopen(address + source).read()), versions[1])


def test_versions_from_a_level(visit, digits, address, tmp_path, monkeypatch):
    page, section = visit("edit")
    section.get_by_label("Redraw all").check()
    add(section, digits / "a.png")
    section.get_by_label("Noise level t").fill("300")
    section.get_by_label("Class").select_option("7")
    section.get_by_label("Steps").fill("5")
    section.get_by_label("Images").fill("2")
    section.get_by_role("button", name="Redraw").click()
    versions = made(page, section, address)
    assert equal(versions, same(section, digits, tmp_path, monkeypatch, picture="a.png"))
    assert len(versions) == 2


def test_the_ends_of_the_strip_are_the_reconstructions(visit, digits, address, tmp_path, monkeypatch):
    page, section = visit("edit")
    section.get_by_label("Mix two").check()
    add(section, digits / "a.png", digits / "b.png")
    section.get_by_label("Steps").fill("5")
    section.get_by_label("Images").fill("3")
    section.get_by_role("button", name="Mix").click()
    strip = made(page, section, address)
    assert equal(strip, same(section, digits, tmp_path, monkeypatch))
    (tmp_path / "cli").rename(tmp_path / "strip")
    place = section.locator(".slot").nth(1)
    before = place.locator("img").get_attribute("src")
    place.locator("input[type=file]").set_input_files(str(digits / "a.png"))
    place.locator(f"img:not([src='{before}'])").wait_for()
    section.get_by_role("button", name="Mix").click()
    itself = made(page, section, address)
    assert np.array_equal(itself[0], strip[0])  # between a picture and itself, w = 0 is its reconstruction, too
    assert not np.array_equal(itself[1], strip[1])


def test_a_larger_picture_is_fitted_and_that_is_said(visit):
    """It is pasted. What was changed when it was added is said, too."""
    grey = Image.fromarray(np.arange(20 * 30, dtype=np.uint8).reshape(20, 30))
    grey.quantize(16).save(file := io.BytesIO(), "PNG")
    page, section = visit("edit")
    page.evaluate(PASTE, ["large.png", list(file.getvalue())])
    said = "8×8 pixels; mode P is converted to RGB; 20x30 is scaled and cropped to 8x8, the model's size; "
    section.locator(".slot small", has_text=f"{said}mode RGB is converted to L.").wait_for()


def test_cancel_ends_an_edit_of_a_sample(visit, address):
    _, section = visit("edit")
    section.get_by_role("button", name="Take a sample").first.click()
    section.get_by_role("button", name="Paint all").click()
    section.get_by_label("Steps").fill("1000")
    section.get_by_label("Passes").fill("100")
    section.get_by_role("button", name="Redraw").click()
    section.locator("figcaption", has_text="at t = ").wait_for()
    section.get_by_role("button", name="Cancel").click()
    status_line(section, "Cancelled.")
    assert section.locator(".made li").count() == 0
    section.get_by_label("Steps").fill("2")
    section.get_by_label("Passes").fill("1")
    section.get_by_role("button", name="Redraw").click()
    status_line(section, "Done.")
    assert section.locator(".made li").count() == 4


def test_the_picture_that_is_saved_is_the_one_that_was_edited(visit, digits):
    """Also if another one is chosen while the job waits for one of another page."""
    busy, sampling = visit("sample")
    sampling.get_by_label("Images", exact=True).fill("64")
    sampling.get_by_label("Sampler", exact=True).first.select_option("ancestral")
    sampling.get_by_label("Steps").first.fill("1000")
    _, section = visit("edit")
    section.get_by_label("Redraw all").check()
    add(section, digits / "a.png")
    busy.get_by_role("button", name="Sample", exact=True).click()
    busy.wait_for_selector("progress:not([value='0'])")
    section.get_by_role("button", name="Redraw", exact=True).click()
    status_line(section, "Waits for one other job to end.")
    edited = section.locator(".slot img").first.get_attribute("src")  # the job has it, so it is fitted to the model
    section.locator(".slot input[type=file]").first.set_input_files(str(digits / "b.png"))
    section.locator(f".slot img:not([src='{edited}'])").first.wait_for()
    busy.get_by_role("button", name="Cancel").click()
    assert section.get_by_role("link", name="Save the picture").get_attribute("href") == edited


@pytest.mark.parametrize("slow", ["/api/pictures", "/api/edit/fit"])
def test_the_last_picture_that_was_chosen_stays(slow, visit, digits, address):
    """Also if the server is done with an earlier one later. An edit that is asked for at once waits for its picture."""
    page, section = visit("edit")
    section.get_by_label("Redraw all").check()
    section.get_by_label("Steps").fill("2")
    held = []
    page.route(f"**{slow}", lambda route: held.append(route))
    for count, name in enumerate(("b.png", "a.png"), 1):
        section.locator(".slot input[type=file]").first.set_input_files(str(digits / name))
        while len(held) < count:
            page.wait_for_timeout(20)
    section.get_by_role("button", name="Redraw", exact=True).click()
    for route in reversed(held):
        with page.expect_response(route.request.url):
            route.continue_()
    page.unroute(f"**{slow}")
    made(page, section, address)
    for picture in (
        section.locator(".slot img").first.get_attribute("src"),
        section.get_by_role("link", name="Save the picture").get_attribute("href"),
    ):
        assert np.array_equal(pixels(urlopen(address + picture).read()), pixels(digits / "a.png"))


def test_one_paints_once_the_picture_is_there(visit, digits):
    """Before, what is painted would be lost, as the picture comes with an empty mask."""
    page, section = visit("edit")
    held = []
    page.route("**/api/kept/*", lambda route: held.append(route))
    section.locator(".slot input[type=file]").first.set_input_files(str(digits / "a.png"))
    while len({route.request.url for route in held}) < 2:  # that of the picture, and that of the fitted one
        page.wait_for_timeout(20)
    assert section.locator(".painter").is_hidden()
    for route in held:
        route.continue_()
    section.locator(".painter small", has_text="0 of 64 pixels are painted").wait_for()


def test_a_mask_on_a_transparent_picture_can_be_erased(visit, address):
    page, _ = visit("edit")
    clear = base64.b64encode(images.to_png(np.zeros((8, 8, 4), np.uint8))).decode()
    alphas = page.evaluate(
        """async (url) => {
            const { painter } = await import("/painter.js");
            const box = painter(), canvas = box.querySelector("canvas"), alphas = [];
            await box.show({ url, width: 8, height: 8 });
            for (const name of ["Paint all", "Clear"]) {
                [...box.querySelectorAll("button")].find((button) => button.textContent === name).click();
                alphas.push(canvas.getContext("2d").getImageData(9, 9, 1, 1).data[3]);
            }
            return alphas;
        }""",
        f"data:image/png;base64,{clear}",
    )
    assert alphas[0] > 100
    assert alphas[1] == 0


def test_a_consistency_model_offers_its_own_sampler(browser, tmp_path):
    """Also for the sample that is edited. Another model brings the settings of the way back."""
    two, told = str(tmp_path / "two"), str(tmp_path / "told")
    assert train(two, "--steps", 1, "--predict", "v", "--loss", "consistency") == 0
    assert train(told, "--steps", 1, "--condition", "lowres:2") == 0
    with served(tmp_path / "none", told, two) as address:
        page = open_page(browser, address, "edit", viewport={"width": 1280, "height": 1600})
        section, sampler = page.locator("#panel-edit"), page.locator("#panel-edit").get_by_label("Sampler")
        refused = page.locator("#error", has_text="condition lowres:2, which the page does not know; want one without")
        refused.wait_for()  # it is the first model
        section.get_by_label("Model").select_option(two)
        section.get_by_label("Redraw all").check()
        section.get_by_role("button", name="Take a sample").first.click()
        section.locator(".slot img").first.wait_for()
        assert sampler.input_value() == "consistency"
        assert section.get_by_label("Steps").input_value() == "2"
        section.get_by_role("button", name="Redraw").click()
        assert len(made(page, section, address)) == 4
        section.get_by_label("Model").select_option("digits")
        section.locator("option", has_text="ddim").wait_for(state="attached")
        assert (sampler.input_value(), section.get_by_label("Steps").input_value()) == ("ddim", "50")
        page.close()


def test_a_dropped_text_file_is_one_line(visit):
    page, section = visit("edit")
    section.locator(".slot").first.evaluate(DROP, ["notes.txt", list(b"only words")])
    line = page.locator("#error span")
    page.locator("#error").wait_for()
    assert line.inner_text().startswith("the picture: not an image (PNG, JPEG, ")
    section.get_by_role("button", name="Redraw").click()
    assert line.inner_text() == "Add a picture first."


def test_nothing_painted_and_masks_of_another_size_are_refused():
    with pytest.raises(Exception, match="mask: nothing is painted"):
        edit._mask(base64.b64encode(bytes(8)).decode(), (8, 8))
    for text in ("", "AAAA", "no base64!"):
        with pytest.raises(Exception, match="mask: "):
            edit._mask(text, (8, 8))
    bits = np.random.default_rng(0).random((5, 7)) < 0.5
    painted = edit._mask(base64.b64encode(np.packbits(bits).tobytes()).decode(), (5, 7))
    assert np.array_equal(painted[0].numpy(), bits)


# -- Compress ----------------------------------------------------------------------------------------------------------


def canvas_picture(page):
    """What the canvas shows, a value for each pixel of 8x8."""
    url = page.evaluate("document.querySelector('#panel-compress canvas').toDataURL()")
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("L"))
    step = len(drawn) // 8
    return drawn[step // 2 :: step, step // 2 :: step]


def show(page, section, at):
    """Drag the handle to a byte."""
    section.get_by_label("The first bytes of the file").fill(str(at))
    section.locator("figcaption", has_text=f"The first {at} of").wait_for()


def shows(page, wanted):
    """Wait until the canvas shows this picture, which the browser decodes first."""
    wait_until(lambda: np.array_equal(canvas_picture(page), wanted))


def test_the_handle_shows_what_decompress_gives_at_this_byte(visit, digits, tmp_path):
    page, section = visit("compress")
    add(section, digits / "a.png")
    section.get_by_label("Aim").select_option("8")
    section.get_by_role("button", name="Compress").click()
    status_line(section, "Done.")
    file = saved(page, section.get_by_role("link", name="Save the file"), tmp_path / "page.ddpm")
    command = ["compress", "digits", str(digits / "a.png"), "--chunk-bits", "8", "--out", str(tmp_path / "cli.ddpm")]
    assert main(command) == 0
    data = file.read_bytes()
    assert data == (tmp_path / "cli.ddpm").read_bytes()
    model, seen = load_codec("digits"), set()
    for at in (15, 20, 30, 45, len(data) - 25, len(data) - 15, len(data) - 1, len(data)):
        show(page, section, at)
        shows(page, codec.decompress(model, data, at)[..., 0])
        seen.add(canvas_picture(page).tobytes())
    assert len(seen) > 5
    show(page, section, 45)
    words = section.locator(".command code").last.inner_text().replace("picture.ddpm", str(file)).split()
    assert main([*words[1:-1], str(tmp_path / "at.png")]) == 0
    shows(page, pixels(tmp_path / "at.png"))
    show(page, section, len(data))
    shows(page, pixels(digits / "a.png"))
    table = section.locator("tbody").inner_text()
    assert f"{len(data)}" in table
    assert "PNG" in table
    assert "WebP" in table


def test_a_shown_file_keeps_the_model_that_made_it(browser, digits, tmp_path):
    """The command and the bound are of this model, also once another one is chosen. A space in its name is quoted."""
    mine = str(tmp_path / "my model's.safetensors")
    for suffix in (".safetensors", ".calibration.json"):
        shutil.copy(MODELS / f"digits{suffix}", str(Path(mine).with_suffix(suffix)))
    with served(tmp_path, mine) as address:
        page = open_page(browser, address, "compress", viewport={"width": 1280, "height": 1600})
        section = page.locator("#panel-compress")
        add(section, digits / "a.png")
        section.get_by_label("Aim").select_option("8")
        section.get_by_role("button", name="Compress").click()
        section.get_by_label("Model").select_option("digits")
        status_line(section, "Done.")
        show(page, section, 45)
        words = shlex.split(section.locator(".command code").last.inner_text())
        assert words[:4] == ["ddpm", "decompress", mine, "picture.ddpm"]
        with page.expect_request("**/api/compress/bound") as asked:
            section.get_by_role("button", name="Measure the bound").click()
        assert asked.value.post_data_json["model"] == mine
        page.close()


def test_the_command_of_a_run_is_quoted(browser, tmp_path):
    (run := tmp_path / "runs/my run").mkdir(parents=True)
    (run / "config.json").write_text('{"steps": 30}')
    with served(tmp_path / "runs") as address:
        page = open_page(browser, address, "runs")
        line = page.locator("#panel-runs code", has_text="ddpm report").inner_text()
        assert shlex.split(line) == ["ddpm", "report", str(run)]
        page.close()


def test_a_saved_file_is_opened_and_damaged_ones_are_one_line(visit, digits, tmp_path):
    file = tmp_path / "a.ddpm"
    command = ["compress", "digits", str(digits / "a.png"), "--chunk-bits", "8", "--out", str(file)]
    assert main(command) == 0
    page, section = visit("compress")
    chosen = section.get_by_label("A file to open")
    chosen.set_input_files(str(file))
    status_line(section, "Done.")
    shows(page, pixels(digits / "a.png"))
    assert section.get_by_role("button", name="Measure the bound").count() == 0  # there is no picture to measure
    damaged = bytearray(file.read_bytes())
    damaged[30] ^= 4
    for content, line in [(damaged, "bits were changed"), (b"only words", "not a file of"), (b"", "0 bytes")]:
        (tmp_path / "bad.ddpm").write_bytes(bytes(content))
        chosen.set_input_files(str(tmp_path / "bad.ddpm"))
        page.locator("#error span", has_text=line).wait_for()


@pytest.mark.parametrize(("mode", "line"), [("RGBA", "transparency"), ("I;16", "more than 8 bits")])
def test_pictures_that_the_codec_would_change_are_refused(visit, tmp_path, mode, line):
    Image.new(mode, (8, 8)).save(tmp_path / "picture.png")
    page, section = visit("compress")
    section.locator(".slot input[type=file]").set_input_files(str(tmp_path / "picture.png"))
    page.locator("#error span", has_text=line).wait_for()


def test_a_large_picture_is_asked_for_and_cancel_ends_it(visit, digits, tmp_path):
    """The time is said first; "Leave it" starts nothing; after Cancel the next job begins at once."""
    large = np.tile(pixels(digits / "a.png"), (13, 13))
    Image.fromarray(large).save(tmp_path / "large.png")
    _, section = visit("compress")
    add(section, tmp_path / "large.png")
    section.get_by_label("Aim").select_option("8")
    section.get_by_role("button", name="Compress").click()
    question = section.get_by_role("alertdialog")
    question.wait_for()
    assert "10,816 pixels in 169 tiles take about " in question.inner_text()
    section.get_by_role("button", name="Leave it").click()
    assert section.get_by_role("button", name="Compress").is_enabled()
    section.get_by_role("button", name="Compress").click()
    section.get_by_role("button", name="Go on").click()
    status_line(section, "left.")
    section.get_by_role("button", name="Cancel").click()
    status_line(section, "Cancelled.")
    add(section, digits / "a.png")
    section.locator(".slot small", has_text="8×8 pixels").wait_for()
    section.get_by_role("button", name="Compress").click()
    status_line(section, "Done.")


def test_the_server_refuses_a_large_picture_that_nobody_confirmed(address, tmp_path):
    def post(path, data, kind):
        with urlopen(Request(address + path, data, {"Content-Type": f"application/{kind}"})) as answer:
            return answer.read()

    file = io.BytesIO()
    Image.new("L", (101, 100)).save(file, "PNG")
    picture = json.loads(post("/api/pictures/exact", file.getvalue(), "octet-stream"))["id"]
    for job in ("start", "bound"):
        events = post(f"/api/compress/{job}", json.dumps({"model": "digits", "picture": picture}).encode(), "json")
        assert b'"error"' in events
        assert b"10,100 pixels: more than 10,000 take long; want confirmed true" in events


@pytest.fixture
def state(tmp_path):
    return State((), tmp_path, torch.device("cpu"))


@pytest.mark.parametrize("tiles", [1, 3])
def test_the_error_of_the_bound_is_that_of_its_draws(state, digits, tiles, monkeypatch):
    """Of 20 levels: the estimate is the mean of the bound at every level, and another picture has another bound."""
    model = state.model("digits")
    denoiser = replace(model.denoiser, schedule=model.denoiser.schedule.respace(range(50, 1001, 50)))
    codec = replace(load_codec("digits"), denoiser=denoiser)
    monkeypatch.setattr(compress, "_codec", lambda *_: codec)
    picture = pixels(digits / "a.png")
    x0 = to_signal(torch.from_numpy(picture.copy())).expand(32, 1, 8, 8)
    exact, away = vlb(denoiser, x0, per_image(range(32), (1, 8, 8))).bits_per_dim(), []
    for other in (picture, 255 - picture):
        kept = state.keep(np.tile(other, (1, tiles))[..., None])["id"]
        *_, told = compress.bound(state, {"model": "digits", "picture": kept})
        assert told["tiles"] == told["of"] == tiles
        error = (told["standard_error"] ** 2 + float(exact.var()) / 32) ** 0.5
        away.append(abs(told["bits_per_dim"] - float(exact.mean())) / error)
    assert away[0] < 4.5
    assert away[1] > 6  # negative control


def test_the_bound_is_left_out_with_a_reason(state):
    kept = state.keep(np.zeros((7, 9, 1), np.uint8))["id"]
    [told] = compress.bound(state, {"model": "digits", "picture": kept})
    assert told["reason"] == "no tile of 8x8 pixels lies in this picture with all the model's colours"


def test_a_picture_too_long_for_webp_is_compared_with_png_only():
    assert compress._sizes(np.zeros((1, 16_383, 3), np.uint8)).keys() == {"PNG", "WebP"}
    assert compress._sizes(np.zeros((16_384, 1, 1), np.uint8)).keys() == {"PNG"}


def test_a_watched_function_ends_when_nobody_listens():
    told, ended = [], []

    def count(tell):
        try:
            for i in range(1000):
                told.append(i)
                tell(i)
        finally:
            ended.append(True)

    job = watched(count)
    assert [next(job), next(job)] == [0, 1]
    job.close()
    assert ended
    told.clear()
    assert [*watched(count)] == told == [*range(1000)]


def test_a_watched_function_raises_its_fault():
    def fail(tell):
        tell(1)
        raise ValueError("a fault")

    job = watched(fail)
    assert next(job) == 1
    with pytest.raises(ValueError, match="a fault"):
        next(job)
