"""`bench step`: one training step, ours and everybody's, from the same weights at the same L0."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.flags import Step
from benchmarks.harness import Entry, Result, Say, contest, found, our_entry, peer_entry
from benchmarks.ours import make_problem, save_problem
from benchmarks.table import Table, machine_facts, rows_of
from gsae_core.files import readable
from gsae_core.runs.plan.cost import free_memory, resolve_device

PRODUCT = "encoder product"
OURS = "our step"
# (batch, d_sae) matrices that a dense step holds at once, at most: SAELens' 13 and room for one.
DENSE_MATRICES = 14
# Of the memory that is free, what a peer may take: it shares the machine with our processes.
SHARE = 0.6
# The trainer takes its first step dense, knowing no density yet.
WARM_UP = 2


def bench_step(flags: Step, say: Say) -> Table:
    """Return what a step costs in every way there is.

    Raises:
        InputError: for flags that cannot be, a device that is not there, or too little memory.
    """
    flags.check()
    resolve_device(flags.device)
    threads = flags.threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.safetensors"
        problem = make_problem(batch=flags.batch, d_in=flags.d_in, d_sae=flags.d_sae, l0=flags.l0)
        save_problem(problem, path)
        del problem
        job = {
            "problem": str(path),
            "device": flags.device,
            "threads": threads,
            "saes": flags.saes,
            "l0": flags.l0,
        }
        entries, notes = _entries(flags, job)
        outcome = contest(entries, rounds=flags.rounds, warm_up=WARM_UP, say=say)
    each = ""
    if flags.saes > 1:
        each = f"; {flags.saes} SAEs"
        notes.append(f"{OURS}: time for each of {flags.saes} SAEs that learn at once; others: one")
    results = [per_sae(result, flags.saes) for result in outcome.results]
    return Table(
        title=f"One training step, Gated where not said otherwise: batch {flags.batch}, "
        f"d_in {flags.d_in}, d_sae {flags.d_sae}, L0 {flags.l0:g}, float32{each}",
        settings={
            name: getattr(flags, name)
            for name in ("batch", "d_in", "d_sae", "l0", "saes", "rounds", "no_peers")
        },
        unit=PRODUCT,
        rows=rows_of(results, unit=PRODUCT),
        notes=(*notes, *outcome.notes),
        machine=machine_facts(threads=threads, device=flags.device),
    )


def per_sae(result: Result, n_saes: int) -> Result:
    """Return our step's time for each SAE; what the others do, they do for one SAE."""
    if result.name != OURS:
        return result
    return result._replace(rounds=tuple(ms / n_saes for ms in result.rounds))


def _entries(flags: Step, job: dict[str, Any]) -> tuple[list[Entry], list[str]]:
    """Return who takes part, and a sentence about who does not."""
    entries = [our_entry(PRODUCT, "product", job), our_entry(OURS, "whole step", job)]
    if flags.saes == 1 and not flags.brief:
        entries += _variants(flags, job)
    if flags.saes == 1:
        entries.append(our_entry("gradients alone: sparse", "sparse", job))
        entries.append(our_entry("gradients alone: dense by hand", "dense by hand", job))
    need = 4 * DENSE_MATRICES * flags.batch * flags.d_sae
    if need > SHARE * free_memory(torch.device(flags.device)):
        names = "autograd" if flags.no_peers else "autograd and the peers"
        return entries, [f"{names} not measured: each takes about {readable(need)}"]
    if flags.saes == 1:
        entries.append(our_entry("gradients alone: autograd", "autograd", job))
    if flags.saes == 1 and not flags.brief:
        half = "gradients alone, half the latents active"
        for way in ("dense by hand", "autograd"):
            entries.append(our_entry(f"{half}: {way}", way, job | {"half": True}))
    if flags.no_peers:
        return entries, []
    there, notes = found(flags.peers, ("saelens", "dictionary_learning"))
    names = {
        "saelens": "SAELens SAETrainer.step",
        "dictionary_learning": "dictionary_learning update",
    }
    for peer in there:
        entries.append(peer_entry(names[peer], peer, f"{peer}_step.py", job, folder=flags.peers))
    return entries, notes


def _variants(flags: Step, job: dict[str, Any]) -> list[Entry]:
    """Return our step with the screened encode, and of the other architectures."""
    variants = {"screened encode": {"screened": True}} if flags.device == "cpu" else {}
    variants |= {"JumpReLU": {"architecture": "jumprelu"}, "TopK": {"architecture": "topk"}}
    return [
        our_entry(f"{OURS}, {name}", "whole step", job | settings)
        for name, settings in variants.items()
    ]
