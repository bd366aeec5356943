"""Chunks filled ahead: the same batches, while the ones before are used, and no thread is left."""

import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from test_stream import N_COUNTED, TokenModel, stream
from torch import Tensor


class GatedModel(TokenModel):
    """Lets one pass through for each permit; the tests' passes are of all sequences of a chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.permits, self.arrived = threading.Semaphore(0), threading.Semaphore(0)

    def harvest(self, ids: Tensor, *, layer: int, site: str) -> Tensor:
        self.arrived.release()
        assert self.permits.acquire(timeout=20)
        return super().harvest(ids, layer=layer, site=site)


def fillers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "harvest"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    for thread in fillers():
        thread.join(timeout=20)
    assert fillers() == []


def test_batches_have_the_same_bits_filled_ahead_or_not() -> None:
    wanted = list(stream(n_batches=26).batches())
    found = list(stream(n_batches=26, ahead=True).batches())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    jumping = stream(n_batches=26, ahead=True)
    for i in np.random.default_rng(0).permutation(26):
        assert torch.equal(jumping.batch(int(i)), wanted[i])


def test_the_next_chunk_is_harvested_while_this_one_is_used() -> None:
    model = GatedModel()
    run = stream(model, ahead=True)
    model.permits.release()  # for the first chunk only
    run.batch(0)
    assert model.arrived.acquire(timeout=20)
    assert model.arrived.acquire(timeout=20)  # the second chunk's pass is under way by itself
    model.permits.release(100)


def test_nothing_is_harvested_ahead_on_a_cpu() -> None:
    model = TokenModel()
    run = stream(model)
    run.batch(0)
    assert fillers() == []
    assert model.n_tokens < 12 * 5


def test_every_sequence_is_harvested_once_an_epoch_and_no_chunk_beyond_the_last() -> None:
    model = TokenModel()
    list(stream(model, ahead=True).batches())
    assert N_COUNTED == 13 * 3
    assert model.n_tokens == 12 * 5


def test_an_error_in_the_background_is_raised_where_the_batch_is_asked_for() -> None:
    class Failing(TokenModel):
        def harvest(self, ids: Tensor, *, layer: int, site: str) -> Tensor:
            if self.n_tokens:
                raise ArithmeticError("broken pass")
            return super().harvest(ids, layer=layer, site=site)

    run = stream(Failing(), ahead=True)
    run.batch(0)
    with pytest.raises(ArithmeticError, match="broken pass"):
        list(run.batches())


def test_a_stream_that_is_dropped_ends_its_thread() -> None:
    model = GatedModel()
    run = stream(model, ahead=True)
    model.permits.release()
    run.batch(0)
    assert len(fillers()) == 1
    del run
    model.permits.release()  # the pass under way ends, and with it the thread: see the fixture


ENDS_EARLY = """
import threading
import numpy as np, torch
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.harvest import Harvest
from gsae_core.lm.stream import ActivationStream

class Model:
    # Any device but the CPU: its passes run in the thread that fills the chunk.
    device, dtype, n = torch.device("meta"), torch.float32, 0
    def width(self, site): return 1
    def harvest(self, ids, *, layer, site):
        Model.n += 1
        if Model.n > 50:  # in the second chunk
            threading.main_thread().join()
            print("pass", flush=True)
        return ids[..., None].float()

n_ctx = 2**15  # one sequence a pass
text = SequenceSet(np.ones((100, n_ctx), np.uint16))
run = ActivationStream(Harvest(Model(), text, layer=0, site="mlp_out"), batch_size=n_ctx, seed=0,
    n_batches=100, scale="none", chunk_vectors=n_ctx * 50)
run.ahead = True
run.batch(0)
"""


def test_a_process_that_ends_does_not_wait_for_the_chunk_it_was_filling() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS_EARLY], capture_output=True, text=True, check=True, timeout=60
    )
    # The pass it was at, of the chunk's fifty.
    assert done.stdout.split() == ["pass"]
    assert "Traceback" not in done.stderr


@pytest.mark.gpu
def test_on_cuda_batches_have_the_same_bits_filled_ahead_on_another_stream() -> None:
    class OnCuda(TokenModel):
        device = torch.device("cuda")

        def harvest(self, ids: Tensor, *, layer: int, site: str) -> Tensor:
            return super().harvest(ids, layer=layer, site=site).cuda()

    wanted = list(stream(n_batches=26).batches())
    run = stream(OnCuda(), n_batches=26)
    found = list(run.batches())
    assert all(x.is_cuda for x in found)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))
    assert run.seconds > 0
