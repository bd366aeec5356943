"""The table and the headline that end a run."""

from typing import Any

from gsae_core.report import evals_table


def row(name: str, l0: float, loss_recovered: float | None, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "architecture": name.partition("-")[0],
        "d_sae": 1024,
        "l0": l0,
        "loss_recovered": loss_recovered,
        "kl": 0.01234,
        "fvu": 0.05,
        "gamma": 0.8,
        "gamma_gate": 0.99,
        "alive_fraction": 0.5,
    } | more


def test_the_table_lines_up_and_rounds() -> None:
    lines = evals_table([row("gated-0.1", 9.96, 0.98765), row("relu-0.1", 123.4, None)])
    assert lines == [
        "SAE        latents     L0  loss recovered      KL     FVU  gamma  gate gamma   alive",
        "gated-0.1     1024   10.0         98.77 %  0.0123  0.0500  0.800       0.990  50.0 %",
        "relu-0.1      1024  123.4               –  0.0123  0.0500  0.800           –  50.0 %",
    ]
