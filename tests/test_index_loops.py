"""What an index picks and keeps, beside what torch and NumPy say and by hand."""

import math

import numpy as np
import torch
from examples import random_relu, set_

from gsae_core.analysis.features.collect import Collector, NearBand, margins
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


def test_a_band_is_the_same_whatever_the_order() -> None:
    sae, x = random_relu(), torch.randn(500, 4, dtype=torch.float64)
    # 512 tokens of 5120 in the band: of 500 in the sample the 50 with the largest margins.
    one, two = (NearBand(sae, n_sample=500, n_tokens=5120) for _ in range(2))
    one.add(x)
    for part in (x[300:], x[:300]):
        two.add(part)
    margin, fires = margins(sae, x)
    wanted = margin.masked_fill(fires, -torch.inf).sort(0, descending=True).values[49]
    torch.testing.assert_close(one.width, wanted)
    torch.testing.assert_close(two.width, wanted)


def test_a_product_fires_is_near_or_neither() -> None:
    # One feature whose gate opens above 1, with f = 2 h - 4: it fires above 2, and a margin
    # h - 2 > -0.6 is near. h = 1.5 opens the gate onto nothing.
    sae = GatedSAE(1, 1)
    set_(sae, W_gate=[1], b_gate=[-1], r_mag=[math.log(2)], b_mag=[-4], W_dec=[1], b_dec=[0])
    found = Collector(sae, torch.tensor([-0.6]))(torch.tensor([[3.0], [1.5], [1.3], [2.5]]))
    assert found.counts.tolist() == [1, 0, 0, 1]
    assert found.value.tolist() == [2.0, 1.0]
    assert (found.near_row.tolist(), found.near_margin.tolist()) == ([1], [-0.5])
    assert found.gate_open.tolist() == [4]


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
