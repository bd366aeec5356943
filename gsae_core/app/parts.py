"""Parts that several pages draw, text from elsewhere escaped: Markdown would act on it."""

import contextlib
import html
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlencode

import streamlit as st
from streamlit.errors import StreamlitAPIException

from gsae_core.config import Architecture
from gsae_core.errors import InputError
from gsae_core.plots.palette import LOOKS, NEUTRAL
from gsae_core.runs.jobs.job import CancelStage, Job, State, Status, escalate_cancel
from gsae_core.text import WORDS, ago, in_units, macros, unhidden, worse_than_mean

if TYPE_CHECKING:
    import pandas as pd

    from gsae_core.plots.live import Line


def own(name: str) -> str:
    """Return a key of the page that is drawn, for what several pages draw."""
    return f"{st.session_state['shell.page'].lower()}.{name}"


def key_for(name: str, *about: object) -> str:
    """Return the key of a widget whose choices depend on `about`: another key for another `repr`.

    A browser keeps showing what was chosen under a key, even if the next list under it lacks it.
    """
    return f"{name}.{zlib.crc32(repr(about).encode()):08x}"


SIGNS: dict[Architecture, str] = {"gated": "●", "relu": "◆", "jumprelu": "▲", "topk": "■"}
SHAPES = {LOOKS[architecture].shape: sign for architecture, sign in SIGNS.items()}
SOLID = (1, 0)  # as a dash
PAGE_TEMPLATE = "page.html.j2"
OVERLAP = ("#0072B2", "#009E73", "#D55E00")  # the first of two SAEs alone, both, the second
Colour = Literal["gray", "blue", "green", "orange", "red"]

STATE_LOOKS: dict[State, tuple[str, Colour]] = {
    "queued": ("○", "gray"),
    "starting": ("◔", "blue"),
    "running": ("◑", "blue"),
    "cancelling": ("◐", "orange"),
    "cancelled": ("◻", "gray"),
    "finished": ("●", "green"),
    "failed": ("✕", "red"),
    "lost": ("?", "orange"),
}
"""Sign and colour of each state: the sign tells it where the colour is not seen."""


def notice(
    text: str, *, kind: Literal["info", "warning", "error"] = "error", title: str = ""
) -> None:
    """Show a message; any text is safe in it, for it is escaped and never read as Markdown."""
    colour = {"info": "#0072B2", "warning": "#E69F00", "error": "#D55E00"}[kind]
    role = "alert" if kind == "error" else "status"
    head = f"<strong>{escaped(title)}</strong><br>" if title else ""
    st.html(
        f'<div role="{role}" style="padding:.75rem 1rem;border-radius:.5rem;overflow-wrap:anywhere;'
        f"border-left:4px solid {colour};background:color-mix(in srgb, {colour} 12%, transparent)"
        f'">{head}{escaped(text)}</div>'
    )


@contextlib.contextmanager
def noticed(title: str = "") -> Iterator[None]:
    """Show an InputError within as a notice of that title, and go on after it; a decorator too.

    Without a title the page ends there, and the notice is a sentence.
    """
    try:
        yield
    except InputError as error:
        said = str(error)
        notice(said if title else f"{said[:1].upper()}{said[1:]}.", title=title)
        if not title:
            st.stop()


def asset(name: str) -> str:
    """Return a script or a style sheet that ships with the package."""
    return resources.files("gsae_core").joinpath(f"assets/{name}").read_text(encoding="utf-8")


def escaped(text: str) -> str:
    """Return text as HTML that shows it as it stands, and nothing of it hidden."""
    return html.escape(unhidden(text))


def plain(text: str, *, size: str = "1rem") -> None:
    """Show text as it stands: a name, a path or a token is never read as Markdown or HTML."""
    style = f"font-size:{size};overflow-wrap:anywhere;white-space:pre-line"
    st.html(f'<div style="{style}">{escaped(text)}</div>')


def say_worse(fvus: Mapping[str, float | None]) -> None:
    """Name the SAEs whose FVU is above 1, if there are any."""
    if sentence := worse_than_mean(fvus):
        notice(f"{sentence}.", kind="warning")


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it stands, for labels that know nothing else."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]()<>#+-.!|$:~^" else c for c in unhidden(text))


def state_badge(state: State) -> None:
    """Show a job's state."""
    sign, colour = STATE_LOOKS[state]
    st.badge(f"{sign} {state}", color=colour)


# Jobs: runs, indices of features, and transfers from and to the Hub.

STAGES = {
    "waiting": "waits until the device is free",
    "indexing": "reading tokens",
    "sorting": "sorting by feature",
    "describing": "describing features",
}
COUNTED = ("indexing", "downloading", "uploading")
CANCELLABLE = ("queued", "starting", "running")


def attempt(act: Callable[[], object], refused: str) -> None:
    """Do what a press asks for, in a callback; the next page says `refused` and why it fails."""
    try:
        act()
    except InputError as error:
        # Someone else may have pressed first, deleted it, or the disk refuses.
        st.session_state["shell.refused"] = (refused, str(error))


def say_refused() -> None:
    """Say what the last press could not do, if anything."""
    if refused := st.session_state.pop("shell.refused", None):
        notice(refused[1], title=refused[0])


def cancel(job: Job) -> None:
    """Ask a job's process to stop. For callbacks."""
    attempt(lambda: job.request_cancel(by="app"), "Nothing was cancelled")


def escalate(job: Job) -> CancelStage:
    """Take a cancellation as far as it needs to go by now, if the folder lets us."""
    try:
        return escalate_cancel(job)
    except InputError:
        return "requested"  # read-only, or gone: the process itself ends all the same


def job_share(status: Status) -> float:
    """Return how much of its stage a job has done, from 0 to 1."""
    return min(status.done / status.total, 1.0) if status.total else 0.0


def job_panel(
    job: Job,
    status: Status,
    *,
    key: str,
    name: str = "",
    unit: str = "token",
    amount: Callable[[int], str] = "{:,}".format,
) -> None:
    """Draw how far a job with a process is, behind a name, and the button that cancels it.

    In stages of `COUNTED`, `amount` writes what is done and what there is to do; `unit`: of what a
    run has to read.
    """
    if status.state == "cancelling":
        escalate(job)
    stages = STAGES | {"loading": WORDS[unit].loading}
    stage = in_units(stages.get(status.stage or "", status.stage or "starting"), unit)
    if status.state == "queued" and status.stage:
        stage = STAGES["waiting"]
    elif status.stage in COUNTED and status.total:
        stage += f": {amount(status.done)} of {amount(status.total)}"
    left, right = st.columns([4, 1], vertical_alignment="bottom")
    left.progress(job_share(status), text=f"{name}: {stage}" if name else stage)
    if status.state == "cancelling":
        right.caption("cancelling …")
    elif status.state in CANCELLABLE:
        right.button("Cancel", icon=":material/stop_circle:", key=key, on_click=cancel, args=(job,))


def job_trouble(
    job: Job, status: Status, *, name: str, again: str, cancelled: str = "", n_lines: int = 12
) -> None:
    """Say why a job ended early, if it did, with the last lines of its log.

    `again` and `cancelled` are sentences: what starting it again does, and that it was cancelled.
    """
    if status.state == "failed":
        notice(status.reason, title=f"{name} failed")
    elif status.state == "lost":
        text = "The process ended unexpectedly: the machine restarted, or it was killed, often "
        text += f"because memory ran out. {again}"
        notice(text, kind="warning", title=f"{name} was lost")
    elif status.state == "cancelled":
        notice(f"{cancelled} {again}".strip(), kind="info", title=f"{name} was cancelled")
    else:
        return
    if n_lines:
        log(job.log_tail(n_lines))


def log(lines: Sequence[str]) -> None:
    """Show lines of a log as they stand."""
    height = 240 if len(lines) > 8 else "content"
    st.code(unhidden("\n".join(lines)) or "the log is empty", language=None, height=height)


def line_legend(lines: Sequence["Line"]) -> None:
    """Show which colour, dash and marker is which SAE, once for all charts of a page.

    Of several runs or places it shows which colour is which, and which dash which architecture.
    """
    if len({line.group for line in lines}) == 1:
        items = [(line.label, line.colour, line.dash, SHAPES[line.shape]) for line in lines]
    else:
        groups = {line.group: line.colour for line in reversed(lines)}
        items = [(group, colour, SOLID, "") for group, colour in groups.items()]
        kinds = {line.shape: (line.label.partition(",")[0], line.dash) for line in lines}
        items += [(kind, NEUTRAL, dash, SHAPES[s]) for s, (kind, dash) in kinds.items()]
    rows = [(label, colour, dash == SOLID, sign) for label, colour, dash, sign in items]
    st.html(macros(PAGE_TEMPLATE).line_legend(rows))


def overlap(counts: Mapping[str, int]) -> None:
    """Draw how much is of one SAE alone, of both, and of the other alone, each by its name."""
    named = zip(OVERLAP, counts.items(), strict=True)
    st.html(macros(PAGE_TEMPLATE).shares([(c, n, f"{n:,} {name}") for c, (name, n) in named]))


def since(moment: float | int) -> str:
    """Return how long ago something was, from its time in seconds since 1970."""
    return ago(max(time.time() - moment, 0.0))


def marked(architecture: Architecture, text: str) -> None:
    """Show text behind the colour and marker of an architecture."""
    sign = f'<span style="color:{LOOKS[architecture].colour}">{SIGNS[architecture]}</span>'
    st.html(f'<div style="font-weight:600">{sign} {escaped(text)}</div>')


def figure_tools(
    frame: "pd.DataFrame | Callable[[], pd.DataFrame]", *, name: str, about: str = ""
) -> None:
    """Draw the button under a figure that explains it, tables it, and copies its link.

    `frame` is what the figure draws, a column for each axis, in its own units; or what returns it:
    what the popover holds is made when it is opened, for nine figures a second cost nine buttons.
    `name`, once a page, is the key of its widgets; `about` is from the glossary.
    """
    tools = st.popover(
        "Data",
        icon=":material/table_view:",
        type="tertiary",
        key=own(f"tools_{name}"),
        on_change="rerun",
        help=f"{'Definition · ' if about else ''}Show as table, download it · Copy link",
    )
    if not tools.open:
        return
    with tools:
        if about:
            st.caption("Definition")
            plain(about, size=".9rem")
        st.caption("Show as table")
        table = frame() if callable(frame) else frame
        alt = f"The data of {name}; a button above it downloads them"
        st.dataframe(table, hide_index=True, height=260, key=own(f"table_{name}"), alt=alt)
        copy_link()


PAGE = "page"
"""Parameter that names the page an address is of, on the way to the browser: see history.js."""


def copy_link() -> None:
    """Show the address of this page with all that shapes it, and a button that copies it."""
    st.caption("Copy link")
    # A list is a parameter several times over, of which to_dict() keeps the last alone.
    names = [name for name in st.query_params if name != PAGE]
    query = urlencode({name: st.query_params.get_all(name) for name in names}, doseq=True)
    # The server's idea of the address never has a query.
    st.code(f"{st.context.url or ''}{'?' if query else ''}{query}", language=None, wrap_lines=True)


def asked(param: str) -> str | None:
    """Return what the address asked for when the page was opened, the first time; None later.

    Later the page's widgets say what is shown, and the address may lag behind them.
    """
    return st.session_state.get("shell.asked", {}).pop(param, None)


def settle(
    param: str, choices: Collection[str], *, key: str, default: str | None, what: str
) -> None:
    """Give a widget that is not bound the choice the address asks for, or a first one.

    Call it before the widget is drawn, which needs `persist_state="session"` to be as it was left.
    `what` completes "... is no ...".
    """
    wanted = asked(param)
    if wanted is None and st.session_state.get(key) not in choices:  # just arrived at the run
        wanted = st.query_params.get(param)
    if wanted in choices:
        st.session_state[key] = wanted
    elif st.session_state.get(key) not in choices:
        st.session_state[key] = default
    if wanted is not None and wanted not in choices:
        say_stranger(wanted, what=what, shown=st.session_state[key] or "none")


def write(values: Mapping[str, str | None]) -> None:
    """Have the address say what is shown; None takes a name out of it."""
    # A widget of the page that was just left (Pareto's `base`) may hold its name until this run
    # has ended; the next one writes it.
    with contextlib.suppress(StreamlitAPIException):
        for param in [name for name, value in values.items() if value is None]:
            st.query_params.pop(param, None)
        new = {name: value for name, value in values.items() if value is not None}
        if any(st.query_params.get(name) != value for name, value in new.items()):
            st.query_params.update(new)


def correct(key: str, choices: Collection[str], *, what: str, shown: str) -> None:
    """Say which of an address' values under `key` are none of the choices.

    Call it before the widget bound to `key` is drawn: binding clears them and says nothing.
    """
    strangers = [value for value in st.query_params.get_all(key) if value not in choices]
    for value in strangers[:3]:
        say_stranger(value, what=what, shown=shown)
    # A list may only hold what it offers; a deleted run's SAEs are not offered any more.
    kept = st.session_state.get(key)
    if isinstance(kept, list):
        st.session_state[key] = [value for value in kept if value in choices]
    elif kept is not None and kept not in choices and isinstance(kept, str):
        del st.session_state[key]


def say_stranger(value: str, *, what: str, shown: str) -> None:
    """Say that the address asks for what is no `what`, and what is shown in its place."""
    short = value if len(value) <= 80 else f"{value[:80]}…"
    plain(f"The address asks for {short!r}, which is no {what}; showing {shown}.", size=".9rem")
