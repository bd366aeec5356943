"""A text through an SAE: every number of it redone by another way."""

import math
from typing import Any

import pandas as pd
import pytest
import torch
from app_pages import NASTY
from examples import perturb_, set_
from families import CONFIGS, tiny
from torch.nn import functional as F

from gsae_core.analysis.prompt import (
    MAX_CHARACTERS,
    Prompt,
    PromptAnalysis,
    align,
    analyse,
    best_matches,
    candidates,
    effects,
    read_prompt,
)
from gsae_core.errors import InputError
from gsae_core.lm.model import LanguageModel, Splice, load_model, logit_slope
from gsae_core.lm.texts import token_texts
from gsae_core.sae.architectures import GatedSAE, ReluSAE
from gsae_core.sae.base import SAE

PLACE: dict[str, Any] = {"layer": 1, "site": "resid_pre"}
TEXT = "w1 w2 w3 w2 w9 w30"


@pytest.fixture(scope="module")
def gated() -> GatedSAE:
    sae = GatedSAE(12, 24)
    perturb_(sae)
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def relu() -> ReluSAE:
    sae = ReluSAE(12, 20, seed=3)
    perturb_(sae, seed=4)
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def prompt(tiny_lm: LanguageModel) -> Prompt:
    return read_prompt(tiny_lm, TEXT)


@pytest.fixture(scope="module")
def looks(tiny_lm: LanguageModel, gated: SAE, relu: SAE, prompt: Prompt) -> list[PromptAnalysis]:
    return analyse(tiny_lm, [gated, relu], prompt, **PLACE)


@pytest.fixture(scope="module")
def bundled() -> LanguageModel:
    return load_model("bundled")


# Text as tokens


def test_a_text_becomes_tokens_behind_bos(prompt: Prompt) -> None:
    assert prompt.ids.tolist() == [[0, 3, 4, 5, 4, 11, 32]]  # w0 is id 2
    assert prompt.tokens == ("<|endoftext|>", "w1", " w2", " w3", " w2", " w9", " w30")
    assert prompt.counted.tolist() == [False] + [True] * 6
    assert (prompt.n_unknown, prompt.n_left_out) == (0, 0)


def test_a_text_without_bos_starts_with_its_first_token(tiny_lm: LanguageModel) -> None:
    assert read_prompt(tiny_lm, "w1", bos=False).ids.tolist() == [[3]]


def test_words_the_tokenizer_lacks_are_counted(tiny_lm: LanguageModel) -> None:
    prompt = read_prompt(tiny_lm, "w1 漢字 w2 слово")
    assert prompt.n_unknown == 2
    assert prompt.tokens[1:] == ("w1", " <unk>", " w2", " <unk>")


def test_a_byte_level_tokenizer_knows_every_alphabet(bundled: LanguageModel) -> None:
    prompt = read_prompt(bundled, "漢 é")
    assert prompt.n_unknown == 0
    # 漢 is three bytes, é two; GPT-2's words carry the space in front.
    assert prompt.tokens[1:] == ("漢", "", "", " ", "é", "")


def test_a_lone_byte_of_a_character_stays_what_it_is(bundled: LanguageModel) -> None:
    first = read_prompt(bundled, "漢").ids[0, 1]
    assert token_texts(bundled.tokenizer, [int(first), 5]) == ["\ufffd", "%"]


def test_a_long_text_is_cut_to_the_context_and_says_so(tiny_lm: LanguageModel) -> None:
    prompt = read_prompt(tiny_lm, "w1 " * 40)
    assert (len(prompt.tokens), prompt.n_left_out) == (16, 41 - 16)


@pytest.mark.parametrize("nasty", [*NASTY, "\x00", "\ud800 half of a pair", "\u200b"])
def test_hostile_text_is_text(bundled: LanguageModel, gated: SAE, nasty: str) -> None:
    prompt = read_prompt(bundled, nasty)
    assert len(prompt.tokens) == prompt.ids.shape[1]
    typed = nasty.encode("utf-8", "replace").decode()
    read = "".join(prompt.tokens[1:])
    assert read == (typed if not prompt.n_left_out else typed[: len(read)])


def test_two_megabytes_are_refused(tiny_lm: LanguageModel) -> None:
    with pytest.raises(
        InputError, match=r"at most 20,000 characters, got 2,000,000; paste the pas"
    ):
        read_prompt(tiny_lm, "w1 a b c " * (2_000_000 // 9) + "w1")
    assert MAX_CHARACTERS == 20_000


@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_no_text_is_refused(tiny_lm: LanguageModel, text: str) -> None:
    with pytest.raises(InputError, match="expected some text with words, got none; type"):
        read_prompt(tiny_lm, text)


def test_special_tokens_alone_are_refused(
    tiny_lm: LanguageModel, gated: SAE, prompt: Prompt
) -> None:
    alone = read_prompt(tiny_lm, "<|endoftext|>")
    with pytest.raises(InputError, match="a token that is no special one, got none; add some"):
        analyse(tiny_lm, [gated], alone, **PLACE)


# What fires


def test_features_are_those_the_encoder_gives(
    tiny_lm: LanguageModel, gated: GatedSAE, looks: list[PromptAnalysis], prompt: Prompt
) -> None:
    x = tiny_lm.harvest(prompt.ids, **PLACE)[0]
    f, pi_gate = gated.encode(x), gated.pre_activations(x).pi_gate
    f[0] = 0  # BOS is not read
    table: Any = looks[0].features
    assert len(table) == int((f > 0).sum())
    for row in table.itertuples():
        assert row.activation == pytest.approx(float(f[row.position, row.latent]), rel=1e-4)
        assert row.gate == pytest.approx(float(pi_gate[row.position, row.latent]), rel=1e-3)
        assert row.token == prompt.tokens[row.position]
    assert set(looks[1].features["gate"].isna()) == {True}


def test_strongest_features_come_first_on_each_token(looks: list[PromptAnalysis]) -> None:
    for _, here in looks[0].features.groupby("position"):
        assert here["activation"].is_monotonic_decreasing


def test_a_token_s_shares_add_up_to_one(looks: list[PromptAnalysis]) -> None:
    sums: Any = looks[0].features.groupby("position")["share"].sum()
    assert sums.to_list() == pytest.approx([1.0] * len(sums), abs=1e-4)


def test_a_share_by_hand(tiny_lm: LanguageModel) -> None:
    # Two features write (3, 0, ...) and (0, 4, ...): 9 / 25 and 16 / 25 of the square of (3, 4).
    sae = ReluSAE(12, 2)
    unit = torch.eye(12)[:2].tolist()
    zeros = [[0.0, 0.0]] * 12
    set_(sae, W_enc=zeros, b_enc=[3.0, 4.0], W_dec=unit, b_dec=[0.0] * 12)
    (seen,) = analyse(tiny_lm, [sae], read_prompt(tiny_lm, "w1"), **PLACE)
    assert seen.features["share"].to_list() == pytest.approx([16 / 25, 9 / 25])
    assert seen.features["latent"].to_list() == [1, 0]


def test_numbers_of_the_text_are_those_of_its_parts(
    tiny_lm: LanguageModel, gated: SAE, looks: list[PromptAnalysis], prompt: Prompt
) -> None:
    found, x = looks[0].numbers, tiny_lm.harvest(prompt.ids, **PLACE)
    inside = x[0, 1:]
    x_hat = gated(inside)
    assert found.n_tokens == 6
    assert found.l0 == pytest.approx(float((gated.encode(inside) > 0).sum(1).float().mean()))
    total = (inside - inside.mean(0)).square().sum()
    assert found.fvu == pytest.approx(float((inside - x_hat).square().sum() / total), rel=1e-4)
    # BOS predicts w1, but is not counted: five predictions.
    spliced = Splice(tiny_lm, prompt.ids, **PLACE).run(torch.cat([x[:, :1], x_hat[None]], 1))
    clean = F.cross_entropy(tiny_lm.logits(prompt.ids)[0, 1:-1], prompt.ids[0, 2:])
    read = F.cross_entropy(spliced[0, 1:-1], prompt.ids[0, 2:])
    assert found.ce_clean == pytest.approx(float(clean), rel=1e-5)
    assert found.delta_ce == pytest.approx(float(read - clean), rel=1e-4, abs=1e-5)


def test_tokens_add_up_to_the_text(looks: list[PromptAnalysis]) -> None:
    tokens: Any = looks[0].tokens
    numbers = looks[0].numbers
    assert tokens["n_active"].sum() == pytest.approx(numbers.l0 * numbers.n_tokens)
    assert tokens["loss"].mean() == pytest.approx(numbers.ce_clean)
    assert tokens["loss"].isna().to_list() == [True, True] + [False] * 5


def test_one_token_has_no_variance_and_no_loss(tiny_lm: LanguageModel, gated: SAE) -> None:
    (seen,) = analyse(tiny_lm, [gated], read_prompt(tiny_lm, "w1"), **PLACE)
    assert math.isnan(seen.numbers.fvu)
    assert math.isnan(seen.numbers.ce_clean)


def test_a_text_on_which_nothing_fires_has_no_features(tiny_lm: LanguageModel) -> None:
    sae = ReluSAE(12, 5)
    set_(sae, b_enc=[-1e6] * 5)
    (seen,) = analyse(tiny_lm, [sae], read_prompt(tiny_lm, TEXT), **PLACE)
    assert len(seen.features) == 0
    assert seen.numbers.l0 == 0
    slope = torch.zeros(7, 12)
    assert list(effects(seen, sae, slope).columns)[-1] == "effect"
    assert len(align(seen, seen, sae, sae)) == 0


def test_an_sae_of_another_width_is_refused(tiny_lm: LanguageModel, prompt: Prompt) -> None:
    with pytest.raises(InputError, match=r"width d_in=5, got shape .*; was this SAE trained on"):
        analyse(tiny_lm, [ReluSAE(5, 7)], prompt, **PLACE)


# What they do to a logit


@pytest.mark.parametrize("family", CONFIGS)
def test_the_slope_is_the_change_of_the_logit(family: str, tiny_tokenizer: Any) -> None:
    model = load_model(tiny(family), tokenizer=tiny_tokenizer)
    ids = torch.tensor([[0, 5, 6, 7, 8]])
    for site in ("resid_post", "mlp_hidden", "attn_z"):
        where: dict[str, Any] = {"layer": 0, "site": site}
        slope = logit_slope(model, ids, position=3, token=9, **where)
        along = torch.randn(slope.shape, generator=torch.Generator().manual_seed(0))
        up, down = (
            model.logits(ids, edit=lambda x, e=e, along=along: x + e * along, **where)[
                0, 3, 9
            ].double()
            for e in (1e-2, -1e-2)
        )
        expected = float((up - down) / 2e-2)
        assert float((slope * along).sum()) == pytest.approx(expected, rel=0.02, abs=0.02)
        assert slope[4].abs().max() == 0  # a later token cannot matter


def test_a_slope_leaves_no_gradients_and_no_hooks_behind(tiny_lm: LanguageModel) -> None:
    ids = torch.tensor([[0, 5, 6]])
    before = tiny_lm.logits(ids)
    logit_slope(tiny_lm, ids, position=2, token=9, **PLACE)
    assert all(parameter.grad is None for parameter in tiny_lm.hf.parameters())
    assert torch.equal(tiny_lm.logits(ids), before)


def test_effects_are_what_features_write_along_the_slope(
    tiny_lm: LanguageModel, gated: SAE, looks: list[PromptAnalysis], prompt: Prompt
) -> None:
    slope = logit_slope(tiny_lm, prompt.ids, position=4, token=11, **PLACE)
    table: Any = effects(looks[0], gated, slope)
    for row in table.iloc[::5].itertuples():
        expected = row.activation * float(gated.W_dec[row.latent] @ slope[row.position])
        assert row.effect == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (table.loc[table["position"] > 4, "effect"] == 0).all()


def test_a_feature_s_effect_is_the_logit_s_change_when_it_fires_a_little_more(
    tiny_lm: LanguageModel, gated: SAE, looks: list[PromptAnalysis], prompt: Prompt
) -> None:
    slope = logit_slope(tiny_lm, prompt.ids, position=6, token=8, **PLACE)
    row = effects(looks[0], gated, slope).query("position == 6").iloc[0]
    share = 1e-3

    def more(x: torch.Tensor) -> torch.Tensor:
        moved = x.clone()
        moved[0, 6] += share * row["activation"] * gated.W_dec[int(row["latent"])]
        return moved

    changed = tiny_lm.logits(prompt.ids, edit=more, **PLACE)[0, 6, 8]
    change = float(changed.double() - tiny_lm.logits(prompt.ids)[0, 6, 8].double()) / share
    assert row["effect"] == pytest.approx(change, rel=0.02, abs=0.01)


def test_candidates_begin_with_what_follows(tiny_lm: LanguageModel, prompt: Prompt) -> None:
    found = candidates(tiny_lm, prompt, position=2, n=3)
    assert (found[0].text, found[0].actual) == (" w3", True)
    p = tiny_lm.logits(prompt.ids)[0, 2].softmax(-1)
    assert found[0].probability == pytest.approx(float(p[5]))
    rest = [each.probability for each in found[1:]]
    assert rest == sorted(rest, reverse=True)
    last = candidates(tiny_lm, prompt, position=6, n=3)
    assert [each.actual for each in last] == [False] * 3


@pytest.mark.parametrize("position", [7, -1])
def test_a_token_outside_of_the_text_is_refused(
    tiny_lm: LanguageModel, prompt: Prompt, position: int
) -> None:
    with pytest.raises(InputError, match=f"a position from 0 to 6, got {position}"):
        logit_slope(tiny_lm, prompt.ids, position=position, token=1, **PLACE)
    with pytest.raises(InputError, match="a token from 0 to 39, got 40"):
        logit_slope(tiny_lm, prompt.ids, position=1, token=40, **PLACE)


# Two SAEs on the same tokens


def test_best_matches_by_hand() -> None:
    # d_0 points most along e_1 (0.8), d_1 along e_1 too (1): e_1's own best is d_1.
    one = torch.tensor([[0.6, 0.8], [0.0, 2.0]])
    other = torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    found = best_matches(torch.tensor([0, 1]), one, other)
    assert found.partner.tolist() == [1, 1]
    assert found.cosine.tolist() == pytest.approx([0.8, 1.0])
    assert found.mutual.tolist() == [False, True]
    assert best_matches(torch.tensor([], dtype=torch.int64), one, other).mutual.tolist() == []


def firing(d_in: int, biases: list[float], directions: list[int]) -> ReluSAE:
    """Return an SAE whose latents fire with these values on every token."""
    sae = ReluSAE(d_in, len(biases))
    rows = torch.eye(d_in)[directions].tolist()
    zeros = [[0.0] * len(biases)] * d_in
    set_(sae, W_enc=zeros, b_enc=biases, W_dec=rows, b_dec=[0.0] * d_in)
    return sae


def test_a_token_s_features_are_told_apart(tiny_lm: LanguageModel) -> None:
    # Directions 0 and 1 are in both; of 1 only the first fires. 2 and 3 have no match.
    one = firing(12, [5.0, 4.0, 3.0], [0, 1, 2])
    two = firing(12, [-1.0, 2.0, 1.0], [1, 0, 3])
    looks = analyse(tiny_lm, [one, two], read_prompt(tiny_lm, "w1 w2"), **PLACE)
    table: Any = align(looks[0], looks[1], one, two)
    first = table[table["position"] == 1].drop(columns="position")
    expected = pd.DataFrame(
        {
            "where": ["both", "only gated", "only gated", "only baseline"],
            "gated": pd.array([0, 1, 2, None], dtype="Int64"),
            "baseline": pd.array([1, 0, None, 2], dtype="Int64"),
            "cosine": [1.0, 1.0, math.nan, math.nan],
            "gated_activation": [5.0, 4.0, 3.0, 0.0],
            "baseline_activation": [2.0, 0.0, 0.0, 1.0],
        }
    )
    pd.testing.assert_frame_equal(first.reset_index(drop=True), expected)
    assert len(table) == 8  # the same on both tokens


def test_an_sae_beside_itself_shares_everything(
    tiny_lm: LanguageModel, gated: SAE, looks: list[PromptAnalysis]
) -> None:
    table: Any = align(looks[0], looks[0], gated, gated)
    assert set(table["where"]) == {"both"}
    assert (table["gated"] == table["baseline"]).all()
    assert len(table) == len(looks[0].features)


def test_every_firing_is_in_the_alignment_once(
    looks: list[PromptAnalysis], gated: SAE, relu: SAE
) -> None:
    table: Any = align(looks[0], looks[1], gated, relu, threshold=0.3)
    assert (table["gated_activation"] > 0).sum() == len(looks[0].features)
    assert (table["baseline_activation"] > 0).sum() == len(looks[1].features)
    assert (table["where"] == "both").any()
