"""A language model and a text -> a folder of activations, for `--activations` on any machine."""

import json
from collections.abc import Iterator
from pathlib import Path

from gsae_core.config import DataConfig, ModelConfig, Place
from gsae_core.errors import InputError
from gsae_core.files import read_json, replace_durably, write_json, writing
from gsae_core.lm.corpus import load_corpus, special_ids
from gsae_core.lm.harvest import CachedActivations, described, fingerprint
from gsae_core.lm.model import load_model
from gsae_core.lm.stored import ABOUT, VOCABULARY
from gsae_core.lm.texts import raw_texts
from gsae_core.runs.plan.cost import resolve_device
from gsae_core.text import Progress


def harvest_to(
    folder: Path,
    of: ModelConfig,
    data: DataConfig,
    *,
    n_tokens: int,
    n_held_out: int,
    device: str = "auto",
) -> Iterator[Progress]:
    """Write what a run of these settings trains and is evaluated on; yield progress.

    Interrupted, it goes on from the last whole shard.

    Args:
        n_tokens: counted tokens to train on, as a run's; the last sequence is whole.
        n_held_out: counted tokens of held-out sequences.

    Raises:
        InputError: while iterating: if the folder holds anything else, the disk lacks the room, or
            a vector is not finite.
    """
    yield Progress("loading", 0, 0)
    where = str(resolve_device(device))
    model = load_model(of.name, revision=of.revision, device=where, dtype=of.dtype)
    model.check(of.layer, of.site)
    corpus = load_corpus(
        data, model.tokenizer, n_tokens=n_tokens, model_n_ctx=model.n_ctx, n_held_out=n_held_out
    )
    folder = folder.absolute()
    splits = {"train": corpus.train, "held_out": corpus.held_out}
    with writing(folder, 0):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            said = f"expected a folder at {folder}, or a place to make one: {error.strerror}"
            raise InputError(f"{said}; choose another (--to)") from None
    place = Place(of.layer, of.site)
    caches = {
        name: CachedActivations(model, sequences, {place: folder}, split=name)
        for name, sequences in splits.items()
    }
    about = described(model, place) | {
        "revision": of.revision,
        "fingerprint": fingerprint(model),
        "data": data.model_dump(mode="json"),
        "text": corpus.name,
        "text_digest": corpus.digest,
        "n_ctx": corpus.n_ctx,
        "bos": corpus.bos,
        "special": sorted(special_ids(model.tokenizer)),
        "splits": {
            name: {
                "n_shards": cache.n_shards,
                "n_sequences": len(cache.sequences),
                "n_tokens": cache.sequences.n_tokens,
            }
            for name, cache in caches.items()
        },
    }
    _begin(folder, about)
    texts = raw_texts(model.tokenizer, range(min(model.d_vocab, len(model.tokenizer))))
    vocabulary = json.dumps(texts).encode()
    replace_durably(
        folder / VOCABULARY, lambda to: to.write_bytes(vocabulary), n_bytes=len(vocabulary)
    )
    total = sum(cache.sequences.n_tokens for cache in caches.values())
    done = total - sum(cache.n_missing for cache in caches.values())
    yield Progress("harvesting", done, total, "token")
    for cache in caches.values():
        for n in cache.filling():
            done += n
            yield Progress("harvesting", done, total, "token")
    yield Progress("finished", total, total, "token")


def _begin(folder: Path, about: dict[str, object]) -> None:
    """Write about.json; refuse a folder that holds anything else than the same harvest."""
    path = folder / ABOUT
    if path.is_file():
        same = read_json(path) == about
    else:
        same = not any(entry.name[0] != "." for entry in folder.iterdir())
    if not same:
        raise InputError(
            f"expected a new or empty folder, or one of the same harvest to go on with, got other "
            f"files in {folder}; choose another (--to)"
        )
    write_json(path, about)
