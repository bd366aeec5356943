"""The Hub in a real browser: found, fetched while one watches, cancelled, taken up, opened.

Run with `python -m pytest tests/browser/test_hub.py -m browser`.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from driver import Watch, at_rest, serving
from hub_server import Hub, serving_hub
from playwright.sync_api import Page, expect
from synthetic import write_run

from gsae_core.checkpoints.checkpoint import save_sae
from gsae_core.runs.run import list_runs
from gsae_core.sae.architectures import GatedSAE

NASTY = "<img src=x onerror=\"document.title='owned'\"><style>body{background:red}</style>"


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub that the app's server, and the processes it starts, ask."""
    folder = tmp_path_factory.mktemp("sae")
    about = {"model_name": "bundled", "hook_name": "blocks.2.hook_resid_post"}
    save_sae(GatedSAE(256, 1024), folder, metadata=about)
    files = {
        f"layer_{i}/{path.name}": path.read_bytes() for i in range(3) for path in folder.iterdir()
    }
    with pytest.MonkeyPatch.context() as patch, serving_hub() as hub:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            patch.delenv(name, raising=False)
        hub.add("ada/saes", files, card={"license": NASTY})
        yield hub


@pytest.fixture(scope="module")
def own_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub-runs")
    write_run(root, "done")
    return root


@pytest.fixture(scope="module")
def hub_address(own_runs: Path, loopback: Hub) -> Iterator[str]:
    with serving(own_runs) as address:
        yield address


@pytest.fixture
def tab(new_visitor: Callable[..., tuple[Page, Watch]]) -> Page:
    return new_visitor()[0]


def test_a_row_of_the_catalogue_fills_the_field_and_the_address(
    tab: Page, hub_address: str
) -> None:
    tab.goto(f"{hub_address}/Hub")
    at_rest(tab)
    tab.get_by_label("Model or words").fill("pythia-70m gated")
    tab.keyboard.press("Enter")
    expect(tab.get_by_text("1 of 110 releases")).to_be_visible()
    table = tab.get_by_test_id("stDataFrame").first.locator("canvas").first
    box = table.bounding_box()
    assert box is not None
    tab.mouse.click(box["x"] + 12, box["y"] + 35 * 2 - 17)
    field = tab.get_by_label("Repository", exact=True)
    expect(field).to_have_value("canrager/lm_sae:pythia70m_sweep_gated_ctx128_0730")
    # The Hub of this test has none of that name, and the page says so.
    expect(tab.get_by_text("found no 'canrager/lm_sae' there")).to_be_visible()


def test_an_sae_is_fetched_cancelled_taken_up_and_opened(
    tab: Page, hub_address: str, loopback: Hub, own_runs: Path
) -> None:
    loopback.slow_seconds = 0.3  # 2 MB in pieces of 16 kB: 39 s
    tab.goto(f"{hub_address}/Hub?repo=ada/saes&sae=layer_1")
    expect(tab.get_by_text("256 wide activations, 1,024 features")).to_be_visible()
    # Words of a card stay words.
    expect(tab.get_by_text("onerror", exact=False).first).to_be_visible()
    assert tab.title() == "Hub · Gated SAE Studio"
    tab.get_by_role("button", name="Download 2.1 MB").click()
    expect(tab.get_by_text(re.compile(r"downloading: [1-9].* of 2\.1 MB"))).to_be_visible()
    tab.get_by_role("button", name="Cancel").click()
    expect(tab.get_by_text("◻ cancelled")).to_be_visible()
    loopback.slow_seconds = 0.0
    loopback.seen.clear()
    tab.get_by_role("button", name="Resume").click()
    expect(tab.get_by_text("● finished")).to_be_visible()
    first = loopback.requests("GET", "/storage/")[0]
    assert str(first.range).startswith("bytes=")
    assert "saes-layer_1" in {run.id for run in list_runs(own_runs)}
    tab.get_by_role("button", name="Open the run").click()
    expect(tab.get_by_role("heading", name="Live")).to_be_visible()
    expect(tab.get_by_label("Run", exact=True).first).to_be_visible()


def test_a_reload_keeps_repository_revision_and_sae(tab: Page, hub_address: str) -> None:
    tab.goto(f"{hub_address}/Hub?repo=ada/saes&rev=main&sae=layer_2")
    expect(tab.get_by_text("256 wide activations, 1,024 features")).to_be_visible()
    at_rest(tab)
    # history.js steps back in the history once the address names the run; a reload asked for while
    # the browser does so is dropped by it.
    tab.wait_for_function("window.gsaeHistory === 'settled'")
    tab.reload()
    expect(tab.get_by_text("256 wide activations, 1,024 features")).to_be_visible()
    asked = parse_qs(urlsplit(tab.url).query)
    assert (asked["repo"], asked["rev"], asked["sae"]) == (["ada/saes"], ["main"], ["layer_2"])


def test_no_token_of_the_server_reaches_the_page(tab: Page, hub_address: str) -> None:
    tab.goto(f"{hub_address}/Hub?repo=ada/saes")
    at_rest(tab)
    tab.get_by_role("tab", name="Export and send").click()
    expect(tab.get_by_label("To the repository")).to_be_visible()
    assert os.environ.get("HF_TOKEN") is None
    assert "hf_" not in tab.content().replace("hf_auth", "")
