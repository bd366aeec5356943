"""`bench index`: a feature index, beside reading and encoding alone and SAEDashboard."""

import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.flags import Index
from benchmarks.harness import Entry, Result, Say, contest, found, our_entry, peer_entry
from benchmarks.table import Table, machine_facts, rows_of
from gsae_core.checkpoints.checkpoint import save_sae
from gsae_core.config import DataConfig
from gsae_core.errors import InputError
from gsae_core.files import readable
from gsae_core.lm.corpus import load_corpus
from gsae_core.lm.model import LanguageModel, load_model
from gsae_core.runs.plan.cost import resolve_device
from gsae_core.sae.architectures import GatedSAE

ALONE = "harvest and encode"
OURS = "our index"
SAEDASHBOARD = "SAEDashboard, a slice"
SAMPLE_ROWS = 32
"""Sequences whose activations set the gates."""


def bench_index(flags: Index, say: Say) -> Table:
    """Return what a feature index costs, in every way there is.

    Raises:
        InputError: for flags that cannot be, a layer that is not there, too little text.
    """
    flags.check()
    resolve_device(flags.device)
    threads = flags.threads or torch.get_num_threads()
    model = load_model("bundled")
    ids = _tokens(flags, model)
    with tempfile.TemporaryDirectory() as folder:
        save_file({"ids": ids}, Path(folder) / "tokens.safetensors")
        _save_problem(flags, model, ids, Path(folder) / "sae")
        del model
        job = {
            "tokens_file": str(Path(folder) / "tokens.safetensors"),
            "sae_folder": str(Path(folder) / "sae"),
            "model": "bundled",
            "model_folder": str(resources.files("gsae_core") / "assets" / "stdlib-gpt2"),
            "layer": flags.layer,
            "device": flags.device,
            "threads": threads,
            "slice": flags.slice,
            "cache": str(Path(folder) / "cache"),
        }
        entries = [our_entry(ALONE, ALONE, job), our_entry(OURS, "index", job)]
        notes: list[str] = []
        if not flags.no_peers:
            there, notes = found(flags.peers, ("saedashboard",))
            entries += _peers(there, job, flags)
        outcome = contest(entries, rounds=flags.rounds, warm_up=1, say=say)
    results = {result.name: result for result in outcome.results}
    return Table(
        title=f"A feature index over {ids.numel()} tokens of resid_post of layer {flags.layer} of "
        f"the bundled model: {flags.width} latents at L0 {flags.l0:g}, float32",
        settings={
            name: getattr(flags, name)
            for name in ("width", "tokens", "l0", "layer", "slice", "rounds")
        },
        unit=ALONE,
        rows=rows_of(outcome.results, unit=ALONE, n_tokens=ids.numel()),
        notes=(*notes, *comparisons(results, flags), *outcome.notes),
        machine=machine_facts(threads=threads, device=flags.device),
    )


def comparisons(results: Mapping[str, Result], flags: Index) -> list[str]:
    """Return the sentences that the table is read for."""
    ours, alone = results[OURS], results[ALONE]
    # On a machine that others use as well, time on the clock says who else was there.
    share = alone.facts["processor_s"] / ours.facts["processor_s"]
    said = [
        f"{OURS}: {alone.ms / ours.ms:.2f}x the throughput of reading and encoding alone "
        f"({share:.2f}x by processor time of the last round), "
        f"{readable(ours.facts['disk_bytes'])} on disk"
    ]
    theirs = results.get(SAEDASHBOARD)
    if theirs is not None:
        slices = flags.width / flags.slice
        said.append(
            f"SAEDashboard: {theirs.ms / 1e3:.1f} s for {flags.slice} features from activations "
            f"cached before; all {flags.width}, counted as {slices:g} times that, take "
            f"{slices * theirs.ms / ours.ms:.1f}x as long as {OURS}"
        )
    return said


def _peers(there: list, job: dict, flags: Index) -> list[Entry]:
    return [
        peer_entry(SAEDASHBOARD, peer, "saedashboard_index.py", job, folder=flags.peers)
        for peer in there
    ]


def _tokens(flags: Index, model: LanguageModel) -> torch.Tensor:
    """Return ids (sequences, n_ctx) that everybody reads, all of them counted."""
    model.check(flags.layer, "resid_post")
    corpus = load_corpus(
        DataConfig(bos="never"), model.tokenizer, n_tokens=flags.tokens, model_n_ctx=model.n_ctx
    )
    n_rows = -(-flags.tokens // corpus.n_ctx)
    ids = corpus.train[:n_rows].ids
    if len(ids) < n_rows:
        raise InputError(
            f"--tokens: expected no more than the text gives ({ids.numel()}), got {flags.tokens}"
        )
    return ids


@torch.no_grad()
def _save_problem(flags: Index, model: LanguageModel, ids: torch.Tensor, folder: Path) -> None:
    """Save a Gated SAE of random directions whose gates are open at the rate asked for."""
    # Evenly spread: the beginning of a text is of one kind, and L0 came out half as large again.
    which = torch.linspace(0, len(ids) - 1, min(SAMPLE_ROWS, len(ids))).long()
    x = model.harvest(ids[which], layer=flags.layer, site="resid_post").flatten(0, 1)
    sae = GatedSAE(x.shape[1], flags.width)
    sae.b_dec.copy_(x.mean(0))
    rate = flags.l0 / flags.width
    n_open = max(1, round(rate * len(x)))
    for latents in torch.arange(flags.width).split(2048):
        h = (x - sae.b_dec) @ sae.W_gate[:, latents]
        bias = -h.topk(n_open + 1, dim=0).values[-1]
        sae.b_gate[latents], sae.b_mag[latents] = bias, bias
    metadata = {"model_name": "bundled", "hook_name": f"blocks.{flags.layer}.hook_resid_post"}
    save_sae(sae, folder, metadata=metadata)
