"""The page in a real browser, headless Chromium: typing, dropping, clicking, the keyboard, odd names, many images."""

import base64
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from searching import WIDTH, fake_embed, png, serving, write_fake_index, write_rows

from megatron_llave.search.scan import ImageFile, hash_file, scan_folder

REQUIRED = bool(os.environ.get("LLAVE_REQUIRE_BROWSER"))
"""Whether these tests must run, as in .ci/run."""
find_module = importlib.import_module if REQUIRED else pytest.importorskip
sync_api = find_module("playwright.sync_api")  # skipped where playwright, which drives the browser, is not installed
expect = sync_api.expect

WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
DROP = """(file) => {
  const bytes = Uint8Array.from(atob(file.content), (letter) => letter.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], file.name, { type: "image/png" }));
  for (const type of ["dragenter", "dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(type, { bubbles: true, cancelable: true, dataTransfer: transfer }));
    if (type === "dragover") window.shownWhileDragged = !document.getElementById("drop").hidden;
  }
}"""


@pytest.fixture
def page(browser: sync_api.Browser) -> Iterator[sync_api.Page]:
    """A fresh page; the test fails if the page asks anything of another host, breaks its policy or throws an error."""
    context = browser.new_context(viewport=WIDE)
    opened, wrong = context.new_page(), []
    opened.set_default_timeout(20_000)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda line: wrong.append(line.text) if "Content Security Policy" in line.text else None)
    opened.on("request", lambda asked: None if is_own(asked.url) else wrong.append(asked.url))
    opened.on("dialog", lambda dialog: (wrong.append(f"a script ran: {dialog.message}"), dialog.dismiss()))
    yield opened
    context.close()
    assert wrong == []


def is_own(address: str) -> bool:
    return re.match(r"(http://127\.0\.0\.1:\d+/|blob:http://127\.0\.0\.1:)", address) is not None


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of twelve images, in three of which the number of the name stands for what is on them."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "pictures").mkdir()
    for number in range(12):
        (folder / "pictures" / f"{number:02d}.png").write_bytes(png(number, 300))
    write_fake_index(folder / "index", folder / "pictures")
    with serving(folder / "index") as served:
        yield served


def names(page: sync_api.Page) -> list[str]:
    return page.locator(".grid .name").all_text_contents()


def drop(page: sync_api.Page, name: str, content: bytes) -> None:
    page.evaluate(DROP, {"name": name, "content": base64.b64encode(content).decode()})


def test_words_find_images(page: sync_api.Page, address: str) -> None:
    """The one browser test of every run: open, type, search, more like this, back."""
    page.goto(address)
    expect(page.locator(".grid li")).to_have_count(12)
    expect(page.get_by_role("status")).to_have_text("12 images")
    page.get_by_role("searchbox", name="Words to look for").fill("7")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("“7”")
    expect(page.locator(".grid li").first).to_contain_text("07.png")
    expect(page.locator(".grid li").first).to_contain_text("1.000")
    similar = [float(text) for text in page.locator(".number").all_text_contents()]
    assert similar == sorted(similar, reverse=True) and len(similar) == 12
    second = names(page)[1]
    page.get_by_role("button", name=f"More like {second}").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"More like {second}")
    expect(page.locator(".grid li")).to_have_count(11)
    assert second not in names(page)
    page.go_back()
    expect(page.get_by_role("heading", level=1)).to_have_text("“7”")
    expect(page.get_by_role("searchbox")).to_have_value("7")
    assert page.evaluate("[...document.images].every((image) => image.alt !== null)")


@pytest.mark.slow
def test_an_image_is_dropped_chosen_and_joined_with_words(page: sync_api.Page, address: str, tmp_path: Path) -> None:
    page.goto(address)
    expect(page.locator(".grid li")).to_have_count(12)
    drop(page, "my <b>photo</b>.png", png(5, 300))
    expect(page.get_by_role("heading", level=1)).to_have_text("Similar to your image")
    assert page.evaluate("window.shownWhileDragged") and page.locator("#drop").is_hidden()
    expect(page.locator("#chip-name")).to_have_text("my <b>photo</b>.png")
    expect(page.locator(".grid li").first).to_contain_text("05.png")
    page.get_by_role("searchbox").fill("9")
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("“9” with an image")
    query = fake_embed("9", png(5, 300))
    nearest = max(range(12), key=lambda number: fake_embed(str(number), None) @ query)
    expect(page.locator(".grid li").first).to_contain_text(f"{nearest:02d}.png")
    page.get_by_role("button", name="Remove the image from the search").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("“9”")
    expect(page.locator("#chip")).to_be_hidden()
    page.go_back()  # the image comes back too
    expect(page.get_by_role("heading", level=1)).to_have_text("“9” with an image")
    (tmp_path / "chosen.png").write_bytes(png(3, 300))
    page.set_input_files("#file", tmp_path / "chosen.png")
    expect(page.locator("#chip-name")).to_have_text("chosen.png")
    drop(page, "text.png", b"no image at all")
    expect(page.get_by_role("alert")).to_contain_text("The image cannot be used: not a readable image")
    expect(page.locator(".grid li")).to_have_count(0)
    drop(page, "empty.png", b"")
    expect(page.get_by_role("alert")).to_have_text("The file is empty or cannot be read.")
    page.get_by_role("link", name="Image search").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("All images")
    expect(page.get_by_role("alert")).to_be_hidden()


@pytest.mark.slow
def test_the_large_view_and_the_keyboard(page: sync_api.Page, address: str) -> None:
    """Everything without a mouse: to the box, into the grid, around in it, the view, and back to the same image."""
    page.goto(address)
    expect(page.locator(".grid li")).to_have_count(12)
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("2/")  # a slash in the box is a letter
    expect(page.get_by_role("searchbox")).to_have_value("2/")
    page.keyboard.press("ArrowDown")
    tiles = page.locator(".grid .open")
    expect(tiles.nth(0)).to_be_focused()
    columns = page.evaluate("getComputedStyle(document.getElementById('grid')).gridTemplateColumns.split(' ').length")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(tiles.nth(columns + 1)).to_be_focused()
    for key, place in (
        ("ArrowUp", 1),
        ("End", 11),
        ("ArrowRight", 11),
        ("Home", 0),
        ("ArrowLeft", 0),
        ("ArrowRight", 1),
    ):
        page.keyboard.press(key)
        expect(tiles.nth(place)).to_be_focused()
    page.keyboard.press("Enter")
    view = page.get_by_role("dialog")
    expect(view.get_by_role("heading")).to_have_text("01.png")
    expect(view.locator("#view-image")).to_have_js_property("naturalWidth", 300)
    page.keyboard.press("ArrowLeft")
    expect(view.get_by_role("heading")).to_have_text("00.png")
    expect(view.get_by_role("button", name="Previous")).to_be_disabled()
    page.keyboard.press("ArrowLeft")
    for number in range(1, 12):
        page.keyboard.press("ArrowRight")
        expect(view.get_by_role("heading")).to_have_text(f"{number:02d}.png")
    expect(view.get_by_role("button", name="Next")).to_be_disabled()
    page.keyboard.press("Escape")
    expect(view).to_be_hidden()
    expect(tiles.nth(11)).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="More like 11.png")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("More like 11.png")
    page.get_by_role("button", name="About this index").click()
    expect(page.get_by_role("dialog")).to_contain_text("12 images in 12 files")
    page.keyboard.press("Escape")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input')].filter((one) => !one.hidden && "
        "!one.getAttribute('aria-label') && !one.textContent.trim()).map((one) => one.outerHTML)"
    )
    assert unnamed == []


@pytest.mark.slow
def test_an_empty_index_a_vanished_image_and_odd_names(page: sync_api.Page, tmp_path: Path, serve) -> None:
    (tmp_path / "none").mkdir()
    write_fake_index(tmp_path / "empty", tmp_path / "none")
    page.goto(serve(tmp_path / "empty"))
    expect(page.get_by_role("heading", name="No images yet")).to_be_visible()
    page.get_by_role("searchbox").fill("a cat")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("“a cat”")
    expect(page.get_by_role("status")).to_contain_text("0 images")
    pictures = tmp_path / "pictures"
    odd = [
        "<img src=x onerror=alert(1)>.png",
        '"><script>alert(2)<⁄script>.png',
        "' onclick='alert(3)'.png",
        "{{7}}.png",
    ]
    pictures.mkdir()
    for number, name in enumerate(odd):
        (pictures / name).write_bytes(png(number, 300))
    (pictures / "gone.png").write_bytes(png(20, 300))
    write_fake_index(tmp_path / "index", pictures)
    (pictures / "gone.png").unlink()
    page.goto(serve(tmp_path / "index"))
    expect(page.locator(".grid li")).to_have_count(5)
    assert sorted(names(page)) == sorted([*odd, "gone.png"])
    gone = page.locator(".grid li", has_text="gone.png")
    expect(gone.locator(".gone")).to_have_text("Gone.png is no longer there.", ignore_case=True)
    gone.locator(".open").click()
    expect(page.locator("#view-gone")).to_contain_text("is no longer there")
    page.keyboard.press("Escape")
    gone.get_by_role("button", name="More like gone.png").click()  # by its vector, which is still there
    expect(page.locator(".grid li")).to_have_count(4)
    page.get_by_role("searchbox").fill("<script>alert(4)</script>")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("“<script>alert(4)</script>”")
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text("“<script>alert(4)</script>”")


@pytest.mark.slow
def test_ten_thousand_images_scroll(page: sync_api.Page, tmp_path: Path, serve) -> None:
    """10,000 rows over 40 files; a page of the results is asked for when the end is near, and no earlier."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "one.png").write_bytes(png(0, 300))
    [one] = [hash_file(pictures, file) for file in scan_folder(pictures).files]
    files = [ImageFile(b"%05d.png" % number, 1, 1, number.to_bytes(32, "big")) for number in range(9_999)] + [one]
    vectors = np.random.default_rng(0).standard_normal((10_000, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    (tmp_path / "index").mkdir()
    write_rows(tmp_path / "index", pictures, files, vectors, {})
    searches = []
    page.on("request", lambda asked: searches.append(asked.url) if asked.url.endswith("/api/search") else None)
    page.goto(serve(tmp_path / "index"))
    expect(page.get_by_role("status")).to_have_text("10,000 images")
    expect(page.locator(".grid li")).to_have_count(60)
    assert len(searches) == 1
    page.get_by_role("searchbox").fill("3")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("10,000 images, most similar first")
    for shown in (120, 180, 240):
        page.locator("#more").scroll_into_view_if_needed()
        expect(page.locator(".grid li").nth(shown - 1)).to_be_attached()
    exact = np.argsort(-(vectors @ fake_embed("3", None)), kind="stable")
    assert names(page)[:240] == [os.fsdecode(files[row].path) for row in exact[:240]]
    assert page.locator(".grid li").count() < 1000


@pytest.mark.slow
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_and_texts_have_contrast(
    browser: sync_api.Browser, address: str, viewport: dict[str, int], scheme: str
) -> None:
    """WCAG AA: contrast of at least 4.5 for texts on their own ground; targets of at least 24 pixels."""
    context = browser.new_context(viewport=viewport, color_scheme=scheme)
    page = context.new_page()
    page.goto(f"{address}/?q=3")
    expect(page.locator(".number").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    for selector in ("h1", "#status", ".name", ".number", ".like", "form .primary", ".brand span"):
        assert contrast(page, selector) >= 4.5, selector
    small = page.evaluate(
        "[...document.querySelectorAll('button')].map((one) => one.getBoundingClientRect()).filter("
        "(box) => box.width && (box.width < 24 || box.height < 24)).length"
    )
    assert small == 0
    page.locator(".open").first.click()
    box = page.get_by_role("dialog").bounding_box()
    assert box["x"] >= 0 and box["y"] >= 0 and box["x"] + box["width"] <= viewport["width"]
    assert box["y"] + box["height"] <= viewport["height"]
    expect(page.get_by_role("dialog").get_by_role("button", name="Next")).to_be_in_viewport()
    context.close()


def contrast(page: sync_api.Page, selector: str) -> float:
    """Contrast of the text of an element with the nearest ground behind it that is opaque."""
    colours = page.locator(selector).first.evaluate(
        """(one) => {
          let place = one;
          while (getComputedStyle(place).backgroundColor === "rgba(0, 0, 0, 0)") place = place.parentElement;
          return [getComputedStyle(one).color, getComputedStyle(place).backgroundColor];
        }"""
    )
    values = [np.array(re.findall(r"[\d.]+", colour)[:3], np.float64) / 255 for colour in colours]
    linear = [np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4) for value in values]
    light, dark = sorted((float(value @ (0.2126, 0.7152, 0.0722)) for value in linear), reverse=True)
    return (light + 0.05) / (dark + 0.05)
