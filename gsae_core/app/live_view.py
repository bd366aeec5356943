"""Parts of the Live page: state and progress of a run, its stages, a sample of its features."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from gsae_core.analysis.features.export import Row, strips
from gsae_core.app.parts import PAGE_TEMPLATE, figure_tools, job_share, job_trouble, noticed, since
from gsae_core.runs.jobs.job import Status
from gsae_core.runs.jobs.worker import waiting_runs
from gsae_core.runs.plan.progress import RECENT, Speed, timeline
from gsae_core.runs.run import Run
from gsae_core.text import (
    WORDS,
    count,
    duration,
    explained_variance,
    fixed,
    macros,
    marked_fvu,
    percent,
)

MARKS = {"done": ("✓", "#009E73"), "now": ("●", "#0072B2"), "stopped": ("✕", "#D55E00")}
CANCEL_STAGES = {
    "requested": "the process was asked to finish its step and save",
    "terminating": "the process did not respond within 10 s and was told to end",
    "killing": "the process did not end within 20 s and is being killed",
}


def draw_timeline(run: Run, status: Status) -> None:
    """Show the stages of a run with their lengths."""
    if run.n_lost_events(status):
        st.caption("Stage times are not known: part of events.jsonl is lost.")
        return
    rows = [
        (
            phase,
            "" if phase.seconds is None else f" {duration(phase.seconds)}",
            *MARKS.get(phase.mark, ("○", "currentColor")),
        )
        for phase in timeline(run.events(), status, now=time.time())
    ]
    st.html(macros(PAGE_TEMPLATE).phases(rows))


def draw_progress(run: Run, status: Status, now: Speed, *, eta: bool = False) -> None:
    """Show the bar of the present stage, in numbers too; with `eta`, how long training takes."""
    if status.state == "queued":
        waiting = waiting_runs(run.folder.parent)
        place = f"; position {waiting.index(run.id) + 1} in the queue" if run.id in waiting else ""
        waits = f"waits until its device is free{place}"
        st.progress(0.0, text="not started yet" if status.pid is None else waits)
    elif status.stage == "evaluating" and status.state in ("running", "cancelling"):
        unit = run.config.unit
        text = f"evaluating: {status.done:,} of {status.total:,} held-out {unit}s"
        if 0 < status.total < (asked := run.config.evaluation.n_tokens):
            whose = "text" if unit == "token" else "folder"
            text += f"; {asked:,} were requested, the {whose} has no more"
        st.progress(job_share(status), text=text)
    else:
        text = f"step {status.step:,} of {status.n_steps:,}"
        if status.state == "starting":
            text += f"; {WORDS[run.config.unit].loading}"
        if eta and now.seconds_left is not None:
            text += f" · about {duration(now.seconds_left)} left"
        st.progress(now.share, text=text)


def draw_numbers(status: Status, now: Speed, *, tokens: int, moving: bool, unit: str) -> None:
    """Show how far and how fast; `unit`: what the run counts."""
    of, bos = WORDS[unit].source, ", BOS left out" * (unit == "token")
    speed = "–" if now.tokens_per_second is None else f"{count(now.tokens_per_second)}/s"
    left = now.seconds_left if status.stage != "evaluating" else None
    last = since(status.heartbeat)
    numbers = [
        (f"{unit.capitalize()}s seen", count(tokens), f"Activation vectors trained on{bos}."),
        (
            "Recent speed",
            speed,
            f"{unit.capitalize()}s a second over the last {RECENT} logged steps{bos}. The line "
            "that the terminal prints at the end has the average over the whole run.",
        ),
        (
            f"Time in {of}",
            percent(now.lm_share, 0),
            f"Share of training time spent in the {of}. The SAEs' steps took "
            f"{percent(now.sae_share, 0)}; files, logs and samples of features took the rest.",
        ),
        (
            "Time left",
            "–" if left is None else duration(left),
            "Training steps left at this speed; evaluation comes after.",
        ),
        (
            "Last update",
            last.removesuffix(" ago"),  # in a narrow window there is no room for it
            "How long ago the training process last wrote its status.",
        ),
    ]
    if not moving:
        numbers[3:] = [("Ended", last, "When the training process last wrote its status.")]
    for cell, (label, value, about) in zip(st.columns(len(numbers)), numbers, strict=True):
        cell.metric(label, value, help=about)


def draw_trouble(run: Run, status: Status) -> None:
    """Say why a run stopped early, what its log says, and what to change."""
    who = [e.get("by") for e in run.events() if e["event"] == "cancel requested"]
    name = who[-1] if who else ""
    by = " by you" if name == "app" else f" by {name}" if name else ""
    stopped = f"Cancelled{by} at step {status.step:,} of {status.n_steps:,}."
    again = "Resume continues from the last saved state."
    job_trouble(run, status, name="The run", again=again, cancelled=stopped, n_lines=30)


@noticed("The sample of features cannot be read")
def draw_samples(run: Run, names: Sequence[str]) -> None:
    """Show a few features of one SAE and where they fire."""
    samples, unit = run.samples(), run.config.unit
    known = [name for name in names if samples and name in samples["saes"]]
    if samples is None or not known:
        st.caption("The first sample of features is taken a few steps into training.")
        return
    if st.session_state.get("feat") not in known:
        st.session_state["feat"] = known[0]
    name = st.selectbox("SAE", known, key="feat", bind="query-params")
    st.caption(
        f"On {samples['n_tokens']:,} held-out {unit}s after step {samples['step']:,}; taken every "
        f"{samples['every']:,} steps. Drawn at random among the "
        f"{samples['saes'][name]['alive']:,} features that fired, and the two densest."
    )
    latents = samples["saes"][name]["latents"]
    if not latents:
        st.caption(f"No feature fired on these {unit}s.")
        return
    st.html("".join(_latent(latent, samples["n_tokens"], unit) for latent in latents))
    figure_tools(lambda: _sample_table(latents), name=f"features-{name}")


def _latent(latent: Mapping[str, Any], n_tokens: int, unit: str) -> str:
    top = max((max(e["values"]) for e in latent["examples"]), default=0.0)
    rows = [
        Row(e["tokens"], e["values"], e["at"], f"{e['values'][e['at']]:.3g}")
        for e in latent["examples"]
    ]
    how = {"densest": "fires most", "random": "drawn at random"}.get(latent["chosen"], "")
    often = f"{latent['fired']:,} of {n_tokens:,} {unit}s"
    about = f"{how} · {often} ({percent(latent['fired'] / n_tokens, 2)})"
    return macros(PAGE_TEMPLATE).sample(int(latent["latent"]), about, strips(rows, top=top))


def _sample_table(latents: Sequence[Mapping[str, Any]]) -> Any:
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "feature": latent["latent"],
                "chosen": latent["chosen"],
                "fired": latent["fired"],
                "activation": example["values"][example["at"]],
                "token": example["tokens"][example["at"]],
                "context": "".join(example["tokens"]),
            }
            for latent in latents
            for example in latent["examples"]
        ]
    )


def latest_values(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the latest values of each SAE as a table's rows."""
    return [
        {
            "SAE": name,
            "L0": fixed(row.get("l0"), 1),
            "FVU": marked_fvu(row.get("fvu")),
            "explained variance": percent(explained_variance(row.get("fvu")), 2),
            "γ": fixed(row.get("gamma"), 3),
            "γ gate path": fixed(row.get("gamma_gate"), 3),
            "loss": fixed(row.get("loss"), 4),
            "gate-dead": percent(row.get("dead_gate"), 1),
            "magnitude-dead": percent(row.get("dead_magnitude"), 1),
        }
        for name, row in rows.items()
    ]
