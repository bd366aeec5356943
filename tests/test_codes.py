"""SparseCodes hold exactly the active entries, in rows and, transposed, by latent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.codes import (
    SparseCodes,
    by_latent,
    chunk_rows,
    encode_sparse,
    weighted_sums,
)


def dense(codes: SparseCodes, values: Tensor, d_sae: int) -> Tensor:
    matrix = values.new_zeros(codes.row_offsets.numel() - 1, d_sae)
    matrix[codes.rows(), codes.latent] = values
    return matrix


@pytest.fixture
def by_hand() -> GatedSAE:
    """d_in 1, three latents: h = x * (1, -1, 2); biases shift gates by (0, 0, -3), magnitudes 0."""
    sae = GatedSAE(1, 3)
    with torch.no_grad():
        sae.W_gate.copy_(torch.tensor([[1.0, -1.0, 2.0]]))
        sae.b_gate.copy_(torch.tensor([0.0, 0.0, -3.0]))
        sae.b_mag.copy_(torch.tensor([0.0, -2.0, 0.0]))
    return sae


def test_codes_of_three_rows_by_hand(by_hand: GatedSAE) -> None:
    # pi_gate = (x, -x, 2x - 3); pi_mag = (x, -x - 2, 2x).
    #   x =  2: (2, -2, 1) -> latents 0 and 2; magnitudes 2 and 4
    #   x =  0: (0, 0, -3) -> none: an open gate is strictly above 0
    #   x = -1: (-1, 1, -5) -> latent 1, whose magnitude relu(1 - 2) is 0
    codes = encode_sparse(by_hand, torch.tensor([[2.0], [0.0], [-1.0]]))
    assert codes.row_offsets.tolist() == [0, 2, 2, 3]
    assert codes.latent.tolist() == [0, 2, 1]
    assert codes.gate.tolist() == [2.0, 1.0, 1.0]
    assert codes.magnitude.tolist() == [2.0, 4.0, 0.0]
    assert codes.rows().tolist() == [0, 0, 2]


def test_transpose_of_three_rows_by_hand() -> None:
    # Row 0 holds latents 0 and 2, row 1 none, row 2 latents 1 and 2; latent 3 never fires.
    codes = SparseCodes(
        row_offsets=torch.tensor([0, 2, 2, 4]),
        latent=torch.tensor([0, 2, 1, 2]),
        gate=torch.ones(4),
        magnitude=torch.ones(4),
    )
    entries = by_latent(codes, 4)
    assert entries.offsets.tolist() == [0, 1, 2, 4, 4]
    assert entries.row.tolist() == [0, 2, 0, 2]
    assert entries.order.tolist() == [0, 2, 1, 3]


def test_transpose_of_a_wide_dictionary_keeps_latents_beyond_sixteen_bits() -> None:
    codes = SparseCodes(
        row_offsets=torch.tensor([0, 2, 3]),
        latent=torch.tensor([3, 40_000, 2**15]),
        gate=torch.ones(3),
        magnitude=torch.ones(3),
    )
    entries = by_latent(codes, 50_000)
    assert entries.row.tolist() == [0, 1, 0]
    assert entries.offsets[2**15 : 2**15 + 2].tolist() == [1, 2]


def test_weighted_sums_by_hand() -> None:
    pool = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    # Bag 0: 2 * row 0 + 3 * row 2 = (5, 3); bag 1 is empty; bag 2: -1 * row 1 = (0, -1).
    sums = weighted_sums(
        pool, torch.tensor([0, 2, 1]), torch.tensor([2.0, 3.0, -1.0]), torch.tensor([0, 2, 2, 3])
    )
    assert sums.tolist() == [[5.0, 3.0], [0.0, 0.0], [0.0, -1.0]]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["r_mag", "none", "untied", "relu"]),
    n_rows=st.integers(0, 5),
    d_in=st.integers(1, 4),
    extra=st.integers(1, 5),
    shift=st.sampled_from([-50.0, -0.5, 0.0, 0.5, 50.0]),
    seed=st.integers(0, 2**20),
)
def test_codes_are_what_encode_computes(
    kind: str, n_rows: int, d_in: int, extra: int, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    d_sae = d_in + extra
    sae = ReluSAE(d_in, d_sae) if kind == "relu" else GatedSAE(d_in, d_sae, tie=kind)  # type: ignore[arg-type]
    sae.double()
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.5 * noise + (shift if name in ("b_gate", "b_enc") else 0.0)
    x = torch.randn(n_rows, d_in, generator=generator, dtype=torch.float64)
    codes = encode_sparse(sae, x)
    torch.testing.assert_close(dense(codes, codes.magnitude, d_sae), sae.encode(x).detach())
    if isinstance(sae, GatedSAE):
        gate = torch.relu(sae.pre_activations(x).pi_gate).detach()
        torch.testing.assert_close(dense(codes, codes.gate, d_sae), gate)
    assert (codes.gate > 0).all()


def test_codes_do_not_depend_on_where_chunks_of_rows_end() -> None:
    d_sae = 2100  # 256 rows a chunk: 600 rows are two chunks and part of a third
    assert chunk_rows(d_sae) == 256
    sae = GatedSAE(2, d_sae).double()
    with torch.no_grad():
        sae.b_gate.fill_(-2.5)
    x = torch.randn(600, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codes = encode_sparse(sae, x)
    assert codes.latent.numel() > 100
    torch.testing.assert_close(dense(codes, codes.magnitude, d_sae), sae.encode(x).detach())


def test_entries_at_the_very_edge_of_a_gate_are_those_of_the_dense_sum() -> None:
    # pi_gate = x + b: positive in exact arithmetic is positive after rounding, and the other way.
    sae = GatedSAE(1, 2)
    with torch.no_grad():
        sae.W_gate.copy_(torch.tensor([[1.0, -1.0]]))
        sae.b_gate.copy_(torch.tensor([-0.1, 0.1]))
    x = torch.tensor(0.1) + torch.arange(-3, 4)[:, None] * 2.0**-27  # neighbours of float32's 0.1
    codes = encode_sparse(sae, x)
    gate = torch.relu(sae.pre_activations(x).pi_gate).detach()
    assert torch.equal(dense(codes, codes.gate, 2), gate)
    assert codes.latent.numel() == 6


def test_another_width_is_refused_in_the_words_of_encode() -> None:
    with pytest.raises(InputError, match="expected activations of width d_in=2, got shape"):
        encode_sparse(GatedSAE(2, 3), torch.zeros(4, 5))
