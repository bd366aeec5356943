"""The Steer page without a browser: continuations, what steers them, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from app_pages import HOSTILE, NASTY, edited, labelled, opened, text
from safetensors.torch import load_file, save_file

from gsae_core.analysis import generation
from gsae_core.analysis.generation import Loop
from gsae_core.app import steer_view
from gsae_core.app.parts import PAGE_TEMPLATE
from gsae_core.app.steer_view import MATCHED, STEERED, UNSTEERED, Generation
from gsae_core.files import sha256
from gsae_core.runs.run import Run
from gsae_core.text import macros

STEER = "pages/7_Steer.py"
TEXT = "w1 w2 w3 w2 w9"
PAIR = {"sae": "gated-0.05", "base": "relu-0.05", "text": TEXT}


@pytest.fixture
def run(root: Path, finished: Run) -> Run:
    return finished


def job(at: Any) -> Generation:
    return at.session_state["steer.generation"]


def kill_feature(run: Run, name: str, latent: int) -> None:
    """Give a feature of a Gated SAE a gate that never opens."""
    folder = run.sae_folder(name)
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["b_gate"][latent] = -1e9
    save_file(tensors, path)
    with edited(folder / "cfg.json") as cfg:
        cfg["metadata"]["weights_sha256"] = sha256(path)


def test_unsteered_steered_and_the_match_stand_side_by_side(run: Run) -> None:
    at = opened(STEER, run=run.id, f="2", s="3", **PAIR)
    done = job(at)
    assert done.stream is None
    assert set(done.tokens) == {UNSTEERED, STEERED, MATCHED}
    assert all(tokens for tokens in done.tokens.values())
    said = text(at)
    assert "feature 2 ↔" in said
    assert "decoder cosine" in said
    assert "1 unit =" in said
    assert [m.label for m in at.metric] == ["KL, next token (nats)", "KL, mean per token"] * 2
    assert set(at.dataframe[0].value.columns) >= {"token", "before", "after", "delta_logit"}


def test_strength_zero_writes_the_unsteered_text(run: Run) -> None:
    at = opened(STEER, run=run.id, f="2", s="0", **PAIR)
    done = job(at)
    assert done.tokens[STEERED] == done.tokens[UNSTEERED] == done.tokens[MATCHED]
    assert done.shifts[STEERED].kl == 0
    assert done.kl == {STEERED: 0, MATCHED: 0}
    assert set(done.shifts[STEERED].table["change"]) == {0}


def test_results_survive_reruns(run: Run) -> None:
    at = opened(STEER, run=run.id, f="2", **PAIR)
    before = job(at)
    at.run()
    assert job(at) is before
    at.slider(key="s").set_value(-5.0).run()
    assert job(at) is not before
    assert job(at).settings.pushes[0].strength == -5.0


def test_a_stopped_continuation_stays_and_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gsae_core.app import steer_view

    advance, steps = steer_view.advance, [0]

    def interrupted(run: Run, job: Generation) -> bool:
        steps[0] += 1
        if steps[0] == 4:
            job.stopped = True  # as a press of Stop between two tokens
            return False
        return advance(run, job)

    monkeypatch.setattr(steer_view, "advance", interrupted)
    at = opened(STEER, run=run.id, f="2", **PAIR)
    kept = {kind: list(tokens) for kind, tokens in job(at).tokens.items()}
    assert sum(map(len, kept.values())) == 3
    assert "Stopped. Continue adds the remaining tokens." in text(at)
    at.button(key="steer.go_on").click().run()
    assert job(at).stream is None
    assert all(job(at).tokens[kind][: len(tokens)] == tokens for kind, tokens in kept.items())


def test_a_continuation_that_grows_while_it_is_drawn_is_drawn_as_it_was(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where Stop is pressed: the page draws anew while its last run still takes a token.
    at = opened(STEER, run=run.id, f="2", **PAIR)
    drawn, new_texts = job(at), generation.new_texts
    before = steer_view.continuation(run, drawn, STEERED)

    def grown(*args: Any, **kwargs: Any) -> tuple[str, ...]:
        drawn.tokens[STEERED].append(5)
        return new_texts(*args, **kwargs)

    monkeypatch.setattr(generation, "new_texts", grown)
    assert steer_view.continuation(run, drawn, STEERED) == before


def test_three_features_are_steered_at_once(run: Run) -> None:
    rest = {"f2": "1", "s2": "-2", "mode2": "clamp", "f3": "4", "mode3": "ablate"}
    at = opened(STEER, run=run.id, f="2", **PAIR, **rest)
    pushes = [tuple(push) for push in job(at).settings.pushes]
    assert pushes == [(2, "add", 4.0), (1, "clamp", -2.0), (4, "ablate", 4.0)]
    assert at.slider(key="s3").disabled


def test_a_feature_given_twice_is_steered_once(run: Run) -> None:
    at = opened(STEER, run=run.id, f="2", f2="2", **PAIR)
    assert "Feature 2 is listed already" in text(at)
    assert len(job(at).settings.pushes) == 1


def test_without_a_feature_those_that_fire_are_offered(run: Run) -> None:
    at = opened(STEER, run=run.id, **PAIR)
    assert "steer.generation" not in at.session_state
    offered = labelled(at.selectbox, "Features that fire on the prompt")
    assert "× its scale on" in offered.options[0]
    offered.set_value(offered.options[0]).run()
    assert f"feature {at.number_input(key='f').value} " in offered.options[0]
    assert job(at).stream is None


def test_one_sae_is_steered_alone(run: Run) -> None:
    at = opened(STEER, run=run.id, f="2", text=TEXT, sae="relu-0.4", base="none")
    assert set(job(at).tokens) == {UNSTEERED, STEERED}


def test_the_error_can_be_left_out(run: Run) -> None:
    with_error = job(opened(STEER, run=run.id, f="2", s="0", **PAIR))
    without = job(opened(STEER, run=run.id, f="2", s="0", err="false", **PAIR))
    assert with_error.shifts[STEERED].kl == 0
    assert without.shifts[STEERED].kl > 0


def test_a_dead_feature_says_what_its_unit_is(run: Run) -> None:
    kill_feature(run, "gated-0.05", 3)
    said = text(opened(STEER, run=run.id, f="3", **PAIR))
    assert "did not fire on" in said
    assert "so it has no scale of its own: 1 unit =" in said
    assert "its decoder norm is 1" in said


def test_held_out_text_that_is_gone_leaves_the_prompt_as_the_measure(run: Run) -> None:
    with edited(run.folder / "config.json") as fields:
        fields["data"]["source"] = "/gone/text.txt"
    at = opened(STEER, run=run.id, f="2", **PAIR)
    assert "Scales are of this prompt alone" in text(at)
    assert "tokens of this prompt" in text(at)
    assert job(at).stream is None


# What the address and the reader get wrong


@pytest.mark.parametrize(
    "asked",
    [
        {"f": ("99", "asks for '99', which is no feature from 0 to 5; showing none.")},
        {"f": ("-3", "asks for '-3', which is no feature from 0 to")},
        {"f": (HOSTILE, "which is no feature from 0 to 5; showing none")},
        {
            "s": ("nan", "asks for 'nan', which is no strength from -10 to 10; showing 4"),
            "mode": ("boost", "asks for 'boost', which is no mode; showing add"),
            "seed": ("-1", "asks for '-1', which is no seed from 0 to"),
        },
        {
            "s": ("inf", "asks for 'inf', which is no strength from -10 to 10; showing 4"),
            "temp": ("9", "asks for '9', which is no temperature from 0 to 2; showing 0.8"),
        },
        {
            "s": ("1e9", "asks for '1e9', which is no strength from -10 to 10; showing 4"),
            "len": ("5000", "asks for '5000', which is no length from 10 to 200; showing 60"),
        },
    ],
)
def test_what_the_address_gets_wrong_is_said(run: Run, asked: dict[str, tuple[str, str]]) -> None:
    wrong = {param: value for param, (value, _) in asked.items()}
    at = opened(STEER, run=run.id, **PAIR | {"f": "2"} | wrong)
    for _, said in asked.values():
        assert said in text(at).replace("&#x27;", "'")
    assert "<img" not in text(at)


def test_a_prompt_that_fills_the_context_leaves_room_for_one_token(run: Run) -> None:
    at = opened(STEER, run=run.id, f="2", **PAIR | {"text": "w1 " * 16})
    assert [len(tokens) for tokens in job(at).tokens.values()] == [1, 1, 1]
    assert "where the model's context was full" in text(at)


# What is drawn


def test_hostile_tokens_are_drawn_as_text() -> None:
    drawn = steer_view.continuation_html(NASTY, [True] * len(NASTY), going=True)
    for piece in ("<script", "<img", "<form", "<style", "\u202e", "\u200b", "\x1b", "\x00"):
        assert piece not in drawn
    assert "⟨202E⟩" in drawn
    assert "&lt;script&gt;" in drawn


def test_line_ends_act_and_are_seen() -> None:
    drawn = steer_view.continuation_html(["a b\n"], [False], going=False)
    assert "a b↵\n<" in drawn


def test_tokens_that_differ_are_marked_without_colour_too() -> None:
    one, two = (steer_view.continuation_html(["x"], [d], going=False) for d in (False, True))
    assert "border-bottom" not in one
    assert "border-bottom:2px dotted" in two


@pytest.mark.parametrize(
    ("found", "unsteered", "said"),
    [
        (
            Loop(1, 20),
            None,
            "20 steered tokens repeat the same token: the steering is too strong",
        ),
        (Loop(3, 12), None, "repeat the same 3 tokens"),
        (Loop(2, 12), Loop(2, 14), "the unsteered text repeats itself too: raise the temperature"),
        (None, Loop(1, 12), ""),
    ],
)
def test_a_text_that_repeats_itself_is_warned_of(
    found: Loop | None, unsteered: Loop | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(steer_view, "notice", lambda words, **_: shown.append(words))
    steer_view.say_loop(found, unsteered)
    assert said in "".join(shown)
    assert bool(shown) == bool(said)


def test_marks_lie_where_the_slider_has_their_value() -> None:
    drawn = macros(PAGE_TEMPLATE).ruler({1.0: "p99", 99.0: "max"}, 10.0)
    assert "left:55.00%" in drawn  # 11 of 20
    assert "max" not in drawn
