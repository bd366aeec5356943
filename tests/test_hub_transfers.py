"""Pulls that become runs and pushes that become commits: the whole way over real HTTP."""

import filecmp
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from app_pages import edited
from hub_server import TOKEN, Hub, Repo, asked
from refusals import mistake
from tiny_runs import ended

from gsae_core.checkpoints.checkpoint import load_sae, save_sae
from gsae_core.cli import main
from gsae_core.runs.jobs import job as process
from gsae_core.runs.jobs.job import read_status, write_status
from gsae_core.runs.run import Run
from gsae_core.runs.work import publish
from gsae_core.runs.work.transfer import PullRequest, free_name, run_name, transfers

# The library's own call, which its HTTP client would spell otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "gated-0.05"


@pytest.fixture
def writer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, and a token that may write to it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def files_of(run: Run, name: str) -> dict[str, bytes]:
    files = ("cfg.json", "sae_weights.safetensors")
    return {f"{name}/{file}": (run.sae_folder(name) / file).read_bytes() for file in files}


@pytest.fixture
def released(hub: Hub, finished: Run) -> Repo:
    """One of a run's SAEs on the Hub, as somebody else would have put it there."""
    return hub.add("ada/saes", files_of(finished, NAME))


def pull(to: Path, address: str = "ada/saes") -> int:
    """Return the exit code of the command."""
    return main.main(["pull", address, "--to", str(to)])


def pushing(run: Run, *names: str, to: str = "ada/mine") -> list[str]:
    return ["push", str(run.folder), "--sae", *(names or (NAME,)), "--to", to]


def push(run: Run, *names: str, to: str = "ada/mine") -> int:
    """Return the exit code of the command."""
    return main.main(pushing(run, *names, to=to))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    streams = capsys.readouterr()
    return streams.out + streams.err


# Pull


def test_an_sae_is_pulled_into_a_run_that_computes_the_same(
    released: Repo, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pull(tmp_path / "pulled") == 0
    text = said(capsys)
    assert f"{NAME}: SAELens 6, 2 files" in text
    assert f"commit {released.refs['main'][:12]}" in text
    run = Run.open(tmp_path / "pulled")
    (spec,) = run.config.saes
    ours, theirs = load_sae(finished.sae_folder(NAME)), load_sae(run.sae_folder(spec.name))
    x = torch.randn(8, ours.d_in, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(x), theirs(x))
    assert run.status.state == "finished"
    assert run.config.model.hook_name == finished.config.model.hook_name
    (event,) = [event for event in run.events() if event["event"] == "pulled"]
    assert event["commit"] == released.refs["main"]
    # What came is in the run now, and nowhere twice.
    (transfer,) = transfers(tmp_path)
    assert (transfer.status.state, transfer.result) == ("finished", "pulled")
    assert not (transfer.folder / "files").exists()


def test_norms_are_folded_when_a_pull_asks_for_it(hub: Hub, finished: Run, tmp_path: Path) -> None:
    longer = load_sae(finished.sae_folder(NAME))
    longer.W_dec.data *= 2
    save_sae(longer, tmp_path / NAME, metadata={})
    hub.add("ada/saes", {f"{NAME}/{p.name}": p.read_bytes() for p in (tmp_path / NAME).iterdir()})
    place = ["--model", "gpt2", "--layer", "1", "--site", "resid_post", "--fold-decoder-norms"]
    assert main.main(["pull", "ada/saes", "--to", str(tmp_path / "pulled"), *place]) == 0
    run = Run.open(tmp_path / "pulled")
    folded = load_sae(run.sae_folder(run.config.saes[0].name))
    x = torch.randn(8, longer.d_in, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(folded.encode(x), 2 * longer.encode(x))
    torch.testing.assert_close(folded(x), longer(x))


@pytest.mark.slow
@pytest.mark.usefixtures("released")
def test_a_pulled_sae_is_evaluated_like_our_own(tmp_path: Path) -> None:
    assert pull(tmp_path / "pulled") == 0
    assert main.main(["evaluate", str(tmp_path / "pulled"), "--tokens", "64"]) == 0
    (row,) = Run.open(tmp_path / "pulled").evals()
    assert row["d_sae"] == 6
    assert 0 <= row["l0"] <= 6


def test_several_saes_are_listed_and_one_has_to_be_named(
    hub: Hub, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("ada/saes", files_of(finished, NAME) | files_of(finished, "relu-0.05"))
    assert pull(tmp_path / "pulled") == 2
    assert "expected one SAE, found 2 in ada/saes; name one after a colon" in said(capsys)
    assert main.main(["pull", "ada/saes", "--list"]) == 0
    lines = said(capsys).splitlines()
    assert lines[0].endswith(": 2 of them")
    assert [line.split()[0] for line in lines[1:]] == ["SAE", NAME, "relu-0.05"]
    assert hub.requests("GET", "/storage/") == []
    assert pull(tmp_path / "pulled", "ada/saes:relu-0.05") == 0


@pytest.mark.usefixtures("released")
def test_a_name_that_is_taken_is_refused_before_anything_is_fetched(
    hub: Hub, finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pull(finished.folder) == 2
    assert f"expected a new folder for the run, found a run in {finished.folder}" in said(capsys)
    assert hub.requests("GET", "/storage/") == []
    assert transfers(finished.folder.parent) == []


@pytest.mark.usefixtures("released")
def test_a_pull_that_breaks_says_so_and_goes_on_by_range(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.cut[f"{NAME}/sae_weights.safetensors"] = (200, 99)  # no connection comes further
    assert pull(tmp_path / "pulled") == 2
    assert "the connection broke after 200 bytes; start it again to go on" in said(capsys)
    (transfer,) = transfers(tmp_path)
    assert transfer.status.state == "failed"
    assert "the connection broke" in str(transfer.status.error)
    hub.cut = {}
    hub.seen.clear()
    assert pull(tmp_path / "pulled") == 0
    assert [one.range for one in hub.requests("GET", "/storage/")] == ["bytes=200-"]


def test_what_a_branch_moves_to_meanwhile_changes_nothing(
    released: Repo, finished: Run, root: Path
) -> None:
    transfer = asked(root / "other")
    released.commit({f"{NAME}/sae_weights.safetensors": b"other"})
    assert main.main(["resume", str(transfer.folder)]) == 0
    run = Run.open(root / "other" / "pulled")
    assert torch.equal(
        load_sae(run.sae_folder(run.config.saes[0].name)).W_dec,
        load_sae(finished.sae_folder(NAME)).W_dec,
    )


def test_what_is_no_sae_after_all_fails_with_its_sentence(
    hub: Hub, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("ada/odd", {"params.npz": b"PK\x03\x04 not an archive, really"})
    assert pull(root / "pulled", "ada/odd") == 2
    (transfer,) = transfers(root)
    assert transfer.status.state == "failed"
    assert "params.npz" in str(transfer.status.error)
    assert not (root / "pulled").exists()


@pytest.mark.usefixtures("released")
def test_asking_twice_is_one_transfer(root: Path) -> None:
    first, second = asked(root / "other"), asked(root / "other", to="elsewhere")
    assert first.folder == second.folder
    request = second.request
    assert isinstance(request, PullRequest)
    assert request.to == "elsewhere"


def test_names_of_runs_come_from_repository_and_folder(tmp_path: Path) -> None:
    name = run_name("google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82")
    assert name == "gemma-scope-2b-pt-res-layer_12-width_16k-average_l0_82"
    assert run_name("ada/x", "") == "x"
    assert free_name(tmp_path, "x") == "x"
    (tmp_path / "x").mkdir()
    assert free_name(tmp_path, "x") == "x-2"


@pytest.mark.slow
def test_a_download_outlives_its_starter_and_is_cancelled_and_taken_up(
    hub: Hub, finished: Run, root: Path
) -> None:
    more = {f"{NAME}/activation_whitening.safetensors": os.urandom(2**20)}
    hub.add("ada/big", files_of(finished, NAME) | more)
    hub.slow_seconds = 0.2  # 64 pieces: 13 s
    transfer = asked(root / "other", "ada/big")
    process.start(transfer)
    while read_status(transfer.folder).done < 2**14:
        assert transfer.status.error is None
        time.sleep(0.05)
    assert transfer.status.stage == "downloading"
    transfer.request_cancel(by="test")
    assert ended(transfer) == "cancelled"
    hub.slow_seconds = 0.0
    hub.seen.clear()
    process.start(transfer)
    # SAELens' whitening matrices are read by nobody here, and the sentence says which file it is.
    assert ended(transfer) in ("finished", "failed")
    resumed = [one.range for one in hub.requests("GET", "/storage/")]
    assert any(one and one.startswith("bytes=") and one != "bytes=0-" for one in resumed)


# Push


def test_a_pushed_sae_comes_back_identical(
    writer: Hub, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(finished) == 0
    text = said(capsys)
    repo = writer.repos["models", "ada/mine"]
    assert f"{writer.url}/ada/mine/commit/{repo.refs['main']}" in text
    assert repo.private
    assert sorted(repo.head) == [
        ".gitattributes",
        "README.md",
        "config.json",
        "evals.json",
        f"{NAME}/cfg.json",
        f"{NAME}/feature_stats.safetensors",
        f"{NAME}/norm_deciles.json",
        f"{NAME}/sae_weights.safetensors",
        "pareto.svg",
    ]
    # One commit that made the repository, and one that holds everything.
    assert len(repo.commits) == 2
    assert pull(tmp_path / "back", "ada/mine") == 0
    back = Run.open(tmp_path / "back")
    (spec,) = back.config.saes
    assert filecmp.cmp(
        finished.sae_folder(NAME) / "sae_weights.safetensors",
        back.sae_folder(spec.name) / "sae_weights.safetensors",
        shallow=False,
    )


def test_a_public_repository_is_made_only_when_asked_for(writer: Hub, finished: Run) -> None:
    assert main.main([*pushing(finished, to="ada/open"), "--public"]) == 0
    assert not writer.repos["models", "ada/open"].private


def test_a_push_adds_to_what_is_there(writer: Hub, finished: Run) -> None:
    repo = writer.add("ada/mine", {"notes.txt": b"mine"})
    assert push(finished, NAME, "relu-0.4") == 0
    assert repo.head["notes.txt"] == b"mine"
    assert "relu-0.4/cfg.json" in repo.head
    assert not repo.private


@pytest.mark.parametrize("fault", ["break_upload", "break_commit"])
def test_an_interrupted_push_leaves_no_half_commit(
    writer: Hub,
    finished: Run,
    fault: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library's pauses between tries
    repo = writer.add("ada/mine", {"notes.txt": b"mine"})
    before = dict(repo.refs)
    setattr(writer, fault, True)
    assert "'ada/mine' was not reached; go online and try again" in mistake(
        pushing(finished), capsys
    )
    assert repo.refs == before
    setattr(writer, fault, False)
    assert push(finished) == 0
    assert f"{NAME}/sae_weights.safetensors" in repo.head


def test_a_push_without_a_token_is_a_sentence_and_asks_nothing(
    hub: Hub, finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(finished) == 2
    assert "expected a Hub token that may write, found none; run `hf auth login`" in said(capsys)
    assert hub.seen == []


def test_a_push_of_no_sae_is_a_sentence(
    hub: Hub, finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["push", str(finished.folder), "--sae", "--to", "ada/x"]) == 2
    assert "expected the name of an SAE to push, got none" in said(capsys)


@pytest.mark.parametrize("to", ["mine", "é/b", "a/b/c", "ada/--x", "ada/mine y", "<b>/x"])
def test_a_name_that_is_no_repository_is_refused(
    hub: Hub, finished: Run, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(finished, to=to) == 2
    assert "expected a repository to push to as OWNER/NAME" in said(capsys)


def unfinished(run: Run) -> None:
    write_status(run.folder, read_status(run.folder)._replace(state="cancelled"))


def stopped(run: Run) -> None:
    with edited(run.sae_folder(NAME) / "cfg.json") as fields:
        fields["metadata"]["stopped"] = "step 7: the loss was nan"


def changed(run: Run) -> None:
    (run.sae_folder(NAME) / "sae_weights.safetensors").write_bytes(b"other")


@pytest.mark.parametrize(
    ("spoil", "sae", "sentence"),
    [
        (unfinished, NAME, "expected a finished run, got run, which is cancelled; let it train"),
        (stopped, NAME, f"got {NAME}, which stopped at step 7: the loss was nan; push"),
        (changed, NAME, f"expected the whole weights of {NAME}"),
        (
            lambda run: None,
            "x",
            "expected one of this run's SAEs (gated-0.05, gated-0.4, relu-0.05",
        ),
    ],
)
def test_what_is_not_whole_is_not_pushed(
    writer: Hub,
    finished: Run,
    spoil: Callable[[Run], None],
    sae: str,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(finished)
    assert sentence in mistake(pushing(finished, sae), capsys)
    assert writer.repos == {}


def test_no_token_is_written_into_a_run_a_transfer_or_a_log(
    writer: Hub, finished: Run, tmp_path: Path
) -> None:
    assert push(finished) == 0
    assert pull(tmp_path / "back", "ada/mine") == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_the_folders_that_files_name_are_told(writer: Hub, finished: Run) -> None:
    parcel = publish.pack(finished, [NAME], "ada/mine")
    assert [note.partition(":")[0] for note in parcel.notes] == [
        "config.json and cfg.json name the model's folder on this machine",
        "config.json and cfg.json name the text's folder on this machine",
    ]


def test_resuming_a_transfer_that_is_done_is_a_sentence(
    writer: Hub, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(finished) == 0
    (transfer,) = transfers(tmp_path)
    assert main.main(["resume", str(transfer.folder)]) == 2
    assert "expected a transfer that is not done, got one that led to http" in said(capsys)


def test_a_transfer_is_resumed_on_no_device(
    root: Path, released: Repo, capsys: pytest.CaptureFixture[str]
) -> None:
    transfer = asked(root / "other")
    assert main.main(["resume", str(transfer.folder), "--device", "cpu"]) == 2
    refused = "--device: expected none for a transfer of files, which computes nothing, got 'cpu'"
    assert f"{refused}; leave it out" in said(capsys)


# Language models and data sets


@pytest.mark.slow
def test_a_language_model_and_a_data_set_of_the_hub_are_trained_on(
    hub: Hub, tiny_lm_folder: Path, small_text: Path, tmp_path: Path
) -> None:
    model = {path.name: path.read_bytes() for path in tiny_lm_folder.iterdir()}
    hub.add("ada/tiny", model)
    rows = "".join(json.dumps({"text": line}) + "\n" for line in small_text.read_text().split("\n"))
    hub.add("ada/words", {"train.jsonl": rows.encode()}, kind="datasets")
    words = "--layer 1 --site mlp_hidden --arch gated --sparsity 0.1 --width 6 --tokens 64"
    command = f"train --model ada/tiny --data ada/words {words} --batch-size 16 --eval-tokens 16"
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "gsae_core", *command.split(), "--device", "cpu", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(Run.open(out).evals()) == 1
    assert hub.requests("GET", "/ada/tiny/resolve/")
    assert hub.requests("GET", "/datasets/ada/words/resolve/")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["gated", "down"])
def test_a_model_that_the_hub_refuses_is_one_sentence(
    hub: Hub, tiny_lm_folder: Path, tmp_path: Path, fault: str
) -> None:
    model = {path.name: path.read_bytes() for path in tiny_lm_folder.iterdir()}
    hub.add("ada/tiny", model, gated=fault == "gated")
    if fault == "down":
        hub.cut["model.safetensors"] = (100, 99)
    command = "train --model ada/tiny --sparsity 0.1 --width 6 --tokens 64 --batch-size 16"
    done = subprocess.run(
        [sys.executable, "-m", "gsae_core", *command.split(), "--layer", "1", "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"GSAE_RUNS": str(tmp_path / "runs")},
    )
    assert done.returncode == 2, done.stderr[-3000:]
    said = done.stderr.strip().splitlines()[-1]
    expected = "asks for an agreement first; accept it" if fault == "gated" else "we are offline"
    assert expected in said
