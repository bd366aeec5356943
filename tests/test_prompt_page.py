"""The Prompt page without a browser: what it says of a text, and of what is no text."""

import html
from pathlib import Path
from typing import Any

import pytest
from app_pages import HOSTILE, NASTY, edited, labelled, opened, text

from gsae_core.app import cache, prompt_view
from gsae_core.app.components import read_number
from gsae_core.app.pickers import ticked_row
from gsae_core.errors import InputError
from gsae_core.runs.run import Run
from gsae_core.text import quoted

PROMPT, STEER = "pages/6_Prompt.py", "pages/7_Steer.py"
TEXT = "w1 w2 w3 w2 w9"


@pytest.fixture
def run(root: Path, finished: Run) -> Run:
    """A finished run of four small SAEs on the tiny model, in the app's folder."""
    return finished


def field(at: Any) -> Any:
    return at.text_area(key="prompt.text")


def features(at: Any) -> Any:
    return at.dataframe[0].value


def test_a_text_from_the_address_is_read(run: Run) -> None:
    at = opened(PROMPT, run=run.id, text=TEXT, sae="gated-0.05", base="relu-0.05")
    assert field(at).value == TEXT
    assert "6 tokens, read in" in text(at)  # BOS in front
    assert [m.label for m in at.metric] == ["L0", "ΔCE (nats)", "FVU"] * 2
    assert at.number_input(key="tok").value == 5
    assert list(features(at)["latent"])
    assert at.query_params["text"] == TEXT
    assert at.query_params["sae"] == "gated-0.05"


def test_another_token_has_other_features(run: Run) -> None:
    at = opened(PROMPT, run=run.id, text=TEXT, tok="2", sae="gated-0.05")
    before = features(at)["activation"].to_list()
    box = labelled(at.selectbox, "Next token")
    assert box.options[0].startswith("·w3")  # what follows w2
    box.select_index(2).run()
    at.number_input(key="tok").set_value(1).run()
    assert features(at)["activation"].to_list() != before
    box = labelled(at.selectbox, "Next token")
    assert box.options[0].startswith("·w2")
    assert box.value == 0  # the choice was of the other token's list


def test_a_new_text_is_looked_at_from_its_last_token_on(run: Run) -> None:
    at = opened(PROMPT, run=run.id, text=TEXT, tok="2", sae="gated-0.05")
    labelled(at.selectbox, "Next token").select_index(2).run()
    field(at).set_value("w1 w2 w3 w4 w5 w6 w7").run()
    assert at.number_input(key="tok").value == 7  # BOS in front
    assert labelled(at.selectbox, "Next token").value == 0
    assert "tok" not in at.query_params  # so that a reload shows this token


def test_features_are_sorted_as_asked(run: Run) -> None:
    at = opened(PROMPT, run=run.id, text=TEXT, tok="2", sae="gated-0.05", sort="attribution")
    sizes = features(at)["effect"].abs()
    assert sizes.is_monotonic_decreasing
    at.segmented_control(key="prompt.sort").set_value("activation").run()
    assert features(at)["activation"].is_monotonic_decreasing


@pytest.mark.parametrize("measure", prompt_view.MEASURES)
def test_the_strip_is_shaded_by_every_measure(run: Run, measure: str) -> None:
    at = opened(PROMPT, run=run.id, text=TEXT, by=measure)
    assert prompt_view.MEASURES[measure][1] in html.unescape(text(at))


def test_a_special_token_has_no_features(run: Run) -> None:
    at = opened(PROMPT, run=run.id, text=TEXT, tok="0")
    assert "special tokens are not read by the SAE" in text(at)


def test_one_sae_alone_is_looked_through(run: Run) -> None:
    at = opened(PROMPT, run=run.id, text=TEXT, sae="relu-0.4", base="none")
    assert len(at.metric) == 3
    assert "Choose a second SAE above" in text(at)


def test_what_both_saes_see_is_what_each_sees(run: Run) -> None:
    at = opened(PROMPT, run=run.id, text=TEXT, sae="gated-0.05", base="relu-0.05")
    table = at.dataframe[1].value
    assert set(table["where"]) <= {"only gated-0.05", "both", "only relu-0.05"}
    # What the other table says of the first SAE.
    own = features(at).set_index("latent")["activation"].to_dict()
    seen = table[table["gated_activation"] > 0]
    assert dict(zip(seen["gated"], seen["gated_activation"], strict=True)) == pytest.approx(own)


def test_a_text_is_kept_for_the_next_page(run: Run) -> None:
    at = opened(PROMPT, run=run.id, text=TEXT)
    field(at).set_value("w7 w8").run()
    at.switch_page(STEER).run()
    assert at.text_area(key="steer.text").value == "w7 w8"


def test_a_rerun_reads_nothing_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    at = opened(PROMPT, run=run.id, text=TEXT)

    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("read twice")

    monkeypatch.setattr("gsae_core.analysis.prompt.analyse", never)
    at.run()


# What is no text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "Expected some text with words, got none; type or paste a sentence."),
        ("   \n", "Expected some text with words, got none; type or paste a sentence."),
        ("w1 " * 700_000, "Expected a text of at most 20,000 characters, got 2,100,000; paste the"),
    ],
)
@pytest.mark.parametrize("page", [PROMPT, STEER])
def test_what_is_no_text_is_one_sentence(run: Run, page: str, words: str, sentence: str) -> None:
    at = opened(page, run=run.id, f="2")
    labelled(at.text_area, "Text" if page == PROMPT else "Prompt").set_value(words).run()
    assert sentence in text(at)
    assert "text" not in at.query_params


def test_words_the_tokenizer_lacks_are_said(run: Run) -> None:
    at = opened(PROMPT, run=run.id, text="w1 漢字 w2")
    assert "1 are unknown to this model&#x27;s tokenizer" in text(at).replace("'", "&#x27;")


def test_a_long_text_is_cut_and_says_so(run: Run) -> None:
    at = opened(PROMPT, run=run.id)
    field(at).set_value("w1 " * 30).run()
    assert "16 tokens" in text(at)
    assert "the last 15 do not fit in the context and are left out" in text(at)


def test_a_text_too_long_for_an_address_stays_in_the_session(run: Run) -> None:
    at = opened(PROMPT, run=run.id, text="w1 " * 400)
    assert len(field(at).value) == 1200
    assert "text" not in at.query_params


@pytest.mark.parametrize("page", [PROMPT, STEER])
def test_hostile_text_changes_nothing(run: Run, page: str) -> None:
    at = opened(page, run=run.id, f="2", len="10")
    for words in (HOSTILE, *NASTY, "\u202e\u200bw1\x00"):
        labelled(at.text_area, "Text" if page == PROMPT else "Prompt").set_value(words).run()
        # Prompt shows the text once, in its text area.
        said = text(at) if page == STEER else text(at).replace(words, "")
        for piece in ("<script", "<img", "<form", "<style>*", "position:fixed", "\u202e", "\u200b"):
            assert piece not in said, words


# What the address gets wrong


@pytest.mark.parametrize(
    "asked",
    [
        {
            "tok": ("99", "asks for '99', which is no token from 0 to 5; showing token 5."),
            "base": ("gone", "asks for 'gone', which is no SAE of this run; showing"),
            "by": ("beauty", "asks for 'beauty', which is no measure of the strip"),
            "sort": ("size", "asks for 'size', which is no order"),
        },
        {
            "tok": ("-1", "asks for '-1', which is no token from 0 to 5"),
            "sae": (HOSTILE, "which is no SAE of this run; showing gated-"),
        },
        {"tok": ("nan", "asks for 'nan', which is no token")},
    ],
)
def test_what_the_address_gets_wrong_is_said(run: Run, asked: dict[str, tuple[str, str]]) -> None:
    wrong = {param: value for param, (value, _) in asked.items()}
    at = opened(PROMPT, run=run.id, **{"text": TEXT, **wrong})
    for _, said in asked.values():
        assert said in text(at).replace("&#x27;", "'")
    assert "<img" not in text(at)


# Runs that cannot be looked through


@pytest.mark.parametrize("page", [PROMPT, STEER])
def test_a_model_folder_that_is_gone_is_named(run: Run, page: str) -> None:
    with edited(run.folder / "config.json") as fields:
        fields["model"]["name"] = "/gone/tiny<b>"
    at = opened(page, run=run.id, text=TEXT, f="2")
    assert "Expected a Hugging Face model folder with a config.json" in text(at)
    assert "/gone/tiny&lt;b&gt;" in text(at)


def test_damaged_weights_are_named(run: Run) -> None:
    path = run.sae_folder("gated-0.05") / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    at = opened(PROMPT, run=run.id, text=TEXT, sae="gated-0.05")
    assert "Expected whole safetensors in" in text(at)


def test_an_sae_of_another_place_is_named(run: Run) -> None:
    with edited(run.folder / "config.json") as fields:
        fields["model"]["site"] = "resid_pre"  # 12 wide, where its SAEs read 20
    assert "to take activations of width 12" in text(opened(PROMPT, run=run.id, text=TEXT))


def test_the_page_says_that_the_model_is_busy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PATIENCE", 0.01)
    with cache.alone(run):
        at = opened(PROMPT, run=run.id, text="w30 w31 w32")
    assert "The language model is busy" in text(at)
    assert "for more than 0.01 s; try again in a moment." in text(at)
    at.run()
    assert "4 tokens, read in" in text(at)  # nobody is in the way any more


def test_a_model_too_large_for_the_memory_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.language_model.clear()
    monkeypatch.setattr("gsae_core.runs.plan.cost.free_memory", lambda _device: 1000)
    with pytest.raises(InputError, match=r"of memory free for .*; close what else runs, or look"):
        cache.language_model(run)


# What browsers send


@pytest.mark.parametrize(
    ("sent", "index"),
    [
        *[(0, 0), (3.0, 3), (4, None), (-1, None), (1.5, None), (True, None), ("1", None)],
        *[(None, None), (float("nan"), None), ([1], None), ({"a": 1}, None)],
    ],
)
def test_a_click_names_a_token_there_is(sent: object, index: int | None) -> None:
    assert read_number(sent, range(4)) == index


def test_a_ticked_row_that_is_gone_is_none() -> None:
    for rows, row in (([], None), ([2], 2), ([5], None)):
        assert ticked_row({"selection": {"rows": rows}}, 3) == row


def test_a_quoted_token_hides_nothing_and_is_short() -> None:
    # Six signs for the override, then 18 characters of 24.
    assert quoted("\u202ea b" + "x" * 99) == "⟨202E⟩a·b" + "x" * 15 + "…"
