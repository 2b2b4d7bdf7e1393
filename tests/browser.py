"""Headless Chromium, for the tests of pages: it loads nothing from elsewhere, and what its console says is kept."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage"
)


REMOTE = ("http", "https", "ws", "wss")  # chromium's own pages have another scheme
HERE = ("127.0.0.1", "localhost")


@contextmanager
def chromium(profile: Path, width: int = 1200, height: int = 900) -> Iterator[Chrome]:
    """A window of its own. Debian's packages chromium and chromium-driver must be there."""
    options = ChromeOptions()
    options.binary_location = _found("chromium")
    for flag in (*FLAGS.split(), f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options, Service(_found("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def complaints(driver: Chrome) -> list[str]:
    """What the console has said since the last look, and every address beyond this machine that was asked for."""
    said = [entry["message"] for entry in driver.get_log("browser")]
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    addresses = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return said + [address for address in addresses if urlsplit(address).hostname not in HERE and urlsplit(address).scheme in REMOTE]


def _found(program: str) -> str:
    path = shutil.which(program)
    assert path, f"{program} is not installed: apt-get install chromium chromium-driver"
    return path
