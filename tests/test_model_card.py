"""The card beside pushed SAEs: its numbers are the run's, its code runs, its words do nothing."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from app_pages import edited, hostile_run
from hub_server import TOKEN, Hub
from synthetic import two_places, write_run

from gsae_core.checkpoints.checkpoint import load_sae
from gsae_core.cli import main
from gsae_core.plots.pareto import pareto_svg
from gsae_core.runs.run import Run
from gsae_core.runs.work.publish import make_card, public_name
from gsae_core.text import fixed, percent

NAME = "gated-0.05"
SVG = "{http://www.w3.org/2000/svg}"


def code_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.S)


def row(name: str, l0: float, recovered: float, kind: str = "gated") -> dict[str, Any]:
    return {"name": name, "architecture": kind, "l0": l0, "loss_recovered": recovered}


def test_the_table_holds_the_evaluation_of_what_is_sent_alone(finished: Run) -> None:
    card = make_card(finished, [NAME], "ada/mine")["README.md"]
    (line,) = [line for line in card.splitlines() if line.startswith("| `")]
    (measured,) = [row for row in finished.evals() if row["name"] == NAME]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == f"`{NAME}`"
    assert cells[1:4] == ["6", fixed(measured["l0"], 1), percent(measured["loss_recovered"], 2)]
    assert f"On {measured['n_tokens']:,} held-out tokens" in card


def test_a_card_says_where_zeros_and_reconstructions_were_read(finished: Run) -> None:
    card = make_card(finished, [NAME], "ada/mine")["README.md"]
    assert "would do as well (zeros at every position; reconstructions at counted tokens" in card
    assert "earlier version" not in card
    with edited(finished.folder / "evals.json") as evals:
        for row in evals["saes"]:
            del row["zeroed"]
    card = make_card(finished, [NAME], "ada/mine")["README.md"]
    assert "(zeros and reconstructions at counted tokens alone, BOS, separators" in card
    assert "Measure again: python -m gsae_core evaluate RUN." in card
    # A folder of this machine is nobody's business.
    assert str(finished.folder) not in card


def test_a_card_does_not_say_why_no_more_was_measured(finished: Run) -> None:
    why = f"no more than what was read before could be read (nothing in {finished.folder})"
    with edited(finished.folder / "evals.json") as evals:
        for row in evals["saes"]:
            row |= {"n_tokens_asked": 10**6, "shortage": why}
    card = make_card(finished, [NAME], "ada/mine")["README.md"]
    assert f"On {finished.evals()[0]['n_tokens']} held-out tokens. L0" in card
    assert str(finished.folder) not in card


def test_the_front_matter_is_yaml_and_names_no_folder(finished: Run) -> None:
    card = make_card(finished, [NAME], "ada/mine")["README.md"]
    assert card.startswith("---\n")
    matter = yaml.safe_load(card.split("---")[1])
    assert matter == {"library_name": "saelens", "tags": ["sparse-autoencoder", "gated-sae"]}
    # The run's model and text are folders of this machine.
    assert str(Path(finished.config.model.name).parent) not in card


def test_names_on_the_hub_are_told_and_folders_lose_what_leads_to_them(tmp_path: Path) -> None:
    assert public_name("openai-community/gpt2") == "openai-community/gpt2"
    assert public_name(str(tmp_path)) == tmp_path.name
    assert public_name("stdlib") == "stdlib"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_the_card_s_jumprelu_code_runs_and_computes_what_the_gated_sae_does(
    hub: Hub, finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main.main(["push", str(finished.folder), "--sae", NAME, "--to", "ada/mine"]) == 0
    card = hub.repos["models", "ada/mine"].head["README.md"].decode()
    (code,) = [block for block in code_blocks(card) if "threshold" in block]
    names: dict[str, Any] = {}
    exec(code, names)
    sae = load_sae(finished.sae_folder(NAME))
    x = torch.randn(64, sae.d_in, generator=torch.Generator().manual_seed(0))
    assert (sae.encode(x) > 0).any()
    assert torch.allclose(names["encode"](x), sae.encode(x), atol=1e-6)
    assert torch.allclose(names["decode"](names["encode"](x)), sae(x), atol=1e-6)


def test_the_card_s_dictionary_learning_names_are_those_of_the_export(
    finished: Run, tmp_path: Path
) -> None:
    from gsae_core.checkpoints.formats.write import write_sae

    sae = load_sae(finished.sae_folder(NAME))
    write_sae(sae, tmp_path / "dl", format="dictionary_learning", metadata={})
    theirs = torch.load(tmp_path / "dl" / "ae.pt", weights_only=True)
    card = make_card(finished, [NAME], "ada/mine")["README.md"]
    (code,) = [block for block in code_blocks(card) if "GatedAutoEncoder" in block]
    held: dict[str, Any] = {}

    class Module:
        def __init__(self, d_in: int, d_sae: int) -> None:
            held["shape"] = (d_in, d_sae)

        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            held["state"] = state

    from safetensors.torch import load_file

    names = {
        "w": load_file(finished.sae_folder(NAME) / "sae_weights.safetensors"),
        "GatedAutoEncoder": Module,
    }
    exec(code.partition("\n")[2], names)
    assert held["shape"] == (sae.d_in, sae.d_sae)
    assert held["state"].keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(held["state"][name], tensor)


def test_code_that_would_leave_out_a_token_s_normalising_is_not_shown(finished: Run) -> None:
    with edited(finished.sae_folder(NAME) / "cfg.json") as cfg:
        cfg["normalize_activations"] = "layer_norm"
    card = make_card(finished, [NAME], "ada/mine")["README.md"]
    assert "Each token is normalised on its way in and out (`layer_norm`)." in card
    assert f'SAE.from_pretrained("ada/mine", "{NAME}")' in card
    assert "def encode" not in card
    assert "GatedAutoEncoder" not in card


def test_a_relu_sae_is_not_shown_as_what_it_is_not(finished: Run) -> None:
    card = make_card(finished, ["relu-0.05"], "ada/mine")["README.md"]
    assert "GatedAutoEncoder" not in card
    assert 'SAE.from_pretrained("ada/mine", "relu-0.05")' in card


def test_hostile_names_do_nothing_in_a_card(root: Path) -> None:
    run = hostile_run(root)
    names = [spec.name for spec in run.config.saes]
    files = make_card(run, names, "ada/mine")
    prose = re.sub(r"```.*?```", "", files["README.md"], flags=re.S)
    assert re.search(r"(?<!\\)<(script|img|style)", prose) is None
    assert re.search(r"(?<!\\)!\[x", prose) is None
    ElementTree.fromstring(files["pareto.svg"])


def test_the_figure_places_l0_by_its_logarithm_and_rings_what_is_sent() -> None:
    rows = [row("a", 10, 0.8), row("b", 100, 0.9), row("c", 1000, 0.95, "relu")]
    drawn = pareto_svg(rows, chosen=["b"], title="run")
    assert drawn is not None
    root = ElementTree.fromstring(drawn)
    named = [mark for mark in root.iter(f"{SVG}path") if "recovered:" in mark.get("aria-label", "")]
    a, b, c, ring = (mark for mark in named if mark.get("transform"))
    assert place(b)[0] - place(a)[0] == pytest.approx(place(c)[0] - place(b)[0], abs=0.2)
    assert place(ring) == place(b)
    assert a.get("fill") == b.get("fill") != c.get("fill")


def place(mark: ElementTree.Element) -> tuple[float, float]:
    x, y = re.findall(r"[\d.]+", mark.get("transform", ""))
    return float(x), float(y)


def test_there_is_no_figure_of_nothing_measured() -> None:
    rows = [row("a", 0.0, 0.5), row("b", 3.0, float("nan"))]
    assert pareto_svg(rows, chosen=[], title="run") is None


def test_saes_of_several_hook_points_have_each_its_own(root: Path) -> None:
    run = write_run(root, "both", run_config=two_places())
    one = make_card(run, ["gated-0.1-l3", "relu-0.1-l3"], "ada/mine")
    assert "on `blocks.3.hook_resid_post` of bundled" in one["README.md"]
    # Of the four λ there, not of those at the other hook point too.
    assert "1.9x as many features (6 matched points)" in one["README.md"].replace("\\", "")
    assert len(one) == 2
    card = make_card(run, ["gated-0.1-l1", "gated-0.1-l3"], "ada/mine")
    assert list(card) == ["README.md"]  # no frontier in common
    said = card["README.md"]
    assert "on `blocks.1.hook_resid_post, blocks.3.hook_resid_post` of bundled" in said
    assert re.search(r"- `gated-0.1-l3`: .*, on `blocks.3.hook_resid_post`\n", said)
