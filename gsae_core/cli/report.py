"""A finished run in lines of text: one row an SAE, and the number the sweep is for."""

from collections.abc import Mapping, Sequence
from typing import Any

from gsae_core.text import aligned, count, duration, fixed, marked_fvu, percent, worse_than_mean


def evals_table(evals: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return evals.json as a table; loss recovered and alive latents in percent, KL in nats.

    SAEs worse than predicting the mean are named below it.
    """
    head = ["SAE", "latents", "L0", "loss recovered", "KL", "FVU", "gamma", "gate gamma", "alive"]
    rows = [
        [
            row["name"],
            str(row["d_sae"]),
            fixed(row["l0"], 1),
            percent(row["loss_recovered"], 2),
            fixed(row["kl"], 4),
            marked_fvu(row["fvu"], 4),
            fixed(row["gamma"], 3),
            # A ReLU SAE has no gate apart from its output.
            fixed(row["gamma_gate"], 3) if row["architecture"] == "gated" else "–",
            percent(row["alive_fraction"], 1),
        ]
        for row in evals
    ]
    worse = worse_than_mean({row["name"]: row["fvu"] for row in evals})
    return [*aligned([head, *rows]), *([worse] if worse else [])]


def time_spent(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what training took and the language model's share of it; nothing for older runs."""
    last = rows[-1] if rows else {}
    if not last.get("seconds") or "seconds_lm" not in last:
        return []
    seconds = last["seconds"]
    return [
        f"{count(last['tokens'])} tokens in {duration(seconds)}, "
        f"{count(last['tokens'] / seconds)}/s on average; LM share "
        f"{percent(last['seconds_lm'] / seconds, 0)}, SAE share "
        f"{percent(last['seconds_sae'] / seconds, 0)}"
    ]
