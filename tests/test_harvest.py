"""Harvesting: passes side by side, in order, with the same bits on any number of threads."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CONFIGS, tiny
from refusals import refusal
from torch import Tensor

from gsae_core.config import SITES, Site
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.harvest import Harvest, default_rows
from gsae_core.lm.model import LanguageModel, load_model

CPU = torch.device("cpu")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads torch may use; the number there was comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def sequences(n: int = 12, n_ctx: int = 7, special: tuple[int, ...] = (0,)) -> SequenceSet:
    rows = np.random.default_rng(0).integers(1, 40, (n, n_ctx), np.uint16)
    rows[:, 0] = 0
    return SequenceSet(rows, special)


def reader(
    model: LanguageModel, set_: SequenceSet, *, rows: int, layer: int = 0, site: Site = "mlp_out"
) -> Harvest:
    """Return a harvest of so many sequences a pass."""
    harvest = Harvest(model, set_, layer=layer, site=site)
    harvest.rows = rows
    return harvest


class SlowModel(LanguageModel):
    """Activation of token t: (t, t, t). Notes the threads torch has in each pass."""

    device = CPU
    dtype = torch.float32

    def __init__(self, wait: Callable[[int], None] = lambda n_passes: None) -> None:
        self._wait, self._lock = wait, threading.Lock()
        self.n_passes = 0
        self.n_threads: set[int] = set()

    def width(self, site: str) -> int:
        return 3

    def harvest(self, ids: Tensor, *, layer: int, site: str) -> Tensor:
        with self._lock:
            self.n_passes += 1
            n_passes = self.n_passes
        self.n_threads.add(torch.get_num_threads())
        self._wait(n_passes)
        return ids[..., None].expand(*ids.shape, 3).float()


@pytest.mark.parametrize(
    "family",
    [
        family
        if family in ("gpt2", "gpt_neox", "gemma3_text")
        else pytest.param(family, marks=pytest.mark.slow)
        for family in CONFIGS
    ],
)
def test_threads_side_by_side_give_the_bits_of_one_pass_after_the_other(
    family: str, tiny_tokenizer: Any, threads: Callable[[int], None]
) -> None:
    model, set_ = load_model(tiny(family), tokenizer=tiny_tokenizer), sequences()
    which = np.arange(12)
    for site in SITES:
        threads(1)
        ids = [set_[which[i : i + 2]].ids for i in range(0, 12, 2)]
        # The first position of each row is not counted.
        wanted = [model.harvest(each, layer=1, site=site)[:, 1:].flatten(0, 1) for each in ids]
        for n_threads in (1, 4):
            threads(n_threads)
            harvest = reader(model, set_, layer=1, site=site, rows=2)
            found = list(harvest.vectors(which))
            assert len(found) == 6
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_passes_to_one_site_are_in_the_model_together(
    tiny_lm: LanguageModel, threads: Callable[[int], None]
) -> None:
    threads(2)
    # Passes one after the other would wait here until the barrier breaks.
    both = threading.Barrier(2, timeout=20)
    handle = tiny_lm.hf.transformer.wte.register_forward_hook(lambda *_: (both.wait(), None)[1])
    try:
        harvest = reader(tiny_lm, sequences(4), rows=2)
        assert sum(map(len, harvest.vectors(np.arange(4)))) == 4 * 6
    finally:
        handle.remove()


def test_every_pass_has_one_thread_and_the_caller_keeps_its_own(
    threads: Callable[[int], None],
) -> None:
    threads(3)
    model = SlowModel()
    list(reader(model, sequences(), rows=1).vectors(np.arange(12)))
    assert model.n_threads == {1}
    assert torch.get_num_threads() == 3


def test_vectors_come_in_order_however_long_each_pass_takes(
    threads: Callable[[int], None],
) -> None:
    threads(2)
    set_, second = sequences(), threading.Event()

    def wait(n_passes: int) -> None:
        if n_passes == 1:
            assert second.wait(20)  # the second pass ends before the first one
        else:
            second.set()

    found = reader(SlowModel(wait), set_, rows=3).vectors(np.arange(12))
    ids, mask = set_[:]
    assert torch.cat(list(found))[:, 0].tolist() == ids[mask].tolist()


def test_no_more_passes_run_ahead_than_two_for_each_thread(
    threads: Callable[[int], None],
) -> None:
    threads(2)
    model = SlowModel()
    found = reader(model, sequences(), rows=1).vectors(np.arange(12))
    next(found)
    found.close()  # type: ignore[attr-defined]
    # Four were given out at once, and a fifth when the first was taken.
    assert model.n_passes <= 5


def test_a_pass_that_fails_says_so_to_whoever_reads(threads: Callable[[int], None]) -> None:
    threads(2)

    def fail(n_passes: int) -> None:
        if n_passes == 3:
            raise ArithmeticError("broken pass")

    found = reader(SlowModel(fail), sequences(), rows=2)
    with pytest.raises(ArithmeticError, match="broken pass"):
        list(found.vectors(np.arange(12)))


def test_sequences_with_nothing_counted_cost_no_pass() -> None:
    model = SlowModel()
    set_ = SequenceSet(np.zeros((4, 3), np.uint16), (0,))
    assert list(reader(model, set_, rows=1).vectors(np.arange(4))) == []
    assert model.n_passes == 0


def test_a_pass_takes_512_tokens_on_a_cpu_and_32768_elsewhere() -> None:
    assert [default_rows(n_ctx, CPU) for n_ctx in (16, 256, 512, 1024)] == [32, 2, 1, 1]
    assert default_rows(256, torch.device("cuda")) == 128


def test_an_edit_that_runs_the_model_is_refused_rather_than_waited_for(
    tiny_lm: LanguageModel,
) -> None:
    ids = torch.ones(1, 3, dtype=torch.int64)

    def edit(x: Tensor) -> Tensor:
        return tiny_lm.harvest(ids, layer=0, site="resid_pre")

    assert refusal(tiny_lm.logits, ids, layer=0, site="resid_pre", edit=edit) == (
        "expected an edit that leaves the language model alone, got one that runs it; "
        "harvest first and edit with what was found"
    )
    tiny_lm.logits(ids)  # and nobody waits for ever


def test_gpt2s_gelu_is_one_kernel_in_float32_and_as_published_in_half_precision(
    tiny_lm_folder: Path, tiny_tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.activations import NewGELUActivation

    published = AutoModelForCausalLM.from_pretrained(tiny_lm_folder)
    fused = load_model(str(tiny_lm_folder))
    narrow = load_model(str(tiny_lm_folder), dtype="bfloat16")
    models: list[Any] = [published, fused.hf, narrow.hf]
    kinds = [type(hf.transformer.h[1].mlp.act) for hf in models]
    assert kinds == [NewGELUActivation, torch.nn.GELU, NewGELUActivation]
    ids = torch.tensor([[0, 5, 9, 2, 31]])
    given = load_model(published, tokenizer=tiny_tokenizer)
    torch.testing.assert_close(fused.logits(ids), given.logits(ids), atol=1e-5, rtol=1e-5)
