"""JumpReLU and TopK SAEs from the first step to the evaluation, beside the other two."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from examples import batch_stats, perturb_
from torch import Tensor

from gsae_core.analysis.fidelity import reconstruct
from gsae_core.checkpoints.checkpoint import load_sae, read_cfg
from gsae_core.cli.main import main
from gsae_core.config import TrainConfig
from gsae_core.runs.run import Run
from gsae_core.sae.ablations import pursue
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.metrics import Metrics
from gsae_core.sae.sparse.codes import encode_sparse
from gsae_core.training.trainer import Trainer, train

BATCH, D_IN, N_TRUE = 128, 16, 32
MAKE: dict[str, Callable[[], SAE]] = {
    "jumprelu": lambda: JumpReluSAE(D_IN, 40, init_threshold=0.1, bandwidth=0.1),
    "topk": lambda: TopKSAE(D_IN, 40, k=3),
}


def sparse_batches(n: int) -> list[Tensor]:
    """Sums of about two of 32 directions in 16 dimensions, each 0.5 to 1.5 long."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(N_TRUE, D_IN, generator=generator)
    atoms /= atoms.norm(dim=1, keepdim=True)
    shape = (n, BATCH, N_TRUE)
    heights = 0.5 + torch.rand(shape, generator=generator)
    here = torch.rand(shape, generator=generator) < 0.06
    return list((heights * here) @ atoms / 1.4)


def config(n_steps: int, sparsity: float, **changes: float) -> TrainConfig:
    fields: dict[str, object] = {
        "n_tokens": n_steps * BATCH,
        "batch_size": BATCH,
        "lr": 0.01,
        "lr_warmup_steps": 10,
        "sparsity": (sparsity,),
        "revive_every": 0,
    }
    return TrainConfig.model_validate(fields | changes)


def measured(sae: SAE, batches: list[Tensor]) -> Metrics:
    x = torch.cat(batches)
    with torch.no_grad():
        f, x_hat = sae.encode(x), sae(x)
    return Metrics(batch_stats(x=x, x_hat=x_hat, f=f))


def test_a_threshold_rises_until_its_latents_are_few_and_shrinks_nothing() -> None:
    batches = sparse_batches(240)
    sae = MAKE["jumprelu"]()
    before = measured(sae, batches[-40:])
    list(train([sae], batches[:200], config(200, 0.02)))
    after = measured(sae, batches[-40:])
    assert isinstance(sae, JumpReluSAE)
    assert after.l0 < before.l0 / 3
    assert sae.threshold.mean().item() > 0.11  # it began at 0.1
    assert after.fvu < 0.2
    assert after.gamma == pytest.approx(1, abs=0.03)


def test_topk_learns_within_its_k() -> None:
    batches = sparse_batches(240)
    sae = MAKE["topk"]()
    before = measured(sae, batches[-40:])
    list(train([sae], batches[:200], config(200, 0.0)))
    after = measured(sae, batches[-40:])
    assert after.l0 <= 3
    assert after.fvu < min(0.3, before.fvu / 2)


def test_dead_latents_are_those_that_the_trainer_counts() -> None:
    sae = MAKE["topk"]()
    with torch.no_grad():
        sae.get_parameter("b_enc")[:20] = -100.0  # so that they leave the whole error unexplained
    reports = train([sae], sparse_batches(8), config(8, 0.0, revive_window=4, lr=1e-9))
    saes = [report.saes[0] for report in reports]
    auxiliary = [float(each.loss.auxiliary) for each in saes if each.loss is not None]
    error = [float(each.loss.reconstruction) for each in saes if each.loss is not None]
    # A step hears of the latents that were silent in the four before it.
    assert auxiliary[:4] == [0, 0, 0, 0]
    assert auxiliary[4:] == pytest.approx([each / 32 for each in error[4:]])
    assert [each.dead_fraction for each in saes][2:4] == [0, 0.5]


@pytest.mark.parametrize("kind", MAKE)
def test_resumed_from_its_state_an_sae_ends_with_the_same_bits(kind: str) -> None:
    batches = sparse_batches(30)
    cfg = config(30, 0.02, revive_every=10, revive_window=3)
    whole, part, rest = MAKE[kind](), MAKE[kind](), MAKE[kind]()
    for sae in (whole, part):
        with torch.no_grad():
            sae.get_parameter("b_enc")[:5] = -9.0  # dead, resampled after step 10
    reports = list(train([whole], batches, cfg))
    assert sum(report.saes[0].n_resampled for report in reports) >= 5
    first = Trainer([part], cfg)
    for x in batches[:12]:
        first.step(x)
    second = Trainer([rest], cfg)
    second.load_state_dict(first.state_dict())
    list(train([rest], batches[12:], cfg, trainer=second))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, rest.get_parameter(name)), name


def test_four_architectures_learn_side_by_side_as_alone() -> None:
    batches = sparse_batches(10)
    makers: list[Callable[[], SAE]] = [
        lambda: GatedSAE(D_IN, 20),
        lambda: ReluSAE(D_IN, 30),
        *MAKE.values(),
    ]
    together = [make() for make in makers]
    list(train(together, batches, config(10, 0.1)))
    for make, sae in zip(makers, together, strict=True):
        alone = make()
        list(train([alone], batches, config(10, 0.1)))
        for name, parameter in sae.named_parameters():
            assert torch.equal(parameter, alone.get_parameter(name)), name


# Codes and evaluation


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_codes_hold_what_encode_computes(kind: str, rows: int) -> None:
    sae, x = MAKE[kind](), torch.cat(sparse_batches(6))[:rows]
    perturb_(sae)
    codes = encode_sparse(sae, x)
    f = torch.zeros(rows, 40)
    f[codes.rows(), codes.latent] = codes.magnitude
    assert torch.equal(f, sae.encode(x).detach())
    assert (codes.magnitude > 0).all()
    assert torch.equal(codes.gate, codes.magnitude)
    assert (codes.latent.diff() > 0)[codes.rows().diff() == 0].all()  # ascending within a row


@pytest.mark.parametrize("kind", MAKE)
def test_metrics_of_an_evaluation_are_those_of_the_dense_definition(kind: str) -> None:
    sae, x = MAKE[kind](), torch.cat(sparse_batches(2))
    perturb_(sae)
    with torch.no_grad():
        f, dense_x_hat = sae.encode(x), sae(x)
    stats = batch_stats(x=x, x_hat=dense_x_hat, f=f, W_dec=sae.W_dec)
    x_hat, sums = reconstruct(sae, x)
    ours, wanted = Metrics(sums), Metrics(stats)
    torch.testing.assert_close(x_hat, dense_x_hat)
    for name in ("l0", "fvu", "gamma", "cosine", "alive_fraction"):
        assert getattr(ours, name) == pytest.approx(getattr(wanted, name), rel=1e-5), name
    assert math.isnan(ours.gamma_gate)
    assert torch.equal(ours.firings, wanted.firings)
    torch.testing.assert_close(
        ours.gamma_per_feature, wanted.gamma_per_feature, rtol=1e-3, atol=1e-4, equal_nan=True
    )


@pytest.mark.parametrize("kind", MAKE)
def test_latents_are_pursued_for_their_dictionaries_too(kind: str) -> None:
    sae, x = MAKE[kind](), sparse_batches(1)[0]
    alpha = pursue(sae, x, k=4)
    with torch.no_grad():
        assert (x - sae.decode(alpha)).square().sum() < 0.5 * x.square().sum()
    assert (alpha > 0).sum(1).max() <= 4


# From the command line


def test_a_sweep_of_all_four_ends_evaluated(
    tiny_lm_folder: Path, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    words = (
        "--layer 1 --site mlp_hidden --arch gated relu jumprelu topk --sparsity 0.05 "
        "--jumprelu-sparsity 0.01 --k 2 4 --bandwidth 0.05 --init-threshold 0.02 --width 12 "
        "--tokens 800 --batch-size 16 --eval-tokens 64 --lr-warmup-steps 2 --device cpu "
        "--sparsity-warmup-steps 10 --revive-every 20 --revive-window 5"
    )
    model, data = str(tiny_lm_folder), str(small_text)
    argv = ["train", "--model", model, "--data", data, "--out", str(folder), *words.split()]
    assert main(argv) == 0
    run = Run.open(folder)
    assert (run.status.state, run.status.step) == ("finished", 50)
    rows = {row["name"]: row for row in run.evals()}
    assert {name: (row["architecture"], row["d_sae"]) for name, row in rows.items()} == {
        "gated-0.05": ("gated", 12),
        "relu-0.05": ("relu", 18),
        "jumprelu-0.01": ("jumprelu", 12),
        "topk-2": ("topk", 12),
        "topk-4": ("topk", 12),
    }
    for name in ("jumprelu-0.01", "topk-2", "topk-4"):
        assert rows[name]["gamma_gate"] is None
        assert all(math.isfinite(rows[name][key]) for key in ("l0", "fvu", "gamma", "kl"))
        assert len(run.feature_stats(name)) == 12
    assert 0 < rows["topk-2"]["l0"] <= 2
    assert 2 < rows["topk-4"]["l0"] <= 4
    assert (rows["topk-4"]["sparsity"], rows["jumprelu-0.01"]["sparsity"]) == (4, 0.01)
    logged = [row for row in run.metrics() if row["sae"] == "topk-4"]
    assert {(row["sparsity_loss"], row["sparsity_coeff"]) for row in logged} == {(0, 0)}

    jumprelu, topk = load_sae(run.sae_folder("jumprelu-0.01")), load_sae(run.sae_folder("topk-4"))
    assert isinstance(jumprelu, JumpReluSAE)
    assert isinstance(topk, TopKSAE)
    assert topk.k == 4
    metadata = read_cfg(run.sae_folder("jumprelu-0.01"))["metadata"]
    scale = metadata["activation_scale"]
    # Of the length of raw activations, as the first batch of 16 had it.
    assert (jumprelu.init_threshold, jumprelu.bandwidth) == (0.02, 0.05)
    assert metadata["threshold_unit"] == pytest.approx(1 / scale, rel=0.2)
    assert jumprelu.eps == pytest.approx(0.05 * metadata["threshold_unit"])
    assert metadata["sparsity_coeff_raw"] == pytest.approx(0.01 / scale**2)
    assert json.loads((folder / "config.json").read_text())["saes"][2]["bandwidth"] == 0.05
