"""Public releases of SAEs, as data: assets/catalogue.yaml, searched by what one looks for."""

import functools
import re
from collections.abc import Sequence
from importlib import resources
from typing import Annotated, Any

from pydantic import BeforeValidator

from gsae_core.config import Config


def _layers(value: Any) -> Any:
    """Return the layers that `0-33` stands for."""
    if isinstance(value, str):
        first, _, last = value.partition("-")
        return tuple(range(int(first), int(last) + 1))
    return value


class Release(Config):
    """SAEs that lie together; None and empty: not known."""

    title: str
    repo: str | None = None  # on the Hub; None where it is not there
    where: str | None = None  # address of files that are not on the Hub
    layout: str  # one of the formats that can be read
    model: str  # name on the Hub of the language model
    site: str | None = None
    layers: Annotated[tuple[int, ...], BeforeValidator(_layers)] = ()
    architecture: str | None = None
    widths: tuple[int, ...] = ()  # latents of the SAEs there are
    l0: tuple[float, float] | None = None  # least and most latents per token, as it states
    paths: tuple[str, ...] = ()  # where in the repository; {braces} for what varies
    count: int | None = None
    sae_lens: tuple[str, ...] = ()  # names of the same SAEs in SAELens' registry
    note: str | None = None

    @property
    def prefix(self) -> str:
        """The folder in the repository that holds all of them; "" if that is the repository."""
        starts = {pattern.partition("{")[0].rpartition("/")[0] for pattern in self.paths}
        return starts.pop() if len(starts) == 1 else ""


@functools.cache
def releases() -> tuple[Release, ...]:
    """Return the catalogue."""
    import yaml

    path = resources.files("gsae_core").joinpath("assets/catalogue.yaml")
    # The C loader reads a thousand lines in 20 ms, the other one in 300.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    entries = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    return tuple(Release.model_validate(entry) for entry in entries)


def search(
    words: str = "",
    *,
    layer: int | None = None,
    architecture: str | None = None,
    width: int | None = None,
    l0: float | int | None = None,
) -> list[Release]:
    """Return the releases that fit, in the catalogue's order; None and "" fit everything.

    All words are in titles, models, repositories, sites or architectures. A release that does not
    state what is looked for is left out: it may or may not have it.
    """
    asked = re.split(r"[\s,]+", words.lower().strip())

    def fits(release: Release) -> bool:
        names = [release.title, release.model, release.layout, *release.sae_lens]
        maybe = [release.repo or "", release.site or "", release.architecture or ""]
        text = " ".join(names + maybe).lower()
        low, high = release.l0 or (1.0, 0.0)
        return (
            all(word in text for word in asked)
            and (layer is None or layer in release.layers)
            and (architecture is None or architecture == release.architecture)
            and (width is None or width in release.widths)
            and (l0 is None or low <= l0 <= high)
        )

    return [release for release in releases() if fits(release)]


def ranged(numbers: Sequence[int]) -> str:
    """Return numbers as a person writes them: `0-11`, or `8, 16, 24`; a dash for none."""
    if not numbers:
        return "–"
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(str(number) for number in numbers)
