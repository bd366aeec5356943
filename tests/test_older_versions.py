"""What version 0.1 wrote still opens: tests/fixtures/version_0_1, which is never made again."""

import shutil
from pathlib import Path

import pytest
import torch
from app_pages import opened, text
from refusals import refusal
from safetensors.torch import load_file
from tiny_runs import finish
from torch import Tensor

from gsae_core.analysis.labels import Labels
from gsae_core.checkpoints.checkpoint import load_sae
from gsae_core.checkpoints.formats.detect import find_saes
from gsae_core.checkpoints.formats.read import read_found
from gsae_core.runs.run import Run, list_runs, survey
from gsae_core.runs.work.train import evaluate_run
from gsae_core.runs.work.transfer import PullRequest, transfers

FIXTURE = Path(__file__).parent / "fixtures" / "version_0_1"
SAES = ("gated", "gated-A", "relu", "topk", "jumprelu")
KNOWN = load_file(FIXTURE / "functions.safetensors")


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of runs, beside the model and the text that they name."""
    shutil.copytree(FIXTURE, tmp_path / "older")
    monkeypatch.chdir(tmp_path / "older")
    monkeypatch.setenv("GSAE_RUNS", "runs")
    return tmp_path / "older" / "runs"


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_every_run_is_listed_with_its_state(older: Path) -> None:
    assert survey(older)[1] == {}
    assert {run.id: (run.status.state, run.status.step) for run in list_runs(older)} == {
        "finished": ("finished", 12),
        "interrupted": ("cancelled", 7),
        "interrupted-jumprelu": ("cancelled", 7),
        "imported": ("finished", 0),
    }
    run = Run.open(older / "finished")
    assert [row["name"] for row in run.evals()] == list(SAES)
    assert {(row["sae"], row["step"]) for row in run.metrics()} == {
        (name, step) for name in SAES for step in range(1, 13)
    }


@pytest.mark.parametrize("name", SAES)
def test_an_sae_computes_what_it_did(older: Path, name: str) -> None:
    sae = load_sae(older / "finished" / "saes" / name)
    with torch.no_grad():
        f, x_hat = sae.encode(KNOWN["x"]), sae(KNOWN["x"])
    close(f, KNOWN[f"{name}.f"])
    close(x_hat, KNOWN[f"{name}.x_hat"])


@pytest.mark.parametrize("format", ["saelens", "jumprelu", "dictionary_learning", "gsae_core"])
def test_an_export_computes_what_its_sae_did(format: str) -> None:
    (found,) = find_saes(FIXTURE / "exports" / format)
    sae, _ = read_found(found)
    with torch.no_grad():
        close(sae(KNOWN["x"]), KNOWN["gated.x_hat"])


@pytest.mark.parametrize("name", ["gated", "jumprelu"])
def test_an_index_is_still_of_its_sae(older: Path, name: str) -> None:
    index = Run.open(older / "finished").features(name)
    assert index.manifest.n_tokens == 90
    # Firings are counted twice: feature by feature, and in the histogram of each feature.
    fired = index.table["fired"].to_numpy()
    assert fired.sum() == index.manifest.n_entries == index.array("histogram").sum() > 90


def test_what_was_said_of_features_still_counts(older: Path) -> None:
    labels = Labels(older / "finished" / "features" / "gated")
    assert labels.of(3)["label"].text == "every second word"
    assert labels.of(3)["note"].text == "seen on\ntwo lines"
    assert labels.of(5)["label"].score == 0.75
    assert set(labels.of(5)) == {"label", "star"}


def test_a_run_is_evaluated_again(older: Path) -> None:
    run = Run.open(older / "finished")
    (older / "finished" / "evals.json").unlink()
    list(evaluate_run(run))
    assert [row["name"] for row in run.evals()] == list(SAES)


def test_an_interrupted_run_ends_where_an_uninterrupted_one_did(older: Path) -> None:
    run = Run.open(older / "interrupted")
    finish(run)
    assert run.status.state == "finished"
    assert [e["step"] for e in run.events() if e["event"] == "resumed"] == [7]
    for name in ("gated", "relu", "topk"):
        found = load_file(run.sae_folder(name) / "sae_weights.safetensors")
        expected = load_file(older / "finished" / "saes" / name / "sae_weights.safetensors")
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            close(tensor, expected[key])


def test_an_interrupted_jumprelu_run_says_why_it_cannot_go_on(older: Path) -> None:
    run = Run.open(older / "interrupted-jumprelu")
    sentence = refusal(finish, run)
    assert "got one of an earlier version, which learnt their logarithms" in sentence
    assert "start a new run (train --config with the run's config.json" in sentence
    assert (run.status.state, run.status.error) == ("failed", sentence)


def test_a_download_that_was_asked_for_is_still_asked_for(older: Path) -> None:
    (transfer,) = transfers(older)
    assert isinstance(transfer.request, PullRequest)
    assert (transfer.request.repo, transfer.request.to) == ("owner/name", "pulled")
    assert transfer.status.state == "queued"


@pytest.mark.parametrize(
    ("page", "parameters", "said"),
    [
        ("app.py", {}, "interrupted-jumprelu"),
        ("pages/2_Live.py", {"run": "interrupted"}, "at step 7 of 12"),
        ("pages/3_Pareto.py", {"run": "finished"}, "finished: 60 held-out tokens"),
        ("pages/4_Shrinkage.py", {"run": "finished"}, "Gated, λ 0.3: 6 of 16 features fired"),
        (
            "pages/5_Features.py",
            {"run": "finished", "sae": "gated", "feature": "3"},
            "81 of 90 tokens",
        ),
        (
            "pages/5_Features.py",
            {"run": "finished", "sae": "jumprelu", "feature": "1"},
            "1 of 90 tokens",
        ),
    ],
)
def test_a_page_shows_it(older: Path, page: str, parameters: dict[str, str], said: str) -> None:
    at = opened(page, **parameters)
    assert not at.exception, at.exception
    assert not at.error, at.error
    shown = "\n".join([text(at), *(frame.value.to_string() for frame in at.dataframe)])
    assert said in shown.replace("\\", "")  # Markdown's
    if parameters.get("sae") == "gated":
        assert "every second word" in [each.value for each in at.text_input]
