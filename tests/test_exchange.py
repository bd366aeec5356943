"""Foreign SAEs as runs: imported, listed, evaluated, shown by every page; ours exported."""

import json
import math
from pathlib import Path
from typing import Any

import foreign_files as files
import pytest
import torch
from app_pages import PAGES, opened, text
from safetensors.torch import save_file

from gsae_core.checkpoints.checkpoint import load_sae
from gsae_core.checkpoints.formats.libraries import hub_name
from gsae_core.cli import main
from gsae_core.config import RunConfig, SAESpec, TrainRecipe, validated
from gsae_core.errors import InputError
from gsae_core.runs.run import Run, list_runs
from gsae_core.runs.work.imports import import_saes

D_IN = 12  # of the tiny model's residual stream


def write_foreign(folder: Path, **cfg: Any) -> Path:
    """Write a Gated SAE in SAELens' layout for the tiny model's residual stream."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(24, D_IN, generator=generator)
    w = {"W_enc": W.T.contiguous() * 0.3, "W_dec": W * 0.3, "b_dec": torch.zeros(D_IN)}
    w |= {name: torch.full((24,), -0.1) for name in ("b_gate", "b_mag", "r_mag")}
    save_file(w, folder / "sae_weights.safetensors")
    metadata = {"sae_lens_version": "6.0.0", "hook_name": "blocks.1.hook_resid_pre"}
    fields = {"architecture": "gated", "d_in": D_IN, "d_sae": 24, "metadata": metadata}
    (folder / "cfg.json").write_text(json.dumps(fields | cfg))
    return folder


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    return write_foreign(tmp_path / "theirs" / "gated_5")


@pytest.fixture
def imported(foreign: Path, tiny_lm_folder: Path, small_text: Path, root: Path) -> Run:
    """A run of the foreign SAE, and the folder of runs that pages read."""
    model, data = str(tiny_lm_folder), str(small_text)
    return import_saes(foreign, root / "imported", model=model, data=data)[0]


def test_an_imported_run_is_a_finished_run(imported: Run, root: Path) -> None:
    assert imported.status.state == "finished"
    assert [run.id for run in list_runs(root)] == ["imported"]
    config = Run.open(imported.folder).config
    assert config.imported == "SAELens 6"
    (spec,) = config.saes
    assert (spec.name, spec.architecture, spec.d_sae) == ("gated_5", "gated", 24)
    assert math.isnan(spec.sparsity)
    assert (config.model.layer, config.model.site) == (1, "resid_pre")
    assert json.loads((imported.folder / "config.json").read_text())["saes"][0]["sparsity"] is None
    cfg = json.loads((imported.sae_folder("gated_5") / "cfg.json").read_text())
    source = cfg["metadata"]["source"]
    assert (source["library"], source["architecture"]) == ("SAELens 6", "gated")
    assert [name for name, _ in source["files"]] == ["sae_weights.safetensors", "cfg.json"]
    assert load_sae(imported.sae_folder("gated_5")).d_in == D_IN
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []


def test_the_command_line_imports_lists_and_evaluates(
    foreign: Path,
    tiny_lm_folder: Path,
    small_text: Path,
    root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(root / "imported")
    words = ["import", str(foreign), "--to", folder, "--model", str(tiny_lm_folder)]
    assert main.main([*words, "--data", str(small_text)]) == 0
    out = capsys.readouterr().out
    assert "gated_5: gated of SAELens 6\n" in out
    assert "  The config does not say so: the encoder reads x - b_dec.\n" in out
    assert main.main(["evaluate", folder, "--tokens", "200"]) == 0
    (row,) = Run.open(folder).evals()
    assert (row["name"], row["sparsity"], row["d_in"]) == ("gated_5", None, D_IN)
    assert row["l0"] > 0
    capsys.readouterr()
    assert main.main(["list", folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = ["SAE", "architecture", "d_in", "latents", "lambda", "L0", "FVU", "from"]
    assert lines[1].split() == head
    assert lines[2].split()[:5] == ["gated_5", "gated", "12", "24", "–"]
    assert lines[2].endswith("SAELens 6")
    # Its weights are random.
    assert lines[3] == "⚠ FVU above 1: gated_5 reconstructs worse than the mean activation"
    assert lines[4].startswith("gated_5: The config does not say so")
    assert main.main(["list"]) == 0
    assert "SAELens 6" in capsys.readouterr().out
    assert main.main(["list", str(foreign)]) == 0
    shown = capsys.readouterr().out
    assert "layer 1 resid_pre" in shown
    assert "sae_weights.safetensors" in shown


def test_chats_are_evaluated_on_where_an_import_says_so(
    foreign: Path, root: Path, tiny_lm_folder: Path, small_text: Path
) -> None:
    words = ["import", str(foreign), "--to", str(root / "new"), "--model", str(tiny_lm_folder)]
    assert main.main([*words, "--data", str(small_text), "--chat"]) == 0
    data = Run.open(root / "new").config.data
    assert (data.source, data.chat) == (str(small_text), True)


def test_norms_are_folded_when_an_import_asks_for_it(
    foreign: Path, root: Path, tiny_lm_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import", str(foreign), "--to", str(root / "folded"), "--model", str(tiny_lm_folder)]
    assert main.main([*words, "--fold-decoder-norms"]) == 0
    assert "  Decoder norms are folded into the latents, as by SAELens'" in capsys.readouterr().out
    folded = load_sae(root / "folded" / "saes" / "gated_5")
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(24))
    x = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(folded(x), load_sae(foreign)(x))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("import {theirs} --to {out}", "expected the model of the SAEs in {theirs}, which their"),
        ("import {theirs} --to {out} --model m --layer -1", "--layer: expected a number greater"),
        ("import {theirs} --to {out} --model m --chat", "--chat: expected --data with it, got n"),
        ("import {theirs} --to {out} --model m --sae x", "({name}), got 'x'"),
        ("import {theirs} --to {theirs} --model m", "expected a new or empty folder for the run"),
        ("import {theirs} --to {out}/-x --model m", "expected a run name of 1 to 64 letters"),
        ("import {theirs}", "expected"),
        ("list {theirs}/none", "expected a folder or file with an SAE, found nothing at"),
        ("list", "expected runs in {out}, found no such folder; train or import first"),
        ("export {out} --to x", "expected a run folder with a config.json, found none in"),
    ],
)
def test_mistakes_are_sentences(
    foreign: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    sentence: str,
) -> None:
    names = {"theirs": str(foreign), "out": str(tmp_path / "out"), "name": "gated_5"}
    monkeypatch.setenv("GSAE_RUNS", names["out"])
    assert main.main(words.format(**names).split()) == 2
    said = capsys.readouterr().err
    assert sentence.format(**names) in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_saes_of_two_places_are_two_runs(tmp_path: Path) -> None:
    write_foreign(tmp_path / "both" / "a")
    there = {"sae_lens_version": "6.0.0", "hook_name": "blocks.2.hook_resid_pre"}
    write_foreign(tmp_path / "both" / "b", metadata=there)
    with pytest.raises(InputError, match=r"found a at layer 1, resid_pre; b at layer 2, resid_pre"):
        import_saes(tmp_path / "both", tmp_path / "run", model="m")
    run = import_saes(tmp_path / "both", tmp_path / "run", model="m", saes=["b"])[0]
    assert [spec.name for spec in run.config.saes] == ["b"]
    assert run.config.model.layer == 2


def test_a_file_in_the_place_of_the_run_is_refused(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError, match="expected a folder for the run, found a file at"):
        import_saes(foreign, tmp_path / "run", model="m")


def test_a_broken_file_leaves_no_run(foreign: Path, tmp_path: Path) -> None:
    w = files.weights("b_gate", "b_mag", "r_mag") | {"W_dec": torch.full((5, 3), math.nan)}
    save_file(w, foreign / "sae_weights.safetensors")
    with pytest.raises(InputError, match="expected finite numbers"):
        import_saes(foreign, tmp_path / "run", model="m")
    assert not (tmp_path / "run").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("short", "name"),
    [
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("gpt2-small", "openai-community/gpt2"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("someone/else-small", "someone/else-small"),
    ],
)
def test_short_names_of_models_become_the_hubs(short: str, name: str) -> None:
    assert hub_name(short) == name


def test_only_an_imported_sae_may_have_no_known_lambda() -> None:
    unknown: Any = {"name": "a", "architecture": "gated", "d_sae": 4, "sparsity": None}
    fields = {"saes": (unknown,), "train": TrainRecipe(n_tokens=4096)}
    assert math.isnan(validated(RunConfig, fields | {"imported": "SAELens 6"}).saes[0].sparsity)
    with pytest.raises(InputError, match="expected a sparsity to train 'a' with, got none"):
        validated(RunConfig, fields)
    with pytest.raises(InputError, match="expected a finite number"):
        validated(SAESpec, unknown | {"sparsity": math.nan})


@pytest.mark.parametrize("page", PAGES)
def test_every_page_shows_an_imported_run(imported: Run, page: str) -> None:
    for evaluate in (False, True):
        if evaluate:
            assert main.main(["evaluate", str(imported.folder), "--tokens", "200"]) == 0
        at = opened(page, run="imported")
        assert not at.error
        if page == "pages/2_Live.py":
            assert "imported from SAELens 6" in text(at)


def test_export_reads_back_what_it_wrote(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [spec.name for spec in Run.open(trained).config.saes]
    gated = next(name for name in names if name.startswith("gated"))
    words = ["export", str(trained), "--sae", gated, "--format", "jumprelu", "--to"]
    assert main.main([*words, str(tmp_path / "jump")]) == 0
    out = capsys.readouterr().out
    assert "largest difference" in out
    assert "512 random activations" in out
    metadata = json.loads((tmp_path / "jump" / "cfg.json").read_text())["metadata"]
    assert (metadata["converted_from"], "tie" in metadata) == ("gated", False)
    assert main.main([*words, str(tmp_path / "jump")]) == 2
    assert "expected a new or empty folder for the SAE" in capsys.readouterr().err
    assert main.main(["export", str(trained), "--to", str(tmp_path / "other")]) == 2
    assert f"expected --sae with one of this run's SAEs ({names[0]}" in capsys.readouterr().err
