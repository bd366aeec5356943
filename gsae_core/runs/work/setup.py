"""The parts of a run, made from its config: model, text, stream of activations, SAEs, trainer."""

import copy
import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gsae_core.checkpoints.checkpoint import load_sae, save_sae
from gsae_core.config import (
    NO_MODEL,
    NO_PLACE,
    OF_ANY_TEXT,
    DataConfig,
    Place,
    RunConfig,
    SAESpec,
    TrainConfig,
    validated,
)
from gsae_core.errors import InputError
from gsae_core.files import free_bytes, read_json, readable
from gsae_core.lm.corpus import Corpus, SequenceSet, load_corpus
from gsae_core.lm.harvest import Harvest, open_cache
from gsae_core.lm.model import LanguageModel, load_model
from gsae_core.lm.stream import ActivationStream, default_chunk_vectors
from gsae_core.lm.vectors import StoredHarvest, VectorSource
from gsae_core.norms import longer
from gsae_core.runs.outliers import outliers_met
from gsae_core.runs.plan.cost import check_memory, device_here, resolve_device, state_bytes
from gsae_core.runs.run import Run, read_added
from gsae_core.runs.work.sequences import SequenceStream, sequences_at_once
from gsae_core.sae.architectures import build_sae, fold_scale_
from gsae_core.sae.base import SAE, check_width
from gsae_core.sae.jumprelu import JumpReluSAE
from gsae_core.sae.topk import TopKSAE
from gsae_core.text import WORDS
from gsae_core.training.end_to_end import Batch
from gsae_core.training.optimizer import Sparsity, sparsity_in_training_units
from gsae_core.training.start import N_VECTORS, start_
from gsae_core.training.trainer import Trainer

# The command line says its warnings.
log: logging.Logger = logging.getLogger(__name__)


class RunSetup(NamedTuple):
    """Everything a run works with, made from its config."""

    model: LanguageModel | VectorSource
    corpus: Corpus
    stream: ActivationStream
    trainer: Trainer
    sparsity: list[Sparsity]
    stopped: dict[str, str]
    """Why each SAE that stopped learning did, by name; grows while training."""
    later: tuple[ActivationStream, ...] = ()
    """Of each stage that training was extended by; `stream` is the first stage's."""

    @property
    def seconds(self) -> float:
        """Seconds that harvesting took so far."""
        return self.stream.seconds + sum(stream.seconds for stream in self.later)

    def batches(self, start: int) -> Iterator[tuple[Batch, ...]]:
        """Yield the batches of each place from `start` on, stage after stage, as the loss asks."""
        for stream in (self.stream, *self.later):
            yield from stream.batches_of_each(start)
            start = max(0, start - stream.n_batches)


def learning(run: Run) -> Run:
    """Return a run with those of its SAEs that are yet to learn, where they were added to it."""
    if (added := read_added(run)) is None:
        return run
    saes = tuple(spec for spec in run.config.saes if spec.name in added.saes)
    return dataclasses.replace(run, config=run.config.model_copy(update={"saes": saes}))


def state_folder(run: Run) -> Path:
    """Return where the resumable state of what learns now is kept."""
    return run.folder / ("resume" if read_added(run) is None else "extend")


def set_up(run: Run, *, beside: Sequence[Place] = ()) -> RunSetup:
    """Return the parts of a run, none of which has begun; refuse too little memory or disk.

    `beside`: places of SAEs that do not learn now, but with which they share a run.
    """
    cfg, before = run.config, _last_set_up(run)
    model = load_source(cfg)
    if before and before["device"].partition(":")[0] != model.device.type:
        log.warning(
            f"the run was set up on {before['device']} before and goes on on {model.device}: the "
            "same data in the same order, numbers that differ by rounding"
        )
    widest = max(model.width(place.site) for place in (*cfg.places, *beside))
    chunk_vectors = default_chunk_vectors(widest, cfg.train.n_steps * cfg.train.batch_size)
    sizes = {"chunk_vectors": chunk_vectors, "n_logits": 0}
    if cfg.loss == "kl" and isinstance(model, LanguageModel):
        n_ctx = cfg.data.context_length(model.n_ctx)
        n_rows = min(sequences_at_once(model, n_ctx), max(1, cfg.train.batch_size // n_ctx))
        sizes["n_logits"] = n_rows * n_ctx * model.d_vocab
    check_memory(cfg, model.width, model.device, **sizes)
    need, free = 2 * state_bytes(cfg, model.width), free_bytes(run.folder)
    if need > free:
        raise InputError(
            f"expected about {readable(need)} free on the disk of {run.folder} for the resumable "
            f"state and the one it replaces, found {readable(free)}; make room and resume the run"
        )
    corpora = [load_text(cfg, model, n_tokens=end) for end in (*cfg.train.extended, None)]
    corpus = corpora[-1]
    if (run.folder / "resume" / "state.json").exists():
        # Extended and not set up since, the run began with a shorter reading.
        n = before["n_train_tokens"] if before else None
        began = [each for each in corpora if each.train.n_tokens == n]
        _check_text(run, (began or corpora)[-1], so="start a new run")
    stream, *later = _streams(run, model, corpora, widest)
    saes, sparsity = [], []
    for spec, i in zip(cfg.saes, cfg.reads, strict=True):
        d_in, scale, power = stream.harvest.widths[i], stream.scales[i], stream.mean_square_norms[i]
        units = sparsity_in_training_units(spec, d_in=d_in, scale=scale, mean_square_norm=power)
        sparsity.append(units)
        saes.append(beginning(run, spec, stream, i).to(model.device))
    train_cfg = TrainConfig(
        **cfg.train.model_dump(),
        sparsity=tuple(each.coeff for each in sparsity),
        lrs=tuple(spec.lr or cfg.train.lr for spec in cfg.saes),
    )
    _start(run, saes, stream)
    noted = _noted(cfg, stream)
    for sentence in outliers_met(noted, cfg.unit):
        log.warning(sentence)
    run.add_event(
        "set up",
        device=str(model.device),
        corpus=corpus.name,
        n_ctx=corpus.n_ctx,
        bos=corpus.bos,
        n_train_tokens=corpus.train.n_tokens,
        text_digest=corpus.digest,
        text_starts=corpus.starts,
        n_held_out_tokens=corpus.held_out.n_tokens,
        chunk_vectors=stream.chunk_vectors,
        **noted,
        numerics=model.numerics,
    )
    trainer = Trainer(saes, train_cfg, reads=cfg.reads)
    return RunSetup(model, corpus, stream, trainer, sparsity, {}, tuple(later))


def _streams(
    run: Run, model: LanguageModel | VectorSource, corpora: Sequence[Corpus], widest: int
) -> Iterator[ActivationStream]:
    """Yield the stream of each stage of training; all scale and leave out as the first.

    A later one reads on where the one before stopped reading; of text that holds no more it reads
    all again, in another order.
    """
    cfg, scale_of = run.config, _scale_of(run)
    kind = ActivationStream
    if cfg.loss == "kl" and isinstance(model, LanguageModel):
        kind = partial(SequenceStream, model=model)
    first, n_read = None, 0
    for k, ((_, stage), corpus) in enumerate(zip(cfg.train.stages, corpora, strict=True)):
        text, seed, n_vectors = corpus, cfg.seed, stage.n_steps * stage.batch_size
        if k:
            rest = corpus.train.take(slice(n_read, None))
            # The reading before went to the end of a sequence and of what was not a whole batch.
            short = n_vectors - corpus.n_ctx - stage.batch_size
            is_new = rest.n_tokens > short and rest.n_tokens >= stage.batch_size
            text = dataclasses.replace(corpus, train=rest) if is_new else corpus
            seed += k << 32  # another order, for every seed of a run
        stream = kind(
            _harvest(cfg, model, text),
            batch_size=stage.batch_size,
            seed=seed,
            n_batches=stage.n_steps,
            scale="none" if first else cfg.activation_scale,
            chunk_vectors=default_chunk_vectors(widest, n_vectors),
            max_norm_ratio=None if first else cfg.max_norm_ratio,
            scale_of=scale_of,
        )
        first = first or stream
        stream.scale, stream.scales, stream.limits = first.scale, first.scales, first.limits
        n_read = len(corpus.train)
        yield stream


def _noted(cfg: RunConfig, stream: ActivationStream) -> dict[str, Any]:
    """Return what was measured of the activations; scale and E|x|^2 are of the first place."""
    names = [place.hook_name for place in cfg.places]
    pairs = zip(stream.scales, stream.mean_square_norms, strict=True)
    scales = [{"activation_scale": s, "mean_square_norm": power} for s, power in pairs]
    keys = ("n", "n_outliers", "outlier_share")
    lengths = [
        {"median_norm": each.median} | {key: getattr(each, key) for key in keys}
        for each in stream.lengths
    ]
    return {
        **scales[0],
        **({"places": dict(zip(names, scales, strict=True))} if len(names) > 1 else {}),
        "max_norm_ratio": cfg.max_norm_ratio,
        "lengths": dict(zip(names, lengths, strict=True)),
    }


def _scale_of(run: Run) -> Literal["ordinary", "all"]:
    """Return whose E|x|^2 is 1 in a run: where an earlier version saved its state, of all."""
    states = [run.folder / kept / "state.json" for kept in ("resume", "extend")]
    saved = [read_json(path).get("scale_of") for path in states if path.exists()]
    return "all" if saved and saved[0] != "ordinary" else "ordinary"


def max_norm(run: Run, name: str) -> float:
    """Return the length above which activations are left out for an SAE; infinite if none are."""
    ratio, median = run.config.max_norm_ratio, run.sae_metadata(name).get("median_norm")
    return math.inf if ratio is None or median is None else ratio * median


def on_device_here(run: Run) -> Run:
    """Return a run on its device; where it began on another machine and this one lacks that, on
    `auto`: the log and an event say so.
    """
    own = run.config.device
    began = run.config.imported is not None or _last_set_up(run) is not None
    if not began or (device := device_here(own)) == own:
        return run
    found = str(resolve_device(device))
    log.warning(
        f"the run was made with --device {own}, which this machine lacks: {found} takes its "
        "place; --device names another"
    )
    run.add_event("other device", device=found, named=own)
    return run.on(device)


def _start(run: Run, saes: Sequence[SAE], stream: ActivationStream) -> None:
    """Start the SAEs of a run that begin from random weights as its recipe says, in place."""
    cfg = run.config
    # A saved state holds what they have become since.
    if cfg.train.start == "zero" or (state_folder(run) / "state.json").exists():
        return
    new = [k for k, spec in enumerate(cfg.saes) if spec.start is None]
    firsts = stream.first(N_VECTORS) if new else []
    for sae, i in ((saes[k], cfg.reads[k]) for k in new):
        x = firsts[i][:N_VECTORS]
        x = x[~longer(x, stream.limits[i])].to(sae.b_dec.device) * stream.scales[i]
        start_(sae, x, start=cfg.train.start)


def beginning(run: Run, spec: SAESpec, stream: ActivationStream, read: int) -> SAE:
    """Return an SAE as it is before the first step: random, or as `spec.start` has it.

    `read`: which of the stream's places it learns from.
    """
    d_in, scale = stream.harvest.widths[read], stream.scales[read]
    if spec.start is None:
        return build_sae(spec, d_in)
    sae = load_sae(run.folder / spec.start)
    check_width(sae, d_in, name=spec.name, hook_name=run.config.place(spec).hook_name)
    if isinstance(sae, TopKSAE):
        sae.k = int(spec.sparsity)
    elif isinstance(sae, JumpReluSAE) and sae.threshold_unit is None:  # another library's
        sae.threshold_unit = stream.mean_square_norms[read] ** 0.5
    fold_scale_(sae, 1 / scale)
    return sae


def load_source(cfg: RunConfig) -> LanguageModel | VectorSource:
    """Return what the run's activations are of: its language model, or a folder of vectors."""
    if cfg.activations is None or cfg.loss == "kl":  # which needs a model
        return load_lm(cfg)
    return VectorSource(cfg.activations, device=resolve_device(cfg.device))


def load_lm(cfg: RunConfig) -> LanguageModel:
    """Return the run's language model; InputError if it has none, or it lacks a layer or site."""
    if cfg.activations is not None:
        raise InputError(
            f"expected a run with a language model, got one of the vectors in {cfg.activations}, "
            "which has none; train on the model itself for that"
        )
    device = resolve_device(cfg.device)
    model = load_model(
        cfg.model.name, revision=cfg.model.revision, device=str(device), dtype=cfg.model.dtype
    )
    for place in cfg.places:
        model.check(*place)
    return model


def load_text(
    cfg: RunConfig,
    model: LanguageModel | VectorSource,
    *,
    n_tokens: int | None = None,
    n_held_out: int | None = None,
) -> Corpus:
    """Return a run's text, with so many tokens to train on and held out; None: as the run takes.

    Of a folder of vectors all are returned.
    """
    if isinstance(model, VectorSource):
        return model.corpus(cfg.data.held_out)
    return load_corpus(
        cfg.data,
        model.tokenizer,
        n_tokens=cfg.train.n_tokens if n_tokens is None else n_tokens,
        model_n_ctx=model.n_ctx,
        n_held_out=cfg.evaluation.n_tokens if n_held_out is None else n_held_out,
    )


def another_text(run: Run, data: Mapping[str, Any]) -> DataConfig | None:
    """Return another text to measure a run on; None if it is what the run itself holds out.

    Of the run's own source, what is not said is as the run has it.
    """
    own = run.config.data
    same = _same_source(data["source"], own.source)
    kept = own.model_dump() if same else own.model_dump(include={*OF_ANY_TEXT})
    called = {"source": "--data"} | {name: f"--{name.replace('_', '-')}" for name in data}
    wanted = validated(DataConfig, kept | dict(data), called)
    wanted = wanted.model_copy(update={"source": own.source}) if same else wanted
    if same and wanted.split != own.split and "all" in (wanted.split, own.split):
        raise InputError(
            f"--split: expected {own.split} or a split that this run was not trained on, got "
            f"{wanted.split}; leave --split out to measure what is held out"
        )
    return None if wanted == own else wanted


def load_elsewhere(
    cfg: RunConfig, model: LanguageModel, data: DataConfig, n_tokens: int
) -> SequenceSet:
    """Return sequences of another text with so many tokens, or all there are.

    Of `stdlib` and of the source and split that the run trained on, those that are held out.
    """
    elsewhere = cfg.model_copy(update={"data": data})
    same = _same_source(data.source, cfg.data.source) and data.split == cfg.data.split
    if data.source == "stdlib" or same:
        return load_text(elsewhere, model, n_held_out=n_tokens).held_out
    return load_text(elsewhere, model, n_tokens=n_tokens, n_held_out=0).whole


def _same_source(one: str, other: str) -> bool:
    return len({os.path.abspath(os.path.expanduser(name)) for name in (one, other)}) == 1


def check_held_out(run: Run, corpus: Corpus, *, part: bool = False) -> None:
    """Refuse to measure on other text, or text read in another way, than a run was trained on.

    Imported runs were trained elsewhere and say nothing of their text. `part`: `corpus` was not
    read as far as training read it; what both hold is compared.
    """
    # Files of the standard library are held out by name, whichever Python they are of.
    if run.config.data.source != "stdlib" or run.config.activations is not None:
        so = "what is held out now may have been trained on; "
        so += f"bring the {WORDS[run.config.unit].read} back or train a new run"
        _check_text(run, corpus, so=so, part=part)


def _check_text(run: Run, corpus: Corpus, *, so: str, part: bool = False) -> None:
    """Refuse other text than the run last read for training."""
    if (noted := _last_set_up(run)) is None:
        return
    # Older versions noted the tokens alone.
    now = {} if part else {"n_train_tokens": corpus.train.n_tokens, "text_digest": corpus.digest}
    same = all(noted.get(name, value) == value for name, value in now.items())
    pairs = zip(noted.get("text_starts", []), corpus.starts, strict=False)
    if not (same and all(one == other for one, other in pairs)):
        n_now = "" if part else f" ({corpus.train.n_tokens:,})"
        n = f"{noted['n_train_tokens']:,}"
        if (folder := run.config.activations) is not None:
            raise InputError(
                f"expected the vectors this run began with ({n} to train on), got others from "
                f"{folder}{n_now}: the folder has changed; {so}"
            )
        raise InputError(
            f"expected the text this run began with ({n} training tokens), got other text from "
            f"{corpus.name}{n_now}: it has changed, or an earlier version read it in another way; "
            f"{so}"
        )


def _last_set_up(run: Run) -> dict[str, Any] | None:
    """Return what a run noted when it was last set up to train; None if it never was."""
    return next((event for event in run.events()[::-1] if event["event"] == "set up"), None)


def harvest_of(
    model: LanguageModel | VectorSource, sequences: SequenceSet, place: Place, *beside: Place
) -> Harvest:
    """Return what yields the activations of sequences at one place, or several in one pass."""
    layer, site = place
    if isinstance(model, VectorSource):
        return StoredHarvest(model, sequences, layer=layer, site=site)
    return Harvest(model, sequences, layer=layer, site=site, beside=beside)


def _harvest(cfg: RunConfig, model: LanguageModel | VectorSource, corpus: Corpus) -> Harvest:
    if not cfg.cache_activations or isinstance(model, VectorSource):
        return harvest_of(model, corpus.train, *cfg.places)
    cache = open_cache(model, corpus.train, cfg.places)
    cache.fill()
    return cache


def save_saes(run: Run, setup: RunSetup) -> None:
    """Write every SAE as it stands, its activation scale folded in."""
    cfg, trainer = run.config, setup.trainer
    scales = [setup.stream.scales[i] for i in cfg.reads]
    medians = [setup.stream.lengths[i].median for i in cfg.reads]
    each = zip(cfg.saes, trainer.saes, setup.sparsity, scales, medians, strict=True)
    for spec, sae, sparsity, scale, median in each:
        place = cfg.place(spec)
        folded = copy.deepcopy(sae).to("cpu")
        fold_scale_(folded, scale)
        metadata = {
            # SAELens reads these to load the same model and the same text.
            "model_name": None if cfg.model.name == NO_MODEL else cfg.model.name,
            "model_class_name": "HookedTransformer",
            "model_from_pretrained_kwargs": {"center_writing_weights": False},
            "hook_name": None if place == NO_PLACE else place.hook_name,
            "hook_head_index": None,
            "dataset_path": cfg.data.source,
            "context_size": setup.corpus.n_ctx,
            "seqpos_slice": [None],
            "prepend_bos": setup.corpus.bos,
            "exclude_special_tokens": True,
            # And these say how the SAE came about.
            "name": spec.name,
            "model_revision": cfg.model.revision,
            "numerics": setup.model.numerics,
            "activation_scale": scale,
            "median_norm": median,
            "max_norm_ratio": cfg.max_norm_ratio,
            "sparsity": spec.sparsity,
            "loss_norm": spec.loss_norm,
            "sparsity_coeff": sparsity.coeff,
            "sparsity_coeff_raw": sparsity.raw,
            "n_tokens": trainer.steps_done * cfg.train.batch_size,
            "stopped": setup.stopped.get(spec.name),
        }
        save_sae(folded, run.sae_folder(spec.name), metadata=metadata)
