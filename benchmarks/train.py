"""`bench train`: whole runs on the bundled model, ours and SAELens' own runner."""

import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.flags import Train
from benchmarks.harness import Entry, Result, Say, contest, found, our_entry, peer_entry
from benchmarks.table import Table, machine_facts, rows_of
from gsae_core.config import EvalConfig, ModelConfig, RunConfig, SAESpec, TrainRecipe
from gsae_core.lm.model import LanguageModel
from gsae_core.runs.plan.cost import resolve_device
from gsae_core.runs.work.setup import load_lm, load_text

OURS = "our run"
SAELENS = "SAELens runner"
LR, WARM_UP_STEPS = 1e-3, 20


def sweep_name(n: int) -> str:
    return f"our sweep of {n}"


def bench_train(flags: Train, say: Say) -> Table:
    """Return what whole runs cost: model, activations, steps, log and saved weights.

    Raises:
        InputError: for flags that cannot be, or a layer that is not there.
    """
    flags.check()
    resolve_device(flags.device)
    threads = flags.threads or torch.get_num_threads()
    config = run_config(flags, n_saes=1)
    say("tokenising")
    model = load_lm(config)
    with tempfile.TemporaryDirectory() as folder:
        entries, notes = _entries(flags, model, threads=threads, folder=Path(folder))
        del model
        outcome = contest(entries, rounds=flags.rounds, warm_up=0, say=say, weigh=False)
    results = {result.name: result for result in outcome.results}
    return Table(
        title=f"Whole runs: {flags.tokens} activations of {config.model.hook_name} of the bundled "
        f"model, {flags.width} latents, batch {flags.batch}, float32",
        settings={
            name: getattr(flags, name)
            for name in ("width", "tokens", "batch", "layer", "sparsity", "saes", "rounds")
        },
        unit=OURS,
        rows=rows_of(outcome.results, unit=OURS, n_tokens=flags.tokens),
        notes=(*notes, *comparisons(results, flags.saes), *outcome.notes),
        machine=machine_facts(threads=threads, device=flags.device),
    )


def comparisons(results: Mapping[str, Result], n_saes: int) -> list[str]:
    """Return the sentences that the table is read for."""
    saelens, sweep = results.get(SAELENS), results[sweep_name(n_saes)]
    if saelens is None:
        return []
    return [
        f"SAELens' runner takes {saelens.ms / results[OURS].ms:.2f}x as long as our run",
        f"{n_saes} SAELens runs, counted as {n_saes} times the one measured, take "
        f"{n_saes * saelens.ms / sweep.ms:.2f}x as long as our sweep of {n_saes}",
    ]


def run_config(flags: Train, *, n_saes: int) -> RunConfig:
    """Return our run: lambdas a factor 4 apart at most, centred on the one asked for."""
    exponents = [2 * i / (n_saes - 1) - 1 if n_saes > 1 else 0.0 for i in range(n_saes)]
    specs = tuple(
        SAESpec(
            name=f"gated-{i}",
            architecture="gated",
            d_sae=flags.width,
            sparsity=flags.sparsity * 2**exponent,
        )
        for i, exponent in enumerate(exponents)
    )
    return RunConfig(
        model=ModelConfig(layer=flags.layer),
        saes=specs,
        train=TrainRecipe(
            n_tokens=flags.tokens,
            batch_size=flags.batch,
            lr=LR,
            lr_warmup_steps=WARM_UP_STEPS,
            lr_decay_fraction=0.0,
            sparsity_warmup_steps=WARM_UP_STEPS,
            revive_every=0,  # SAELens revives nothing for Gated SAEs
        ),
        # The runner measures nothing on held-out tokens; one batch of them is as little as we can.
        evaluation=EvalConfig(n_tokens=1),
        device=flags.device,
    )


def _entries(
    flags: Train, model: LanguageModel, *, threads: int, folder: Path
) -> tuple[list[Entry], list[str]]:
    def ours(name: str, n_saes: int) -> Entry:
        config = run_config(flags, n_saes=n_saes).model_dump_json()
        return our_entry(name, "train", job | {"config": config})

    job: dict[str, Any] = {"device": flags.device, "threads": threads}
    entries = [ours(OURS, 1), ours(sweep_name(flags.saes), flags.saes)]
    # Also fills the token cache, so that no run tokenises.
    sequences = load_text(run_config(flags, n_saes=1), model).train
    there, notes = ([], []) if flags.no_peers else found(flags.peers, ("saelens",))
    if there:
        path = folder / "tokens.safetensors"
        save_file({"ids": sequences[:].ids}, path)
        job |= {
            "tokens_file": str(path),
            "model_folder": str(resources.files("gsae_core").joinpath("assets/stdlib-gpt2")),
            "layer": flags.layer,
            "d_in": model.d_model,
            "d_sae": flags.width,
            "n_tokens": flags.tokens,
            "batch": flags.batch,
            "sparsity": flags.sparsity,
            "lr": LR,
            "warm_up_steps": WARM_UP_STEPS,
        }
        entries.append(peer_entry(SAELENS, "saelens", "saelens_train.py", job, folder=flags.peers))
    return entries, notes
