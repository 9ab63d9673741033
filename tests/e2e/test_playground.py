"""The page in a real browser against a real worker with the demo model: what a person sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from musetalk import media
from tests.support.browser import missing_programs
from tests.support.page import Page, open_browser
from tests.support.rendering import make_audio
from tests.support.server import Server, wait_until
from worker.config import ROOT

AVATAR = ROOT / "demo/media/avatar.mp4"
PHOTO = ROOT / "demo/media/samples/photo-full.jpg"
pytestmark = pytest.mark.skipif(missing_programs() is not None, reason=missing_programs() or "")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("playground")
    options: dict[str, Any] = {
        "PLAYGROUND": "1",
        "BATCH_SIZE": "2",
        "INTERNAL_API_KEY": "right",  # pragma: allowlist secret
    }
    server = Server(folder, folder / "no-models", **options)
    try:
        server.wait_for(200)
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def page(browser: webdriver.Chrome, worker: Server) -> Page:
    wait_until(lambda: worker.health()[1].get("busy") is False)
    return Page(browser, worker.url)


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Four tenths of a second: ten frames."""
    return make_audio(tmp_path / "speech.wav", 0.4)


# -- the first screen --


def test_a_talking_face_and_everything_else_is_on_the_first_screen(page: Page) -> None:
    size = page.js("[document.documentElement.scrollHeight, document.documentElement.scrollWidth]")
    assert size == [800, 1280]
    page.wait(lambda: page.js("document.getElementById('sample-video').currentTime") > 0.1)
    for name in ("source-choose", "audio-choose", "record", "go", "show-options", "sample-sound"):
        assert page.is_shown(name)
    assert "musetalk.weights fetch" in page.text("demo-note"), "the demo model must be named"
    page.click("sample-sound")
    assert page.js("document.getElementById('sample-video').muted") is False
    page.shot("before")
    assert page.complaints() == []


def test_the_page_is_light_and_needs_one_request_a_second_at_most_while_idle(page: Page) -> None:
    names = page.js(
        "performance.getEntriesByType('resource').concat(performance.getEntriesByType('navigation'))"
        ".map((one) => one.name).filter((name) => !/demo|results/.test(name))"
    )
    # What the browser has kept from the test before is fetched again.
    sizes = [len(requests.get(name, timeout=30).content) for name in sorted(set(names))]
    assert len(sizes) > 12
    assert 40_000 < sum(sizes) <= 150_000
    paint = page.js("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    print(f"first paint after {paint:.0f} ms, {sum(sizes) / 1000:.0f} KB in {len(sizes)} files")
    # Nothing waits for a script: they run when the page is drawn.
    assert page.js("document.querySelectorAll('script:not([type=module])').length") == 0
    page.wait(lambda: page.js("performance.now() > 3500"))
    begun = page.js("performance.now()")
    page.wait(lambda: page.js("performance.now()") > begun + 4000)
    asked = page.js(
        "performance.getEntriesByType('resource').filter((one) => one.startTime > arguments[0]).length", begun
    )
    assert 1 <= asked <= 4


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(page: Page, width: int) -> None:
    page.resize(width, 800)
    page.sample("portrait")
    page.sample("short")
    page.click("show-options")
    page.browser.execute_script("document.getElementById('advanced').open = true")
    page.wait(lambda: page.is_shown("param-face_box") and page.is_shown("preview"))
    assert page.js("document.documentElement.scrollWidth <= window.innerWidth")


# -- the inputs --

_DROP = """
const [id, name, type, path] = arguments;
const done = arguments[arguments.length - 1];
fetch(path).then((answer) => answer.blob()).then((blob) => {
  const data = new DataTransfer();
  data.items.add(new File([blob], name, { type }));
  const target = document.getElementById(id);
  for (const kind of ["dragover", "drop"]) {
    target.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
    if (kind === "dragover") done(document.getElementById("source-card").className);
  }
});
"""


def test_files_are_dropped_on_their_cards(page: Page) -> None:
    drop = page.browser.execute_async_script
    over = drop(_DROP, "source-drop", "face.mp4", "video/mp4", "/playground/demo/avatar.mp4")
    assert "over" in over.split()
    drop(_DROP, "audio-drop", "words.flac", "audio/flac", "/playground/demo/samples/short.flac")
    page.wait(lambda: page.text("source-name").startswith("face.mp4") and page.text("audio-name").startswith("words"))
    page.wait(lambda: page.is_shown("preview"))
    assert page.text("trim-text") == "3.1 s"


def test_a_file_dropped_beside_the_cards_finds_its_place(page: Page) -> None:
    page.browser.execute_async_script(
        _DROP, "worker", "words.flac", "audio/flac", "/playground/demo/samples/short.flac"
    )
    page.wait(lambda: page.text("audio-name").startswith("words.flac"))


def test_a_recording_from_the_microphone_becomes_the_speech(page: Page) -> None:
    page.by("source").send_keys(str(PHOTO))
    page.click("record")
    page.wait(lambda: page.text("record-text").startswith("Stop (2"))
    page.shot("recording")
    page.click("record")
    page.wait(lambda: page.text("audio-name").startswith("recording.wav"))
    seconds = float(page.text("trim-text").split()[0])
    assert 1 < seconds < 5
    page.drag_value("trim-end", 0.4)
    page.make()
    assert abs(page.js("document.getElementById('after').duration") - 0.4) < 0.1


def test_only_the_part_between_the_handles_is_spoken(page: Page, tmp_path: Path) -> None:
    page.choose(PHOTO, make_audio(tmp_path / "long.wav", 2))
    page.wait(lambda: page.text("trim-text") == "2.0 s")
    # With the keys: each press is a hundredth of a second, and a page of them a tenth of the whole.
    page.browser.execute_script("document.getElementById('trim-end').focus()")
    for _ in range(8):
        page.press(Keys.PAGE_DOWN)
    wanted = page.text("trim-text")
    assert wanted.endswith("of 2.0 s")
    kept = page.js("Number(document.getElementById('trim-end').value)")
    assert 0.2 <= kept < 1
    page.click("audio-play")
    page.wait(lambda: page.js("document.getElementById('audio-play').ariaLabel") == "Play the speech")
    page.make()
    assert abs(page.js("document.getElementById('after').duration") - kept) < 0.1


def test_the_found_face_is_outlined_and_a_box_can_be_drawn(page: Page, speech: Path) -> None:
    page.choose(AVATAR, speech)
    page.wait(lambda: page.is_shown("face-box"))
    assert page.text("face-box-label") == "Face found"
    # Around the middle of the portrait.
    left, width = page.js(
        "[face.offsetLeft / layer.offsetWidth, face.offsetWidth / layer.offsetWidth]".replace(
            "face.", "document.getElementById('face-box')."
        ).replace("layer.", "document.getElementById('box-layer').")
    )
    assert 0.25 < left < 0.4
    assert 0.25 < width < 0.45
    page.click("draw-box")
    layer = page.by("box-layer")
    chain = ActionChains(page.browser)
    chain.move_to_element_with_offset(layer, -60, -70).click_and_hold().move_by_offset(110, 130).release().perform()
    page.wait(lambda: page.text("face-box-label") == "Your box")
    drawn = page.js("[...document.querySelectorAll('#row-face_box input')].map((one) => Number(one.value))")
    assert drawn[2] - drawn[0] > 60
    page.browser.execute_script("document.getElementById('face-box').focus()")
    page.press(Keys.ARROW_LEFT)
    page.wait(lambda: page.js("Number(document.getElementById('param-face_box').value)") < drawn[0])
    page.press(Keys.SHIFT, Keys.ARROW_DOWN)
    page.wait(lambda: page.js("Number(document.getElementById('param-face_box-3').value)") > drawn[3])
    page.shot("box")
    page.click("draw-box")
    page.wait(lambda: page.text("face-box-label") == "Face found")


# -- options and preview --


def preview_of(page: Page) -> str:
    return str(page.js("document.getElementById('preview-picture').src"))


def test_options_are_named_for_people_and_change_the_preview(page: Page) -> None:
    page.sample("photo")
    page.sample("short")
    page.wait(lambda: page.is_shown("preview"))
    page.click("show-options")
    names = page.js("[...document.querySelectorAll('#options label[for], #options legend')].map((e) => e.textContent)")
    assert names[:5] == ["Chin room", "What is redrawn", "Pauses", "When the speech is longer", "Steadiness"]
    assert page.js("document.querySelectorAll('#row-parsing_mode svg').length") == 3
    page.shot("options")
    # Of another version of the model, and of another kind of mask.
    page.browser.execute_script("document.getElementById('advanced').open = true")
    assert not page.is_shown("row-bbox_shift")
    assert not page.is_shown("row-left_cheek_width")
    before = preview_of(page)
    page.drag_value("param-extra_margin", 40)
    assert page.text("value-extra_margin") == "40 px"
    page.wait(lambda: preview_of(page) != before)
    page.browser.execute_script("document.getElementById('param-parsing_mode-jaw').click()")
    page.wait(lambda: page.is_shown("row-left_cheek_width"))
    assert page.text("n-changed") == "(2)"
    page.click("reset-options")
    assert page.text("n-changed") == ""
    assert page.text("value-extra_margin") != "40 px"


def test_the_preview_follows_the_time_slider(page: Page) -> None:
    page.sample("photo")
    page.sample("short")
    page.wait(lambda: page.is_shown("preview"))
    before = preview_of(page)
    page.drag_value("preview-time", 1.6)
    page.wait(lambda: preview_of(page) != before)
    assert page.text("preview-at") == "1.6 of 3.1 s"
    page.shot("preview")


def test_every_field_has_a_label_and_what_changes_is_read_aloud(page: Page) -> None:
    unnamed = page.js(
        "[...document.querySelectorAll('input, select')].filter((f) => !f.labels.length && !f.ariaLabel)"
        ".map((f) => f.id)"
    )
    assert unnamed == []
    assert page.by("stage").get_attribute("aria-live") == "polite"


# -- a job --


def test_a_job_shows_its_progress_and_a_reload_or_second_tab_finds_it(
    page: Page, worker: Server, tmp_path: Path
) -> None:
    page.choose(AVATAR, make_audio(tmp_path / "speech.wav", 30))
    page.go()
    page.wait(lambda: page.text("rate").startswith("Frame") and "left" in page.text("rate"))
    assert page.text("stage") == "Drawing the mouth"
    assert "frames a second" in page.text("rate")
    assert page.text("worker").startswith("Busy")
    assert "%" in page.js("document.title")
    page.shot("during")
    first = page.browser.current_window_handle
    page.browser.refresh()
    page.wait(lambda: page.text("rate").startswith("Frame"))
    assert page.text("progress-title") == "Making your video"
    page.browser.switch_to.new_window("tab")
    try:
        page.browser.get(worker.url)
        page.wait(lambda: page.text("rate").startswith("Frame"))
        page.click("cancel")
        page.wait(lambda: page.is_shown("failure"))
        assert page.text("failure-title") == "Cancelled"
    finally:
        page.browser.close()
        page.browser.switch_to.window(first)
    page.wait(lambda: not page.is_shown("progress"))
    page.wait(lambda: page.js("document.title") == "MuseTalk worker")
    page.wait(lambda: page.by("go").is_enabled())
    wait_until(lambda: worker.leftovers() == [] or all("kept" in name for name in worker.leftovers()))


def test_a_job_that_ended_while_the_page_was_away_shows_its_video(page: Page, worker: Server, tmp_path: Path) -> None:
    page.choose(PHOTO, make_audio(tmp_path / "speech.wav", 1.6))
    page.go()
    page.wait(lambda: page.text("rate").startswith("Frame"))
    page.browser.get(f"{worker.url}/hc")
    wait_until(lambda: worker.health()[1].get("busy") is False)
    page.browser.get(worker.url)
    page.wait(lambda: page.is_shown("result"))
    page.wait(lambda: page.js("document.getElementById('after').videoWidth") == 512)


def test_a_job_is_started_and_cancelled_with_the_keyboard_alone(page: Page, worker: Server) -> None:
    page.tab_to("sample:portrait")
    page.press(Keys.ENTER)
    page.tab_to("sample:hello")
    page.press(Keys.SPACE)
    page.wait(lambda: page.text("audio-name").startswith("Welcome"))
    page.tab_to("go")
    page.press(Keys.SPACE)
    page.wait(lambda: page.text("rate").startswith("Frame"))
    page.tab_to("cancel")
    page.press(Keys.ENTER)
    page.wait(lambda: page.is_shown("failure"))
    assert page.text("failure-title") == "Cancelled"
    worker.wait_for(200)


# -- the result --


def test_the_result_plays_beside_its_source_and_can_be_compared(page: Page, worker: Server, tmp_path: Path) -> None:
    page.choose(AVATAR, make_audio(tmp_path / "my speech.wav", 1.2))
    page.click("show-options")
    page.drag_value("param-box_smoothing", 1.5)
    page.make()
    after = "document.getElementById('after')"
    page.wait(lambda: page.js(f"{after}.currentTime > 0 && {after}.videoWidth === 512"))
    assert abs(page.js(f"{after}.duration") - 1.2) < 0.1
    assert page.text("facts").startswith("512 × 512 · 1.2 s at 25 frames a second")
    assert "the demo model" in page.text("facts")
    assert "Drawing the mouth" in page.text("times-key")
    # Stages of a few hundredths of a second have no place of their own.
    assert page.js("document.getElementById('times').children.length") >= 2
    # Source and result in one frame, in step.
    page.drag_value("compare", 60)
    assert page.js("document.getElementById('before-side').style.clipPath") == "inset(0px 40% 0px 0px)"
    page.browser.execute_script(f"{after}.pause()")
    page.drag_value("seek", 0.48)
    page.wait(lambda: abs(page.js("document.getElementById('before').currentTime") - 0.48) < 0.05)
    page.shot("after")
    name = page.by("download").get_attribute("download")
    assert name == "avatar-my-speech.mp4"
    finished = sorted((worker.folder / "outputs").glob("avatar-my-speech-*.mp4"))
    assert media.inspect_source(finished[-1], media.MediaLimits()).width == 512
    page.browser.execute_script("navigator.clipboard.writeText = (text) => { window.copied = text; }")
    page.click("copy-curl")
    page.wait(lambda: page.text("copied") == "Copied")
    command = page.js("window.copied")
    assert "-F 'source=@avatar.mp4' -F 'audio=@my speech.wav'" in command
    assert json.loads(command.split("params=")[1].rstrip("'")) == {"box_smoothing": 1.5}
    page.click("reset-options")
    page.click("again")
    assert page.text("value-box_smoothing") == "1.5 frames"
    assert page.complaints() == []


def test_warnings_are_sentences(page: Page, speech: Path) -> None:
    page.choose(PHOTO, speech)
    page.wait(lambda: page.is_shown("preview"))
    page.browser.execute_script(
        "const warn = fetch; window.fetch = async (path, given) => { const answer = await warn(path, given);"
        "if (path !== '/generate') return answer; const body = await answer.json();"
        "body.warnings = ['params.batch_size was lowered']; return new Response(JSON.stringify(body), answer); }"
    )
    page.make()
    assert page.text("warnings") == "“Frames at once” was lowered."


def test_the_last_results_are_listed_with_a_picture_and_can_be_deleted(
    page: Page, worker: Server, speech: Path
) -> None:
    page.choose(PHOTO, speech)
    page.make()
    page.browser.refresh()
    page.wait(lambda: page.is_shown("history"))
    entries = "document.querySelectorAll('#results li')"
    page.wait(lambda: page.js(f"{entries}[0].querySelector('img').naturalWidth") > 0)
    page.shot("history")
    page.browser.execute_script(f"{entries}[0].querySelector('.open').click()")
    page.wait(lambda: page.is_shown("result") and page.js("document.getElementById('after').videoWidth") == 512)
    assert not page.is_shown("compare")
    n_files = len(list((worker.folder / "outputs").iterdir()))
    count = page.js(f"{entries}.length")
    remove = "document.querySelector('#results .remove')"
    page.browser.execute_script(f"{remove}.focus(); {remove}.click()")
    assert page.js(f"{remove}.textContent") == "Delete?"
    page.browser.execute_script(f"{remove}.click()")
    page.wait(lambda: page.js(f"{entries}.length") == count - 1)
    assert len(list((worker.folder / "outputs").iterdir())) == n_files - 2


# -- problems --


def test_the_page_explains_that_a_file_is_no_video(page: Page, speech: Path, tmp_path: Path) -> None:
    text = tmp_path / "holiday.mp4"
    text.write_text("not a video at all\n" * 100, encoding="utf-8")
    page.choose(text, speech)
    page.wait(lambda: page.text("source-problem"))
    page.go()
    page.wait(lambda: page.is_shown("failure"))
    assert page.text("failure-title") == "The face cannot be used"
    assert page.text("failure-text")
    assert "Choose another video or photo" in page.text("failure-advice")
    assert page.js("document.getElementById('source-card').classList.contains('wrong')")
    assert page.by("source").get_attribute("aria-invalid") == "true"
    assert page.by("go").is_enabled()
    assert not page.is_shown("result")
    page.shot("problem-face")


def test_a_missing_file_is_named_before_anything_is_sent(page: Page, speech: Path) -> None:
    page.by("audio").send_keys(str(speech))
    page.wait(lambda: page.text("audio-name"))
    page.go()
    assert "Choose a face first" in page.text("source-problem")
    assert page.text("audio-problem") == ""
    assert page.focused() == "source"
    page.shot("problem-missing")


def test_a_wrong_option_is_marked_and_named_as_on_the_page(page: Page, speech: Path) -> None:
    page.choose(AVATAR, speech)
    page.wait(lambda: page.is_shown("preview"))
    page.click("show-options")
    page.browser.execute_script("document.getElementById('advanced').open = true")
    for index, value in enumerate((300, 100, 200, 300)):
        box = page.by("param-face_box" if index == 0 else f"param-face_box-{index}")
        box.send_keys(str(value), Keys.TAB)
    page.go()
    page.wait(lambda: page.is_shown("failure"))
    assert page.text("failure-title") == "“Face box” cannot be used"
    assert "params." not in page.js("document.body.innerText")
    assert "Face box" in page.text("problem-face_box")
    assert page.by("param-face_box").get_attribute("aria-invalid") == "true"
    assert page.focused() == "param-face_box"
    page.shot("problem-option")


def test_a_caller_from_elsewhere_is_asked_for_the_key(page: Page, browser: webdriver.Chrome, speech: Path) -> None:
    elsewhere = {"headers": {"X-Forwarded-For": "203.0.113.9"}}
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", elsewhere)
    try:
        browser.refresh()
        page.wait(lambda: page.is_shown("key-row"))
        page.by("key").send_keys("wrong", Keys.ENTER)
        page.wait(lambda: "wrong" in page.text("key-problem"))
        page.shot("problem-key")
        page.by("key").clear()
        page.by("key").send_keys("right", Keys.ENTER)
        page.wait_until_ready()
        page.choose(PHOTO, speech)
        page.make()
        page.wait(lambda: page.js("document.getElementById('after').src").startswith("blob:"))
        page.wait(lambda: page.js("document.getElementById('after').videoWidth") == 512)
    finally:
        browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {}})


def test_the_page_reports_a_worker_that_dies_during_a_job(browser: webdriver.Chrome, tmp_path: Path) -> None:
    server = Server(tmp_path, tmp_path / "no-models", PLAYGROUND="1", BATCH_SIZE="2")
    try:
        server.wait_for(200)
        page = Page(browser, server.url)
        page.choose(AVATAR, make_audio(tmp_path / "speech.wav", 60))
        page.go()
        page.wait(lambda: page.text("rate").startswith("Frame"))
        for child in psutil.Process(server.process.pid).children(recursive=True):
            child.kill()
        server.process.kill()
        page.wait(lambda: page.is_shown("failure"))
        assert page.text("failure-title") == "The worker cannot be reached"
        page.shot("problem-gone")
    finally:
        server.stop()


# -- accessibility --


def test_axe_finds_nothing_serious(page: Page, tmp_path: Path, speech: Path) -> None:
    found: dict[str, Any] = {}
    for is_dark in (False, True):
        page.resize(1280, 800, is_dark=is_dark)
        found[f"before, dark {is_dark}"] = page.axe()
    page.choose(PHOTO, speech)
    page.wait(lambda: page.is_shown("preview") and page.is_shown("face-box"))
    page.click("show-options")
    page.browser.execute_script("document.getElementById('advanced').open = true")
    found["options"] = page.axe()
    page.make()
    page.wait(lambda: page.is_shown("history"))
    for is_dark in (False, True):
        page.resize(1280, 800, is_dark=is_dark)
        found[f"after, dark {is_dark}"] = page.axe()
    page.browser.execute_script("document.getElementById('failure').hidden = false")
    page.browser.execute_script("document.getElementById('failure-title').textContent = 'The job failed'")
    found["problem"] = page.axe()
    assert {state: findings for state, findings in found.items() if findings} == {}


# -- the reference --


def test_the_reference_is_complete_and_its_examples_work(page: Page, browser: webdriver.Chrome, worker: Server) -> None:
    browser.get(f"{worker.url}/docs#/default/postPreview")
    page.wait(lambda: page.js("document.querySelectorAll('.opblock').length") >= 10)
    page.wait(lambda: page.js("document.querySelector('.is-open .execute') !== null"))
    browser.execute_script("document.querySelector('.is-open .execute').scrollIntoView({block: 'center'})")
    browser.execute_script("document.querySelector('.is-open .execute').click()")
    page.wait(lambda: page.js("document.querySelector('.is-open .live-responses-table img')?.naturalWidth") == 512)
    page.shot("reference")
    assert page.complaints() == []
    browser.get(f"{worker.url}/docs?of=orchestrator")
    page.wait(lambda: page.js("document.querySelectorAll('.opblock').length") == 4)
    assert page.js("document.querySelectorAll('.try-out, .execute').length") == 0
    assert page.complaints() == []
