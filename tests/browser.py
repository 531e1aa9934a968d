"""Headless Chromium, driven through chromedriver's WebDriver interface: HTTP and JSON, no further package."""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.request

import pytest
from conftest import patience

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id in WebDriver's answers
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]  # there is no network


class Browser:
    """One page. Selectors are CSS."""

    def __init__(self, base):
        self._base = base

    def ask(self, path, **body):
        """POST to a path of the session."""
        request = urllib.request.Request(self._base + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=patience()) as answer:
            return json.load(answer)["value"]

    def open(self, url):
        self.ask("/url", url=url)

    def click(self, selector):
        self.ask(f"/element/{self._find(selector)}/click")

    def type(self, selector, text):
        """Types text; into a file input, the path of the file to choose."""
        self.ask(f"/element/{self._find(selector)}/value", text=text)

    def script(self, text, *arguments):
        """The value of `return ...` in the page."""
        return self.ask("/execute/sync", script=text, args=list(arguments))

    def wait(self, text, *arguments):
        """Waits until the script's value is true, and returns it."""
        end = time.monotonic() + patience()
        while not (value := self.script(text, *arguments)):
            assert time.monotonic() < end, f"never true: {text}"
            time.sleep(0.1)
        return value

    def screenshot(self, file):
        """The whole page as PNG."""
        size = self.ask("/goog/cdp/execute", cmd="Page.getLayoutMetrics", params={})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.ask("/goog/cdp/execute", cmd="Page.captureScreenshot",
                        params={"captureBeyondViewport": True, "clip": clip})
        file.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self):
        """What the console has shown since the last call."""
        return [entry["message"] for entry in self.ask("/se/log", type="browser")]

    def _find(self, selector):
        return self.ask("/element", using="css selector", value=selector)[ELEMENT]


@contextlib.contextmanager
def browser(width, height, profile):
    """A browser with a window of that size; below 500 pixels wide it is that of a phone. Skips the test without one."""
    driver = shutil.which("chromedriver")
    if not driver or not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = {"args": [*ARGUMENTS, f"--window-size={width},{height}", f"--user-data-dir={profile}"]}
    if width < 500:
        options["mobileEmulation"] = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2}}
    wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            port = next(found[1] for line in process.stdout if (found := re.search(r"success\w* on port (\d+)", line)))
            base = f"http://127.0.0.1:{port}/session"
            session = Browser(base).ask("", capabilities=wanted)["sessionId"]
            try:
                yield Browser(f"{base}/{session}")
            finally:
                urllib.request.urlopen(urllib.request.Request(f"{base}/{session}", method="DELETE"),
                                       timeout=patience()).close()
        finally:
            process.terminate()
