"""The page in a real browser against a real worker with the demo model: what a person sees."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from musetalk import media
from tests.support.browser import CHROMIUM, DRIVER, missing_programs
from tests.support.rendering import make_audio
from tests.support.server import Server
from worker.config import ROOT

AVATAR = ROOT / "demo/media/avatar.mp4"
pytestmark = pytest.mark.skipif(missing_programs() is not None, reason=missing_programs() or "")
# Where screenshots go, for a person who wants to look.
SHOTS = os.environ.get("PLAYGROUND_SHOTS")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("playground")
    server = Server(folder, folder / "no-models", PLAYGROUND="1", BATCH_SIZE="2")
    try:
        server.wait_for(200)
        yield server
    finally:
        server.stop()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for switch in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={tmp_path / 'profile'}"),
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.set_window_size(1280, 900)
    yield driver
    driver.quit()


class Page:
    """The page as a person uses it."""

    def __init__(self, browser: webdriver.Chrome, address: str) -> None:
        self.browser = browser
        browser.get(address)
        self.wait(lambda: self.text("worker").startswith("Ready"))

    def wait(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        return WebDriverWait(self.browser, seconds, poll_frequency=0.1).until(lambda _driver: condition())

    def by(self, name: str) -> Any:
        return self.browser.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return str(self.by(name).text)

    def is_shown(self, name: str) -> bool:
        return bool(self.by(name).is_displayed())

    def choose(self, source: Path, audio: Path) -> None:
        self.by("source").send_keys(str(source))
        self.by("audio").send_keys(str(audio))

    def go(self) -> None:
        self.by("go").click()

    def press(self, *keys: str) -> None:
        """Press a key, or several together, wherever the focus is."""
        *held, last = keys
        chain = ActionChains(self.browser)
        for key in held:
            chain.key_down(key)
        chain.send_keys(last)
        for key in held:
            chain.key_up(key)
        chain.perform()

    def tab_to(self, name: str, *, backwards: bool = False) -> list[str]:
        """Press Tab until the element has the focus; the ids of all that had it on the way."""
        reached: list[str] = []
        while not reached or reached[-1] != name:
            assert len(reached) < 40, f"Tab does not reach {name}: {reached}"
            self.press(*([Keys.SHIFT] if backwards else []), Keys.TAB)
            reached.append(str(self.browser.switch_to.active_element.get_attribute("id")))
        return reached

    def shot(self, name: str) -> None:
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            height = self.browser.execute_script("return document.documentElement.scrollHeight")
            size = self.browser.get_window_size()
            self.browser.set_window_size(size["width"], height + 140)
            self.browser.save_screenshot(str(Path(SHOTS) / f"{name}.png"))
            self.browser.set_window_size(size["width"], size["height"])

    def complaints(self) -> list[str]:
        """What the browser's console holds of errors, the statuses of the API itself left out."""
        entries = self.browser.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in entries if "the server responded with a status" not in entry["message"]]


@pytest.fixture
def page(browser: webdriver.Chrome, worker: Server) -> Page:
    return Page(browser, worker.url)


def test_two_files_become_a_video_beside_its_source(page: Page, tmp_path: Path) -> None:
    assert page.is_shown("demo-note"), "the demo model must be named"
    page.shot("idle")
    page.choose(AVATAR, make_audio(tmp_path / "speech.wav", 1.2))
    page.browser.find_element(By.CSS_SELECTOR, "details summary").click()
    page.wait(lambda: page.is_shown("param-box_smoothing"))
    page.by("param-box_smoothing").send_keys("1.5")
    page.go()
    page.wait(lambda: "frame" in page.text("stage"))
    page.shot("running")
    page.wait(lambda: page.is_shown("result"))
    assert page.text("facts").startswith("30 frames, 512 × 512, 25 fps")
    assert "demo model" in page.text("facts")
    assert "inference" in page.text("times")
    assert not page.is_shown("failure")
    # The browser can play it: it knows its length and size.
    page.wait(lambda: page.browser.execute_script("return document.getElementById('after').readyState >= 2"))
    assert page.browser.execute_script("return document.getElementById('after').videoWidth") == 512
    length = page.browser.execute_script("return document.getElementById('after').duration")
    assert abs(length - 1.2) < 0.1
    page.shot("done")
    assert page.complaints() == []


def test_what_is_downloaded_is_the_finished_file(page: Page, worker: Server, tmp_path: Path) -> None:
    page.choose(AVATAR, make_audio(tmp_path / "speech.wav", 0.4))
    page.go()
    page.wait(lambda: page.is_shown("result"))
    name = page.by("download").get_attribute("download")
    (path,) = [
        path for path in (worker.folder / "outputs").rglob("*.mp4") if path.name.startswith(name.removesuffix(".mp4"))
    ]
    assert media.inspect_source(path, media.MediaLimits()).width == 512


def test_the_page_explains_that_a_file_is_no_video(page: Page, tmp_path: Path) -> None:
    text = tmp_path / "holiday.mp4"
    text.write_text("not a video at all\n" * 100, encoding="utf-8")
    page.choose(text, make_audio(tmp_path / "speech.wav", 0.4))
    page.go()
    page.wait(lambda: page.is_shown("failure"))
    assert page.text("failure-title") == "These files cannot be used"
    assert page.text("failure-text")
    assert page.text("failure-advice") == "The same request would fail again."
    assert page.by("go").is_enabled()
    assert not page.is_shown("result")
    page.shot("failed")


def test_a_missing_file_is_named_before_anything_is_sent(page: Page, tmp_path: Path) -> None:
    page.by("audio").send_keys(str(make_audio(tmp_path / "speech.wav", 0.4)))
    page.go()
    assert page.text("failure-title") == "One file is missing"
    assert "a face" in page.text("failure-text")


def test_cancel_stops_the_job_and_the_page_is_ready_for_the_next(page: Page, worker: Server, tmp_path: Path) -> None:
    page.choose(AVATAR, make_audio(tmp_path / "speech.wav", 60))
    page.go()
    page.wait(lambda: "frame" in page.text("stage"))
    page.by("cancel").click()
    page.wait(lambda: page.is_shown("failure"))
    assert page.text("failure-title") == "Cancelled"
    assert page.by("go").is_enabled()
    worker.wait_for(200)
    assert worker.leftovers() == []


def test_the_demo_pair_is_one_click_away(page: Page) -> None:
    page.by("use-demo").click()
    page.wait(lambda: "avatar.mp4" in page.text("source-name") and "speech.flac" in page.text("audio-name"))
    page.wait(lambda: page.browser.execute_script("return document.getElementById('source-view').videoWidth === 512"))
    assert page.complaints() == []


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(page: Page, width: int) -> None:
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    page.by("use-demo").click()
    page.browser.find_element(By.CSS_SELECTOR, "details summary").click()
    page.wait(lambda: page.is_shown("param-face_box") and "avatar.mp4" in page.text("source-name"))
    assert page.browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    if SHOTS:
        page.browser.save_screenshot(str(Path(SHOTS) / f"wide-{width}.png"))


def test_every_field_has_a_label_and_what_changes_is_read_aloud(page: Page) -> None:
    unnamed = page.browser.execute_script(
        "return [...document.querySelectorAll('input, select')].filter(f => !f.labels.length).map(f => f.id)"
    )
    assert unnamed == []
    assert page.by("stage").get_attribute("aria-live") == "polite"


def test_a_job_is_started_and_cancelled_with_the_keyboard_alone(page: Page, worker: Server) -> None:
    reached = page.tab_to("use-demo")
    assert reached.index("source") < reached.index("audio") < reached.index("go")
    page.press(Keys.ENTER)
    page.wait(lambda: "speech.flac" in page.text("audio-name"))
    page.tab_to("go", backwards=True)
    page.press(Keys.SPACE)
    page.wait(lambda: "frame" in page.text("stage"))
    page.tab_to("cancel")
    page.press(Keys.ENTER)
    page.wait(lambda: page.is_shown("failure"))
    assert page.text("failure-title") == "Cancelled"
    worker.wait_for(200)


def test_the_page_reports_a_worker_that_dies_during_a_job(browser: webdriver.Chrome, tmp_path: Path) -> None:
    server = Server(tmp_path, tmp_path / "no-models", PLAYGROUND="1", BATCH_SIZE="2")
    try:
        server.wait_for(200)
        page = Page(browser, server.url)
        page.choose(AVATAR, make_audio(tmp_path / "speech.wav", 60))
        page.go()
        page.wait(lambda: "frame" in page.text("stage"))
        for child in psutil.Process(server.process.pid).children(recursive=True):
            child.kill()
        server.process.kill()
        page.wait(lambda: page.is_shown("failure"))
        assert page.text("failure-title") == "The worker cannot be reached"
    finally:
        server.stop()
