"""Steering by numbers a person can redo: one unit is what it says, and nothing changes unasked."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from examples import numbers, random_gated, random_relu, set_, worked_example
from families import CONFIGS, boot, tiny
from transformers import DynamicCache

from gsae_core.analysis.generation import (
    Loop,
    Sampling,
    continuation,
    divergence,
    draw,
    followed_by,
    loop_at_end,
    mean_divergence,
    next_token_shift,
    side_by_side,
    steered_logits,
)
from gsae_core.analysis.prompt import Prompt, read_prompt
from gsae_core.analysis.steering import (
    MAX_STRENGTH,
    Intervention,
    Steering,
    counted_vectors,
    intervention,
    scales_of,
    scales_of_index,
)
from gsae_core.errors import InputError
from gsae_core.lm.model import Decoding, LanguageModel, Splice, load_model
from gsae_core.sae.architectures import GatedSAE, ReluSAE

PLACE: dict[str, Any] = {"layer": 1, "site": "resid_pre"}
X = torch.tensor([3.0, 1.0], dtype=torch.float64)


def steer(sae: Any, *pushes: tuple, keep_error: bool = True) -> Steering:
    return Steering(sae, tuple(Intervention(*push) for push in pushes), keep_error)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numpy().tobytes() == b.numpy().tobytes()


# What it does to x


def test_add_moves_x_by_strength_times_unit_along_the_decoder_row() -> None:
    # Latent 0 of the worked example writes (0.6, 0.8); 2 units of 1.5 are 3: (1.8, 2.4).
    moved = steer(worked_example(), (0, "add", 2.0, 1.5))(X)
    torch.testing.assert_close(moved, torch.tensor([4.8, 3.4], dtype=torch.float64))


def test_add_is_the_same_whether_the_feature_fires_or_not() -> None:
    sae, x = random_gated(), numbers(5, 4)
    row = sae.W_dec[3].detach()
    assert torch.equal(steer(sae, (3, "add", -2.0, 0.5))(x), x + -1.0 * row)


def test_clamp_sets_the_latent_and_keeps_the_error() -> None:
    # f = (4.5, 0, 0): clamping latent 0 to 2 units of 1 takes 2.5 (0.6, 0.8) away.
    sae = worked_example()
    moved = steer(sae, (0, "clamp", 2.0, 1.0))(X)
    torch.testing.assert_close(moved, torch.tensor([3 - 1.5, 1 - 2.0], dtype=torch.float64))
    # Clamping one that does not fire turns it on: latent 1 writes (1, 0).
    on = steer(sae, (1, "clamp", 2.0, 1.0))(X)
    torch.testing.assert_close(on, torch.tensor([5.0, 1.0], dtype=torch.float64))


def test_ablation_takes_away_what_the_feature_wrote() -> None:
    # 4.5 (0.6, 0.8) = (2.7, 3.6).
    moved = steer(worked_example(), (0, "ablate", 7.0, 1.0))(X)
    torch.testing.assert_close(moved, torch.tensor([0.3, -2.6], dtype=torch.float64))


def test_without_the_error_the_model_reads_the_changed_reconstruction() -> None:
    # b_dec = (1, 0); f' = (4.5 + 1, 0, 0): (1 + 3.3, 4.4).
    moved = steer(worked_example(), (0, "add", 1.0, 1.0), keep_error=False)(X)
    torch.testing.assert_close(moved, torch.tensor([4.3, 4.4], dtype=torch.float64))
    gone = steer(worked_example(), (0, "ablate", 0.0, 1.0), keep_error=False)(X)
    torch.testing.assert_close(gone, torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_three_features_add_up() -> None:
    # Ablate 0: -(2.7, 3.6); add 2 units of 1 along (1, 0); clamp latent 2, off, to 3 along (0, 1).
    sae = worked_example()
    moved = steer(sae, (0, "ablate", 0, 1.0), (1, "add", 2, 1.0), (2, "clamp", 3, 1.0))(X)
    torch.testing.assert_close(moved, torch.tensor([2.3, 0.4], dtype=torch.float64))


def test_strength_zero_is_the_identity_to_the_bit() -> None:
    x = torch.tensor([[-0.0, 1e-45, 3.0, -7.5]], dtype=torch.float64)
    nothing = steer(random_gated(), (2, "add", 0.0, 1.3), (4, "add", 0.0, 0.2))
    assert nothing.is_identity
    assert same_bits(nothing(x), x)
    assert nothing.edit(torch.ones(1, dtype=torch.bool)) is None


@pytest.mark.parametrize("make", [random_gated, random_relu])
def test_clamping_to_the_present_value_is_the_identity_up_to_rounding(make: Any) -> None:
    sae, x = make(), numbers(1, 4)
    latent = int(sae.encode(x)[0].argmax())
    f = float(sae.encode(x)[0, latent].detach())
    assert f > 0
    torch.testing.assert_close(steer(sae, (latent, "clamp", 2.0, f / 2))(x), x, rtol=0, atol=1e-12)


def test_special_tokens_keep_their_activations() -> None:
    x = numbers(1, 3, 4)
    edit = steer(random_gated(), (2, "add", 1.0, 1.0)).edit(torch.tensor([False, True, True]))
    assert edit is not None
    changed = (edit(x) != x).any(-1)[0]
    assert changed.tolist() == [False, True, True]


# What it does to the language model


@pytest.fixture(scope="module")
def sae() -> GatedSAE:
    torch.manual_seed(0)
    made = GatedSAE(12, 24)
    return made.requires_grad_(False)


@pytest.fixture
def prompt(tiny_lm: LanguageModel) -> Prompt:
    return read_prompt(tiny_lm, "w1 w2 w3 w4 w5")


def test_ablating_then_not_leaves_the_logits_bit_identical(
    tiny_lm: LanguageModel, sae: GatedSAE, prompt: Prompt
) -> None:
    before = tiny_lm.logits(prompt.ids)
    ablated = steered_logits(
        tiny_lm, prompt, steer(sae, *((i, "ablate", 0, 1.0) for i in range(3))), **PLACE
    )
    assert not torch.equal(ablated, before[0])
    assert same_bits(tiny_lm.logits(prompt.ids), before)
    nothing = steer(sae, (0, "add", 0.0, 1.0))
    assert same_bits(steered_logits(tiny_lm, prompt, nothing, **PLACE), before[0])


def test_the_steered_pass_is_the_models_pass_from_an_edited_site(
    tiny_lm: LanguageModel, sae: GatedSAE, prompt: Prompt
) -> None:
    x = Splice(tiny_lm, prompt.ids, **PLACE)
    moved = x.x.clone()
    moved[0, 1:] += 6.0 * sae.W_dec[5]  # BOS stays
    expected = x.run(moved)[0]
    found = steered_logits(tiny_lm, prompt, steer(sae, (5, "add", 3.0, 2.0)), **PLACE)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", CONFIGS)
def test_reading_token_by_token_equals_reading_at_once(family: str, tiny_tokenizer: Any) -> None:
    check_reading(load_model(tiny(family), tokenizer=tiny_tokenizer))


@pytest.mark.filterwarnings("ignore")  # TransformerLens' own
@pytest.mark.parametrize("is_compatible", [False, True])
def test_so_does_a_bridge(is_compatible: bool, tiny_tokenizer: Any) -> None:
    bridge = boot(tiny("gemma2"), tiny_tokenizer)
    if is_compatible:
        bridge.enable_compatibility_mode()
    check_reading(load_model(bridge))


def test_a_model_that_leaves_the_cache_empty_is_refused(
    tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(ids: Any, cache: Any, *, keep: bool) -> tuple[Any, Any]:
        return tiny_lm.hf(input_ids=ids, use_cache=False).logits, DynamicCache()

    monkeypatch.setattr(tiny_lm, "_read", read)
    with pytest.raises(InputError, match="which keeps none; generate with another model"):
        Decoding(tiny_lm, **PLACE).extend(torch.tensor([[0, 5]]))


def check_reading(model: LanguageModel) -> None:
    ids = torch.tensor([[0, 5, 6, 7, 8, 9, 10]])
    push = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    for site in ("resid_post", "attn_out"):
        whole = model.logits(ids, layer=0, site=site, edit=lambda x: x + push)[0]
        decoding = Decoding(model, layer=0, site=site)
        parts = [decoding.extend(part, lambda x: x + push) for part in ids.split([4, 1, 1, 1], 1)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)
        assert decoding.n_tokens == 7


def test_an_edit_of_early_tokens_lives_on_in_later_ones(tiny_lm: LanguageModel) -> None:
    ids = torch.tensor([[0, 5, 6, 7]])
    push = torch.ones(12)
    first = torch.tensor([True, True, False, False])[:, None]
    whole = tiny_lm.logits(ids, **PLACE, edit=lambda x: x + first * push)[0, -1]
    decoding = Decoding(tiny_lm, **PLACE)
    decoding.extend(ids[:, :2], lambda x: x + push)
    torch.testing.assert_close(decoding.extend(ids[:, 2:])[-1], whole, rtol=1e-4, atol=1e-4)


def test_a_sequence_beyond_the_context_is_refused(tiny_lm: LanguageModel) -> None:
    decoding = Decoding(tiny_lm, **PLACE)
    decoding.extend(torch.zeros(1, 16, dtype=torch.int64))
    with pytest.raises(InputError, match=r"at most 16 tokens .* got 17; shorten the prompt"):
        decoding.extend(torch.zeros(1, 1, dtype=torch.int64))


# Continuations


def test_equal_logits_and_one_seed_give_equal_texts(
    tiny_lm: LanguageModel, sae: GatedSAE, prompt: Prompt
) -> None:
    nothing = steer(sae, (0, "add", 0.0, 1.0))
    both: dict[str, list[int]] = {"default": [], "steered": []}
    for name, token in side_by_side(
        tiny_lm, prompt, {"default": None, "steered": nothing}, sampling=Sampling(8), **PLACE
    ):
        both[name].append(token)
    assert both["default"] == both["steered"]
    assert len(both["default"]) >= 1
    again = list(continuation(tiny_lm, prompt, None, sampling=Sampling(8), **PLACE))
    assert again == both["default"]


def test_a_token_is_drawn_when_it_is_asked_for(
    tiny_lm: LanguageModel, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gsae_core.analysis import generation

    drawn = iter([7, 8, 9, 7, 0])
    monkeypatch.setattr(generation, "draw", lambda *_args, **_kwargs: next(drawn))
    both = {"a": None, "b": None}
    stream = side_by_side(tiny_lm, prompt, both, sampling=Sampling(2), **PLACE)
    assert next(stream) == ("a", 7)
    assert next(drawn) == 8  # not drawn for b yet: others may use the model before it
    assert list(stream) == [("b", 9), ("a", 7), ("b", 0)]


def test_temperature_zero_takes_the_likeliest_token(tiny_lm: LanguageModel, prompt: Prompt) -> None:
    greedy = Sampling(3, 0.0, seed=5)
    tokens = list(continuation(tiny_lm, prompt, None, sampling=greedy, **PLACE))
    assert tokens[0] == int(tiny_lm.logits(prompt.ids)[0, -1].argmax())


def test_a_continuation_ends_where_the_context_is_full(
    tiny_lm: LanguageModel, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gsae_core.analysis import generation

    monkeypatch.setattr(generation, "draw", lambda *_args, **_kwargs: 7)  # never end-of-text
    tokens = list(continuation(tiny_lm, prompt, None, sampling=Sampling(100), **PLACE))
    # 6 tokens are read, BOS included; ten more fill the context of 16, and one follows them.
    assert len(tokens) == 11


def test_a_continuation_ends_at_end_of_text(
    tiny_lm: LanguageModel, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gsae_core.analysis import generation

    drawn = iter([7, 0, 7])
    monkeypatch.setattr(generation, "draw", lambda *_args, **_kwargs: next(drawn))
    assert list(continuation(tiny_lm, prompt, None, sampling=Sampling(9), **PLACE)) == [7, 0]


def test_draws_have_the_softmax_s_frequencies() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, math.log(3.0)])
    drawn = [draw(logits, temperature=1.0, generator=generator) for _ in range(4000)]
    # Three in four; the standard deviation of 4000 draws is 0.7 %.
    assert abs(sum(drawn) / 4000 - 0.75) < 0.03


def test_the_noise_of_a_later_token_does_not_depend_on_the_temperature() -> None:
    one, two = (torch.Generator().manual_seed(3) for _ in range(2))
    draw(torch.zeros(5), temperature=0.0, generator=one)
    draw(torch.ones(5), temperature=1.5, generator=two)
    assert torch.equal(one.get_state(), two.get_state())


# What is measured


def test_the_shift_of_two_tokens_by_hand(tiny_lm: LanguageModel) -> None:
    # (1/2, 1/2) becomes (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln (2/3) = 1/2 ln (4/3).
    before, after = torch.zeros(2), torch.tensor([0.0, math.log(3.0)])
    shift = next_token_shift(before, after, model=tiny_lm)
    assert shift.kl == pytest.approx(0.5 * math.log(4 / 3))
    rows = shift.table.set_index("id")
    assert rows.loc[1, ["before", "after", "change"]].tolist() == pytest.approx([0.5, 0.75, 0.25])
    assert rows.loc[1, "delta_logit"] == pytest.approx(math.log(3))
    assert rows.loc[0, "change"] == pytest.approx(-0.25)


def test_equal_predictions_diverge_by_exactly_nothing() -> None:
    logits = numbers(3, 7)
    assert divergence(logits, logits).tolist() == [0, 0, 0]


def test_the_mean_divergence_leaves_special_tokens_out(prompt: Prompt) -> None:
    before, after = torch.zeros(6, 2), torch.zeros(6, 2)
    after[0, 1] = 50.0  # BOS, which is not counted
    after[3, 1] = math.log(3.0)  # one token of five
    assert mean_divergence(prompt, before, after) == pytest.approx(0.5 * math.log(4 / 3) / 5)


def test_a_text_and_what_follows_are_one_text(tiny_lm: LanguageModel, prompt: Prompt) -> None:
    whole = followed_by(prompt, [7, 0], model=tiny_lm)
    assert whole.ids.tolist() == [[0, 3, 4, 5, 6, 7, 7, 0]]
    assert whole.counted.tolist() == [False, *[True] * 6, False]
    assert whole.tokens[-2:] == (" w5", " <|endoftext|>")


@pytest.mark.parametrize(
    ("ids", "loop"),
    [
        ([1, 2] + [9] * 12, Loop(1, 12)),
        ([1] + [4, 5] * 6, Loop(2, 12)),
        ([4, 5] * 5, None),  # ten tokens could be a list
        (list(range(40)), None),
        ([9] * 20 + [1], None),  # it came out of it
        ([], None),
    ],
)
def test_a_text_that_goes_round_is_found(ids: list[int], loop: Loop | None) -> None:
    assert loop_at_end(ids) == loop


# Units


def test_a_unit_is_the_99th_percentile_of_the_activations_above_zero() -> None:
    # x = 1 to 101 and as many that do not fire: the percentile of 1..101 is 100.
    sae = ReluSAE(1, 1)
    set_(sae, W_enc=[[1.0]], b_enc=[0.0], W_dec=[[-2.0]], b_dec=[0.0])
    x = torch.cat([torch.arange(1.0, 102.0), -torch.arange(1.0, 102.0)])[:, None]
    scales = scales_of(sae, x, source="numbers")
    unit = scales.unit(0)
    assert (unit.value, unit.own) == (pytest.approx(100.0), True)
    assert "1 unit = 100, the 99th percentile" in unit.sentence
    assert "fired on 101 of 202 numbers" in unit.sentence
    assert scales.largest.tolist() == [101]
    assert scales.typical == pytest.approx(200)  # it writes 100 times a vector of length 2


def test_a_dead_feature_writes_as_much_as_a_typical_one_and_says_so() -> None:
    sae = ReluSAE(1, 2)
    set_(sae, W_enc=[[1.0, 0.0]], b_enc=[0.0, -1.0], W_dec=[[1.0], [4.0]], b_dec=[0.0])
    scales = scales_of(sae, torch.full((3, 1), 8.0), source="numbers")
    unit = scales.unit(1)
    # The living one writes vectors of length 8: 2 times a decoder norm of 4.
    assert (unit.value, unit.own) == (pytest.approx(2.0), False)
    assert "did not fire on 3 numbers, so it has no scale of its own" in unit.sentence
    assert "1 unit = 2, which writes a vector of length 8" in unit.sentence
    assert "its decoder norm is 4" in unit.sentence


def test_where_nothing_fires_a_unit_is_as_long_as_an_activation() -> None:
    sae = ReluSAE(2, 1)
    set_(sae, W_enc=[[0.0], [0.0]], b_enc=[-1.0], W_dec=[[1.0, 0.0]], b_dec=[0.0, 0.0])
    x = torch.tensor([[3.0, 4.0], [5.0, 0.0]])
    assert scales_of(sae, x, source="numbers").unit(0).value == pytest.approx(5.0)


def test_scales_are_measured_on_the_first_counted_tokens(tiny_lm: LanguageModel) -> None:
    from gsae_core.lm.corpus import SequenceSet

    ids = np.random.default_rng(0).integers(2, 40, (9, 16))
    ids[:, 0] = 0
    sequences = SequenceSet(ids, special=(0,))
    torch.manual_seed(1)
    sae = GatedSAE(12, 24)
    scales = scales_of(sae, counted_vectors(tiny_lm, sequences, **PLACE, n_tokens=40))
    x = torch.cat(
        [tiny_lm.harvest(torch.from_numpy(ids[i : i + 1]), **PLACE)[0, 1:] for i in range(3)]
    )
    f = sae.encode(x[:40])
    assert scales.n_tokens == 40
    assert torch.equal(scales.fired, (f > 0).sum(0))
    for latent in scales.fired.nonzero().flatten().tolist():
        own = f[:, latent][f[:, latent] > 0]
        torch.testing.assert_close(scales.p99[latent], own.quantile(0.99), rtol=1e-4, atol=1e-5)


class Sorted:
    """What scales read of a feature index: three latents, of which the second never fired."""

    n_tokens = 500

    def array(self, name: str) -> np.ndarray:
        firings = np.concatenate([np.arange(101, 0, -1), [7.0]]).astype(np.float32)
        return {"offsets": np.array([0, 101, 101, 102]), "value": firings}[name]


def test_scales_of_an_index_are_read_from_its_sorted_firings() -> None:
    sae = ReluSAE(2, 3)
    set_(sae, W_dec=[[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    index: Any = Sorted()
    scales = scales_of_index(index, sae)
    # 101 to 1: a hundredth of the way down from the top is the second, 100.
    assert scales.p99.tolist() == pytest.approx([100, math.nan, 7], nan_ok=True)
    assert scales.largest.tolist() == [101, 0, 7]
    assert "fired on 101 of 500 tokens of the feature index" in scales.unit(0).sentence
    # The lower median of 100 and 3 times 7 is 21; latent 1 has a norm of 2.
    assert scales.unit(1).value == pytest.approx(10.5)


def test_an_index_of_another_sae_is_refused() -> None:
    index: Any = Sorted()
    with pytest.raises(InputError, match=r"an SAE with 7 features, got one with 3; build the in"):
        scales_of_index(index, random_relu())


# Mistakes


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, MAX_STRENGTH + 1, -1e9])
def test_a_strength_that_is_none_is_refused(strength: float) -> None:
    with pytest.raises(InputError, match=r"a strength from -20 to 20 in .* got 'add' and"):
        steer(random_gated(), (0, "add", strength, 1.0))


@pytest.mark.parametrize(
    ("pushes", "sentence"),
    [
        ([(7, "add", 1.0, 1.0)], "a feature from 0 to 6, got 7; this SAE has 7 features"),
        ([(-1, "add", 1.0, 1.0)], "a feature from 0 to 6, got -1"),
        ([(1, "add", 1.0, 1.0)] * 2, "each feature once, got feature 1 twice; give it one mode"),
        ([(i, "add", 1.0, 1.0) for i in range(4)], "at most 3 features .* got 4; leave some out"),
        ([(1, "turn up", 1.0, 1.0)], "a mode out of add, clamp, ablate .* got 'turn up'"),
    ],
)
def test_interventions_that_make_no_sense_are_refused(pushes: list, sentence: str) -> None:
    unchecked = tuple(tuple.__new__(Intervention, push) for push in pushes)
    with pytest.raises(InputError, match=sentence):
        Steering(random_gated(), unchecked)


def test_an_sae_of_another_width_is_refused(tiny_lm: LanguageModel, prompt: Prompt) -> None:
    with pytest.raises(InputError, match=r"width d_in=4, got shape .*; was this SAE trained on"):
        steered_logits(tiny_lm, prompt, steer(random_gated(), (0, "ablate", 0.0, 1.0)), **PLACE)


def test_a_unit_of_a_feature_there_is_not_is_refused() -> None:
    scales = scales_of(random_relu(), numbers(3, 4), source="numbers")
    with pytest.raises(InputError, match="a feature from 0 to 6, got 99"):
        intervention(scales, 99, "add", 1.0)


@pytest.mark.parametrize(
    "asked", [(0,), (401,), (9, math.nan), (9, 2.5), (9, -0.1), (9, 1.0, -1), (9, 1.0, 2**31)]
)
def test_sampling_out_of_range_is_refused(
    tiny_lm: LanguageModel, prompt: Prompt, asked: tuple
) -> None:
    sampling = Sampling(*asked)
    with pytest.raises(InputError, match=rf"1 to 400 tokens, .* to 2 .*, got {asked[0]}, "):
        next(continuation(tiny_lm, prompt, None, sampling=sampling, **PLACE))


def test_logits_that_steering_drove_to_infinity_are_refused() -> None:
    with pytest.raises(InputError, match="this hard breaks the language model; lower the strength"):
        draw(torch.tensor([0.0, math.inf]), temperature=1.0, generator=torch.Generator())
