"""A Space as `demo.py --space` writes it, and its page in a real browser: what a visitor does, sees, and reads."""

import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import gradio
import numpy as np
import pytest
from huggingface_hub import SpaceCard
from PIL import Image

from flip_hf.commands.demo import main
from flip_hf.demo.space import REQUIREMENTS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "demo.py"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
# What the Hub runs, with a report of every host that it turns to.
APP = """
import runpy, sys
places = {"socket.getaddrinfo": 0, "socket.connect": 1}
sys.addaudithook(lambda event, args: event in places and print("turns to", args[places[event]], flush=True))
runpy.run_path("app.py", run_name="__main__")
"""
GREY = (128, 128, 128)


def run(*arguments) -> str:
    """Returns what the command prints, run in this process because starting another takes seconds."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([str(word) for word in arguments])
    return printed.getvalue()


@pytest.fixture(scope="module")
def space(whole, photos, tmp_path_factory):
    """A Space of a model whose card names a licence."""
    folder = tmp_path_factory.mktemp("spaces") / "space"
    (whole / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n\n# Whole\n")
    printed = run(whole, "--images", photos, "--space", folder)
    assert printed == f"{folder}: a Space; `hf upload OWNER/NAME {folder} --repo-type space`\n"
    return folder


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """Returns the app's output."""
    return tmp_path_factory.mktemp("log") / "app.log"


@pytest.fixture(scope="module")
def url(space, log):
    """The Space's app, in a process that finds the packages, but by no way this repository."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # Without `site` (-S), what is installed as editable is not found: flip_hf is the Space's own.
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "GRADIO_SERVER_PORT": port}
    with log.open("w") as file:
        command = [sys.executable, "-S", "-c", APP]
        app = subprocess.Popen(command, cwd=space, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 300  # for a loaded machine; the imports take ten seconds on an idle one
        while "Running on local URL" not in log.read_text():
            assert app.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        app.terminate()
        app.wait()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium to show the page in")
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url, log):
    """The page, opened; neither it nor its server turns to any other host, and nothing leaves a traceback."""
    page = browser.new_page()
    hosts = set()
    page.set_default_timeout(15_000)
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.goto(url)
    yield page
    page.close()
    assert hosts - {None} == {"127.0.0.1"}  # None: of `data:` and `blob:`
    printed = log.read_text()
    assert "Traceback" not in printed
    turned = [line for line in printed.splitlines() if line.startswith("turns to")]
    assert turned and all("127.0.0.1" in line or "localhost" in line for line in turned), turned


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


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


def wait_for_message(page, message: str) -> None:
    """Waits for a message, which is the only one, and closes it."""
    expect(page.get_by_test_id("toast-body")).to_have_count(1)
    expect(page.get_by_test_id("toast-body")).to_contain_text(message)
    page.get_by_test_id("toast-close").click()
    expect(page.get_by_test_id("toast-body")).to_have_count(0)


def test_labels_get_probabilities_and_a_mask_changes_the_view(page, photos):
    drop(page, photos / "red.PNG")
    page.get_by_label("Labels, separated").fill("red circle, blue square\ngreen star, red circle")
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


def test_mistakes_are_reported_in_words(page, photos):
    ask = page.get_by_role("button", name="Ask the model")
    labels = page.get_by_label("Labels, separated")
    ask.click()
    wait_for_message(page, "Write the labels to choose from")
    labels.fill("red circle")
    ask.click()
    wait_for_message(page, "A label alone has a probability of 100 %")
    labels.fill("red circle, " + "blue " * 30)
    ask.click()
    wait_for_message(page, "Too long for this model, which reads its beginning alone: “a photo of a blue blue")
    drop(page, photos / "text.jpg")
    wait_for_message(page, "This image cannot be used: not an image.")
    page.get_by_role("button", name="Remove Image").first.click()
    ask.click()
    wait_for_message(page, "Drop in an image first")  # and no message came when it was taken away


def test_a_text_finds_pictures_and_bad_files_are_counted(page):
    page.get_by_role("tab", name="Search").click()
    search = page.get_by_role("button", name="Search", exact=True)
    search.click()
    wait_for_message(page, "Write what to search for.")
    page.get_by_label("What to look for").fill("a red circle")
    search.click()
    expect(page.get_by_text("The best of 4 pictures")).to_contain_text(
        "2 could not be used (1 damaged image, 1 not an image)"
    )
    captions = page.locator(".caption-label").all_inner_texts()
    scores, names = zip(*(caption.split(" · ") for caption in captions), strict=True)
    assert sorted(names) == ["blue.PNG", "green.PNG", "red.PNG", "white.PNG"]
    assert sorted(map(float, scores), reverse=True) == list(map(float, scores))


def test_dropped_patches_are_reconstructed(page):
    page.get_by_role("tab", name="Reconstruction").click()
    original, left, made = (shown(page, title) for title in ("Original", "Masked", "Reconstructed"))
    assert grey_share(original) == 0 and grey_share(left) == 0.75
    original, left, made = (np.asarray(image) for image in (original, left, made))
    visible = (left != GREY).any(axis=2)
    assert (original[visible] == made[visible]).all() and (original[~visible] != made[~visible]).any()


def test_a_space_is_complete(space, whole, url):
    card = SpaceCard.load(space / "README.md").data
    assert (card.title, card.sdk, card.sdk_version) == ("Try whole", "gradio", gradio.__version__)
    assert (card.app_file, card.license) == ("app.py", "cc-by-nc-4.0")
    assert len(list((space / "images").iterdir())) == 6 and (space / "model" / "README.md").is_file()
    with urllib.request.urlopen(f"{url}/config") as answer:
        settings = answer.read().decode()
    for text in ("What is it?", "Search", "Reconstruction", "6 pictures, which the first search encodes."):
        assert text in settings
    assert str(ROOT) not in settings and str(space.parent) not in (space / "app.py").read_text()
    with pytest.raises(SystemExit, match="exists already"):
        run(whole, "--space", space)


def test_a_space_requires_the_packages_versions():
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {*project["dependencies"], *project["optional-dependencies"]["demo"]}
    assert set(REQUIREMENTS) == {line for line in asked if not line.startswith("gradio")}


def test_a_page_that_cannot_be_served_ends_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="error: "):
        run(tmp_path / "none")
    with pytest.raises(SystemExit, match="error: There is no folder"):
        run(tmp_path, "--images", tmp_path / "none")


def test_a_space_does_not_publish_targets_of_links(whole, tmp_path):
    (tmp_path / "key.png").write_text("a private key")
    (tmp_path / "outside").mkdir()
    shutil.copy(tmp_path / "key.png", tmp_path / "outside" / "key.png")
    for name, target in (("link.png", tmp_path / "key.png"), ("inner", tmp_path / "outside")):
        images = tmp_path / f"images-{name}"
        images.mkdir()
        Image.new("RGB", (8, 8)).save(images / "a.png")
        (images / name).symlink_to(target)
        with pytest.raises(SystemExit, match=f"{name} is a link, whose target would be published"):
            run(whole, "--images", images, "--space", tmp_path / "space")
        assert not (tmp_path / "space").exists()
