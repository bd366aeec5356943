"""labels.jsonl: labels, notes and stars of features; appended to, never rewritten.

One object a line: `feature`, `kind` (label, note or star), `text`, `author`, `model`, `score`,
`time`, `scored_by`. The newest of a kind counts; the others stay as its history. An empty text
takes a label or a note back, and a star is on where its text is `on`.
"""

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from pydantic import TypeAdapter, ValidationError

from gsae_core import files
from gsae_core.errors import InputError
from gsae_core.files import unreadable, writing

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["label", "note", "star"]
FILE = "labels.jsonl"
LONGEST: dict[Kind, int] = {"label": 200, "note": 10_000, "star": 3}


class Annotation(NamedTuple):
    """A label, a note or a star of one feature."""

    feature: int
    kind: Kind
    text: str
    author: str
    """Who gave it: a person's name, or `automatic`."""
    model: str | None
    """The model that wrote it, if one did."""
    score: float | None
    """How well it tells where the feature fires, 0.5 is guessing; None: not measured."""
    time: float
    """Seconds since 1970."""
    scored_by: str | None = None
    """What the score is of, `detection` or `fuzzing`; None: not measured, or not recorded."""

    @property
    def measured(self) -> str:
        """The score in words; empty where there is none."""
        if self.score is None:
            return ""
        by = f" by {self.scored_by}" if self.scored_by else ""
        return f"score {self.score:.2f}{by}, where 0.5 is guessing"


_ANNOTATION = TypeAdapter(Annotation)


class Labels:
    """The annotations in an index's folder; reads its file again whenever it has grown."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / FILE
        self._seen: tuple[int, int] | None = None
        self._all: list[Annotation] = []
        self._damaged = 0

    def add(
        self,
        feature: int,
        kind: Kind,
        text: str,
        *,
        author: str,
        model: str | None = None,
        score: float | None = None,
        scored_by: str | None = None,
    ) -> Annotation:
        """Append one, whole and on the disk before this returns; others may append meanwhile."""
        if kind == "star" and text not in ("on", "off"):
            raise InputError(f"expected a star that is on or off, got {text!r}")
        if len(text) > LONGEST[kind]:
            raise InputError(
                f"expected a {kind} of at most {LONGEST[kind]} characters, got {len(text)}; "
                "shorten it, or keep the rest elsewhere"
            )
        if kind == "label" and len(text.splitlines()) > 1:
            raise InputError("expected a label of one line, got several; what is long fits a note")
        added = Annotation(feature, kind, text, author, model, score, time.time(), scored_by)
        with writing(self._path, 0):
            self._folder.mkdir(parents=True, exist_ok=True)
        files.append(self._path, added._asdict())
        return added

    def all(self) -> list[Annotation]:
        """Return every annotation, oldest first; lines that hold none are left out."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(unreadable(self._path, error)) from None
        version = stat.st_mtime_ns, stat.st_size
        if version != self._seen:
            lines, found = files.read(self._path), []
            for row in lines.rows:
                # A newer version may add fields; a line with fewer is somebody's own.
                fields = {name: row[name] for name in Annotation._fields if name in row}
                with contextlib.suppress(ValidationError):
                    found.append(_ANNOTATION.validate_python(fields, strict=True))
            self._seen, self._all = version, found
            self._damaged = lines.damaged + lines.torn + len(lines.rows) - len(found)
        return self._all

    @property
    def damaged(self) -> int:
        """How many lines cannot be read and are left out."""
        self.all()
        return self._damaged

    def latest(self, kind: Kind) -> dict[int, Annotation]:
        """Return what counts of a kind, by feature; nothing where it was taken back."""
        newest = {each.feature: each for each in self.all() if each.kind == kind}
        nothing = "off" if kind == "star" else ""
        return {feature: each for feature, each in newest.items() if each.text != nothing}

    def of(self, feature: int) -> dict[Kind, Annotation]:
        """Return what counts of one feature, by kind."""
        found = ((kind, self.latest(kind).get(feature)) for kind in get_args(Kind))
        return {kind: each for kind, each in found if each is not None}

    def frame(self) -> "pd.DataFrame":
        """Return a row per feature of which anything counts; the last columns are the label's."""
        import pandas as pd

        label, note, star = (self.latest(kind) for kind in get_args(Kind))
        features = sorted({*label, *note, *star})
        none = Annotation(-1, "label", "", author="", model=None, score=None, time=0)
        rows = []
        for i in features:
            said, noted = label.get(i, none), note.get(i, none).text
            rows.append((said.text, noted, i in star, said.author, said.model or "", said.score))
        names = ("label", "note", "star", "author", "model", "score")
        frame = pd.DataFrame(rows, index=pd.Index(features, name="feature"), columns=names)
        kinds = dict.fromkeys(names, str) | {"star": bool, "score": float}
        return frame.astype(kinds)  # the columns of no features are of no kind
