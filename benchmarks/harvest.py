"""`bench harvest`: reading activations, ours beside the bare model and TransformerLens."""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.flags import Harvest
from benchmarks.harness import SCRIPTS, Entry, Result, Say, contest, our_entry
from benchmarks.table import Table, machine_facts, rows_of
from gsae_core.config import DataConfig
from gsae_core.errors import InputError
from gsae_core.lm.corpus import load_corpus
from gsae_core.lm.model import load_model
from gsae_core.runs.plan.cost import resolve_device

BARE = "Hugging Face, bare"
OURS = "our harvest"
STREAM = "our stream"
TWO = "our harvest of two sites"
TWO_STREAM = "our stream of two sites"
BRIDGE = "TransformerLens run_with_cache"


def bench_harvest(flags: Harvest, say: Say) -> Table:
    """Return what reading the same tokens costs in every way there is.

    Raises:
        InputError: for flags that cannot be, a model or layer that is not there, too little text.
    """
    flags.check()
    resolve_device(flags.device)
    threads = flags.threads or torch.get_num_threads()
    n_tokens = flags.passes * flags.rows * flags.n_ctx
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.safetensors"
        save_file({"ids": _tokens(flags)}, path)
        job = {
            "tokens_file": str(path),
            "device": flags.device,
            "threads": threads,
            "model": flags.model,
            "layer": flags.layer,
            "rows": flags.rows,
            "batch": flags.rows * flags.n_ctx,
        }
        script = (sys.executable, str(SCRIPTS / "transformer_lens_harvest.py"))
        entries = [
            our_entry(BARE, "bare", job),
            our_entry(OURS, "harvest", job),
            our_entry(STREAM, "stream", job),
            our_entry(TWO, "harvest", job | {"beside": ["mlp_out"]}),
            our_entry(TWO_STREAM, "stream", job | {"beside": ["mlp_out"]}),
            Entry(BRIDGE, script, job, ours=False),
        ]
        outcome = contest(entries, rounds=flags.rounds, warm_up=1, say=say)
    return Table(
        title=f"Reading {n_tokens} activations of resid_post of layer {flags.layer} of "
        f"{flags.model}: {flags.rows} sequences of {flags.n_ctx} tokens a pass, float32",
        settings={
            name: getattr(flags, name)
            for name in ("model", "layer", "n_ctx", "rows", "passes", "rounds")
        },
        unit=BARE,
        rows=rows_of(outcome.results, unit=BARE, n_tokens=n_tokens),
        notes=(
            f"{OURS} and {STREAM} choose their own number of sequences a pass, as in a run; of two "
            "sites they read mlp_out of the layer in the same pass",
            *comparisons({each.name: each for each in outcome.results}),
            *outcome.notes,
        ),
        machine=machine_facts(threads=threads, device=flags.device),
    )


def comparisons(results: Mapping[str, Result]) -> list[str]:
    """Return the sentences that the table is read for."""
    ours = results[OURS]
    said = [f"{OURS}: {results[BARE].ms / ours.ms:.2f}x the throughput of the bare model"]
    bridge = results.get(BRIDGE)
    if bridge is not None:
        said.append(f"{OURS}: {bridge.ms / ours.ms:.2f}x the throughput of TransformerLens")
        if ours.temporary is not None and bridge.temporary:
            said[-1] += f", in {ours.temporary / bridge.temporary:.2f}x its temporary memory"
        if ours.resident is not None and bridge.resident:
            said[-1] += f" ({ours.resident / bridge.resident:.2f}x the whole process)"
    for two, one in ((TWO, OURS), (TWO_STREAM, STREAM)):
        if two in results:
            said.append(f"{two}: {results[two].ms / results[one].ms:.2f}x the time of one site")
    return said


def _tokens(flags: Harvest) -> torch.Tensor:
    """Return the ids (sequences, n_ctx) that everybody reads."""
    model = load_model(flags.model)
    model.check(flags.layer, "resid_post")
    n_rows = flags.passes * flags.rows
    corpus = load_corpus(
        DataConfig(n_ctx=flags.n_ctx),
        model.tokenizer,
        n_tokens=n_rows * flags.n_ctx,
        model_n_ctx=model.n_ctx,
    )
    ids = corpus.train[:n_rows].ids
    if len(ids) < n_rows:
        raise InputError(
            f"--passes: expected no more sequences than the text gives ({len(ids)} of "
            f"{flags.n_ctx} tokens), got {n_rows}; lower --passes or --rows"
        )
    return ids
