"""The page in a real browser, as a person uses it: one browser for a module, a fresh page for each test."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.support.browser import CHROMIUM, DRIVER

# Where screenshots go, for a person who wants to look.
SHOTS = os.environ.get("PLAYGROUND_SHOTS")
SIZES = {"wide": (1280, 800), "phone": (390, 844)}


@contextmanager
def open_browser(profile: Path) -> Iterator[webdriver.Chrome]:
    """Chromium without a window, with a microphone that hears beeps."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for switch in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={profile}"),
        *("use-fake-device-for-media-stream", "use-fake-ui-for-media-stream"),
        "autoplay-policy=no-user-gesture-required",
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page as a person uses it."""

    def __init__(self, browser: webdriver.Chrome, address: str, *, wait_until_ready: bool = True) -> None:
        self.browser, self.address = browser, address
        self.resize(*SIZES["wide"])
        browser.get(f"{address}/playground/icon.svg")
        browser.execute_script("sessionStorage.clear(); localStorage.clear();")
        browser.get_log("browser")  # type: ignore[no-untyped-call]
        browser.get(address)
        if wait_until_ready:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        self.wait(lambda: self.text("worker").startswith("Ready"))
        self.wait(lambda: self.js("document.querySelectorAll('.samples button').length > 4"))

    def resize(self, width: int, height: int, *, is_dark: bool = False) -> None:
        facts = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", facts)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def wait(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        return WebDriverWait(self.browser, seconds, poll_frequency=0.05).until(lambda _driver: condition())

    def js(self, expression: str, *arguments: Any) -> Any:
        """The value of an expression of JavaScript in the page."""
        return self.browser.execute_script(f"return {expression}", *arguments)

    def by(self, name: str) -> Any:
        return self.browser.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return str(self.js("document.getElementById(arguments[0]).textContent.trim()", name))

    def is_shown(self, name: str) -> bool:
        return bool(self.js("document.getElementById(arguments[0]).checkVisibility()", name))

    def click(self, name: str) -> None:
        """Click an element, wherever the page is scrolled to."""
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.by(name))
        self.by(name).click()

    def choose(self, source: Path, audio: Path) -> None:
        self.by("source").send_keys(str(source))
        self.by("audio").send_keys(str(audio))

    def sample(self, name: str) -> None:
        self.browser.find_element(By.CSS_SELECTOR, f"[data-url='sample:{name}']").click()
        self.wait(lambda: self.js(f"document.querySelector(\"[data-url='sample:{name}']\").ariaPressed") == "true")

    def drag_value(self, name: str, value: float) -> None:
        """Move a slider, as its thumb does."""
        self.browser.execute_script(
            "const [id, value] = arguments; const input = document.getElementById(id); input.value = value;"
            "input.dispatchEvent(new Event('input', { bubbles: true }));",
            name,
            value,
        )

    def go(self) -> None:
        self.click("go")

    def make(self) -> None:
        """Make the video and wait for it."""
        self.go()
        self.wait(lambda: self.is_shown("result") or self.is_shown("failure"))
        assert self.is_shown("result"), self.text("failure-text")

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

    def focused(self) -> str:
        return str(self.js("document.activeElement.id || document.activeElement.dataset.url || ''"))

    def tab_to(self, name: str, *, backwards: bool = False) -> list[str]:
        """Press Tab until the element has the focus; the ids of all that had it on the way."""
        reached: list[str] = []
        while not reached or reached[-1] != name:
            assert len(reached) < 60, f"Tab does not reach {name}: {reached}"
            self.press(*([Keys.SHIFT] if backwards else []), Keys.TAB)
            reached.append(self.focused())
        return reached

    def shot(self, name: str) -> None:
        """Keep screenshots of this state at both sizes, light and dark, for a person who wants to look."""
        if not SHOTS:
            return
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        for size, (width, height) in SIZES.items():
            for is_dark in (False, True):
                self.resize(width, height, is_dark=is_dark)
                scheme = "dark" if is_dark else "light"
                whole = self.browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
                area = {"x": 0, "y": 0, "width": width, "height": max(height, whole["height"]), "scale": 1}
                taken = self.browser.execute_cdp_cmd(
                    "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": area}
                )
                (Path(SHOTS) / f"{name}-{size}-{scheme}.png").write_bytes(base64.b64decode(taken["data"]))
        self.resize(*SIZES["wide"])

    def complaints(self) -> list[str]:
        """What the browser's console has of errors, the statuses of the API itself left out."""
        entries = self.browser.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in entries if "the server responded with a status" not in entry["message"]]

    def axe(self) -> list[str]:
        """Serious findings of axe-core about the page as it is now, each with the elements it means."""
        if not self.js("Boolean(window.axe)"):
            script = (Path(str(resources.files("axe_core_python"))) / "axe.min.js").read_text(encoding="utf-8")
            # Through the debugger, because the page's own policy allows no foreign script.
            self.browser.execute_cdp_cmd("Runtime.evaluate", {"expression": script})
        found = self.browser.execute_async_script(
            "const done = arguments[0]; axe.run(document, {resultTypes: ['violations']}).then((all) => done("
            "all.violations.filter((one) => ['serious', 'critical'].includes(one.impact))"
            ".map((one) => `${one.id}: ${one.nodes.map((node) => node.target.join(' ')).join(', ')}`)))"
        )
        return [str(one) for one in found]
