"""A run's numbers against a second computation of them, which shares no code with the first."""

import ast
import json
from pathlib import Path
from typing import Any

import independent_evaluation
import pytest
import torch
from families import tiny
from independent_evaluation import NUMBERS, TOLERANCE, measure
from tiny_runs import tiny_config

from gsae_core.config import SITES, EvalConfig, ModelConfig, SAESpec, Site, TrainRecipe
from gsae_core.runs.run import Run
from gsae_core.runs.work.train import evaluate_run, train_run

SCRIPT = Path(independent_evaluation.__file__)
QUICK = ("resid_post",)  # the llama below is read at attn_z


def specs(d_sae: int = 24) -> tuple[SAESpec, ...]:
    kinds: dict[Any, float] = {"gated": 0.3, "relu": 0.3, "jumprelu": 0.01, "topk": 5}
    return tuple(
        SAESpec(name=kind, architecture=kind, d_sae=d_sae, sparsity=value)
        for kind, value in kinds.items()
    )


def run_at(folder: Path, lm: Path, text: Path, site: Site) -> Run:
    """Return a run of all four architectures, trained for 20 steps and evaluated."""
    config = tiny_config(
        lm,
        text,
        model=ModelConfig(name=str(lm), layer=0, site=site),
        saes=specs(),
        train=TrainRecipe(n_tokens=320, batch_size=16, lr=1e-2, lr_warmup_steps=2),
        evaluation=EvalConfig(n_tokens=400),
        checkpoint_minutes=60.0,
    )
    run = Run.create(folder, config)
    list(train_run(run))
    return run


def check(run: Run) -> None:
    found = measure(run.folder)
    assert len(found) == 4 * len(NUMBERS)
    assert [each for each in found if not each.relative <= TOLERANCE] == []
    # Something fires, something is lost, and zeros cost something else.
    assert all(each.here > 0 for each in found if each.number in ("l0", "fvu", "gamma"))
    losses = {each.number: each.here for each in found if each.sae == "gated"}
    assert len({round(losses[name], 3) for name in ("ce_clean", "ce_sae", "ce_zero")}) == 3


@pytest.mark.parametrize(
    "site",
    [site if site in QUICK else pytest.param(site, marks=pytest.mark.slow) for site in SITES],
)
def test_a_run_and_an_independent_script_agree_to_a_millionth(
    site: Site, tiny_lm_folder: Path, small_text: Path, tmp_path: Path
) -> None:
    run = run_at(tmp_path / "run", tiny_lm_folder, small_text, site)
    check(run)
    kept = run.evals()
    list(evaluate_run(run, replace="all"))
    check(run)
    # BOS is read by what follows the site, so that the two choices differ by more than is allowed.
    pairs = zip(kept, run.evals(), strict=True)
    assert max(abs(a["ce_sae"] / b["ce_sae"] - 1) for a, b in pairs) > 100 * TOLERANCE


def test_they_agree_on_a_llama_too(tiny_tokenizer: Any, small_text: Path, tmp_path: Path) -> None:
    lm = tmp_path / "llama"
    tiny("llama").save_pretrained(lm)
    tiny_tokenizer.save_pretrained(lm)
    check(run_at(tmp_path / "run", lm, small_text, "attn_z"))


def test_the_script_uses_nothing_of_gsae_core() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    names = [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert "torch" in names
    assert [name for name in names if name.partition(".")[0] == "gsae_core"] == []


def test_the_command_prints_both_columns_and_fails_where_they_differ(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert independent_evaluation.main([str(finished.folder)]) == 0
    printed = capsys.readouterr().out
    row = finished.evals()[0]
    (line,) = [line for line in printed.splitlines() if line.startswith(f"{row['name']}  ce_zero ")]
    ours, theirs = line.split()[2:4]
    assert ours == f"{row['ce_zero']:.9f}"
    assert float(theirs) == pytest.approx(row["ce_zero"], rel=TOLERANCE)
    assert "largest relative difference" in printed
    path = finished.folder / "evals.json"
    evals = json.loads(path.read_text(encoding="utf-8"))
    evals["saes"][0]["ce_zero"] *= 1 + 1e-5
    path.write_text(json.dumps(evals), encoding="utf-8")
    assert independent_evaluation.main([str(finished.folder)]) == 1
    assert f"ce_zero of {row['name']}" in capsys.readouterr().out.splitlines()[-1]


def test_losses_of_a_model_that_is_sure_are_not_biased() -> None:
    from gsae_core.analysis.fidelity import Reference

    # float32 log_softmax over so many tokens is 3e-6 nats too high on this machine's kind of CPU.
    logits = 4 * torch.randn(1, 65, 50_000, generator=torch.Generator().manual_seed(0))
    logits[..., 7] += 26
    ids, mask = torch.full((1, 65), 7), torch.ones(1, 65, dtype=torch.bool)
    reference = Reference(logits, ids, mask)
    exact = logits.double()
    wanted = float((exact.logsumexp(-1) - exact[..., 7])[0, :64].mean())
    assert float(reference.losses.mean()) == pytest.approx(wanted, abs=2e-7)
    other = logits.clone()
    other[..., 9] += 30
    ce, _ = reference.compare(other)
    wanted = float((other.double().logsumexp(-1) - exact[..., 7])[0, :64].mean())
    assert float(ce.mean()) == pytest.approx(wanted, rel=1e-7)
