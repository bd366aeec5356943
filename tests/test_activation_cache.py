"""The activation cache: the same batches, harvested once, whatever happens to its files."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from refusals import refusal
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_runs import finish, outcome
from torch import Tensor

from gsae_core.config import NO_MODEL, Place
from gsae_core.errors import InputError
from gsae_core.lm import harvest as harvesting
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.harvest import CachedActivations, Harvest, fingerprint, open_cache
from gsae_core.lm.model import LanguageModel, load_model
from gsae_core.lm.stored import described
from gsae_core.lm.stream import ActivationStream
from gsae_core.lm.vectors import VectorSource
from gsae_core.runs.run import Run

D_IN, N_CTX = 3, 5


class TokenModel(LanguageModel):
    """Activation of token t: (t, t / 3, -t). Counts the sequences it was asked for."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, fails_at: int | None = None) -> None:
        self.n_sequences, self._fails_at = 0, fails_at
        self._lock = threading.Lock()

    def width(self, site: str) -> int:
        return D_IN

    def harvest(self, ids: Tensor, *, layer: int, site: str) -> Tensor:
        with self._lock:
            self.n_sequences += len(ids)
            if self._fails_at is not None and self.n_sequences > self._fails_at:
                raise KeyboardInterrupt
        return torch.stack([ids, ids / 3, -ids], dim=-1).float()


def sequences(n: int = 10) -> SequenceSet:
    """Row r holds 0 (not counted) and 10 r + 1 to 10 r + 4: 4 counted vectors."""
    rows = 10 * np.arange(n)[:, None] + np.arange(N_CTX)
    rows[:, 0] = 0
    return SequenceSet(rows.astype(np.uint16), (0,))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of 2 sequences, and 4 of them, of 3 float32 a position, in a shard: 4, 4 and 2."""
    monkeypatch.setattr(harvesting, "CPU_PASS_TOKENS", 2 * N_CTX)
    monkeypatch.setattr(harvesting, "SHARD_BYTES", 4 * N_CTX * D_IN * 4)


class Made(NamedTuple):
    model: TokenModel
    cache: CachedActivations


def cached(
    folder: Path,
    set_: SequenceSet | None = None,
    model: TokenModel | None = None,
    dtype: torch.dtype = torch.float32,
) -> Made:
    model, set_ = model or TokenModel(), set_ or sequences()
    model.dtype = dtype
    return Made(model, CachedActivations(model, set_, {Place(0, "mlp_out"): folder}))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read(cache: CachedActivations, n: int = 10) -> Tensor:
    return torch.cat(list(cache.vectors(np.arange(n))))


WANTED = torch.tensor(
    [[t, t / 3, -t] for r in range(10) for t in range(10 * r + 1, 10 * r + 5)], dtype=torch.float32
)


def test_what_is_read_is_what_was_harvested_in_any_selection(tmp_path: Path) -> None:
    _, cache = cached(tmp_path)
    cache.fill()
    assert len(shards(tmp_path)) == 3
    assert torch.equal(read(cache), WANTED)
    which = np.array([1, 3, 4, 9])
    found = torch.cat(list(cache.vectors(which)))
    assert torch.equal(found, WANTED.view(10, 4, D_IN)[which].flatten(0, 1))


def test_a_second_reader_asks_the_model_for_nothing(tmp_path: Path) -> None:
    model, cache = cached(tmp_path)
    cache.fill()
    assert model.n_sequences == 10
    again, cache = cached(tmp_path)
    cache.fill()
    assert torch.equal(read(cache), WANTED)
    assert again.n_sequences == 0


def test_what_earlier_versions_kept_is_read_and_not_harvested_again(tmp_path: Path) -> None:
    cached(tmp_path).cache.fill()
    for path in shards(tmp_path):
        with safe_open(path, "pt") as file:
            x, metadata = file.get_tensor("x"), file.metadata()
        save_file({"x": x}, path, metadata=metadata)  # vectors alone
    # And of the model the name alone.
    (tmp_path / "about.json").write_text('{"model": "bundled", "format": 1, "n_ctx": 5}')
    again, cache = cached(tmp_path)
    cache.fill()
    assert torch.equal(read(cache), WANTED)
    assert again.n_sequences == 0
    assert described(tmp_path)[0].name == NO_MODEL
    source = VectorSource(str(tmp_path), device=torch.device("cpu"))
    assert (len(source.vectors), source.name) == (40, NO_MODEL)
    found = np.concatenate([*source.vectors.rows(np.arange(40))])
    assert sorted(found[:, 0].tolist()) == WANTED[:, 0].tolist()


def test_a_longer_reading_of_the_text_harvests_only_what_it_lacks(tmp_path: Path) -> None:
    cached(tmp_path, sequences(10)).cache.fill()
    longer = cached(tmp_path, sequences(14))
    longer.cache.fill()
    # Sequences 0 to 7 are two whole shards; 8 to 11 were half there, 12 and 13 not at all.
    assert longer.model.n_sequences == 6


def test_an_interruption_loses_one_shard_at_most(tmp_path: Path) -> None:
    # The third pass of two sequences, the first of the second shard, is interrupted.
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, model=TokenModel(fails_at=4)).cache.fill()
    assert len(shards(tmp_path)) == 1
    assert [path.name for path in tmp_path.glob("*.tmp")] == []
    model, cache = cached(tmp_path)
    cache.fill()
    assert model.n_sequences == 6
    assert torch.equal(read(cache), WANTED)


def test_what_a_killed_process_left_behind_is_cleared_away(tmp_path: Path) -> None:
    _, cache = cached(tmp_path)
    cache.fill()
    (path, *_) = shards(tmp_path)
    path.rename(left := tmp_path / f".{path.name}.123.tmp")
    cached(tmp_path).cache.fill()
    assert path.exists()
    assert not left.exists()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(flip_a_bit, "checksum"), (cut_short, "deserializing"), (empty, "header")],
)
def test_a_damaged_shard_is_told_of_and_harvested_again(
    damage: Callable[[Path], None],
    reason: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cached(tmp_path).cache.fill()
    (path, *_) = shards(tmp_path)
    damage(path)
    model, cache = cached(tmp_path)
    cache.fill()
    assert torch.equal(read(cache), WANTED)
    assert model.n_sequences in (2, 4)  # the sequences of one shard, no others
    told = caplog.records[-1].getMessage()
    assert told.startswith(
        f"expected the activations that were written to {path}, got damaged ones ("
    )
    assert reason in told
    assert told.endswith("); harvesting them again")
    again, cache = cached(tmp_path)
    assert torch.equal(read(cache), WANTED)
    assert again.n_sequences == 0


def test_its_size_is_told_before_it_is_filled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, cache = cached(tmp_path)
    with caplog.at_level(logging.INFO, "gsae_core"):
        cache.fill()
    assert caplog.records[0].getMessage() == (
        f"activation cache: 480 bytes still to be harvested of 480 bytes in {tmp_path}"
    )


def test_a_disk_without_room_is_refused_before_anything_is_harvested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsae_core.lm.harvest.free_bytes", lambda path: 479)
    model, cache = cached(tmp_path)
    assert refusal(cache.fill) == (
        f"expected 480 bytes free on the disk of {tmp_path} for the activation cache, found 479 "
        "bytes; make room, set XDG_CACHE_HOME to a folder on another disk, or train without "
        "--cache-activations"
    )
    assert model.n_sequences == 0


def test_a_disk_that_gives_back_other_bytes_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsae_core.lm.harvest._sha256", lambda x: str(id(x)))
    with pytest.raises(InputError, match="expected to read back what was just written to"):
        cached(tmp_path).cache.fill()


def test_half_precision_halves_the_cache_where_it_loses_nothing(tmp_path: Path) -> None:
    # Tokens up to 94 are exact in bfloat16; thirds of them are not.
    whole = SequenceSet(np.array([[3, 6], [9, 12]], np.uint16))
    thirds = SequenceSet(np.array([[1, 2], [4, 5]], np.uint16))
    for set_, n_bytes in ((whole, 2), (thirds, 4)):
        folder = tmp_path / str(n_bytes)
        _, cache = cached(folder, set_, dtype=torch.bfloat16)
        cache.fill()
        (path,) = shards(folder)
        with safe_open(path, "pt") as file:
            assert file.get_tensor("x").itemsize == n_bytes
        tokens = set_[:].ids.flatten()
        x = read(cache, 2)
        assert x.dtype == torch.float32
        assert torch.equal(x, torch.stack([tokens, tokens / 3, -tokens], 1).float())


def test_two_runs_that_fill_one_cache_share_the_work(tmp_path: Path) -> None:
    made = [cached(tmp_path) for _ in range(2)]
    threads = [threading.Thread(target=each.cache.fill) for each in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(each.model.n_sequences for each in made) == 10
    assert all(torch.equal(read(each.cache), WANTED) for each in made)


def batches(harvest: Harvest, seed: int) -> list[Tensor]:
    stream = ActivationStream(harvest, batch_size=64, seed=seed, n_batches=25, chunk_vectors=300)
    return list(stream.batches())


def test_batches_have_the_same_bits_from_the_cache_for_every_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = load_model("bundled")
    rows = np.random.default_rng(0).integers(1, model.d_vocab, (20, 64), np.uint16)
    rows[:, 0] = 0
    set_ = SequenceSet(rows, (0,))
    harvest = Harvest(model, set_, layer=1, site="mlp_out")
    cache = open_cache(model, set_, [Place(1, "mlp_out")])
    for seed in (0, 1):
        wanted = batches(harvest, seed)
        found = batches(cache, seed)
        # 20 rows of 63 counted tokens are 1260 vectors, so 25 batches of 64 are more than an epoch.
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_cache_belongs_to_weights_and_a_place_not_to_a_name(
    tiny_lm_folder: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    set_ = sequences()

    def folder(model: LanguageModel, layer: int = 0) -> Path:
        return open_cache(model, set_, [Place(layer, "mlp_out")]).folder

    model = load_model(str(tiny_lm_folder))
    copy = tmp_path / "copy"
    model.hf.save_pretrained(copy)
    tiny_tokenizer.save_pretrained(copy)
    again = load_model(str(copy))
    assert folder(model) == folder(again)
    assert folder(model) != folder(model, layer=1)
    before = folder(model)
    with monkeypatch.context() as patched:
        patched.setattr("gsae_core.lm.harvest.default_rows", lambda *_: 1)
        assert folder(model) != before
    with torch.no_grad():
        again.hf.transformer.h[0].ln_1.bias[3] += 1
    assert folder(model) != folder(again)
    narrow = load_model(str(tiny_lm_folder), dtype="bfloat16")
    assert fingerprint(model) != fingerprint(narrow)


def test_a_run_from_the_cache_ends_with_the_bits_of_one_without(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = new_run("plain")
    finish(plain)
    filling, reading = (new_run(name, cache_activations=True) for name in ("filling", "reading"))
    finish(filling)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a forward pass over the training split")

    monkeypatch.setattr(Harvest, "_passes", never)
    finish(reading)
    assert outcome(plain) == outcome(filling) == outcome(reading)
