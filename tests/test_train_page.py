"""The Train page without a browser: filled in, changed, refused, mended, started."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from app_pages import HOSTILE, opened, text
from streamlit.testing.v1 import AppTest
from synthetic import config, write_run

from gsae_core.app.train_form import FIELDS
from gsae_core.cli.arguments import Train, parse, run_config
from gsae_core.cli.main import COMMANDS
from gsae_core.presets import preset
from gsae_core.runs import run as launch
from gsae_core.runs.run import list_runs

TRAIN = "pages/1_Train.py"


def said(at: AppTest) -> str:
    return text(at).replace("&#x27;", "'")


def command(at: AppTest) -> Train:
    """Return what the shown command line says to a shell."""
    words = shlex.split(at.code[0].value)
    assert words[:3] == ["python", "-m", "gsae_core"]
    flags = parse(words[3:], COMMANDS)
    assert isinstance(flags, Train)
    return flags


def test_the_page_opens_ready_to_start_the_quick_set_up(root: Path) -> None:
    at = opened(TRAIN)
    assert at.code[0].value == "python -m gsae_core train --preset quick"
    assert not at.button(key="train.start").disabled
    assert "hook points" not in said(at)  # nothing of several
    assert "more_layers" not in at.query_params
    assert at.text_input(key="tokens").value == "1,048,576"
    assert "4.27 M parameters · 4 layers · d_model 256 · ships with the package" in said(at)
    assert "a rough estimate: no run was trained here yet" in said(at)


def test_the_form_starts_what_its_command_line_and_its_notebook_cell_say(
    root: Path, started: list[str]
) -> None:
    at = opened(TRAIN)
    at.text_input(key="sparsity").set_value("0.3, 0.6")
    at.number_input(key="width").set_value(768)
    at.text_input(key="tokens").set_value("2e6")
    at.text_input(key="data").set_value("my files/*.txt; rm -rf ~")
    at.selectbox(key="site").set_value("attn_z")
    at.run()
    flags = command(at)
    scope: dict = {}
    exec(at.code[1].value.partition("\nrun = ")[0], scope)
    at.button(key="train.start").click().run()
    assert at.title[0].value == "Live"
    (run,) = list_runs(root)
    assert run.config == run_config(flags) == scope["config"]
    assert [spec.d_sae for spec in run.config.saes] == [768, 768, 1152, 1152]
    assert run.config.train.n_tokens == 2_000_000
    assert run.config.model.site == "attn_z"
    assert started == [run.id]


def test_what_the_run_is_too_short_for_is_said_before_the_button(root: Path) -> None:
    at = opened(TRAIN)
    # 1,048,576 tokens in batches of 2048 are 512 steps; quick says 20, 0.2, 20, 100 and 50.
    assert "rises over 20 steps, falls over the last 102" in said(at)
    assert "resampled every 100 steps, if dead for 50" in said(at)
    short = opened(TRAIN, tokens="40960")  # 20 steps
    assert (
        "All 20 steps lie within the learning-rate warm-up of 20, so the learning rate never "
        "reaches its peak; shorten the warm-up or train longer." in said(short)
    )
    assert not short.button(key="train.start").disabled
    steps = ("lr_warmup_steps", "sparsity_warmup_steps", "revive_every", "revive_window")
    left_alone = opened(TRAIN, tokens="40960", **dict.fromkeys(steps, ""))
    assert "never reaches" not in said(left_alone)
    assert "rises over 1 step, falls over the last 4" in said(left_alone)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("sparsity", "0.1 lots", "λ: expected a number, like 0.1, got 'lots'"),
        ("sparsity", "-1", "λ: expected a number greater than 0, got -1.0"),
        ("tokens", "many", "Tokens: expected a whole number, like 2_000_000, got"),
        ("tokens", "100", "expected n_tokens of at least one batch (2048), got 100"),
        ("lr", "0", "Learning rate: expected a number greater than 0, got 0.0"),
        ("device", "toaster", "Device: expected a device of this machine (auto, cpu"),
        ("data", "", "Data: expected a value, got none"),
    ],
)
def test_a_mistake_in_the_form_is_one_sentence_beside_it_until_it_is_mended(
    root: Path, key: str, value: str, sentence: str
) -> None:
    at = opened(TRAIN)
    before = at.text_input(key=key).value
    at.text_input(key=key).set_value(value).run()
    assert sentence in said(at)
    assert at.button(key="train.start").disabled
    at.text_input(key=key).set_value(before).run()
    assert sentence not in said(at)
    assert not at.button(key="train.start").disabled


def test_a_form_without_architectures_says_what_to_choose(root: Path) -> None:
    at = opened(TRAIN)
    at.multiselect(key="arch").set_value([]).run()
    wanted = "Architectures: expected a value, got none"
    assert wanted in said(at)


def test_each_architecture_has_the_field_that_sets_its_sparsity(root: Path) -> None:
    at = opened(TRAIN)
    at.multiselect(key="arch").set_value(["gated", "jumprelu", "topk"]).run()
    at.text_input(key="jumprelu_sparsity").set_value("0.002")
    at.text_input(key="k").set_value("8 16").run()
    saes = run_config(command(at)).saes
    assert [(s.architecture, s.sparsity) for s in saes if s.architecture != "gated"] == [
        ("jumprelu", 0.002),
        ("topk", 8),
        ("topk", 16),
    ]
    at.multiselect(key="arch").set_value(["topk"]).run()
    assert [field.key for field in at.text_input if field.key in ("sparsity", "k")] == ["k"]


def drawn(at: AppTest, key: str) -> bool:
    return any(field.key == key for field in at.text_input)


def test_rarer_settings_are_drawn_when_they_are_looked_for_and_kept_when_they_are_closed(
    root: Path,
) -> None:
    at = opened(TRAIN)
    assert not drawn(at, "held_out")
    at.session_state["train.advanced"] = True
    at.run()
    assert at.text_input(key="held_out").value == "0.05"
    at.text_input(key="held_out").set_value("0.1")
    at.session_state["train.advanced"] = False
    at.run()
    assert drawn(at, "held_out")
    assert command(at).held_out == 0.1
    at.text_input(key="held_out").set_value("0.05").run()
    assert not drawn(at, "held_out")
    assert at.code[0].value == "python -m gsae_core train --preset quick"


def test_a_rarer_setting_in_the_address_is_in_the_form_and_still_there_after_a_press(
    root: Path,
) -> None:
    at = opened(TRAIN, held_out="0.2")
    assert at.text_input(key="held_out").value == "0.2"
    at.text_input(key="tokens").set_value("2e6").run()
    assert at.text_input(key="held_out").value == "0.2"
    assert command(at).held_out == 0.2


def test_chats_and_separators_of_the_address_are_in_the_form_beside_the_other_switches(
    root: Path,
) -> None:
    at = opened(TRAIN, chat="true", separator="---")
    switches = {toggle.key: toggle.value for toggle in at.toggle if toggle.key in FIELDS}
    assert switches.pop("chat") is True
    assert switches == dict.fromkeys(("detach_b_dec", "screened", "cache_activations"), False)
    assert (command(at).chat, command(at).separator) == (True, "---")


def test_the_form_is_whole_again_after_another_page(root: Path) -> None:
    at = opened(TRAIN)
    at.session_state["train.advanced"] = True
    at.run().switch_page("pages/9_Help.py").run()
    at.switch_page(TRAIN).run()
    assert at.code[0].value == "python -m gsae_core train --preset quick"
    assert not at.button(key="train.start").disabled


def test_models_are_compared_when_asked_for(root: Path) -> None:
    at = opened(TRAIN)
    assert not at.dataframe
    at.session_state["train.compare_models"] = True
    assert "bundled" in list(at.run().dataframe[0].value["model"])


def test_another_set_up_fills_the_form(root: Path) -> None:
    at = opened(TRAIN)
    at.text_input(key="tokens").set_value("5000").run()
    at.selectbox(key="preset").set_value("gpt2-small").run()
    assert at.selectbox(key="model").value == "openai-community/gpt2"
    assert at.text_input(key="tokens").value == "300,000,000"
    assert at.code[0].value == "python -m gsae_core train --preset gpt2-small"
    assert "124 M parameters · 12 layers · d_model 768 · from the Hub" in said(at)
    at.selectbox(key="preset").set_value("gemma-2-2b").run()
    assert "its licence must be accepted on the Hub" in said(at)


def test_a_model_nobody_knows_is_taken_at_its_word(root: Path) -> None:
    at = opened(TRAIN, model=HOSTILE)
    shown = [str(e.value) for kind in (at.html, at.markdown, at.caption) for e in kind]
    assert not any("<img" in part or "![](" in part for part in shown)
    assert "known once the model is downloaded" in said(at)
    assert command(at).model == HOSTILE


def test_a_place_the_paper_has_no_runs_at_drops_the_name_of_the_set_up(root: Path) -> None:
    at = opened(TRAIN, preset="pythia-2.8b", site="mlp_hidden")
    assert "pythia-2.8b has no runs at this hook point" in said(at)
    assert command(at).preset is None


def test_other_sites_of_a_family_without_a_table_are_uncertain(root: Path, tmp_path: Path) -> None:
    fields = {"model_type": "phi", "hidden_size": 8, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    at = opened(TRAIN, model=str(tmp_path), site="mlp_out")
    assert "Of this phi model only resid_pre and resid_post are certain before it is" in said(at)
    assert not at.button(key="train.start").disabled
    assert "are certain" not in said(opened(TRAIN, model=str(tmp_path), site="resid_post"))


def test_the_address_fills_the_form(root: Path) -> None:
    at = opened(TRAIN, layer="1", site="mlp_out", sparsity="0.5", width="2048", tokens="1e6")
    made = run_config(command(at))
    assert (made.model.layer, made.model.site) == (1, "mlp_out")
    assert made.train.n_tokens == 1_000_000
    assert {spec.sparsity for spec in made.saes} == {0.5}
    assert made.saes[0].d_sae == 2048


def test_values_of_the_address_that_cannot_be_are_corrected_and_named(root: Path) -> None:
    at = opened(TRAIN, layer="99", site="nowhere", width="-3", dtype=HOSTILE)
    assert "Layer: 99 is not a choice here; showing 2" in said(at)
    assert "Site: nowhere is not a choice here; showing resid_post" in said(at)
    assert "Width: -3 is not a choice here; showing 1024" in said(at)
    assert "<img" not in text(at)
    assert at.code[0].value == "python -m gsae_core train --preset quick"


def test_a_smaller_model_takes_the_layer_along(root: Path) -> None:
    at = opened(TRAIN, preset="gpt2-small")
    assert at.number_input(key="layer").value == 8
    at.selectbox(key="model").set_value("bundled").run()
    assert at.number_input(key="layer").value == 3
    assert "Layer 8 was set to 3: the model has 4 blocks." in said(at)


def test_a_run_of_the_address_is_filled_in_and_can_be_changed(
    root: Path, started: list[str]
) -> None:
    write_run(root, "first")
    at = opened(TRAIN, **{"from": "first"})
    assert at.text_input(key="sparsity").value == "0.1 0.2 0.4 0.8"
    assert run_config(command(at)) == config()
    at.text_input(key="seed").set_value("3").run()
    at.button(key="train.start").click().run()
    (new,) = [run for run in list_runs(root) if run.id != "first"]
    assert new.config.seed == 3
    assert new.config.train == config().train
    assert started == [new.id]


def test_an_unknown_run_of_the_address_is_named(root: Path) -> None:
    at = opened(TRAIN, **{"from": HOSTILE})
    assert "is not on this machine; showing quick." in said(at)
    assert "<img" not in text(at)


def test_earlier_results_say_which_l0_to_expect_and_how_long_it_takes(root: Path) -> None:
    write_run(root, "first")
    at = opened(TRAIN, **{"from": "first"})
    # 12 / 0.1 and 16 / 0.8 of the made-up evaluation.
    for part in ("λ 0.1 ", "→ L0 120", "λ 0.8 ", "→ L0 20"):
        assert part in said(at)
    assert "L0 as in run first at this hook point, interpolated over λ." in said(at)
    # The same 512 steps took it 0.4 s each.
    assert "about 3 min 25 s, at the speed of first" in said(at)
    # A newer run of one step that took 5 s to start would say 43 minutes.
    brief = write_run(root, "brief").folder / "metrics.jsonl"
    row = json.loads(brief.read_text().splitlines()[0])
    brief.write_text(json.dumps(row | {"step": 1, "seconds": 5.0}) + "\n")
    at = opened(TRAIN, **{"from": "first"})
    assert "about 3 min 25 s, at the speed of first" in said(at)


@pytest.mark.parametrize("state", ["running", "failed"])
def test_runs_that_are_not_finished_promise_no_l0(root: Path, state: str) -> None:
    write_run(root, "other", "failed" if state == "failed" else "running", share=0.5)
    at = opened(TRAIN)
    assert "→ L0" not in said(at)


def test_what_does_not_fit_is_refused_and_one_press_mends_it(root: Path) -> None:
    at = opened(TRAIN, width=str(2**28))
    assert "expected memory for about" in said(at)
    assert at.button(key="train.start").disabled
    at.button(key="train.fix_0_width").click().run()
    width = at.number_input(key="width").value
    assert width is not None
    assert width < 2**28
    assert "expected memory for about" not in said(at)


def test_a_price_makes_a_cost(root: Path) -> None:
    assert "Cost" not in said(opened(TRAIN))
    assert "at 3.60 an hour" in said(opened(TRAIN, price="3.6"))


def test_lambdas_are_spaced_by_a_press(root: Path) -> None:
    at = opened(TRAIN)
    at.number_input(key="train.log_low").set_value(0.01)
    at.number_input(key="train.log_high").set_value(1.0)
    at.number_input(key="train.log_n").set_value(3)
    at.button(key="train.log_fill").click().run()
    assert at.text_input(key="sparsity").value == "0.01 0.1 1"
    at.number_input(key="train.log_low").set_value(2.0)
    at.button(key="train.log_fill").click().run()
    assert "expected two numbers above 0, the smaller first, got 2 and 1" in said(at)


def test_ten_lines_are_shown_and_a_hostile_corpus_stays_text(root: Path, tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>\t![](http://x)\u202e\u200b\x07\n" + "a" * 10_000
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(nasty, encoding="utf-8")
    at = opened(TRAIN, data=str(corpus), peek="true")
    (strip,) = [str(e.value) for e in at.html if "First lines as tokens" in str(e.value)]
    assert "<script" not in strip
    for sign in ("&lt;", "⇥", "↵", "⟨202E⟩", "⟨200B⟩", "⟨0007⟩"):
        assert sign in strip
    assert "tokens read" in said(at)


def test_a_corpus_that_is_not_there_is_a_sentence_beside_the_form(root: Path) -> None:
    at = opened(TRAIN, data="no/such/file.txt", peek="true")
    assert "nothing at no/such/file.txt: check the path" in said(at)


def test_two_visitors_who_press_start_share_one_run(root: Path, started: list[str]) -> None:
    one, two = opened(TRAIN), opened(TRAIN)
    one.button(key="train.start").click().run()
    two.button(key="train.start").click().run()
    (run,) = list_runs(root)
    assert two.title[0].value == "Live"
    assert two.selectbox(key="run").value == run.id


def test_another_seed_is_another_run(root: Path, started: list[str]) -> None:
    quick = preset("quick").config()
    first = launch.launch(root, quick, nonce="a1")
    again = launch.launch(root, quick, nonce="b2")
    other = launch.launch(root, quick.model_copy(update={"seed": 1}), nonce="c3")
    assert again.folder == first.folder
    assert other.folder != first.folder


def test_further_layers_and_sites_are_read_in_the_same_pass(root: Path, started: list[str]) -> None:
    at = opened(TRAIN, sparsity="0.5", more_layers="3")
    assert at.number_input(key="layer").value == 2
    at.multiselect(key="more_sites").set_value(["mlp_out"]).run()
    # Gated and ReLU at two sites of two layers.
    assert "8 SAEs at once, at 4 hook points in one pass of the model" in said(at)
    assert "blocks.3.hook_mlp_out" in said(at)
    assert at.code[0].value.endswith("--layer 2 3 --site resid_post mlp_out --sparsity 0.5")
    at.button(key="train.start").click().run()
    (run,) = list_runs(root)
    assert run.config == run_config(command(opened(TRAIN, **{"from": run.id})))
    assert [place.layer for place in run.config.places] == [2, 2, 3, 3]
    again = opened(TRAIN, **{"from": run.id})
    assert again.multiselect(key="more_layers").value == [3]
    assert again.multiselect(key="more_sites").value == ["mlp_out"]


@pytest.mark.slow
def test_a_smaller_model_takes_further_layers_along(root: Path) -> None:
    at = opened(TRAIN, preset="gpt2-small", more_layers="9")
    at.selectbox(key="model").set_value("bundled").run()
    assert at.multiselect(key="more_layers").value == []
    assert not at.button(key="train.start").disabled


def test_a_folder_of_vectors_has_no_field_or_word_of_a_text(root: Path, tmp_path: Path) -> None:
    write_run(root, "on-text", run_config=config())
    (folder := tmp_path / "embeddings").mkdir()
    np.save(folder / "a.npy", np.ones((100, 8), np.float32))
    asked = {"activations": str(folder), "width": "64", "tokens": "60000", "eval_tokens": "9"}
    at = opened("pages/1_Train.py", **asked)
    labels = {widget.label for kind in (at.text_input, at.selectbox, at.toggle) for widget in kind}
    assert {"Vectors", "Evaluation vectors", "Held-out share"} <= labels
    assert not labels & {"Tokens", "Text", "BOS", "Precision", "Context length"}
    assert at.button(key="train.start").label == "Start 60 k vectors"
    assert "**1 · Vectors**" in said(at)
    assert "bundled model" not in said(at)
    # Not at the speed of a run on text, most of which is a language model's.
    assert "a few seconds, a rough estimate: no run on vectors was trained here yet" in said(at)
    assert " tokens" not in said(at)
    at = opened("pages/1_Train.py", activations=str(tmp_path / "none"))
    assert at.button(key="train.start").disabled
    assert "expected a folder of vectors, found none" in said(at)
