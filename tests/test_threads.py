"""Work spread over cores gives what one core gives."""

from collections.abc import Callable, Iterator

import pytest
import torch

from gsae_core.sae.architectures import GatedSAE
from gsae_core.sae.sparse.step import sparse_step
from gsae_core.threads import over_rows, spread


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_come_in_order_and_tasks_spread_no_further(
    threads: Callable[[int], None],
) -> None:
    threads(3)
    assert spread(lambda i: (i * i, torch.get_num_threads()), 5) == [
        (0, 1), (1, 1), (4, 1), (9, 1), (16, 1)
    ]  # fmt: skip
    threads(1)
    assert spread(lambda i: i, 2) == [0, 1]


def test_a_setting_made_later_reaches_no_task(threads: Callable[[int], None]) -> None:
    threads(2)
    spread(lambda i: i, 4)  # the pool of two is there now
    threads(3)
    threads(2)
    assert spread(lambda _: torch.get_num_threads(), 4) == [1, 1, 1, 1]


def test_a_task_records_gradients_if_its_caller_does(threads: Callable[[int], None]) -> None:
    threads(2)
    with torch.no_grad():
        assert spread(lambda _: torch.is_grad_enabled(), 2) == [False, False]
    assert spread(lambda _: torch.is_grad_enabled(), 2) == [True, True]


def test_pieces_cover_every_row_once(threads: Callable[[int], None]) -> None:
    for n_threads in (1, 2, 3):
        threads(n_threads)
        for n in (0, 1, 64, 65, 1000):
            seen = torch.zeros(n, dtype=torch.int64)

            def visit(first: int, last: int, seen: torch.Tensor = seen) -> None:
                seen[first:last] += 1

            over_rows(n, visit)
            assert bool((seen == 1).all())


def test_a_step_has_the_same_bits_on_any_number_of_threads(
    threads: Callable[[int], None],
) -> None:
    # 600 rows are more than one chunk, 300 latents more than one piece.
    x = torch.randn(600, 24, generator=torch.Generator().manual_seed(0))
    gradients = []
    for n_threads in (1, 2, 3):
        threads(n_threads)
        sae = GatedSAE(24, 300)
        with torch.no_grad():
            sae.b_gate.fill_(-1.0)
        sparse_step(sae, x, sparsity_coeff=0.1)
        gradients.append({name: p.grad for name, p in sae.named_parameters()})
    for name in ("W_gate", "W_dec", "b_gate", "b_mag", "r_mag"):
        assert torch.equal(gradients[0][name], gradients[1][name]), name
        assert torch.equal(gradients[0][name], gradients[2][name]), name
