"""A sparse start, by hand: the centre, and how many latents fire on how many inputs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import finish, leave_at, outcome, tiny_config

from gsae_core.errors import InputError
from gsae_core.files import read_json
from gsae_core.runs.run import Run
from gsae_core.runs.work.finetune import finetuned_config
from gsae_core.runs.work.setup import set_up
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.training.dead_latents import resample_
from gsae_core.training.optimizer import DictionaryAdam
from gsae_core.training.start import geometric_median, sparse_biases_, start_

SAES: dict[str, Callable[..., SAE]] = {
    "gated": GatedSAE,
    "untied": lambda d_in, d_sae: GatedSAE(d_in, d_sae, tie="untied"),
    "relu": ReluSAE,
    "jumprelu": JumpReluSAE,
}


def test_biases_by_hand() -> None:
    sae = ReluSAE(1, 2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, -2.0]]))
    x = torch.tensor([[0.0], [1.0], [2.0], [5.0]])
    start_(sae, x, n_firing=1)
    # 1 of 2 latents is half of the vectors, so each fires on 2 of the 4, less the mean of 2:
    # z = -2 -1 0 3 and 4 2 0 -6, the largest two of which lie above -1 and above 0.
    assert sae.b_dec.tolist() == [2.0]
    assert sae.b_enc.tolist() == [1.0, 0.0]
    assert sae.encode(x).tolist() == [[0, 4], [0, 2], [1, 0], [4, 0]]


def test_the_fewest_that_a_latent_fires_on_is_one() -> None:
    sae, x = ReluSAE(2, 4), torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    start_(sae, x, n_firing=0)
    assert (sae.encode(x) > 0).sum(0).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", SAES)
def test_every_latent_fires_on_as_many_vectors_as_it_should(kind: str) -> None:
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
    sae = SAES[kind](16, 128)
    before = (sae.encode(x) > 0).float().sum(1).mean()
    start_(sae, x, n_firing=8)
    fires = (sae.encode(x) > 0).sum(0)
    # 8 of 128 is 32 of 512; a vector at the edge itself may fall to either side by rounding.
    assert fires.sub(32).abs().max() <= 1
    assert before > 50
    if isinstance(sae, GatedSAE):
        assert torch.equal(sae.b_gate, sae.b_mag)


def test_a_topk_sae_takes_the_mean_alone() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    sae = TopKSAE(2, 4, k=1)
    start_(sae, x)
    assert sae.b_dec.tolist() == [2.0, 1.0]
    assert not sae.b_enc.any()


def test_outliers_do_not_move_the_centre() -> None:
    x = torch.cat([torch.tensor([[1.0, 0.0], [3.0, 0.0]]).repeat(8, 1), torch.tensor([[1e4, 0.0]])])
    sae = ReluSAE(2, 4)
    start_(sae, x)
    assert sae.b_dec.tolist() == [2.0, 0.0]


def test_outliers_do_not_count_among_those_a_latent_fires_on() -> None:
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    x[::16] = 1000.0  # 32 of them, on which every second latent fires
    sae = GatedSAE(16, 128)
    start_(sae, x, n_firing=8)
    fires = (sae.encode(x)[x[:, 0] < 1000] > 0).sum(0)
    assert fires.sub(480 * 8 // 128).abs().max() <= 1


def test_the_geometric_median_of_a_line_is_its_median() -> None:
    x = torch.tensor([[0.0], [1.0], [8.0]])
    assert geometric_median(x).item() == pytest.approx(1.0, abs=1e-3)
    sae = ReluSAE(1, 2)
    start_(sae, x, start="sparse_median")
    assert sae.b_dec.item() == pytest.approx(1.0, abs=1e-3)


def test_zero_changes_nothing_and_one_vector_is_too_few() -> None:
    sae = ReluSAE(2, 4)
    start_(sae, torch.ones(3, 2), start="zero")
    assert not sae.b_dec.any()
    with pytest.raises(
        InputError, match="expected two activations or more to start from, got 1; give"
    ):
        start_(sae, torch.ones(1, 2))


@pytest.mark.parametrize("kind", SAES)
def test_revived_latents_are_as_sparse(kind: str) -> None:
    pool = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)) + 1
    sae, dead = SAES[kind](4, 8), torch.tensor([2, 5])
    sparse_biases_(sae, pool, torch.arange(8), n_firing=1)
    adam = DictionaryAdam(sae, beta1=0.0, beta2=0.999)
    biases = [p for name, p in sae.named_parameters() if name in ("b_gate", "b_mag", "b_enc")]
    kept = [bias.detach().clone() for bias in biases]
    resample_(sae, adam, dead=dead, pool=pool, seed=0, start="sparse")
    # 64 latents of 8 are more than all: half of them fire on an input.
    assert (sae.encode(pool)[:, dead] > 0).sum(0).sub(32).abs().max() <= 1
    others = torch.tensor([0, 1, 3, 4, 6, 7])
    for bias, old in zip(biases, kept, strict=True):
        assert torch.equal(bias[others], old[others])


@pytest.mark.usefixtures("one_thread")
def test_a_run_starts_sparse_and_resumes_to_its_bits(
    tmp_path: Path, tiny_lm_folder: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsae_core.training.start.N_FIRING", 3)
    cfg = tiny_config(tiny_lm_folder, words, checkpoint_minutes=60)
    recipe = cfg.train.model_copy(update={"start": "sparse"})
    cfg = cfg.model_copy(update={"train": recipe})
    whole, parts = (Run.create(tmp_path / name, cfg) for name in ("whole", "parts"))
    finish(whole)
    leave_at(parts, 12)  # past a revival
    finish(parts)
    assert outcome(parts) == outcome(whole)
    first = {row["sae"]: row["l0"] for row in reversed(whole.metrics())}
    assert first["gated"] < 6 > first["relu"]
    assert read_json(whole.folder / "config.json")["train"]["start"] == "sparse"
    tuned = finetuned_config(whole, ["gated"], n_tokens=64)
    assert tuned.train.start == "sparse"  # of what is revived


def test_what_a_run_leaves_out_has_no_part_in_its_start(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_config(Path("lm"), Path("text")).train.model_copy(update={"start": "sparse"})
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        "gsae_core.runs.work.setup.start_", lambda sae, x, start: seen.append(x.norm(dim=1))
    )
    parts = set_up(new_run("ratio", train=recipe, max_norm_ratio=1.2))
    (limit,), (scale,) = parts.stream.limits, parts.stream.scales
    assert float(parts.stream.first(100)[0].norm(dim=1).max()) > limit
    assert all(float(norms.max()) <= limit * scale * 1.0001 for norms in seen)
    assert len(seen) == 2
