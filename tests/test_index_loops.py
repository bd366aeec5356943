"""The index's compiled loops beside what torch and NumPy say: picked, split and kept."""

import numpy as np
import pytest
import torch

from gsae_core.analysis.features import loops as index_loops
from gsae_core.analysis.features.collect import Collector, NearBand
from gsae_core.analysis.features.logit_effects import largest_in_rows
from gsae_core.sae.architectures import GatedSAE

H = torch.tensor([[3.0, 1.0, 3.0, -2.0], [0.0, 5.0, -1.0, 5.0]])


def test_of_equal_values_the_lower_column_is_first() -> None:
    columns, values = largest_in_rows(H, 2)
    assert columns.tolist() == [[0, 2], [1, 3]]
    assert values.tolist() == [[3.0, 3.0], [5.0, 5.0]]
    columns, values = largest_in_rows(H, 2, smallest=True)
    assert columns.tolist() == [[3, 1], [2, 0]]
    assert values.tolist() == [[-2.0, 1.0], [-1.0, 0.0]]


def test_a_row_leaves_out_its_own_column() -> None:
    # Row 0 leaves out column 2, row 1 column 3.
    columns, values = largest_in_rows(H, 3, own=2)
    assert columns.tolist() == [[0, 1, 3], [1, 0, 2]]
    assert values.tolist() == [[3.0, 1.0, -2.0], [5.0, 0.0, -1.0]]


@pytest.mark.parametrize("columns", [5, 32, 77])
def test_heaps_keep_each_column_s_largest_whatever_the_order(columns: int) -> None:
    margin = np.random.default_rng(0).standard_normal((50, columns)).astype(np.float32)
    heaps, floor = np.full((columns, 7), -np.inf, np.float32), np.full(columns, -np.inf, np.float32)
    index_loops.keep_largest(margin[30:], heaps, floor)
    index_loops.keep_largest(margin[:30], heaps, floor)
    wanted = np.sort(margin, axis=0)[-7:].T
    np.testing.assert_array_equal(np.sort(heaps, axis=1), wanted)
    np.testing.assert_array_equal(floor, wanted[:, 0])


def test_a_product_fires_is_near_or_neither() -> None:
    # One feature whose gate opens above 1, with f = 2 h - 4: it fires above 2, and a margin
    # h - 2 > -0.6 is near. h = 1.5 opens the gate onto nothing.
    ones = np.ones(1)
    rules = (ones, 2 * ones, -4 * ones, 0 * ones, 2 * ones, -0.6 * ones)
    ends, latent = np.array([2, 2, 4]), np.zeros(4, np.int64)
    h, counts, gate_open = np.array([3.0, 1.5, 1.3, 2.5]), np.zeros(3, np.int64), np.zeros(1, int)
    near_row, near_latent, margin = np.zeros(4, int), np.zeros(4, int), np.zeros(4)
    room = (counts, near_row, near_latent, margin, gate_open)
    assert index_loops.split(ends, latent, h, rules, *room) == (2, 1)
    assert h[:2].tolist() == [2.0, 1.0]
    assert counts.tolist() == [1, 0, 1]
    assert (near_row[0], margin[0], gate_open[0]) == (0, -0.5, 4)


def test_what_fires_is_what_encode_says_and_no_near_miss_fires() -> None:
    torch.manual_seed(0)
    sae, x = GatedSAE(16, 40), torch.randn(600, 16)
    with torch.no_grad():
        assert sae.r_mag is not None
        for each in (sae.b_gate, sae.b_mag, sae.r_mag):
            each.normal_()
        f = sae.encode(x)
    band = NearBand(sae, n_sample=600, n_tokens=600)
    band.add(x)
    found = Collector(sae, band.width)(x)
    assert found.counts.tolist() == (f > 0).sum(1).tolist()
    np.testing.assert_allclose(found.value, f[f > 0].numpy(), rtol=1e-5, atol=1e-6)
    assert not (
        set(zip(found.near_row, found.near_latent, strict=True))
        & set(map(tuple, f.nonzero().tolist()))
    )
