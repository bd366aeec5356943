"""Batches of activations: the same whatever order they are asked in, every token once an epoch."""

from typing import Any

import numpy as np
import pytest
import torch
from refusals import refusal
from torch import Tensor

from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.harvest import Harvest
from gsae_core.lm.model import LanguageModel
from gsae_core.lm.stream import ActivationStream, default_chunk_vectors

SPECIAL = 0


class TokenModel(LanguageModel):
    """Activation of token t at any position: (t, 2t). Counts the tokens it was asked for."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self) -> None:
        self.n_tokens = 0

    def width(self, site: str) -> int:
        return 2

    def harvest(self, ids: Tensor, *, layer: int, site: str) -> Tensor:
        self.n_tokens += ids.numel()
        return torch.stack([ids, 2 * ids], dim=-1).float()


def sequences(n: int = 12, n_ctx: int = 5) -> SequenceSet:
    """Ids 1, 2, 3 ... after a special id in each row; row r has another one in place r % n_ctx."""
    rows = np.zeros((n, n_ctx), np.uint16)
    rows[:, 1:] = np.arange(1, n * (n_ctx - 1) + 1).reshape(n, n_ctx - 1)
    rows[np.arange(n), np.arange(n) % n_ctx] = SPECIAL
    return SequenceSet(rows, (SPECIAL,))


# 12 rows of 4 ids; rows 0, 5 and 10 lose none (their second special place is the first one), the
# other nine lose one each: 48 - 9 = 39 counted tokens.
N_COUNTED = 39


def stream(
    model: TokenModel | None = None,
    set_: SequenceSet | None = None,
    *,
    ahead: bool = False,
    **settings: Any,
) -> ActivationStream:
    """13 batches of 3, raw, in chunks of 10 at most, unless `settings` say otherwise."""
    usual = {"batch_size": 3, "n_batches": 13, "seed": 0, "scale": "none", "chunk_vectors": 10}
    harvest = Harvest(model or TokenModel(), set_ or sequences(), layer=1, site="resid_post")
    run = ActivationStream(harvest, **usual | settings)
    run.ahead |= ahead
    return run


def tokens(batches: list[Tensor]) -> list[int]:
    return [int(token) for batch in batches for token in batch[:, 0]]


def test_batch_i_is_the_same_whatever_order_is_asked() -> None:
    in_order = list(stream(n_batches=26).batches())
    jumping = stream(n_batches=26)
    for i in np.random.default_rng(0).permutation(26):
        torch.testing.assert_close(jumping.batch(int(i)), in_order[i], rtol=0, atol=0)


def test_a_fresh_stream_that_starts_in_the_middle_gives_the_same_bits() -> None:
    whole = list(stream(scale="unit").batches())
    rest = list(stream(scale="unit").batches(start=7))
    assert len(rest) == 6
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[7:], strict=True))


def test_every_counted_token_comes_once_an_epoch_and_no_masked_one() -> None:
    set_ = sequences()
    ids, mask = set_[:]
    counted = sorted(ids[mask].tolist())
    assert len(counted) == set_.n_tokens == N_COUNTED
    batches = list(stream(set_=set_, n_batches=26).batches())  # 26 * 3 = 2 * 39: two epochs
    first, second = tokens(batches[:13]), tokens(batches[13:])
    assert sorted(first) == sorted(second) == counted
    assert first != second


def test_an_epoch_that_no_batch_divides_runs_on_in_the_next() -> None:
    # 39 tokens in batches of 5: batch 7 takes 4 of the first epoch and 1 of the second.
    seen = tokens(list(stream(batch_size=5, n_batches=15).batches()))
    assert len(set(seen[:39])) == 39
    assert len(set(seen[39:])) == 75 - 39


def test_rows_stay_together_and_tokens_are_shuffled_across_sequences() -> None:
    batch = stream(batch_size=39, n_batches=1, chunk_vectors=39).batch(0)
    assert torch.equal(batch[:, 1], 2 * batch[:, 0])
    neighbours = (batch[1:, 0] - batch[:-1, 0]).abs() == 1
    assert neighbours.float().mean() < 0.3  # in the text's own order nearly all are


def test_two_seeds_give_two_orders_of_the_same_tokens() -> None:
    one, two = (tokens(list(stream(seed=seed).batches())) for seed in (0, 1))
    assert one != two
    assert sorted(one) == sorted(two)


def test_the_size_of_a_chunk_decides_the_order_and_is_recorded() -> None:
    assert stream(chunk_vectors=10).chunk_vectors == 10
    orders = {tuple(tokens(list(stream(chunk_vectors=n).batches()))) for n in (5, 10, 39)}
    assert len(orders) == 3


@pytest.mark.parametrize("chunk_vectors", [1, 4, 10, 20, 1000])
def test_reading_in_order_harvests_every_sequence_once(chunk_vectors: int) -> None:
    model = TokenModel()
    assert len(tokens(list(stream(model, chunk_vectors=chunk_vectors).batches()))) == N_COUNTED
    assert model.n_tokens == 12 * 5


def test_a_run_shorter_than_the_corpus_harvests_no_more_than_it_needs() -> None:
    model = TokenModel()
    list(stream(model, n_batches=2, chunk_vectors=1000).batches())
    # 6 vectors of sequences with 3 or 4 counted tokens: two sequences of 5 positions.
    assert model.n_tokens == 2 * 5


def test_unit_scale_makes_the_mean_square_norm_one() -> None:
    # Tokens 1 and 2 as (t, 2t): |x|^2 = 5 t^2 = 5 and 20, mean 12.5.
    set_ = SequenceSet(np.array([[0, 1], [0, 2]], np.uint16), (SPECIAL,))
    run = stream(set_=set_, batch_size=2, n_batches=1, scale="unit")
    assert run.mean_square_norm == 12.5
    assert run.scale == 12.5**-0.5
    assert run.batch(0).square().sum(1).mean().item() == pytest.approx(1, abs=1e-6)


def test_scale_none_leaves_activations_raw_and_still_knows_their_mean_square() -> None:
    run = stream(scale="none")
    assert run.scale == 1.0
    ids, mask = sequences()[:]
    assert run.mean_square_norm == pytest.approx(5 * ids[mask].double().square().mean().item())


def test_a_batch_is_float32_contiguous_and_the_callers_own() -> None:
    run = stream()
    batch = run.batch(0)
    assert (batch.dtype, batch.shape, batch.is_contiguous()) == (torch.float32, (3, 2), True)
    before = batch.clone()
    batch.zero_()
    assert torch.equal(run.batch(0), before)


def test_a_sequence_with_nothing_counted_does_no_harm() -> None:
    rows = np.array([[0, 0, 0], [0, 1, 2], [0, 0, 0], [0, 3, 0]], np.uint16)
    run = stream(set_=SequenceSet(rows, (SPECIAL,)), batch_size=3, n_batches=2, chunk_vectors=1)
    first, second = run.batches()
    assert sorted(tokens([first])) == sorted(tokens([second])) == [1, 2, 3]


def test_time_in_the_language_model_adds_up() -> None:
    run = stream()
    assert run.seconds == 0
    run.batch(0)
    first = run.seconds
    run.batch(12)
    assert 0 < first < run.seconds


def test_chunks_are_an_eighth_of_a_short_run_and_two_gib_at_most() -> None:
    assert default_chunk_vectors(256, 10_000) == 2**16
    assert default_chunk_vectors(256, 2_000_000) == 250_000
    assert default_chunk_vectors(256, 10**9) == 2**20
    assert default_chunk_vectors(4096, 10**9) == 2**31 // (4 * 4096)
    assert stream(chunk_vectors=None).chunk_vectors == 2**16


def test_less_than_one_batch_is_an_error_that_counts() -> None:
    assert refusal(stream, batch_size=40) == (
        "expected at least one batch of 40 training tokens, got 39: give more text or a smaller "
        "batch_size"
    )


def test_activations_that_are_all_zero_cannot_be_scaled() -> None:
    set_ = SequenceSet(np.zeros((2, 3), np.uint16))
    assert refusal(stream, set_=set_, scale="unit") == (
        "expected activations with a finite length above 0 at resid_post of layer 1, got E|x|^2 = "
        "0.0: choose another site, or float32 for the model"
    )


@pytest.mark.parametrize("i", [-1, 13])
def test_a_batch_beyond_the_run_does_not_exist(i: int) -> None:
    with pytest.raises(IndexError, match=f"expected a batch from 0 to 12, got {i}"):
        stream().batch(i)
