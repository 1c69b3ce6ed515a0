"""A headless Chromium: what a reader of a page sees, and what the page asks the network for."""

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass
class Visit:
    """An opened page, what it requested besides itself, and the errors that it caused."""

    page: object
    requests: list = field(default_factory=list)
    errors: list = field(default_factory=list)

    def sizes(self, selector):
        """Width and height of what is drawn of every element, and of the picture in it."""
        return self.page.eval_on_selector_all(
            selector, "all => all.map(e => [e.clientWidth, e.clientHeight, e.naturalWidth, e.naturalHeight])"
        )


@contextmanager
def chromium():
    """Yield open(path) -> Visit. Skips the test where there is no Playwright or no Chromium."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    with driver.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        found = str(own) if own.is_file() else next(filter(None, map(shutil.which, COMMANDS)), None)
        if found is None:
            pytest.skip("no Chromium: install one with `playwright install chromium`, or the system's package chromium")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])  # root needs it
        try:
            yield lambda path: _visit(browser.new_page(), path)
        finally:
            browser.close()


def _visit(page, path):
    visit = Visit(page)
    address = path.absolute().as_uri()
    inside = (address, "data:")  # the page itself, and the pictures in it
    page.on("request", lambda request: request.url.startswith(inside) or visit.requests.append(request.url))
    page.on("pageerror", lambda error: visit.errors.append(str(error)))
    page.on("console", lambda message: message.type in ("error", "warning") and visit.errors.append(message.text))
    page.goto(address, wait_until="load")
    return visit
