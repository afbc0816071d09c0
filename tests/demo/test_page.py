"""The page in a real browser: what a visitor does, sees, and is told."""

import io
import re
import shutil
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")

from flip_hf.demo.model import DemoModel
from flip_hf.demo.page import make_page, serve
from flip_hf.demo.search import pictures_below

expect = sync_api.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
GREY = (128, 128, 128)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to show the page in")


@pytest.fixture(scope="module")
def url(whole, photos):
    page = make_page(DemoModel.from_pretrained(whole), pictures_below(photos))
    yield serve(page, prevent_thread_lock=True, quiet=True)[1]
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url, capfd):
    """The page, opened; it asks nothing of any other host, and nothing leaves a traceback."""
    page, hosts = browser.new_page(), set()
    page.set_default_timeout(15_000)
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.goto(url)
    yield page
    page.close()
    assert hosts - {None} == {"127.0.0.1"}  # None: of `data:` and `blob:`
    assert "Traceback" not in "".join(capfd.readouterr())


def shown(page, title: str) -> Image.Image:
    """The picture of a title."""
    source = page.get_by_alt_text(title, exact=True).get_attribute("src")
    with Image.open(io.BytesIO(page.request.get(source).body())) as image:
        return image.convert("RGB")


def another(page, title: str, before: Image.Image) -> Image.Image:
    """The picture of a title once it is not this one any more."""
    for _ in range(100):
        image = shown(page, title)
        if image.tobytes() != before.tobytes():
            return image
        page.wait_for_timeout(100)
    raise AssertionError(f"{title} is still the same")


def grey_share(image: Image.Image) -> float:
    return sum(count for count, colour in image.getcolors(2**20) if colour == GREY) / (image.width * image.height)


def drop(page, path) -> None:
    page.locator("input[type=file]").first.set_input_files(path)


def masked(page, percent: int) -> None:
    field = page.get_by_label("number input for Patches dropped, %").first
    field.fill(str(percent))
    field.press("Enter")


def told(page, message: str) -> None:
    """Waits for a message, which is the only one, and closes it."""
    expect(page.get_by_test_id("toast-body")).to_have_count(1)
    expect(page.get_by_test_id("toast-body")).to_contain_text(message)
    page.get_by_test_id("toast-close").click()
    expect(page.get_by_test_id("toast-body")).to_have_count(0)


def test_labels_get_probabilities_and_a_mask_changes_what_is_seen(page, photos):
    drop(page, photos / "red.PNG")
    page.get_by_label("Labels, apart").fill("red circle, blue square\ngreen star, red circle")
    page.get_by_role("button", name="Ask the model").click()
    rows = page.locator("table.comparison tbody tr")
    expect(rows).to_have_count(3)
    assert page.locator("table.comparison thead th").all_inner_texts()[1:] == [
        "whole image",
        "50% dropped",
        "75% dropped",
    ]
    cells = [[float(x) for x in re.findall(r"([\d.]+)%", row)] for row in rows.all_inner_texts()]
    assert [sum(column) for column in zip(*cells, strict=True)] == pytest.approx([100] * 3, abs=0.2)
    seen = shown(page, "What the model sees")
    assert grey_share(seen) == 0.5
    masked(page, 75)
    quarter = another(page, "What the model sees", seen)
    assert grey_share(quarter) == 0.75
    page.get_by_role("button", name="Draw again").first.click()
    expect(page.get_by_label("Seed of the mask").first).to_have_value("1")
    redrawn = another(page, "What the model sees", quarter)
    assert grey_share(redrawn) == 0.75
    masked(page, 0)
    assert grey_share(another(page, "What the model sees", redrawn)) == 0


def test_mistakes_are_told_in_words(page, photos):
    ask, labels = page.get_by_role("button", name="Ask the model"), page.get_by_label("Labels, apart")
    ask.click()
    told(page, "Write the labels to choose from")
    labels.fill("red circle")
    ask.click()
    told(page, "A label alone has a probability of 100 %")
    labels.fill("red circle, " + "blue " * 30)
    ask.click()
    told(page, "Too long for this model, which reads its beginning alone: “blue blue")
    drop(page, photos / "text.jpg")
    told(page, "This image cannot be used: not an image.")
    page.get_by_role("button", name="Remove Image").first.click()
    ask.click()
    told(page, "Drop in an image first")  # and nothing was told when it was taken away


def test_a_text_finds_pictures_and_bad_files_are_counted(page):
    page.get_by_role("tab", name="Search").click()
    search = page.get_by_role("button", name="Search", exact=True)
    search.click()
    told(page, "Write what to look for.")
    page.get_by_label("What to look for").fill("a red circle")
    search.click()
    expect(page.get_by_text("The best of 4 pictures")).to_contain_text(
        "2 could not be used (1 damaged image, 1 not an image)"
    )
    captions = page.locator(".caption-label").all_inner_texts()
    names, scores = zip(*(caption.split(" · ") for caption in captions), strict=True)
    assert sorted(names) == ["blue.PNG", "green.PNG", "red.PNG", "white.PNG"]
    assert sorted(map(float, scores), reverse=True) == list(map(float, scores))


def test_what_is_dropped_is_reconstructed(page):
    page.get_by_role("tab", name="Reconstruction").click()
    original, left, made = (shown(page, title) for title in ("Original", "Masked", "Reconstructed"))
    assert grey_share(original) == 0 and grey_share(left) == 0.75
    original, left, made = (np.asarray(image) for image in (original, left, made))
    visible = (left != GREY).any(axis=2)
    assert (original[visible] == made[visible]).all() and (original[~visible] != made[~visible]).any()
