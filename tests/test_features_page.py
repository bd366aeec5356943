"""The Features page without a browser: every state, bad addresses, hostile words."""

import time
from pathlib import Path

import pytest
from app_pages import HOSTILE, NASTY, edited, labelled, opened, text
from streamlit.testing.v1 import AppTest
from synthetic import config, write_run
from synthetic_index import DEAD, THETA, write_index, write_weights

from gsae_core.app import components, feature_index, feature_list, feature_view
from gsae_core.config import SAESpec, sweep
from gsae_core.runs.jobs.job import Status, write_status
from gsae_core.runs.run import Run
from gsae_core.runs.work.index import index_folder

PAGE = "pages/5_Features.py"
WIDTH = 60


def make_run(root: Path, *, width: int = WIDTH, name: str = "done") -> Run:
    saes = {"saes": sweep(["gated", "relu"], [0.3], width)}
    return write_run(root, name, run_config=config().model_copy(update=saes))


def specs(run: Run) -> tuple[SAESpec, SAESpec]:
    return run.config.saes[0], run.config.saes[1]


@pytest.fixture
def indexed(root: Path) -> Run:
    run = make_run(root)
    for spec in specs(run):
        write_index(run, spec)
    return run


# What there is to show


def test_a_feature_shows_its_numbers_words_and_examples(indexed: Run) -> None:
    said = text(opened(PAGE, run="done", feature="7"))
    # Latent 7 fires on 8 of 64 x 15 = 960 counted tokens: 1 in 120.
    assert "1 token in 120" in said
    assert "8 of 960 tokens" in said
    assert "Nothing between 0 and θ = 1: it jumps." in said
    assert "w7" in said
    assert "Feature 7" in said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fired": 870}, "Fires on <b>90.6 % of tokens</b>"),
        ({"gamma": -0.8}, "better with the other sign"),
    ],
)
def test_dense_features_and_negative_gammas_are_said_in_true_words(
    indexed: Run, changed: dict[str, float], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = feature_view.Feature.stats
    monkeypatch.setattr(
        feature_view.Feature, "stats", property(lambda self: stats.__get__(self) | changed)
    )
    assert said in text(opened(PAGE, run="done", feature="7"))


def test_the_baseline_has_no_gate_and_no_band(indexed: Run) -> None:
    said = text(opened(PAGE, run="done", sae=specs(indexed)[1].name, feature="7"))
    assert "no gate, no empty band" in said
    assert "How its gate decides" not in said


def test_the_matched_feature_is_under_the_same_tokens(indexed: Run) -> None:
    said = text(opened(PAGE, run="done", feature="7"))
    assert "underline</span>: relu-0.3 ·" in said
    assert "only relu-0.3" in said


def test_indices_over_other_tokens_are_not_compared(indexed: Run) -> None:
    with edited(index_folder(indexed, specs(indexed)[1].name) / "manifest.json") as fields:
        fields["tokens_sha256"] = "1" * 64
    assert "expected two indices over the same tokens" in text(opened(PAGE, run="done"))


@pytest.mark.parametrize("view", ["Top", "Quantiles", "Random", "Near threshold", "Just missed"])
@pytest.mark.parametrize("ctx", ["snippet", "full"])
def test_every_list_of_examples_is_drawn(indexed: Run, view: str, ctx: str) -> None:
    said = text(opened(PAGE, run="done", feature="9", view=view, ctx=ctx, lines="true"))
    assert said.count('role="listitem"') > 0


def test_a_dead_feature_shows_weights_what_it_missed_and_its_alive_neighbours(
    indexed: Run,
) -> None:
    at = opened(PAGE, run="done", feature=str(DEAD))
    said = text(at)
    assert "Feature 3 is dead" in said
    assert "did not fire in 960 tokens" in said
    assert "Nearest features that fire" in said
    assert "came nearest to firing" in "".join(each.value for each in at.subheader)
    assert "How strongly it fires" not in said


# The list


def table(at: AppTest) -> list[int]:
    return at.dataframe[0].value["feature"].tolist()


def test_the_list_holds_every_feature_and_says_how_many(indexed: Run) -> None:
    at = opened(PAGE, run="done")
    assert table(at) == list(range(WIDTH))
    assert f"{WIDTH} of {WIDTH} features." in text(at)


def test_an_address_filters_the_list_and_the_first_of_it_is_shown(indexed: Run) -> None:
    # Latent i fires on 1 + i % 40 tokens: 39 or 40 of them are latents 38 and 39.
    at = opened(PAGE, run="done", fired="39..")
    assert table(at) == [38, 39]
    assert f"2 of {WIDTH} features." in text(at)
    assert at.number_input(key="feature").value == 38


def test_tokens_are_searched_the_most_specific_feature_first(indexed: Run) -> None:
    at = opened(PAGE, run="done", q="w7")
    index = indexed.features(specs(indexed)[0].name)
    assert table(at) == index.by_text("w7")["feature"].tolist()


def test_a_filter_that_leaves_nothing_is_named_and_can_be_cleared(indexed: Run) -> None:
    at = opened(PAGE, run="done", dens="0.9..1", theta="0..")
    said = text(at)
    assert f"The filter on feature density excludes most: {WIDTH} of {WIDTH} features." in said
    assert "No feature is left" in said
    at.button(key="features.clear_all").click().run()
    assert f"{WIDTH} of {WIDTH} features." in text(at)


def test_what_is_no_range_filters_nothing_and_says_so(indexed: Run) -> None:
    at = opened(PAGE, run="done", gamma="lots")
    assert "γ: expected a range like 0.5..0.9" in text(at)
    assert len(table(at)) == WIDTH


def test_next_and_previous_go_through_the_list_as_it_is_filtered(indexed: Run) -> None:
    at = opened(PAGE, run="done", fired="38..40", sort="most frequent")
    assert table(at) == [39, 38, 37]
    assert at.number_input(key="feature").value == 39
    at.button(key="features.next").click().run()
    assert at.number_input(key="feature").value == 38
    at.button(key="features.previous").click().run()
    at.button(key="features.previous").click().run()
    assert at.number_input(key="feature").value == 37


def test_a_random_feature_fires_and_another_press_draws_again(indexed: Run) -> None:
    at = opened(PAGE, run="done")
    drawn = set()
    for _ in range(4):
        at.button(key="features.random").click().run()
        drawn.add(at.number_input(key="feature").value)
    assert len(drawn) > 1
    assert DEAD not in drawn


def test_a_long_list_shows_2_000_rows_and_all_on_demand(root: Path) -> None:
    run = make_run(root, width=3000)
    write_index(run, specs(run)[0])
    at = opened(PAGE, run="done")
    assert len(table(at)) == 2000
    assert "2,000 of 3,000 features." in text(at)
    at.toggle(key="features.everything").set_value(True).run()
    assert len(table(at)) == 3000


def test_a_click_on_a_bar_is_a_range_of_densities() -> None:
    assert feature_list.bar_range([{"low": 0.001, "high": 0.01}]) == "0.001..0.01"
    two = [{"low": 0.001, "high": 0.01}, {"low": 0.01, "high": 0.1}]
    assert feature_list.bar_range(two) == "0.001..0.1"
    for nothing in (None, [], {}, [{"low": "x", "high": 1}], [{}]):
        assert feature_list.bar_range(nothing) == ""


def test_only_a_link_that_was_offered_is_followed() -> None:
    assert components.read_number(7, [7]) == 7
    for sent in (8, True, "7", None, 7.5, float("nan")):
        assert components.read_number(sent, [7]) is None


# Addresses


@pytest.mark.parametrize("asked", ["99999", "x"])
def test_a_feature_out_of_range_is_corrected_in_words(indexed: Run, asked: str) -> None:
    at = opened(PAGE, run="done", feature=asked)
    assert f"asks for &#x27;{asked}&#x27;, which is no feature from 0 to " in text(at)
    assert at.number_input(key="feature").value == 0


@pytest.mark.parametrize(
    "parameters",
    [
        {"run": "gone"},
        {"run": "../etc"},
        {"sae": "none-such"},
        {"base": "none-such"},
        {"view": "Sideways"},
        {"ctx": "novel"},
        {"sort": "upwards"},
        {"life": "undead"},
        {"feature": "-1"},
        {"feature": "1e9"},
        {"feature": ""},
        {"q": HOSTILE},
        {"label": HOSTILE},
        {"dens": HOSTILE},
    ],
)
def test_no_address_breaks_the_page(indexed: Run, parameters: dict[str, str]) -> None:
    said = text(opened(PAGE, **{"run": "done"} | parameters))
    assert "<img" not in said


def test_an_sae_with_fewer_features_shows_one_it_has(indexed: Run) -> None:
    # The baseline is half again as wide: feature 80 is of it alone.
    base = specs(indexed)[1].name
    at = opened(PAGE, run="done", sae=base, feature="80")
    labelled(at.selectbox, "SAE").set_value(specs(indexed)[0].name).run()
    assert f"has features 0 to {WIDTH - 1}, no 80" in text(at)


# Labels


def test_a_star_a_label_and_a_note_are_appended(indexed: Run) -> None:
    at = opened(PAGE, run="done", feature="7")
    at.button(key="features.star_it").click().run()
    labelled(at.text_input, "Label").set_value("the letter seven").run()
    labels = indexed.features("gated-0.3").labels
    assert {kind: said.text for kind, said in labels.of(7).items()} == {
        "star": "on",
        "label": "the letter seven",
    }
    at = opened(PAGE, run="done", star="true")
    assert table(at) == [7]
    assert at.dataframe[0].value["label"].tolist() == ["the letter seven"]


def test_what_is_said_of_a_feature_is_of_its_run_and_its_sae_alone(
    root: Path, indexed: Run
) -> None:
    write_index(make_run(root, name="second"), specs(indexed)[0])
    indexed.features("gated-0.3").labels.add(7, "label", "the letter seven", author="ada")
    at = opened(PAGE, run="done", feature="7")
    assert labelled(at.text_input, "Label").value == "the letter seven"
    at.session_state["features.notes"] = True  # the popover is open
    labelled(at.run().text_area, "Notes").set_value("seen in dates").run()
    for name, label, note in (("second", "", ""), ("done", "the letter seven", "seen in dates")):
        at.selectbox(key="run").set_value(name).run()
        assert labelled(at.text_input, "Label").value == label
        at.session_state["features.notes"] = True
        assert labelled(at.run().text_area, "Notes").value == note


def test_what_cannot_be_kept_is_said(indexed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from gsae_core.analysis.labels import Labels
    from gsae_core.errors import InputError

    def refuse(*_: object, **__: object) -> None:
        raise InputError("expected 1 kB free, found none")

    at = opened(PAGE, run="done", feature="7")
    monkeypatch.setattr(Labels, "add", refuse)
    at.button(key="features.star_it").click().run()
    assert "expected 1 kB free" in text(at)


# No index, or none that can be used


@pytest.fixture
def bare(root: Path) -> Run:
    run = make_run(root)
    for spec in specs(run):
        write_weights(run, spec)
    return run


def test_without_an_index_the_weights_are_shown_and_one_can_be_built(
    bare: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = opened(PAGE, run="done", feature="7")
    said = text(at)
    assert "Index this SAE to see its top examples." in "".join(each.value for each in at.subheader)
    assert "θ" in said
    # theta = b_mag - exp(r_mag) b_gate = 1.
    assert set(at.dataframe[0].value["theta"]) == {THETA}
    assert at.button(key="features.build").label.startswith("Build the index (≈ ")
    asked: list[tuple[str, int]] = []

    def note(run: Run, name: str, *, n_tokens: int, split: str) -> int:
        asked.append((name, n_tokens))
        return 1

    monkeypatch.setattr(feature_index, "start_index", note)
    at.button(key="features.build").click().run()
    # The one beside it too, over the same tokens.
    assert asked == [("gated-0.3", 1_000_000), ("relu-0.3", 1_000_000)]


def job_status(run: Run, state: str, **fields: object) -> None:
    folder = index_folder(run, "gated-0.3")
    folder.mkdir(parents=True, exist_ok=True)
    values = {"step": 0, "n_steps": 0, "pid": None, "process_started": None, "error": None}
    write_status(folder, Status(**values | {"state": state, "heartbeat": time.time()} | fields))  # type: ignore[arg-type]


def test_a_build_that_moves_shows_how_far_it_is_and_can_be_cancelled(
    bare: Run, worker: int
) -> None:
    from gsae_core.runs.jobs.job import of_process

    job_status(bare, "running")
    folder = index_folder(bare, "gated-0.3")
    status = Status("running", 0, 0, None, None, time.time(), None, "indexing", 250, 1000)
    write_status(folder, of_process(status, "running", worker)._replace(done=250, total=1000))
    at = opened(PAGE, run="done")
    assert "reading tokens: 250 of 1,000" in str(at.get("progress")[0].proto)
    at.button(key="features.cancel_gated-0.3").click().run()
    assert (folder / "control.json").exists()


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("failed", "out of memory"),
        ("lost", "The process ended unexpectedly"),
        ("cancelled", "Building the index of gated-0.3 was cancelled"),
    ],
)
def test_a_build_that_ended_early_says_why_and_can_go_on(bare: Run, state: str, said: str) -> None:
    error = "CUDA out of memory" if state == "failed" else None
    job_status(bare, state, error=error)
    at = opened(PAGE, run="done")
    assert said in text(at)
    assert at.button(key="features.build")


def spoil(run: Run, how: str) -> None:
    folder = index_folder(run, "gated-0.3")
    if how == "cut short":
        (folder / "data-0" / "value.npy").write_bytes(b"short")
    elif how == "damaged":
        (folder / "manifest.json").write_text("{")
    else:
        changes = {"other weights": {"weights_sha256": "0" * 64}, "newer": {"schema_version": 99}}
        with edited(folder / "manifest.json") as fields:
            fields |= changes[how]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("other weights", "the SAE has changed since"),
        ("newer", "a newer version of gsae-core made it"),
        ("cut short", "the index is cut short"),
        ("damaged", "manifest.json"),
    ],
)
def test_an_index_that_cannot_be_used_says_why_and_the_weights_are_shown(
    indexed: Run, how: str, said: str
) -> None:
    spoil(indexed, how)
    at = opened(PAGE, run="done")
    assert said in text(at)
    assert set(at.dataframe[0].value["theta"]) == {THETA}


def test_an_index_cut_short_while_it_is_open_is_not_read_any_more(indexed: Run) -> None:
    at = opened(PAGE, run="done", feature="7")
    spoil(indexed, "cut short")
    at.run()
    assert "the index is cut short" in text(at)


# Words from elsewhere


def test_hostile_tokens_are_shown_as_text(root: Path) -> None:
    run = make_run(root)
    for spec in specs(run):
        write_index(run, spec, vocabulary=[*NASTY, "", " ", "\n", "\t", "ש", "中", "�"])
    for view in ("Top", "Quantiles"):
        for feature in (0, 9):
            at = opened(PAGE, run="done", feature=str(feature), view=view, ctx="full")
            said = text(at)
            fixed = "<div style='position:fixed"
            for sign in ("<script", "<img", "<form", "<style>*", fixed, "\u202e"):
                assert sign not in said
            assert "x" * 1000 not in said
            assert "x" * 1000 not in "".join(at.dataframe[0].value["tokens"])


def test_a_hostile_label_is_shown_as_text(indexed: Run) -> None:
    labels = indexed.features("gated-0.3").labels
    labels.add(7, "label", HOSTILE, author=HOSTILE, model=HOSTILE, score=0.9)
    said = text(opened(PAGE, run="done", feature="7"))
    assert "<img" not in said
    assert "&lt;img" in said
