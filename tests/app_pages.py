"""A page opened without a browser, and all that it says; the fixtures are in conftest.py."""

from pathlib import Path

from streamlit.testing.v1 import AppTest

APP = Path(__file__).resolve().parents[1] / "app.py"
HOSTILE = "<img src=x onerror=alert(1)>![](http://evil.example/x.png)"


def opened(page: str, **parameters: str | list[str]) -> AppTest:
    at = AppTest.from_file(str(APP), default_timeout=120)
    if page != "app.py":
        at.switch_page(page)
    for name, value in parameters.items():
        at.query_params[name] = value
    return at.run()


def text(at: AppTest) -> str:
    """Return all that a page says."""
    kinds = (at.html, at.caption, at.markdown, at.code, at.title, at.subheader)
    return "\n".join(
        str(element.value if hasattr(element, "value") else element.body)
        for kind in kinds
        for element in kind
    )
