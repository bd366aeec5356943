"""A server of the app, a browser to look at it with, and what is held against every page."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Page, expect

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PATIENCE = 90_000  # ms: seconds on an idle machine, a minute on a loaded one
AT_REST = '[data-testid="stApp"][data-test-script-state="notRunning"]'
ALL_THERE = """() => !document.querySelector('[data-testid="stSkeleton"]')
  && window.gsaeHistory === 'settled'
  && [...document.querySelectorAll('[data-testid="stPlotlyChart"]')].every(
    chart => chart.querySelector('.main-svg'))"""
PAGES = ["", *sorted(file.stem.partition("_")[2] for file in (ROOT / "pages").glob("[0-9]*.py"))]
"""Every page's part of the address; Home has none."""

# Streamlit asks for these beside each page before it finds them at the root.
KNOWN_404 = re.compile(r"/_stcore/(health|host-config)$")
# What a browser says while the server it knows is being started again.
SERVER_AWAY = re.compile(
    "ERR_CONNECTION_|ERR_EMPTY_RESPONSE|WebSocket connection to|when disconnected from server|"
    "Client Error in reaching server|Is Streamlit still running"
)
# The element that has the focus, inside a component's shadow root too.
FOCUSED = """() => {
  let at = document.activeElement
  while (at && at.shadowRoot && at.shadowRoot.activeElement) at = at.shadowRoot.activeElement
  return at ? (at.getAttribute('aria-label') || at.textContent || '').trim() : ''
}"""


def chromium_path() -> str | None:
    """Return the browser of this machine, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def free_port() -> int:
    """Return a port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(
    runs: Path,
    *,
    port: int | None = None,
    patience: float = 90.0,
    clone: Path = ROOT,
    prepared: str = "",
) -> Iterator[str]:
    """Serve a clone's app over a folder of runs; yield its address, and stop it in the end.

    Args:
        prepared: Python that the server's process runs before the app.

    Raises:
        TimeoutError: if it does not answer in `patience` seconds.
    """
    port = port or free_port()
    command = [
        sys.executable,
        "-c",
        f"{prepared}\nfrom streamlit.web.cli import main\nmain(prog_name='streamlit')",
        "run",
        str(clone / "app.py"),
        "--server.port",
        str(port),
    ]
    environment = {**os.environ, "GSAE_RUNS": str(runs), "PYTHONPATH": str(clone)}
    server = subprocess.Popen(
        command, cwd=clone, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        address = f"http://localhost:{port}"
        deadline = time.monotonic() + patience
        while not _answers(f"{address}/_stcore/health"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"expected the app to answer in {patience:g} s")
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=20)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


class Watch:
    """What the tabs of a visitor asked for, and what their consoles complained about."""

    def __init__(self, context: BrowserContext) -> None:
        self.strangers: list[str] = []
        self.complaints: list[str] = []
        self.server_may_go = False
        """Whether a test starts its server again, of which a browser complains."""
        context.on("request", lambda request: self._asked(request.url))
        context.on("console", self._heard)
        context.on("page", lambda page: page.on("websocket", lambda s: self._asked(s.url)))

    def _asked(self, url: str) -> None:
        parts = urlsplit(url)
        inside = parts.scheme in ("data", "blob")
        if not inside and parts.hostname not in ("localhost", "127.0.0.1"):
            self.strangers.append(url)

    def _heard(self, message: ConsoleMessage) -> None:
        known = KNOWN_404.search(message.location.get("url", ""))
        away = self.server_may_go and SERVER_AWAY.search(message.text)
        if message.type == "error" and not known and not away:
            self.complaints.append(message.text)

    def verdict(self) -> None:
        """Fail if anything outside was asked for, or anything went wrong in a page."""
        strangers, complaints = list(self.strangers), list(self.complaints)
        self.strangers.clear()
        self.complaints.clear()
        assert not strangers, strangers
        assert not complaints, complaints


def opened(page: Page, address: str) -> None:
    """Open an address and wait until the page is there."""
    page.goto(address)
    at_rest(page)


def at_rest(page: Page) -> None:
    """Wait until the script has ended and every piece of the page is there, charts drawn."""
    page.wait_for_selector(AT_REST)
    page.wait_for_function(ALL_THERE)


def sees(page: Page, heading: str) -> None:
    """Wait until a page of this title is there, without an exception in it."""
    expect(page.get_by_role("heading", level=1)).to_have_text(heading)
    at_rest(page)
    assert page.get_by_test_id("stException").count() == 0


def tab_to(page: Page, wanted: str, *, most: int = 120) -> None:
    """Press Tab until what has the focus begins with `wanted`."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate(FOCUSED).startswith(wanted):
            return
    raise AssertionError(f"expected to reach {wanted!r} by Tab")


def filtered(page: Page, label: str, text: str) -> Locator:
    """Type into a list's field, and return the entry that begins with what was typed, shown."""
    at_rest(page)
    field = page.get_by_label(label, exact=True)
    field.focus()
    page.keyboard.type(text)
    begins = re.escape(text).replace("/", r"\/")  # the browser's notation of a pattern ends at one
    entry = page.get_by_role("option", name=re.compile(f"^{begins}"))

    def shown() -> bool:
        # A list closes when the page is drawn anew below what is being typed: this opens it.
        if field.get_attribute("aria-expanded") == "false":
            field.press("ArrowDown")
        return entry.is_visible()

    eventually(shown)
    return entry


def eventually(what: Callable[[], bool], *, seconds: float = 120) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)
