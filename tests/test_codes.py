"""SparseCodes hold exactly the active entries, in rows and, transposed, by latent."""

from collections.abc import Callable

import pytest
import torch
from examples import Largest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.sparse.codes import (
    SparseCodes,
    by_latent,
    chunk_rows,
    encode_sparse,
    largest_codes,
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


KINDS: dict[str, Callable[[int, int], SAE]] = {
    "r_mag": GatedSAE,
    "none": lambda d_in, d_sae: GatedSAE(d_in, d_sae, tie="none"),
    "untied": lambda d_in, d_sae: GatedSAE(d_in, d_sae, tie="untied"),
    "relu": ReluSAE,
    "jumprelu": lambda d_in, d_sae: JumpReluSAE(d_in, d_sae, init_threshold=0.7),
    "topk": lambda d_in, d_sae: TopKSAE(d_in, d_sae, k=3 if d_sae > 3 else 1),
}


def random_sae(kind: str, d_in: int, d_sae: int, *, shift: float, seed: int) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    sae = KINDS[kind](d_in, d_sae).double()
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.5 * noise + (shift if name in ("b_gate", "b_enc") else 0.0)
            if name == "threshold":
                parameter.clamp_(min=0)
    return sae


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    n_rows=st.integers(0, 5),
    d_in=st.integers(1, 4),
    extra=st.one_of(st.integers(1, 5), st.integers(28, 70)),
    shift=st.sampled_from([-50.0, -0.5, 0.0, 0.5, 50.0]),
    seed=st.integers(0, 2**20),
)
def test_codes_are_what_encode_computes(
    kind: str, n_rows: int, d_in: int, extra: int, shift: float, seed: int
) -> None:
    d_sae = d_in + extra
    sae = random_sae(kind, d_in, d_sae, shift=shift, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(n_rows, d_in, generator=generator, dtype=torch.float64)
    codes = encode_sparse(sae, x)
    torch.testing.assert_close(dense(codes, codes.magnitude, d_sae), sae.encode(x).detach())
    if isinstance(sae, GatedSAE):
        gate = torch.relu(sae.pre_activations(x).pi_gate).detach()
        torch.testing.assert_close(dense(codes, codes.gate, d_sae), gate)
    assert (codes.gate > 0).all()
    rows, latent = codes.rows(), codes.latent
    assert ((rows[1:] > rows[:-1]) | (latent[1:] > latent[:-1])).all()


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_codes_in_half_precision_are_what_encode_computes(kind: str) -> None:
    sae = random_sae(kind, 4, 9, shift=0.0, seed=0).to(torch.bfloat16)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    codes = encode_sparse(sae, x)
    assert codes.latent.numel() > 0
    torch.testing.assert_close(dense(codes, codes.magnitude, 9), sae.encode(x).detach())


@pytest.mark.parametrize("kind", ["r_mag", "relu", "jumprelu", "topk"])
def test_no_matrix_of_tokens_by_dictionary_is_held(kind: str) -> None:
    # A quarter of the rows at a time: 256 of 1024.
    sae = random_sae(kind, 2, 2100, shift=-3.0, seed=0)
    x = torch.randn(1024, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with Largest() as seen:
        encode_sparse(sae, x)
    assert seen.numel <= 256 * 2100


def test_exactly_at_its_threshold_a_latent_is_silent() -> None:
    # z = x + 0.1 against theta: neighbours of float32's theta - 0.1 on both sides.
    sae = JumpReluSAE(1, 2, init_threshold=0.5)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 1.0]]))
        sae.b_enc.copy_(torch.tensor([0.1, 0.0]))
    theta = float(sae.threshold.detach()[0])
    x = torch.tensor([theta - 0.1, theta])[:, None] + torch.arange(-8, 9) * 2.0**-25
    x = x.reshape(-1, 1)
    codes = encode_sparse(sae, x)
    f = sae.encode(x).detach()
    assert 0 < codes.latent.numel() < f.numel()
    assert torch.equal(dense(codes, codes.magnitude, 2), f)


def test_of_equal_latents_the_lower_ones_are_kept() -> None:
    # z = 1 for the 5 even latents and 2 for one odd one: k = 3 keeps latents 0, 2 and 7.
    sae = TopKSAE(1, 10, k=3)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.copy_(torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 2, 1, -1]))
    codes = encode_sparse(sae, torch.zeros(2, 1))
    assert codes.latent.tolist() == [0, 2, 7, 0, 2, 7]
    assert codes.magnitude.tolist() == [1, 1, 2, 1, 1, 2]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    d_sae=st.integers(1, 300),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
    ascending=st.booleans(),
)
def test_the_largest_of_many_ties_are_those_of_a_stable_sort(
    d_sae: int, share: float, seed: int, ascending: bool
) -> None:
    # Ten values for up to 300 latents: nearly all of them tie, most below and some above zero.
    z = torch.randint(-3, 7, (1, d_sae), generator=torch.Generator().manual_seed(seed)).float()
    if ascending:  # each one exceeds all before it: the list of candidates overflows the most often
        z = z.sort().values
    k = max(1, round(share * d_sae))
    (found,) = largest_codes(torch.ones(1, 1), z, [(torch.zeros(d_sae), k)])
    order = z[0].sort(descending=True, stable=True).indices[:k]
    wanted = order[z[0][order] > 0].sort().values
    assert torch.equal(found.latent, wanted)
    assert torch.equal(found.magnitude, z[0][wanted])


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
