"""A look at a few latents: which ones, where they fire, in whose words."""

from functools import partial
from typing import Any

import pytest
import torch
from tiny_runs import N_STEPS, finish
from tokenizers_of_each_kind import byte_level

from gsae_core.errors import InputError
from gsae_core.lm.model import LanguageModel
from gsae_core.lm.texts import token_texts
from gsae_core.runs.run import Run
from gsae_core.runs.work import samples
from gsae_core.runs.work.samples import TOKEN_LENGTH, activations, choose, firings, texts_in
from gsae_core.sae.architectures import GatedSAE, ReluSAE

X = torch.tensor([[1.0, 0.0, 2.0], [0.4, 0.0, 0.7], [0.9, 0.0, 0.6]])


@pytest.mark.parametrize("at_once", [1, 2**22])
def test_firings_are_counted_over_the_tokens(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "ENCODED_AT_ONCE", at_once)
    # Latent i is what input i exceeds 1/2 by.
    sae = ReluSAE(3, 3)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.b_enc.fill_(-0.5)
        sae.b_dec.zero_()
    # Above 1/2: tokens 0 and 2, none, all three.
    assert firings(sae, X).tolist() == [2, 0, 3]
    f = activations(sae, X, [2, 0])
    torch.testing.assert_close(f, torch.tensor([[1.5, 0.5], [0.2, 0.0], [0.1, 0.4]]))


def test_a_gate_that_opens_onto_nothing_is_no_firing() -> None:
    sae = GatedSAE(1, 2)
    with torch.no_grad():
        sae.W_gate.fill_(1.0)
        sae.b_dec.zero_()
        sae.b_gate.zero_()
        sae.b_mag.copy_(torch.tensor([-2.0, 0.0]))
    # pi_gate = 1 in both latents; magnitudes are relu(1 - 2) and relu(1).
    assert firings(sae, torch.ones(1, 1)).tolist() == [0, 1]


def test_the_densest_and_some_living_ones_are_chosen_and_none_twice() -> None:
    fired = torch.tensor([0, 5, 0, 1, 9, 2, 3, 4])
    chosen = choose(fired, seed=0)
    assert [i for i, how in chosen if how == "densest"] == [4, 1]
    random = [i for i, how in chosen if how == "random"]
    assert sorted(random) == [3, 5, 6, 7]  # all that live beside them, and not 0 and 2
    assert choose(fired, seed=0) == chosen


def test_the_same_latents_are_shown_while_they_live() -> None:
    fired = torch.arange(1, 101)
    before = [i for i, how in choose(fired, seed=3) if how == "random"]
    fired[before[0]] = 0
    after = [i for i, how in choose(fired, seed=3) if how == "random"]
    assert after[:-1] == before[1:]


def test_nothing_is_chosen_where_all_are_dead() -> None:
    assert choose(torch.zeros(4, dtype=torch.int64), seed=0) == []


def test_a_very_long_token_is_cut_short() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["x" * 10_000])
    ids = [len(tokenizer) - 1, *tokenizer.encode("the", add_special_tokens=False)]
    texts_of = partial(token_texts, tokenizer)
    assert texts_in(texts_of, ids, 0, 2) == ["x" * TOKEN_LENGTH + "…", "the"]


def test_the_rest_of_a_character_at_the_edge_of_a_look_is_known_from_beyond_it() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("the😀 the", add_special_tokens=False)
    assert texts_in(partial(token_texts, tokenizer), ids, 0, 2) == ["the", "😀"]
    assert texts_in(partial(token_texts, tokenizer), ids, 2, 6) == ["", "", "", " the"]


@pytest.fixture
def sampled(tiny_trained: tuple[Run, Any]) -> Run:
    return tiny_trained[0]


def test_a_run_ends_with_a_sample_of_every_sae(sampled: Run) -> None:
    found = sampled.samples()
    assert found is not None
    # A look every 30 / 20 steps would be more often than it may.
    assert (found["step"], found["every"]) == (N_STEPS, 10)
    assert set(found["saes"]) == {"gated", "relu"}
    for sae in found["saes"].values():
        assert sae["latents"]
        for latent in sae["latents"]:
            for example in latent["examples"]:
                assert example["values"][example["at"]] > 0
                assert len(example["tokens"]) == len(example["values"]) <= 13
        firsts = [latent["examples"][0] for latent in sae["latents"] if latent["examples"]]
        assert all(example["values"][example["at"]] == max(example["values"]) for example in firsts)


def test_values_are_those_of_the_saved_sae_on_raw_activations(
    sampled: Run, tiny_lm: LanguageModel
) -> None:
    from gsae_core.checkpoints.checkpoint import load_sae
    from gsae_core.lm.corpus import load_corpus

    found = sampled.samples()
    assert found is not None
    corpus = load_corpus(sampled.config.data, tiny_lm.tokenizer, n_tokens=480, model_n_ctx=16)
    ids, mask = corpus.held_out[:]
    x = tiny_lm.harvest(ids, layer=1, site="resid_pre")[mask]
    for name in ("gated", "relu"):
        f = load_sae(sampled.sae_folder(name)).encode(x).detach()
        latent = found["saes"][name]["latents"][-1]
        column = f[:, latent["latent"]]
        assert latent["fired"] == int((column > 0).sum())
        top = latent["examples"][0]
        assert top["values"][top["at"]] == pytest.approx(float(column.max()), rel=1e-3)


def test_a_full_disk_costs_the_sample_and_not_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise InputError("expected 1 kB free, found 0 bytes")

    monkeypatch.setattr(samples, "write_json", full)
    finish(run)
    assert run.status.state == "finished"
    assert "no sample of latents: expected 1 kB free" in "\n".join(run.log_tail(200))
    assert run.samples() is None
