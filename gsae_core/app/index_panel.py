"""Building the index of an SAE from its page: started as a process, watched, ended."""

import streamlit as st

from gsae_core.analysis.features.files import N_BINS, N_NEIGHBOURS
from gsae_core.app import cache
from gsae_core.app.parts import attempt, job_panel, job_trouble, notice
from gsae_core.errors import InputError
from gsae_core.files import readable
from gsae_core.runs.jobs.job import Job
from gsae_core.runs.run import Run
from gsae_core.runs.work.index import N_TOKENS, index_job, start_index
from gsae_core.text import count, duration

AMOUNTS = [100_000, 300_000, N_TOKENS, 3_000_000]
EVERY = 1.0


def panel(run: Run, names: list[str], *, problem: str) -> None:
    """Offer to build the indices of some SAEs, or show how far that is.

    Args:
        names: of the SAE that is shown, and of the one beside it if that has none either.
        problem: why an index that is there cannot be used; empty: there is none.
    """
    if problem:
        notice(problem, kind="warning", title="The feature index cannot be used")
    moving = any(_expects(run, name) for name in names)

    def watched() -> None:
        if moving != any(_expects(run, name) for name in names):
            st.rerun()  # the index is there, or its building has ended
        for name in names:
            job = _job(run, name)
            if job is not None and job.status.expects_process:
                with st.container(border=True):
                    key = f"features.cancel_{name}"
                    job_panel(job, job.status, name=f"Index of {name}", key=key)

    if moving:
        st.fragment(watched, run_every=EVERY)()
        return
    again = "Building it again continues from its last shard."
    for name in names:
        if (job := _job(run, name)) is not None:
            job_trouble(job, job.status, name=f"Building the index of {name}", again=again)
    _offer(run, names)


def _expects(run: Run, name: str) -> bool:
    job = _job(run, name)
    return job is not None and job.status.expects_process


def _job(run: Run, name: str) -> Job | None:
    try:
        job = index_job(run, name)
        if job is not None:
            _ = job.status
    except InputError:
        return None  # its folder went meanwhile
    return job


def _offer(run: Run, names: list[str]) -> None:
    with st.container(border=True):
        st.subheader("Index this SAE to see its top examples.", anchor=False)
        with st.container(horizontal=True, vertical_alignment="bottom"):
            amount = st.segmented_control(
                "Tokens to read",
                [count(n) for n in AMOUNTS],
                default=count(N_TOKENS),
                required=True,
                key="features.amount",
            )
            n_tokens = next((n for n in AMOUNTS if count(n) == amount), N_TOKENS)
            st.button(
                f"Build the index ({_cost(run, names, n_tokens)})",
                type="primary",
                icon=":material/build:",
                key="features.build",
                on_click=_start,
                args=(run, names, n_tokens),
            )
        if len(names) > 1:
            st.caption(f"Of {' and '.join(names)}, over the same tokens.")


def _cost(run: Run, names: list[str], n_tokens: int) -> str:
    costs = [_seconds_and_bytes(run, name, n_tokens) for name in names]
    room = readable(sum(n_bytes for _, n_bytes in costs))
    times = [seconds for seconds, _ in costs if seconds is not None]
    return f"≈ {duration(sum(times))}, {room}" if len(times) == len(costs) else f"≈ {room}"


def _seconds_and_bytes(run: Run, name: str, n_tokens: int) -> tuple[float | None, int]:
    """Return about how many seconds and bytes an index over so many tokens takes.

    Seconds are None where the run did not measure how fast its model is. They are those of the
    model's passes in training, and of each SAE's step a third, which is about what encoding is of
    it. Bytes are 10 a firing and 11 a token, and the tables.
    """
    spec = next(spec for spec in run.config.saes if spec.name == name)
    evals = cache.evaluations(run)
    found = next((row for row in evals.to_dict("records") if row["name"] == name), {})
    l0, d_in = float(found.get("l0", 50.0)), int(found.get("d_in", 512))
    tables = spec.d_sae * (4 * d_in + 4 * N_BINS + 16 * N_NEIGHBOURS + 400)
    n_bytes = round(n_tokens * (10 * l0 + 11) + tables)
    rows = cache.recent_metrics(run)
    if not rows or not rows[-1].get("tokens") or "seconds_lm" not in rows[-1]:
        return None, n_bytes
    last = rows[-1]
    model = last["seconds_lm"] / last["tokens"]
    step = (last["seconds"] - last["seconds_lm"]) / last["tokens"] / len(run.config.saes)
    return 5 + n_tokens * (model + step / 3), n_bytes


def _start(run: Run, names: list[str], n_tokens: int) -> None:
    def act() -> None:
        for name in names:
            start_index(run, name, n_tokens=n_tokens, split="mixed")

    attempt(act, "Nothing was started")
