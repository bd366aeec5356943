"""TopK SAEs: which latents are kept, and what the auxiliary loss asks of the dead ones."""

from typing import Any

import pytest
import torch
from examples import loss, numbers, perturb_, set_, slopes
from refusals import refusal

from gsae_core.errors import InputError
from gsae_core.sae.architectures import TopKSAE, fold_scale_
from gsae_core.sae.losses import dense_step

X = torch.tensor([[3.0, 1.0]], dtype=torch.float64)


def worked_example(k: int = 2, k_aux: int | None = None) -> TopKSAE:
    """Four latents in the plane on x = (3, 1), that is, xc = (2, 1): z = (2, 1, 3, -1)."""
    sae = TopKSAE(2, 4, k=k, k_aux=k_aux).double()
    set_(
        sae,
        W_enc=[[1, 0, 1, 0], [0, 1, 1, -1]],
        b_enc=[0, 0, 0, 0],
        W_dec=[[0.6, 0.8], [1, 0], [0, 1], [0, -1]],
        b_dec=[1, 0],
    )
    return sae


def random_topk(**options: Any) -> TopKSAE:
    sae = TopKSAE(4, 9, k=3, **options).double()
    perturb_(sae)
    return sae


def dead(*latents: int, d_sae: int = 4) -> torch.Tensor:
    mask = torch.zeros(d_sae, dtype=torch.bool)
    mask[list(latents)] = True
    return mask


def test_the_k_largest_latents_of_a_token_are_kept() -> None:
    sae = worked_example(k=2)
    assert sae.pre_activations(X).tolist() == [[2, 1, 3, -1]]
    assert sae.encode(X).tolist() == [[2, 0, 3, 0]]
    assert sae(X)[0].tolist() == pytest.approx([2.2, 4.6])  # 2 (0.6, 0.8) + 3 (0, 1) + (1, 0)


def test_a_negative_latent_stays_silent_even_among_the_k_largest() -> None:
    assert worked_example(k=4).encode(X).tolist() == [[2, 1, 3, 0]]


def test_no_token_has_more_than_k_latents() -> None:
    f = random_topk().encode(numbers(3, 50, 4))
    assert f.shape == (3, 50, 9)
    assert (f > 0).sum(-1).max() == 3
    assert (f >= 0).all()


def test_training_starts_from_unit_directions() -> None:
    sae = TopKSAE(4, 7, k=2, seed=3)
    assert sae.W_dec.norm(dim=1).tolist() == pytest.approx([1] * 7)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.b_enc.count_nonzero() == 0
    assert sae.k_aux == 2  # half of d_in


# The loss


def test_the_loss_is_the_squared_error_where_no_latent_is_dead() -> None:
    # x_hat = (2.2, 4.6): 0.8^2 + 3.6^2 = 0.64 + 12.96
    for mask in (None, dead()):
        parts = loss(worked_example(), X, sparsity_coeff=0.0, dead=mask)
        assert [term.item() for term in parts] == pytest.approx([13.6, 0, 0])


def test_dead_latents_are_asked_for_what_the_others_leave() -> None:
    # e = x - x_hat = (0.8, -3.6). Dead: latents 1 (z = 1) and 3 (z = -1, so silent); k_aux = 1
    # takes latent 1: e_hat = (1, 0), |e - e_hat|^2 = 0.04 + 12.96 = 13, over 32.
    parts = loss(worked_example(k_aux=1), X, sparsity_coeff=0.0, dead=dead(1, 3))
    assert parts.auxiliary.item() == pytest.approx(13 / 32)
    assert parts.total.item() == pytest.approx(13.6 + 13 / 32)


def test_the_largest_dead_latents_are_heard_and_all_of_them_if_they_are_few() -> None:
    # Dead: 0 (z = 2) and 1 (z = 1). e_hat = 2 (0.6, 0.8) with k_aux = 1; + (1, 0) with more.
    # e = (0.8, -3.6) whoever is dead: (-0.4)^2 + 5.2^2 = 27.2; (-1.4)^2 + 5.2^2 = 29.
    for k_aux, wanted in ((1, 27.2), (2, 29), (3, 29)):
        auxiliary = loss(
            worked_example(k_aux=k_aux), X, sparsity_coeff=0.0, dead=dead(0, 1)
        ).auxiliary
        assert auxiliary.item() == pytest.approx(wanted / 32)


def test_the_auxiliary_gradient_by_hand() -> None:
    # Latent 1 alone: e_hat - e = (1 - 0.8, 3.6) = (0.2, 3.6).
    # d z_1 = 2 / 32 (0.2, 3.6) . d_1 = 0.0125; d W_dec_1 = 2 / 32 z_1 (0.2, 3.6).
    # xc = (2, 1), so W_enc's column is 0.0125 (2, 1), and b_dec hears it through xc alone:
    # -0.0125 W_enc_1 = -0.0125 (0, 1).
    sae = worked_example(k_aux=1)
    loss(sae, X, sparsity_coeff=0.0, dead=dead(1)).auxiliary.backward()
    grads = {name: p.grad for name, p in sae.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    wanted = {
        "W_dec": [[0, 0], [0.0125, 0.225], [0, 0], [0, 0]],
        "W_enc": [[0, 0.025, 0, 0], [0, 0.0125, 0, 0]],
        "b_enc": [0, 0.0125, 0, 0],
        "b_dec": [0, -0.0125],
    }
    for name, values in wanted.items():
        expected = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(grads[name], expected, msg=name)


def test_the_auxiliary_term_moves_no_living_latent() -> None:
    sae, x = random_topk(), numbers(30, 4)
    mask = dead(2, 5, d_sae=9)
    auxiliary = loss(sae, x, sparsity_coeff=0.0, dead=mask).auxiliary
    W_dec, W_enc, b_enc = torch.autograd.grad(auxiliary, [sae.W_dec, sae.W_enc, sae.b_enc])
    assert W_dec[~mask].count_nonzero() == W_enc[:, ~mask].count_nonzero() == 0
    assert b_enc[~mask].count_nonzero() == 0
    assert W_dec[mask].count_nonzero() > 0


def test_the_gradient_is_the_true_one_where_the_order_of_latents_is_kept() -> None:
    sae, x, mask = random_topk(), numbers(6, 4), dead(2, 5, d_sae=9)
    with torch.no_grad():
        sae.b_enc[mask] -= 9.0  # far below the k largest; nothing of theirs changes the error
        sae.b_enc[~mask] += 9.0
    dense_step(sae, x, sparsity_coeff=0.0, dead=mask)
    for name in ("W_enc", "b_enc", "W_dec"):
        parameter = sae.get_parameter(name)
        found = slopes(parameter, lambda: loss(sae, x, sparsity_coeff=0.0).reconstruction.item(), 6)
        assert parameter.grad is not None
        assert parameter.grad.view(-1)[:6].tolist() == pytest.approx(found, abs=1e-5), name


def test_a_step_has_no_use_for_lambda_and_leaves_statistics_without_a_gate() -> None:
    sae, x = random_topk(), numbers(30, 4)
    result = dense_step(sae, x, sparsity_coeff=1e6)
    assert result.loss.total.item() == loss(sae, x, sparsity_coeff=0.0).total.item()
    assert all(p.grad is not None for p in sae.parameters())
    assert result.stats.fired.sum() == (sae.encode(x) > 0).sum()
    assert result.stats.gate_open is None
    assert not result.loss.total.requires_grad


def test_a_folded_scale_keeps_the_order_of_latents() -> None:
    sae, x = random_topk(), numbers(30, 4)
    f, x_hat = sae.encode(4 * x), sae(4 * x)
    fold_scale_(sae, 4.0)
    torch.testing.assert_close(sae.encode(x), f / 4)
    torch.testing.assert_close(sae(x), x_hat / 4)


# Mistakes


@pytest.mark.parametrize("k", [0, -1, 8])
def test_k_is_one_to_all_latents(k: int) -> None:
    assert refusal(TopKSAE, 4, 7, k=k) == (
        f"expected k, latents of a token, from 1 to d_sae=7, got {k}"
    )


def test_the_auxiliary_loss_needs_a_latent_to_listen_to() -> None:
    with pytest.raises(InputError, match=r"^expected k_aux of at least 1, got 0$"):
        TopKSAE(4, 7, k=2, k_aux=0)


def test_a_batch_of_another_width_is_refused() -> None:
    with pytest.raises(InputError, match=r"width d_in=4, got shape \(2, 5\)"):
        dense_step(TopKSAE(4, 7, k=2), torch.zeros(2, 5), sparsity_coeff=0.0)
