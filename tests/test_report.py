"""The table and the headline that end a run."""

from pathlib import Path
from typing import Any

from synthetic import two_places, write_run

from gsae_core.cli.report import evals_table, list_lines, run_report
from gsae_core.runs.evals import measure_again, measured_earlier, positions


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


def test_an_evaluation_says_where_zeros_and_reconstructions_were_read() -> None:
    new = {"zeroed": "all", "replaced": "counted"}
    assert not measured_earlier(new)
    assert positions(new) == (
        "zeros at every position; reconstructions at counted tokens, BOS, separators and padding "
        "as they are"
    )
    assert positions(new | {"replaced": "all"}) == (
        "zeros and reconstructions at every position, BOS, separators and padding included"
    )
    earlier = {"zeroed": "counted", "replaced": "counted"}
    assert measured_earlier(earlier)
    assert positions(earlier) == (
        "zeros and reconstructions at counted tokens alone, BOS, separators and padding as they are"
    )
    assert measure_again("runs/a") == (
        "CE zero and loss recovered were measured by an earlier version, which left BOS, "
        "separators and padding in place when it zeroed the site; they do not compare with those "
        "of other runs. Measure again: python -m gsae_core evaluate runs/a"
    )


def test_a_report_has_a_ratio_for_each_hook_point_and_a_list_the_hook_point(root: Path) -> None:
    run = write_run(root, "both", run_config=two_places())
    ratios = [line for line in run_report(run) if "At equal loss recovered" in line]
    assert [line.partition(": ")[0] for line in ratios] == [
        "blocks.1.hook_resid_post",
        "blocks.3.hook_resid_post",
    ]
    head, titles, first, *_ = list_lines(run.folder)
    assert head.endswith("bundled, blocks.1.hook_resid_post, blocks.3.hook_resid_post")
    assert titles.split()[-1] == "site"
    assert first.split()[-1] == "blocks.1.hook_resid_post"
