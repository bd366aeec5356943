"""The Hub page: what it finds, what it offers, what each press does once, and hostile names."""

import json
import shutil
import time
from pathlib import Path

import pytest
from app_pages import HOSTILE, NASTY, labelled, opened, text
from hub_server import TOKEN, Hub, asked
from streamlit.testing.v1 import AppTest
from synthetic import config, write_run

from gsae_core.app import hub_view
from gsae_core.checkpoints import catalog
from gsae_core.checkpoints.catalog import Release, ranged, releases, search
from gsae_core.checkpoints.hub import Facts
from gsae_core.config import sweep
from gsae_core.runs.jobs import job as process
from gsae_core.runs.jobs.job import of_process, read_status, write_status
from gsae_core.runs.run import Run
from gsae_core.runs.work.transfer import PullRequest, PushRequest, Transfer, transfers

HUB = "pages/8_Hub.py"
CFG = b'{"architecture": "gated", "d_in": 12, "d_sae": 24, "metadata": {"model_name": "gpt2"}}'
FILES = {"a/cfg.json": CFG, "a/sae_weights.safetensors": b"w" * 5000}


@pytest.fixture(autouse=True)
def fresh(hub: Hub) -> None:
    hub_view._looked.clear()
    hub_view._described.clear()


@pytest.fixture
def pressed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the transfers that would have been started; no process is."""
    ids: list[str] = []

    def record(transfer: Transfer) -> int:
        ids.append(transfer.id)
        return 1

    monkeypatch.setattr(process, "start", record)
    return ids


@pytest.fixture
def transfer(root: Path, hub: Hub) -> Transfer:
    """A download that was asked for, not begun."""
    hub.add("ada/saes", FILES)
    return asked(root)


@pytest.fixture
def running(transfer: Transfer, worker: int) -> Transfer:
    write_status(transfer.folder, of_process(read_status(transfer.folder), "running", worker))
    return transfer


def stands(transfer: Transfer, state: str, **fields: object) -> None:
    status = read_status(transfer.folder)
    write_status(transfer.folder, status._replace(state=state, **fields))  # pyright: ignore


def keys(at: AppTest) -> set[str]:
    return {str(button.key) for button in at.button}


# Empty, offline, wrong


def test_an_empty_machine_shows_the_catalogue_and_says_what_is_missing(root: Path) -> None:
    at = opened(HUB)
    assert f"{len(releases())} of {len(releases())} releases" in text(at)
    assert "No runs yet. Downloaded and trained runs appear here." in text(at)
    assert "Choose a run in the sidebar" in text(at)


def test_offline_is_one_sentence_and_the_rest_works(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_run(root, "done")
    at = opened(HUB, repo="ada/saes")
    assert "HF_HUB_OFFLINE is set: nothing is downloaded or uploaded" in text(at)
    assert "Nothing can be listed" in text(at)
    assert {"hub.export", "hub.push"} <= keys(at)


@pytest.mark.parametrize(
    ("repo", "said"),
    [
        ("ada/none", "found no &#x27;ada/none&#x27; there; check its spelling"),
        ("no repository", "expected a repository on the Hub as OWNER/NAME"),
        (HOSTILE, "expected a repository on the Hub as OWNER/NAME"),
        ("ada/saes:../..", "could lead out of the download"),
    ],
)
def test_a_repository_in_the_address_that_is_none_is_a_sentence(
    root: Path, repo: str, said: str
) -> None:
    at = opened(HUB, repo=repo)
    assert said in text(at)
    assert "<img" not in text(at)


def test_a_repository_without_saes_says_how_to_name_a_file(root: Path, hub: Hub) -> None:
    hub.add("ada/lm", {"model.safetensors": b"w" * 100})
    said = text(opened(HUB, repo="ada/lm"))
    assert "None of its files has the layout of a known SAE library" in said


# Looking and fetching


def test_the_only_sae_of_a_repository_is_chosen_and_described(root: Path, hub: Hub) -> None:
    hub.add("ada/saes", FILES, card={"license": "mit"})
    at = opened(HUB, repo="ada/saes")
    said = text(at)
    assert at.selectbox(key="sae").value == "a"
    assert "licence mit" in said
    assert "yes, SAELens 6 files can be read" in said
    assert "12 wide activations, 24 features" in said
    assert at.button(key="hub.download").label == "Download 5.1 kB"
    assert hub.requests("GET", "/storage/") == []


def test_of_several_saes_one_is_chosen_and_the_address_may_name_it(root: Path, hub: Hub) -> None:
    both = FILES | {path.replace("a/", "b/"): content for path, content in FILES.items()}
    hub.add("ada/two", both)
    at = opened(HUB, repo="ada/two")
    assert at.selectbox(key="sae").value is None
    assert "hub.download" not in keys(at)
    assert opened(HUB, repo="ada/two", sae="b").selectbox(key="sae").value == "b"
    assert opened(HUB, repo="ada/two", sae=HOSTILE).selectbox(key="sae").value is None


def test_a_layer_given_for_one_sae_is_not_another_s(root: Path, hub: Hub) -> None:
    hub.add("ada/two", FILES | {path.replace("a/", "b/"): FILES[path] for path in FILES})
    at = opened(HUB, repo="ada/two", sae="a")
    layers = [each for each in at.number_input if each.placeholder == "as stated"]
    layers[0].set_value(3).run()
    at.selectbox(key="sae").set_value("b").run()
    (layer,) = [each for each in at.number_input if each.placeholder == "as stated"]
    assert layer.value is None


def test_what_is_sent_and_exported_is_of_the_run_that_is_chosen(root: Path) -> None:
    for name in ("one", "two"):
        saes = {"saes": sweep(["gated"], [0.3 if name == "one" else 0.6], 64)}
        write_run(root, name, run_config=config().model_copy(update=saes))
    at = opened(HUB, run="one")
    for run, sae in (("one", "gated-0.3"), ("two", "gated-0.6")):
        at.selectbox(key="run").set_value(run).run()
        assert labelled(at.multiselect, "SAEs to send").value == [sae]
        assert labelled(at.selectbox, "SAE to export").value == sae


def test_a_press_starts_one_download_of_the_commit_that_was_shown(
    root: Path, hub: Hub, pressed: list[str]
) -> None:
    repo = hub.add("ada/saes", FILES)
    at = opened(HUB, repo="ada/saes")
    at.button(key="hub.download").click().run()
    (transfer,) = transfers(root)
    assert pressed == [transfer.id]
    request = transfer.request
    assert isinstance(request, PullRequest)
    assert (request.commit, request.to) == (repo.refs["main"], "saes-a")
    assert not request.fold_decoder_norms
    assert "↓ ada/saes · a → saes-a" in text(at)


def test_a_tick_has_decoder_norms_folded(root: Path, hub: Hub, pressed: list[str]) -> None:
    hub.add("ada/saes", FILES)
    at = opened(HUB, repo="ada/saes")
    labelled(at.checkbox, "Fold decoder norms").check().run()
    at.button(key="hub.download").click().run()
    (transfer,) = transfers(root)
    assert isinstance(transfer.request, PullRequest)
    assert transfer.request.fold_decoder_norms


def test_a_transcoder_is_named_before_it_is_fetched(root: Path, hub: Hub) -> None:
    folder = "transcoder_all/layer_0_width_16k_l0_big"
    config = json.dumps({"architecture": "jump_relu", "hf_hook_point_out": "x"}).encode()
    files = {f"{folder}/config.json": config, f"{folder}/params.safetensors": b"w" * 99}
    hub.add("google/gemma-scope-2-1b-pt", files)
    at = opened(HUB, repo="google/gemma-scope-2-1b-pt")
    assert "found a transcoder, which writes other activations than it reads" in text(at)
    assert "hub.download" not in keys(at)


def test_a_name_that_is_taken_or_no_name_starts_nothing(
    root: Path, hub: Hub, pressed: list[str]
) -> None:
    write_run(root, "done")
    hub.add("ada/saes", FILES)
    at = opened(HUB, repo="ada/saes")
    for name, said in (
        ("done", "expected a new folder for the run, found a run in"),
        ("../x", "expected a run name"),
    ):
        labelled(at.text_input, "Name of the run").set_value(name).run()
        at.button(key="hub.download").click().run()
        assert said in text(at)
    assert pressed == []


def test_what_does_not_fit_on_the_disk_cannot_be_started(
    root: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("ada/saes", FILES)
    monkeypatch.setattr(hub_view, "free_bytes", lambda path: 6000)
    at = opened(HUB, repo="ada/saes")
    assert at.button(key="hub.download").disabled
    assert "Opening it takes about 10.2 kB of disk; 6.0 kB are free" in text(at)


def test_files_of_hostile_names_are_shown_as_they_stand(root: Path, hub: Hub) -> None:
    name = "<img src=x onerror=alert(1)>"
    hub.add("ada/odd", {f"{name}/cfg.json": CFG, f"{name}/sae_weights.safetensors": b"w" * 99})
    at = opened(HUB, repo="ada/odd")
    assert "<img" not in text(at)
    assert "&lt;img" in text(at) or at.selectbox(key="sae").value == name


def test_hostile_words_of_a_config_and_a_card_stay_words(root: Path, hub: Hub) -> None:
    nasty = "".join(NASTY[:3])
    fields = CFG.replace(b"gpt2", nasty.encode("unicode_escape").replace(b"\\x", b"\\u00"))
    files = {"a/cfg.json": fields, "a/sae_weights.safetensors": b"w" * 99}
    hub.add("ada/odd", files, card={"license": nasty})
    at = opened(HUB, repo="ada/odd")
    assert "<script" not in text(at)
    assert "<img" not in text(at)
    assert "\u202e" not in text(at)


# Transfers


def test_a_running_download_shows_its_bytes_and_can_be_cancelled(running: Transfer) -> None:
    stands(running, "running", stage="downloading", done=2500, total=5086)
    at = opened(HUB)
    (bar,) = [element.proto.text for element in at.get("progress")]
    assert bar == "downloading: 2.5 kB of 5.1 kB"
    at.button(key=f"hub.stop_{running.id}").click().run()
    assert running.status.state == "cancelling"


def test_every_page_says_how_far_a_download_is_and_once_that_it_ended(running: Transfer) -> None:
    at = opened("pages/9_Help.py")
    assert "↓ starting" in text(at)
    stands(running, "running", stage="downloading", done=2500, total=5000)
    assert "↓ 50 %" in text(at.run())
    stands(running, "finished", pid=None)
    at.run()
    assert [toast.value for toast in at.toast] == ["↓ ada/saes finished"]
    assert "no job running" in text(at)
    assert not at.run().toast


def test_a_transfer_that_is_put_away_meanwhile_ends_no_page(running: Transfer) -> None:
    at = opened("pages/9_Help.py")
    shutil.rmtree(running.folder)
    at.run()
    assert "no job running" in text(at)


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_what_stopped_can_go_on_or_be_put_away(
    root: Path, transfer: Transfer, pressed: list[str], state: str
) -> None:
    stands(transfer, state, error=f"expected 2 GB free, found 1 kB {HOSTILE}")
    at = opened(HUB)
    assert ("expected 2 GB free, found 1 kB" in text(at)) == (state == "failed")
    assert "<img" not in text(at)
    at.button(key=f"hub.on_{transfer.id}").click().run()
    assert pressed == [transfer.id]
    at.button(key=f"hub.away_{transfer.id}").click().run()
    assert transfers(root) == []


def test_a_process_that_is_gone_is_said_to_be(transfer: Transfer) -> None:
    stands(transfer, "running", pid=2**22 - 1, process_started=time.time())
    assert "The process ended unexpectedly" in text(opened(HUB))


def test_a_finished_download_opens_its_run(root: Path, transfer: Transfer) -> None:
    write_run(root, "pulled")
    transfer.add_event("arrived", result="pulled")
    stands(transfer, "finished")
    at = opened(HUB)
    at.button(key=f"hub.open_{transfer.id}").click().run()
    assert at.title[0].value == "Live"


# What is here


def test_a_finished_run_can_be_sent_once_with_the_names_that_were_chosen(
    root: Path, pressed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    write_run(root, "done")
    at = opened(HUB)
    assert at.button(key="hub.push").disabled
    at.text_input(key="hub.push_repo").set_value("ada/mine").run()
    at.button(key="hub.push").click().run()
    (transfer,) = transfers(root)
    assert pressed == [transfer.id]
    assert transfer.request == PushRequest("done", ("gated-0.1",), "ada/mine", False)


def test_without_a_token_nothing_is_sent_and_no_field_asks_for_one(
    root: Path, pressed: list[str]
) -> None:
    write_run(root, "done")
    at = opened(HUB)
    at.text_input(key="hub.push_repo").set_value("ada/mine").run()
    at.button(key="hub.push").click().run()
    assert "expected a Hub token that may write, found none" in text(at)
    assert pressed == []
    assert not [field for field in at.text_input if "token" in field.label.lower()]


def test_an_unfinished_run_is_neither_sent_nor_exported(root: Path) -> None:
    write_run(root, "half", "cancelled", share=0.5)
    at = opened(HUB)
    assert "half is cancelled: only finished SAEs can be exported or sent" in text(at)
    assert not {"hub.export", "hub.push"} & keys(at)


def test_the_library_names_origin_and_size_and_deletes_once_asked_again(root: Path) -> None:
    write_run(root, "mine")
    foreign = config().model_copy(update={"imported": "Gemma Scope"})
    run = write_run(root, "theirs", run_config=foreign)
    at = opened(HUB)
    (table,) = [t.value for t in at.dataframe if "from" in t.value.columns]
    assert dict(zip(table["run"], table["from"], strict=True)) == {
        "mine": "trained here",
        "theirs": "Gemma Scope",
    }
    assert all(size[-2:] in ("kB", "MB") for size in table["size"])
    at.selectbox(key="hub.doomed").select("theirs").run()
    at.button(key="hub.delete").click().run()
    assert run.folder.exists()
    at.button(key="hub.confirm_delete").click().run()
    assert not run.folder.exists()


@pytest.mark.slow
def test_an_export_says_how_close_it_is_and_a_second_one_why_not(
    finished: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "exports" / "x"
    done, said = hub_view.export(finished, "gated-0.05", "jumprelu", folder)
    assert done
    assert said.startswith("largest difference ")
    done, said = hub_view.export(finished, "gated-0.05", "jumprelu", folder)
    assert not done
    assert said.startswith("expected")
    assert hub_view.zipped(folder)[:2] == b"PK"


# The catalogue


def test_every_release_is_complete_enough_to_be_found() -> None:
    found = releases()
    assert len(found) == 110
    assert sum(release.count or 0 for release in found) == 9677
    qwen = [release.count or 0 for release in found if release.layout == "qwen_scope"]
    assert (len(qwen), sum(qwen)) == (14, 544)
    for release in found:
        assert (release.repo is None) == (release.where is not None)
        assert release.layout in hub_view.FORMATS
        assert release.l0 is None or release.l0[0] <= release.l0[1]


def test_the_gated_release_is_found_by_word_layer_architecture_and_width() -> None:
    (release,) = search("pythia-70m", layer=3, architecture="gated", width=4096)
    assert release.repo == "canrager/lm_sae"
    assert release.prefix == "pythia70m_sweep_gated_ctx128_0730"
    assert search("pythia-70m", layer=5, architecture="gated") == []


def test_an_l0_finds_what_reaches_it_and_nothing_that_states_none() -> None:
    found = search("gemma-scope-2b-pt-res", l0=71)
    assert [release.repo for release in found] == ["google/gemma-scope-2b-pt-res"]
    assert not search("lm_sae", l0=71)


def test_what_is_not_on_the_hub_says_where_it_is() -> None:
    (release,) = search("OpenAI v5", width=32768, architecture="topk", layer=0)[-1:]
    assert release.repo is None
    assert str(release.where).startswith("az://openaipublic/")
    assert "Azure" in str(release.note)


def test_a_picked_release_fills_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    state: dict[str, object] = {}
    monkeypatch.setattr(hub_view.st, "session_state", state)
    (gated,) = search("pythia-70m", architecture="gated")
    hub_view.choose_release(gated)
    assert state["repo"] == "canrager/lm_sae:pythia70m_sweep_gated_ctx128_0730"
    hub_view.choose_release(Release(title="t", layout="openai", model="m", where="az://x"))
    assert state["repo"] == ""


def test_layers_are_written_as_a_person_would() -> None:
    assert ranged(()) == "–"
    assert ranged((0, 1, 2)) == "0–2"
    assert ranged((3, 4)) == "3, 4"
    assert [hub_view.short(n) for n in (4096, 16384, 2**20)] == ["4k", "16k", "1M"]
    assert catalog.Release.model_validate(
        {"title": "t", "layout": "openai", "model": "m", "layers": "2-4"}
    ).layers == (2, 3, 4)


def test_what_names_do_not_tell_is_said_to_come_later() -> None:
    from gsae_core.checkpoints.formats.libraries import HookPoint
    from gsae_core.checkpoints.hub import HubFile, HubSAE

    sae = HubSAE("x.pt", None, (HubFile("x.pt", 10, None, "0" * 40),))
    told = hub_view.compatibility(sae, Facts(None, None, None, HookPoint()))
    assert told["opens here"] == "not known until downloaded"
    assert told["download"] == "10 bytes in 1 file: x.pt"
