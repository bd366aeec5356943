"""A run's SAE -> its feature index: what an index process runs, and its files tell."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from gsae_core.analysis import index_build
from gsae_core.analysis.index_files import weights_sha256
from gsae_core.analysis.index_plan import Part
from gsae_core.lm.corpus import Corpus, SequenceSet, load_corpus
from gsae_core.machine import slot_of
from gsae_core.store.checkpoint import load_sae
from gsae_core.store.index_jobs import IndexSplit, Request, prepare, request
from gsae_core.store.runs import Run
from gsae_core.store.worker import Worker
from gsae_core.workshop import check_held_out, load_lm

Stage = Literal["waiting", "loading", "indexing", "sorting", "describing", "finished", "cancelled"]


class Progress(NamedTuple):
    """How far an index is: runs ahead of it, tokens read, features sorted and described."""

    stage: Stage
    done: int
    total: int


def index_run(
    run: Run, name: str, *, n_tokens: int | None = None, split: IndexSplit | None = None
) -> Iterator[Progress]:
    """Build the feature index of one SAE of a run, from where it stands, and yield progress.

    Waits for the device like a run. A request to stop ends it after the shard, in state
    `cancelled`; started again with the same numbers it goes on.

    Args:
        name: of the SAE, whose weights are saved.
        n_tokens: counted tokens to read; None: as asked for last, or a million.
        split: of the text; None: as asked for last, or half held out, half trained on.

    Raises:
        InputError: while iterating, for what a person can mend; status.json then says it too.
    """
    job = prepare(run, name, n_tokens=n_tokens, split=split)
    with Worker(job) as worker:
        for ahead in worker.turn(slot_of(run.config.device), of=run.folder):
            yield Progress("waiting", 0, ahead)
        if not worker.stop_requested:
            worker.enter("loading", total=0)
            yield Progress("loading", 0, 0)
            stage = "loading"
            for progress in _build(run, name, request(job)):
                if progress.stage != stage:
                    stage = progress.stage
                    worker.enter(progress.stage, total=progress.total)
                worker.done = progress.done
                if worker.stop_requested and progress.done != progress.total:
                    break
                yield Progress(*progress)
            else:
                yield Progress("finished", 1, 1)
                return
        worker.outcome = "cancelled"
        yield Progress("cancelled", 0, 0)


def _build(run: Run, name: str, asked: Request) -> Iterator[index_build.Progress]:
    cfg, sae_folder = run.config, run.sae_folder(name)
    sae = load_sae(sae_folder)
    model = load_lm(cfg)
    corpus = load_corpus(
        cfg.data,
        model.tokenizer,
        n_tokens=asked.n_tokens,
        model_n_ctx=model.n_ctx,
        n_held_out=_n_held_out(asked.n_tokens, asked.split),
    )
    check_held_out(run, corpus, part=True)
    return index_build.build_index(
        model,
        sae.to(model.device),
        choose_parts(corpus, asked.n_tokens, asked.split),
        run.folder / "features" / name,
        layer=cfg.model.layer,
        site=cfg.model.site,
        name=name,
        text=corpus.name,
        weights_sha256=weights_sha256(sae_folder),
        revision=cfg.model.revision,
        n_tokens_asked=asked.n_tokens,
        shortage=corpus.shortage if asked.split == "held_out" else "the text has no more",
    )


def _n_held_out(n_tokens: int, split: IndexSplit) -> int:
    """Return how many held-out tokens an index is asked to read."""
    return {"held_out": n_tokens, "mixed": -(-n_tokens // 2), "train": 0}[split]


def choose_parts(corpus: Corpus, n_tokens: int, split: IndexSplit) -> Sequence[Part]:
    """Return the sequences to read: whole ones, from the start of each split.

    `mixed` takes half the tokens from the held-out split, or as many as it has, and the rest from
    the training split.
    """
    parts = []
    left = n_tokens
    if split != "train":
        parts.append(_first(corpus.held_out, "held_out", _n_held_out(n_tokens, split)))
        left -= int(corpus.held_out.counts[: parts[0].n].sum())
    if split != "held_out" and left > 0:
        parts.append(_first(corpus.train, "train", left))
    return parts


def _first(sequences: SequenceSet, split: str, n_tokens: int) -> Part:
    """Return the sequences up to and including the one in which token `n_tokens` is counted."""
    ends = np.cumsum(sequences.counts)
    return Part(split, sequences, min(int(np.searchsorted(ends, n_tokens)) + 1, len(sequences)))
