"""tools/app.py, driven by a browser as a user does, and its arithmetic."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from numpy.random import RandomState
from PIL import Image

from toy.drawing import STYLES, draw

for package in ("gradio", "playwright"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -r requirements-app.txt playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

from playwright.sync_api import expect, sync_playwright  # noqa: E402

import app_view  # noqa: E402
import figure1  # noqa: E402
import predict  # noqa: E402

KINDS = ("apple", "star")
WAIT = 60_000  # milliseconds; the machine may be busy


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """Five drawings of two kinds."""
    folder = tmp_path_factory.mktemp("drawings")
    for kind in KINDS:
        for n in range(5):
            draw(kind, STYLES["scene"], RandomState([len(kind), n]), 96).image.save(folder / f"{kind} {n}.png")
    return {kind: [str(folder / f"{kind} {n}.png") for n in range(5)] for kind in KINDS}


class Server:
    """A running page, with a home and a temporary folder of its own."""

    def __init__(self, folder):
        self.temporary, self.home, self.output = folder / "tmp", folder / "home", []
        for path in (self.temporary, self.home):
            path.mkdir()
        home = {"HOME": str(self.home), "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "tools" / "app.py"), "--port", "0"]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        environment = {**os.environ, **home, "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = subprocess.Popen(command, text=True, env=environment, cwd=self.home, **streams)
        for line in self.process.stdout:
            self.output.append(line)
            if found := re.search(r"is on (http://127\.0\.0\.1:\d+)/", line):
                self.url = found[1]
                break
        else:
            pytest.fail("".join(self.output))
        threading.Thread(target=lambda: self.output.extend(self.process.stdout), daemon=True).start()

    @property
    def trainings(self):
        """Processes that it has started."""
        lists = Path("/proc", str(self.process.pid), "task").glob("*/children")
        return [child for file in lists for child in file.read_text().split()]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Started once. When it ends, it has left no file anywhere."""
    started = Server(tmp_path_factory.mktemp("app"))
    (folder,) = started.temporary.iterdir()
    yield started
    assert list(started.temporary.iterdir()) == [folder] and list(started.home.rglob("*")) == []
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(timeout=60) == 143
    assert not folder.exists() and list(started.home.rglob("*")) == []


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=[*options, "--disable-dev-shm-usage"])


class Page:
    """A browser session."""

    def __init__(self, browser, server, **options):
        self.context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **options})
        self.page, self.requests, self.errors = self.context.new_page(), [], []
        self.page.set_default_timeout(WAIT)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(server.url)
        self.page.wait_for_selector("#see figure")

    def tab(self, name):
        self.page.get_by_role("tab", name=name).click()

    def field(self, label):
        return self.page.get_by_label(re.compile(rf"^\s*{re.escape(label)}")).filter(visible=True).first

    def choose(self, label, value):
        """Type a value into a field, or into a list that takes others too."""
        self.field(label).fill(value)
        self.field(label).press("Enter")
        self.field(label).blur()

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).filter(visible=True).click()

    def upload(self, label, paths):
        """Replace the images of the field with this label."""
        block = self.page.locator(".block").filter(has=self.page.get_by_text(label, exact=True)).filter(visible=True)
        if (clear := block.last.get_by_label("Clear")).count():
            clear.click()
        block.last.locator("input[type=file]").set_input_files([str(path) for path in paths])
        expect(block.last.locator("tr.file")).to_have_count(len(paths), timeout=WAIT)

    def download(self, name, path):
        with self.page.expect_download() as found:
            self.press(name)
        found.value.save_as(path)
        return path

    def text(self, where, wanted):
        """The text of an output, once it contains ``wanted``."""
        expect(self.page.locator(where)).to_contain_text(wanted, timeout=WAIT)
        return self.page.locator(where).inner_text()


@pytest.fixture
def page(browser, server):
    opened = Page(browser, server)
    yield opened
    assert not opened.errors and "Traceback" not in "".join(server.output)
    outside = [url for url in opened.requests if not url.startswith((server.url, "data:", "blob:"))]
    assert outside == []
    opened.context.close()


@needs_browser
def test_see_reacts_at_once_to_classes_and_sliders_in_its_own_session(page, browser, server, drawings):
    figures, other = page.page.locator("#see figure"), Page(browser, server)
    expect(figures).to_have_count(18)  # the first view: three images, each with five candidates
    expect(page.page.locator("#see .lp-selected")).to_have_count(3)
    page.upload("Images", drawings["star"][:1])
    page.field("Classes").fill("star\napple\nlegend")
    expect(figures).to_have_count(4, timeout=WAIT)
    times, block = [], page.page.get_by_role("img", name="block of legend")
    for _ in range(4):
        before, start = block.get_attribute("src"), time.perf_counter()
        page.field("range slider for Height").press("ArrowRight")
        expect(block).not_to_have_attribute("src", before, timeout=WAIT)
        times.append(time.perf_counter() - start)
    assert min(times) < 1
    page.field("by hand").check()
    image = figures.nth(1).locator("img")
    for key in ("Home", "End"):
        before = image.get_attribute("src")
        page.field("range slider for Distance").press(key)
        expect(image).not_to_have_attribute("src", before, timeout=WAIT)
    page.field("range slider for K").press("Home")
    expect(figures).to_have_count(2, timeout=WAIT)
    expect(other.page.locator("#see figure")).to_have_count(18)
    other.context.close()


@needs_browser
def test_teach_to_the_end_and_classify_as_predict_does(page, server, drawings, tmp_path, capsys):
    page.tab("Teach")
    for i, kind in enumerate(KINDS, 1):
        page.field(f"Class {i}").fill(kind)
        page.upload(f"Images of class {i}", drawings[kind][:3])
    page.press("Train")
    page.text("#teach", "Trained.")
    page.field("LoGoPrompt").check()
    page.field("number input for Epochs").fill("2")
    page.field("number input for Epochs").blur()
    page.press("Train")
    expect(page.page.locator("#teach progress")).to_be_visible(timeout=WAIT)
    page.text("#teach", "Trained.")
    further = [path for kind in KINDS for path in drawings[kind][3:]]
    page.upload("Further images, to test it", further)
    page.text("#test", "4 images classified")
    with zipfile.ZipFile(page.download("Download the run", tmp_path / "run.zip")) as archive:
        archive.extractall(run := tmp_path / "run")
    assert (run / "results.json").is_file()

    page.tab("Classify")
    page.upload("Images", further)
    page.choose("Backbone or run folder", str(run))
    page.press("Classify")
    shown = page.text("#classify", "4 images classified; with and without selection the same class in")
    found = json.loads(page.download("Download JSON", tmp_path / "found.json").read_text())
    with page.download("Download CSV", tmp_path / "found.csv").open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    capsys.readouterr()
    assert predict.main(["--model-dir", str(run), *further]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["classes"], r["scores"]) for r in found] == [(r["classes"], r["scores"]) for r in expected]
    assert [[row["class_1"], float(row["score_2"])] for row in rows] == [
        [r["classes"][0], r["scores"][1]] for r in expected
    ]
    assert all(f"{score:.4f}" in shown for r in expected for score in r["scores"])
    assert [r["path"] for r in found] == [os.path.basename(path) for path in further]


@needs_browser
def test_a_stopped_training_can_be_used_and_ends_with_its_session(page, server, drawings):
    page.tab("Teach")
    page.press("Use example drawings")
    expect(page.field("Class 3")).to_have_value("star")
    page.field("LoGoPrompt").check()
    page.field("range slider for Epochs").press("End")
    page.press("Train")
    page.text("#teach", "of 200")
    page.press("Stop")
    page.text("#teach", "Stopped. The last complete epoch was saved")
    page.upload("Further images, to test it", drawings["apple"][:1])
    page.text("#test", "1 image classified")
    page.press("Train")
    page.text("#teach", "Epoch")
    assert len(server.trainings) == 1
    page.page.goto("about:blank")
    until = time.monotonic() + WAIT / 1000
    while server.trainings and time.monotonic() < until:
        time.sleep(0.2)
    assert server.trainings == []


@needs_browser
def test_why_answers_in_sentences_with_numbers(page):
    page.tab("Why")
    page.press("Measure")
    page.text("#why", "Name at least two classes")
    page.press("Use example drawings")
    expect(page.field("Class 3")).to_have_value("star")
    page.press("Measure")
    text = page.text("#why", "this backbone reads")
    assert re.search(r"in \d+ of 12 images .* by \+\d\.\d\d log-odds", text)
    assert page.page.locator("#why svg circle").count() == 12


@needs_browser
def test_bad_input_becomes_a_sentence_and_the_page_goes_on(page, drawings, trained, tmp_path):
    text, thin, many = tmp_path / "text.jpg", tmp_path / "thin.png", tmp_path / "many"
    text.write_text("not an image")
    Image.new("RGB", (200_000, 1)).save(thin)
    many.mkdir()
    paths = [shutil.copy(drawings["star"][i % 5], many / f"{i}.png") for i in range(200)]
    good, classes = drawings["star"][:1], "apple\nstar"

    page.upload("Images", [text, thin, *good])
    assert "text.jpg: not an image of a known format" in page.text("#see", "thin.png: 200000x1 pixels")
    expect(page.page.locator("#see .lp-selected")).to_have_count(1, timeout=WAIT)
    for names, sentence in {
        " \n": "The list of classes is empty",
        "word " * 90: "word word",
        "\u6f22\u5b57": "cannot be drawn",
        "<img src=x onerror=alert(1)>, ${alert(1)}": "${alert(1)}",
    }.items():
        page.field("Classes").fill(names)
        page.text("#see", sentence)
    page.field("Classes").fill(classes)
    page.upload("Images", paths)
    page.text("#see", "The first 6 of 200 images")
    expect(page.page.locator("#see .lp-selected")).to_have_count(6, timeout=WAIT)
    page.choose("Backbone or run folder", str(trained("CoOp").folder))
    page.text("#see", "a run of CoOp, which has no blocks")
    for model, sentence in {
        "--help": "neither tiny, one of",
        str(tmp_path): "config.yaml: no such file",
        "/none.pt": "no such file",
    }.items():
        page.choose("Backbone or run folder", model)
        page.text("#see", sentence)

    page.tab("Classify")
    page.press("Classify")
    page.text("#classify", "list of classes is empty")
    page.field("Classes").fill(classes)
    page.upload("Images", [*paths, text])
    page.press("Classify")
    page.text("#classify", "200 images classified, 1 could not be read")

    page.tab("Teach")
    page.field("Class 1").fill("apple")
    page.upload("Images of class 1", [*drawings["apple"][:2], text])
    page.field("Class 2").fill("word " * 90)
    page.upload("Images of class 2", drawings["star"][:2])
    page.press("Train")
    page.text("#teach", "tokens")
    page.field("Class 2").fill("../../\u6f22;")
    page.press("Train")
    assert "Left out: cannot decode image text.jpg" in page.text("#teach", "Trained.")
    page.field("Class 2").fill("\u6f22\u5b57")
    page.field("LoGoPrompt").check()
    page.press("Train")
    page.text("#teach", "cannot be drawn")
    (large := tmp_path / "large.png").write_bytes(bytes(21_000_000))
    page.page.locator("input[type=file]").last.set_input_files(str(large))
    expect(page.page.get_by_text("exceed the maximum allowed size")).to_be_visible(timeout=WAIT)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_into_its_window_and_describes_its_images(browser, server, scheme):
    opened = Page(browser, server, color_scheme=scheme)
    for width in (390, 800, 1600):
        opened.page.set_viewport_size({"width": width, "height": 900})
        for name in ("Why", "Classify", "Teach", "See"):
            opened.tab(name)
            too_wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
            assert not opened.page.evaluate(too_wide), (name, width)
    assert opened.page.evaluate("[...document.images].every(image => image.alt)")
    opened.context.close()


@pytest.mark.parametrize("reads", [True, False])
def test_verdict_counts_and_averages_log_odds(reads):
    none, own = torch.tensor([[0.6, 0.4], [0.3, 0.7]]), torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    wrong = torch.tensor([[0.5, 0.5], [0.6, 0.4]])
    label = torch.tensor([0, 1])
    values = {"label": label, "class of true": label, "class of hard": 1 - label, "none": none}
    values |= {"true": own, "hard": wrong} if reads else {"true": wrong, "hard": own}
    first, second, third = app_view.verdict(values, 12.0, figure1.prospect(values))

    def odds(p):
        return torch.logit(torch.tensor(p, dtype=torch.float64))

    difference = (odds([0.9, 0.8]) - odds([0.5, 0.4])).mean() * (1 if reads else -1)
    assert first.startswith("Yes" if reads else "No") and f"by {difference:+.2f} log-odds" in first
    assert f"in {2 if reads else 0} of 2 images" in first
    own_gain = (odds([0.9, 0.8] if reads else [0.5, 0.4]) - odds([0.6, 0.7])).mean()
    rival_gain = (odds([0.5, 0.6] if reads else [0.1, 0.2]) - odds([0.4, 0.3])).mean()
    assert f"its log-odds by {own_gain:+.2f}" in second and f"its own by {rival_gain:+.2f}" in second
    assert "12 %" in third
